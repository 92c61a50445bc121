"""The report of a run, report.html: one file that opens from the disk, made from the files of the run alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddkit.data.images import spread
from ddkit.data.pictures import radial_spectrum
from ddkit.errors import DdkitError, RunFilesError
from ddkit.files import check_out, write_atomic
from ddkit.run import snapshots, warnings
from ddkit.run.artifact import load
from ddkit.run.directory import RunDirectory
from ddkit.run.lock import LOCK_SECONDS
from ddkit.run.manifest import FILM, RECIPE, REPORT, SET, check_listed, versions
from ddkit.run.metrics import read_metrics
from ddkit.run.report import making, sections
from ddkit.run.report.page import page
from ddkit.run.report.sections import Files, head, spectrum_bins

log = logging.getLogger("ddkit")


def report(target: str | Path, *, out: str | Path | None = None) -> Path:
    """Makes the report of the finished run at `target` again from its files; returns the file.

    It is the run's report.html, which the manifest lists, or the new file `out`, which leaves the run as it is. Raises
    RunFilesError where a file of the run is missing or damaged, or the report cannot be written.
    """
    directory = RunDirectory(Path(target))
    if not directory.path.is_dir():
        raise RunFilesError(f"{target} is no run directory, and only a run has a report. `ddkit export {target} --to png` draws a file.")
    if out is not None:
        check_out(Path(out))
        if Path(out).exists():
            raise RunFilesError(f"--out {out} exists already; name a new file.")
        write_atomic(Path(out), report_html(directory.path, directory.read_manifest()))
        return Path(out)
    directory.read_manifest()
    with directory.take(wait=LOCK_SECONDS):
        _rewrite(directory)
    return directory.path / REPORT


def close_run(directory: RunDirectory, facts: Mapping[str, Any]) -> None:
    """Ends a run: writes its report, then the manifest with `facts` and what the run warned of.

    A report that cannot be drawn costs no run: a warning tells.
    """
    file = directory.path / REPORT
    try:
        snapshots.read_film(directory.path)
    except ValueError as error:
        log.warning("The film of the run is lost for its report: %s.", error)
        (directory.path / FILM).unlink(missing_ok=True)
    try:
        write_atomic(file, report_html(directory.path, {**facts, "versions": versions(), "warnings": warnings.warnings()}))
    except DdkitError:
        raise
    except Exception as error:
        file.unlink(missing_ok=True)
        log.warning("%s could not be made (%s: %s); the run is whole without it.", file, type(error).__name__, error)
    directory.write_manifest({**facts, "warnings": warnings.warnings()})


def renew_report(directory: RunDirectory) -> None:
    """Makes the report of a finished run anew where that can be done; else a warning tells, and what was recorded stays."""
    try:
        _rewrite(directory)
    except Exception as error:
        log.warning("%s is not up to date: %s", directory.path / REPORT, error)


def _rewrite(directory: RunDirectory) -> None:
    directory.rewrite(REPORT, report_html(directory.path, directory.read_manifest()))


def known_spectrum(real_images: Tensor) -> dict[str, list[float]]:
    """Returns {"real_spectrum": shares} of real images (n, C, H, W), for the manifest; {} where there are none, or they are too small."""
    bins = spectrum_bins(*real_images.shape[-2:]) if len(real_images) else 0
    if not bins:
        return {}
    return {"real_spectrum": [float(f"{share:.6g}") for share in radial_spectrum(spread(real_images), bins)[1]]}


def report_html(folder: Path, facts: Mapping[str, Any]) -> bytes:
    """Returns the report of the run in `folder`, whose manifest says, or will say, `facts`.

    It names neither the folder nor the time at which it was made, so the same run gives the same report, its times apart.
    """
    files = _files(folder, facts)
    title, summary, tiles = head(files)
    return page(title, summary, [tiles, *(part(files) for part in (*sections.SECTIONS, *making.SECTIONS))]).encode()


def _files(folder: Path, facts: Mapping[str, Any]) -> Files:
    directory = RunDirectory(folder)
    check_listed(folder, SET)
    artifact = load(folder / SET)
    return Files(
        artifact=artifact,
        facts=facts,
        recipe=directory.read_recipe() if (folder / RECIPE).is_file() else {},
        metrics=read_metrics(folder),
        evaluations=directory.read_evaluations(),
        film=_film(folder, artifact.stored_images),
    )


def _film(folder: Path, stored: Tensor) -> snapshots.Film | None:
    """Returns the film of a run whose set has the images `stored`, None if it has none."""
    check_listed(folder, FILM)
    try:
        found = snapshots.read_film(folder)
    except ValueError as error:
        raise RunFilesError(f"{error}.") from None
    if found is not None and (found.images.shape[2:] != stored.shape[1:] or (len(found.rows) and int(found.rows.max()) >= len(stored))):
        raise RunFilesError(f"{folder / FILM} is a film of another set than {folder / SET}.")
    return found
