"""Runs a study: every set is distilled and evaluated once and kept, and its figure stands beside the published one.

A set is a run directory in `<out>/sets`, named after system, cell, seed and a digest of everything that decides it, so a
second call finds what is there, continues what was interrupted, and mixes nothing. Distilling and evaluating are the
commands `ddkit distill` and `ddkit evaluate`, each in a process of its own: one that fails spoils no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ddkit.components.observers import Observers
from ddkit.distributed import group, own_device
from ddkit.errors import DdkitError, Interrupted, RunFailed, RunFilesError
from ddkit.files import check_out, write_atomic
from ddkit.nn.device import pick_device
from ddkit.run.report import check_figures, write_figures
from ddkit.studies.checks import check_data, check_study
from ddkit.studies.crew import Crew, Told
from ddkit.studies.grid import Settings, Task, kept_file, kept_row, planned
from ddkit.studies.presenting import FILES, report_charts
from ddkit.studies.results import Report, figures_of, write_pictures
from ddkit.studies.sharding import SETS, merge, share
from ddkit.studies.study import Study, chosen_cells


def reproduce(
    study: Study,
    out: Path,
    settings: Settings,
    *,
    cells: Sequence[tuple[int, int | str]] | None = None,
    systems: Sequence[str] | None = None,
    run: bool = True,
    observers: Sequence[Any] = (),
    part: tuple[int, int] = (0, 1),
    merged: Sequence[Path] = (),
    figures: Path | None = None,
) -> Report:
    """Runs what is not yet there of the study (all cells and systems, or those given) and returns what is known.

    `part` (i, n): only the sets of share i, 0 to n - 1, which another machine's share completes; `merged` are stores from which finished
    sets are copied first. The processes that torchrun started, all of which call this, make a share each.

    With `run` False nothing is made. Every recipe is checked before the first run. The FILES in `out` have the result; `figures`, an absent
    or empty folder, gets the charts as PDF and PNG files, and the pictures.
    Raises DdkitError for bad input at once; the figure of a set that fails later says why.
    """
    check_out(out)
    if run and not (out / SETS).is_dir():
        for file in (out / name for name in FILES):
            if file.exists():  # of a run, or the user's own
                raise RunFilesError(
                    f"{out} is not the folder of a study, and {file} would be overwritten. Name another place with --out DIR."
                )
    if figures is not None:
        check_figures(figures)
    tasks = planned(study, chosen_cells(study, cells, systems), out, settings)
    watchers = Observers((f"observer {i}", o) for i, o in enumerate(observers))
    check_study(study, tasks, settings)
    if run:
        pick_device(own_device(settings.device))
    with group(wanted=True) as ranks:
        if ranks.is_main:
            for store in merged:
                watchers.begin("merging", f"{merge(store, out)} sets and evaluations were copied from {store}")
        ranks.barrier()
        failures: dict[Path, str] = {}
        own = share(tasks, *part)
        try:
            if run:
                check_data(study, [task.recipe for task in own if kept_row(task) is None])
                try:
                    (out / SETS).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    why = error.strerror or error
                    raise RunFilesError(f"{out / SETS} cannot be written: {why}. Name another place with --out DIR.") from None
                settings = msgspec.structs.replace(settings, device=own_device(settings.device))
                _work(share(own, ranks.rank, ranks.world_size), settings, watchers, failures)
                for part_failed in ranks.all_gather_object({str(path): reason for path, reason in failures.items()}):
                    failures.update({Path(path): reason for path, reason in part_failed.items()})
        except (Interrupted, KeyboardInterrupt) as stop:
            with suppress(DdkitError, OSError):  # the next call, which is not interrupted, reports what prevents a report
                wanted = {kept_file(task): kept_row(task) for task in own}  # cells may share one
                done = f"{len(wanted) - list(wanted.values()).count(None)} of {len(wanted)}"
                stop.args = (f"Interrupted. {done} evaluations are finished and kept in {out}. The same command continues.",)
                if ranks.is_main and (out / SETS).is_dir():
                    _known(study, tasks, failures, out)
            raise
    result = _known(study, tasks, failures, out if run and ranks.is_main else None)
    if figures is not None and ranks.is_main:
        write_figures(figures, report_charts(result), {Path(file).name: Path(file).read_bytes() for file in result.pictures})
    return result


def _known(study: Study, tasks: Sequence[Task], failures: Mapping[Path, str], out: Path | None = None) -> Report:
    """Returns what is known of the study's figures; with `out` it writes pictures and its files there."""
    result = Report(
        study=study.name, summary=study.summary, source=study.source, split="held-out" if study.held_out else "test",
        published_on=study.published_on, figures=figures_of(study, tasks, failures),
        pictures=[] if out is None else write_pictures(study, tasks, out),
    )  # fmt: skip
    if out is not None:
        for name, content in FILES.items():
            write_atomic(out / name, content(result))
    return result


def _work(tasks: Sequence[Task], settings: Settings, watchers: Observers, failures: dict[Path, str]) -> None:
    """Makes and evaluates every set that is not there; puts into `failures` why those failed that did, by the file of the evaluation."""
    crew = Crew(settings)
    for blends in (False, True):
        waiting = {kept_file(task): task for task in tasks if bool(task.parts) == blends and kept_row(task) is None}
        of_a_set: dict[Path, list[Task]] = {}  # two systems may share a set, and two evaluations of one file must not race
        for task in waiting.values():
            of_a_set.setdefault(task.path, []).append(task)
        told = Told(len(waiting), watchers)

        def work(group: Sequence[Task], told: Told = told) -> None:
            for task in group:
                told.begun(task)
                try:
                    told.ended(task, f"{100 * crew.make(task):.1f} %")
                except RunFailed as error:
                    failures[kept_file(task)] = str(error)
                    told.ended(task, f"failed: {error}")
                except Interrupted:
                    raise
                except DdkitError as error:
                    error.args = (f"{task.label}: {error}",)
                    raise

        crew.run(work, list(of_a_set.values()))
