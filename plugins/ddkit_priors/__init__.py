"""Priors on the images themselves: the losses `total-variation` and `image-norm`."""

from __future__ import annotations

from torch import Tensor

import ddkit


def total_variation(images: Tensor, power: float = 1.0) -> Tensor:
    """Returns the mean of |neighbouring pixel differences|^power of images (n, C, H, W), both directions added.

    A side of one pixel adds 0.

    >>> import torch
    >>> float(total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])))
    1.0
    """
    parts = [difference.abs().pow(power).mean() for axis in (-1, -2) if (difference := images.diff(dim=axis)).numel()]
    return sum(parts, images.sum() * 0)


class TotalVariation(ddkit.Loss):
    """Mean absolute difference of neighbouring pixels of the synthetic images, in normalised units."""

    power: float = ddkit.option(1.0, "exponent of the differences", ge=1)

    order_invariant = True
    requires = ddkit.Requires(reduce="mean")

    def __call__(self, step: ddkit.Step) -> Tensor:
        return total_variation(step.images, self.power)


class ImageNorm(ddkit.Loss):
    """Mean squared value of the synthetic images, in normalised units, which keeps them near the mean image."""

    order_invariant = True
    requires = ddkit.Requires(reduce="mean")

    def __call__(self, step: ddkit.Step) -> Tensor:
        return step.images.square().mean()
