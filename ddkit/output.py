"""Standard output: for the answers of a command or child process alone. Whatever else is printed goes to standard error."""

from __future__ import annotations

import os
import sys
from typing import TextIO

_kept: TextIO | None = None


def answers() -> TextIO:
    """Returns the standard output that this process was started with; from the first call on nothing else writes there.

    Descriptor 1 is standard error then, for as long as the process lasts: for prints of plugins and C code, at an import, in a call or at
    the exit, and for processes that are started. A program with a sys.stdout of its own, which is not descriptor 1, keeps that as it is.
    """
    global _kept
    if _kept is None and _is_descriptor_1(sys.stdout):
        sys.stdout.flush()
        _kept = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115  # as long as the process
        os.dup2(2, 1)
    return sys.stdout if _kept is None else _kept


def discard() -> None:
    """Lets go of answers that nobody reads any more, so that the end of the process does not stumble over them."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), answers().fileno())


def _is_descriptor_1(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.fileno() == 1
    except (OSError, ValueError):  # not a file at all
        return False
