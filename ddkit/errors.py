"""The errors that ddkit raises for bad input, one class per documented exit code."""

from __future__ import annotations

import difflib
import errno
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

ALLOCATORS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")  # how CUDA's and torch's put it
LONGEST = 1800  # characters of a message: a value in it may have any length


class DdkitError(Exception):
    """A problem that the user can fix. The message is one paragraph with the problem, its place and a fix.

    Examples:
        >>> try:
        ...     ddkit.load("nowhere")
        ... except ddkit.DdkitError as error:
        ...     print(type(error).__name__, error.exit_code)
        RunFilesError 5
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST - 505]} ... {message[-500:]}")


class RunFailed(DdkitError):
    """The run itself failed: a non-finite loss term, a plugin that raised (exit code 1)."""


class FlagError(DdkitError):
    """The value of a flag or argument is impossible by itself (exit code 2)."""

    exit_code = 2


class PluginError(DdkitError):
    """A plugin was not found or could not be loaded (exit code 3)."""

    exit_code = 3


class InputError(DdkitError):
    """A recipe, a --set, the data or the teacher cannot be used (exit code 4).

    `path` is the recipe path at fault (`losses.dm.weight`), if there is one.
    """

    exit_code = 4

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class RunFilesError(DdkitError):
    """A run or artifact is unusable, or the output cannot be written (exit code 5)."""

    exit_code = 5


class Interrupted(DdkitError):
    """A signal ended the run, after a checkpoint (exit code 128 and the number of the signal: 129, 130 or 143)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.advised = False  # whether it says how to go on


def refuse_unused(flags: Iterable[str], why: str) -> None:
    """Raises FlagError where there are `flags`: names of flags that were given and do nothing, as `why` says."""
    names = list(flags)
    if names:
        one = len(names) == 1
        raise FlagError(f"{', '.join(names)} {'has' if one else 'have'} no effect: {why} Leave {'it' if one else 'them'} out.")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised `error`: Python's, numpy's, the system's, or torch's on any device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in told(error).lower() for text in ALLOCATORS))


def told(error: BaseException) -> str:
    """Returns the class of an exception and its text, without a full stop; the exception may be third-party code, whose text raises too."""
    try:
        return f"{type(error).__name__}: {error}".rstrip(".")
    except Exception:
        return f"{type(error).__name__}, whose text cannot be read"


def is_its_own(error: BaseException) -> bool:
    """Whether third-party code that raised `error` is to be named for it, whatever kind of exception it is.

    Not for an error of ddkit's, want of memory, or KeyboardInterrupt: Ctrl-C comes in the middle of whatever code runs.
    """
    return not isinstance(error, DdkitError | KeyboardInterrupt) and not out_of_memory(error)


def doubles(values: Iterable[Any]) -> list[Any]:
    """Returns the values that are there more than once, each once, in order."""
    return [value for value, count in Counter(values).items() if count > 1]


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Returns "Did you mean 'x'?" where one of `choices` is near `name`, else the choices themselves; "" is none to suggest."""
    known = sorted(filter(None, choices))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Choose from: {', '.join(known)}." if known else "None is available."


def counted(number: int, noun: str) -> str:
    """Returns "1 epoch", "2 epochs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    r"""Returns `text` with what acts on a terminal, hides, or cannot be written as JSON's escapes: control characters, direction marks.

    >>> printable("cat\x1b[31m"), printable("chat é")
    ('cat\\u001b[31m', 'chat é')
    """

    def shown(char: re.Match[str]) -> str:
        hides = unicodedata.category(char[0]) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return json.dumps(char[0])[1:-1] if hides else char[0]

    return re.sub(r"[^ -~\n\t]", shown, text)


def is_text(text: str) -> bool:
    """Whether `text` can be written as UTF-8: a file name of other bytes has half characters in it."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def shown(value: object, most: int = 80) -> str:
    """Returns repr(value) for a message, cut to `most` characters; a number too long to be written says so."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"<a {type(value).__name__} too long to be shown>"
    return text if len(text) <= most else f"{text[: most - 5]} ..."
