"""Augmenters against slow, obvious versions in float64; strengths, sharing of draws, differentiability."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ddkit_augmenters import SiameseAugmentation, operations
from torch import Tensor

import ddkit
from ddkit import api
from ddkit.components import registry
from ddkit.data.images import Normalisation
from ddkit.engine.bank import Bank
from ddkit.engine.draws import StepSource
from ddkit.engine.step import SharedStep
from ddkit.recipes.resolve import recipe_for
from ddkit.recipes.tables import OptimizerTable

Array = npt.NDArray[np.float64]
OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
SHAPES = [(3, 8, 8), (1, 8, 8), (3, 6, 9), (1, 9, 6), (3, 7, 5)]


def augmenter(name: str = "dsa", *, mirror: bool = True, channels: int = 3, size: tuple[int, int] = (8, 8), **options: Any) -> Any:
    info = ddkit.DataInfo(class_names=("a", "b", "c"), channels=channels, size=size, mirror=mirror)
    return ddkit.create("augmenter", name, options, data=info)


def images(rows: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The slow versions: one image (C, H, W), its numbers, the published strengths.


def slow_color(x: Array, u: list[float]) -> Array:
    x = x + (u[0] - 0.5)
    grey = x.mean(axis=0)
    x = np.stack([grey + (channel - grey) * (2 * u[1]) for channel in x])
    return x.mean() + (x - x.mean()) * (u[2] + 0.5)


def integer(u: float, low: int, high: int) -> int:
    """Returns the integer in low..high that u in [0, 1) picks."""
    return low + min(int(u * (high - low + 1)), high - low)


def slow_crop(x: Array, u: list[float]) -> Array:
    _, height, width = x.shape
    reach = [int(side * 0.125 + 0.5) for side in (height, width)]
    down, right = (integer(u[axis], -reach[axis], reach[axis]) for axis in (0, 1))
    result = np.zeros_like(x)
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                result[:, row, column] = x[:, row + down, column + right]
    return result


def slow_cutout(x: Array, u: list[float]) -> Array:
    result = x.copy()
    spans = []
    for axis in (0, 1):
        side = x.shape[axis + 1]
        length = int(side * 0.5 + 0.5)
        centre = integer(u[axis], 0, side - length % 2)
        spans.append([place for place in range(centre - length // 2, centre - length // 2 + length) if 0 <= place < side])
    for row in spans[0]:
        for column in spans[1]:
            result[:, row, column] = 0
    return result


def slow_flip(x: Array, u: list[float]) -> Array:
    return x[:, :, ::-1].copy() if u[0] < 0.5 else x


def sampled(x: Array, row: float, column: float) -> Array:
    """Returns the bilinear value at (row, column) in pixels, zeros outside."""
    value = np.zeros(x.shape[0])
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                value += (1 - abs(row - r)) * (1 - abs(column - c)) * x[:, r, c]
    return value


def resampled(x: Array, place: Callable[[float, float], tuple[float, float]]) -> Array:
    """Returns x where each pixel is read at `place(dy, dx)`, offsets in pixels from the image's centre."""
    _, height, width = x.shape
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    result = np.zeros_like(x)
    for row in range(height):
        for column in range(width):
            dy, dx = place(row - middle_y, column - middle_x)
            result[:, row, column] = sampled(x, middle_y + dy, middle_x + dx)
    return result


def slow_scale(x: Array, u: list[float]) -> Array:
    factor_x, factor_y = (number * (1.2 - 1 / 1.2) + 1 / 1.2 for number in u)
    return resampled(x, lambda dy, dx: (factor_y * dy, factor_x * dx))


def slow_rotate(x: Array, u: list[float]) -> Array:
    angle = math.radians((u[0] - 0.5) * 2 * 15)
    cos, sin = math.cos(angle), math.sin(angle)
    return resampled(x, lambda dy, dx: (sin * dx + cos * dy, cos * dx - sin * dy))


SLOW = {
    "color": slow_color,
    "crop": slow_crop,
    "cutout": slow_cutout,
    "flip": slow_flip,
    "scale": slow_scale,
    "rotate": slow_rotate,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_slow_version(name: str, shape: tuple[int, int, int]) -> None:
    x = images(12, shape)
    numbers = torch.rand(12, operations.NUMBERS[name], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = operations.FUNCTIONS[name](x, numbers, SiameseAugmentation.Options())
    slow = np.stack([SLOW[name](image.numpy(), row.tolist()) for image, row in zip(x, numbers, strict=True)])
    np.testing.assert_allclose(fast.numpy(), slow, rtol=1e-9, atol=1e-9)
    assert not np.allclose(slow, x.numpy())  # the comparison is not one of untouched images


@pytest.mark.parametrize("name", OPERATIONS)
def test_extreme_numbers_stay_within_the_image(name: str) -> None:
    x = images(2, (3, 6, 9))
    extremes = torch.tensor([[0.0], [1 - 2**-24]], dtype=torch.float64).expand(2, operations.NUMBERS[name])
    fast = operations.FUNCTIONS[name](x, extremes, SiameseAugmentation.Options())
    slow = np.stack([SLOW[name](image.numpy(), row.tolist()) for image, row in zip(x, extremes, strict=True)])
    np.testing.assert_allclose(fast.numpy(), slow, rtol=1e-9, atol=1e-9)


def shifts(size: int) -> set[int]:
    """Returns the shifts that crop makes of a bright pixel in the middle, over many draws."""
    x = torch.zeros(400, 1, size, size)
    x[:, :, size // 2, size // 2] = 1
    numbers = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    moved = operations.crop(x, numbers, SiameseAugmentation.Options()).flatten(1).argmax(1)
    return {int(place) // size - size // 2 for place in moved}


def test_published_strengths_are_the_defaults() -> None:
    options = SiameseAugmentation.Options()
    published = {"brightness": 1.0, "saturation": 2.0, "contrast": 0.5, "crop": 0.125, "cutout": 0.5}
    published |= {"flip_probability": 0.5, "scale": 1.2, "rotate": 15.0}
    assert {name: getattr(options, name) for name in published} == published
    assert tuple(options.operations) == OPERATIONS
    assert options.compose == 1


def test_crop_shifts_by_up_to_an_eighth_of_the_side_either_way() -> None:
    assert shifts(32) == set(range(-4, 5))
    assert shifts(8) == {-1, 0, 1}


def test_cutout_removes_at_most_a_quarter_of_the_image_and_that_in_its_inside() -> None:
    numbers = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    holes = (operations.cutout(torch.ones(400, 1, 32, 32), numbers, SiameseAugmentation.Options()) == 0).sum((1, 2, 3))
    assert int(holes.max()) == 16 * 16
    assert int(holes.min()) >= 8 * 8


def test_flip_is_drawn_half_of_the_time() -> None:
    numbers = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0))
    x = torch.arange(2.0).view(1, 1, 1, 2).expand(2000, -1, -1, -1)
    flipped = operations.flip(x, numbers, SiameseAugmentation.Options())[:, 0, 0, 0]
    assert 0.45 < float(flipped.mean()) < 0.55


def test_brightness_saturation_and_contrast_have_the_published_ranges() -> None:
    numbers = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 1, 2).expand(2000, 3, 1, 2).clone()
    x[:, 0] += 0.3  # colour
    out = operations.color(x, numbers, SiameseAugmentation.Options())
    shift = out.mean((1, 2, 3)) - 0.1
    contrast = (out.mean(1)[:, 0, 0] - out.mean(1)[:, 0, 1]) / 2
    saturation = (out[:, 0] - out.mean(1)).mean((1, 2)) / 0.2 / contrast
    for found, low, high in ((shift, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)):
        assert low <= float(found.min()) + 1e-9
        assert float(found.max()) <= high + 1e-9
        assert float(found.max() - found.min()) > 0.99 * (high - low)


@pytest.mark.parametrize(("name", "low", "high"), [("scale", 1 / 1.2, 1.2), ("rotate", -15.0, 15.0)])
def test_scale_and_angle_have_the_published_ranges(name: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def keep(x: Tensor, matrices: Tensor) -> Tensor:
        seen.append(matrices)
        return x

    monkeypatch.setattr(operations, "warp", keep)
    numbers = torch.rand(2000, operations.NUMBERS[name], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operations.FUNCTIONS[name](images(2000, (1, 2, 2)), numbers, SiameseAugmentation.Options())
    matrices = seen[0]
    assert matrices[:, :, 2].abs().max() == 0
    if name == "scale":
        drawn = torch.cat([matrices[:, 0, 0], matrices[:, 1, 1]])
    else:
        drawn = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert low <= float(drawn.min()) < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < float(drawn.max()) <= high


def test_applying_to_all_rows_equals_applying_class_by_class() -> None:
    dsa = augmenter(compose=2)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    x = images(8, (3, 8, 8))
    for seed in range(10):
        drawn = dsa.sample(torch.Generator().manual_seed(seed), 3)
        whole = dsa.apply(x, {key: value[labels] for key, value in drawn.items()})
        parts = [dsa.apply(x[labels == c], {k: v[labels[labels == c]] for k, v in drawn.items()}) for c in range(3)]
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("name", ["dsa", "dsv"])
def test_rows_of_a_class_get_the_same_augmentation_and_classes_differ(name: str) -> None:
    made = augmenter(name)
    x = images(1, (3, 8, 8)).expand(6, -1, -1, -1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    differing = 0
    for seed in range(10):
        drawn = made.sample(torch.Generator().manual_seed(seed), 3)
        out = made.apply(x, {key: value[labels] for key, value in drawn.items()})
        assert torch.equal(out[0::2], out[1::2])
        differing += not torch.equal(out[0], out[2])
    assert differing > 5


def chosen_names(made: Any, drawn: dict[str, Tensor]) -> list[set[str]]:
    return [{name for name, yes in zip(made.strategy, row, strict=True) if yes} for row in drawn["chosen"].tolist()]


def test_distillation_draws_one_operation_per_class_each_as_often() -> None:
    dsa = augmenter()
    sets = chosen_names(dsa, dsa.sample(torch.Generator().manual_seed(0), 6000))
    assert {len(names) for names in sets} == {1}
    counts = {name: sum(name in names for names in sets) for name in OPERATIONS}
    assert all(850 < count < 1150 for count in counts.values())


def test_evaluation_draws_one_operation_per_batch_and_parameters_per_image() -> None:
    dsa = augmenter()
    seen = set()
    for seed in range(40):
        drawn = dsa.sample_batch(torch.Generator().manual_seed(seed), 5)
        sets = chosen_names(dsa, drawn)
        assert all(names == sets[0] for names in sets)
        (name,) = sets[0]
        seen.add(name)
        assert len(drawn[name].unique(dim=0)) == 5
    assert seen == set(OPERATIONS)


def test_siamese_draw_is_not_per_image_unlike_a_batch() -> None:
    dsa = augmenter(operations=["rotate"])
    x = images(1, (3, 8, 8)).expand(4, -1, -1, -1)
    batch = dsa.apply(x, dsa.sample_batch(torch.Generator().manual_seed(0), 4))
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("strategy", [("crop",), ("rotate", "flip"), ("cutout", "color", "scale")])
def test_any_subset_of_operations_is_a_strategy(strategy: tuple[str, ...]) -> None:
    dsa = augmenter(operations=list(strategy))
    drawn = dsa.sample(torch.Generator().manual_seed(0), 300)
    assert set().union(*chosen_names(dsa, drawn)) == set(strategy)
    assert set(drawn) == {"chosen", *strategy}


def test_unknown_operation_is_refused_by_name() -> None:
    with pytest.raises(ddkit.InputError, match="shear"):
        augmenter(operations=["shear"])
    with pytest.raises(ddkit.InputError):
        augmenter(operations=[])


@pytest.mark.parametrize("compose", [2, 4, 6, 9])
def test_compose_applies_that_many_distinct_operations(compose: int) -> None:
    dsa = augmenter(compose=compose)
    drawn = dsa.sample(torch.Generator().manual_seed(0), 50)
    assert {len(names) for names in chosen_names(dsa, drawn)} == {min(compose, 6)}


@pytest.mark.parametrize(("size", "operations_"), [((8, 8), 2), ((3, 40), 1), ((16, 12), 3), ((32, 32), 6), ((224, 224), 6)])
def test_compose_auto_follows_the_smaller_side_of_the_images(size: tuple[int, int], operations_: int) -> None:
    dsa = augmenter(compose="auto", size=size)
    assert dsa.options.compose == operations_
    assert augmenter(compose=5, size=size).options.compose == 5


def test_composed_operations_are_applied_in_the_order_of_the_strategy() -> None:
    x = images(3, (3, 8, 8))
    for order in (["cutout", "color"], ["color", "cutout"]):
        dsa = augmenter(operations=order, compose=2)
        drawn = dsa.sample(torch.Generator().manual_seed(0), 3)
        expected = x
        for name in order:
            expected = operations.FUNCTIONS[name](expected, drawn[name], dsa.options)
        assert torch.equal(dsa.apply(x, drawn), expected)


def test_no_flip_where_a_mirrored_image_changes_class() -> None:
    assert "flip" not in augmenter(mirror=False).strategy
    assert "flip" in augmenter(mirror=True).strategy
    assert "flip" in augmenter(mirror=False, flip=True).strategy
    assert registry.load("dataset", "digits").mirror is False
    assert registry.load("dataset", "mnist").mirror is False
    assert registry.load("dataset", "cifar10").mirror is True


def test_only_flip_without_mirroring_leaves_the_image() -> None:
    dsa = augmenter(mirror=False, operations=["flip"])
    x = images(3, (3, 8, 8))
    assert torch.equal(dsa.apply(x, dsa.sample(torch.Generator().manual_seed(0), 3)), x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_differentiable_in_the_images(name: str) -> None:
    dsa = augmenter(operations=[name])
    x = images(2, (2, 4, 5)).requires_grad_()
    drawn = dsa.sample(torch.Generator().manual_seed(3), 2)
    assert torch.autograd.gradcheck(lambda v: dsa.apply(v, drawn), (x,))


@pytest.mark.parametrize(("name", "options"), [("dsa", {"compose": 6}), ("dsa", {}), ("dsv", {})])
def test_augmenter_is_differentiable_and_leaves_its_input(name: str, options: dict[str, Any]) -> None:
    made = augmenter(name, **options)
    x = images(3, (1, 5, 4)).requires_grad_()
    before = x.detach().clone()
    drawn = made.sample(torch.Generator().manual_seed(1), 3)
    assert torch.autograd.gradcheck(lambda v: made.apply(v, drawn), (x,))
    assert torch.equal(x.detach(), before)


def test_none_returns_the_images() -> None:
    none = augmenter("none")
    x = images(3, (3, 8, 8))
    assert none.apply(x, none.sample_batch(torch.Generator(), 3)) is x


def test_draws_are_a_function_of_the_generator() -> None:
    dsa = augmenter()
    first, second, other = (dsa.sample(torch.Generator().manual_seed(seed), 4) for seed in (5, 5, 6))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["color"], other["color"])


# dsv: translation, zoomed crop and flip.


def dsv_numbers(*values: float) -> dict[str, Tensor]:
    return {"numbers": torch.tensor([values], dtype=torch.float64)}


def test_dsv_in_the_middle_of_its_ranges_is_the_identity() -> None:
    x = images(1, (3, 6, 8))
    out = augmenter("dsv").apply(x, dsv_numbers(0.0, 0.5, 0.5, 0.5, 0.5, 0.9))
    torch.testing.assert_close(out, x)


def test_dsv_flips_only_where_allowed() -> None:
    x = images(1, (3, 6, 8))
    numbers = dsv_numbers(0.0, 0.5, 0.5, 0.5, 0.5, 0.1)
    torch.testing.assert_close(augmenter("dsv").apply(x, numbers), x.flip(3))
    torch.testing.assert_close(augmenter("dsv", mirror=False).apply(x, numbers), x)


def test_dsv_translates_by_up_to_an_eighth_of_each_side() -> None:
    x = images(1, (3, 8, 16))
    out = augmenter("dsv").apply(x, dsv_numbers(0.0, 0.5, 0.5, 1.0, 0.0, 0.9))
    torch.testing.assert_close(out[:, :, 1:, :-2], x[:, :, :-1, 2:])
    assert out[:, :, 0].abs().max() == 0


def test_dsv_crop_keeps_at_least_four_fifths_and_reads_inside_the_image() -> None:
    ones = torch.ones(1, 1, 20, 20, dtype=torch.float64)
    for corner in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0)):
        out = augmenter("dsv", translation=0.0).apply(ones, dsv_numbers(1.0, *corner, 0.5, 0.5, 0.9))
        torch.testing.assert_close(out[..., 1:-1, 1:-1], ones[..., 1:-1, 1:-1])  # the window lies inside the image
        assert float(out.min()) > 0.8  # the outermost row is blended with the zeros a tenth of a pixel beyond the edge
    ramp = torch.linspace(0, 1, 20, dtype=torch.float64).view(1, 1, 1, 20).expand(1, 1, 20, 20)
    out = augmenter("dsv", translation=0.0).apply(ramp, dsv_numbers(1.0, 0.5, 0.5, 0.5, 0.5, 0.9))
    span = out[..., -1] - out[..., 0]
    torch.testing.assert_close(span, torch.full_like(span, 0.8))


# Siamese: the step shares a class's draw between its real and synthetic images.


def shared_step(made: Any, index: int = 0) -> SharedStep:
    info = ddkit.DataInfo(class_names=("a", "b", "c"), channels=3, size=(8, 8))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    pixels = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    source = StepSource(
        seed=0, info=info, normalisation=Normalisation((0.5,) * 3, (0.25,) * 3), real_images=pixels, real_labels=labels, batch=256,
        augmenter=made, views={}, model=None, renew_every=1, teacher=None, device=torch.device("cpu"),
        arithmetic=ddkit.Arithmetic(compile=False, precision="float32"),
    )  # fmt: skip
    start = Normalisation((0.5,) * 3, (0.25,) * 3).normalise(pixels)
    return SharedStep(source, Bank(start, labels, {}, {"images": OptimizerTable()}), index)


@pytest.mark.parametrize("name", ["dsa", "dsv"])
def test_real_and_synthetic_rows_of_a_class_share_operation_and_parameters(name: str) -> None:
    changed = 0
    for index in range(6):
        step = shared_step(augmenter(name), index)
        assert torch.equal(step.augmented.detach(), step.real.augmented)
        changed += not torch.equal(step.augmented, step.images)
    assert changed >= 4


def test_each_step_draws_anew() -> None:
    assert not torch.equal(shared_step(augmenter("dsv"), 0).augmented, shared_step(augmenter("dsv"), 1).augmented)


def test_digits_run_records_that_it_does_not_flip() -> None:
    plan = api.plan(recipe_for("default"))
    assert plan["recipe"]["augmenter"]["flip"] is False
    assert plan["recipe"]["views"]["default"]["flip"] is False
