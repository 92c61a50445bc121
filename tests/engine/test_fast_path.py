"""Fast paths give what the plain one gives: compiled, in bfloat16, in blocks, re-drawn in place, without asking the device."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import codecache

import ddkit
from ddkit.components import registry
from ddkit.data.images import Normalisation
from ddkit.engine.bank import Bank
from ddkit.engine.draws import Draws, ViewSpec
from ddkit.engine.loop import Engine, Finiteness, Hooks, distill
from ddkit.engine.losses import WeightedLoss
from ddkit.engine.pool import Inner, NetworkPool
from ddkit.engine.source import StepSource
from ddkit.engine.step import Step
from ddkit.nn.compiling import PAYS_BACK, Arithmetic, compiled, decide_arithmetic, native_bfloat16
from ddkit.nn.device import products, tune_process
from ddkit.nn.embedder import Embedder
from ddkit.nn.experts import untrained
from ddkit.nn.networks import build_network, forward_flops, load_weights, redraw, training_flops
from ddkit.nn.second_order import SecondOrder
from ddkit.nn.training import Schedule, fit
from ddkit.recipes.tables import ExpertsTable, OptimizerTable
from ddkit.seeding import generator
from tests.conftest import SMALL_FLAGS, Result

INFO = ddkit.DataInfo(class_names=("a", "b", "c"), channels=3, size=(12, 12))
CPU = torch.device("cpu")
PLAIN = Arithmetic(compile=False, precision="float32")


def model(name: str = "convnet", **options: Any) -> Any:
    return ddkit.create("model", name, {"width": 8, "depth": 2} | options, data=INFO)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real(counts: tuple[int, ...] = (6, 6, 6)) -> tuple[Tensor, Tensor]:
    """Returns uint8 images and labels, class by class."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randint(0, 256, (len(labels), *INFO.shape), generator=draw(), dtype=torch.uint8)
    return images, labels


def source(
    *,
    arithmetic: Arithmetic = PLAIN,
    counts: tuple[int, ...] = (6, 6, 6),
    batch: int = 256,
    block: int = 0,
    teacher: ddkit.nn.Teacher | None = None,
    device: torch.device = CPU,
) -> StepSource:
    images, labels = real(counts)
    composed = ddkit.create("augmenter", "dsa", {"compose": 3}, data=INFO)
    normalisation = Normalisation((0.5,) * 3, (0.25,) * 3)
    draws = Draws(
        seed=0, info=INFO, normalisation=normalisation, real_images=images, real_labels=labels, batch=batch,
        augmenter=ddkit.create("augmenter", "dsa", data=INFO), views={"default": ViewSpec(composed, 0.2)}, device=device,
    )  # fmt: skip
    networks = NetworkPool(
        draws=draws, model=model(), arithmetic=arithmetic, block=block, experts=untrained(model(), INFO, ExpertsTable(), normalisation)
    )
    return StepSource(draws=draws, networks=networks, teacher=teacher)


def bank(images: Tensor, labels: Tensor, lr: float = 1.0, declared: Any = ()) -> Bank:
    return Bank(images, labels, dict(declared), {"images": OptimizerTable(kind="sgd", lr=lr, momentum=0.5)})


def started_at_real(steps: StepSource, *, lr: float = 1.0) -> Bank:
    return bank(steps.draws.normalisation.normalise(steps.draws.real_images), steps.draws.real_labels, lr)


def terms(*names: str) -> list[WeightedLoss]:
    few = {"trajectory": {"steps": 2}, "unrolled": {"epochs": 2}}
    return [WeightedLoss(name, ddkit.create("loss", name, few.get(name, {})), 1.0) for name in names]


# Compiled and bfloat16


@pytest.fixture(scope="module")
def compiled_embedders() -> dict[str, Embedder]:
    """Returns compiled embedders of one network, by precision; each is compiled on its first use, which takes seconds."""
    found = {}
    for precision in ("float32", "bfloat16"):
        module = build_network(model(), INFO, 0, "network").requires_grad_(False)
        found[precision] = Embedder(module, Arithmetic(compile=True, precision=precision), block=4)
    return found


def features_and_gradient(embedder: Embedder, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    features = embedder(x)
    (gradient,) = torch.autograd.grad((features * torch.linspace(-1, 1, features.shape[1], device=x.device)).sum(), x)
    return features.detach(), gradient


# The stated tolerances of docs/explanation/performance.md: features relative to the largest, and the direction of the gradient. In
# bfloat16 a value near 0 can fall on the other side of a ReLU, so single gradients differ; the direction hardly does.
TOLERANCES = {"float32": (1e-5, 1 - 1e-6), "bfloat16": (0.02, 0.98)}
SLOW = pytest.mark.slow  # compiling takes ten to twenty seconds for each precision


@SLOW
@pytest.mark.parametrize("precision", TOLERANCES)
def test_compiled_features_and_gradients_equal_plain_ones(
    compiled_embedders: dict[str, Embedder], precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    fast = compiled_embedders[precision]
    plain = Embedder(build_network(model(), INFO, 0, "network").requires_grad_(False), PLAIN)
    x = torch.randn((7, *INFO.shape), generator=draw())
    (features, gradient), (right, right_gradient) = features_and_gradient(fast, x), features_and_gradient(plain, x)
    assert features.dtype == gradient.dtype == torch.float32
    largest, cosine = TOLERANCES[precision]
    assert float((features - right).abs().max() / right.abs().max()) < largest
    assert float(nn.functional.cosine_similarity(gradient.flatten(), right_gradient.flatten(), dim=0)) > cosine
    assert "torch.compile failed" not in caplog.text


@SLOW
@pytest.mark.parametrize("precision", TOLERANCES)
def test_equal_images_have_equal_features_with_and_without_gradient_and_in_any_batch(
    compiled_embedders: dict[str, Embedder], precision: str
) -> None:
    embedder = compiled_embedders[precision]
    x = torch.randn((9, *INFO.shape), generator=draw())
    with torch.no_grad():
        alone = embedder(x)
    assert torch.equal(embedder(x.clone().requires_grad_()).detach(), alone)
    for rows in (slice(0, 1), slice(2, 4), slice(3, 9)):
        assert torch.equal(embedder(x[rows]).detach(), alone[rows])


@pytest.mark.parametrize(
    ("precision", "chunk"), [pytest.param("float32", 0, marks=SLOW), pytest.param("bfloat16", 0, marks=SLOW), ("plain", 0), ("plain", 2)]
)
def test_a_set_that_equals_its_real_images_stays_there(compiled_embedders: dict[str, Embedder], precision: str, chunk: int) -> None:
    """DM from all accessible real images is at its minimum from the first step: rounding must not move it."""
    steps = source(arithmetic=compiled_embedders[precision].arithmetic if precision in TOLERANCES else PLAIN, block=4)
    steps.networks.embedder = compiled_embedders.get(precision)
    engine = Engine(started_at_real(steps), steps, terms("dm"), chunk=chunk)
    before = engine.bank.images.detach().clone()
    for index in range(3):
        found = engine.evaluate(index)
        engine.bank.update(found.gradients)
        assert float(found.values["dm"]) == 0.0
    assert torch.equal(engine.bank.images, before)
    with torch.no_grad():
        engine.bank.images[0] += 0.1  # the negative control: anywhere else it moves
    assert float(engine.evaluate(3).values["dm"]) > 0


@SLOW
def test_weights_drawn_anew_reach_the_compiled_code(compiled_embedders: dict[str, Embedder]) -> None:
    embedder = compiled_embedders["float32"]
    x = torch.randn((5, *INFO.shape), generator=draw())
    for number in (1, 2):
        redraw(embedder.module, model(), INFO, 0, "network", number)
        plain = Embedder(build_network(model(), INFO, 0, "network", number), PLAIN)
        torch.testing.assert_close(embedder(x).detach(), plain(x).detach(), rtol=1e-4, atol=1e-5)
    redraw(embedder.module, model(), INFO, 0, "network")


@SLOW
def test_weights_of_experts_reach_the_compiled_code(compiled_embedders: dict[str, Embedder]) -> None:
    embedder = compiled_embedders["float32"]
    networks, x = source(arithmetic=embedder.arithmetic).networks, torch.randn((5, *INFO.shape), generator=draw())
    networks.embedder, networks.epochs = embedder, (1, None)
    networks.experts = experts = untrained(model(), INFO, ExpertsTable(count=2, epochs=2), networks.draws.normalisation)
    for index in (0, 1):
        plain = Embedder(build_network(model(), INFO, 0, "other"), PLAIN)
        load_weights(plain.module, experts.drawn(generator(0, "network", index), first=1).start)
        torch.testing.assert_close(networks.at(index)(x).detach(), plain(x).detach(), rtol=1e-4, atol=1e-5)
    redraw(embedder.module, model(), INFO, 0, "network")


@SLOW
def test_weights_trained_between_steps_reach_the_compiled_code(compiled_embedders: dict[str, Embedder]) -> None:
    """The network of a step that another shares: the compiled one and the plain one are trained alike."""
    x, labels = torch.randn((6, *INFO.shape), generator=draw()), torch.arange(3).repeat_interleave(2)
    features = []
    for embedder in (compiled_embedders["float32"], Embedder(build_network(model(), INFO, 0, "network").requires_grad_(False), PLAIN)):
        networks = source(arithmetic=embedder.arithmetic).networks
        networks.renew_every = 3
        networks.inner = Inner(Schedule(epochs=2, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant"))
        networks.embedder, found = embedder, []
        for index in range(4):
            networks.advance(index, lambda: (x, labels))
            found.append(networks.at(index)(x).detach())
        assert not any(parameter.requires_grad for parameter in embedder.module.parameters())
        redraw(embedder.module, model(), INFO, 0, "network")
        features.append(found)
    for fast, plain in zip(*features, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
    assert float((features[0][1] - features[0][0]).abs().max()) > 1e-3, "training did something"


@SLOW
def test_a_compiled_network_trains_as_the_plain_one() -> None:
    images, labels = torch.randn((18, *INFO.shape), generator=draw()), torch.arange(3).repeat(6)
    schedule = Schedule(epochs=3, lr=0.05)
    results = []
    for fast in (False, True):
        module = build_network(model(), INFO, 0, "trained")
        forward = ddkit.nn.compiled(module, wanted=fast)
        fit(module, images, labels, schedule, augmenter=None, generator=draw(), forward=forward, channels_last=fast)
        results.append(torch.cat([value.flatten() for value in module.state_dict().values()]))
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


# What is decided, and when


def test_compiling_is_decided_by_the_work_alone() -> None:
    limit = PAYS_BACK["cpu"]
    assert not decide_arithmetic("auto", "auto", CPU, work=limit).compile
    made = decide_arithmetic("auto", "auto", CPU, work=limit * 1.01)
    assert made.compile
    assert made.precision == ("bfloat16" if native_bfloat16(CPU) else "float32")
    assert not made.graphs
    assert decide_arithmetic(False, "auto", CPU, work=1e30) == PLAIN
    assert decide_arithmetic(True, "float32", CPU, work=0) == Arithmetic(compile=True, precision="float32")
    assert not decide_arithmetic("auto", "auto", torch.device("mps"), work=1e30).compile


def test_cuda_graphs_are_recorded_where_a_step_is_small() -> None:
    cuda = torch.device("cuda")
    small, large = (decide_arithmetic(True, "float32", cuda, work=1e18, step_work=work) for work in (1e9, 1e13))
    assert (small.graphs, large.graphs) == (True, False)


def test_flops_are_counted_by_hand() -> None:
    info = ddkit.DataInfo(class_names=tuple("abcdefghij"), channels=3, size=(32, 32))
    module = ddkit.create("model", "convnet", data=info)(3, (32, 32), 10)
    convolutions = 2 * 9 * (3 * 128 * 32**2 + 128 * 128 * 16**2 + 128 * 128 * 8**2)
    assert forward_flops(module, info, features=True) == convolutions
    assert forward_flops(module, info) == convolutions + 2 * 2048 * 10
    assert training_flops(module, info, images=10, epochs=5, tests=7) == forward_flops(module, info) * 157


def test_counting_flops_leaves_running_statistics_alone() -> None:
    module = build_network(model(norm="batch"), INFO, 0, "network")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    forward_flops(module, INFO)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def plan(cli: Callable[..., Result], *flags: object) -> dict[str, Any]:
    result = cli("distill", "--losses", "dm", "--plan", "--json", *SMALL_FLAGS, *flags)
    assert result.code == 0, result.err
    engine: dict[str, Any] = json.loads(result.out)["recipe"]["engine"]
    return engine


def test_the_plan_writes_out_what_was_decided_for_short_and_long_runs(cli: Callable[..., Result]) -> None:
    short, long = plan(cli), plan(cli, "--steps", 100_000_000)
    assert (short["compile"], short["precision"]) == (False, "float32")
    assert (long["compile"], long["precision"]) == (True, "bfloat16" if native_bfloat16(CPU) else "float32")
    assert isinstance(short["block"], int)
    assert plan(cli, "--steps", 100_000_000, "--set", "engine.compile=false")["precision"] == "float32"
    assert plan(cli, "--steps", 100_000_000, "--set", "network.norm=batch")["compile"] is False, "it couples its batch"


def test_a_resumed_run_keeps_what_was_decided(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    flags = ("--losses", "dm", "--evaluate", "none", *SMALL_FLAGS)
    assert cli("distill", *flags, "--out", run).code == 0
    monkeypatch.setitem(PAYS_BACK, "cpu", 0.0)
    assert plan(cli)["compile"] is True, "a new run would decide otherwise now"
    assert cli("distill", "--resume", "--out", run, "--steps", 3).code == 0
    assert "compile = false" in (run / "recipe.toml").read_text()
    assert 'precision = "float32"' in (run / "recipe.toml").read_text()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])  # the first traces and generates no code
def test_a_compiled_run_from_the_command_line_gives_its_result(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend != "inductor":
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, *, options, dynamic: original(function, backend=backend, dynamic=dynamic))
    images, labels = real()  # of the shapes above, whose compiled code is at hand
    pixels = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "data.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    results = []
    for compile_ in ("true", "false"):
        out = tmp_path / compile_
        sets = (f"engine.compile={compile_}", "engine.precision=float32", "network.depth=2")
        flags = ("--losses", "dm", "--evaluate", "none", "--ipc", 2, *SMALL_FLAGS, *(part for each in sets for part in ("--set", each)))
        result = cli("distill", "--dataset", f"npz:{tmp_path / 'data.npz'}", *flags, "--out", out)
        assert result.code == 0, result.err
        assert "torch.compile failed" not in result.err
        results.append(ddkit.load(out).images)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


# Blocks


@pytest.mark.parametrize("block", [1, 2, 5, 7, 100])
def test_features_and_gradients_do_not_depend_on_the_block(block: int) -> None:
    module = build_network(model(), INFO, 0, "network")
    x = torch.randn((7, *INFO.shape), generator=draw())
    whole, parts = (features_and_gradient(Embedder(module, PLAIN, block=size), x) for size in (0, block))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_little_memory_means_smaller_chunks_and_blocks_with_the_same_result(cli: Callable[..., Result], tmp_path: Path) -> None:
    results, plans = [], []
    for memory in (1, 4096):
        flags = ("--set", f"engine.memory={memory}", "--ipc", 20, "--set", "network.width=64")
        plans.append(plan(cli, *flags))
        out = tmp_path / str(memory)
        assert cli("distill", "--losses", "dm", "--evaluate", "none", *SMALL_FLAGS, *flags, "--out", out).code == 0
        results.append(ddkit.load(out).images)
    assert plans[0]["chunk"] > 0
    assert plans[1]["chunk"] == 0
    assert plans[0]["block"] < plans[1]["block"]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


PEAK = """
import re, sys
import torch
from ddkit.run.initial_set import initial_set
from ddkit.run.setup import RunSetup
from ddkit.recipes.resolve import resolve

torch.set_num_threads(1)
sets = {"engine.memory": int(sys.argv[2]), "network.width": 64, "network.depth": 3, "initializer.use": "noise"}
sets |= {"teacher.use": sys.argv[4], "teacher.width": 64, "teacher.norm": "batch"}
recipe = resolve(sys.argv[3], evaluators="none", dataset=f"npz:{sys.argv[1]}", ipc=60, pipc=20, steps=2, sets=list(sets.items()))
job = RunSetup(recipe, device="cpu")
job.load_teacher()
engine = job.engine_over(initial_set(job).bank)

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak()
engine.evaluate(0)
print(job.decided.chunk, (peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the peak")
@pytest.mark.parametrize(("losses", "small", "code"), [("dm", 128, 48), ("dkkt", 512, 160)])
def test_the_memory_of_a_step_stays_within_its_budget(tmp_path: Path, losses: str, small: int, code: int) -> None:
    """Measured in a process of its own: 600 synthetic images of 32 x 32, whose activations take several times the budget.

    `code` are the MiB of what runs for the first time, more where gradients are differentiated again.
    """
    file = tmp_path / "random.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    np.savez(file, x_train=pixels, y_train=np.repeat(np.arange(10), 20), x_test=pixels[:1], y_test=np.zeros(1, int))
    grown = {}
    teacher = tmp_path / "teacher.safetensors"
    ddkit.train(teacher, dataset=f"npz:{file}", sets={"teacher.width": 64, "teacher.norm": "batch", "train.epochs": 1})
    for budget in (small, 4096):
        command = [sys.executable, "-c", PEAK, str(file), str(budget), losses, str(teacher)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        chunk, mib = done.stdout.split()
        assert (int(chunk) > 0) == (budget == small)
        grown[budget] = float(mib)
    assert grown[small] < small + code, grown
    assert grown[4096] > small + code, "the negative control: without chunks it would break the bound"


# Asking the device


def on_meta(*names: str) -> Engine:
    """Returns an engine whose tensors have no data: whatever would read a value back raises."""
    meta = torch.device("meta")
    module = build_network(model(norm="batch"), INFO, 0, "teacher")
    loaded = ddkit.nn.Teacher(module, mean=(0.5,) * 3, std=(0.25,) * 3)
    made = terms(*names)
    declared = {name: spec for term in made for name, spec in term.loss.requires.parameters.items()}
    labels = torch.arange(3).repeat_interleave(2)
    here = Engine(bank(torch.randn((6, *INFO.shape), generator=draw()), labels, declared=declared), source(teacher=loaded), made)
    here.start()  # once, before the loop: the teacher's scale-invariant layers are found
    module.to(meta)
    drawn = source(teacher=loaded, device=meta, batch=4)
    drawn.twice = SecondOrder(module, PLAIN, block=4)
    there = Engine(bank(torch.empty((6, *INFO.shape), device=meta), labels, declared=declared), drawn, made)
    there.bank.labels = there.bank.decoded_labels = labels.to(meta)
    return there


LOOP_LOSSES = tuple(plugin.name for plugin in registry.plugins() if plugin.kind == "loss" and plugin.first_party)


def test_the_loop_with_every_loss_asks_the_device_for_nothing() -> None:
    engine = on_meta(*LOOP_LOSSES)
    guard = Finiteness(engine, 0, lambda index: None)
    for index in range(3):
        with guard.around(index):
            found = engine.evaluate(index, measured=index == 1)
            engine.bank.update(found.gradients)
            guard.note(index, found)
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.check(3)  # the negative control: here values are read back, and without data that fails


class BadFrom(ddkit.Loss):
    """Not finite at step 5 and later."""

    def __call__(self, step: ddkit.Step) -> Tensor:
        return step.images.square().sum() * (float("nan") if step.index >= 5 else 1.0)


@pytest.mark.parametrize(
    ("read", "kept"),
    [(lambda index: True, 5), (lambda index: index % 3 == 0, 4), (lambda index: False, 0)],
    ids=["each", "every 3rd", "never"],
)
def test_what_went_wrong_between_two_looks_is_found_and_the_state_of_the_last_look_kept(read: Callable[[int], bool], kept: int) -> None:
    good = Engine(started_at_real(source(), lr=0.1), source(), [WeightedLoss("bad", BadFrom(), 1.0)])
    for index in range(kept):
        good.bank.update(good.evaluate(index).gradients)
    engine = Engine(started_at_real(source(), lr=0.1), source(), [WeightedLoss("bad", BadFrom(), 1.0)])
    saved: list[int] = []
    with pytest.raises(ddkit.RunFailed, match="'bad' became nan at step 5"):
        distill(engine, 0, 9, Hooks(save=saved.append, is_read=read))
    assert saved == [kept]
    right = good.bank.state()
    assert all(torch.equal(value, right[key]) for key, value in engine.bank.state().items())


# What a step draws


def test_real_rows_are_a_class_by_class_sample_without_repetition() -> None:
    draws = source(counts=(3, 9, 5), batch=4).draws
    drawn = [draws.real_rows(index) for index in range(40)]
    for rows in drawn:
        assert torch.equal(rows, rows.unique())
        assert torch.bincount(draws.real_labels[rows]).tolist() == [3, 4, 4]
    seen = torch.bincount(torch.cat(drawn), minlength=17)
    assert (seen[:3] == 40).all()
    assert int(seen[3:].min()) >= 8, "each image of a larger class is drawn now and then"
    assert torch.equal(drawn[7], draws.real_rows(7))


@pytest.mark.parametrize(("classes", "ours", "theirs"), [(None, {0, 2}, {0, 1, 2}), (range(2), {0}, {0, 1}), (range(2, 3), {2}, {2})])
def test_class_slices_are_the_rows_of_the_labels(classes: range | None, ours: set[int], theirs: set[int]) -> None:
    step = Step(source(counts=(3, 9, 5), batch=4), bank(torch.zeros((3, *INFO.shape)), torch.tensor([0, 0, 2])), 0, classes)
    for slices, labels, there in ((step.class_slices, step.labels, ours), (step.real.class_slices, step.real.labels, theirs)):
        assert slices.keys() == there == set(labels.tolist())
        assert all(torch.equal(labels[rows], labels[labels == label]) for label, rows in slices.items())


# Training


class Counting(ddkit.Augmenter):
    """Adds its drawn number to each row and counts its calls."""

    rowwise = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def sample(self, generator: torch.Generator, groups: int) -> dict[str, Tensor]:
        return {"shift": torch.rand(groups, generator=generator)}

    def apply(self, x: Tensor, parameters: Any) -> Tensor:
        self.rows.append(len(x))
        return x + parameters["shift"].view(-1, 1, 1, 1)


class OneByOne(Counting):
    """The same, of an author who does not promise that rows are treated apart."""

    rowwise = False


def test_small_batches_are_augmented_several_at_a_time_with_the_same_result() -> None:
    images, labels = torch.randn((18, *INFO.shape), generator=draw()), torch.arange(3).repeat(6)
    results, calls = [], []
    for augmenter in (Counting(), OneByOne()):
        module = build_network(model(), INFO, 0, "trained")
        fit(module, images, labels, Schedule(epochs=31), augmenter=augmenter, generator=draw())
        results.append(module.state_dict())
        calls.append(augmenter.rows)
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert calls[1] == [18] * 31
    assert len(calls[0]) == 3
    assert sum(calls[0]) == 18 * 31


# The process


def test_the_allocator_is_left_alone_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    monkeypatch.setenv("DDKIT_KEEP_MEMORY", "0")
    tune_process()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_what_torch_compiles_is_kept_where_nobody_else_can_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    private = tmp_path / "cache" / "private"

    def chosen(own: str = "") -> Path:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", own)
        compiled(lambda x: x, wanted=True)
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert Path(codecache._HEADER_DIR) == folder / "precompiled_headers"
        return folder

    assert chosen() == private / "compile"
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in (private.parent, private, private / "compile"))
    assert caplog.messages == []
    assert chosen(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    private.chmod(0o770)
    refused = chosen()
    assert tmp_path not in refused.parents
    assert stat.S_IMODE(refused.stat().st_mode) == 0o700
    assert f"chmod 700 {private}" in caplog.text
    private.rename(tmp_path / "mine")
    (tmp_path / "mine").chmod(0o700)
    private.symlink_to(tmp_path / "mine")
    assert chosen() != private / "compile", "a link to a private folder may be another's"


def test_float32_products_are_left_alone_on_a_cpu() -> None:
    before = torch.get_float32_matmul_precision()
    with products(CPU, "bfloat16"):
        assert torch.get_float32_matmul_precision() == before
