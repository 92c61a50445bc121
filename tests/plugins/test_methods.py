"""The losses of published methods, in float64, against slow versions that are obviously right; their recipes on digits."""

from __future__ import annotations

import cmath
import json
import math
import operator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ddkit_gm import GradientMatching, gradient_distance
from ddkit_methods.attention import attention, attention_maps
from ddkit_methods.characteristic import characteristic_distance
from ddkit_methods.class_centres import centre_loss
from ddkit_methods.class_logit import class_logit, feature_distance, penultimate
from ddkit_methods.classification import class_cross_entropy
from ddkit_methods.covariance import covariance_distance
from ddkit_methods.layer_means import mean_gap
from ddkit_methods.mmd import squared_mmd
from torch import Tensor, nn
from torch.autograd import gradcheck

import ddkit
from ddkit.components import registry
from ddkit.recipes.resolve import resolve
from tests.conftest import SMALL

F64 = torch.float64
RECIPES = [p.name for p in registry.plugins() if p.kind == "recipe" and "ddkit_methods" in p.value]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_digits_as_its_paper_has_it(name: str, tmp_path: Path) -> None:
    small = {path: value for path, value in SMALL.items() if not path.startswith("evaluators")}
    if "trajectory" in resolve(name).losses:
        small |= {"experts.count": 2, "experts.epochs": 6, "losses.trajectory.steps": 3}
    if resolve(name).network.source == "experts":
        small |= {"experts.count": 2, "experts.epochs": 1, "experts.save_every": 1, "network.first": 0}
    run = ddkit.distill(
        name, ipc=1, pipc=5, steps=min(2, resolve(name).steps), evaluators="none", sets=small, out=tmp_path / "run", device="cpu"
    )
    assert ddkit.load(run.path).images.isfinite().all()


# Maximum mean discrepancy


def slow_mmd(real: list[list[float]], synthetic: list[list[float]], scales: int) -> float:
    rows = real + synthetic
    gaps = {(i, j): sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for i, x in enumerate(rows) for j, y in enumerate(rows)}
    width = sum(gaps.values()) / (len(rows) * (len(rows) - 1))
    m, total = len(real), 0.0
    for (i, j), gap in gaps.items():
        kernel = sum(math.exp(-gap / (width * 2.0 ** (s - scales // 2))) for s in range(scales))
        side = [1 / m if row < m else -1 / len(synthetic) for row in (i, j)]
        total += kernel * side[0] * side[1]
    return total


@pytest.mark.parametrize("scales", [1, 4, 5])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (6, 1), (3, 4)])
def test_mmd_agrees_with_loops_over_pairs_and_finite_differences(m: int, n: int, scales: int) -> None:
    real, synthetic = normal(m, 4), normal(n, 4, seed=1).requires_grad_()
    value = squared_mmd(real, synthetic, "gaussian", scales)
    assert float(value.detach()) == pytest.approx(slow_mmd(real.tolist(), synthetic.tolist(), scales), rel=1e-10, abs=1e-14)
    assert float(squared_mmd(real, synthetic.detach(), "linear")) == pytest.approx(
        sum((float(real[:, k].mean()) - float(synthetic[:, k].detach().mean())) ** 2 for k in range(4)), rel=1e-12
    )
    assert gradcheck(lambda x: squared_mmd(real, x, "linear"), (synthetic,))


def test_the_gradient_of_mmd_is_that_with_the_width_held() -> None:
    real, synthetic = normal(5, 3), normal(2, 3, seed=1)
    both = torch.cat([real, synthetic])
    width = float(torch.cdist(both, both).square().sum() / 42)

    def held(x: Tensor) -> Tensor:
        rows = torch.cat([real, x])
        gaps = (rows[:, None] - rows).square().sum(2)
        side = torch.cat([torch.full((5,), 1 / 5, dtype=F64), torch.full((2,), -1 / 2, dtype=F64)])
        return torch.stack([side @ torch.exp(-gaps / (width * 2.0**s)) @ side for s in range(-2, 3)]).sum()

    x = synthetic.clone().requires_grad_()
    assert gradcheck(held, (x,))
    (found,) = torch.autograd.grad(squared_mmd(real, x), x)
    (wanted,) = torch.autograd.grad(held(x), x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_mmd_sees_the_spread_that_a_mean_does_not_and_is_zero_with_a_finite_gradient_if_all_is_equal() -> None:
    real, wide = normal(200, 2), 3 * normal(200, 2)
    assert float(squared_mmd(real - real.mean(0), wide - wide.mean(0))) > 0.05
    assert float(squared_mmd(real - real.mean(0), wide - wide.mean(0), "linear")) < 1e-20
    x = torch.ones(2, 3, dtype=F64, requires_grad=True)
    value = squared_mmd(torch.ones(4, 3, dtype=F64), x)
    assert float(value.detach()) == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


# Attention matching


def test_attention_agrees_with_loops_and_finite_differences() -> None:
    x = normal(2, 3, 2, 4)
    for row, found in zip(x, attention(x, 4.0), strict=True):
        sums = [sum(abs(float(row[c, i, j])) ** 4 for c in range(3)) for i in range(2) for j in range(4)]
        assert found.tolist() == pytest.approx([value / math.hypot(*sums) for value in sums], rel=1e-10)
    assert gradcheck(lambda t: attention(t, 4.0), (x.requires_grad_(),))


def test_attention_is_taken_after_every_activation_but_the_last() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(),
    ).double()  # fmt: skip
    x = normal(3, 1, 8, 6)
    maps = attention_maps(network, x, 2.0)
    assert [tuple(each.shape) for each in maps] == [(3, 48), (3, 12)]
    torch.testing.assert_close(maps[1], attention(network[:5](x), 2.0))


def test_attention_in_a_network_without_places_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ddkit.InputError, match="convolutional"):
        ddkit.distill(losses="attention-matching", model="mlp", steps=2, evaluators="none", out=tmp_path / "run")
    assert not list(tmp_path.rglob("synthetic.safetensors"))


# Class means of layers, and class centres


def test_layer_means_agree_with_loops_over_classes_layers_and_values() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten()).double()
    sides, total = (normal(5, 1, 8, 6), normal(3, 1, 8, 6, seed=1)), 0.0
    rows = ({0: slice(0, 2), 1: slice(2, 5)}, {0: slice(0, 1), 1: slice(1, 3)})
    for factor, depth in ((0.5, 2), (1.0, 5)):
        layers = [network[:depth](x).flatten(1).tolist() for x in sides]
        for label in (0, 1):
            parts = [layer[own[label]] for layer, own in zip(layers, rows, strict=True)]
            means = [[sum(values) / len(part) for values in zip(*part, strict=True)] for part in parts]
            total += factor * sum((a - b) ** 2 for a, b in zip(*means, strict=True))
    real = SimpleNamespace(augmented=sides[0], class_slices=rows[0])
    step = SimpleNamespace(real=real, augmented=sides[1], class_slices=rows[1], network=network)
    loss = ddkit.create("loss", "layer-means", {"shallow": 0.5})
    assert float(loss(step).detach()) == pytest.approx(total, rel=1e-10)


def test_class_centres_agree_with_loops_over_real_images_and_finite_differences() -> None:
    real, centres, labels = normal(4, 3), normal(2, 3, seed=1).requires_grad_(), torch.tensor([0, 1, 1, 0])
    total = 0.0
    for row, label in zip(real.tolist(), labels.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(row, centre, strict=True)) for centre in centres.tolist()]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    assert float(centre_loss(real, labels, centres).detach()) == pytest.approx(total / 4, rel=1e-12)
    assert gradcheck(lambda x: centre_loss(real, labels, x), (centres,))
    synthetic = normal(3, 3, seed=2).requires_grad_()
    assert gradcheck(lambda x: mean_gap(real, x), (synthetic,))


def test_a_network_without_activations_is_refused_before_the_first_step() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ddkit.InputError, match="no activation"):
        ddkit.create("loss", "layer-means", {}).check(network=flat, teacher=None)


# Classification


def test_the_cross_entropy_of_classes_agrees_with_loops_and_finite_differences() -> None:
    logits, labels = normal(5, 3), [0, 0, 2, 2, 2]  # a class may be without images
    rows = [math.log(sum(math.exp(each) for each in row)) - row[label] for row, label in zip(logits.tolist(), labels, strict=True)]
    found = class_cross_entropy(logits, torch.tensor(labels), 3)
    assert float(found) == pytest.approx(sum(rows[:2]) / 2 + sum(rows[2:]) / 3, rel=1e-12)
    assert gradcheck(lambda t: class_cross_entropy(t, torch.tensor(labels), 3), (logits.requires_grad_(),))


def test_classification_counts_as_much_as_the_network_is_right_about_real_images(tmp_path: Path) -> None:
    common = {"engine.log_every": 1, "losses.classification.judges": 50, "network.width": 16}
    training = {"train_on": "real", "renew_every": 2, "inner_steps": 12, "inner_lr": 0.1, "batch": 64}
    found = {}
    for name, pool in {"fresh": {}, "trained": {f"network.{key}": value for key, value in training.items()}}.items():
        out = tmp_path / name
        ddkit.distill(losses="classification", pipc=50, ipc=1, steps=2, evaluators="none", sets=common | pool, out=out, device="cpu")
        rows = (out / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(row)["logged"]["classification"]["accuracy"] for row in rows]
    assert found["trained"][0] == found["fresh"][0]
    assert max(found["fresh"]) < 0.4 < 0.6 < found["trained"][1]


# Gradients of convolutions


def test_gradients_of_kernels_are_those_of_convolutions_alone_and_a_network_without_any_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm([4, 2, 2]), nn.Flatten(), nn.Linear(16, 5))
    shapes = [tuple(each.shape) for each in network.parameters()]
    assert sum(len(shape) > 2 for shape in shapes) == 3, "a layer norm has three dimensions too"
    real, synthetic = ([normal(*shape, seed=seed) for shape in shapes] for seed in (0, 1))
    loss = GradientMatching(kernels=True)
    kept = [loss._compared(network, side) for side in (real, synthetic)]
    wanted = sum(float(a - b) ** 2 for a, b in zip(real[0].flatten(), synthetic[0].flatten(), strict=True))
    assert float(gradient_distance(*kept, "mse")) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ddkit.InputError, match=r"kernels=false"):
        loss.initial(SimpleNamespace(network=nn.Linear(2, 2)))  # type: ignore[arg-type]


# Characteristic functions


def test_the_distance_of_characteristic_functions_agrees_with_complex_numbers_and_finite_differences() -> None:
    real, synthetic, frequencies = normal(5, 3), normal(2, 3, seed=1).requires_grad_(), normal(4, 3, seed=2)
    total = 0.0
    for t in frequencies.tolist():
        a, b = (sum(cmath.exp(1j * sum(map(operator.mul, t, x))) for x in rows.tolist()) / len(rows) for rows in (real, synthetic))
        total += math.sqrt(0.3 * (abs(a) - abs(b)) ** 2 + 0.7 * 2 * (abs(a) * abs(b) - (a * b.conjugate()).real)) / len(frequencies)
    assert float(characteristic_distance(real, synthetic, frequencies, 0.3, 0.7).detach()) == pytest.approx(total, rel=1e-9)
    assert gradcheck(lambda x: characteristic_distance(real, x, frequencies, 0.3, 0.7), (synthetic,))


def test_equal_features_have_equal_characteristic_functions_and_a_finite_gradient() -> None:
    x, frequencies = normal(4, 3), normal(6, 3, seed=1)
    again = x[[2, 0, 3, 1]].requires_grad_()
    value = characteristic_distance(x, again, frequencies, 0.5, 0.5)
    assert float(value.detach()) < 2e-6
    assert torch.autograd.grad(value, again)[0].isfinite().all()
    assert float(characteristic_distance(x, x + 1, frequencies, 0.5, 0.5)) > 0.1
    assert float(characteristic_distance(x, x + 1, frequencies, 0.5, 0.0)) < 2e-6, "a shift turns phases alone"


# Covariance matching


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_distance_of_covariances_agrees_with_loops_and_finite_differences(n: int) -> None:
    real, synthetic = normal(5, 3), normal(n, 3, seed=1)

    def covariance(rows: list[list[float]], j: int, k: int) -> float:
        means = [sum(row[each] for row in rows) / len(rows) for each in (j, k)]
        return sum((row[j] - means[0]) * (row[k] - means[1]) for row in rows) / max(len(rows) - 1, 1)

    gaps = [covariance(real.tolist(), j, k) - covariance(synthetic.tolist(), j, k) for j in range(3) for k in range(3)]
    assert float(covariance_distance(real, synthetic)) == pytest.approx(sum(gap**2 for gap in gaps) / 3, rel=1e-10)
    assert float(covariance_distance(real, real + 1)) < 1e-12, "means are not compared"
    assert gradcheck(lambda x: covariance_distance(real, x), (synthetic.requires_grad_(),))


# Logits of classes


def test_class_logit_agrees_with_loops_and_finite_differences() -> None:
    logits, labels, features, real = normal(4, 3), torch.tensor([0, 1, 2, 2]), normal(4, 5), normal(6, 5, seed=1)
    assert float(class_logit(logits, labels)) == pytest.approx(-sum(float(logits[row, labels[row]]) for row in range(4)) / 4, rel=1e-12)
    gaps = [(float(features[row, k]) - sum(real[:, k].tolist()) / 6) ** 2 for row in range(4) for k in range(5)]
    assert float(feature_distance(features, real)) == pytest.approx(sum(gaps) / 20, rel=1e-12)
    assert gradcheck(lambda t: class_logit(t, labels), (logits.requires_grad_(),))
    assert gradcheck(lambda t: feature_distance(t, real), (features.requires_grad_(),))


def test_class_logit_is_the_mean_over_teacher_and_others_and_holds_the_teachers_features_alone() -> None:
    teacher, other = (nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double() for _ in range(2))
    x, labels, real = normal(3, 1, 2, 3), torch.tensor([0, 1, 2]), normal(5, 1, 2, 3, seed=1)
    step = SimpleNamespace(
        view=lambda name: (x, labels, teacher(x)),
        network=other,
        teacher=SimpleNamespace(module=teacher),
        real=SimpleNamespace(all_images=real),
    )
    torch.testing.assert_close(penultimate(teacher, x), teacher[:3](x))
    held = (teacher[:3](x) - teacher[:3](real).mean(0)).square().mean()
    own, others = (-torch.stack([network(x)[row, row] for row in range(3)]).mean() for network in (teacher, other))
    for options, wanted in (({}, 0.25 * own + 0.75 * others + held), ({"others": 0.0, "features": 2.0}, own + 2 * held)):
        torch.testing.assert_close(ddkit.create("loss", "class-logit", options)(step), wanted)
    alone = ddkit.create("loss", "class-logit", {"others": 0.0, "features": 0.0})
    assert not alone.requires.real
    assert not alone.requires.network


def test_a_teacher_without_a_linear_layer_is_refused_if_its_features_are_used() -> None:
    teacher = nn.Conv2d(1, 3, 2)
    with pytest.raises(ddkit.InputError, match="no linear layer"):
        ddkit.create("loss", "class-logit").check(network=None, teacher=teacher)
    ddkit.create("loss", "class-logit", {"features": 0.0}).check(network=None, teacher=teacher)
