"""What a run warns of: its manifest keeps it, also where --quiet shows none of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger("ddkit")
NEWS = {"news": True}  # `extra` of what is worth a line at the time, and is no warning of a result
_kept: ContextVar[tuple[list[str], ...]] = ContextVar("kept", default=())  # of the runs at hand: one makes another for a blend


class _Keeper(logging.Filter):
    """Keeps warnings for the runs at hand, and lets pass what is to be shown.

    It is no handler: with one of its own Python would no longer show what nobody else handles.
    """

    shown_from = logging.NOTSET

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING and not getattr(record, "news", False):
            try:
                message = record.getMessage()
            except (TypeError, ValueError):  # a stranger's message that does not fit its arguments ends no run
                message = str(record.msg)
            add([message])
        return record.levelno >= self.shown_from


_keeper = _Keeper()
log.addFilter(_keeper)


@contextmanager
def recording() -> Iterator[None]:
    """Inside, `warnings` has what ddkit's log warned of since this began; of two, one inside the other, the inner one's own.

    A run in another thread has its own, as other threads begin without any.
    """
    token = _kept.set((*_kept.get(), []))
    try:
        yield
    finally:
        _kept.reset(token)


def add(messages: Sequence[str]) -> None:
    """Counts `messages` among the warnings of the runs at hand: those that a run had before it was interrupted."""
    for kept in _kept.get():
        kept += [message for message in messages if message not in kept]


def warnings() -> list[str]:
    """Returns what the run at hand has warned of, each message once."""
    return list(_kept.get()[-1]) if _kept.get() else []


def show_from(level: int) -> None:
    """Shows nothing of ddkit's log below `level` from now on; `recording` has the warnings in any case."""
    _keeper.shown_from = level
