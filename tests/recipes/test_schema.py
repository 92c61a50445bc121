"""The published schema of recipes: takes every recipe that ddkit has and writes, refuses what ddkit refuses."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import ddkit
from ddkit.components import registry
from ddkit.recipes.resolve import resolve
from ddkit.recipes.schema import recipe_schema
from tests.conftest import SMALL, Result

Cli = Callable[..., Result]
RECIPES = [Path(p.value) for p in registry.plugins() if p.kind == "recipe" and p.first_party]
WHOLE: dict[str, Any] = {
    "name": "whole", "ipc": 10, "pipc": "all", "data": "digits", "initializer": {"use": "noise"}, "teacher": {"norm": "batch"},
    "losses": {"dm": {"weight": 0.01}, "again": {"use": "dm"}, "theirs": {"anything": 1}, "dkkt-primal": {"masked": False}},
    "views": {"strong": {"augmenter": "dsa", "operations": ["crop"], "noise": 0.1}}, "optimizer": {"images": {"betas": [0.9, 0.99]}},
    "evaluators": {"accuracy": {"protocol": "short", "repeats": 3}}, "network": {"model": "other/thing", "depth_of_field": 3},
    "rules": [{"when": {"ipc_min": 3}, "set": {"losses.dm.weight": 1.0}}],
}  # fmt: skip


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema())


def problems(table: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator().iter_errors(table)]


def changed(path: str, value: Any) -> dict[str, Any]:
    """Returns the recipe WHOLE with another value at a path."""
    table = copy.deepcopy(WHOLE)
    *keys, last = path.split("/")
    inside = table
    for key in keys:
        inside = inside.setdefault(key, {})
    inside[last] = value
    return table


def test_it_is_a_schema_of_the_dialect_that_it_names() -> None:
    found = recipe_schema()
    Draft202012Validator.check_schema(found)
    assert found["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_of_ddkit_is_taken(file: Path) -> None:
    assert problems(tomllib.loads(file.read_text(encoding="utf-8"))) == []


def test_the_resolved_recipe_of_a_run_is_taken(tmp_path: Path) -> None:
    ddkit.distill(losses="dm,dkkt,gm", pipc=2, sets=SMALL | {"steps": 1}, out=tmp_path / "run", device="cpu")
    assert problems(tomllib.loads((tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8"))) == []


def test_a_recipe_with_strangers_and_shorthands_is_taken() -> None:
    assert problems(WHOLE) == []
    assert problems({}) == []
    assert problems(changed("initializer", "real")) == []
    assert problems(changed("data", {"use": "npz:data.npz", "holdout": 0.3})) == []


WRONG = [
    ("stpes", 3),
    ("ipc", 0),
    ("pipc", "some"),
    ("seed", -1),
    ("data", {"use": "digits", "path": "x"}),
    ("data", {"use": "npz:data.npz", "holdout": 1.5}),
    ("initializer", 3),
    ("teacher/norm", "layers"),
    ("teacher/nrom", "batch"),
    ("network/model", "mlp"),  # which has no depth_of_field
    ("losses/dm/wieght", 1.0),
    ("losses/again/weight", -1.0),
    ("losses/again/power", 1.0),
    ("losses/dkkt-primal/masked", "yes"),
    ("views/strong/operations", ["crop", "melt"]),
    ("views/strong/noise", -0.5),
    ("optimizer/images/kind", "lion"),
    ("optimizer/images/betas", [0.9]),
    ("optimizer/images/betas", [0.9, 2.0]),
    ("evaluators/accuracy/repeats", 0),
    ("engine/log_every", 0),
    ("rules", [{"when": {"ipc_least": 3}, "set": {}}]),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda value: str(value))
def test_what_is_wrong_is_refused_by_the_schema_and_by_ddkit(path: str, value: Any) -> None:
    table = changed(path, value)
    assert problems(table) != []
    if path == "network/model":
        return  # that one needs the component, which a run builds
    with pytest.raises(ddkit.DdkitError):
        resolve(_alone(table))


def _alone(table: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe without the strangers, which are not installed here."""
    return table | {"losses": {label: loss for label, loss in table["losses"].items() if label != "theirs"}, "network": {}}


def test_that_reading_takes_the_recipe_that_nothing_is_wrong_with() -> None:
    resolve(_alone(WHOLE))


def test_every_table_and_component_of_ddkit_is_in_it() -> None:
    found = recipe_schema()
    kinds = ("loss", "initializer", "augmenter", "evaluator", "model", "dataset")
    own = [(p.kind, p.name) for p in registry.plugins() if p.first_party and p.kind in kinds]
    assert [name for kind, name in own if f"options of the {kind} {name}" not in found["$defs"]] == []
    assert set(found["$defs"]["Recipe"]["properties"]) == {*resolve("dm").__struct_fields__, "rules"}


def test_the_command_prints_it_and_nothing_else(cli: Cli) -> None:
    shown, short = cli("schema"), cli("schema", "--json")
    assert (shown.code, shown.err) == (0, "")
    assert json.loads(shown.out) == json.loads(short.out) == recipe_schema()
    assert len(short.out.splitlines()) == 1
