"""The network that several steps share and that is trained on the synthetic set between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddkit
from ddkit import api
from ddkit.distributed import ALONE, Ranks
from ddkit.engine.loop import Engine, Hooks, distill
from ddkit.engine.losses import WeightedLoss
from ddkit.engine.pool import NORM_IMAGES, NetworkPool
from ddkit.engine.step import Step
from ddkit.files import read_tensors, write_tensors
from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network, network_tensors
from ddkit.recipes.resolve import resolve
from ddkit.recipes.tables import Recipe, parse_recipe
from ddkit.run.initial_set import initial_set
from ddkit.run.setup import RunSetup
from ddkit.testing.world import in_parts
from tests.engine.runs import made, same, write_npz

CLASSES, STEPS, SHARED = 3, 6, 3  # steps 0, 1, 2 share one network, and 3, 4, 5
DC = Path(__file__).parents[2] / "plugins" / "ddkit_gm" / "recipes" / "dc.toml"
Maker = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "small.npz", [20] * CLASSES)


@pytest.fixture
def recipe(npz: Path) -> Maker:
    """Returns a function that makes a recipe's data from names of losses, settings of the network, and other keys."""

    def make(*losses: str, network: Mapping[str, Any] = {}, **keys: Any) -> dict[str, Any]:
        return {
            "ipc": 2, "pipc": "all", "steps": STEPS, "data": {"use": "npz", "path": str(npz), "batch": 8}, "initializer": "noise",
            "network": {"width": 4, "depth": 1, "renew_every": SHARED, "inner_epochs": 2, "inner_lr": 0.3, **network},
            "optimizer": {"images": {"kind": "sgd", "lr": 0.5, "momentum": 0.5}}, "losses": {name: {} for name in losses}, **keys,
        }  # fmt: skip

    return make


class Watch(ddkit.Loss):
    """Weighs nothing, and keeps what each step's network is."""

    requires = ddkit.Requires(network=True)

    def __call__(self, step: Step) -> Tensor:
        tensors = {name: value.clone() for name, value in network_tensors(step.network).items()}
        self.__dict__.setdefault("seen", []).append((tensors, step.embed(step.images).detach(), step.images.detach().clone()))
        return step.images.sum() * 0


def advance(engine: Engine, start: int, stop: int, **keys: Any) -> None:
    distill(engine, start, stop, Hooks(**keys))


def watched(table: Mapping[str, Any]) -> tuple[RunSetup, list[tuple[dict[str, Tensor], Tensor, Tensor]]]:
    """Returns the job of a recipe and, for each step of its run, the network's tensors, the set's features, and the set."""
    job, bank, engine = made(table)
    watch = Watch()
    advance(Engine(bank, engine.source, [*engine.losses, WeightedLoss("watch", watch, 1.0)]), 0, STEPS)
    return job, watch.__dict__["seen"]


# Which network a step has


def slow_networks(job: RunSetup, sets: list[Tensor]) -> list[nn.Module]:
    """Returns the network of each step, given the synthetic set (n, C, H, W) before each update: trained by the book."""
    table, found = job.recipe.network, []
    labels = torch.arange(CLASSES).repeat_interleave(job.recipe.ipc)
    for index in range(len(sets)):
        network = build_network(job.model, job.info, job.recipe.seed, "network", index // SHARED)
        for after in sets[index - index % SHARED + 1 : index + 1]:  # as each update before this step left the set
            for _ in range(table.inner_epochs):
                loss = nn.functional.cross_entropy(network(after), labels)
                for parameter, gradient in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True):
                    parameter.data -= table.inner_lr * gradient
        found.append(network)
    return found


@pytest.mark.parametrize("name", ["gm", "dm"])
def test_the_network_of_a_step_is_fresh_or_trained_on_the_set_after_each_update(recipe: Maker, name: str) -> None:
    job, seen = watched(recipe(name, augmenter="none"))
    right = slow_networks(job, [images for _, _, images in seen])
    for (tensors, features, images), network in zip(seen, right, strict=True):
        for key, value in network_tensors(network).items():
            torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(features, embed(network, images).detach(), rtol=1e-4, atol=1e-6)
    fresh = [network_tensors(build_network(job.model, job.info, 0, "network", draw)) for draw in (0, 1)]
    assert [same(tensors, fresh[index // SHARED]) for index, (tensors, _, _) in enumerate(seen)] == [True, False, False] * 2
    assert not torch.equal(seen[1][0]["classifier.weight"], seen[2][0]["classifier.weight"])


@pytest.mark.parametrize("shared", [1, 2])
def test_without_inner_epochs_the_network_is_drawn_and_no_checkpoint_holds_it(recipe: Maker, shared: int) -> None:
    job, seen = watched(recipe("gm", network={"inner_epochs": 0, "renew_every": shared}))
    for index, (tensors, _, _) in enumerate(seen):
        assert same(tensors, network_tensors(build_network(job.model, job.info, 0, "network", index // shared)))
    _, bank, engine = made(recipe("gm", network={"inner_epochs": 0}))
    advance(engine, 0, 2)
    assert engine.state(2).keys() == bank.state().keys()


def test_a_network_that_no_two_steps_share_is_never_trained(recipe: Maker) -> None:
    states = []
    for epochs in (0, 2):
        _, _, engine = made(recipe("gm", network={"renew_every": 1, "inner_epochs": epochs}))
        advance(engine, 0, 3)
        states.append(engine.state(3))
    assert same(*states)


def by_the_book(job: RunSetup, pool: NetworkPool, sets: list[Tensor], images: Tensor | None, labels: Tensor) -> list[dict[str, Tensor]]:
    """Returns the tensors of each step's network, of a pool trained on `images` (None: the set after the step, of `sets`) and `labels`."""
    table, networks, found = job.recipe.network, {}, []
    for index in range(len(sets)):
        turn = pool.turn(index)
        if turn.draw not in networks:
            module = build_network(job.model, job.info, job.recipe.seed, "network", turn.draw)
            networks[turn.draw] = module, torch.optim.SGD(module.parameters(), lr=table.inner_lr, momentum=table.inner_momentum)
        module, optimizer = networks[turn.draw]
        found.append({name: value.clone() for name, value in network_tensors(module).items()})
        for _ in range((table.inner_steps or table.inner_epochs) if turn.age + 1 < table.renew_every and index + 1 < len(sets) else 0):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(sets[index + 1] if images is None else images), labels).backward()
            optimizer.step()
    return found


POOL = {"pool": 2, "inner_epochs": 0, "inner_steps": 2, "inner_momentum": 0.9, "inner_lr": 0.1, "train_on": "synthetic"}


@pytest.mark.parametrize("on", ["synthetic", "real"])
def test_each_network_of_a_pool_goes_on_with_its_weights_and_momentum_until_it_is_renewed(recipe: Maker, on: str) -> None:
    job, bank, engine = made(recipe("dm", network=POOL | {"train_on": on}, augmenter="none", steps=12))
    watch = Watch()
    advance(Engine(bank, engine.source, [*engine.losses, WeightedLoss("watch", watch, 1.0)]), 0, 12)
    seen = watch.__dict__["seen"]
    turns = [engine.source.networks.turn(index) for index in range(12)]
    assert {turn.place for turn in turns} == {0, 1}
    assert max(turn.age for turn in turns) == SHARED - 1
    assert max(turn.draw for turn in turns) > 2, "some were renewed"
    real = job.normalisation.normalise(job.real.images) if on == "real" else None
    labels = torch.arange(CLASSES).repeat_interleave(2) if real is None else job.real.labels
    right = by_the_book(job, engine.source.networks, [images for _, _, images in seen], real, labels)
    for (tensors, _, _), expected in zip(seen, right, strict=True):
        for key, value in expected.items():
            torch.testing.assert_close(tensors[key], value, rtol=1e-3, atol=1e-5)


def test_training_on_a_few_real_images_takes_new_ones_each_time(recipe: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Tensor, Any]] = []
    monkeypatch.setattr("ddkit.engine.pool.fit", lambda module, images, labels, schedule, **how: taken.append((images, how)))
    network = {"train_on": "real", "inner_epochs": 0, "inner_steps": 2, "batch": 5, "inner_augment": False}
    job, _, engine = made(recipe("dm", network=network))
    advance(engine, 0, 3)
    every = job.normalisation.normalise(job.real.images)
    rows = [[(every == image).flatten(1).all(1).nonzero().item() for image in images] for images, _ in taken]
    assert [len(set(each)) for each in rows] == [10, 10]
    assert rows[0] != rows[1]
    assert [(how["steps"], how["augmenter"]) for _, how in taken] == [(2, None)] * 2


@pytest.mark.parametrize("epochs", [0, 2])
def test_batch_norm_has_the_statistics_of_real_images_so_that_an_image_does_not_depend_on_others(recipe: Maker, epochs: int) -> None:
    job, bank, engine = made(recipe("dm", network={"norm": "batch", "inner_epochs": epochs}))
    engine.evaluate(0)
    if epochs:
        engine.source.networks.advance(1, lambda: (bank.images, bank.labels))
    embedder = engine.source.networks.at(1)
    layers = [each for each in embedder.module.modules() if isinstance(each, nn.BatchNorm2d)]
    assert [each.training for each in layers] == [False]
    real = job.normalisation.normalise(job.real.images[engine.source.draws.rows(1, "batch norm", NORM_IMAGES)])
    assert len(real) == CLASSES * NORM_IMAGES
    entering: list[Tensor] = []
    layers[0].register_forward_pre_hook(lambda layer, inputs: entering.append(inputs[0]))
    together = embedder(real)
    torch.testing.assert_close(layers[0].running_mean, entering[0].mean((0, 2, 3)))
    torch.testing.assert_close(layers[0].running_var, entering[0].transpose(0, 1).flatten(1).var(1))
    torch.testing.assert_close(together[:1], embedder(real[:1]))


@pytest.mark.parametrize(("name", "network"), [("gm", {}), ("dm", {}), ("dm", {"norm": "batch"} | POOL)])
def test_chunks_of_classes_share_the_trained_network_and_the_statistics_of_batch_norm(
    recipe: Maker, name: str, network: dict[str, Any]
) -> None:
    sets = []
    for chunk in (0, 1):
        _, bank, engine = made(recipe(name, network=network, engine={"chunk": chunk}))
        assert len(engine.parts) == (CLASSES if chunk else 1)
        advance(engine, 0, STEPS)
        sets.append(bank.images.detach())
    torch.testing.assert_close(sets[1], sets[0], rtol=1e-3, atol=1e-4)


def test_two_processes_train_a_pool_on_real_images_as_one_does_to_the_last_bit(recipe: Maker) -> None:
    network = POOL | {"train_on": "real", "norm": "batch", "batch": 8, "inner_mix": "cutmix"}
    table = recipe("dm", network=network, augmenter="dsa")

    def trained(ranks: Ranks) -> dict[str, Tensor]:
        setup = RunSetup(parse_recipe(table), device="cpu", ranks=ranks)
        engine = setup.engine_over(initial_set(setup).bank)
        advance(engine, 0, STEPS)
        return engine.source.networks.tensors()

    alone = trained(ALONE)
    assert any("momentum_buffer" in name for name in alone)
    assert all(same(alone, each) for each in in_parts(2, trained))


# Exact repetition


def test_checkpoints_and_logging_change_nothing(recipe: Maker, tmp_path: Path) -> None:
    found = []
    for number, engine in enumerate(({}, {"log_every": 1}, {"checkpoint_every": 1, "log_every": 4})):
        run = ddkit.distill(recipe("gm", "dm", engine=engine), out=tmp_path / str(number), device="cpu")
        found.append((run.path / "synthetic.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


def test_a_checkpoint_inside_a_draw_needs_the_network_and_one_at_its_border_does_not(recipe: Maker, tmp_path: Path) -> None:
    for steps in (2, SHARED):
        run = ddkit.distill(recipe("gm"), out=tmp_path / str(steps), steps=steps, device="cpu")
        for file in (run.path / "checkpoints").iterdir():
            tensors, record = read_tensors(file)
            assert ("network_step" in tensors) == (steps == 2 and "2" in file.name)
            kept = {key: value for key, value in tensors.items() if not key.startswith("network")}
            write_tensors(file, kept, record)
    with pytest.raises(ddkit.DdkitError, match=r"step 2 .* does not fit the recipe of the run") as caught:
        api.resume(tmp_path / "2", steps=STEPS, device="cpu")
    assert caught.value.exit_code == 5
    api.resume(tmp_path / str(SHARED), steps=STEPS, device="cpu")


def test_a_rate_that_makes_the_network_overflow_is_told_and_the_state_before_kept(recipe: Maker) -> None:
    _, _, engine = made(recipe("gm", network={"inner_lr": 1e30}))
    saved: list[tuple[int, dict[str, Tensor]]] = []
    with pytest.raises(ddkit.RunFailed, match=r"'gm' became nan at step 1\. .*network\.inner_lr"):
        advance(engine, 0, STEPS, save=lambda index: saved.append((index, engine.state(index))))
    ((index, state),) = saved
    assert index == 1
    assert int(state["network_step"]) == 0
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_a_step_whose_network_was_not_trained_up_to_it_is_refused(recipe: Maker) -> None:
    _, _, engine = made(recipe("gm"))
    with pytest.raises(ddkit.RunFailed, match="network of step 2 is trained from that of step 1"):
        engine.evaluate(2)


def test_a_network_of_a_pool_that_a_checkpoint_lacks_is_reported(recipe: Maker) -> None:
    _, _, engine = made(recipe("dm", network=POOL))
    advance(engine, 0, 11)
    state = engine.state(11)
    assert {key.split(".")[1] for key in state if key.startswith("network.")} == {
        str(turn.place) for turn in engine.source.networks._waiting(11)
    }
    assert any("optimizer.momentum_buffer" in key for key in state)
    engine.load_state(11, state)
    name = next(key for key in state if key.startswith("network."))
    with pytest.raises(KeyError):
        engine.load_state(11, {key: value for key, value in state.items() if key != name})


def test_momentum_that_is_read_back_has_the_layout_of_its_parameter_as_fused_updates_need_it(recipe: Maker) -> None:
    _, _, engine = made(recipe("dm", network=POOL | {"pool": 1}))
    advance(engine, 0, 2)
    engine.source.networks.at(1).module.to(memory_format=torch.channels_last)
    engine.load_state(2, {name: value.clone(memory_format=torch.contiguous_format) for name, value in engine.state(2).items()})
    optimizer, module = engine.source.networks.optimizer, engine.source.networks.at(1).module
    assert optimizer is not None
    kept = {name: optimizer.state[parameter]["momentum_buffer"].stride() for name, parameter in module.named_parameters()}
    assert kept == {name: parameter.stride() for name, parameter in module.named_parameters()}


# Bad values, and the recipe


@pytest.mark.parametrize(
    ("ipc", "outer", "inner"),
    [(1, 1, 1), (5, 10, 50), (10, 10, 50), (20, 20, 25), (30, 30, 20), (40, 40, 15), (50, 50, 10), (100, 50, 10)],
)
def test_the_recipe_dc_has_the_loops_of_the_public_code(ipc: int, outer: int, inner: int) -> None:
    made: Recipe = resolve(str(DC), ipc=ipc)
    assert (made.network.renew_every, made.network.inner_epochs, made.network.inner_lr) == (outer, inner, 0.01)
    assert made.steps == 1000 * outer
    assert (made.pipc, made.data.batch, made.augmenter.use, made.initializer.use) == ("all", 256, "none", "noise")
    images = made.optimizer["images"]
    assert (images.kind, images.lr, images.momentum) == ("sgd", 0.1, 0.5)
    assert [(label, table.weight) for label, table in made.losses.items()] == [("gm", 1.0)]
    assert made.evaluators["accuracy"].options["protocol"] == "dc-official"
