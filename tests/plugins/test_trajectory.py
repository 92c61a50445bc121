"""Training on the set that is differentiated through: the mathematics in float64, against steps that are written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ddkit_methods.trajectory import Trajectory, rows_of_batches, separate_steps, trajectory_distance
from ddkit_methods.unrolled import Unrolled
from torch import Tensor, nn
from torch.autograd import gradcheck

import ddkit
from ddkit.engine.labels import _experts
from ddkit.nn import unrolled_sgd
from ddkit.nn.networks import build_network, load_weights
from ddkit.testing.world import Setting, World

F64 = torch.float64
IMAGES, CLASSES, RATE = (5, 1, 2, 3), 3, 0.7
ROWS = ([0, 3], [1, 4], [2, 0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def slope(images: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient of the mean cross-entropy of a linear network by its weight (K, d), written out."""
    x = images.flatten(1)
    return ((x @ weight.T).softmax(1) * targets.sum(1, keepdim=True) - targets).T @ x / len(x)


def written_out(images: Tensor, targets: Tensor, rate: Tensor, held: list[Tensor] | None = None) -> Tensor:
    """Returns the distance after the steps of ROWS; `held` are weights that the slopes are taken at, in the place of the way's own."""
    start, end = normal(CLASSES, 6, seed=2), normal(CLASSES, 6, seed=3)
    weight = start
    for number, rows in enumerate(ROWS):
        weight = weight - rate * slope(images[rows], targets[rows], weight if held is None else held[number])
    return (weight - end).square().sum() / (start - end).square().sum()


def found(images: Tensor, targets: Tensor, rate: Tensor, how: Callable[..., dict[str, Tensor]]) -> Tensor:
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES, bias=False)).double()
    start, end = {"1.weight": normal(CLASSES, 6, seed=2)}, {"1.weight": normal(CLASSES, 6, seed=3)}
    return trajectory_distance(how(network, start, [(images[rows], targets[rows]) for rows in ROWS], rate), start, end)


WAYS = {
    "whole": unrolled_sgd,
    "again": lambda *given: unrolled_sgd(*given, constant_memory=True),
    "separate": separate_steps,
}


@pytest.mark.parametrize("graph", WAYS)
def test_the_distance_and_its_gradients_are_those_of_steps_that_are_written_out(graph: str) -> None:
    images, targets, rate = (
        normal(*IMAGES).requires_grad_(),
        normal(5, CLASSES, seed=1).softmax(1).requires_grad_(),
        torch.tensor(RATE, dtype=F64),
    )
    rate.requires_grad_()
    weights = [normal(CLASSES, 6, seed=2)]
    for rows in ROWS:
        weights.append((weights[-1] - RATE * slope(images[rows], targets[rows], weights[-1])).detach())
    value = found(images, targets, rate, WAYS[graph])
    wanted = written_out(images, targets, rate, weights if graph == "separate" else None)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(each, (images, targets, rate)) for each in (value, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    if graph == "separate":  # which is another gradient of the same value
        whole = torch.autograd.grad(found(images, targets, rate, unrolled_sgd), images)[0]
        assert float((torch.autograd.grad(found(images, targets, rate, separate_steps), images)[0] - whole).norm() / whole.norm()) > 0.01
    else:
        assert gradcheck(lambda *given: found(*given, WAYS[graph]), (images, targets, rate))


def test_batches_are_passes_in_random_order() -> None:
    rows = list(rows_of_batches(5, 2, 7, torch.Generator().manual_seed(0)))
    assert [len(each) for each in rows] == [2, 2, 1, 2, 2, 1, 2]
    passes = [torch.cat(rows[:3]).tolist(), torch.cat(rows[3:6]).tolist()]
    assert [sorted(each) for each in passes] == [[0, 1, 2, 3, 4]] * 2
    assert passes[0] != passes[1]


def test_the_epochs_to_start_from_become_more_as_the_run_goes_on() -> None:
    loss = Trajectory(last=9, last_at_first=3, widening=4)
    assert [loss.last_at(index) for index in range(7)] == [3, 4, 6, 7, 9, 9, 9]
    assert [Trajectory(last=9).last_at(index) for index in (0, 100)] == [9, 9]
    assert Trajectory().last_at(0) is None


def test_each_step_of_training_has_an_augmentation_of_its_own_and_one_that_is_too_far_off_teaches_nothing() -> None:
    world = World(Trajectory(steps=3, batch=4), Setting(dtype=F64))
    step = world.step()
    ones = torch.ones_like(step.images).cumsum(-1)
    assert torch.equal(step.augment(ones), step.augment(ones, draw=0))
    assert not torch.equal(step.augment(ones), step.augment(ones, draw=1))
    assert torch.equal(step.augment(ones, draw=1), world.step().augment(ones, draw=1))
    value = world.loss(step)
    world.loss.most = float(value.detach()) / 2
    capped = world.loss(world.step())
    assert float(capped.detach()) == world.loss.most
    assert not torch.autograd.grad(capped, world.bank.images)[0].any()
    assert torch.autograd.grad(value, world.bank.images)[0].any()


def test_labels_begin_as_the_mean_logits_of_the_experts_that_are_right_and_else_as_the_class() -> None:
    world = World(Trajectory(), Setting(rows=(4, 4, 4)))
    source, images, classes = world.source, world.bank.images.detach(), torch.eye(3)[world.bank.labels]
    source.networks.experts.count = 2  # of 20 one would always be right
    network = build_network(source.networks.model, world.info, 0, "any").eval()
    logits = []
    for expert in range(source.networks.experts.count):
        load_weights(network, source.networks.experts.weights(expert, 10))
        with torch.no_grad():
            logits.append(network(images))
    kinds = set()
    for row, label in enumerate(world.bank.labels.tolist()):
        right = [each[row] for each in logits if int(each[row].argmax()) == label]
        kinds.add(bool(right))
        wanted = torch.stack(right).mean(0).softmax(0) if right else classes[row]
        torch.testing.assert_close(_experts(source, images, classes)[row], wanted)
    assert kinds == {True, False}, "some have no expert that is right"


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"losses.trajectory.last": 10, "experts.epochs": 10}, "with a saved epoch 2 epochs later"),
        ({"losses.trajectory.last": 20, "experts.epochs": 10}, "experts.epochs=22"),
        ({"network.norm": "batch"}, "network.norm=instance"),
        ({"losses.trajectory.widening": 5}, "last_at_first"),
    ],
)
def test_what_cannot_be_matched_is_refused_before_experts_are_trained(
    sets: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddkit.nn.expert_training.train_experts", lambda *given: pytest.fail("experts are trained"))
    first = {"losses.trajectory.first": 9} if "losses.trajectory.last" in sets else {}
    with pytest.raises(ddkit.InputError, match=said):
        ddkit.distill(losses="trajectory", pipc=3, steps=2, evaluators="none", sets=first | sets, out=tmp_path / "run", device="cpu")


@pytest.mark.parametrize("graph", ["whole", "again"])
def test_unrolled_is_the_cross_entropy_after_steps_that_are_written_out(graph: str) -> None:
    images, targets = normal(*IMAGES).requires_grad_(), torch.eye(CLASSES, dtype=F64)[[0, 0, 1, 1, 2]]
    real, labels = normal(4, 1, 2, 3, seed=4), torch.tensor([0, 1, 2, 2])
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES, bias=False)).double()
    slices = {0: slice(0, 2), 1: slice(2, 4), 2: slice(4, 5)}

    def value(images: Tensor, rate: Tensor) -> Tensor:
        return Unrolled(epochs=2, graph=graph)(
            SimpleNamespace(
                augmented=images, targets=targets, network=network, class_slices=slices, parameters={"step_size": rate},
                real=SimpleNamespace(augmented=real, labels=labels),
            )
        )  # fmt: skip

    rate = torch.tensor(RATE, dtype=F64, requires_grad=True)
    weight = network[1].weight.detach()
    for rows in ([0, 2, 4], [1, 3]) * 2:
        weight = weight - RATE * slope(images[rows], targets[rows], weight)
    wanted = -(real.flatten(1) @ weight.T).log_softmax(1)[range(4), labels.tolist()].mean()
    torch.testing.assert_close(value(images, rate), wanted, rtol=1e-12, atol=0)
    assert gradcheck(value, (images, rate))
