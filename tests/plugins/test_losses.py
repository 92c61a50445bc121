"""The mathematics of the losses, in float64, against slow versions that are obviously right."""

from __future__ import annotations

import doctest
import importlib
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from ddkit_dkkt.invariance import group_cosine, module_groups
from ddkit_dkkt.primal import primal_loss
from ddkit_dkkt.stationarity import least_squares_scale, negative_gradient, selected_parameters, stationarity_distance
from ddkit_dm import class_sums, dm_loss
from ddkit_gm import EPSILON, gradient_distance, layer_distance
from ddkit_priors import total_variation
from ddkit_regression import centred, ridge_prediction
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

F64 = torch.float64
MODULES = (
    "ddkit_dm", "ddkit_dkkt.primal", "ddkit_dkkt.stationarity", "ddkit_dkkt.invariance", "ddkit_gm", "ddkit_priors", "ddkit_regression",
)  # fmt: skip
WITH_EXAMPLES = ("ddkit_dm", "ddkit_dkkt.primal", "ddkit_priors", "ddkit_regression")
DISTANCES = ("l1", "l2", "cosine", "layer-cosine")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected, dtype=F64), rtol=tolerance, atol=tolerance)


def numerical_gradient(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Returns central differences of a scalar function, one element at a time."""
    gradient = torch.zeros_like(x)
    for place in range(x.numel()):
        values = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved.view(-1)[place] += sign * step
            values.append(float(function(moved)))
        gradient.view(-1)[place] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES


# Distribution matching


def slow_dm(real: Tensor, real_labels: Sequence[int], synthetic: Tensor, labels: Sequence[int], classes: int) -> float:
    total = 0.0
    for label in range(classes):
        theirs = [real[row].tolist() for row, found in enumerate(real_labels) if found == label]
        ours = [synthetic[row].tolist() for row, found in enumerate(labels) if found == label]
        if not theirs or not ours:
            continue
        for feature in range(real.shape[1]):
            gap = sum(row[feature] for row in theirs) / len(theirs) - sum(row[feature] for row in ours) / len(ours)
            total += gap * gap
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
    value = dm_loss(real, torch.tensor(real_labels), synthetic, torch.tensor(labels), 3)
    close(value, slow_dm(real, real_labels, synthetic, labels, 3))
    assert float(value) > 0


def test_dm_gradient_agrees_with_finite_differences() -> None:
    real, real_labels, labels = normal(7, 4), torch.tensor([0, 0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2])
    synthetic = normal(5, 4, seed=1).requires_grad_()
    assert gradcheck(lambda x: dm_loss(real, real_labels, x, labels, 3), synthetic)


def test_dm_of_a_class_missing_on_one_side_has_no_value_and_no_gradient() -> None:
    synthetic = normal(2, 4).requires_grad_()
    value = dm_loss(normal(3, 4), torch.tensor([0, 0, 0]), synthetic, torch.tensor([1, 1]), 2)
    (gradient,) = torch.autograd.grad(value, synthetic)
    assert float(value.detach()) == 0
    assert not gradient.any()


def test_dm_of_equal_features_is_exactly_zero_with_an_exactly_zero_gradient() -> None:
    features, labels = normal(6, 50).float(), torch.tensor([0, 0, 0, 1, 1, 1])
    synthetic = features.clone().requires_grad_()
    value = dm_loss(features, labels, synthetic, labels, 2)
    (gradient,) = torch.autograd.grad(value, synthetic)
    assert float(value.detach()) == 0
    assert not gradient.any()


def test_class_sums_count_rows_of_each_class() -> None:
    sums, counts = class_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2]), 3)
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8]]
    assert counts.tolist() == [1, 0, 2]


# Primal feasibility


def slow_primal(logits: Tensor, labels: Sequence[int], *, masked: bool) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        if masked and row.index(max(row)) == label:
            continue
        total += math.log(sum(math.exp(value) for value in row)) - row[label]
    return total / len(labels)


@pytest.mark.parametrize("masked", [True, False])
def test_primal_is_the_mean_cross_entropy_of_all_or_of_misclassified_rows(masked: bool) -> None:
    logits, labels = normal(8, 3), [0, 1, 2, 0, 1, 2, 0, 1]
    right = [int(row.argmax()) == label for row, label in zip(logits, labels, strict=True)]
    assert any(right)
    assert not all(right)
    close(primal_loss(logits, torch.tensor(labels), masked=masked), slow_primal(logits, labels, masked=masked))


@pytest.mark.parametrize("masked", [True, False])
def test_primal_gradient_agrees_with_finite_differences(masked: bool) -> None:
    logits, labels = normal(6, 3).requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 2])
    assert gradcheck(lambda x: primal_loss(x, labels, masked=masked), logits)


def test_masked_primal_leaves_rows_that_are_right_without_gradient_and_divides_by_all_rows() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]], dtype=F64, requires_grad=True)
    value = primal_loss(logits, torch.tensor([0, 1]), masked=True)
    (gradient,) = torch.autograd.grad(value, logits)
    close(value, (math.log(math.exp(3) + 1) - 0) / 2)
    assert not gradient[0].any()
    assert gradient[1].all()


# Stationarity


class Tiny(nn.Module):
    """A convolution and a linear layer with a smooth activation: every gradient is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.classifier = nn.Linear(2 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.convolution(x).tanh().flatten(1))
        return result


@pytest.fixture
def tiny() -> Tiny:
    network = Tiny().double()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=number))
    return network


LABELS = torch.tensor([0, 1, 1, 2])


def tiny_batch() -> tuple[Tensor, Tensor]:
    """Returns images (4, 1, 4, 4) and multipliers (4,)."""
    return normal(4, 1, 4, 4, seed=9), torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=F64)


def slow_negative_gradient(network: nn.Module, images: Tensor, labels: Tensor, multipliers: Tensor) -> list[Tensor]:
    """Sums the gradients of one image after the other, by an ordinary backward pass."""
    sums = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for image, label, multiplier in zip(images, labels, multipliers, strict=True):
        network.zero_grad()
        (-functional.log_softmax(network(image[None])[0], 0)[label]).backward()
        for total, parameter in zip(sums, network.parameters(), strict=True):
            assert parameter.grad is not None
            total -= float(multiplier) * parameter.grad
    return sums


def test_negative_gradient_is_the_weighted_sum_of_gradients_taken_one_image_at_a_time(tiny: Tiny) -> None:
    images, multipliers = tiny_batch()
    found = negative_gradient(tiny(images), LABELS, multipliers, list(tiny.parameters()))
    for actual, expected in zip(found, slow_negative_gradient(tiny, images, LABELS, multipliers), strict=True):
        close(actual, expected)
        assert actual.requires_grad


def slow_distance(pairs: Sequence[tuple[Tensor, Tensor]], distance: str, *, average: bool) -> float:
    flat = [(theta.flatten().tolist(), g.flatten().tolist()) for theta, g in pairs]
    if distance == "layer-cosine":
        return sum(slow_distance([pair], "cosine", average=average) for pair in pairs) / len(pairs)
    both = [(a, b) for theta, g in flat for a, b in zip(theta, g, strict=True)]
    if distance == "cosine":
        norms = [math.sqrt(sum(pair[side] ** 2 for pair in both)) for side in (0, 1)]
        return 1 - sum(a * b for a, b in both) / (norms[0] * norms[1])
    total = sum(abs(a - b) if distance == "l1" else (a - b) ** 2 for a, b in both)
    return total / len(both) if average else total


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("distance", DISTANCES)
def test_stationarity_distance_agrees_with_loops_over_scalars(distance: str, average: bool) -> None:
    pairs = [(normal(2, 3), normal(2, 3, seed=1)), (normal(4, seed=2), normal(4, seed=3)), (normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=5))]
    value = stationarity_distance(pairs, distance, average=average)
    close(value, slow_distance(pairs, distance, average=average), 1e-11)


@pytest.mark.parametrize("distance", DISTANCES)
def test_stationarity_distance_is_zero_exactly_where_the_parameters_are_the_negative_gradient(distance: str) -> None:
    theta = [normal(2, 3), normal(4, seed=2)]
    close(stationarity_distance([(t, t.clone()) for t in theta], distance), 0.0)
    assert float(stationarity_distance([(t, t.flip(0)) for t in theta], distance)) > 0.1


@pytest.mark.parametrize("distance", ["cosine", "layer-cosine"])
def test_cosine_distances_ignore_the_scale_of_the_gradient_and_are_two_for_the_opposite(distance: str) -> None:
    theta, g = normal(5, 5), normal(5, 5, seed=1)
    close(stationarity_distance([(theta, 7 * g)], distance), stationarity_distance([(theta, g)], distance))
    close(stationarity_distance([(theta, -3 * theta)], distance), 2.0)


@pytest.mark.parametrize("distance", ["cosine", "layer-cosine"])
def test_cosine_distance_to_a_zero_gradient_is_one_with_a_finite_gradient(distance: str) -> None:
    g = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    value = stationarity_distance([(normal(2, 3), g)], distance)
    (gradient,) = torch.autograd.grad(value, g)
    close(value, 1.0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_stationarity_gradient_through_the_teachers_gradient_agrees_with_finite_differences(tiny: Tiny, distance: str) -> None:
    images, multipliers = tiny_batch()
    parameters = list(tiny.parameters())

    def value(x: Tensor, weights: Tensor) -> Tensor:
        found = negative_gradient(tiny(x), LABELS, weights, parameters)
        return stationarity_distance([(p.detach(), g) for p, g in zip(parameters, found, strict=True)], distance)

    assert gradcheck(value, (images.requires_grad_(), (multipliers + 0.5).requires_grad_()))


def test_stationarity_value_from_per_sample_gradients_has_the_image_gradient_that_autograd_reports(tiny: Tiny) -> None:
    images, multipliers = tiny_batch()
    parameters = list(tiny.parameters())

    def slow(x: Tensor) -> Tensor:
        found = slow_negative_gradient(tiny, x, LABELS, multipliers)
        return torch.tensor(slow_distance([(p.detach(), g) for p, g in zip(parameters, found, strict=True)], "l2", average=True), dtype=F64)

    expected = numerical_gradient(slow, images)
    found = negative_gradient(tiny(images.requires_grad_()), LABELS, multipliers, parameters)
    value = stationarity_distance([(p.detach(), g) for p, g in zip(parameters, found, strict=True)], "l2")
    (actual,) = torch.autograd.grad(value, images)
    close(actual, expected, 1e-7)
    assert expected.abs().max() > 1e-3
    assert not actual[2].any(), "the image whose multiplier is 0 takes no part"


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_negative_gradient_can_be_differentiated_twice(tiny: Tiny, distance: str) -> None:
    weights = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    images = normal(2, 1, 4, 4, seed=9)
    parameters = [tiny.classifier.bias]

    def value(w: Tensor) -> Tensor:
        found = negative_gradient(tiny(images), LABELS[:2], w, parameters)
        return stationarity_distance([(parameters[0].detach(), found[0])], distance)

    assert gradgradcheck(value, weights)


def test_least_squares_scale_is_the_minimum_over_a_fine_grid_of_scales() -> None:
    pairs = [(normal(2, 3), normal(2, 3, seed=4)), (normal(4, seed=2), normal(4, seed=3))]
    scale = least_squares_scale(pairs)
    distances = {
        s: slow_distance([(t, s * g) for t, g in pairs], "l2", average=False) for s in [scale, *torch.linspace(-3, 3, 601).tolist()]
    }
    assert min(distances, key=lambda s: distances[s]) == scale
    residual = sum(float(((t - scale * g) * g).sum()) for t, g in pairs)
    assert abs(residual) < 1e-12, "the remainder is orthogonal to g"


def test_least_squares_scale_of_a_multiple_is_that_multiple_and_of_a_zero_gradient_is_nan() -> None:
    g = normal(3, 3)
    assert least_squares_scale([(2.5 * g, g)]) == pytest.approx(2.5, rel=1e-14)
    assert math.isnan(least_squares_scale([(g, torch.zeros_like(g))]))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.hidden = nn.Linear(2, 4)
        self.classifier = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", ["features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias", "hidden.weight", "hidden.bias",
                 "classifier.weight", "classifier.bias"]),
        ("weights", ["features.0.weight", "hidden.weight", "classifier.weight"]),
        ("classifier", ["classifier.weight", "classifier.bias"]),
        ("*.bias", ["features.0.bias", "features.1.bias", "hidden.bias", "classifier.bias"]),
        ("features.?.weight", ["features.0.weight", "features.1.weight"]),
        ("Classifier*", []),
    ],
)  # fmt: skip
def test_selected_parameters(which: str, expected: list[str]) -> None:
    module = Named()
    assert selected_parameters(module, [name for name, _ in module.named_parameters()], which) == expected


def test_the_classifier_of_a_network_without_a_linear_layer_is_empty() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert selected_parameters(module, ["0.weight", "0.bias"], "classifier") == []


def test_a_layers_weight_and_bias_are_one_group() -> None:
    assert module_groups(["scale", "a.weight", "a.bias", "b.c.weight"]) == {
        "": ["scale"],
        "a": ["a.weight", "a.bias"],
        "b.c": ["b.c.weight"],
    }


def test_group_cosine_is_that_of_the_concatenated_vectors() -> None:
    theta, gradient = {"w": normal(2, 2), "b": normal(2, seed=1)}, {"w": normal(2, 2, seed=2), "b": normal(2, seed=3)}
    a, b = ([*side["w"].flatten().tolist(), *side["b"].tolist()] for side in (theta, gradient))
    expected = abs(sum(x * y for x, y in zip(a, b, strict=True))) / math.hypot(*a) / math.hypot(*b)
    assert group_cosine(theta, gradient, ["w", "b"]) == pytest.approx(expected, rel=1e-12)
    assert group_cosine(theta, {"w": torch.zeros(2, 2, dtype=F64)}, ["w"]) == 0


# Gradient matching


def slow_layer(real: Tensor, synthetic: Tensor) -> float:
    if real.ndim < 2:
        return 0.0
    total = 0.0
    for a, b in zip(real, synthetic, strict=True):
        a_, b_ = a.flatten().tolist(), b.flatten().tolist()
        total += 1 - sum(x * y for x, y in zip(a_, b_, strict=True)) / (math.hypot(*a_) * math.hypot(*b_) + EPSILON)
    return total


def slow_gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor], distance: str) -> float:
    if distance == "layer-cosine":
        return sum(slow_layer(a, b) for a, b in zip(real, synthetic, strict=True))
    a, b = ([x for g in side for x in g.flatten().tolist()] for side in (real, synthetic))
    if distance == "mse":
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b) + EPSILON)


SHAPES = ((3, 2, 3, 3), (3,), (4, 5), (4,), ())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_distance_agrees_with_a_loop_over_output_channels_and_leaves_out_biases(shape: tuple[int, ...]) -> None:
    real, synthetic = normal(*shape), normal(*shape, seed=1)
    close(layer_distance(real, synthetic), slow_layer(real, synthetic))
    assert (float(layer_distance(real, synthetic)) != 0) == (len(shape) >= 2)


@pytest.mark.parametrize("distance", ["layer-cosine", "mse", "cosine"])
def test_gradient_distance_agrees_with_loops_and_finite_differences(distance: str) -> None:
    real = [normal(*shape, seed=number) for number, shape in enumerate(SHAPES)]
    synthetic = [normal(*shape, seed=10 + number).requires_grad_() for number, shape in enumerate(SHAPES)]
    value = gradient_distance(real, synthetic, distance)
    close(value, slow_gradient_distance(real, synthetic, distance))
    assert gradcheck(lambda *found: gradient_distance(real, found, distance), synthetic)


@pytest.mark.parametrize("distance", ["layer-cosine", "cosine"])
def test_gradient_distance_of_a_dead_channel_has_a_finite_gradient(distance: str) -> None:
    real = [normal(2, 3)]
    synthetic = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    value = gradient_distance(real, [synthetic], distance)
    (gradient,) = torch.autograd.grad(value, synthetic)
    close(value, 2.0 if distance == "layer-cosine" else 1.0)
    assert gradient.isfinite().all()


def test_gradient_distance_differentiates_through_a_networks_gradient(tiny: Tiny) -> None:
    parameters = list(tiny.parameters())
    real = [g.detach() for g in torch.autograd.grad(functional.cross_entropy(tiny(normal(3, 1, 4, 4)), LABELS[:3]), parameters)]

    def value(x: Tensor) -> Tensor:
        loss = functional.cross_entropy(tiny(x), LABELS[:2])
        return gradient_distance(real, torch.autograd.grad(loss, parameters, create_graph=True), "layer-cosine")

    assert gradcheck(value, normal(2, 1, 4, 4, seed=3).requires_grad_())


# Priors


def slow_total_variation(images: Tensor, power: float) -> float:
    count, channels, height, width = images.shape
    across, down = [], []
    for n in range(count):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    if x + 1 < width:
                        across.append(abs(float(images[n, c, y, x + 1] - images[n, c, y, x])) ** power)
                    if y + 1 < height:
                        down.append(abs(float(images[n, c, y + 1, x] - images[n, c, y, x])) ** power)
    return sum(sum(part) / len(part) for part in (across, down) if part)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [(4, 3), (1, 5), (5, 1), (1, 1)], ids=str)
def test_total_variation_agrees_with_a_loop_over_pixels(size: tuple[int, int], power: float) -> None:
    images = normal(2, 3, *size)
    close(total_variation(images, power), slow_total_variation(images, power))


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_total_variation_gradient_agrees_with_finite_differences(power: float) -> None:
    assert gradcheck(lambda x: total_variation(x, power), normal(2, 1, 3, 4).requires_grad_())


def test_total_variation_of_a_flat_image_is_zero_with_a_zero_gradient() -> None:
    images = torch.full((2, 1, 3, 3), 0.7, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(total_variation(images), images)
    assert not gradient.any()


# Feature regression


def slow_ridge(features: Tensor, targets: Tensor, queries: Tensor, ridge: float) -> Tensor:
    """Returns the prediction of the weights w that minimise ||features w - targets||^2 + penalty ||w||^2."""
    penalty = ridge * float(features.square().sum()) / len(features)
    normal_matrix = features.T @ features + penalty * torch.eye(features.shape[1], dtype=F64)
    return queries @ torch.linalg.inv(normal_matrix) @ features.T @ targets


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_ridge_prediction_is_that_of_the_normal_equations(shape: tuple[int, int], ridge: float) -> None:
    features, targets, queries = normal(*shape), normal(shape[0], 2, seed=1), normal(6, shape[1], seed=2)
    close(ridge_prediction(features, targets, queries, ridge), slow_ridge(features, targets, queries, ridge), 1e-9)


def test_ridge_prediction_gradient_agrees_with_finite_differences() -> None:
    features, targets, queries = normal(3, 4).requires_grad_(), normal(3, 2, seed=1), normal(5, 4, seed=2)
    assert gradcheck(lambda x: ridge_prediction(x, targets, queries, 0.1), (features,))


def test_ridge_prediction_does_not_depend_on_the_scale_of_the_features() -> None:
    features, targets, queries = normal(3, 4), normal(3, 2, seed=1), normal(5, 4, seed=2)
    close(ridge_prediction(7 * features, targets, 7 * queries, 0.1), ridge_prediction(features, targets, queries, 0.1))
    assert not torch.allclose(ridge_prediction(features, targets, 7 * queries, 0.1), ridge_prediction(features, targets, queries, 0.1))


def test_centred_labels_sum_to_zero() -> None:
    assert centred(torch.tensor([1, 0]), 4).tolist() == [[-0.25, 0.75, -0.25, -0.25], [0.75, -0.25, -0.25, -0.25]]
