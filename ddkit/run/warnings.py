"""What a run warns of: a filter of ddkit's log keeps it for the manifest, also where --quiet shows none of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)  # of the run of this thread
_shown_from = logging.NOTSET


def _keep(record: logging.LogRecord) -> bool:
    """Keeps a warning for the run at hand, and lets pass what is to be shown.

    It is no handler: with one of its own Python would no longer show what nobody else handles.
    """
    if record.levelno >= logging.WARNING and not getattr(record, "news", False):
        try:
            add([record.getMessage()])
        except (TypeError, ValueError):  # a third-party message that does not fit its arguments ends no run
            add([str(record.msg)])
    return record.levelno >= _shown_from


logging.getLogger("ddkit").addFilter(_keep)


@contextmanager
def recording() -> Iterator[None]:
    """Inside, `warnings` has what ddkit's log warned of since this began. A run in another thread has its own."""
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def add(messages: Sequence[str]) -> None:
    """Counts `messages` among the warnings of the run at hand, such as those that it had before it was interrupted."""
    kept = _kept.get()
    if kept is not None:
        kept += [message for message in messages if message not in kept]


def warnings() -> list[str]:
    """Returns what the run at hand has warned of, each message once."""
    return list(_kept.get() or [])


def show_from(level: int) -> None:
    """Shows nothing of ddkit's log below `level` from now on; `recording` has the warnings in any case."""
    global _shown_from
    _shown_from = level
