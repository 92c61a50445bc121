"""Writes a synthetic set in a format that others read, by an exporter, into a folder of its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddkit.components import registry, trust
from ddkit.components.base import Exporter
from ddkit.components.guard import blamed, called
from ddkit.errors import FlagError, InputError, RunFailed, RunFilesError
from ddkit.files import sha256, sync, write_json
from ddkit.run.artifact import Artifact, Provenance, load
from ddkit.run.directory import RunDirectory
from ddkit.run.manifest import JOURNAL, MANIFEST, RECIPE, SET, STAGE, read_evaluations, read_manifest

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def export(target: str | Path, to: str, out: str | Path, *, options: Mapping[str, Any] | None = None) -> Path:
    """Writes the set of a run directory or file with the exporter `to` (NAME or NAME:ARGUMENT) into `out`, and returns `out`.

    `out` must be new or empty. If the export fails, it is unchanged. Raises DdkitError.

    Examples:
        >>> sorted(file.name for file in ddkit.export("my-run", "npz", "exported").iterdir())
        ['README.md', 'synthetic.npz']
    """
    with trust.granting({"to": to}, {"exporter": options}):
        try:
            exporter: Exporter = registry.create("exporter", to, options, where="exporter")
        except InputError as error:
            raise FlagError(f"--to: {error}") if error.path == "exporter.use" else error from None
    artifact = load(target)
    path = Path(target)
    known: dict[str, Any] = {"sha256": sha256(path if path.is_file() else path / SET)}
    if (path / MANIFEST).is_file():
        run = RunDirectory(path)
        known |= {"manifest": read_manifest(path), "evaluations": read_evaluations(path)}
        known |= {"recipe": run.read_recipe()} if (path / RECIPE).is_file() else {}
    artifact.provenance = Provenance(**known)
    with RunDirectory.whole_or_absent(Path(out)) as directory:
        _write(exporter, artifact, directory.path)
    return Path(out)


def _write(exporter: Exporter, artifact: Artifact, out: Path) -> None:
    """Lets the exporter write into a folder inside `out`, and moves what it wrote up into `out`."""
    stage = out / STAGE
    try:
        stage.mkdir()
        with blamed("exporter", exporter):
            exporter(artifact, str(stage))
        written = sorted(stage.iterdir())
        write_json(out / JOURNAL, [entry.name for entry in written])
        for entry in written:
            os.replace(entry, out / entry.name)
        stage.rmdir()
        sync(out)
        if written:
            (out / JOURNAL).unlink()  # until then the next call removes what is there
    except OSError as error:
        raise _unwritable(out, error) from None
    except (RunFailed, RunFilesError) as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in UNWRITABLE:
            raise _unwritable(out, error.__cause__) from None
        raise
    if not written:
        raise RunFailed(f"The {called('exporter', exporter)} has written no file.{exporter.advice}")


def _unwritable(out: Path, error: OSError) -> RunFilesError:
    return RunFilesError(f"--out {out} cannot be written: {error.strerror or error}. Name another folder.")
