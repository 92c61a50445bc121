"""The cache: what is costly to make and can be made again.

Whoever can write into it can exchange what is in it. So all of its folders are made for the user alone, and what is taken from it must be
what this user put there: `vouch` keeps a mark of each file.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddkit.errors import NEWS, RunFilesError
from ddkit.files import json_digest, read_text, read_with_digest, with_digest, with_home, write_atomic, write_json

log = logging.getLogger("ddkit")


def cache_folder() -> Path:
    """Returns $DDKIT_CACHE, or else `ddkit` in the XDG cache, or else, without a writable home, a private temporary folder.

    Examples:
        >>> ddkit.data.cache_folder().is_absolute()
        True
    """
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
    try:
        found = Path(tempfile.gettempdir(), f"ddkit-{os.getuid()}")
        with suppress(OSError):
            found.mkdir(mode=0o700)
        if not _is_private(found):  # another user has taken its name
            found = passing_folder()
    except OSError as error:
        raise RunFilesError(f"No folder for the cache can be made ({error}). Name one with the environment variable DDKIT_CACHE.") from None
    os.environ["DDKIT_CACHE"] = str(found)  # for this process and those that it starts, so that one of them warns
    log.warning(
        "You have no home folder for a cache, so %s is used instead. Files in that folder (trained teachers, decoded images, compiled "
        "code) may be deleted before the next run. Set the environment variable DDKIT_CACHE to use another folder.",
        found, extra=NEWS,
    )  # fmt: skip
    return found


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


def _is_private(folder: Path) -> bool:
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
        if _is_private(private):
            return make_folder(private / name)
    except OSError as error:
        raise RunFilesError(f"{private} cannot be made: {error.strerror or error}.") from None
    raise RunFilesError(
        f"{private} belongs to another user or can be written by others, so it is not used. Its owner can run `chmod 700 {private}`."
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


class CachedResult:
    """The place in the cache of a small result that is costly to compute: JSON data, with a key of everything it depends on.

    `folder` names the kind of result. `key` is JSON data that decides the result to the last bit: digests of data and code, options,
    seeds, versions. A cache that cannot be read or written raises no error: nothing is kept, and the log says why.

    Examples:
        >>> place = ddkit.data.CachedResult("example", {"seed": 0, "version": 1})
        >>> place.write({"mean": 0.5})
        >>> place.read()
        {'mean': 0.5}
    """

    def __init__(self, folder: str, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key = json_digest(key)

    @property
    def _path(self) -> Path:
        return private_folder(self.folder) / f"{self.key}.json"

    def read(self) -> Any:
        """Returns the result; None if it is not in the cache, or if its file is damaged or has another key."""
        try:
            if not self._path.exists():
                return None
            found = read_with_digest(self._path)
            if found.get("key") != self.key:
                raise RunFilesError(f"{self._path} contains the result of another key.")
            return found.get("value")
        except (RunFilesError, OSError) as error:
            log.info("A result in the cache is not used and is computed again: %s", error)
            return None

    def write(self, value: Any) -> None:
        """Keeps the result; one that is there is replaced."""
        try:
            write_json(self._path, with_digest({"key": self.key, "value": value}))
        except (RunFilesError, OSError) as error:
            log.info("A result could not be written to the cache: %s", error)
