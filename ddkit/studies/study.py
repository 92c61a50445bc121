"""A study: systems times cells as data, measured by `ddkit reproduce`. Reading one needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from ddkit.components.options import Option, parse_struct
from ddkit.components.registry import NAME
from ddkit.errors import InputError
from ddkit.recipes.resolve import read_recipe
from ddkit.recipes.settings import flattened, superseded
from ddkit.recipes.tables import Positive, Table
from ddkit.text import doubles, suggestion

Share = Annotated[float, Option(ge=0, le=1)]
MOST_SEEDS = 1000  # of a cell; a larger number is probably meant as a seed


class SystemTable(Table):
    """One column of a study: a recipe, and what it changes."""

    title: str = ""
    like: Annotated[str, Option("another system of the study, whose keys it has beside its own")] | None = None
    recipe: str = "default"
    losses: Annotated[str, Option("losses that replace those of the recipe, written as for --losses")] | None = None
    fallback: Annotated[str, Option("recipe for the weights and options of losses that `recipe` does not have")] | None = None
    pipc: Annotated[int, Option("real images per class; cell is the pipc of the cell, ipc its ipc", ge=0)] | Literal["cell", "ipc"] = "cell"
    protocol: Annotated[str, Option("evaluation protocol; if left out, that of the study")] | None = None
    labels: Annotated[
        Literal["auto", "hard", "stored", "soft"],
        Option("labels that networks learn: hard, stored (with the set), soft (of the teacher), or auto (as in the protocol)"),
    ] = "auto"
    baseline: Annotated[
        Literal["", "random-real", "pipc-real", "class-mean"], Option("real images instead of a distilled set, without a recipe")
    ] = ""
    set: dict[str, Any] = {}


class CellTable(Table):
    """One row: `published` has, by system, the accuracy in percent and its standard deviation, as far as published."""

    ipc: Positive
    pipc: Annotated[int, Option(ge=0)] | Literal["all"]
    published: dict[str, Annotated[list[float], Option(min_length=1)]] = {}
    systems: Annotated[list[str], Option("systems of this cell; if empty, all")] = []
    seeds: Annotated[int, Option("number of sets of this cell; if left out, that of the study", ge=1, le=MOST_SEEDS)] | None = None


class PublishedOn(Table):
    """What the published figures are of: measured figures are set against them on the same data alone."""

    name: Annotated[str, Option("name of the data in reports, for example CIFAR-10")]
    dataset: Annotated[str, Option("dataset of that name in ddkit")]
    classes: Positive
    shape: Annotated[tuple[Positive, Positive, Positive], Option("channels, height and width of an image")]


class BlendsTable(Table):
    """Blends of two systems' sets, over alpha."""

    first: str
    second: str
    alphas: Annotated[list[Share], Option(min_length=1)]


class Study(Table):
    """Fields of a study file; docs/reference/components/study.md explains them."""

    name: str = ""
    summary: str = ""
    source: str = ""
    protocol: str = "short"
    seeds: Annotated[int, Option("number of sets per cell, with the seeds 0, 1, ...", ge=1, le=MOST_SEEDS)] = 1
    networks: Annotated[int, Option("number of networks per set; if left out, as in the protocol", ge=1)] | None = None
    held_out: Annotated[int, Option("number of training images per class that are held out for testing, 0 to use the test split", ge=0)] = 0
    set: Annotated[dict[str, Any], Option("recipe paths and values for all systems, which each system can override")] = {}
    systems: dict[str, SystemTable] = {}
    cells: list[CellTable] = []
    published_on: PublishedOn | None = None
    blends: BlendsTable | None = None
    pictures: Annotated[list[str], Option("systems whose images are shown in one picture, one row each")] = []


class Cell(NamedTuple):
    """One figure of a study."""

    ipc: int
    pipc: int | str
    system: str


def read_study(name: str) -> Study:
    """Returns an installed study or that of a file; raises InputError naming what is wrong with it."""
    raw = read_recipe(name, "study")
    try:
        study = parse_study(raw)
    except InputError as error:
        raise InputError(f"The study {name}: {error}", error.path) from None
    return study if study.name else msgspec.structs.replace(study, name=Path(name).stem)


def parse_study(raw: Mapping[str, Any]) -> Study:
    """Returns a study from TOML data, checked as far as that needs no recipe."""
    systems, cells = raw.get("systems"), raw.get("cells")
    parts: list[tuple[type[Table], str, Any]]
    parts = [(SystemTable, f"systems.{name}", table) for name, table in systems.items()] if isinstance(systems, Mapping) else []
    parts += [(CellTable, f"cells[{number}]", table) for number, table in enumerate(cells)] if isinstance(cells, list) else []
    for kind, where, table in parts:
        if isinstance(table, Mapping):  # reading the whole study reports what is no table
            parse_struct(kind, table, where, whole="the study")
    if isinstance(systems, Mapping) and all(isinstance(table, Mapping) for table in systems.values()):
        raw = {**raw, "systems": {name: _whole(name, systems) for name in systems}}
    study = parse_struct(Study, dict(raw), "", whole="the study")
    for what, table in (("systems", study.systems), ("cells", study.cells)):
        if not table:
            raise InputError(f"The study has no {what}.", what)
    if study.name and not NAME.fullmatch(study.name):
        raise InputError(f"name = {study.name!r}: a study's name consists of lower-case letters, digits and hyphens.", "name")
    for name, system in study.systems.items():
        if not NAME.fullmatch(name):
            raise InputError(f"systems.{name}: a system's name consists of lower-case letters, digits and hyphens.", "systems")
        if system.baseline and (system.losses is not None or system.recipe != "default"):
            raise InputError(
                f"systems.{name}: a baseline has real images, so recipe and losses have no effect. Leave them out.", f"systems.{name}"
            )
        if system.fallback is not None and system.losses is None:
            where = f"systems.{name}.fallback"
            raise InputError(f"{where} has no effect: the system has only the losses of its recipe. Add `losses`, or leave it out.", where)
    for row in doubles((cell.ipc, cell.pipc) for cell in study.cells):
        raise InputError(f"The study has the cell {row[0]}:{row[1]} twice. Write it once, with all its published figures.", "cells")
    for alpha in doubles([] if study.blends is None else study.blends.alphas):
        raise InputError(f"blends.alphas has {alpha:g} twice. Name it once.", "blends.alphas")
    for number, cell in enumerate(study.cells):
        for column, values in cell.published.items():
            if len(values) > 2 or not 0 <= values[0] <= 100 or not all(0 <= value <= 100 for value in values[1:]):
                where = f"cells[{number}].published.{column}"
                what = "write an accuracy in percent, from 0 to 100, and its standard deviation, if published, as in [25.3, 0.5]."
                raise InputError(f"{where} = {values}: {what}", where)
    named = [(f"cells[{number}].published", list(cell.published)) for number, cell in enumerate(study.cells)]
    named += [(f"cells[{number}].systems", cell.systems) for number, cell in enumerate(study.cells)]
    shown = [("pictures", study.pictures)]
    shown += [] if study.blends is None else [("blends", [study.blends.first, study.blends.second])]
    for where, names in named + shown:
        for double in doubles(names):
            raise InputError(f"{where} names the system '{double}' twice. Name it once.", where)
        for unknown in (each for each in names if each not in study.systems):
            raise InputError(f"{where} names the system '{unknown}', which the study lacks. {suggestion(unknown, study.systems)}", where)
    for where, names in shown:
        for name in (name for name in names if study.systems[name].baseline in ("pipc-real", "class-mean")):
            raise InputError(f"{where} names the system '{name}', but a baseline {study.systems[name].baseline} stores no images.", where)
    return study


def _whole(name: str, systems: Mapping[str, Mapping[str, Any]], heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the table of a system with the keys of the one that it is `like`, and those paths of its `set` that the own `set` leaves."""
    own = dict(systems[name])
    if "like" not in own:
        return own
    where, other = f"systems.{name}.like", own["like"]
    if other not in systems:
        raise InputError(f"{where} names the system '{other}', which the study lacks. {suggestion(other, systems)}", where)
    if other in (name, *heirs):
        raise InputError(f"{where} = {other!r} leads back to the system itself. Write the keys of one of them out.", where)
    base = _whole(other, systems, (*heirs, name))
    inherited, changed = dict(flattened(base.get("set", {}))), dict(flattened(own.get("set", {})))
    gone = {each for path, value in changed.items() for each in superseded(path, value, inherited)}
    left = {path: value for path, value in inherited.items() if path not in gone | changed.keys()}
    return base | own | {"set": left | changed}


def published(study: Study, cell: Cell) -> tuple[float | None, float | None]:
    """Returns the published accuracy and its standard deviation as fractions, None where there is none."""
    row = next(each for each in study.cells if (each.ipc, each.pipc) == (cell.ipc, cell.pipc))
    values = row.published.get(cell.system, [])
    return (values[0] / 100 if values else None, values[1] / 100 if len(values) > 1 else None)


def chosen_cells(study: Study, wanted: Sequence[tuple[int, int | str]] | None, systems: Sequence[str] | None) -> list[Cell]:
    """Returns the figures in rows `wanted` and columns `systems` (None: all), row by row; raises InputError for one that it lacks."""
    rows = {(cell.ipc, cell.pipc) for cell in study.cells}
    for row in wanted or []:
        if row not in rows:
            known = ", ".join(f"{ipc}:{pipc}" for ipc, pipc in dict.fromkeys((c.ipc, c.pipc) for c in study.cells))
            raise InputError(f"The study '{study.name}' has no cell {row[0]}:{row[1]}. It has {known}.", "cells")
    for name in systems or []:
        if name not in study.systems:
            raise InputError(f"The study '{study.name}' has no system '{name}'. {suggestion(name, study.systems)}", "systems")
    found = [
        Cell(row.ipc, row.pipc, system)
        for row in study.cells if not wanted or (row.ipc, row.pipc) in wanted
        for system in study.systems if (not row.systems or system in row.systems) and (not systems or system in systems)
    ]  # fmt: skip
    if not found:
        raise InputError(f"The study '{study.name}' has no figure for the chosen systems in the chosen cells.", "cells")
    return found
