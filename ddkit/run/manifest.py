"""The manifest of a run: what tells whether the run's files are those that were written."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ddkit.errors import RunFilesError
from ddkit.files import SCHEMA, read_json, sealed, sha256, unsealed, write_json
from ddkit.names import MANIFEST as MANIFEST
from ddkit.names import RECIPE, check_own

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
    processes: dict[str, Any] = {}
    versions: dict[str, str] = {}
    warnings: list[str] = []


def checked(value: Any, kind: Any, path: Path) -> None:
    """Raises RunFilesError, with file and field, if `value`, read from `path`, is no `kind`."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RunFilesError(f"{path} is not what ddkit writes there: {error}. Restore it from a copy, or make the run again.") from None


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of `folder`, sealed with its own sha256."""
    write_json(folder / MANIFEST, sealed({"schema": SCHEMA, **facts}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of `folder`; raises RunFilesError where it is missing, damaged or of another schema."""
    check_own(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise _unfinished(folder)
    found = unsealed(read_json(path), path)
    if found.get("schema") != SCHEMA:
        raise RunFilesError(f"{path} is not a manifest of schema {SCHEMA}.")
    checked(found, _Manifest, path)
    return found


def check_finished(folder: Path) -> None:
    """Raises RunFilesError where `folder` holds a run that is not finished, whatever files of it are there."""
    if (folder / RECIPE).is_file() and not (folder / MANIFEST).is_file():
        raise _unfinished(folder)


def _unfinished(folder: Path) -> RunFilesError:
    return RunFilesError(f"{folder} has no {MANIFEST}, so it is no finished run. `ddkit distill --out {folder} --resume` finishes one.")


def file_entry(path: Path) -> dict[str, Any]:
    """Returns what a manifest tells of a file: its sha256 and its size in bytes."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def check_listed(folder: Path, name: str) -> None:
    """Raises RunFilesError where the file `name` of `folder` is not the one that the manifest lists.

    A folder without a manifest, and a file that it does not list, pass.
    """
    if not (folder / MANIFEST).is_file():
        return
    listed = read_manifest(folder)["files"].get(name)
    if listed is not None and listed != _entry_or_none(folder / name):
        raise RunFilesError(
            f"{folder / name} is not the file that {folder / MANIFEST} lists: it was damaged, edited or replaced (its size or sha256 "
            "differs). Restore it from a copy, or make the run again."
        )


def _entry_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return file_entry(path) if stat.S_ISREG(os.lstat(path).st_mode) else None
    except OSError:
        return None
