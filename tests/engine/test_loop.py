"""The contract of the loop: what losses see, what is summed, what is updated, what stops a run, what repeats exactly."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from ddkit_models import ConvNet
from torch import Tensor

import ddkit
from ddkit.components import registry
from ddkit.engine.bank import Bank
from ddkit.engine.loop import Engine, Hooks, distill
from ddkit.engine.losses import WeightedLoss
from ddkit.engine.step import Step
from ddkit.files import read_tensors
from ddkit.nn.embedder import Embedder
from ddkit.nn.teacher import save_teacher
from ddkit.recipes.tables import OptimizerTable
from ddkit.testing.world import Setting, World, in_parts, part_of
from tests.engine.runs import made, same, write_npz

CLASSES = 5


# Small losses of our own


class Square(ddkit.Loss):
    """Half the sum of squares of the images: its gradient is the images themselves."""

    def __call__(self, step: Step) -> Tensor:
        return step.images.square().sum() / 2


class SeparableSquare(Square):
    requires = ddkit.Requires(reduce="sum")


class Linear(ddkit.Loss):
    """A multiple of the sum of the images: its gradient is that multiple everywhere."""

    slope: float = ddkit.option(1.0)

    def __call__(self, step: Step) -> Tensor:
        return self.slope * step.images.sum()


class Rows(ddkit.Loss):
    """Remembers how many rows it was given."""

    seen: list[tuple[int, int]]

    def __call__(self, step: Step) -> Tensor:
        self.__dict__.setdefault("seen", []).append((len(step.images), step.size))
        return step.images.mean()


class SeparableRows(Rows):
    requires = ddkit.Requires(reduce="mean")


class Curious(ddkit.Loss):
    """Touches every member there is, twice."""

    requires = ddkit.Requires(real=True, network=True, teacher=True, views=("default", "raw", "augmented", "noisy"))

    def __call__(self, step: Step) -> Tensor:
        total = step.images.sum()
        for _ in range(2):
            total = total + step.embeddings.sum() + step.real.embeddings.sum() + step.augmented.sum()
            total = total + sum(step.view(name).teacher_logits.sum() for name in self.requires.views)
        return total


class Weighted(ddkit.Loss):
    """Uses extra parameters: pulls `multipliers` down by 1 a row, and `shift` towards the mean image."""

    requires = ddkit.Requires(
        parameters={
            "multipliers": ddkit.Parameter(init=0.25, constraint="nonnegative", lr=0.1),
            "shift": ddkit.Parameter(shape=(2,), per="set", init=0.5),
        }
    )

    def __call__(self, step: Step) -> Tensor:
        return step.parameters["multipliers"].sum() + step.parameters["shift"].square().sum() + 0.01 * step.images.square().sum()


class OtherMultipliers(ddkit.Loss):
    requires = ddkit.Requires(parameters={"multipliers": ddkit.Parameter(init=1.0, constraint="nonnegative", lr=0.1)})

    def __call__(self, step: Step) -> Tensor:
        return step.parameters["multipliers"].sum()


class Filled(Weighted):
    """Gives one of its parameters initial values: each row's index."""

    def initial(self, step: Step) -> Mapping[str, Tensor]:
        return {"multipliers": torch.arange(step.size) - 1.0}


class BadFrom(ddkit.Loss):
    """Becomes `value` at step `at`."""

    at: int = ddkit.option(3, "step")
    sign: int = ddkit.option(0)

    def __call__(self, step: Step) -> Tensor:
        good = step.images.square().sum()
        return good if step.index < self.at else good * (self.sign / torch.zeros(()))


class Steep(ddkit.Loss):
    """A finite loss whose gradient is finite too, but at step 2 so large that the update overflows."""

    def __call__(self, step: Step) -> Tensor:
        return (step.images - step.images.detach()).sum() * (1e30 if step.index == 2 else 1.0)


class InfiniteSlope(ddkit.Loss):
    """A finite loss with an infinite gradient towards the bound of a nonnegative parameter."""

    requires = ddkit.Requires(parameters={"multipliers": ddkit.Parameter(init=0.0, constraint="nonnegative")})

    def __call__(self, step: Step) -> Tensor:
        return step.parameters["multipliers"].sqrt().sum() + step.images.sum()


class Returns(ddkit.Loss):
    """Returns what it is told to, right or wrong."""

    result: Callable[[Step], Any] = staticmethod(lambda step: step.images.sum())

    def __call__(self, step: Step) -> Tensor:
        result: Tensor = self.result(step)
        return result


class Draws(ddkit.Loss):
    """A random direction of its own generator."""

    def __call__(self, step: Step) -> Tensor:
        return (torch.randn(step.images.shape, generator=step.generator) * step.images).sum()


OWN = {
    "square": Square, "linear": Linear, "rows": Rows, "separable-rows": SeparableRows, "curious": Curious, "weighted": Weighted,
    "other-multipliers": OtherMultipliers, "bad-from": BadFrom, "steep": Steep, "draws": Draws, "filled": Filled,
}  # fmt: skip


# Small runs


@pytest.fixture(autouse=True)
def own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the losses above known by name, as an installed distribution would."""
    own = tuple(
        registry.Plugin(kind="loss", name=name, distribution="own", version="1", value=f"{__name__}:{kind.__name__}")
        for name, kind in OWN.items()
    )
    known = (*registry.plugins(), *own)
    monkeypatch.setattr(registry, "plugins", lambda: known)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "small.npz", range(6, 6 + CLASSES))


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a teacher with batch norm and nobody's training: smooth enough, deterministic."""
    info = ddkit.DataInfo(class_names=tuple("01234"), channels=1, size=(8, 8))
    model = ConvNet(depth=2, width=8, norm="batch")
    module = ddkit.nn.build_network(model, info, 0, "teacher")
    record = {"model": "convnet", "options": msgspec.to_builtins(model.options), "mean": [0.5], "std": [0.25]}
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_teacher(file, ddkit.nn.Teacher(module, mean=(0.5,), std=(0.25,), info=record))
    return file


@pytest.fixture
def recipe(npz: Path, teacher_file: Path) -> Callable[..., dict[str, Any]]:
    """Returns a function that makes a recipe's data from losses (a table, or names) and other keys."""

    def make(losses: Mapping[str, Any] | Sequence[str], **keys: Any) -> dict[str, Any]:
        tables = losses if isinstance(losses, Mapping) else {name: {} for name in losses}
        return {
            "ipc": 2, "pipc": "all", "steps": 4, "data": {"use": "npz", "path": str(npz)},
            "teacher": {"use": str(teacher_file), "check": False}, "network": {"width": 8},
            "initializer": "noise", "optimizer": {"images": {"kind": "sgd", "lr": 0.5}},
            "losses": tables, "engine": {"chunk": 0, "log_every": 1}, **keys,
        }  # fmt: skip

    return make


Maker = Callable[..., dict[str, Any]]


def with_terms(engine: Engine, *terms: tuple[str, ddkit.Loss, float], chunk: int = 0) -> Engine:
    """Returns an engine over the same bank and source with other terms."""
    return Engine(engine.bank, engine.source, [WeightedLoss(*term) for term in terms], chunk=chunk)


def advance(engine: Engine, start: int, stop: int) -> None:
    distill(engine, start, stop)


# The sum


def test_the_gradient_is_that_of_the_weighted_sum_and_the_update_follows_it(recipe: Maker) -> None:
    table = recipe({"square": {"weight": 2.0}, "linear": {"weight": 0.5, "slope": 3.0}})
    _, bank, engine = made(table)
    start = bank.images.detach().clone()
    values, gradients = engine.evaluate(0)[:2]
    assert float(values["square"]) == pytest.approx(float(start.square().sum() / 2), rel=1e-6)
    assert float(values["linear"]) == pytest.approx(3 * float(start.sum()), rel=1e-5)
    torch.testing.assert_close(gradients["images"], 2 * start + 1.5)
    advance(engine, 0, 1)
    torch.testing.assert_close(bank.images.detach(), start - 0.5 * (2 * start + 1.5))


def test_every_term_is_recorded_raw_and_weighted_in_order_of_label(recipe: Maker) -> None:
    _, _, engine = made(recipe({"z": {"use": "linear", "weight": 2.0}, "a": {"use": "square", "weight": 0.25}}))
    records: list[dict[str, Any]] = []
    distill(engine, 0, 2, Hooks(observe=lambda index, record: records.append(record())))
    assert [record["step"] for record in records] == [0, 1]
    for record in records:
        assert list(record["losses"]) == ["a", "z"]
        assert record["losses"]["z"]["weighted"] == 2 * record["losses"]["z"]["raw"]
        assert record["total"] == pytest.approx(sum(item["weighted"] for item in record["losses"].values()), rel=1e-12)
    assert records[0]["total"] != records[1]["total"]


# What a loss may touch

MEMBERS: dict[str, tuple[Callable[[Step], Any], str, ddkit.Requires]] = {
    "real": (lambda step: step.real, "real", ddkit.Requires(real=True)),
    "embed": (lambda step: step.embed(step.images), "network", ddkit.Requires(network=True)),
    "embeddings": (lambda step: step.embeddings, "network", ddkit.Requires(network=True)),
    "real.embeddings": (lambda step: step.real.embeddings, "network", ddkit.Requires(real=True, network=True)),
    "network": (lambda step: step.network, "network", ddkit.Requires(network=True)),
    "class_gradients": (lambda step: step.class_gradients, "second_order", ddkit.Requires(network=True, second_order=True)),
    "teacher": (lambda step: step.teacher, "teacher", ddkit.Requires(teacher=True)),
    "teacher_parameters": (lambda step: step.teacher_parameters, "teacher", ddkit.Requires(teacher=True)),
    "view": (lambda step: step.view("raw"), "teacher", ddkit.Requires(teacher=True, views=("raw",))),
}


def everything(recipe: Maker) -> Engine:
    """Returns the engine of a run that has network, teacher and real images, all asked for by other losses."""
    return made(recipe({"dm": {}, "gm": {}, "dkkt-primal": {}}))[2]


def touching(member: Callable[[Step], Any], requires: ddkit.Requires) -> Returns:
    loss = Returns()
    loss.requires = requires

    def touch(step: Step) -> Tensor:
        member(step)
        return step.images.sum()

    loss.result = touch
    return loss


@pytest.mark.parametrize("member", MEMBERS)
def test_an_undeclared_member_is_an_error_that_names_loss_member_and_requirement(recipe: Maker, member: str) -> None:
    touch, requirement, enough = MEMBERS[member]
    dm = ddkit.create("loss", "dm")
    lacking = ddkit.Requires(real=True) if member.startswith("real.") else ddkit.Requires()
    engine = everything(recipe)
    with pytest.raises(ddkit.RunFailed) as caught:
        with_terms(engine, ("dm", dm, 1.0), ("nosy", touching(touch, lacking), 1.0)).evaluate(0)
    for part in ("'nosy'", f"step.{member}", f"{requirement}=True"):
        assert part in str(caught.value)
    with_terms(engine, ("dm", dm, 1.0), ("nosy", touching(touch, enough), 1.0)).evaluate(0)


def test_an_undeclared_view_or_parameter_is_an_error_that_names_both(recipe: Maker) -> None:
    engine = everything(recipe)
    for touch, requires, word in (
        (lambda step: step.view("raw"), ddkit.Requires(teacher=True, views=("default",)), "'raw'"),
        (lambda step: step.parameters["multipliers"], ddkit.Requires(), "'multipliers'"),
    ):
        with pytest.raises(ddkit.RunFailed, match=f"'nosy' uses .*{word}"):
            with_terms(engine, ("nosy", touching(touch, requires), 1.0)).evaluate(0)


def test_the_members_of_a_step_are_those_that_the_tests_know() -> None:
    free = {"images", "labels", "class_slices", "size", "index", "info", "augment", "augmented", "generator", "log"}
    free |= {"targets", "all_reduce", "all_gather", "local_rows", "parameters", "for_loss"}
    public = {name for name, _ in inspect.getmembers(Step) if not name.startswith("_")}
    assert public == free | {name for name in MEMBERS if "." not in name} | {"experts"}  # which need a folder: tests/nn/test_experts.py


def test_every_shared_member_is_built_once_a_step(recipe: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(("embed", "logits", "real"), 0)

    def counting(name: str, owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, call)

    views = {"default": {"augmenter": "dsa"}, "noisy": {"noise": 0.1}}
    names = ("curious", "dm", "dkkt-primal", "dkkt-stationarity")
    _, _, engine = made(recipe({"again": {"use": "curious"}} | {name: {} for name in names}, views=views))
    counting("embed", Embedder, "__call__")
    counting("logits", ddkit.nn.Teacher, "logits")
    counting("real", engine.source.draws, "real_of")
    engine.evaluate(0)
    assert counts == {"embed": 2, "logits": 4, "real": 1}, "real and synthetic; one pass a view"


def test_one_augmentation_a_class_is_shared_by_its_real_and_synthetic_images(recipe: Maker) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(step: Step) -> Tensor:
        ours = step.augment(torch.ones_like(step.images).cumsum(-1))
        theirs = step.augment(torch.ones_like(step.real.images).cumsum(-1), step.real.labels)
        for label in range(CLASSES):
            rows = torch.cat([ours[step.labels == label], theirs[step.real.labels == label]])
            assert (rows == rows[0]).all()
            seen.append((rows[0], torch.ones(8).cumsum(0).expand(8, 8)))
        return step.images.sum()

    engine = everything(recipe)
    with_terms(engine, ("look", touching(look, ddkit.Requires(real=True)), 1.0)).evaluate(0)
    assert any(not torch.equal(a[0], b) for a, b in seen), "the augmentation did something"
    assert any(not torch.equal(a[0], b[0]) for a, b in itertools.combinations(seen, 2)), "and not the same to every class"


def test_another_losss_pass_in_training_mode_leaves_batch_norm_as_gradient_matching_finds_it(recipe: Maker) -> None:
    network = {"width": 8, "norm": "batch", "renew_every": 3}
    alone = made(recipe(["gm"], network=network))[2]
    both = made(recipe(["dm", "gm"], network=network))[2]
    embedder = made(recipe(["dm"], network=network))[2]
    for index in (0, 1):
        value, joint, other = (engine.evaluate(index)[0] for engine in (alone, both, embedder))
        assert torch.equal(value["gm"], joint["gm"])
        assert torch.equal(other["dm"], joint["dm"])


# The terms' shares of the gradient


@pytest.mark.parametrize("chunk", [0, 2])
def test_the_mean_of_dm_is_its_sum_over_classes_and_features_of_the_whole_set(recipe: Maker, chunk: int) -> None:
    base = recipe({"dm": {}})
    total = made(base)[2].evaluate(0)
    base = recipe({"dm": {"normalise": "mean"}}) | {"engine": {"chunk": chunk}}
    job, _, engine = made(base)
    features = engine.source.networks.at(0)(engine.bank.images.detach()).shape[1]
    mean = engine.evaluate(0)
    torch.testing.assert_close(mean.values["dm"] * job.info.classes * features, total.values["dm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.gradients["images"] * job.info.classes * features, total.gradients["images"], rtol=1e-3, atol=1e-4)


def test_the_norms_of_the_terms_gradients_are_those_of_each_weighted_term_alone(recipe: Maker) -> None:
    _, bank, engine = made(recipe({"square": {"weight": 2.0}, "linear": {"weight": 0.5, "slope": 3.0}}))
    engine = with_terms(engine, ("square", Square(), 2.0), ("linear", Linear(slope=3.0), 0.5), ("off", Square(), 0.0))
    norms = engine.evaluate(0, measured=True).norms
    images = bank.images.detach().double()
    assert float(norms["square"]) == pytest.approx(2 * float(images.norm()), rel=1e-6)
    assert float(norms["linear"]) == pytest.approx(1.5 * images.numel() ** 0.5, rel=1e-6)
    assert float(norms["off"]) == 0
    assert engine.evaluate(0).norms == {}, "where nobody asks, nothing is computed"


@pytest.mark.parametrize("names", [("dm", "dkkt-primal", "dkkt-stationarity"), ("feature-regression", "gm", "square")])
def test_norms_of_gradients_in_chunks_are_those_of_the_whole_set_and_change_no_gradient(recipe: Maker, names: Sequence[str]) -> None:
    base = recipe({name: {"mixup": 0.5} if name == "feature-regression" else {} for name in names})
    whole = made(base)[2].evaluate(3, measured=True)
    for name in names:
        only = made(recipe({name: base["losses"][name]}))[2].evaluate(3)
        assert float(whole.norms[name]) == pytest.approx(float(only.gradients["images"].norm()), rel=1e-5)
    base["engine"] |= {"chunk": 2}
    parts = made(base)[2].evaluate(3, measured=True)
    assert {name: float(norm) for name, norm in parts.norms.items()} == pytest.approx(
        {name: float(norm) for name, norm in whole.norms.items()}, rel=1e-4
    )
    assert torch.equal(made(base)[2].evaluate(3).gradients["images"], parts.gradients["images"])


def test_two_parts_of_the_set_find_the_norms_of_the_whole() -> None:
    world = World(registry.create("loss", "dkkt-stationarity"), Setting())
    terms = [WeightedLoss("dkkt-stationarity", world.loss, 0.1), WeightedLoss("square", SeparableSquare(), 2.0)]
    whole = Engine(world.bank, world.source, terms).evaluate(0, measured=True).norms

    def of(ranks: Any) -> dict[str, Tensor]:
        part = part_of(world, ranks)
        return Engine(part.bank, part.source, terms).evaluate(0, measured=True).norms

    for norms in in_parts(2, of):
        assert {name: float(norm) for name, norm in norms.items()} == pytest.approx(
            {name: float(norm) for name, norm in whole.items()}, rel=1e-5
        )


# Chunks of classes


def totalling(given: Callable[[ddkit.Step], Tensor]) -> ddkit.Loss:
    """Returns a loss of the images whose totals are those of `given`, which may be no good ones."""
    loss = touching(lambda step: None, ddkit.Requires(reduce="global"))
    loss.result = lambda step: step.all_reduce(given(step)).square().sum() + step.all_reduce(step.images.square().sum())
    return loss


def dependent(step: ddkit.Step) -> Tensor:
    """From step 3 on a sum that depends on another one, which two passes do not suffice for."""
    mean = step.all_reduce(step.images.detach().sum()) * (step.index >= 3)
    return (step.images.detach() - mean).abs().sum() + 0 * step.images.sum()


def test_totals_that_are_not_finite_are_told_as_such(recipe: Maker) -> None:
    engine = with_terms(made(recipe(["square"]))[2], ("mine", totalling(lambda step: step.images.sum() * float("nan")), 1.0), chunk=2)
    with pytest.raises(ddkit.RunFailed, match="became nan at step 0"):
        advance(engine, 0, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dependent, "'mine' cannot be evaluated in chunks .*its sums depend on one another.*engine.chunk=0"),
        (lambda step: step.images[: len(step.labels)], "shapes differ between parts of the set"),
    ],
    ids=["dependent", "rows"],
)
def test_what_cannot_be_totalled_in_chunks_is_told(recipe: Maker, given: Callable[[ddkit.Step], Tensor], said: str) -> None:
    engine = with_terms(made(recipe(["square"]))[2], ("mine", totalling(given), 1.0), chunk=2)
    with pytest.raises(ddkit.RunFailed, match=said):
        advance(engine, 3, 4)
    advance(with_terms(engine, ("mine", totalling(given), 1.0)), 3, 4)  # at once it can


def test_a_loss_that_is_not_separable_always_sees_the_whole_set(recipe: Maker) -> None:
    table = recipe(["rows", "separable-rows"])
    table["engine"] |= {"chunk": 2}
    engine = made(table)[2]
    engine.evaluate(0)
    seen = {term.label: term.loss.seen for term in engine.losses if isinstance(term.loss, Rows)}
    assert seen == {"rows": [(10, 10)], "separable-rows": [(4, 10), (4, 10), (2, 10)]}


# What stops a run


def checkpoint(path: Path, step: int) -> dict[str, Tensor]:
    return read_tensors(path / "checkpoints" / f"step-{step:08d}.safetensors")[0]


@pytest.mark.parametrize("sign", [0, 1, -1], ids=["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_names_loss_and_step_and_keeps_the_last_good_state(recipe: Maker, tmp_path: Path, sign: int) -> None:
    table = recipe({"bad-from": {"at": 3, "sign": sign}, "square": {}}, steps=6)
    with pytest.raises(ddkit.RunFailed, match=r"'bad-from' \(own 1\) became (nan|inf|-inf) at step 3") as caught:
        ddkit.distill(table, out=tmp_path / "run", device="cpu")
    assert caught.value.exit_code == 1
    good = ddkit.distill(recipe({"bad-from": {"at": 99}, "square": {}}, steps=3), out=tmp_path / "good", device="cpu")
    assert same(checkpoint(tmp_path / "run", 3), checkpoint(good.path, 3))
    assert sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-00000003.safetensors"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


@pytest.mark.parametrize(("kind", "lr"), [("sgd", 1e10), ("adam", 0.1)])
def test_an_update_that_overflows_is_refused_and_the_bank_restored(recipe: Maker, kind: str, lr: float) -> None:
    """Adam's own state overflows first: its images would stay finite, and stay where they are for ever."""
    table = recipe(["steep"], optimizer={"images": {"kind": kind, "lr": lr, "momentum": 0.5 if kind == "sgd" else 0.0}})
    _, bank, engine = made(table)
    advance(engine, 0, 2)
    before = bank.state()
    saved: list[int] = []
    with pytest.raises(ddkit.RunFailed, match=r"update of step 2 .*steep"):
        distill(engine, 2, 5, Hooks(save=saved.append))
    assert saved == [2]
    assert same(before, bank.state())


def test_an_infinite_gradient_is_refused_even_where_a_constraint_would_hide_it(recipe: Maker) -> None:
    _, bank, engine = made(recipe(["square"]))
    loss = InfiniteSlope()
    other = Bank(bank.images, bank.labels, loss.requires.parameters, {"multipliers": OptimizerTable(kind="sgd", lr=1.0)})
    before = other.state()
    with pytest.raises(ddkit.RunFailed, match="update of step 0"):
        advance(Engine(other, engine.source, [WeightedLoss("slope", loss, 1.0)]), 0, 1)
    assert same(before, other.state())


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda step: 1.0, r"returned 1\.0"),
        (lambda step: None, "returned None"),
        (lambda step: step.images.sum((1, 2, 3)), r"shape \(10,\)"),
        (lambda step: step.images.detach().sum(), "requires_grad=False"),
        (lambda step: step.images.sum().reshape(1), r"shape \(1,\)"),
    ],
    ids=["a float", "nothing", "a vector", "detached", "one element"],
)
def test_a_wrong_result_is_refused_by_name(recipe: Maker, result: Callable[[Step], Any], words: str) -> None:
    loss = Returns()
    loss.result = result
    engine = made(recipe(["square"]))[2]
    with pytest.raises(ddkit.RunFailed, match=f"'mine' must return a scalar tensor.*{words}"):
        with_terms(engine, ("mine", loss, 1.0), ("square", Square(), 1.0)).evaluate(0)


class Kicks:
    """An observer that sends a signal to this process during one step."""

    def __init__(self, number: int, index: int) -> None:
        self.number, self.index = number, index

    @ddkit.hookimpl
    def step_finished(self, index: int) -> None:
        if index == self.index:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_termination_that_comes_twice_or_after_ctrl_c_is_one_request(recipe: Maker, tmp_path: Path, first: int) -> None:
    """As when a cluster, or a terminal, sends it to all processes, and the one that started this one passes it on."""

    acted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: acted.append(number))
    try:
        with pytest.raises(ddkit.Interrupted, match="after step 2 of 4") as caught:
            ddkit.distill(recipe(["dm"]), out=tmp_path / "run", device="cpu", observers=[Kicks(first, 1), Kicks(signal.SIGTERM, 1)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert acted == []
    assert caught.value.exit_code == 128 + first
    assert (tmp_path / "run" / "checkpoints" / "step-00000002.safetensors").is_file()


# Extra parameters


def test_extra_parameters_are_declared_optimised_and_kept_nonnegative(recipe: Maker) -> None:
    _, bank, engine = made(recipe(["weighted"]))
    assert bank.parameters["multipliers"].tolist() == [0.25] * 10
    assert bank.parameters["shift"].tolist() == [0.5, 0.5]
    advance(engine, 0, 2)
    torch.testing.assert_close(bank.parameters["multipliers"].detach(), torch.full((10,), 0.05), atol=1e-6, rtol=0)
    advance(engine, 2, 4)
    assert bank.parameters["multipliers"].tolist() == [0.0] * 10, "Adam would have gone on to -0.15"
    assert (bank.parameters["shift"] < 0.5).all()


def test_an_optimizer_table_overrides_a_parameters_own_rate_and_an_unknown_one_is_refused(recipe: Maker) -> None:
    table = recipe(["weighted"])
    table["optimizer"]["multipliers"] = {"kind": "sgd", "lr": 0.125}
    _, bank, engine = made(table)
    advance(engine, 0, 1)
    assert bank.parameters["multipliers"].tolist() == [0.125] * 10
    table["optimizer"]["multiplier"] = {"lr": 0.1}
    with pytest.raises(ddkit.InputError, match=r"optimizer\.multiplier.*images, multipliers, shift"):
        made(table)


def test_a_parameter_declared_differently_by_two_losses_is_refused_and_alike_is_shared(recipe: Maker) -> None:
    with pytest.raises(ddkit.InputError, match="'multipliers' with different values"):
        made(recipe(["weighted", "other-multipliers"]))
    _, bank, engine = made(recipe({"weighted": {}, "again": {"use": "weighted"}}))
    assert set(bank.tensors()) == {"images", "multipliers", "shift"}
    assert engine.evaluate(0)[1]["multipliers"].tolist() == [2.0] * 10


def test_initial_fills_a_parameter_inside_its_constraint(recipe: Maker) -> None:
    _, bank, engine = made(recipe(["filled"]))
    engine.start()
    assert bank.parameters["multipliers"].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert bank.parameters["shift"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"multiplier": torch.zeros(())}, "'multiplier'. Declare this parameter"),
        ({"shift": torch.tensor(float("nan"))}, "not finite"),
        ({"shift": torch.zeros(3)}, "raised"),
    ],
    ids=["undeclared", "not finite", "wrong shape"],
)
def test_initial_values_that_cannot_be_used_are_refused_by_name(recipe: Maker, values: dict[str, Tensor], words: str) -> None:
    engine, loss = made(recipe(["weighted"]))[2], Weighted()
    loss.initial = lambda step: values  # type: ignore[method-assign]
    with pytest.raises(ddkit.RunFailed, match=f"'mine' .*{words}"):
        with_terms(engine, ("mine", loss, 1.0)).start()


@pytest.mark.parametrize("constraint", ["project", "softplus"])
def test_a_negative_least_squares_multiplier_gives_one_and_a_warning(
    recipe: Maker, constraint: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"init": "least-squares", "distance": "l2", "constraint": constraint}
    _, bank, engine = made(recipe({"dkkt-stationarity": options}))
    with torch.no_grad():
        bank.images.zero_()  # one image with every label: most of it misclassified
    engine.start()
    assert "starting from 1 instead" in caplog.text
    found = bank.parameters["multipliers"].detach()
    scale = torch.nn.functional.softplus(found) if constraint == "softplus" else found
    torch.testing.assert_close(scale, torch.ones(10))


# Randomness and exact repetition


def test_every_draw_of_a_step_depends_on_the_seed(recipe: Maker) -> None:
    """From the same images: each of the real batch, the network, the augmentation, the noise and a loss's own draws."""
    table = recipe(["dm", "gm", "dkkt-primal", "draws"], views={"default": {"noise": 0.1}})
    table["data"]["batch"] = 4
    (_, bank, first), (_, _, second) = made(table), made(table | {"seed": 1})
    found = [Engine(bank, engine.source, engine.losses).evaluate(0)[0] for engine in (first, second)]
    assert all(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_step_is_a_function_of_its_index_not_of_the_steps_before_it(recipe: Maker) -> None:
    views = {"default": {"augmenter": "dsa", "noise": 0.1}}
    table = recipe(["dm", "gm", "dkkt-primal", "draws"], views=views)
    table["data"]["batch"] = 4
    table["network"]["renew_every"] = 2
    used, fresh = made(table)[2], made(table)[2]
    results = [used.evaluate(index) for index in (0, 1, 2, 3)]
    again = fresh.evaluate(3)
    assert same(again[0], results[3][0])
    assert same(again[1], results[3][1])
    assert not same(results[3][0], results[2][0])


def test_a_losss_generator_depends_on_its_label_and_step_alone(recipe: Maker) -> None:
    engine = made(recipe({"draws": {}, "second": {"use": "draws"}}))[2]
    alone = made(recipe(["draws"]))[2]
    assert torch.equal(engine.evaluate(2)[0]["draws"], alone.evaluate(2)[0]["draws"])
    values = [*engine.evaluate(2)[0].values(), alone.evaluate(3)[0]["draws"]]
    assert len({float(value) for value in values}) == 3


def test_a_state_is_a_copy(recipe: Maker) -> None:
    _, bank, engine = made(recipe(["square"], optimizer={"images": {"kind": "sgd", "lr": 1.0, "momentum": 0.5}}))
    advance(engine, 0, 1)
    state = bank.state()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    advance(engine, 1, 3)
    assert same(state, copies)
    bank.load_state(state)
    advance(engine, 1, 3)
    assert same(state, copies)
