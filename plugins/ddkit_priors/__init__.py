"""Priors on the images: the losses `total-variation`, `image-norm` and `batch-norm-statistics`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import msgspec
import torch
from torch import Tensor, nn

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
    """Mean absolute difference of neighbouring pixels of the synthetic images, normalised units."""

    class Options(ddkit.Options):
        power: Annotated[float, ddkit.Option("exponent of the differences", ge=1)] = 1.0

    requires = ddkit.Requires(separable="mean")

    def __call__(self, step: ddkit.Step) -> Tensor:
        return total_variation(step.images, self.options.power)


class ImageNorm(ddkit.Loss):
    """Mean squared value of the synthetic images, normalised units: keeps them near the mean image."""

    requires = ddkit.Requires(separable="mean")

    def __call__(self, step: ddkit.Step) -> Tensor:
        return step.images.square().mean()


BatchNorm = nn.modules.batchnorm._BatchNorm


def statistics_distance(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Returns |mean(x) - mean| + |var(x) - variance|, Euclidean over channels, of inputs x (n, channels, ...).

    mean, variance (channels,) are running statistics; var(x) is the biased one. Source: Yin et al., Dreaming to Distill,
    CVPR 2020, arXiv 1912.08795, Eq. 4.

    >>> import torch
    >>> float(statistics_distance(torch.tensor([[1.0], [3.0]]), torch.tensor([2.0]), torch.tensor([0.0])))
    1.0
    """
    over = [axis for axis in range(x.ndim) if axis != 1]
    found = torch.var_mean(x, dim=over, correction=0)
    gaps = torch.stack([found[1] - mean, found[0] - variance])
    return (gaps.square().sum(1) + 1e-12).sqrt().sum()  # differentiable at 0


class BatchNormStatistics(ddkit.Loss):
    """Distance of the synthetic images' statistics in the teacher to the running ones of its batch norms, summed over layers.

    The running statistics are those of all images that the teacher was trained with, so they say what no few real images can.
    Source: Yin et al., Dreaming to Distill, CVPR 2020, arXiv 1912.08795, Eq. 4.
    """

    class Options(ddkit.Options):
        views: Annotated[dict[str, float], ddkit.Option("views it is evaluated on, with factors", min_length=1)] = msgspec.field(
            default_factory=lambda: {"default": 1.0}
        )

    @property
    def requires(self) -> ddkit.Requires:  # type: ignore[override]
        return ddkit.Requires(teacher=True, views=tuple(self.options.views))

    def initial(self, step: ddkit.Step) -> Mapping[str, Tensor]:
        if not _with_statistics(step.teacher.module):
            raise ddkit.InputError(
                "batch-norm-statistics: the teacher has no batch norm with running statistics. Use a teacher that has "
                "(`ddkit train --set teacher.norm=batch`), or leave this loss out.",
                "teacher",
            )
        return {}

    def __call__(self, step: ddkit.Step) -> Tensor:
        terms = []
        for name, factor in sorted(self.options.views.items()):
            images = step.view(name).images  # the first use of a view is a pass of its own
            with _distances(step.teacher.module) as found:
                step.teacher.logits(images)
            terms.append(factor * torch.stack(found).sum())
        return torch.stack(terms).sum()


def _with_statistics(module: nn.Module) -> list[BatchNorm]:
    return [each for each in module.modules() if isinstance(each, BatchNorm) and each.running_mean is not None]


@contextmanager
def _distances(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every pass through `module` adds the distance at each of its batch norms to the list."""
    found: list[Tensor] = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer.running_mean, Tensor)
        assert isinstance(layer.running_var, Tensor)
        found.append(statistics_distance(inputs[0], layer.running_mean, layer.running_var))

    hooks = [each.register_forward_pre_hook(measure) for each in _with_statistics(module)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
