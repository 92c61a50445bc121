"""What a study asks for: every set with its recipe, its folder and its evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from ddkit.components.base import Fraction
from ddkit.components.options import fields
from ddkit.errors import DdkitError, FlagError, InputError, RunFilesError
from ddkit.files import path_part, read_with_digest, sha256, with_home
from ddkit.recipes.resolve import read_protocol, resolve
from ddkit.recipes.settings import flattened
from ddkit.recipes.tables import Recipe, recipe_dict
from ddkit.run.manifest import MANIFEST, checked
from ddkit.studies.study import MOST_SEEDS, Cell, Study, SystemTable
from ddkit.text import doubles, shown

REAL_IMAGES: dict[str, Any] = {  # a baseline's set: real images as they are
    "name": "real-images", "steps": 0, "initializer": {"use": "real"}, "losses": {"dm": {}},
}  # fmt: skip
OF_REAL_IMAGES = ("data", "teacher", "train", "network", "engine")  # tables whose settings hold for a baseline too


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
    alphas: tuple[float, ...] | None = None  # of the study's blends, those that are wanted


class Evaluating(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a set is evaluated: all that its figure depends on beside the set. networks None: the protocol's own."""

    protocol: str
    labels: str
    images: str
    networks: int | None
    teacher: str  # sha256 of the teacher file that gives soft labels, where one is named
    content: str = ""  # sha256 of the protocol's file, if it is given by its path

    @property
    def key(self) -> str:
        return _short(msgspec.json.encode(self))


class Task(NamedTuple):
    """One set and its evaluation."""

    cell: Cell
    seed: int
    recipe: Recipe
    path: Path
    evaluation: Evaluating
    title: str  # of its system, or of the two that are blended
    parts: tuple[Path, ...] = ()  # runs that are blended, where it is a blend
    alpha: float | None = None

    @property
    def name(self) -> str:
        return self.title + ("" if self.evaluation.labels == "hard" else f" ({self.evaluation.labels})")

    @property
    def label(self) -> str:
        blend = "" if self.alpha is None else f" alpha {self.alpha:g}"
        return f"{self.name} ipc {self.cell.ipc} pipc {self.cell.pipc}{blend} seed {self.seed}"


def planned(study: Study, cells: Sequence[Cell], out: Path, settings: Settings) -> list[Task]:
    """Returns the sets of `cells`, all cells of one seed before the next seed; a set that cells share comes with each of them."""
    known = [] if study.blends is None else study.blends.alphas
    for alpha in (alpha for alpha in settings.alphas or () if alpha not in known):
        what = f"blends at {', '.join(f'{each:g}' for each in known)}" if known else "no blends. Leave --alphas out"
        raise InputError(f"The study '{study.name}' has no blend at alpha {alpha:g}. It has {what}.", "alphas")
    if settings.seeds is not None and settings.seeds > MOST_SEEDS:
        raise FlagError(f"--seeds {settings.seeds}: it is a number of sets, not a seed, and at most {MOST_SEEDS:,} are made of a cell.")
    labels = {name: _labels_of(system, system.protocol or study.protocol, settings) for name, system in study.systems.items()}
    named = {name: msgspec.structs.replace(system, labels=labels[name]) for name, system in study.systems.items()}
    study = msgspec.structs.replace(study, systems=named)
    tasks: list[Task] = []
    seeds: dict[tuple[int, int | str], int] = {(row.ipc, row.pipc): settings.seeds or row.seeds or study.seeds for row in study.cells}
    for seed in range(max(seeds[cell.ipc, cell.pipc] for cell in cells)):
        own = []
        for cell in (cell for cell in cells if seed < seeds[cell.ipc, cell.pipc]):
            system, recipe = study.systems[cell.system], recipe_of(study, cell, seed, settings)
            table = {key: value for key, value in recipe_dict(recipe).items() if key not in SAYS_NOTHING_OF_A_SET}
            digest = _short(json.dumps([table, _content(recipe.teacher.use)], sort_keys=True, default=str).encode())
            name = f"{path_part(recipe.name)}-ipc{recipe.ipc}-pipc{recipe.pipc}-seed{seed}-{digest}"
            images = system.baseline if system.baseline not in ("", "random-real") else "synthetic"
            own_labels = "stored" if recipe.own_labels.kind != "hard" and images == "synthetic" else "hard"
            learned = own_labels if system.labels == "auto" else system.labels
            evaluating = _evaluating(study, system.protocol or study.protocol, learned, images, settings)
            own.append(Task(cell, seed, recipe, out / "sets" / name, evaluating, system.title or cell.system))
        tasks += own + _blends(study, own, out, settings)
    tasks = _told_apart(tasks)
    if settings.alphas is not None and all(task.alpha is None for task in tasks):
        assert study.blends is not None
        both = f"{study.blends.first} and {study.blends.second}"
        raise InputError(f"--alphas: blends need both systems {both}. Add them to --systems.", "alphas")
    return tasks


def _told_apart(tasks: Sequence[Task]) -> list[Task]:
    """Returns the tasks, with the system after the title where another system has the same title and labels."""
    named = {(task.cell.system, task.title, task.evaluation.labels) for task in tasks}
    twice = set(doubles((title, labels) for _, title, labels in named))
    return [t._replace(title=f"{t.title} [{t.cell.system}]") if (t.title, t.evaluation.labels) in twice else t for t in tasks]


def _labels_of(system: SystemTable, protocol: str, settings: Settings) -> Literal["auto", "hard", "stored", "soft"]:
    """Returns whose labels networks learn: those of the system, or else of the protocol; auto: those stored with the set, or else hard."""
    if system.labels != "auto":
        return system.labels
    try:
        labels = read_protocol(settings.protocol or protocol).labels
    except DdkitError:
        return "auto"  # the protocol itself is reported when the study is checked
    return "soft" if labels == "teacher" else labels


def _evaluating(study: Study, protocol: str, labels: str, images: str, settings: Settings) -> Evaluating:
    chosen = settings.protocol or protocol
    return Evaluating(
        protocol=chosen, labels=labels, images=images, networks=settings.networks or study.networks,
        teacher=_content(settings.teacher) if labels == "soft" and settings.teacher else "",
        content=_content(with_home(chosen)) if "/" in chosen or chosen.endswith(".toml") else "",
    )  # fmt: skip


# Keys of a recipe; all others are in the name of its set.
SAYS_NOTHING_OF_A_SET = ("name", "summary", "source", "notes", "evaluators", "protocols")
RESERVED = {  # what a study itself decides: by which of its keys, and by which flags of a call
    "ipc": ("[[cells]]", "--cells"),
    "pipc": ("[[cells]], or `pipc` of a system", "--cells"),
    "seed": ("`seeds`", "--seeds"),
    "data.test": ("`held_out`", "held_out of a study"),
    "data.held_out": ("`held_out`", "held_out of a study"),
    "evaluators": ("`protocol` and `networks`, or `protocol` and `labels` of a system", "--protocol and --repeats"),
}


def recipe_of(study: Study, cell: Cell, seed: int, settings: Settings) -> Recipe:
    """Returns the recipe of one set, checked as far as that needs no data; raises InputError naming the system."""
    system = study.systems[cell.system]
    for where, table in (("", dict(settings.sets)), ("set", study.set), (f"systems.{cell.system}.set", system.set)):
        for path, _ in flattened(table):
            if decided := RESERVED.get(path if path in RESERVED else path.split(".")[0]):
                there, instead = (f"{where}: ", f"{decided[0]} in the study") if where else ("", decided[1])
                raise InputError(f"{there}{path} cannot be set here, as the study sets it itself. Use {instead}.", path)
    try:
        recipe = _recipe_of_system(study, cell, seed, settings)
        if recipe.steps and not recipe.losses:
            raise InputError(f"The recipe '{recipe.name}' has no loss, so it cannot make a set.")
    except FlagError as error:
        if not str(error).startswith("--losses"):
            raise
        said = str(error).partition(": ")[2]
        raise InputError(f"systems.{cell.system}.losses = {shown(system.losses)}: {said}", "losses") from None
    except DdkitError as error:
        error.args = (f"systems.{cell.system}: {error}",)
        raise
    return recipe


def _recipe_of_system(study: Study, cell: Cell, seed: int, settings: Settings) -> Recipe:
    system = study.systems[cell.system]
    pipc = {"cell": cell.pipc, "ipc": cell.ipc}.get(str(system.pipc), system.pipc)
    held_out = [("data.test", "held-out"), ("data.held_out", study.held_out)] if study.held_out else []
    own = flattened(system.set)
    sets = [*held_out, *flattened(study.set), *own, *settings.sets]
    if system.baseline:
        others = fields(Recipe).keys() - OF_REAL_IMAGES  # what is no key of a recipe stays, and is refused
        sets = [(path, value) for path, value in sets if path.split(".")[0] not in others]
    steps = None if "steps" in dict(own) else settings.steps  # a system may be there to try a number of them
    return resolve(
        _real_images(study, cell, seed, settings) if system.baseline else system.recipe,
        losses=system.losses, fallback=system.fallback, evaluators="none", sets=sets,
        ipc=cell.ipc, pipc=pipc, seed=seed, steps=0 if system.baseline else steps,
        dataset=settings.dataset, data_dir=settings.data_dir, teacher=settings.teacher,
    )  # fmt: skip


def _real_images(study: Study, cell: Cell, seed: int, settings: Settings) -> dict[str, Any]:
    """Returns the recipe of a baseline; soft labels it has from the teacher of the study's systems, those with soft labels first."""
    systems = study.systems
    others = sorted((name for name in systems if not systems[name].baseline), key=lambda name: systems[name].labels != "soft")
    if systems[cell.system].labels != "soft" or not others:
        return REAL_IMAGES
    table = recipe_dict(_recipe_of_system(study, cell._replace(system=others[0]), seed, settings))
    return REAL_IMAGES | {key: table[key] for key in ("teacher", "train")}


@cache
def _content(file: str) -> str:
    """Returns the sha256 of a teacher's or protocol's file, read once; "" for `auto`."""
    return sha256(Path(file)) if Path(file).is_file() else ""


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _blends(study: Study, tasks: Sequence[Task], out: Path, settings: Settings) -> list[Task]:
    if study.blends is None:
        return []
    by_cell = {task.cell: task for task in tasks}
    found = []
    for cell in {(task.cell.ipc, task.cell.pipc): None for task in tasks}:
        first, second = (by_cell.get(Cell(*cell, name)) for name in (study.blends.first, study.blends.second))
        if first is None or second is None:
            continue
        labels = _labels_of(SystemTable(), study.protocol, settings)
        if labels == "auto":
            labels = "hard" if "hard" in {task.recipe.own_labels.kind for task in (first, second)} else "stored"
        evaluating = _evaluating(study, study.protocol, labels, "synthetic", settings)
        for alpha in (alpha for alpha in study.blends.alphas if settings.alphas is None or alpha in settings.alphas):
            key = _short(f"{first.path.name} {second.path.name} {alpha}".encode())
            path = out / "sets" / f"blend-ipc{cell[0]}-pipc{cell[1]}-seed{first.seed}-{key}"
            system = f"{study.blends.first}+{study.blends.second}"
            parts, title = (first.path, second.path), " and ".join(task.title for task in (first, second))
            found.append(Task(Cell(*cell, system), first.seed, first.recipe, path, evaluating, f"Blend of {title}", parts, alpha))
    return found


def kept_file(task: Task) -> Path:
    """Returns the file that keeps the evaluation of a set, as asked for."""
    return task.path.parent / f"{task.path.name}-{task.evaluation.key}.json"


class _Accuracies(msgspec.Struct):
    accuracies: Annotated[list[Fraction], msgspec.Meta(min_length=1)]
    cached: int = 0


class _Row(msgspec.Struct):
    accuracy_mean: Fraction
    details: _Accuracies


class _Kept(msgspec.Struct):
    """What a study reads of an evaluation that it kept."""

    row: _Row


def kept_row(task: Task) -> dict[str, Any] | None:
    """Returns the row of the task's evaluation, None where it is not there yet, or its set is gone."""
    file = kept_file(task)
    if not file.is_file() or not (task.path / MANIFEST).is_file():
        return None
    try:
        found = read_with_digest(file)
        checked(found, _Kept, file)
    except RunFilesError as error:
        raise RunFilesError(f"{error} After you remove this file, the same command evaluates the set again.") from None
    row: dict[str, Any] = found["row"]
    return row
