"""What a run warns of: its manifest keeps it, also where --quiet shows none of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger("ddkit")
NEWS = {"news": True}  # `extra` of what is worth a line at the time, and is no warning of a result
_said: ContextVar[list[str] | None] = ContextVar("said", default=None)


class _Keeper(logging.Handler):
    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.kept and not getattr(record, "news", False):
            self.kept.append(message)


@contextmanager
def recording() -> Iterator[None]:
    """Inside, `warnings` has what ddkit's log warned of since this began; of two, one inside the other, the inner one's own."""
    kept: list[str] = []
    handler, token = _Keeper(kept), _said.set(kept)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        _said.reset(token)


def warnings() -> list[str]:
    """Returns what the run at hand has warned of, each message once."""
    return list(_said.get() or [])


def shown(wanted: bool) -> None:
    """Decides whether warnings reach stderr from now on; `recording` has them in any case."""
    log.propagate = wanted
    if not any(isinstance(handler, logging.NullHandler) for handler in log.handlers):
        log.addHandler(logging.NullHandler())
