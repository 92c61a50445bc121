"""Runs a study: every set distilled and evaluated once, kept, and told beside the published figures.

A set is a run directory in `<out>/sets`, named after system, cell, seed and a digest of everything that decides it, so a
second call finds what is there, continues what was interrupted, and mixes nothing. Distilling and evaluating are the
commands `ddkit distill` and `ddkit evaluate`, each in a process of its own: one that fails spoils no other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import tomli_w

from ddkit import plugins
from ddkit.data import check_held_out, open_dataset
from ddkit.errors import DdkitError, InputError, Interrupted, RunFailed, RunFilesError
from ddkit.files import read_json, sha256, write_atomic, write_json
from ddkit.recipe import Recipe, recipe_dict
from ddkit.recipes import recipe_for
from ddkit.rundir import MANIFEST
from ddkit.study import Cell, Study, chosen_cells, published

log = logging.getLogger("ddkit")

REAL_IMAGES: dict[str, Any] = {  # a baseline's set: real images as they are
    "name": "real-images", "steps": 0, "initializer": {"use": "real"}, "losses": {"dm": {}},
}  # fmt: skip


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a call asks for beyond the study itself; None: the study's, or the recipes' own."""

    seeds: int | None = None
    networks: int | None = None
    protocol: str | None = None
    steps: int | None = None
    dataset: str | None = None
    data_dir: str | None = None
    teacher: str | None = None
    sets: tuple[tuple[str, Any], ...] = ()
    device: str = "auto"
    jobs: int = 1


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure: accuracies are fractions, `std` the sample standard deviation over all networks of all sets.

    `std_of_sets` is that of the sets' means; `wanted` the sets asked for; `failed` why one could not be had.
    """

    ipc: int
    pipc: int | str
    system: str
    title: str
    protocol: str
    labels: str
    steps: int
    wanted: int
    alpha: float | None = None
    published: float | None = None
    published_std: float | None = None
    mean: float | None = None
    std: float | None = None
    std_of_sets: float | None = None
    sets: int = 0
    networks: int = 0
    high_frequency: float | None = None
    spectrum: list[float] = []
    failed: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.mean is None or self.published is None else self.mean - self.published

    @property
    def state(self) -> Literal["done", "partly", "failed", "not run"]:
        if self.failed:
            return "failed"
        return "done" if self.sets == self.wanted else "partly" if self.sets else "not run"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a study after a call."""

    study: str
    summary: str
    source: str
    split: str
    figures: list[Figure]
    pictures: list[str]


class Evaluating(msgspec.Struct, frozen=True, kw_only=True):
    """How a set is evaluated: all that its figure depends on beside the set. networks None: the protocol's own."""

    protocol: str
    labels: str
    images: str
    networks: int | None
    teacher: str  # sha256 of the teacher file that gives soft labels, where one is named

    @property
    def key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:8]


class Task(NamedTuple):
    """One set and its evaluation."""

    cell: Cell
    seed: int
    recipe: Recipe
    path: Path
    evaluation: Evaluating
    parts: tuple[Path, ...] = ()  # runs that are blended, where it is a blend
    alpha: float | None = None

    @property
    def label(self) -> str:
        blend = "" if self.alpha is None else f" alpha {self.alpha:g}"
        return f"{self.cell.system} ipc {self.cell.ipc} pipc {self.cell.pipc}{blend} seed {self.seed}"


def reproduce(
    study: Study,
    out: Path,
    settings: Settings | None = None,
    *,
    cells: Sequence[tuple[int, int | str]] | None = None,
    systems: Sequence[str] | None = None,
    run: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs what is not yet there of the study (all cells and systems, or those given) and returns what is known.

    `run` False only tells. Every recipe is checked before the first run. Files `report.json` and `report.md` in `out` have
    the result. Raises DdkitError for bad input at once; a set that fails later is told in its figure.
    """
    settings = settings or Settings()
    chosen = chosen_cells(study, list(cells) if cells else None, list(systems) if systems else None)
    tasks = planned(study, chosen, out, settings)
    _check(study, tasks, settings)
    failures: dict[Path, str] = {}
    if run:
        _make(out / "sets")
        failures = _work(tasks, settings, report)
    found = _figures(study, tasks, failures)
    pictures = _pictures(study, tasks, out) if run else []
    result = Report(
        study=study.name, summary=study.summary, source=study.source, split="held-out" if study.held_out else "test",
        figures=found, pictures=pictures,
    )  # fmt: skip
    if run:
        write_json(out / "report.json", report_json(result))
        write_atomic(out / "report.md", (report_table(result, "pipe") + "\n").encode())
    return result


def _check(study: Study, tasks: Sequence[Task], settings: Settings) -> None:
    """Raises a DdkitError where sets could be made but not evaluated: before the first is made."""
    for protocol in sorted({task.evaluation.protocol for task in tasks}):
        tables = recipe_for(REAL_IMAGES, evaluators="accuracy", protocol=protocol).evaluators
        plugins.options_of("evaluator", "accuracy", tables["accuracy"].options, "evaluators.accuracy")
    if study.held_out and settings.dataset is not None:
        dataset = open_dataset(tasks[0].recipe.data)
        for pipc in {str(task.recipe.pipc): task.recipe.pipc for task in tasks}.values():
            check_held_out(dataset, pipc, study.held_out)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFilesError(f"{folder} cannot be written: {error.strerror or error}. Name another place with --out DIR.") from None


def planned(study: Study, cells: Sequence[Cell], out: Path, settings: Settings) -> list[Task]:
    """Returns the sets of `cells`, all cells of one seed before the next seed; sets that cells share come once each."""
    tasks = []
    for seed in range(settings.seeds or study.seeds):
        for cell in cells:
            tasks.append(_task(study, cell, seed, out, settings))
        tasks += _blends(study, [task for task in tasks if task.seed == seed], out, settings)
    return tasks


def _task(study: Study, cell: Cell, seed: int, out: Path, settings: Settings) -> Task:
    system = study.systems[cell.system]
    protocol = settings.protocol or system.protocol or study.protocol
    recipe = _recipe(study, cell, seed, settings)
    name = f"{recipe.name}-ipc{recipe.ipc}-pipc{recipe.pipc}-seed{seed}-{_digest(recipe)}"
    images = system.baseline if system.baseline not in ("", "random-real") else "synthetic"
    return Task(cell, seed, recipe, out / "sets" / name, _evaluating(study, protocol, system.labels, images, settings))


def _evaluating(study: Study, protocol: str, labels: str, images: str, settings: Settings) -> Evaluating:
    teacher = settings.teacher if labels == "soft" and settings.teacher != "auto" else None
    content = sha256(Path(teacher)) if teacher and Path(teacher).is_file() else ""
    return Evaluating(
        protocol=protocol, labels=labels, images=images, networks=settings.networks or study.networks, teacher=content,
    )  # fmt: skip


RESERVED = {
    "ipc": "--cells",
    "pipc": "--cells",
    "seed": "--seeds",
    "data.test": "held_out of a study",
    "data.held_out": "held_out of a study",
}


def _recipe(study: Study, cell: Cell, seed: int, settings: Settings) -> Recipe:
    """Returns the recipe of one set, checked as far as that needs no data; raises InputError naming the system."""
    system = study.systems[cell.system]
    for path in [*study.set, *system.set, *(path for path, _ in settings.sets)]:
        if path in RESERVED or path.split(".")[0] == "evaluators":
            instead = RESERVED.get(path, "--protocol and --repeats")
            raise InputError(f"{path} cannot be set in a study, whose cells and evaluation decide it: use {instead}.", path)
    try:
        recipe = _recipe_of_system(study, cell, seed, settings)
        if not recipe.losses and recipe.blend is None:
            raise InputError(f"The recipe '{recipe.name}' has no loss, so it makes no set.")
    except InputError as error:
        raise InputError(f"systems.{cell.system}: {error}", error.path) from None
    return recipe


def _recipe_of_system(study: Study, cell: Cell, seed: int, settings: Settings) -> Recipe:
    system = study.systems[cell.system]
    pipc = {"cell": cell.pipc, "ipc": cell.ipc}.get(str(system.pipc), system.pipc)
    held_out = [("data.test", "held-out"), ("data.held_out", study.held_out)] if study.held_out else []
    return recipe_for(
        REAL_IMAGES if system.baseline else system.recipe,
        losses=system.losses, evaluators="none",
        sets=[*held_out, *study.set.items(), *system.set.items(), *settings.sets],
        ipc=cell.ipc, pipc=pipc, seed=seed, steps=0 if system.baseline else settings.steps,
        data__use=settings.dataset, data__dir=settings.data_dir, teacher__use=settings.teacher,
    )  # fmt: skip


def _digest(recipe: Recipe) -> str:
    """Returns a key of everything that decides a set, so that nothing else is taken for it."""
    table = {key: value for key, value in recipe_dict(recipe).items() if key not in ("name", "summary", "source", "notes", "evaluators")}
    teacher = Path(recipe.teacher.use)
    content = sha256(teacher) if teacher.is_file() else ""
    return hashlib.sha256(json.dumps([table, content], sort_keys=True, default=str).encode()).hexdigest()[:8]


def _blends(study: Study, tasks: Sequence[Task], out: Path, settings: Settings) -> list[Task]:
    if study.blends is None:
        return []
    by_cell = {task.cell: task for task in tasks}
    found = []
    for cell in {(task.cell.ipc, task.cell.pipc): None for task in tasks}:
        parts = [by_cell.get(Cell(*cell, name)) for name in (study.blends.first, study.blends.second)]
        first, second = parts
        if first is None or second is None:
            continue
        evaluating = _evaluating(study, settings.protocol or study.protocol, "hard", "synthetic", settings)
        for alpha in study.blends.alphas:
            key = hashlib.sha256(f"{first.path.name} {second.path.name} {alpha}".encode()).hexdigest()[:8]
            path = out / "sets" / f"blend-ipc{cell[0]}-pipc{cell[1]}-seed{first.seed}-{key}"
            system = f"{study.blends.first}+{study.blends.second}"
            found.append(Task(Cell(*cell, system), first.seed, first.recipe, path, evaluating, (first.path, second.path), alpha))
    return found


def _work(tasks: Sequence[Task], settings: Settings, report: Callable[[str], None]) -> dict[Path, str]:
    """Makes and evaluates every set that is not there; returns why those failed that did, by path."""
    failures: dict[Path, str] = {}
    crew = _Crew(settings)
    for blends in (False, True):
        waiting = {_kept(task): task for task in tasks if bool(task.parts) == blends and _row(task) is None}
        todo = list(waiting.values())

        def work(number_and_task: tuple[int, Task], todo: list[Task] = todo) -> None:
            number, task = number_and_task
            with crew.alone(task.path):  # two systems may share a set, and two evaluations of one file must not race
                try:
                    crew.make(task)
                    row = _row(task)
                    shown = "no figure" if row is None else f"{100 * row['accuracy_mean']:.1f} %"
                    report(f"{number} of {len(todo)}: {task.label}: {shown}")
                except RunFailed as error:
                    failures[task.path] = str(error)
                    report(f"{number} of {len(todo)}: {task.label}: failed: {error}")

        crew.run(work, list(enumerate(todo, start=1)))
    return failures


class _Crew:
    """Runs commands, `jobs` at a time; after an error or an interruption it ends those that run and starts no other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.children: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self._locks: dict[Path, threading.Lock] = {}
        self._guard = threading.Lock()

    @contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Inside, no other thread works on the set at `path`."""
        with self._guard:
            lock = self._locks.setdefault(path, threading.Lock())
        with lock:
            yield

    def run(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        def guarded(item: Any) -> None:
            try:
                work(item)
            except BaseException:
                self.stop()
                raise

        with ThreadPoolExecutor(self.settings.jobs) as pool:
            waiting = [pool.submit(guarded, item) for item in items]
            try:
                wait(waiting)
            except BaseException:
                self.stop()
                raise
        errors = [error for future in waiting if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):  # the cause first, then what it ended
            raise error

    def stop(self) -> None:
        with self._guard:
            self.stopped = True
            for child in self.children:
                child.terminate()  # a run writes a checkpoint then

    def make(self, task: Task) -> None:
        """Makes the set of `task` where it is not there, evaluates it, and keeps its row."""
        if not (task.path / MANIFEST).is_file():
            self.command(self._making(task))
        rows = json.loads(self.command(self._judging(task)))["evaluations"]
        row = next((row for row in rows if row["images"] == task.evaluation.images), None)
        if row is None:
            raise RunFailed(f"The evaluation gave no row of '{task.evaluation.images}' images.")
        write_json(_kept(task), {"schema": 1, "asked": msgspec.to_builtins(task.evaluation), "row": row})

    def _making(self, task: Task) -> list[str]:
        if task.parts:
            _clear(task.path)  # what a blend that was cut off left
            return ["blend", *map(str, task.parts), "--alpha", str(task.alpha), "--out", str(task.path)]
        common = ["--out", str(task.path), "--device", self.settings.device, "--quiet", "--json"]
        if any((task.path / "checkpoints").glob("*.safetensors")):
            return ["distill", "--resume", *common]
        _clear(task.path)
        file = task.path.parent / f"{task.path.name}.toml"
        write_atomic(file, tomli_w.dumps(recipe_dict(task.recipe)).encode())
        return ["distill", "--recipe", str(file), *common]

    def _judging(self, task: Task) -> list[str]:
        asked, name = task.evaluation, "evaluators.accuracy"
        flags = ["--evaluate", "accuracy", "--protocol", asked.protocol, "--device", self.settings.device, "--quiet", "--json"]
        flags += ["--repeats", str(asked.networks)] if asked.networks else []
        flags += ["--teacher", str(self.settings.teacher)] if asked.teacher else []
        flags += ["--set", f"{name}.random_real=false", "--set", f"{name}.labels={asked.labels}"]
        flags += ["--set", f"{name}.baselines={json.dumps([asked.images])}"] if asked.images != "synthetic" else []
        return ["evaluate", str(task.path), *flags]

    def command(self, arguments: Sequence[str]) -> str:
        """Returns what `ddkit ARGUMENTS...` prints; raises RunFailed with its message, or an error of its exit code."""
        environment = dict(os.environ)
        if self.settings.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.settings.jobs)
            environment["OMP_NUM_THREADS"] = str(threads)
        with self._guard:
            if self.stopped:
                raise Interrupted("Stopped, as another set was.", 130)
            child = subprocess.Popen(
                [sys.executable, "-m", "ddkit", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment,
            )  # fmt: skip
            self.children.add(child)
        printed, said = child.communicate()
        with self._guard:
            self.children.discard(child)
        if child.returncode:
            raise _failure(child.returncode, said, arguments)
        return printed


def _clear(path: Path) -> None:
    """Removes what a run left at `path` that cannot be continued."""
    if path.is_dir():
        shutil.rmtree(path)


def _failure(code: int, said: str, arguments: Sequence[str]) -> DdkitError:
    message = " ".join(said.split()).rpartition("ddkit: ")[2] or f"`ddkit {arguments[0]}` ended with exit code {code}"
    if code in (1, -9):  # the run itself failed, or was killed (for its memory); the others may do
        return RunFailed(message)
    if code in (130, 143) or code < 0:
        return Interrupted(message, code if code > 0 else 128 - code)
    error = DdkitError(message)  # bad input, which the next set would meet too
    error.exit_code = code
    return error


def _kept(task: Task) -> Path:
    """Returns the file that keeps the evaluation of a set, as asked for."""
    return task.path.parent / f"{task.path.name}-{task.evaluation.key}.json"


def _row(task: Task) -> dict[str, Any] | None:
    """Returns the row of the task's evaluation, None where it is not there yet, or its set is gone."""
    file = _kept(task)
    if not file.is_file() or not (task.path / MANIFEST).is_file():
        return None
    found = read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("row"), dict):
        raise RunFilesError(f"{file} is no evaluation of a study; remove it, and the next call makes it again.")
    row: dict[str, Any] = found["row"]
    return row


def _figures(study: Study, tasks: Sequence[Task], failures: Mapping[Path, str]) -> list[Figure]:
    groups: dict[tuple[Cell, float | None], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.cell, task.alpha), []).append(task)
    return [_figure(study, group, failures) for group in groups.values()]


def _figure(study: Study, tasks: Sequence[Task], failures: Mapping[Path, str]) -> Figure:
    first = tasks[0]
    system = study.systems.get(first.cell.system)
    known, known_std = published(study, first.cell) if first.alpha is None else (None, None)
    done = [(task, row) for task in tasks if (row := _row(task)) is not None]
    networks = [accuracy for _, row in done for accuracy in row["details"]["accuracies"]]
    means = [row["accuracy_mean"] for _, row in done]
    spectra = _spectra([task.path for task, _ in done]) if study.blends is not None and done else (None, [])
    return Figure(
        ipc=first.cell.ipc, pipc=first.cell.pipc, system=first.cell.system,
        title=(system.title if system else "") or first.cell.system, protocol=first.evaluation.protocol, labels=first.evaluation.labels,
        steps=first.recipe.steps, wanted=len(tasks), alpha=first.alpha, published=known, published_std=known_std,
        mean=sum(networks) / len(networks) if networks else None, std=_std(networks), std_of_sets=_std(means),
        sets=len(done), networks=len(networks) // len(done) if done else 0, high_frequency=spectra[0], spectrum=spectra[1],
        failed=next((failures[task.path] for task in tasks if task.path in failures), ""),
    )  # fmt: skip


def _std(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation, None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5)


def _spectra(paths: Sequence[Path]) -> tuple[float, list[float]]:
    """Returns the share of power at high frequencies and the radial spectrum, averaged over the sets at `paths`."""
    from ddkit.artifact import load
    from ddkit.spectra import high_frequency_share, radial_spectrum

    images = [load(path).images for path in paths]
    shares = [radial_spectrum(each)[1] for each in images]
    mean = [sum(values) / len(values) for values in zip(*shares, strict=True)]
    return sum(high_frequency_share(each) for each in images) / len(images), mean


def _pictures(study: Study, tasks: Sequence[Task], out: Path) -> list[str]:
    """Writes the pictures of the study, one for each row of cells: a row of images for each system, or for each alpha."""
    from ddkit.artifact import load
    from ddkit.images import sheet_png

    made = []
    for ipc, pipc in dict.fromkeys((task.cell.ipc, task.cell.pipc) for task in tasks):
        rows = {}
        for task in tasks:
            if (task.cell.ipc, task.cell.pipc, task.seed) == (ipc, pipc, 0) and (task.path / MANIFEST).is_file():
                if task.alpha is not None:
                    rows[f"alpha {task.alpha:g}"] = task
                elif task.cell.system in study.pictures:
                    rows[study.systems[task.cell.system].title or task.cell.system] = task
        wanted = len(study.pictures) + len(study.blends.alphas if study.blends else [])
        if rows and len(rows) == wanted:  # a call for some of them leaves the picture of all as it is
            images, labels, names = _sheet([load(task.path).images for task in rows.values()], list(rows))
            file = out / f"{study.name}-ipc{ipc}-pipc{pipc}.png"
            write_atomic(file, sheet_png(images, labels, names, columns=images.shape[0]))
            made.append(str(file))
    return made


def _sheet(sets: Sequence[Any], names: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """Returns (images, rows, names): the images of every set, all of one set in one row."""
    import torch

    labels = torch.cat([torch.full((len(images),), row) for row, images in enumerate(sets)])
    return torch.cat(list(sets)), labels, list(names)


def report_json(report: Report) -> dict[str, Any]:
    """Returns the report as one JSON object; accuracies are fractions."""
    figures = [msgspec.to_builtins(each) | {"difference": each.difference, "state": each.state} for each in report.figures]
    return {"schema": 1, **msgspec.to_builtins(report), "figures": figures}


def report_table(report: Report, style: str = "simple") -> str:
    """Returns the report as a text table of tabulate's `style` ("pipe": Markdown); accuracies in percent."""
    from tabulate import tabulate

    blends = any(figure.alpha is not None for figure in report.figures)
    spectra = any(figure.high_frequency is not None for figure in report.figures)
    header = ["ipc", "pipc", "system", "published", "measured", "difference", "std of sets", "n", "protocol", "steps"]
    header[3:3] = ["alpha"] if blends else []
    header += ["high freq."] if spectra else []
    rows = [_line(figure, blends, spectra) for figure in report.figures]
    left = [f"{f.title} at ipc {f.ipc}, pipc {f.pipc}" for f in report.figures if f.state in ("not run", "partly")]
    soft = any(figure.labels == "soft" for figure in report.figures)
    notes = [f"{report.study}: accuracy in % on {'held-out training images' if report.split == 'held-out' else 'the test set'}, "
             "mean ± sample standard deviation over all networks; std of sets: of the means of the sets; n = sets x networks."]  # fmt: skip
    notes += ["Systems marked (soft) train on the teacher's probabilities: never compare them with the others."] if soft else []
    notes += [f"Failed: {f.title} at ipc {f.ipc}, pipc {f.pipc}: {f.failed}" for f in report.figures if f.failed]
    notes += [f"Not yet run, or not all sets: {'; '.join(left)}."] if left else []
    aligned = ["right", "right", *["left"] * (len(header) - 2)]
    table = tabulate(rows, header, tablefmt=style, disable_numparse=True, colalign=aligned)
    return "\n\n".join([table, "\n".join(notes)])


def _line(figure: Figure, blends: bool, spectra: bool) -> list[str]:
    difference = "-" if figure.difference is None else f"{100 * figure.difference:+.1f}"
    count = f"{figure.sets} x {figure.networks}" if figure.state == "done" else figure.state
    count = f"{figure.sets} of {figure.wanted} x {figure.networks}" if figure.state == "partly" else count
    line = [str(figure.ipc), str(figure.pipc), figure.title + (" (soft)" if figure.labels == "soft" else "")]
    line += ["-" if figure.alpha is None else f"{figure.alpha:g}"] if blends else []
    line += [_percent(figure.published, figure.published_std, 2), _percent(figure.mean, figure.std, 1), difference]
    line += ["-" if figure.std_of_sets is None else f"{100 * figure.std_of_sets:.1f}"]
    line += [count, figure.protocol, str(figure.steps)]
    line += ["-" if figure.high_frequency is None else f"{100 * figure.high_frequency:.1f} %"] if spectra else []
    return line


def _percent(mean: float | None, std: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.{digits}f}" + ("" if std is None else f" ± {100 * std:.{digits}f}")
