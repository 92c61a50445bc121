"""Stores of a study's sets: a share of the sets for each of several machines, and stores that are put together again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ddkit.errors import FlagError, RunFilesError
from ddkit.files import json_digest, read_bytes, read_with_digest, sync, write_atomic
from ddkit.run.directory import RunDirectory
from ddkit.run.manifest import MANIFEST, SET, check_listed, read_manifest, remove_own
from ddkit.studies.grid import Task

SETS = "sets"  # the folder of a store that has a run directory for each set, and a file for each evaluation of it


def share(tasks: Sequence[Task], number: int, of: int) -> list[Task]:
    """Returns the tasks of share `number` (0 to of - 1): every task is in one share, and a blend in that of its parts."""
    owner: dict[Path, Path] = {}

    def root(path: Path) -> Path:
        while owner.setdefault(path, path) != path:
            path = owner[path]
        return path

    for task in tasks:
        for part in task.parts:
            owner[root(part)] = root(task.path)
    numbers: dict[Path, int] = {}
    for task in tasks:
        numbers.setdefault(root(task.path), len(numbers))
    return [task for task in tasks if numbers[root(task.path)] % of == number]


def merge(other: Path, out: Path) -> int:
    """Copies into the store `out` what the store `other` has finished and `out` has not; returns how many sets and evaluations.

    What both have stays as it is in `out`, and an evaluation of another set of the same name is left. Raises RunFilesError where `other`
    is no store or a file in it is damaged, and then leaves no half-copied set behind.
    """
    source, target = other / SETS, out / SETS
    if not source.is_dir():
        raise RunFilesError(f"--merge {other} has no folder {SETS}. Name the --out of an earlier `ddkit reproduce`.")
    if source.resolve() == target.resolve():
        raise FlagError(f"--merge {other} is the same folder as --out. Name another one, or leave it out.")
    for entry in (source, *source.iterdir(), *target.glob("*")):
        if entry.is_symlink():
            raise RunFilesError(f"--merge {other}: {entry} is a symbolic link, which is not copied. Replace it by a copy of its target.")
    found = 0
    try:
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted(source.iterdir()):
            place = target / entry.name
            if (entry / MANIFEST).is_file() and not (place / MANIFEST).is_file():
                _copy_set(entry, place)
                found += 1
            elif entry.suffix == ".json" and entry.is_file() and not place.is_file() and _is_of_the_same_set(entry, source, target):
                read_with_digest(entry)
                write_atomic(place, read_bytes(entry))
                found += 1
    except OSError as error:
        raise RunFilesError(f"{error.filename or target} cannot be copied: {error.strerror or error}.") from None
    return found


def _is_of_the_same_set(evaluation: Path, source: Path, target: Path) -> bool:
    """Whether the set that was evaluated is the one that `target` has; one that both have made may differ in the last digits."""
    name = evaluation.stem.rpartition("-")[0]
    both = [store / name for store in (source, target) if (store / name / MANIFEST).is_file()]
    return len({json_digest(read_manifest(run)["files"].get(SET)) for run in both}) < 2


def _copy_set(run: Path, place: Path) -> None:
    """Copies what the manifest of a finished run lists, and the manifest, under another name first."""
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
        copied = Path(folder) / place.name
        copied.mkdir()
        for name in [*read_manifest(run)["files"], MANIFEST]:  # which refuses links and names with folders in them
            check_listed(run, name)
            shutil.copyfile(run / name, copied / name, follow_symlinks=False)
        if place.is_dir():  # begun here, and finished there
            with RunDirectory(place).take():
                remove_own(place)
            place.rmdir()
        copied.rename(place)
    sync(place.parent)
