"""Names on the disk: those of a run's own files, and the names that users and plugins give as one part of a path."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddkit.errors import FlagError, RunFilesError, is_text, printable
from ddkit.files import is_leftover, kind_of, read_json

SET = "synthetic.safetensors"
RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
PREVIEW = "preview.png"
FILM = "film.safetensors"
REPORT = "report.html"
MANIFEST = "manifest.json"
LOCK = ".lock"
LISTED = (SET, RECIPE, METRICS, EVALUATION, PREVIEW, FILM, REPORT)  # in the manifest
CHECKPOINTS = "checkpoints"
CHECKPOINT = re.compile(r"step-(\d{8,})(?:\.part-(\d+)-of-(\d+))?\.safetensors")
PARTS = "parts"  # the sets of a blend that its recipe makes, each a run directory
PARTS_OF_BLEND = ("first", "second")
STAGE = ".export"  # where an exporter writes, in the folder that it is for
JOURNAL = ".export.json"  # the names of what is being moved up from there

LONGEST = 100
WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for itself


def path_part(name: str, *, empty: str = "run") -> str:
    """Returns `name` as one part of a path, for every file system and shell; `empty` if nothing of it is left.

    Letters, digits and ``._+-`` of ASCII stay, and a name of more than 100 letters is cut and ends in a digest.

    >>> path_part("../a b:c"), path_part("/"), path_part("con")
    ('a-b-c', 'run', 'run-con')
    """
    part = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or empty
    part = f"{empty}-{part}" if WINDOWS.fullmatch(part) else part
    if len(part) <= LONGEST:
        return part
    return f"{part[: LONGEST - 9]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def without_folders(value: Any) -> Any:
    """Returns data of a recipe with the last part alone of absolute paths: the others are nobody's business and mean nothing elsewhere."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def check_out(path: Path) -> None:
    """Raises FlagError if the name given with --out is of bytes that files of a run, which are text, cannot tell."""
    if not is_text(str(path)) or "\0" in str(path):
        raise FlagError(f"--out {printable(str(path))} is a name that is no UTF-8 text, and files of a run are text. Name another.")


def own_entries(run: Path) -> Iterator[Path]:
    """Yields what has a name of ddkit's own in the run directory `run`, whatever it is; what is in a folder before the folder."""
    for entry in sorted(run.iterdir()) if run.is_dir() else []:
        inside = sorted(entry.iterdir()) if is_own_folder(entry) and entry.is_dir() and not entry.is_symlink() else []
        if entry.name == CHECKPOINTS:
            yield from (file for file in inside if CHECKPOINT.fullmatch(file.name) or is_leftover(file))
        for part in inside if entry.name == PARTS else []:
            if part.name in PARTS_OF_BLEND:
                yield from () if part.is_symlink() else own_entries(part)
                yield part
        if is_own_folder(entry) or entry.name in (*LISTED, MANIFEST, LOCK, JOURNAL) or (is_leftover(entry) and not entry.is_dir()):
            yield entry


def is_own_folder(entry: Path) -> bool:
    """Whether an entry has the name of a folder of a run, whatever it is."""
    return entry.name in (CHECKPOINTS, PARTS, STAGE) or (entry.name in PARTS_OF_BLEND and entry.parent.name == PARTS)


def check_own(run: Path) -> None:
    """Raises RunFilesError if a file of the run directory `run`, which itself may be a link, is a link, a pipe or the like."""
    try:
        for entry in own_entries(run):
            with suppress(FileNotFoundError):  # it was removed just now
                mode = entry.lstat().st_mode
                if not (stat.S_ISDIR(mode) if is_own_folder(entry) else stat.S_ISREG(mode) or is_leftover(entry)):
                    raise RunFilesError(
                        f"{entry} is {kind_of(mode)}, not the {'folder' if is_own_folder(entry) else 'regular file'} that a run has there: "
                        "nothing is read or written through it. Put a copy of the original in its place, or make the run again."
                    )
    except OSError as error:
        raise RunFilesError(f"{run} cannot be read: {error.strerror or error}.") from None


def remove_own(run: Path) -> None:
    """Removes what ddkit has put into the run directory `run`, apart from its lock, and nothing else.

    The manifest goes first, and last what tells that the rest can go: cut off, this can be done again.
    """
    order = {MANIFEST: -1, RECIPE: 1, JOURNAL: 1}
    for entry in sorted([*_exported(run), *own_entries(run)], key=lambda entry: order.get(entry.name, 0)):
        with suppress(OSError):
            if entry.name in (CHECKPOINTS, PARTS, *PARTS_OF_BLEND):  # others may have put something there
                entry.rmdir()
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != run / LOCK:
                entry.unlink()


def _exported(run: Path) -> list[Path]:
    """Returns what an export that was cut off may have moved into `run`."""
    try:
        names = read_json(run / JOURNAL)
    except RunFilesError:
        return []
    here = [entry for entry in run.iterdir() if isinstance(names, list) and entry.name in names]
    return [entry for entry in here if entry.name != LOCK]


def is_left_behind(run: Path) -> bool:
    """Whether `run` holds nothing but what ddkit wrote there, and no run that could be evaluated or continued."""
    own = [*_exported(run), *own_entries(run)]
    kept = [entry for entry in own if entry.name in (MANIFEST, PARTS) or CHECKPOINT.fullmatch(entry.name)]
    return set(run.iterdir()) <= set(own) and (not kept or (run / JOURNAL).exists())
