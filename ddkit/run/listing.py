"""The runs of a folder, as their small files describe them: no set is read and torch is not imported."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from ddkit.components.base import Evaluation
from ddkit.errors import RunFilesError
from ddkit.files import MOST_TOML, natural, read_text
from ddkit.run.manifest import (
    CHECKPOINT,
    CHECKPOINTS,
    DERIVED,
    MANIFEST,
    RECIPE,
    SET,
    check_listed,
    checked,
    read_evaluations,
    read_manifest,
)


class ListedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run directory. A value that its files do not record is None, or "" for a text.

    `problem` says in a sentence why a run is damaged. `steps` are done, of `all_steps`; `seconds` are those of distillation. The accuracies
    are fractions: those of the first evaluation of the set, of networks `model` under `protocol`.
    """

    path: str
    state: Literal["finished", "not finished", "damaged"]
    problem: str = ""
    method: str = ""
    dataset: str = ""
    ipc: int | dict[str, int] | None = None
    pipc: int | str | None = None
    steps: int | None = None
    all_steps: int | None = None
    seconds: float | None = None
    model: str = ""
    protocol: str = ""
    accuracy_mean: float | None = None
    accuracy_std: float | None = None
    random_real_mean: float | None = None
    random_real_std: float | None = None


class _Use(msgspec.Struct):
    use: str


class _Recipe(msgspec.Struct):
    """What is read of a recipe; all of it stands in that of a run."""

    ipc: int | dict[str, int]
    pipc: int | str
    steps: int
    data: _Use
    initializer: _Use
    name: str = ""
    losses: dict[str, Any] = {}


def list_runs(folder: str | Path = "runs") -> list[ListedRun]:
    """Returns the runs in `folder`, or the run that it is, in natural order of their names; raises RunFilesError if there is none."""
    place = Path(folder)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise RunFilesError(f"The folder {folder} {what}. Name a folder of runs: ddkit list runs FOLDER")
    found = [place] if is_run_folder(place) else run_folders(place)
    if not found:
        raise RunFilesError(f"{folder} contains no run. Name a folder of runs: ddkit list runs FOLDER")
    return [_listed(path) for path in found]


def is_run_folder(folder: Path) -> bool:
    """Whether ddkit has begun a run in `folder`, or put a set there; other programs write files called manifest.json too."""
    return (folder / RECIPE).is_file() or ((folder / MANIFEST).is_file() and (folder / SET).is_file())


def run_folders(folder: Path) -> list[Path]:
    """Returns the run directories in `folder` and in its folder sets, which a study has, in natural order of their names.

    A run that links name too is returned once, by its own name.
    """
    there = sorted([*folder.iterdir(), *folder.glob("sets/*")], key=lambda path: (path.is_symlink(), path.name), reverse=True)
    return sorted({path.resolve(): path for path in there if is_run_folder(path)}.values(), key=lambda path: natural(path.name))


def method_of(recipe: Mapping[str, Any], facts: Mapping[str, Any], name: str = "") -> str:
    """Returns what made a set: the recipe's name, the losses of the recipe `default`, "blend" and the like, or "herding, no steps".

    `facts` is the manifest, and `name` what the set records as its recipe; "-": nothing says it.
    """
    name = name or recipe.get("name") or ""
    method = method_title(recipe) if name in ("", "default") or (facts.get("steps") == 0 and recipe) else name
    return next((kind for kind in (*DERIVED, "imported") if kind in facts), method or "-")


def method_title(recipe: Mapping[str, Any]) -> str:
    """Returns the name of a recipe's method as a talk has it: "DataDAM", "DM + DKKT", "herding, no steps"; "" without a recipe.

    It is the word before the colon of the summary, if that is a name, with two capitals; or else the losses, those of one group as one.

    >>> method_title({"losses": {"dm": {}, "dkkt-primal": {}, "dkkt-stationarity": {}, "feature-regression": {}}})
    'DM + DKKT + feature regression'
    >>> method_title({"summary": "DSV (noise): deep support vectors", "losses": {"dkkt-primal": {}}})
    'DSV (noise)'
    """
    name, colon, _ = str(recipe.get("summary", "")).partition(":")
    if colon and sum(letter.isupper() for letter in name) > 1:
        return name
    losses = list(recipe.get("losses", {}))
    if recipe.get("steps") == 0:
        return f"{recipe['initializer']['use']}, no steps"
    heads = [label.partition("-")[0] for label in losses]
    names = dict.fromkeys(head if heads.count(head) > 1 else label for head, label in zip(heads, losses, strict=True))
    words = [[word if set(word) & set("aeiouy") else word.upper() for word in name.split("-")] for name in names]
    return " + ".join(" ".join(each) for each in words)


def _listed(path: Path) -> ListedRun:
    known: dict[str, Any] = {}
    try:
        facts = read_manifest(path) if (path / MANIFEST).is_file() else {}
        known |= {key: facts[key] for key in ("steps", "seconds") if key in facts}
        recipe = _recipe(path) if (path / RECIPE).is_file() else {}
        known["method"] = method_of(recipe, facts)
        if recipe:
            data = recipe["data"]
            known["dataset"] = ":".join(str(data[key]) for key in ("use", "path") if data.get(key))
            known |= {key: recipe[key] for key in ("ipc", "pipc")} | {"all_steps": recipe["steps"]}
        if not facts:
            files = (path / CHECKPOINTS).iterdir() if (path / CHECKPOINTS).is_dir() else ()
            steps = [int(match[1]) for file in files if (match := CHECKPOINT.fullmatch(file.name))]
            return ListedRun(path=str(path), state="not finished", **known, steps=max(steps, default=0))
        if not (path / SET).is_file():
            raise RunFilesError(f"{path} has no {SET}. Restore it from a copy, or make the run again.")
        return ListedRun(path=str(path), state="finished", **known, **_accuracy(path))
    except (RunFilesError, OSError) as error:
        return ListedRun(path=str(path), state="damaged", problem=str(error), **known)


def _recipe(path: Path) -> dict[str, Any]:
    check_listed(path, RECIPE)
    try:
        table = tomllib.loads(read_text(path / RECIPE, most=MOST_TOML))
    except (ValueError, RecursionError) as error:
        raise RunFilesError(f"{path / RECIPE} cannot be read: {error}.") from None
    checked(table, _Recipe, path / RECIPE)
    return table


def _accuracy(path: Path) -> dict[str, Any]:
    """Returns the figures of the first evaluation of the set that has an accuracy, {} if there is none."""
    rows = (msgspec.convert(row, Evaluation) for row in read_evaluations(path))
    own = (row for row in rows if row.images == "synthetic" and row.accuracy_mean is not None)
    fields = ("model", "protocol", "accuracy_mean", "accuracy_std", "random_real_mean", "random_real_std")
    return next(({key: getattr(row, key) for key in fields} for row in own), {})
