"""The mathematics of the losses, in float64, against slow versions that are obviously right.

Gradients of whole losses are compared with finite differences by the conformance suite; here those of options that it does not try.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from ddkit_dkkt.invariance import group_cosine, module_groups
from ddkit_dkkt.primal import primal_loss
from ddkit_dkkt.stationarity import least_squares_scale, margins, negative_gradient, selected_parameters, stationarity_distances
from ddkit_dm import dm_loss
from ddkit_gm import EPSILON, gradient_distance
from ddkit_priors import total_variation
from ddkit_regression import centred, ridge_prediction
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional

import ddkit
from ddkit.testing.world import Setting, World

F64 = torch.float64
SHAPES = ((3, 2, 3, 3), (3,), (4, 5), (4,), ())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gradients(seed: int = 0) -> list[Tensor]:
    """Returns tensors of the shapes that the parameters of a network have."""
    return [normal(*shape, seed=seed + number) for number, shape in enumerate(SHAPES)]


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected, dtype=F64), rtol=tolerance, atol=tolerance)


def cosine(a: Tensor, b: Tensor, epsilon: float = 0.0) -> float:
    """Returns the cosine of two tensors, taken as vectors."""
    pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    return sum(x * y for x, y in pairs) / (math.hypot(*(x for x, _ in pairs)) * math.hypot(*(y for _, y in pairs)) + epsilon)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


ALIKE, TWICE = normal(6, 50).float(), torch.tensor([0, 0, 0, 1, 1, 1])
AT_REST: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "dm of equal features": (lambda x: dm_loss(ALIKE, TWICE, x, TWICE, 2), ALIKE),
    "dm of a class without real images": (lambda x: dm_loss(normal(3, 4), TWICE[:3], x, TWICE[4:], 2), normal(2, 4)),
    "total variation of a flat image": (total_variation, torch.full((2, 1, 3, 3), 0.7, dtype=F64)),
}


@pytest.mark.parametrize(("function", "x"), AT_REST.values(), ids=AT_REST)
def test_value_and_gradient_are_exactly_zero_where_nothing_is_to_do(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    value = function(x)
    assert float(value.detach()) == 0
    assert not torch.autograd.grad(value, x)[0].any()


# Distribution matching


def slow_dm(real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor, classes: int) -> float:
    total = 0.0
    for label in range(classes):
        theirs, ours = real[real_labels == label], synthetic[labels == label]
        if len(theirs) and len(ours):
            total += float((theirs.sum(0) / len(theirs) - ours.sum(0) / len(ours)).square().sum())
    return total


@pytest.mark.parametrize(
    ("real_labels", "labels"),
    [
        ([0, 0, 1, 1, 2, 2], [0, 1, 2]),
        ([0, 0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 2, 2]),
        ([0, 0, 2, 2, 2], [0, 0, 1, 2]),
        ([0, 1, 1, 2], [1, 1, 2]),
        ([2, 0, 1, 0], [1, 2, 0, 0, 2]),
    ],
    ids=["balanced", "imbalanced", "no real image of class 1", "no synthetic image of class 0", "in any order"],
)
def test_dm_sums_squared_gaps_of_class_means_over_classes_and_features(real_labels: list[int], labels: list[int]) -> None:
    real, synthetic = normal(len(real_labels), 5), normal(len(labels), 5, seed=1)
    both = (real, torch.tensor(real_labels), synthetic, torch.tensor(labels), 3)
    close(dm_loss(*both), slow_dm(*both))
    assert slow_dm(*both) > 0


# Primal feasibility


@pytest.mark.parametrize("masked", [True, False])
def test_primal_is_the_cross_entropy_over_all_rows_of_all_or_of_misclassified_ones(masked: bool) -> None:
    logits, labels = normal(8, 3).requires_grad_(), [0, 1, 2, 0, 1, 2, 0, 1]
    total, counted = 0.0, []
    for row, label in zip(logits.tolist(), labels, strict=True):
        counted.append(not masked or row.index(max(row)) != label)
        if counted[-1]:
            total += math.log(sum(math.exp(value) for value in row)) - row[label]
    value = primal_loss(logits, torch.tensor(labels), masked=masked)
    close(value.detach(), total / 8)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.any(1).tolist() == counted
    assert set(counted) == ({True, False} if masked else {True})


# Stationarity


def test_negative_gradient_is_the_weighted_sum_of_gradients_taken_one_image_at_a_time() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 2 * 2, 3)).double()
    images, labels, multipliers = normal(4, 1, 4, 4), torch.tensor([0, 1, 1, 2]), torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=F64)
    parameters = list(network.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for image, label, multiplier in zip(images, labels, multipliers, strict=True):
        network.zero_grad()
        (-functional.log_softmax(network(image[None])[0], 0)[label]).backward()
        for total, parameter in zip(sums, parameters, strict=True):
            assert parameter.grad is not None
            total -= float(multiplier) * parameter.grad
    for actual, expected in zip(negative_gradient(network(images), labels, multipliers, parameters), sums, strict=True):
        close(actual, expected)
        assert actual.requires_grad


def test_a_margin_is_the_logit_over_the_largest_other_one_and_its_negative_gradient_is_that_of_loops_and_finite_differences() -> None:
    logits, labels, multipliers = normal(4, 3), torch.tensor([0, 1, 2, 2]), torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=F64)
    wanted = [row[label] - max(row[:label] + row[label + 1 :]) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert margins(logits, labels).tolist() == wanted
    x, weight = normal(4, 5).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    sums = torch.zeros_like(weight)
    for image, label, multiplier in zip(x.detach(), labels.tolist(), multipliers.tolist(), strict=True):
        scores = (image @ weight.detach()).tolist()
        other = max((score, k) for k, score in enumerate(scores) if k != label)[1]
        sums[:, label] += multiplier * image
        sums[:, other] -= multiplier * image
    close(negative_gradient(x @ weight, labels, multipliers, [weight], "margin")[0].detach(), sums)
    network = lambda images: (images @ weight).tanh() @ weight.T @ weight  # noqa: E731
    assert gradcheck(lambda images: negative_gradient(network(images), labels, multipliers, [weight], "margin")[0], (x,))


def test_margins_of_a_teacher_with_norm_layers_are_refused_before_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddkit.run.setup.automatic_teacher", lambda *given, **more: pytest.fail("a teacher was trained"))
    for norm in ("batch", "instance", "layer"):
        sets = {"teacher.model": "convnet", "teacher.norm": norm}
        with pytest.raises(ddkit.InputError, match="norm layers"):
            ddkit.distill("kkt-reconstruction", steps=1, evaluators="none", sets=sets, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def slow_distance(pairs: Sequence[tuple[Tensor, Tensor]], distance: str, *, average: bool) -> float:
    if distance == "layer-cosine":
        return sum(1 - cosine(*pair) for pair in pairs) / len(pairs)
    theta, g = (joined(side) for side in zip(*pairs, strict=True))
    if distance == "cosine":
        return 1 - cosine(theta, g)
    total = sum(abs(a - b) ** (1 if distance == "l1" else 2) for a, b in zip(theta.tolist(), g.tolist(), strict=True))
    return float(total / len(theta) if average else total)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("distance", ["l1", "l2", "cosine", "layer-cosine"])
def test_stationarity_distance_agrees_with_loops_and_finite_differences_and_is_zero_at_the_negative_gradient(
    distance: str, average: bool
) -> None:
    theta, g = gradients(), gradients(10)

    def value(*g: Tensor) -> Tensor:
        return stationarity_distances(list(zip(theta, g, strict=True)), distance, average=average)[0]

    close(value(*g), slow_distance(list(zip(theta, g, strict=True)), distance, average=average), 1e-11)
    close(value(*theta), 0.0)
    alone = stationarity_distances(list(zip(theta, g, strict=True)), distance, average=average)[1]
    for one, pair in zip(alone, zip(theta, g, strict=True), strict=True):
        close(one, slow_distance([pair], distance, average=average), 1e-11)
    assert gradcheck(value, [each.requires_grad_() for each in g])


@pytest.mark.parametrize("distance", ["cosine", "layer-cosine"])
def test_cosine_distances_ignore_the_scale_of_the_gradient_and_are_two_for_the_opposite(distance: str) -> None:
    theta, g = normal(5, 5), normal(5, 5, seed=1)
    close(stationarity_distances([(theta, 7 * g)], distance)[0], stationarity_distances([(theta, g)], distance)[0])
    close(stationarity_distances([(theta, -3 * theta)], distance)[0], 2.0)


@pytest.mark.parametrize(("distance", "of_two_channels"), [("cosine", 1.0), ("layer-cosine", 2.0)])
def test_cosine_to_a_zero_gradient_has_a_finite_gradient(distance: str, of_two_channels: float) -> None:
    other, g = normal(2, 3), torch.zeros(2, 3, dtype=F64, requires_grad=True)
    stationarity, matching = stationarity_distances([(other, g)], distance)[0], gradient_distance([other], [g], distance)
    close(stationarity.detach(), 1.0)
    close(matching.detach(), of_two_channels)
    assert torch.autograd.grad(stationarity + matching, g)[0].isfinite().all()


def test_least_squares_scale_leaves_a_remainder_orthogonal_to_the_gradient() -> None:
    pairs = list(zip(gradients(), gradients(10), strict=True))
    scale = least_squares_scale(pairs)
    assert abs(sum(float(((t - scale * g) * g).sum()) for t, g in pairs)) < 1e-12
    others = [slow_distance([(t, other * g) for t, g in pairs], "l2", average=False) for other in (scale, scale - 0.01, scale + 0.01)]
    assert min(others) == others[0]
    theta = normal(3, 3)
    assert least_squares_scale([(2.5 * theta, theta)]) == pytest.approx(2.5, rel=1e-14)
    assert math.isnan(least_squares_scale([(theta, torch.zeros_like(theta))]))


@pytest.mark.parametrize("constraint", ["project", "softplus"])
def test_the_first_multiplier_is_that_of_the_option_whatever_keeps_it_from_falling_below_0(constraint: str) -> None:
    world = World(ddkit.create("loss", "dkkt-stationarity", {"init": 2.5, "constraint": constraint}), Setting())
    assert float(world.engine().evaluate(0).logged["checked"]["multiplier mean"]) == pytest.approx(2.5)


NAMED = nn.ModuleDict(
    {"features": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "hidden": nn.Linear(2, 4), "classifier": nn.Linear(4, 3)}
)
NAMES = [name for name, _ in NAMED.named_parameters()]


@pytest.mark.parametrize(
    ("module", "which", "expected"),
    [
        (NAMED, "all", NAMES),
        (NAMED, "weights", ["features.0.weight", "hidden.weight", "classifier.weight"]),
        (NAMED, "classifier", ["classifier.weight", "classifier.bias"]),
        (NAMED, "*.bias", ["features.0.bias", "features.1.bias", "hidden.bias", "classifier.bias"]),
        (NAMED, "features.?.weight", ["features.0.weight", "features.1.weight"]),
        (NAMED, "Classifier*", []),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "classifier", []),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm([2, 6, 6])), "weights", ["0.weight"]),
    ],
)
def test_selected_parameters(module: nn.Module, which: str, expected: list[str]) -> None:
    assert selected_parameters(module, [name for name, _ in module.named_parameters()], which) == expected


def test_a_layers_weight_and_bias_are_one_group_with_one_cosine() -> None:
    assert module_groups(["scale", "a.weight", "a.bias", "b.c.w"]) == {"": ["scale"], "a": ["a.weight", "a.bias"], "b.c": ["b.c.w"]}
    theta, gradient = {"w": normal(2, 2), "b": normal(2, seed=1)}, {"w": normal(2, 2, seed=2), "b": normal(2, seed=3)}
    expected = abs(cosine(joined(list(theta.values())), joined(list(gradient.values()))))
    assert group_cosine(theta, gradient, ["w", "b"]) == pytest.approx(expected, rel=1e-12)
    assert group_cosine(theta, {"w": torch.zeros(2, 2, dtype=F64)}, ["w"]) == 0


# Gradient matching


def slow_gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor], distance: str) -> float:
    if distance == "layer-cosine":  # of each output channel, without biases
        layers = [(a, b) for a, b in zip(real, synthetic, strict=True) if a.ndim >= 2]
        return sum(1 - cosine(x, y, EPSILON) for a, b in layers for x, y in zip(a, b, strict=True))
    a, b = joined(real), joined(synthetic)
    return float((a - b).square().sum()) if distance == "mse" else 1 - cosine(a, b, EPSILON)


@pytest.mark.parametrize("distance", ["layer-cosine", "mse", "cosine"])
def test_gradient_distance_agrees_with_loops_and_finite_differences(distance: str) -> None:
    real, synthetic = gradients(), [g.requires_grad_() for g in gradients(10)]
    value = gradient_distance(real, synthetic, distance)
    close(value.detach(), slow_gradient_distance(real, [g.detach() for g in synthetic], distance))
    assert gradcheck(lambda *found: gradient_distance(real, found, distance), synthetic)


def test_gradient_matching_takes_the_network_in_evaluation_mode_and_leaves_its_mode_and_running_statistics() -> None:
    loss = ddkit.create("loss", "gm")
    world = World(loss, Setting())
    world.source.model = ddkit.create("model", "convnet", {"width": 4, "norm": "batch"}, data=world.info)
    step, modes = world.step(), list[bool]()
    step.network.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    before = {name: value.clone() for name, value in step.network.state_dict().items()}
    loss(step)
    assert set(modes) == {False}
    assert step.network.training
    assert all(torch.equal(value, before[name]) for name, value in step.network.state_dict().items())


# Priors


def slow_total_variation(images: Tensor, power: float) -> float:
    across, down = list[float](), list[float]()
    for n, c, y, x in itertools.product(*map(range, images.shape)):
        if x > 0:
            across.append(abs(float(images[n, c, y, x] - images[n, c, y, x - 1])) ** power)
        if y > 0:
            down.append(abs(float(images[n, c, y, x] - images[n, c, y - 1, x])) ** power)
    return sum(sum(part) / len(part) for part in (across, down) if part)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [(4, 3), (1, 5), (5, 1), (1, 1)], ids=str)
def test_total_variation_agrees_with_a_loop_over_pixels_and_finite_differences(size: tuple[int, int], power: float) -> None:
    images = normal(2, 3, *size)
    close(total_variation(images, power), slow_total_variation(images, power))
    assert gradcheck(lambda x: total_variation(x, power), images.requires_grad_())


# Feature regression


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_ridge_prediction_is_that_of_the_normal_equations_whatever_the_scale_of_the_features(shape: tuple[int, int], ridge: float) -> None:
    features, targets, queries = normal(*shape), normal(shape[0], 2, seed=1), normal(6, shape[1], seed=2)
    found = ridge_prediction(features, targets, queries, ridge)
    penalty = ridge * float(features.square().sum()) / len(features)
    matrix = features.T @ features + penalty * torch.eye(shape[1], dtype=F64)  # of min ||features w - targets||^2 + penalty ||w||^2
    close(found, queries @ torch.linalg.inv(matrix) @ features.T @ targets, 1e-9)
    close(ridge_prediction(7 * features, targets, 7 * queries, ridge), found)
    assert not torch.allclose(ridge_prediction(features, targets, 7 * queries, ridge), found)


def test_centred_labels_sum_to_zero() -> None:
    assert centred(torch.tensor([1, 0]), 4).tolist() == [[-0.25, 0.75, -0.25, -0.25], [0.75, -0.25, -0.25, -0.25]]
