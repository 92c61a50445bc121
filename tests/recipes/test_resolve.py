"""Recipes: which setting wins, rules, --set, selection of losses, the resolved recipe, and what is refused."""

from __future__ import annotations

import json
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import ddkit
from ddkit import api
from ddkit.components import registry
from ddkit.errors import FlagError, InputError, PluginError
from ddkit.recipes.resolve import check_effect, described, parse_toml, read_recipe, resolve, select_losses
from ddkit.recipes.settings import assign, parse_set
from ddkit.recipes.tables import NAMED_TABLES, TABLES, PluginTable, Recipe, own_keys, parse_recipe, recipe_dict
from tests.conftest import SMALL_FLAGS, Result

TEACHERS = ["teacher", "teacher-dsv"]
INSTALLED = sorted({plugin.name for plugin in registry.plugins() if plugin.kind == "recipe"} - set(TEACHERS))
# those of ddkit_methods are run on the digits in tests/plugins/test_methods.py
PLANNED = [name for name in INSTALLED if "ddkit_methods" not in registry.find("recipe", name).value]
RULES: dict[str, Any] = {
    "ipc": 1,
    "pipc": 50,
    "steps": 100,
    "losses": {"dm": {"weight": 1.0}},
    "rules": [
        {"when": {"ipc_min": 10}, "set": {"steps": 200, "losses": {"dm": {"weight": 2.0}}}},
        {"when": {"ipc_min": 10, "ipc_max": 20, "pipc_max": 50}, "set": {"steps": 300}},
        {"when": {"pipc_min": 500}, "set": {"data.batch": 64}},
    ],
}


def weights(recipe: Recipe) -> dict[str, float]:
    return {label: table.weight for label, table in recipe.losses.items()}


# Which setting wins


def test_flags_win_over_set_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("steps = 11\nseed = 5\nipc = 3\n[losses.dm]\n")
    assert resolve({"losses": {"dm": {}}}).steps == Recipe().steps
    assert resolve(str(file)).steps == 11
    assert resolve(str(file), sets=[("steps", 22)]).steps == 22
    assert resolve(str(file), sets=[("steps", 22)], steps=33).steps == 33
    assert resolve(str(file), steps=33).seed == 5
    assert resolve({}, sets=[("steps", 1), ("steps", 2)]).steps == 2


def test_values_that_nothing_sets_are_the_plugins_own(cli: Callable[..., Result]) -> None:
    (Path.cwd() / "mine.toml").write_text("[augmenter]\ncutout = 0.25\n[losses.dm]\n")
    result = cli("distill", "--recipe", "mine.toml", "--pipc", 2, "--plan", "--json", "--set", "augmenter.scale=1.5")
    augmenter = json.loads(result.out)["recipe"]["augmenter"]
    assert (augmenter["cutout"], augmenter["scale"], augmenter["rotate"]) == (0.25, 1.5, 15.0)


def test_tables_that_are_set_stay_the_callers_own_and_are_not_too_deep() -> None:
    own: dict[str, Any] = {"width": 8}
    assert resolve(None, sets={"network": own, "network.depth": 2}).network.options["depth"] == 2
    assert own == {"width": 8}
    with pytest.raises(InputError, match=r"network\.width"):
        resolve(None, sets={"network": {"width": threading.Lock()}})
    for _ in range(100_000):
        own = {"a": own}
    with pytest.raises(InputError, match="network is nested more than 32 levels deep"):
        resolve(None, sets={"network": own})


def test_model_and_protocol_flags_reach_every_table_that_names_a_model() -> None:
    recipe = resolve("default", model="mlp", evaluation={"protocol": "dm-official"}, evaluators="accuracy")
    assert (recipe.teacher.model, recipe.network.model) == ("mlp", "mlp")
    assert recipe.evaluators["accuracy"].options == {"protocol": "dm-official", "model": "mlp"}


def test_evaluate_none_and_names_choose_the_evaluators() -> None:
    assert resolve("default", evaluators="none").evaluators == {}
    assert list(resolve("default", evaluators="accuracy").evaluators) == ["accuracy"]
    with pytest.raises(PluginError, match="Did you mean 'accuracy'"):
        resolve("default", evaluators="acuracy")


# Rules


@pytest.mark.parametrize(
    ("ipc", "pipc", "steps", "batch", "weight"),
    [
        (1, 50, 100, 256, 1.0),
        (9, 50, 100, 256, 1.0),
        (10, 50, 300, 256, 2.0),
        (20, 50, 300, 256, 2.0),
        (21, 50, 200, 256, 2.0),
        (10, 51, 200, 256, 2.0),
        (10, "all", 200, 64, 2.0),
        (1, "all", 100, 64, 1.0),
        (1, 499, 100, 256, 1.0),
        (1, 500, 100, 64, 1.0),
    ],
)
def test_rules_apply_in_order_where_ipc_and_pipc_match(ipc: int, pipc: int | str, steps: int, batch: int, weight: float) -> None:
    recipe = resolve(RULES, ipc=ipc, pipc=pipc)
    assert (recipe.steps, recipe.data.batch, weights(recipe)) == (steps, batch, {"dm": weight})
    assert resolve(RULES, sets=[("ipc", ipc), ("pipc", pipc)]) == recipe


def test_flags_and_sets_win_over_rules_and_the_given_data_stay_as_they_are() -> None:
    before = json.dumps(RULES)
    assert resolve(RULES, ipc=10, steps=7).steps == 7
    assert weights(resolve(RULES, ipc=10, sets=[("losses.dm.weight", 9.0)])) == {"dm": 9.0}
    assert weights(resolve(RULES, ipc=10, losses="dm:3")) == {"dm": 3.0}
    assert json.dumps(RULES) == before
    assert "rules" not in recipe_dict(resolve(RULES, ipc=10))


# --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=5", ("steps", 5)),
        ("losses.dm.weight=0.01", ("losses.dm.weight", 0.01)),
        ("losses.dm.weight=1e-3", ("losses.dm.weight", 0.001)),
        ("engine.compile=false", ("engine.compile", False)),
        ("teacher.mean=[0.5, 0.25]", ("teacher.mean", [0.5, 0.25])),
        ("views.default={augmenter='none'}", ("views.default", {"augmenter": "none"})),
        ("data.use=imagefolder:/some/where", ("data.use", "imagefolder:/some/where")),
        ("data.use='12'", ("data.use", "12")),
        ("network.norm=batch", ("network.norm", "batch")),
        ("data.dir=", ("data.dir", "")),
        ("data.dir=a=b", ("data.dir", "a=b")),
        (" steps = 5", ("steps", 5)),
        ("data.dir=1\nsteps=2", ("data.dir", "1\nsteps=2")),
    ],
)
def test_a_set_value_is_toml_else_a_string(text: str, expected: tuple[str, Any]) -> None:
    assert parse_set(text) == expected


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("\ufeffsteps = 3\n")
    assert parse_toml(tmp_path / "a.toml") == {"steps": 3}


@pytest.mark.parametrize(
    ("table", "path", "value", "options"),
    [
        ("augmenter", "augmenter.use", "none", {}),
        ("augmenter", "augmenter", "none", {}),
        ("augmenter", "augmenter.use", "dsa", {"scale": 1.5}),
        ("augmenter", "augmenter.rotate", 3.0, {"scale": 1.5, "rotate": 3.0}),
    ],
)
def test_naming_another_component_drops_the_options_of_the_one_before(table: str, path: str, value: Any, options: Any) -> None:
    recipe = resolve({"augmenter": {"use": "dsa", "scale": 1.5}}, sets=[(path, value)])
    assert getattr(recipe, table).options == options


def test_it_drops_them_in_every_table_that_names_a_component_and_keeps_the_tables_own_keys() -> None:
    raw = {
        "data": {"use": "imagefolder", "path": "x", "batch": 7},
        "network": {"model": "convnet", "width": 8, "renew_every": 3},
        "teacher": {"model": "convnet", "width": 8, "mean": [0.5]},
        "train": {"augmenter": "dsa", "compose": 2, "epochs": 3},
        "views": {"default": {"augmenter": "dsa", "compose": 6, "noise": 0.2, "scale": 1.1}},
        "losses": {"a": {"use": "total-variation", "power": 2.0, "weight": 3.0}},
        "evaluators": {"accuracy": {"protocol": "short"}},
    }
    named = {"data.use": "digits", "network.model": "mlp", "teacher.model": "mlp", "train.augmenter": "none"}
    named |= {"views.default.augmenter": "none", "losses.a.use": "image-norm", "evaluators.accuracy.use": "spectrum"}
    recipe = resolve(raw, sets=named.items())
    assert (recipe.data.options, recipe.data.batch) == ({}, 7)
    assert (recipe.network.options, recipe.network.renew_every) == ({}, 3)
    assert (recipe.teacher.options, recipe.teacher.mean) == ({}, [0.5])
    assert (recipe.train.options, recipe.train.epochs) == ({}, 3)
    view = recipe.views["default"]
    assert (view.options, view.compose, view.noise) == ({}, None, 0.2)
    assert (recipe.losses["a"].options, recipe.losses["a"].weight) == ({}, 3.0)
    assert recipe.evaluators["accuracy"].options == {}


def test_shorthand_and_table_of_a_component_mean_the_same() -> None:
    assert parse_recipe({"initializer": "noise"}) == parse_recipe({"initializer": {"use": "noise"}})
    raw: dict[str, Any] = {"initializer": "noise"}
    assign(raw, "initializer.std", 0.5)
    assert raw == {"initializer": {"use": "noise", "std": 0.5}}


# --losses


TABLES_OF_LOSSES = {"dm": {"weight": 0.5}, "total-variation": {"weight": 0.1, "power": 2.0}}
FALLBACK = {"dm": {"weight": 7.0}, "dkkt-primal": {"weight": 2.0}, "dkkt-stationarity": {"weight": 0.2, "masked": True}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dm", {"dm": 0.5}),
        ("dm:0.001", {"dm": 0.001}),
        ("dm:0", {"dm": 0.0}),
        (" dm , image-norm:3 ", {"dm": 0.5, "image-norm": 3.0}),
        ("gm", {"gm": 1.0}),
        ("dkkt", {"dkkt-primal": 2.0, "dkkt-stationarity": 0.2}),
        ("dkkt:0.5", {"dkkt-primal": 1.0, "dkkt-stationarity": 0.1}),
        ("dm,dkkt:2", {"dm": 0.5, "dkkt-primal": 4.0, "dkkt-stationarity": 0.4}),
        ("ddkit/gm:4", {"ddkit/gm": 4.0}),
        ("ddkit/dkkt:0.5", {"dkkt-primal": 1.0, "dkkt-stationarity": 0.1}),
    ],
)
def test_losses_selects_with_weights_of_the_recipe_else_default_else_one(text: str, expected: dict[str, float]) -> None:
    chosen = select_losses(text, TABLES_OF_LOSSES, FALLBACK)
    assert {label: table.get("weight", 1.0) for label, table in chosen.items()} == pytest.approx(expected)
    kept = {
        label: {key: value for key, value in table.items() if key != "weight"} for label, table in (FALLBACK | TABLES_OF_LOSSES).items()
    }
    assert all({key: value for key, value in table.items() if key != "weight"} == kept.get(label, {}) for label, table in chosen.items())


def test_weights_of_a_recipe_without_the_loss_come_from_default() -> None:
    default = read_recipe("default")["losses"]["dkkt-primal"]["weight"]
    recipe = resolve({"losses": {"dm": {"weight": 0.125}}}, losses="dm,dkkt-primal")
    assert weights(recipe) == {"dm": 0.125, "dkkt-primal": default}


# The resolved recipe


@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_recipe_parses_and_survives_toml(name: str) -> None:
    recipe = resolve(name, ipc=1, pipc=20)
    assert parse_recipe(tomllib.loads(tomli_w.dumps(recipe_dict(recipe)))) == recipe
    assert recipe.summary
    assert read_recipe(name)["source"]


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_of_a_recipe_is_a_recipe(name: str, cli: Callable[..., Result]) -> None:
    result = cli("distill", "--recipe", name, "--pipc", 20, "--ipc", 1, "--plan", "--json")
    assert result.code == 0, result.err
    assert parse_recipe(json.loads(result.out)["recipe"]).summary


def test_a_run_is_repeated_byte_for_byte_from_its_own_recipe(cli: Callable[..., Result]) -> None:
    flags = ["--losses", "dm:0.01,dkkt:0.5", "--pipc", 4, "--ipc", 1, "--seed", 3, "--evaluate", "none", *SMALL_FLAGS[:8]]
    for arguments in ([*flags, "--out", "first"], ["--recipe", "first/recipe.toml", "--out", "second"]):
        result = cli("distill", *arguments)
        assert result.code == 0, result.err
    assert cli("distill", "--recipe", "first/recipe.toml", "--seed", 4, "--out", "other").code == 0
    first, second, other = (Path(run, "synthetic.safetensors").read_bytes() for run in ("first", "second", "other"))
    assert first == second
    assert first != other
    assert Path("first/recipe.toml").read_bytes() == Path("second/recipe.toml").read_bytes()


# What is refused


def test_the_keys_beside_options_are_those_of_the_tables() -> None:
    tables = {**TABLES, **NAMED_TABLES}.items()
    assert {name: own_keys(kind) for name, kind in tables if issubclass(kind, PluginTable)} == registry.OWN_KEYS


def test_a_flag_that_is_impossible_is_blamed_and_not_the_recipe() -> None:
    for given, flag in (({"ipc": 0}, "--ipc: "), ({"evaluators": "accuracy", "evaluation": {"protocol": "shrt"}}, "--protocol: ")):
        with pytest.raises(FlagError, match=flag):
            resolve("dm", **given)


@pytest.mark.parametrize("name", TEACHERS)
def test_recipes_of_teachers_train_one_and_distil_nothing(name: str, cli: Callable[..., Result]) -> None:
    small = ("--set", "train.epochs=1", "--set", "teacher.width=8")
    result = cli("train", "--recipe", name, "--dataset", "digits", *small, "--out", "t.safetensors", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["test_accuracy"] > 0
    told = cli("distill", "--recipe", name)
    assert told.code == 4
    assert "no loss" in told.err


@pytest.mark.parametrize("name", [*INSTALLED, *TEACHERS])
def test_every_setting_of_a_recipe_says_where_it_comes_from_and_why(name: str, cli: Callable[..., Result]) -> None:
    rows = described(read_recipe(name))
    assert rows
    assert [row["path"] for row in rows if row["origin"] not in ("paper", "ours") or not row["why"]] == []
    assert " ".join(read_recipe(name)["source"].split()) in " ".join(cli("info", "recipe", name).out.split())


def test_info_shows_the_rules_of_a_setting(cli: Callable[..., Result]) -> None:
    rows = {row["path"]: row for row in json.loads(cli("info", "practical", "--json").out)["settings"]}
    assert rows["losses.dkkt-stationarity.weight"]["rules"] == [
        {"when": {"pipc_max": 10}, "value": 0.1},
        {"when": {"pipc_min": 500}, "value": 0.001},
    ]
    assert rows["initializer.std"]["value"] is None
    assert "0.1 if pipc <= 10" in cli("info", "practical").out


def test_a_runs_own_recipe_has_no_notes_on_values_that_may_be_others() -> None:
    recipe = api.plan("practical", dataset="digits")["recipe"]
    assert recipe["losses"]["dm"]["weight"] == 0.001
    assert "notes" not in recipe


def test_a_note_holds_for_all_below_its_path() -> None:
    raw = {"a": {"b": 1, "c": {"d": 2}}, "notes": {"a": "ours: all", "a.c": "paper: c"}}
    assert [(r["path"], r["origin"], r["why"]) for r in described(raw)] == [("a.b", "ours", "all"), ("a.c.d", "paper", "c")]


@pytest.mark.parametrize(
    ("ipc", "pipc", "init", "rate", "ratio"),
    [(1, 10, "noise", 0.1, 0.001), (3, 50, "real", 0.01, 0.001), (10, "all", "real", 0.001, 0.001), (50, 50, "real", 0.01, 0.01)],
)
def test_practical_resolves_the_papers_settings_by_its_own_rules(ipc: int, pipc: int | str, init: str, rate: float, ratio: float) -> None:
    recipe = resolve("practical", ipc=ipc, pipc=pipc)
    assert recipe.initializer.use == init
    assert recipe.losses["dkkt-stationarity"].weight == rate
    assert recipe.losses["dm"].weight == ratio


def test_a_recipe_file_may_be_a_path_of_python_whatever_its_ending(tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("ipc = 7\n[losses.dm]\nweight = 3.0\n")
    found = resolve(file)
    assert (found.name, found.ipc, found.losses["dm"].weight) == ("settings", 7, 3.0)
    with pytest.raises(InputError, match="does not exist"):
        resolve(tmp_path / "dm")


def test_a_key_that_a_user_sets_and_the_recipe_does_not_use_is_refused_and_those_of_recipes_are_not() -> None:
    def check(*given: str, **sets: Any) -> None:
        check_effect(resolve("dm", sets={key.replace("__", "."): value for key, value in sets.items()}), given)

    check()
    check("labels.lr", "labels.init", labels__kind="learned")
    check("labels.temperature", labels__kind="learned", labels__init="teacher")
    check("network.first", "experts.count", network__source="experts")
    check("network.inner_lr", network__inner_epochs=1)
    check("initializer.reuse", initializer="real")
    for initializer in ("noise", "file:set"):
        with pytest.raises(FlagError, match=f"--set initializer.reuse has no effect: the initializer '{initializer[:4]}"):
            check("initializer.reuse", initializer=initializer)
    for path in ("labels.lr", "labels.init", "labels.temperature", "network.first", "experts.count", "experts", "network.inner_lr"):
        with pytest.raises(FlagError, match=f"--set {path} has no effect"):
            check(path)


class Centre(ddkit.Loss):
    """A loss of a notebook's cell."""


@pytest.mark.parametrize("given", [Centre, Centre(name="c"), ["dm", Centre]])
def test_a_class_in_the_place_of_a_name_is_refused_with_what_helps(given: Any) -> None:
    with pytest.raises(FlagError, match=r"losses = .*Centre.*add_plugin_file\('mine.py'\), and give its name, 'centre'"):
        resolve(losses=given)
    with pytest.raises(FlagError, match="evaluators = 3: it takes names"):
        resolve(evaluators=3)  # type: ignore[arg-type]
    assert resolve(losses=["dm", "image-norm"], evaluators=["spectrum"]) == resolve(losses="dm,image-norm", evaluators="spectrum")
