"""A study: systems times cells as data, measured by `ddkit reproduce`. Reading one needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from ddkit.components.options import Option, parse_struct
from ddkit.components.registry import NAME
from ddkit.errors import InputError, doubles
from ddkit.recipes.resolve import read_recipe
from ddkit.recipes.tables import Positive, Table

Share = Annotated[float, Option(ge=0, le=1)]


class SystemTable(Table):
    """One column of a study: a recipe, and what it changes."""

    title: str = ""
    recipe: str = "default"
    losses: Annotated[str, Option("losses instead of the recipe's, as in --losses")] | None = None
    fallback: Annotated[str, Option("recipe whose weights and options the losses have that `recipe` does not have")] | None = None
    pipc: Annotated[int, Option("real images a class that it uses, where that is not the cell's", ge=0)] | Literal["cell", "ipc"] = "cell"
    protocol: Annotated[str, Option("evaluation protocol, where that is not the study's")] | None = None
    labels: Annotated[
        Literal["auto", "hard", "stored", "soft"],
        Option("stored: networks learn the set's own probabilities; soft: the teacher's; auto: as the protocol says"),
    ] = "auto"
    baseline: Annotated[
        Literal["", "random-real", "pipc-real", "class-mean"], Option("real images instead of a distilled set; needs no recipe")
    ] = ""
    set: dict[str, Any] = {}


class CellTable(Table):
    """One row: `published` has, by system, the accuracy in percent and its standard deviation, as far as published."""

    ipc: Positive
    pipc: Annotated[int, Option(ge=0)] | Literal["all"]
    published: dict[str, Annotated[list[float], Option(min_length=1)]] = {}
    systems: Annotated[list[str], Option("those of this cell, where they are not all")] = []
    seeds: Annotated[int, Option("sets of this cell, where that is not the study's number", ge=1)] | None = None


class PublishedOn(Table):
    """What the published figures are of: measured figures are set against them on the same data alone."""

    name: Annotated[str, Option("as reports name it, for example CIFAR-10")]
    dataset: Annotated[str, Option("the dataset of that name")]
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
    seeds: Annotated[int, Option("sets, of seeds 0, 1, ...", ge=1)] = 1
    networks: Annotated[int, Option("networks a set; left out: the protocol's", ge=1)] | None = None
    held_out: Annotated[
        int, Option("images a class of the training split that are tested on instead of the test split; 0: the test split", ge=0)
    ] = 0
    set: Annotated[dict[str, Any], Option("recipe paths and values for all systems, under those of each")] = {}
    systems: dict[str, SystemTable] = {}
    cells: list[CellTable] = []
    published_on: PublishedOn | None = None
    blends: BlendsTable | None = None
    pictures: Annotated[list[str], Option("systems whose images are shown together, one row each")] = []


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
            parse_struct(kind, table, where)
    study = parse_struct(Study, dict(raw), "", whole="the study")
    for what, table in (("systems", study.systems), ("cells", study.cells)):
        if not table:
            raise InputError(f"The study has no {what}.", what)
    if study.name and not NAME.fullmatch(study.name):
        raise InputError(f"name = {study.name!r}: a study's name has lower-case letters, digits and hyphens.", "name")
    for name, system in study.systems.items():
        if not NAME.fullmatch(name):
            raise InputError(f"systems.{name}: a system's name has lower-case letters, digits and hyphens.", "systems")
        if system.baseline and (system.losses is not None or system.recipe != "default"):
            raise InputError(f"systems.{name}: a baseline is real images, so it has no recipe and no losses.", f"systems.{name}")
        if system.fallback is not None and system.losses is None:
            where = f"systems.{name}.fallback"
            raise InputError(f"{where} has no effect: the system has no losses beside its recipe's. Add `losses`, or leave it out.", where)
    for row in doubles((cell.ipc, cell.pipc) for cell in study.cells):
        raise InputError(f"The study has the cell {row[0]}:{row[1]} twice. Write it once, with all that is published of it.", "cells")
    for alpha in doubles([] if study.blends is None else study.blends.alphas):
        raise InputError(f"blends.alphas has {alpha:g} twice. Name it once.", "blends.alphas")
    for number, cell in enumerate(study.cells):
        for column, values in cell.published.items():
            if len(values) > 2 or not 0 <= values[0] <= 100 or not all(0 <= value <= 100 for value in values[1:]):
                where = f"cells[{number}].published.{column}"
                what = "an accuracy in percent, from 0 to 100, and if it is published its standard deviation: [25.3, 0.5]."
                raise InputError(f"{where} = {values}: {what}", where)
    named = [(f"cells[{number}].published", list(cell.published)) for number, cell in enumerate(study.cells)]
    named += [(f"cells[{number}].systems", cell.systems) for number, cell in enumerate(study.cells)]
    shown = [("pictures", study.pictures)]
    shown += [] if study.blends is None else [("blends", [study.blends.first, study.blends.second])]
    for where, names in named + shown:
        for double in doubles(names):
            raise InputError(f"{where} names the system '{double}' twice. Name it once.", where)
        for unknown in (each for each in names if each not in study.systems):
            raise InputError(f"{where} names the system '{unknown}', the study has {', '.join(study.systems)}.", where)
    for where, names in shown:
        for name in (name for name in names if study.systems[name].baseline in ("pipc-real", "class-mean")):
            raise InputError(f"{where} names the system '{name}', a baseline {study.systems[name].baseline} that keeps no images.", where)
    return study


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
            raise InputError(f"The study '{study.name}' has no system '{name}'. It has {', '.join(study.systems)}.", "systems")
    found = [
        Cell(row.ipc, row.pipc, system)
        for row in study.cells if not wanted or (row.ipc, row.pipc) in wanted
        for system in study.systems if (not row.systems or system in row.systems) and (not systems or system in systems)
    ]  # fmt: skip
    if not found:
        raise InputError(f"No chosen system of the study '{study.name}' has a figure in the chosen cells.", "cells")
    return found
