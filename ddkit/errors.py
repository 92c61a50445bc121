"""The errors that ddkit raises for bad input, one class per documented exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterable

ALLOCATORS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")  # how CUDA's and torch's put it
NEWS = {"news": True}  # `extra` of a log message that is worth a line at the time, and is no warning of a result
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
