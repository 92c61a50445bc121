"""What a run warns of: its manifest keeps it, also where --quiet shows none of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger("ddkit")
NEWS = {"news": True}  # `extra` of what is worth a line at the time, and is no warning of a result
_said: ContextVar[list[str] | None] = ContextVar("said", default=None)


class _Keeper(logging.Filter):
    """Keeps warnings and lets all pass: no handler, as with one of its own Python would no longer show what nobody else handles."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self.kept = kept

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING and not getattr(record, "news", False):
            try:
                message = record.getMessage()
            except (TypeError, ValueError):  # a stranger's message that does not fit its arguments ends no run
                message = str(record.msg)
            if message not in self.kept:
                self.kept.append(message)
        return True


@contextmanager
def recording() -> Iterator[None]:
    """Inside, `warnings` has what ddkit's log warned of since this began; of two, one inside the other, the inner one's own."""
    kept: list[str] = []
    keeper, token = _Keeper(kept), _said.set(kept)
    log.addFilter(keeper)
    try:
        yield
    finally:
        log.removeFilter(keeper)
        _said.reset(token)


def warnings() -> list[str]:
    """Returns what the run at hand has warned of, each message once."""
    return list(_said.get() or [])


def shown(wanted: bool) -> None:
    """Decides whether warnings reach stderr from now on; `recording` has them in any case."""
    log.propagate = wanted
    if not any(isinstance(handler, logging.NullHandler) for handler in log.handlers):
        log.addHandler(logging.NullHandler())
