"""The files of a run: their names, which of them are ddkit's own, the manifest, which says what they were
when they were written, and the rows of the evaluations."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ddkit.components.base import Evaluation
from ddkit.errors import RunFilesError
from ddkit.files import SCHEMA, is_leftover, kind_of, read_json, read_with_digest, sha256, with_digest, write_json

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
STAGE = ".export"  # where an exporter writes, in the folder that it is for
JOURNAL = ".export.json"  # the names of what is being moved up from there
FOLDERS = (CHECKPOINTS, STAGE)
DERIVED = ("blend", "join", "split")  # where the manifest of a set that is made of others names these


# Which files are ddkit's own


def own_entries(run: Path) -> Iterator[Path]:
    """Yields what has a name of ddkit's own in the run directory `run`, whatever it is; what is in a folder before the folder."""
    for entry in sorted(run.iterdir()) if run.is_dir() else []:
        if entry.name == CHECKPOINTS and entry.is_dir() and not entry.is_symlink():
            yield from (file for file in sorted(entry.iterdir()) if CHECKPOINT.fullmatch(file.name) or is_leftover(file))
        if entry.name in (*LISTED, *FOLDERS, MANIFEST, LOCK, JOURNAL) or (is_leftover(entry) and not entry.is_dir()):
            yield entry


def check_own(run: Path) -> None:
    """Raises RunFilesError if a file of the run directory `run`, which itself may be a link, is a link, a pipe or the like."""
    try:
        for entry in own_entries(run):
            with suppress(FileNotFoundError):  # it was removed just now
                mode, is_folder = entry.lstat().st_mode, entry.name in FOLDERS
                if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode) or is_leftover(entry)):
                    raise RunFilesError(
                        f"{entry} is {kind_of(mode)}, but must be a {'folder' if is_folder else 'regular file'}, so nothing is read or "
                        "written there. Replace it by a copy of the original, or make the run again."
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
            if entry.name == CHECKPOINTS:  # others may have put something there
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
    kept = [entry for entry in own if entry.name == MANIFEST or CHECKPOINT.fullmatch(entry.name)]
    return set(run.iterdir()) <= set(own) and (not kept or (run / JOURNAL).exists())


# The manifest

Name = Annotated[str, msgspec.Meta(pattern=r"^[^./\\\x00][^/\\\x00]*$")]  # of a file in the folder itself


class _Entry(msgspec.Struct):
    sha256: str
    bytes: int


class _Source(msgspec.Struct):
    path: str
    sha256: str


class _Teacher(_Source):
    test_accuracy: float | None = None
    accessible_accuracy: float | None = None
    accessible_images: int | None = None


class _Blend(msgspec.Struct):
    alpha: Annotated[float, msgspec.Meta(ge=0, le=1)]
    parts: tuple[_Source, _Source]


class _Part(_Source):
    class_names: list[str] = []
    images: int = 0


class _Parts(msgspec.Struct):
    parts: list[_Part]


class _Manifest(msgspec.Struct):
    """What anyone reads of a manifest; more may stand in it."""

    files: dict[Name, _Entry]
    steps: Annotated[int, msgspec.Meta(ge=0)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    seed: int | None = None
    device: str | None = None
    threads: int | None = None
    plugins: list[dict[str, str]] = []
    plugin_files: dict[str, str] = {}
    real_files: list[str | int] = []
    real_spectrum: list[float] = []
    teacher: _Teacher | None = None
    imported: _Source | msgspec.UnsetType = msgspec.UNSET
    blend: _Blend | msgspec.UnsetType = msgspec.UNSET
    join: _Parts | msgspec.UnsetType = msgspec.UNSET
    split: _Parts | msgspec.UnsetType = msgspec.UNSET
    processes: dict[str, Any] = {}
    versions: dict[str, str] = {}
    warnings: list[str] = []


def checked(value: Any, kind: Any, path: Path) -> None:
    """Raises RunFilesError, with file and field, if `value`, read from `path`, is no `kind`."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RunFilesError(f"{path} is damaged or was edited: {error}. Restore it from a copy, or make the run again.") from None


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of `folder`, with its own sha256."""
    write_json(folder / MANIFEST, with_digest({"schema": SCHEMA, **facts}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of `folder`; raises RunFilesError where it is missing, damaged or of another schema."""
    check_own(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise _unfinished(folder)
    found = read_with_digest(path)
    if found.get("schema") != SCHEMA:
        raise RunFilesError(f"{path} is not a manifest of schema {SCHEMA}, which this version of ddkit reads.")
    checked(found, _Manifest, path)
    return found


def check_finished(folder: Path) -> None:
    """Raises RunFilesError where `folder` holds a run that is not finished, whatever files of it are there."""
    if (folder / RECIPE).is_file() and not (folder / MANIFEST).is_file():
        raise _unfinished(folder)


def _unfinished(folder: Path) -> RunFilesError:
    if not (folder / RECIPE).is_file():
        return RunFilesError(f"{folder} is not a run directory, as it has neither {MANIFEST} nor {RECIPE}. Name a finished run.")
    return RunFilesError(
        f"{folder} has no {MANIFEST}, so the run is not finished. To finish it: `ddkit distill --out {shlex.quote(str(folder))} --resume`."
    )


def file_entry(path: Path) -> dict[str, Any]:
    """Returns what a manifest tells of a file: its sha256 and its size in bytes."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


@cache
def versions() -> dict[str, str]:
    """Returns the versions of Python, ddkit and what it computes with."""
    names = ("ddkit", "torch", "torchvision", "numpy", "safetensors", "scikit-learn", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check_listed(folder: Path, name: str) -> None:
    """Raises RunFilesError where the file `name` of `folder` is not the one that the manifest lists.

    A folder without a manifest, and a file that it does not list, pass.
    """
    if not (folder / MANIFEST).is_file():
        return
    listed, file = read_manifest(folder)["files"].get(name), folder / name
    there = None
    with suppress(OSError):
        there = file_entry(file) if stat.S_ISREG(os.lstat(file).st_mode) else None
    if listed is not None and not file.exists():
        raise RunFilesError(f"{file} is missing, although {folder / MANIFEST} lists it. Restore it from a copy, or make the run again.")
    if listed not in (None, there):
        raise RunFilesError(
            f"{file} is not the file that {folder / MANIFEST} records. It was damaged, edited or replaced (its size or sha256 "
            "differs). Restore it from a copy, or make the run again."
        )


# What stands in the evaluations


class _Evaluations(msgspec.Struct):
    schema: int
    evaluations: list[Evaluation]


def evaluations_json(rows: Sequence[Evaluation | Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what evaluation.json holds."""
    return {"schema": SCHEMA, "evaluations": msgspec.to_builtins(rows)}


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of evaluation.json, each with all fields of an Evaluation, perhaps with more; raises RunFilesError."""
    check_listed(folder, EVALUATION)
    file = folder / EVALUATION
    found = read_json(file) if file.is_file() else evaluations_json([])
    checked(found, _Evaluations, file)
    if found["schema"] != SCHEMA:
        raise RunFilesError(f"{file} has schema {found['schema']}, but this version of ddkit reads schema {SCHEMA}.")
    rows = [msgspec.to_builtins(msgspec.convert(row, Evaluation)) | row for row in found["evaluations"]]  # older versions left fields out
    return [row | {"labels": "teacher"} if row["labels"] == "soft" else row for row in rows]  # as versions up to 0.2 call them
