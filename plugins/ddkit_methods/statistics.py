"""Statistics of batch norm, matched without real images: the loss `batch-norm-statistics`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ddkit
from ddkit.nn import layer_features

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def centred_sums(x: Tensor, mean: Tensor) -> Tensor:
    """Returns (2, C): the sums of x - mean and of its square over all but the channels of x (n, C, ...), mean (C,)."""
    gap = x.transpose(0, 1).flatten(1) - mean[:, None]
    return torch.stack([gap.sum(1), gap.square().sum(1)])


def statistics_distance(sums: Tensor, count: int, variance: Tensor) -> Tensor:
    """Returns |mean(x) - mean| + |var(x) - variance|, Euclidean over channels, of the centred sums (2, C) of `count` values a channel.

    var(x) is the biased one. Source: Yin et al., Dreaming to Distill, CVPR 2020, arXiv 1912.08795, Eq. 4.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> float(statistics_distance(centred_sums(x, torch.tensor([5.0])), 2, torch.tensor([2.0])))
    4.0
    """
    gap, square = sums / count
    return torch.linalg.vector_norm(gap) + torch.linalg.vector_norm(square - gap.square() - variance)


def with_statistics(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the running mean and variance (C,) of each batch norm of `module` that keeps them, by its name."""
    norms = {name: each for name, each in module.named_modules() if isinstance(each, NORMS)}
    pairs = {name: (each.running_mean, each.running_var) for name, each in norms.items()}
    return {name: (mean, variance) for name, (mean, variance) in pairs.items() if mean is not None and variance is not None}


class BatchNormStatistics(ddkit.Loss):
    """Distance between the statistics of the synthetic images in the teacher and the running ones of its batch norms, summed over layers.

    A teacher with batch norm records the mean and variance of each channel over its training images. This loss makes the whole set,
    in the view `default`, have them too. A teacher without batch norm is refused.

    Source: Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, CVPR 2020, arXiv 1912.08795, Eq. 4.
    """

    first: float = ddkit.option(1.0, "factor of the first batch norm", ge=0)

    order_invariant = True
    requires = ddkit.Requires(teacher=True, views=("default",), reduce="global")

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        if teacher is not None and not with_statistics(teacher):
            raise ddkit.InputError(
                "batch-norm-statistics: the teacher has no batch norm that keeps running statistics. Use one with batch norm: "
                "--set teacher.norm=batch for convnet, or --set teacher.model=resnet18.",
                "teacher",
            )

    def __call__(self, step: ddkit.Step) -> Tensor:
        images, kept = step.view("default").images, with_statistics(step.teacher.module)
        inputs = layer_features(step.teacher.module, images, NORMS, inputs=True)
        found = [(x, *kept[name]) for use, x in inputs.items() if (name := use.partition(":")[0]) in kept]
        sums = step.all_reduce([centred_sums(x, mean) for x, mean, _ in found])
        share = step.size / len(images)
        terms = [
            statistics_distance(each, round(x[:, 0].numel() * share), variance) for each, (x, _, variance) in zip(sums, found, strict=True)
        ]
        return self.first * terms[0] + sum(terms[1:])
