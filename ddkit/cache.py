"""Where ddkit keeps what is costly to make and can be made again, and the part of it that is this user's alone.

Whoever can write into the cache can exchange what is in it. So all of its folders are made for the user alone, and what is taken from it
must be what this user put there: `vouch` keeps a mark of each file in the private part.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from ddkit.errors import RunFilesError
from ddkit.files import read_text, with_home, write_atomic

log = logging.getLogger("ddkit")


def cache_folder() -> Path:
    """Returns $DDKIT_CACHE, else `ddkit` in the XDG cache, else, without a home that can be written, a private temporary folder."""
    own = os.environ.get("DDKIT_CACHE")
    if own:
        return Path(with_home(own))
    home, xdg = os.path.expanduser("~"), os.environ.get("XDG_CACHE_HOME")
    if xdg or os.path.isdir(home):
        folder = Path(xdg or os.path.join(home, ".cache")) / "ddkit"
        with suppress(OSError):
            make_folder(folder)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    found = _temporary_folder()
    os.environ["DDKIT_CACHE"] = str(found)  # for this process and those that it starts, and told once
    log.warning(
        "You have no home folder in which a cache could be written: %s is used instead, and what is kept there (trained teachers, decoded "
        "images, compiled code) may be gone the next time. The environment variable DDKIT_CACHE names another folder.",
        found, extra={"news": True},
    )  # fmt: skip
    return found


def _temporary_folder() -> Path:
    """Returns a folder for temporary files of this user's alone: the same each time, unless another user has taken its name."""
    try:
        folder = Path(tempfile.gettempdir(), f"ddkit-{os.getuid()}")
        with suppress(OSError):
            folder.mkdir(mode=0o700)
        return folder if is_private(folder) else passing_folder()
    except OSError as error:
        raise RunFilesError(f"There is no folder for a cache ({error}). Name one with the environment variable DDKIT_CACHE.") from None


def passing_folder() -> Path:
    """Returns a new folder of this user's alone that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="ddkit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def make_folder(folder: Path) -> Path:
    """Makes a folder, and those above it that are missing, for this user alone; raises OSError if it cannot be made."""
    for missing in [each for each in (*reversed(folder.parents), folder) if not each.is_dir()]:
        missing.mkdir(mode=0o700, exist_ok=True)
    return folder


def is_private(folder: Path) -> bool:
    """Whether `folder` is a folder, not a link to one, of this user, and closed to all others."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def private_folder(name: str) -> Path:
    """Returns the folder `name` in the part of the cache that is this user's alone, made if it is missing.

    Raises RunFilesError if it cannot be made, or others could write there.
    """
    private = cache_folder() / "private"
    try:
        make_folder(private)
        if is_private(private):
            return make_folder(private / name)
    except OSError as error:
        raise RunFilesError(f"{private} cannot be made: {error.strerror or error}.") from None
    raise RunFilesError(
        f"{private} is another user's, or open to others: what is there is not used. Its owner makes it private with `chmod 700 {private}`."
    )


def mark_of(file: Path) -> Path:
    """Returns the place of the mark of a file in the cache; it is touched when the file is used."""
    return private_folder("marks") / file.name


def vouch(file: Path, mark: str) -> None:
    """Keeps a mark of a file that this user has put into the cache; raises RunFilesError if it cannot be kept."""
    write_atomic(mark_of(file), mark.encode())


def vouched(file: Path) -> str | None:
    """Returns the mark of a file in the cache, None if this user has not put it there. Makes no folder for a file that is not there."""
    if not file.exists():
        return None
    with suppress(OSError, RunFilesError, ValueError):
        return read_text(mark_of(file))
    return None
