"""Recipes, --set and --losses of any content: a plan, or one DdkitError; never another exception."""

from __future__ import annotations

import copy
import datetime
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ddkit
from ddkit import api
from ddkit.recipes.resolve import resolve
from ddkit.recipes.settings import parse_set
from ddkit.recipes.tables import NAMED_TABLES, TABLES, own_keys

BASE: dict[str, Any] = tomllib.loads("""
summary = "One of every table."
ipc = 1
pipc = 3
steps = 2
seed = 0
[data]
use = "digits"
batch = 16
test = "test"
held_out = 5
[teacher]
use = "auto"
model = "convnet"
width = 4
norm = "batch"
[train]
epochs = 1
augmenter = "dsa"
[network]
model = "convnet"
width = 4
renew_every = 2
[initializer]
use = "real"
[augmenter]
use = "dsa"
scale = 1.2
[views.soft]
augmenter = "dsa"
compose = 2
noise = 0.1
[optimizer.images]
kind = "adam"
lr = 0.1
betas = [0.9, 0.99]
[optimizer.multipliers]
lr = 0.05
[engine]
compile = false
precision = "float32"
memory = 512
log_every = 1
checkpoint_every = 10
[losses.dm]
weight = 0.01
[losses.dkkt-primal]
weight = 0.5
views = {default = 1.0, soft = 0.5}
[losses.dkkt-stationarity]
weight = 0.1
[evaluators.accuracy]
protocol = "short"
epochs = 1
repeats = 1
[[rules]]
when = {ipc_min = 1, pipc_max = 10}
set = {steps = 3, optimizer = {images = {lr = 0.2}}}
""")

WORDS = sorted({
    *BASE, *TABLES, *NAMED_TABLES, *(key for kind in (*TABLES.values(), *NAMED_TABLES.values()) for key in own_keys(kind)),
    "use", "weight", "options", "rules", "when", "set", "notes", "dsv/x", "", " ", ".",
    "digits", "convnet", "mlp", "noise", "real", "none", "dm", "gm", "dkkt", "auto", "all", "imagefolder:/", "npz:",
    "python:os.system", "!!python/object:os.x",
})  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=6),
    st.sampled_from(["x" * 100_000, "\x1b[31mred\x1b[0m", "\u202egnirts", "a\nb", "\x00", "\ud800", "../../etc", "~"]),
)
NUMBERS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, 1e308, -1e308, 5e-324, 0.5, -0.0]),
    st.builds(pow, st.just(16), st.just(5000)),  # TOML's 0xfff...: more digits than Python writes
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
DATES = [datetime.date(2020, 2, 29), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), datetime.time(1, 2)]
OTHERS = st.sampled_from([*DATES, True, False])
VALUES = st.recursive(
    st.one_of(TEXTS, NUMBERS, OTHERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every key and item below `value`."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, item in items for each in ((*path, key), *_places(item, (*path, key)))]


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Draws the base recipe with one to three mutations of keys, values, types and nesting."""
    found = copy.deepcopy(BASE)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        path = draw(st.sampled_from(_places(found)))
        table: Any = found
        for key in path[:-1]:
            table = table[key]
        kind = draw(st.sampled_from(["value", "number", "number", "key", "gone", "more", "deeper"]))
        if kind == "value":
            table[path[-1]] = draw(VALUES)
        elif kind == "number":
            table[path[-1]] = draw(NUMBERS)
        elif kind == "key" and isinstance(table, dict):
            table[draw(TEXTS)] = table.pop(path[-1])
        elif kind == "gone":
            del table[path[-1]]
        elif kind == "more" and isinstance(table, dict):
            table[draw(TEXTS)] = draw(VALUES)
        else:
            table[path[-1]] = draw(st.sampled_from([[table[path[-1]]], {"use": table[path[-1]]}]))
        if not found:
            break
    return found


def _told(attempt: Callable[[], Any]) -> str | None:
    """Returns the message of the DdkitError that `attempt` raises, None where it raises none; any other exception escapes."""
    error: ddkit.DdkitError | None = None
    try:
        attempt()
    except ddkit.DdkitError as caught:
        error = caught
    if error is None:
        return None
    assert str(error).strip()
    assert len(str(error)) < 2000, "a message is one paragraph, whatever the value is"
    assert error.exit_code in (2, 3, 4, 5)
    return str(error)


@pytest.fixture(autouse=True, scope="module")
def _no_training() -> Any:
    """Makes the data small and training a failure."""
    patch = pytest.MonkeyPatch()
    data = torch.rand(100, 8, 8, generator=torch.Generator().manual_seed(0)).mul(16).numpy()
    patch.setattr("ddkit_datasets.arrays._digits", lambda: (data, (torch.arange(100) % 10).numpy()))
    for name in (
        "ddkit.nn.automatic_teacher.fit",
        "ddkit.nn.automatic_teacher.train_teacher",
        "ddkit.run.run.distill",
        "subprocess.Popen",
    ):
        patch.setattr(name, lambda *arguments, **named: pytest.fail("something was run"))
    yield
    patch.undo()


def test_the_recipe_that_is_mutated_is_valid() -> None:
    assert _told(lambda: api.plan(BASE, device="cpu")) is None


@pytest.mark.parametrize("most", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_a_mutated_recipe_gives_a_plan_or_one_error(most: int) -> None:
    @settings(max_examples=most, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(raw=recipes())
    def try_all(raw: dict[str, Any]) -> None:
        _told(lambda: api.plan(raw, device="cpu"))

    try_all()


def test_among_mutated_recipes_are_plans_and_errors() -> None:
    assert _told(lambda: api.plan(BASE | {"seed": 7}, device="cpu")) is None
    told = _told(lambda: api.plan(BASE | {"seed": -7}, device="cpu"))
    assert told == "seed = -7 is not possible: expected int >= 0."


# --set and --losses

SIGNS = st.text(alphabet=st.sampled_from(list("abdkm-,:/.=[]{}\"'#0123456789 enaif_+\n\x00\x1b\ud800é")), max_size=30)
SET_PATHS = st.one_of(
    SIGNS,
    st.sampled_from([
        "losses.dm.weight", "losses.dm", "losses", "losses..x", "data", "data.use", "teacher.use", "views", "views.x.augmenter", "engine",
        "optimizer.images.lr", "rules",
        "notes", "evaluators.accuracy.epochs", "steps", "name", "summary", ".", "..",
        "a." * 3000, "data." + "x." * 3000 + "y", "views." + "x." * 3000 + "y",
    ]),
)  # fmt: skip
SET_VALUES = st.one_of(
    SIGNS,
    st.sampled_from([
        "[" * 5000, "{a=" * 3000, "9" * 5000, "0x" + "f" * 5000, "1e999999999", "nan", "-inf", "1979-05-27", "07:32:00", "[[]]", "{}",
        '"""', "1\nb=2", "dm" * 50_000, "!!python/object/apply:os.system [echo]", "python:os.system",
    ]),
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(path=SET_PATHS, value=SET_VALUES)
def test_any_set_gives_a_recipe_or_one_error(path: str, value: str) -> None:
    _told(lambda: resolve(None, sets=[parse_set(f"{path}={value}")]))


NAMES = st.sampled_from([
    "dm", "dkkt", "gm", "dm:0.1", "dkkt:1e400", "dm:nan", "dkkt-primal", "ddkit/dm", "dm:" + "9" * 5000, "dm:1_0", "dm:\u0663",
    "x" * 100_000, "python:os.system",
])  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(losses=st.lists(st.one_of(SIGNS, NAMES), max_size=4).map(",".join))
def test_any_losses_give_a_recipe_or_one_error(losses: str) -> None:
    _told(lambda: resolve(None, losses=losses))
