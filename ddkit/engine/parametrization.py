"""Several images decoded from one stored image, so that a set of ipc images a class teaches as more of them, each coarser.

Source: the multi-formation of Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, ICML 2022, arXiv 2205.14959,
Section 4: a stored image is a grid of factor x factor images, each of them enlarged to the full size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ddkit.data.pictures import grid
from ddkit.errors import InputError


def check_factor(factor: int, size: Sequence[int]) -> None:
    """Raises InputError where images of `size` (height, width) are no grid of factor x factor images."""
    height, width = size
    if height % factor or width % factor:
        raise InputError(
            f"decode.factor = {factor} cuts an image into {factor} x {factor} equal parts, and the data's have {height} x {width} pixels. "
            "Choose a divisor of both (1: no grid), or set data.size.",
            "decode.factor",
        )


def decoded(images: Tensor, factor: int) -> Tensor:
    """Returns (n * factor², C, H, W): the parts of each of the images (n, C, H, W), row by row, enlarged bilinearly to H x W.

    Differentiable, and affine in the images, so that it does not matter whether they are normalised. factor 1 changes nothing.
    """
    if factor == 1:
        return images
    count, channels, height, width = images.shape
    grid = images.view(count, channels, factor, height // factor, factor, width // factor)
    parts = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)
    return functional.interpolate(parts, (height, width), mode="bilinear", align_corners=False)


def encoded(images: Tensor, factor: int) -> Tensor:
    """Returns (n, C, H, W), each the `grid` of factor x factor of the images (n * factor², C, H, W)."""
    return images if factor == 1 else torch.stack([grid(parts, factor) for parts in images.split(factor**2)])
