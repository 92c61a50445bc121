"""The six operations of siamese augmentation: pure functions of images and uniform numbers, each row its own.

Every function takes x (n, C, H, W), numbers (n, k) uniform in [0, 1) and the options with the strengths, and is
differentiable in x. Strengths and definitions are those of the public code of Zhao and Bilen (ICML 2021); for
non-square images rotation is by a true angle and shifts are a fraction of each side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

WARPS = ("scale", "rotate")  # those that sample bilinearly
NUMBERS = {"color": 3, "crop": 2, "cutout": 2, "flip": 1, "scale": 2, "rotate": 1}


def _column(numbers: Tensor, index: int) -> Tensor:
    return numbers[:, index].view(-1, 1, 1, 1)


def color(x: Tensor, numbers: Tensor, options: Any) -> Tensor:
    """Returns x with its brightness shifted, then saturation, then contrast scaled."""
    numbers = numbers.to(x)
    x = x + (_column(numbers, 0) - 0.5) * options.brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (_column(numbers, 1) * options.saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (_column(numbers, 2) + options.contrast)


def _whole(numbers: Tensor, count: int) -> Tensor:
    """Returns integers in 0..count-1 from uniform numbers."""
    return (numbers.double() * count).long().clamp_max(count - 1)


def crop(x: Tensor, numbers: Tensor, options: Any) -> Tensor:
    """Returns x shifted by whole pixels along each axis, zeros coming in."""
    for axis, number in ((2, numbers[:, 0]), (3, numbers[:, 1])):
        side = x.shape[axis]
        reach = int(side * options.crop + 0.5)
        wanted = torch.arange(side, device=x.device) + (_whole(number, 2 * reach + 1) - reach)[:, None]
        shape = [len(x), 1, 1, 1]
        shape[axis] = side
        inside = ((wanted >= 0) & (wanted < side)).view(shape)
        x = x.gather(axis, wanted.clamp(0, side - 1).view(shape).expand_as(x)) * inside
    return x


def cutout(x: Tensor, numbers: Tensor, options: Any) -> Tensor:
    """Returns x with a rectangle set to zero; its centre may be anywhere, so it can reach over the edge."""
    masks = []
    for axis, number in ((2, numbers[:, 0]), (3, numbers[:, 1])):
        side = x.shape[axis]
        length = int(side * options.cutout + 0.5)
        first = (_whole(number, side + 1 - length % 2) - length // 2)[:, None]
        place = torch.arange(side, device=x.device)
        masks.append((place >= first) & (place < first + length))
    hole = masks[0][:, None, :, None] & masks[1][:, None, None, :]
    return x.masked_fill(hole, 0.0)


def flip(x: Tensor, numbers: Tensor, options: Any) -> Tensor:
    """Returns x mirrored left to right with the flip probability."""
    return torch.where(_column(numbers, 0) < options.flip_probability, x.flip(3), x)


def warp(x: Tensor, *rows: list[Tensor]) -> Tensor:
    """Returns x sampled bilinearly through affine matrices in [-1, 1] coordinates, zeros outside; a row is three tensors (n,)."""
    matrices = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = functional.affine_grid(matrices.to(x), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def scale(x: Tensor, numbers: Tensor, options: Any) -> Tensor:
    """Returns x with each axis scaled about the centre by its own factor."""
    factors = numbers.to(x) * (options.scale - 1 / options.scale) + 1 / options.scale
    zero = torch.zeros_like(factors[:, 0])
    return warp(x, [factors[:, 0], zero, zero], [zero, factors[:, 1], zero])


def rotate(x: Tensor, numbers: Tensor, options: Any) -> Tensor:
    """Returns x rotated about the centre by an angle within the largest one."""
    angle = (numbers[:, 0].to(x) - 0.5) * 2 * options.rotate * math.pi / 180
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    aspect = x.shape[2] / x.shape[3]
    return warp(x, [cos, -sin * aspect, zero], [sin / aspect, cos, zero])


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate,
}  # fmt: skip
