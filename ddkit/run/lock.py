"""A lock on a folder: one process writes there at a time, and a process that is gone holds none."""

from __future__ import annotations

import errno
import logging
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path

from ddkit.errors import RunFilesError
from ddkit.run.manifest import LOCK

log = logging.getLogger("ddkit")
LOCK_SECONDS = 20.0  # how long to wait for another process that adds to a finished run
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Holds `folder`/.lock, which the operating system lets go of when this process ends, however it ends.

    Raises RunFilesError if another process (or another run of this one) holds it for longer than `wait` seconds. The file
    is removed on release; one that a killed process left behind is not held, and is taken over.
    """

    def __init__(self, folder: Path, *, wait: float = 0.0) -> None:
        self.path = folder / LOCK
        self._descriptor = -1
        until = time.monotonic() + wait
        while not self._take():
            if time.monotonic() >= until:
                raise RunFilesError(f"Another process is writing to {folder}. Wait until it ends, or name another folder with --out.")
            time.sleep(0.05)

    def _take(self) -> bool:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with suppress(FileNotFoundError):  # its holder may have removed the file since it was opened, and another may be in its place
            if _locked(descriptor) and os.path.samestat(os.fstat(descriptor), os.lstat(self.path)):
                self._descriptor = descriptor
                _held.add(self)
                return True
        os.close(descriptor)
        return False

    def _forget(self) -> None:
        descriptor = self._descriptor
        self._descriptor = -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def release(self) -> None:
        """Removes the file and lets go of it; a second call does nothing."""
        if self._descriptor >= 0:
            with suppress(OSError):
                self.path.unlink()
        self._forget()


def _locked(descriptor: int) -> bool:
    """Locks an open file; False where another holds it. Where there are no such locks (Windows, some network folders) it is True."""
    try:
        import fcntl
    except ImportError:
        log.warning("This system has no file locks. Do not start a second run in the same folder.")
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        log.warning("The file system of this folder has no locks (%s). Do not start a second run in it.", error.strerror)
    return True


def _forget_all() -> None:
    """Lets go of every lock in a process that was forked: it outlives the one that holds them."""
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
