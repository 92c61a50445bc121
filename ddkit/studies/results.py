"""The results of a study: figures beside published ones, as a table, JSON and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from ddkit.components import registry
from ddkit.components.figures import budgets_differ
from ddkit.components.registry import split_name
from ddkit.data.pictures import high_frequency_share, radial_spectrum, sheet_png
from ddkit.errors import DdkitError
from ddkit.files import SCHEMA, path_part, write_atomic
from ddkit.run.artifact import load
from ddkit.run.manifest import MANIFEST, read_manifest
from ddkit.run.markdown import markdown
from ddkit.studies.grid import Task, kept_file, kept_row
from ddkit.studies.study import Cell, PublishedOn, Study, published
from ddkit.text import counted


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure: accuracies are fractions, `std` the sample standard deviation over all networks of all sets.

    `std_of_sets` is that of the sets' means; `wanted` the sets asked for; `failed` why one could not be had. `comparable` is False where
    the data is not that of the published figures; `warnings` are what the runs of its sets warned of. `stored_numbers` is the
    budget of a class, and `stored_as_images` how many images have as many numbers, None where that is not known. `images_in_one`: so many
    images networks see of each that is counted by ipc; a baseline of ipc images is another one then.
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
    dataset: str = ""
    teacher: str = ""
    comparable: bool = True
    warnings: list[str] = []
    cached: int = 0
    stored_numbers: float | None = None
    stored_as_images: float | None = None
    images_in_one: int = 1

    @property
    def difference(self) -> float | None:
        return None if self.mean is None or self.published is None or not self.comparable else self.mean - self.published

    @property
    def name(self) -> str:
        """The system, as a column of the table names it."""
        return self.title + (f" ({self.labels})" if self.labels != "hard" else "")

    @property
    def row(self) -> str:
        """The system, as a row of the table names it: with what makes a baseline of ipc images another one."""
        return self.name + (f", {self.images_in_one} images in one" if self.images_in_one > 1 else "")

    @property
    def label(self) -> str:
        return f"{self.name} at ipc {self.ipc}, pipc {self.pipc}" + ("" if self.alpha is None else f", alpha {self.alpha:g}")

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
    published_on: PublishedOn | None
    figures: list[Figure]
    pictures: list[str]


def figures_of(study: Study, tasks: Sequence[Task], failures: Mapping[Path, str]) -> list[Figure]:
    """Returns a figure for each cell and alpha of the tasks; `failures` says why evaluations failed, by their files."""
    groups: dict[tuple[Cell, float | None], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.cell, task.alpha), []).append(task)
    return [_figure(study, group, failures) for group in groups.values()]


def _figure(study: Study, tasks: Sequence[Task], failures: Mapping[Path, str]) -> Figure:
    first = tasks[0]
    known, known_std = published(study, first.cell) if first.alpha is None else (None, None)
    done = [(task, row) for task in tasks if (row := kept_row(task)) is not None]
    networks = [accuracy for _, row in done for accuracy in row["details"]["accuracies"]]
    means = [row["accuracy_mean"] for _, row in done]
    data = first.recipe.data
    name, argument = split_name(data.use)
    place = argument or str(data.options.get("path") or "")  # "" for a dataset that has a place of its own
    on, comparable = study.published_on, not study.held_out  # held-out images are none of theirs
    comparable = comparable and (on is None or name == on.dataset or bool(place))
    warned: list[str] = []
    images: list[Tensor] = []
    for task, _ in done:
        try:
            manifest = read_manifest(task.path)
            warned += manifest.get("warnings", [])
            made = load(task.path)
            pipc = task.recipe.pipc
            images += [made.images] if study.blends is not None else []
            real = len(manifest.get("real_files", []))
            if pipc != "all" and task.alpha is None and 0 < real < int(pipc) * len(made.class_names):
                warned.append(f"The data has fewer than {pipc} training images of some classes, so {real:,} in all are accessible.")
            if on is not None and name != on.dataset and comparable:  # a user's own: of the same shape, as far as a set tells
                comparable = (len(made.class_names), tuple(made.images.shape[1:])) == (on.classes, on.shape)
        except DdkitError as error:  # a set that cannot be read any more costs no figure
            warned.append(str(error))
    warnings = list(dict.fromkeys(" ".join(message.split()) for message in warned))
    warnings += dict.fromkeys(f"{first.label}: {row['details']['summary']}" for _, row in done if row["details"].get("summary"))
    spectra = [radial_spectrum(each)[1] for each in images]
    return Figure(
        ipc=first.cell.ipc, pipc=first.cell.pipc, system=first.cell.system,
        title=first.title, protocol=first.evaluation.protocol, labels=first.evaluation.labels,
        steps=first.recipe.steps, wanted=len(tasks), alpha=first.alpha, published=known, published_std=known_std,
        mean=statistics.fmean(networks) if networks else None, std=_std(networks), std_of_sets=_std(means),
        sets=len(done), networks=len(networks) // len(done) if done else 0,
        high_frequency=statistics.fmean(map(high_frequency_share, images)) if images else None,
        spectrum=[statistics.fmean(values) for values in zip(*spectra, strict=True)],
        failed=next(filter(None, (failures.get(kept_file(task)) for task in tasks)), ""),
        dataset=":".join(filter(None, (name, place))), teacher="" if first.recipe.teacher.use == "auto" else first.recipe.teacher.use,
        images_in_one=_images_in_one(first), comparable=comparable, warnings=warnings,
        cached=sum(row["details"].get("cached", 0) for _, row in done),
        **{name: done[0][1].get(name) if done else None for name in ("stored_numbers", "stored_as_images")},
    )  # fmt: skip


def _images_in_one(task: Task) -> int:
    table, ipc = task.recipe.parametrization, task.cell.ipc
    if task.evaluation.images != "synthetic":
        return 1
    makes = registry.create("parametrization", table.use, table.options, where="parametrization")
    return int(makes.images_per_class(ipc)) // ipc


def _std(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation, None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def write_pictures(study: Study, tasks: Sequence[Task], out: Path) -> list[str]:
    """Writes the pictures of the study, one for each row of cells: a row of images for each system, or for each alpha."""
    made = []
    for ipc, pipc in dict.fromkeys((task.cell.ipc, task.cell.pipc) for task in tasks):
        rows = {}
        for task in tasks:
            if (task.cell.ipc, task.cell.pipc, task.seed) == (ipc, pipc, 0) and (task.path / MANIFEST).is_file():
                if task.alpha is not None:
                    rows[f"alpha {task.alpha:g}"] = task
                elif task.cell.system in study.pictures:
                    rows[task.name] = task
        wanted = len(study.pictures) + len(study.blends.alphas if study.blends else [])
        if rows and len(rows) == wanted:  # a call for some of them leaves the picture of all as it is
            try:
                sets = [load(task.path).stored_images for task in rows.values()]
            except DdkitError:  # a warning under the table has the reason
                continue
            labels = torch.cat([torch.full((len(images),), row) for row, images in enumerate(sets)])
            file = out / f"{path_part(study.name)}-ipc{ipc}-pipc{pipc}.png"
            write_atomic(file, sheet_png(torch.cat(sets), labels, list(rows), columns=len(labels)))
            made.append(str(file))
    return made


def report_json(report: Report) -> dict[str, Any]:
    """Returns the report as one JSON object; accuracies are fractions."""
    figures = [msgspec.to_builtins(each) | {"difference": each.difference, "state": each.state} for each in report.figures]
    return {"schema": SCHEMA, **msgspec.to_builtins(report), "figures": figures}


def report_table(report: Report, style: str = "simple", *, pivot: bool = False) -> str:
    """Returns the report as a text table of tabulate's `style` ("pipe": Markdown), accuracies in percent; `pivot`: systems are columns."""
    from tabulate import tabulate

    header, rows, notes = table_of(report, pivot=pivot)
    if style == "pipe":
        header, notes = [markdown(name) for name in header], [markdown(note) for note in notes]
        rows = [[markdown(cell) for cell in row] for row in rows]
    aligned = ["right", "right", *["left"] * (len(header) - 2)]
    return "\n\n".join([tabulate(rows, header, tablefmt=style, disable_numparse=True, colalign=aligned), "\n".join(notes)])


def table_of(report: Report, *, pivot: bool = False) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns the names of columns, the rows and the notes of a report; columns without an entry are left out."""
    header, rows = _with_systems_as_columns(report.figures) if pivot else _with_a_row_each(report.figures)
    kept = [place for place, name in enumerate(header) if name in ("ipc", "pipc") or any(row[place] != "-" for row in rows)]
    notes = _notes(report) + (_settings(report.figures) if pivot else [])
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows], notes


def _with_a_row_each(figures: Sequence[Figure]) -> tuple[list[str], list[list[str]]]:
    header = [
        "ipc",
        "pipc",
        "system",
        "alpha",
        "published",
        "measured",
        "difference",
        "std of sets",
        "n",
        "protocol",
        "steps",
        "high freq.",
    ]
    rows = []
    for figure in figures:
        row = [str(figure.ipc), str(figure.pipc), figure.row, "-" if figure.alpha is None else f"{figure.alpha:g}"]
        row += [_percent(figure.published, figure.published_std, 2), _percent(figure.mean, figure.std, 1)]
        row += ["-" if figure.difference is None else f"{100 * figure.difference:+.1f}", _percent(figure.std_of_sets, None, 1)]
        row += [_count(figure) if figure.state in ("done", "partly") else figure.state, figure.protocol, str(figure.steps)]
        row += ["-" if figure.high_frequency is None else f"{100 * figure.high_frequency:.1f} %"]
        rows.append(row)
    return header, rows


def _with_systems_as_columns(figures: Sequence[Figure]) -> tuple[list[str], list[list[str]]]:
    header = ["ipc", "pipc", "alpha"]
    for name in dict.fromkeys(figure.name for figure in figures):
        header += [f"{name}, published", name]
    rows: dict[tuple[int, int | str, float | None], dict[str, str]] = {}
    for figure in figures:
        row = rows.setdefault((figure.ipc, figure.pipc, figure.alpha), {})
        row[f"{figure.name}, published"] = _percent(figure.published, figure.published_std, 2)
        row[figure.name] = _percent(figure.mean, figure.std, 1) if figure.mean is not None else "failed" if figure.failed else "-"
    return header, [
        [str(ipc), str(pipc), "-" if alpha is None else f"{alpha:g}", *(row.get(name, "-") for name in header[3:])]
        for (ipc, pipc, alpha), row in rows.items()
    ]


def _count(figure: Figure) -> str:
    """Returns sets x networks: "3 x 3", "2 of 3 x 3"."""
    return f"{figure.sets} of {figure.wanted} x {figure.networks}" if figure.state == "partly" else f"{figure.sets} x {figure.networks}"


def _settings(figures: Sequence[Figure]) -> list[str]:
    """Returns a sentence each on protocol, steps, n and images in one, and on which systems have which if they differ."""
    measured, notes = [figure for figure in figures if figure.mean is not None], []
    values: dict[str, Callable[[Figure], str]] = {
        "Protocol": lambda each: each.protocol, "Steps": lambda each: str(each.steps), "n": _count,
        "Images in each stored one": lambda each: str(each.images_in_one),
    }  # fmt: skip
    for what, value in values.items():
        groups: dict[str, dict[str, None]] = {}
        for figure in measured:
            alike = all(value(other) == value(figure) for other in measured if other.name == figure.name)
            groups.setdefault(value(figure), {})[figure.name if alike else figure.label] = None
        said = list(groups) if len(groups) == 1 else [f"{each} ({'; '.join(names)})" for each, names in groups.items()]
        notes += [f"{what}: {', '.join(said)}."] if said and (what != "Images in each stored one" or said != ["1"]) else []
    return notes


def _notes(report: Report) -> list[str]:
    """Returns the sentences under the table."""
    figures, known = report.figures, report.published_on
    held_out = report.split == "held-out"
    data = dict.fromkeys(figure.dataset for figure in figures)
    teachers = dict.fromkeys(figure.teacher for figure in figures if figure.teacher)
    notes = [f"{report.study}: accuracy in % on {'held-out training images' if held_out else 'the test set'}, "
             "mean ± sample standard deviation over all networks. n is sets x networks, and std of sets that of their means."]  # fmt: skip
    if any(figure.labels != "hard" for figure in figures):
        notes.append(
            "Systems marked (soft) train on the teacher's probabilities, and (stored) on those of the set. Do not compare them with others."
        )
    notes.append(f"Data: {', '.join(data)}." + ("" if known is None else f" Published figures: {known.name}."))
    if held_out and any(figure.published is not None for figure in figures):
        notes.append("Published figures are for the test split, and these are not, so no difference is shown.")
    elif not held_out and known is not None and not all(figure.comparable for figure in figures):
        size = " x ".join(map(str, known.shape))
        notes.append(
            f"Those are for other data ({known.name} has {known.classes} classes of {size} values), so no difference is shown. "
            f"Use --dataset {known.dataset}, or imagefolder:PATH with a copy of it."
        )
    notes += [f"Teacher: {', '.join(teachers)}."] if teachers else []
    notes += [f"Failed: {figure.label}: {figure.failed}" for figure in figures if figure.failed]
    warned: dict[str, list[str]] = {}
    for figure in figures:
        for message in figure.warnings:
            warned.setdefault(message, []).append(figure.label)
    notes += [f"Warned: {'; '.join(labels)}: {message}" for message, labels in warned.items()]
    notes += [f"From the cache: {counted(figure.cached, 'network')} of {figure.label}." for figure in figures if figure.cached]
    notes += _budgets(figures)
    left = [figure.label for figure in figures if figure.state in ("not run", "partly")]
    shown = left if len(left) <= 6 else [*left[:5], f"{len(left) - 5} others"]
    notes += [f"Not finished: {'; '.join(shown)}."] if left else []
    return notes


def _budgets(figures: Sequence[Figure]) -> list[str]:
    """Returns a sentence for each row of cells whose sets store different numbers per class: such figures are not compared."""
    rows: dict[tuple[int, int | str], dict[str, float]] = {}
    for figure in figures:
        if figure.stored_numbers is not None:
            rows.setdefault((figure.ipc, figure.pipc), {})[figure.name] = figure.stored_numbers
    return [
        f"Do not compare these systems at ipc {ipc}, pipc {pipc}, as their budgets differ: "
        + ", ".join(f"{name} {numbers:,.6g} numbers per class" for name, numbers in row.items()) + "."
        for (ipc, pipc), row in rows.items() if budgets_differ(row.values())
    ]  # fmt: skip


def _percent(mean: float | None, std: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.{digits}f}" + ("" if std is None else f" ± {100 * std:.{digits}f}")
