"""Runs a study: every set is distilled and evaluated once and kept, and its figure stands beside the published one.

A set is a run directory in `<out>/sets`, named after system, cell, seed and a digest of everything that decides it, so a
second call finds what is there, continues what was interrupted, and mixes nothing. Distilling and evaluating are the
commands `ddkit distill` and `ddkit evaluate`, each in a process of its own: one that fails spoils no other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from ddkit.components import registry
from ddkit.components.observers import Observers
from ddkit.data.held_out import check_held_out
from ddkit.data.real import open_dataset
from ddkit.distributed import group, own_device, plain_environment
from ddkit.engine.losses import losses_of
from ddkit.errors import DdkitError, InputError, Interrupted, RunFailed, RunFilesError
from ddkit.files import SCHEMA, check_out, with_digest, write_atomic, write_json
from ddkit.nn.device import pick_device
from ddkit.nn.teacher import read_teacher
from ddkit.recipes.resolve import check_options, flattened, resolve
from ddkit.recipes.tables import Recipe, recipe_dict
from ddkit.run import children
from ddkit.run.directory import RunDirectory
from ddkit.run.lock import LOCK_SECONDS
from ddkit.run.manifest import MANIFEST, RECIPE
from ddkit.run.progress import duration
from ddkit.run.report import check_figures, write_figures
from ddkit.studies.grid import REAL_IMAGES, Settings, Task, kept_file, kept_row, planned
from ddkit.studies.presenting import FILES, report_charts
from ddkit.studies.results import Report, figures_of, write_pictures
from ddkit.studies.sharding import SETS, merge, share
from ddkit.studies.study import Study, chosen_cells
from ddkit.text import counted


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
    _check(study, tasks, settings)
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
                _check_data(study, [task.recipe for task in own if kept_row(task) is None])
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


def _check(study: Study, tasks: Sequence[Task], settings: Settings) -> None:
    """Raises a DdkitError where a set could not be made or evaluated, as far as that is seen before the first is made.

    It says which key of the study is at fault, where it is no flag.
    """
    for protocol, system in {task.evaluation.protocol: task.cell.system for task in reversed(tasks)}.items():
        table = study.systems.get(system)  # None: a blend's, which has the study's protocol
        key = f"systems.{system}.protocol" if table and table.protocol else "protocol"
        own = [] if settings.protocol else [("evaluators.accuracy.protocol", protocol)]
        with _told_of("" if settings.protocol else key):
            resolve(REAL_IMAGES, evaluators="accuracy", evaluation={"protocol": settings.protocol}, sets=own)
    for task in (task for task in tasks if task.seed == 0 and not task.parts):  # other seeds have the same recipes
        with _told_of(f"systems.{task.cell.system}"):
            check_options(task.recipe)
        _check_images(study, task)
        if task.evaluation.labels == "stored" and task.recipe.own_labels.kind == "hard":
            raise InputError(
                f'systems.{task.cell.system}: labels = "stored", of the system or its protocol, are those of a set, but its recipe stores '
                'none (labels.kind = "hard"). Use labels = "hard" or "soft" for this system.',
                f"systems.{task.cell.system}.labels",
            )
    for teacher, system in {task.recipe.teacher.use: task.cell.system for task in reversed(tasks) if not task.parts}.items():
        if teacher != "auto":
            with _told_of(_origin(study, system, settings)):
                read_teacher(Path(teacher))


def _check_data(study: Study, recipes: Sequence[Recipe]) -> None:
    """Raises InputError if the data of a set cannot be opened, or has too few images for those that are held out."""
    for data in {msgspec.json.encode(recipe.data): recipe.data for recipe in recipes}.values():
        dataset = open_dataset(data)
        for pipc in {recipe.pipc for recipe in recipes if recipe.data == data and study.held_out}:
            remedy = "Lower `held_out` or the `pipc` of the cells in the study, or use a dataset with more images: --dataset NAME."
            check_held_out(dataset, pipc, study.held_out, remedy=remedy)


def _origin(study: Study, system: str, settings: Settings) -> str:
    """Returns the key of the study that decides the teacher of a system, "" for a flag."""
    paths = {"teacher", "teacher.use"}
    if settings.teacher or paths & dict(flattened(dict(settings.sets))).keys():
        return ""
    own = paths & dict(flattened(study.systems[system].set)).keys()
    return "set" if not own and paths & dict(flattened(study.set)).keys() else f"systems.{system}"


@contextmanager
def _told_of(key: str) -> Iterator[None]:
    """Inside, a DdkitError says which `key` of the study it is about, "" for none."""
    try:
        yield
    except DdkitError as error:
        error.args = (f"{key}: {error}" if key else str(error),)
        raise


def _check_images(study: Study, task: Task) -> None:
    """Raises InputError where the cell has too few real images for the losses or the first images of the system."""
    recipe, table = task.recipe, task.recipe.initializer
    if recipe.pipc == "all":
        return
    baseline = study.systems[task.cell.system].baseline
    makes = registry.create("parametrization", recipe.parametrization.use, recipe.parametrization.options, where="parametrization")
    initializer = registry.create("initializer", table.use, table.options, where="initializer")
    count = initializer.needed(makes.images_per_class(task.cell.ipc))
    count = min(count, 1) if table.reuse else count
    who, changes = (f"baseline {baseline}", "`pipc`") if baseline else (f"initializer {table.use}", "`pipc` or initializer")
    needing = [] if recipe.pipc or baseline else [each.label for each in losses_of(recipe) if each.requires.real]
    if needing:
        who, count = f"loss {needing[0]}", 1
    if count > recipe.pipc:
        where = f"systems.{task.cell.system}, cell {task.cell.ipc}:{task.cell.pipc}"
        raise InputError(
            f"{where}: the {who} needs {counted(count, 'real image')} per class, but the system has {recipe.pipc}. "
            f"Leave it out of this cell (`systems` of the cell, --systems or --cells), or change its {changes} in the study.",
            f"systems.{task.cell.system}",
        )


def _work(tasks: Sequence[Task], settings: Settings, watchers: Observers, failures: dict[Path, str]) -> None:
    """Makes and evaluates every set that is not there; puts into `failures` why those failed that did, by the file of the evaluation."""
    crew = _Crew(settings)
    for blends in (False, True):
        waiting = {kept_file(task): task for task in tasks if bool(task.parts) == blends and kept_row(task) is None}
        of_a_set: dict[Path, list[Task]] = {}  # two systems may share a set, and two evaluations of one file must not race
        for task in waiting.values():
            of_a_set.setdefault(task.path, []).append(task)
        told = _Told(len(waiting), watchers)

        def work(group: Sequence[Task], told: _Told = told) -> None:
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


class _Told:
    """Reports which of `count` sets are begun and ended, and how long the others will take if they take as long."""

    def __init__(self, count: int, watchers: Observers) -> None:
        self._count = count
        self._watchers = watchers
        self._done = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()
        if count:
            self._tell(f"Making and evaluating {counted(count, 'set')}")

    def begun(self, task: Task) -> None:
        with self._lock:
            self._tell(f"{self._done} of {self._count} done: {task.label} starts")

    def ended(self, task: Task, how: str) -> None:
        with self._lock:
            self._done += 1
            left = (time.monotonic() - self._began) / self._done * (self._count - self._done)
            told = f", about {duration(left)} left" if self._done < self._count else ""
            self._tell(f"{self._done} of {self._count}: {task.label}: {how}{told}")

    def _tell(self, line: str) -> None:
        self._watchers.begin("sets", line, done=self._done, total=self._count)


class _Crew:
    """Runs commands, `jobs` at a time; after an error or an interruption it ends those that run and starts no other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.children: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[Any], object], items: Sequence[Any]) -> None:
        """Calls `work` for each of the items; raises the cause of the first failure, when all that ran has ended."""

        def guarded(item: Any) -> None:
            self._check_going_on()
            try:
                work(item)
            except BaseException:
                self.stop()
                raise

        with ThreadPoolExecutor(self.settings.jobs) as pool:
            waiting = [pool.submit(copy_context().run, guarded, item) for item in items]  # what the user named may run in those too
            try:
                wait(waiting)
            except BaseException:
                self.stop()
                raise
        errors = [error for future in waiting if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):  # the cause first, then what it ended
            raise error

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for child in self.children:
                child.terminate()  # a run writes a checkpoint then

    def _begun(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self.children.add(child)
            if self.stopped:
                child.terminate()

    def make(self, task: Task) -> float:
        """Makes the set of `task` where it is not there, evaluates it, and keeps its row; returns the accuracy."""
        if not (task.path / MANIFEST).is_file():
            self._check_going_on()  # before anything of the set is written
            if task.parts:
                if task.path.is_dir():
                    shutil.rmtree(task.path)  # what a blend that was cut off left
                making = ["blend", *map(str, task.parts), "--alpha", str(task.alpha), "--out", str(task.path)]
            else:
                making = ["distill", "--resume"]
                if (task.path / RECIPE).is_file():
                    with RunDirectory(task.path).take(wait=LOCK_SECONDS):  # the run of a killed call may still write its checkpoint
                        pass
                else:
                    file = task.path.parent / f"{task.path.name}.toml"
                    write_atomic(file, tomli_w.dumps(recipe_dict(task.recipe)).encode())
                    making = ["distill", "--recipe", str(file)]
                making += ["--out", str(task.path), "--device", self.settings.device, "--quiet", "--json"]
            self.command(making)
        asked, name = task.evaluation, "evaluators.accuracy"
        flags = ["--evaluate", "accuracy", "--protocol", asked.protocol, "--device", self.settings.device, "--quiet", "--json"]
        flags += ["--repeats", str(asked.networks)] if asked.networks else []
        flags += ["--teacher", str(self.settings.teacher)] if asked.teacher else []
        flags += ["--set", f"{name}.random_real=false", "--set", f"{name}.labels={asked.labels}"]
        if asked.images != "synthetic":
            flags += ["--set", f"{name}.synthetic=false", "--set", f"{name}.baselines={json.dumps([asked.images])}"]
        rows = json.loads(self.command(["evaluate", str(task.path), *flags]))["evaluations"]
        row = next((row for row in rows if row["images"] == asked.images), None)
        if row is None:
            raise RunFailed(f"The evaluation gave no row of '{asked.images}' images.")
        write_json(kept_file(task), with_digest({"schema": SCHEMA, "asked": msgspec.to_builtins(asked), "row": row}))
        return float(row["accuracy_mean"])

    def _check_going_on(self) -> None:
        if self.stopped:
            raise Interrupted("Stopped, because another set was stopped.", 130)

    def command(self, arguments: Sequence[str]) -> str:
        """Returns what `ddkit ARGUMENTS...` prints; raises RunFailed with its message, or an error of its exit code."""
        self._check_going_on()
        environment = plain_environment()  # a set is made by one process, whoever started this one
        if self.settings.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.settings.jobs))
        done = children.run(children.of_module("ddkit"), *arguments, environment=environment, begun=self._begun)
        with self._lock:
            self.children = {child for child in self.children if child.poll() is None}
        if done.returncode:
            raise _failure(done.returncode, done.stderr, arguments)
        return done.stdout


def _failure(code: int, said: str, arguments: Sequence[str]) -> DdkitError:
    message = " ".join(said.split()).rpartition("ddkit: ")[2] or f"`ddkit {arguments[0]}` ended with exit code {code}"
    if code in (129, 130, 143, -1, -2, -15):
        return Interrupted(message, code if code > 0 else 128 - code)
    if code == 1 or code < 0:  # the run itself failed, crashed, or was killed (for its memory); the others may do
        return RunFailed(message)
    error = DdkitError(message)  # bad input, which the next set would meet too
    error.exit_code = code
    return error
