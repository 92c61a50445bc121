"""Augmenters against slow, obvious versions in float64; which operations are drawn; sharing of draws; differentiability."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import ddkit
from ddkit import api
from ddkit.components import registry
from ddkit.testing.world import Recorder, Setting, World

Array = npt.NDArray[np.float64]


def augmenter(name: str = "dsa", *, mirror: bool = True, size: tuple[int, int] = (8, 8), **options: Any) -> Any:
    info = ddkit.DataInfo(class_names=("a", "b", "c"), channels=3, size=size, mirror=mirror)
    return ddkit.create("augmenter", name, options, data=info)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(rows: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.randn((rows, *shape), generator=draw(), dtype=torch.float64)


# The slow versions: one image (C, H, W), its uniform numbers, and the published strengths as defaults.


def slow_color(x: Array, u: list[float], brightness: float = 1.0, saturation: float = 2.0, contrast: float = 0.5) -> Array:
    x = x + (u[0] - 0.5) * brightness
    grey = x.mean(axis=0)
    x = np.stack([grey + (channel - grey) * (saturation * u[1]) for channel in x])
    return x.mean() + (x - x.mean()) * (u[2] + contrast)


def integer(u: float, low: int, high: int) -> int:
    """Returns the integer in low..high that u in [0, 1) picks."""
    return low + min(int(u * (high - low + 1)), high - low)


def slow_cutout(x: Array, u: list[float], cutout: float = 0.5) -> Array:
    result = x.copy()
    spans = []
    for axis in (0, 1):
        side = x.shape[axis + 1]
        length = int(side * cutout + 0.5)
        first = integer(u[axis], 0, side - length % 2) - length // 2
        spans.append([place for place in range(first, first + length) if 0 <= place < side])
    for row in spans[0]:
        result[:, row, spans[1]] = 0
    return result


def slow_flip(x: Array, u: list[float], flip_probability: float = 0.5) -> Array:
    return x[:, :, ::-1].copy() if u[0] < flip_probability else x


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


def slow_crop(x: Array, u: list[float], crop: float = 0.125) -> Array:
    reach = [int(side * crop + 0.5) for side in x.shape[1:]]
    down, right = (integer(u[axis], -reach[axis], reach[axis]) for axis in (0, 1))
    return resampled(x, lambda dy, dx: (dy + down, dx + right))


def slow_scale(x: Array, u: list[float], scale: float = 1.2) -> Array:
    factor_x, factor_y = (number * (scale - 1 / scale) + 1 / scale for number in u)
    return resampled(x, lambda dy, dx: (factor_y * dy, factor_x * dx))


def slow_rotate(x: Array, u: list[float], rotate: float = 15.0) -> Array:
    angle = math.radians((u[0] - 0.5) * 2 * rotate)
    cos, sin = math.cos(angle), math.sin(angle)
    return resampled(x, lambda dy, dx: (sin * dx + cos * dy, cos * dx - sin * dy))


def slow_dsv(x: Array, u: list[float], crop: float = 0.2, translation: float = 0.125, flip_probability: float = 0.5) -> Array:
    """A window that `crop` may make smaller lies anywhere in the image; the image is moved under it, and mirrored."""
    kept = 1 - crop * u[0]
    right, down = ((1 - kept) / 2 * (2 * u[axis] - 1) + translation * (2 * u[2 + axis] - 1) for axis in (1, 2))
    side = -kept if u[5] < flip_probability else kept
    return resampled(x, lambda dy, dx: (kept * dy + down * x.shape[1], side * dx + right * x.shape[2]))


SLOW: dict[str, tuple[Callable[..., Array], int, dict[str, float]]] = {  # how many numbers, and other strengths
    "color": (slow_color, 3, {"brightness": 0.3, "saturation": 1.5, "contrast": 0.8}),
    "crop": (slow_crop, 2, {"crop": 0.3}),
    "cutout": (slow_cutout, 2, {"cutout": 0.3}),
    "flip": (slow_flip, 1, {"flip_probability": 0.2}),
    "scale": (slow_scale, 2, {"scale": 1.5}),
    "rotate": (slow_rotate, 1, {"rotate": 80.0}),
    "dsv": (slow_dsv, 6, {"crop": 0.5, "translation": 0.3, "flip_probability": 0.2}),
}
OPERATIONS = tuple(SLOW)[:-1]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 6, 9), (1, 9, 6), (3, 7, 5)])
@pytest.mark.parametrize("other", [False, True], ids=["published strengths", "other strengths"])
@pytest.mark.parametrize("name", SLOW)
def test_operation_agrees_with_the_slow_version_at_its_ends_too(name: str, other: bool, shape: tuple[int, int, int]) -> None:
    function, count, strengths = SLOW[name]
    strengths = strengths if other else {}
    ends = torch.tensor([[0.0], [1 - 2**-24]], dtype=torch.float64).expand(2, count)
    numbers = torch.cat([torch.rand(12, count, generator=draw(1), dtype=torch.float64), ends])
    if name == "dsv":
        made, drawn = augmenter("dsv", **strengths), {"numbers": numbers}
    else:
        made, drawn = augmenter(operations=[name], **strengths), {"chosen": torch.ones(14, 1, dtype=torch.bool), name: numbers}
    x = images(14, shape)
    slow = np.stack([function(image.numpy(), row.tolist(), **strengths) for image, row in zip(x, numbers, strict=True)])
    np.testing.assert_allclose(made.apply(x, drawn).numpy(), slow, rtol=1e-9, atol=1e-9)
    assert not np.allclose(slow, x.numpy()), "the comparison is not one of untouched images"


def test_none_returns_the_images() -> None:
    x, none = images(3, (3, 8, 8)), augmenter("none")
    assert none.apply(x, none.sample_batch(draw(), 3)) is x


@pytest.mark.parametrize(
    ("name", "options"), [*(("dsa", {"operations": [name]}) for name in OPERATIONS), ("dsa", {"compose": 6}), ("dsa", {}), ("dsv", {})]
)
def test_augmenter_is_differentiable_in_the_images(name: str, options: dict[str, Any]) -> None:
    made = augmenter(name, **options)
    drawn = made.sample(draw(3), 3)
    assert torch.autograd.gradcheck(lambda x: made.apply(x, drawn), images(3, (2, 5, 4)).requires_grad_())


# Which operations are drawn


def chosen(made: Any, drawn: dict[str, Tensor]) -> list[set[str]]:
    """Returns the names of the operations of each row."""
    return [{name for name, yes in zip(made.strategy, row, strict=True) if yes} for row in drawn["chosen"].tolist()]


def test_distillation_draws_one_operation_per_class_each_as_often() -> None:
    sets = chosen(augmenter(), augmenter().sample(draw(), 6000))
    assert {len(names) for names in sets} == {1}
    assert all(850 < sum(name in names for names in sets) < 1150 for name in OPERATIONS)


def test_evaluation_draws_one_operation_per_batch_and_parameters_per_image() -> None:
    seen = set()
    for seed in range(40):
        drawn = augmenter().sample_batch(draw(seed), 5)
        (name,) = set.union(*chosen(augmenter(), drawn))
        seen.add(name)
        assert len(drawn[name].unique(dim=0)) == 5
    assert seen == set(OPERATIONS)


def test_operations_that_are_always_applied_stand_beside_those_that_are_chosen() -> None:
    made = augmenter(operations=["crop", "scale", "rotate"], always=["flip", "color"])
    sets = chosen(made, made.sample(draw(), 3000))
    assert all({"flip", "color"} < names and len(names) == 3 for names in sets)
    assert all(850 < sum(name in names for names in sets) < 1150 for name in ("crop", "scale", "rotate"))
    digits = augmenter(operations=["crop", "flip"], always=["flip", "color"], mirror=False)
    assert {frozenset(names) for names in chosen(digits, digits.sample(draw(), 50))} == {frozenset({"color", "crop"})}


def test_any_subset_of_operations_is_a_strategy() -> None:
    for strategy in (["crop"], ["rotate", "flip"], ["cutout", "color", "scale"]):
        made = augmenter(operations=strategy)
        drawn = made.sample(draw(), 300)
        assert set.union(*chosen(made, drawn)) == set(strategy)
        assert set(drawn) == {"chosen", *strategy}
    for nothing, words in ((["shear"], "shear"), ([], "operations")):
        with pytest.raises(ddkit.InputError, match=words):
            augmenter(operations=nothing)


@pytest.mark.parametrize(
    ("compose", "size", "count"),
    [
        (2, (8, 8), 2),
        (4, (8, 8), 4),
        (9, (8, 8), 6),
        *(("auto", *each) for each in [((8, 8), 2), ((3, 40), 1), ((16, 12), 3), ((99, 99), 6)]),
    ],
)
def test_compose_is_the_number_of_distinct_operations_and_auto_follows_the_smaller_side(
    compose: int | str, size: tuple[int, int], count: int
) -> None:
    made = augmenter(compose=compose, size=size)
    assert {len(names) for names in chosen(made, made.sample(draw(), 50))} == {count}


@pytest.mark.parametrize("order", [["cutout", "color", "flip"], ["flip", "color", "cutout"]])
def test_each_row_gets_its_chosen_operations_in_the_order_of_the_strategy(order: list[str]) -> None:
    x, made = images(20, (3, 8, 8)), augmenter(operations=order, compose=2)
    drawn = made.sample(draw(), 20)
    expected = []
    for row, names in enumerate(chosen(made, drawn)):
        image = x[row : row + 1]
        for name in (name for name in order if name in names):
            numbers = drawn[name][row : row + 1]
            image = augmenter(operations=[name]).apply(image, {"chosen": torch.ones(1, 1), name: numbers})
        expected.append(image)
    assert torch.equal(made.apply(x, drawn), torch.cat(expected))


def test_no_flip_where_a_mirrored_image_changes_class() -> None:
    x = images(9, (3, 8, 8))
    for mirror, options, flips in ((False, {}, False), (True, {}, True), (False, {"flip": True}, True), (True, {"flip": False}, False)):
        assert ("flip" in augmenter(mirror=mirror, **options).strategy) is flips
        alone = augmenter(mirror=mirror, operations=["flip"], flip_probability=1.0, **options)
        assert torch.equal(alone.apply(x, alone.sample(draw(), 9)), x.flip(3) if flips else x)
        dsv = augmenter("dsv", mirror=mirror, flip_probability=1.0, crop=0.0, translation=0.0, **options)
        torch.testing.assert_close(dsv.apply(x, dsv.sample(draw(), 9)), x.flip(3) if flips else x)
    assert [registry.load("dataset", name).mirror for name in ("digits", "mnist", "cifar10")] == [False, False, True]
    recipe = api.plan("default")["recipe"]  # of digits
    assert recipe["augmenter"]["flip"] is recipe["views"]["default"]["flip"] is False


# Siamese: the step shares a class's draw between its real and synthetic images.


def shared_step(name: str, index: int) -> Recorder:
    """Returns a step whose two real and two synthetic images of each class are one and the same."""
    world = World(ddkit.create("loss", "dm"), Setting(channels=3, size=(8, 8), real=(2, 2, 2)))
    source = world.source
    source.draws.augmenter = augmenter(name)
    source.draws.real_images = source.draws.real_images[::2].repeat_interleave(2, 0)
    world.bank.images = source.draws.normalisation.normalise(source.draws.real_images)
    return world.step(index=index)


@pytest.mark.parametrize("name", ["dsa", "dsv"])
def test_real_and_synthetic_rows_of_a_class_share_operation_and_parameters_that_each_step_draws_anew(name: str) -> None:
    steps = [shared_step(name, index) for index in range(6)]
    for step in steps:
        assert torch.equal(step.augmented.detach(), step.real.augmented)
        assert torch.equal(step.augmented[::2], step.augmented[1::2])
    assert sum(not torch.equal(step.augmented, step.images) for step in steps) >= 4
    assert len({step.augmented.sum().item() for step in steps}) >= 4
