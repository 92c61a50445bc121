"""A third-party loss for ddkit: the running statistics of the teacher's batch norms, as in DeepInversion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import ddkit


def statistics_distance(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Returns |mean(x) - mean| + |var(x) - variance|, Euclidean over channels, of inputs x (n, channels, ...).

    Source: Yin et al., Dreaming to Distill, CVPR 2020, arXiv 1912.08795, Eq. 4; var(x) is the biased one.

    >>> import torch
    >>> round(float(statistics_distance(torch.tensor([[1.0], [3.0]]), torch.tensor([2.0]), torch.tensor([0.0]))), 4)
    1.0
    """
    found = torch.var_mean(x, dim=[axis for axis in range(x.ndim) if axis != 1], correction=0)
    gaps = torch.stack([found[1] - mean, found[0] - variance])
    return (gaps.square().sum(1) + 1e-12).sqrt().sum()  # differentiable at 0


def with_statistics(module: nn.Module) -> list[nn.Module]:
    """Returns the batch norms of `module` that keep running statistics."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [each for each in module.modules() if isinstance(each, norms) and each.track_running_stats]


class BatchNormStatistics(ddkit.Loss):
    """Distance of the synthetic images' statistics in the teacher to the running ones of its batch norms, summed over layers."""

    order_invariant = True
    requires = ddkit.Requires(teacher=True, views=("default",))

    def initial(self, step: ddkit.Step) -> Mapping[str, Tensor]:
        if not with_statistics(step.teacher.module):
            raise ddkit.InputError("batch-norm-statistics: the teacher has no batch norm with running statistics; use one that has.")
        return {}

    def __call__(self, step: ddkit.Step) -> Tensor:
        images = step.view("default").images  # before the hooks: the first use of a view is a pass of its own
        found: list[Tensor] = []
        measure = lambda layer, x: found.append(statistics_distance(x[0], layer.running_mean, layer.running_var))  # noqa: E731
        hooks = [each.register_forward_pre_hook(measure) for each in with_statistics(step.teacher.module)]
        try:
            step.teacher.logits(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found).sum()
