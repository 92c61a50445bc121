"""The report of a run, report.html: one file that opens from the disk, made from the files of the run alone; and its charts as files.

`sections` says what the page shows, `charts` and `pictures` draw it, and page.html is the page. jinja2 and matplotlib are
imported when a report is made, not before.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ddkit.data.images import spread
from ddkit.data.pictures import radial_spectrum
from ddkit.errors import DdkitError, FlagError, RunFilesError
from ddkit.files import TEMPORARY, check_out, folders_of, write_atomic
from ddkit.run import snapshots, warnings
from ddkit.run.artifact import load
from ddkit.run.directory import RunDirectory
from ddkit.run.lock import LOCK_SECONDS
from ddkit.run.manifest import FILM, RECIPE, REPORT, SET, check_listed, read_evaluations, read_manifest, versions
from ddkit.run.metrics import read_metrics
from ddkit.run.report.charts import Chart, files, svg
from ddkit.run.report.pictures import animation
from ddkit.run.report.sections import Files, contents, spectrum_bins
from ddkit.text import is_text, printable

log = logging.getLogger("ddkit")
PAGE = Path(__file__).with_name("page.html")


def report(target: str | Path, *, out: str | Path | None = None, figures: str | Path | None = None) -> Path:
    """Makes the report of the finished run at `target` again from its files; returns the file.

    It is the run's report.html, which the manifest lists, or the new file `out`, which does not change the run. With `figures`, the name
    of a new or empty folder, each chart and the images are written there too, as PDF and PNG files, and the images at some steps as
    an animated GIF. Raises RunFilesError if a file of the run is
    missing or damaged, or a file cannot be written.

    Examples:
        >>> ddkit.report("my-run", out="talk.html").name
        'talk.html'
    """
    directory = RunDirectory(Path(target))
    if not directory.path.exists():
        raise RunFilesError(f"There is no run {target}. `ddkit list runs` shows the runs of a folder.")
    if not directory.path.is_dir():
        raise RunFilesError(
            f"{target} is not a run directory, and only runs have reports. For a picture of a file: `ddkit export "
            f"{shlex.quote(str(target))} --to png "
            "--out DIR`."
        )
    if out is not None:
        check_out(Path(out))
        if Path(out).exists():
            raise RunFilesError(f"--out {out} exists already. Name a new file.")
    if figures is not None:
        check_figures(Path(figures))
    read_manifest(directory.path)  # of what is no finished run nothing is locked
    with directory.take(wait=LOCK_SECONDS) if out is None else nullcontext():
        shown = _shown(directory.path, read_manifest(directory.path))
        if out is None:
            directory.rewrite(REPORT, page(PAGE, shown))
        else:
            with folders_of(Path(out)):
                write_atomic(Path(out), page(PAGE, shown))
    if figures is not None:
        film = shown["film"]
        write_figures(Path(figures), _charts(shown), {"strip.gif": animation(film["frames"], film["columns"])} if film else {})
    return directory.path / REPORT if out is None else Path(out)


def close_run(directory: RunDirectory, facts: Mapping[str, Any]) -> None:
    """Ends a run: writes its report, then the manifest with `facts` and what the run warned of.

    If the report cannot be drawn, a warning says so, and the run is whole without it.
    """
    file = directory.path / REPORT
    try:
        snapshots.read_film(directory.path)
    except ValueError as error:
        log.warning("The report will have no film of the run: %s.", error)
        (directory.path / FILM).unlink(missing_ok=True)
    try:
        write_atomic(file, report_html(directory.path, {**facts, "versions": versions(), "warnings": warnings.warnings()}))
    except DdkitError:
        raise
    except Exception as error:
        file.unlink(missing_ok=True)
        log.warning("%s could not be made (%s: %s). The run is complete without it.", file, type(error).__name__, error)
    directory.write_manifest({**facts, "warnings": warnings.warnings()})


def renew_report(directory: RunDirectory) -> None:
    """Makes the report of a finished run anew. If that fails, a warning says so, and what was recorded stays."""
    try:
        directory.rewrite(REPORT, report_html(directory.path, read_manifest(directory.path)))
    except Exception as error:
        log.warning("%s is not up to date: %s", directory.path / REPORT, error)


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
    return page(PAGE, _shown(folder, facts))


def page(template: Path, shown: Mapping[str, Any]) -> bytes:
    """Returns the page that a jinja2 template makes of the values `shown`. The template may extend base.html and use macros.html."""
    return bytes(_templates().from_string(template.read_text("utf-8")).render(shown, svg=svg), "utf-8")


@cache
def _templates() -> Any:
    """Returns the templates of this package: every word is escaped, and what acts on a terminal or hides is shown."""
    import jinja2
    from markupsafe import Markup

    return jinja2.Environment(
        autoescape=True, loader=jinja2.PackageLoader(__name__, ""), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )  # fmt: skip


def _shown(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page of the run in `folder` shows; raises RunFilesError naming a file that is missing or damaged."""
    directory = RunDirectory(folder)
    check_listed(folder, SET)
    artifact = load(folder / SET)
    check_listed(folder, FILM)
    try:
        film = snapshots.read_film(folder)
    except ValueError as error:
        raise RunFilesError(f"{error}.") from None
    stored = artifact.stored_images
    if film is not None and (film.images.shape[2:] != stored.shape[1:] or (len(film.rows) and int(film.rows.max()) >= len(stored))):
        raise RunFilesError(f"{folder / FILM} is a film of another set than {folder / SET}.")
    recipe = directory.read_recipe() if (folder / RECIPE).is_file() else {}
    evaluations, metrics = read_evaluations(folder), read_metrics(folder)
    return contents(Files(artifact=artifact, facts=facts, recipe=recipe, metrics=metrics, evaluations=evaluations, film=film))


def check_figures(out: Path) -> None:
    """Raises an error where charts cannot be written to the folder `out`, which is absent or empty."""
    if not is_text(str(out)) or "\0" in str(out):
        raise FlagError(f"--figures {printable(str(out))} is not the name of a folder. Use another name.")
    try:
        taken = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
    except OSError as error:
        raise RunFilesError(f"--figures {out} cannot be read: {error.strerror or error}.") from None
    if taken:
        raise RunFilesError(f"--figures {out} exists already and is not an empty folder. Name a new one.")


def _charts(shown: Mapping[str, Any]) -> list[Chart]:
    sections = [*(shown[name] for name in ("images", "layers", "film", "losses", "parameters", "spectrum")), *shown["evaluation"]["groups"]]
    return [chart for section in sections if section for chart in section["charts"]]


def write_figures(out: Path, charts: Iterable[Chart], others: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Writes charts as PDF and PNG files, and `others` by name, into the folder `out`, which check_figures has let pass: all or none."""
    staged = out.with_name(f".{out.name}.{os.urandom(4).hex()}{TEMPORARY}")
    try:
        with folders_of(out), ExitStack() as after:
            after.callback(shutil.rmtree, staged, ignore_errors=True)
            staged.mkdir()
            used: Counter[str] = Counter()
            for chart in charts:
                used[chart.file.casefold()] += 1
                number = used[chart.file.casefold()]  # of charts whose names differ in letters that no file has
                for name, content in files(chart if number == 1 else chart._replace(file=f"{chart.file}-{number}")).items():
                    (staged / name).write_bytes(content)
            for name, content in others.items():
                (staged / name).write_bytes(content)
            if out.exists():
                out.rmdir()
            staged.rename(out)
    except OSError as error:
        raise RunFilesError(f"--figures {out} cannot be written: {error.strerror or error}.") from None
