"""A third-party loss for ddkit: class-wise second moments of features."""

from __future__ import annotations

from torch import Tensor

import ddkit


def moment_gap(real: Tensor, synthetic: Tensor, *, central: bool = False) -> Tensor:
    """Returns || m(real) - m(synthetic) ||^2, a scalar, m the mean square (central: the variance) of each column.

    real (m, d) and synthetic (n, d) are features of one class, m and n at least 1. Source: the second-order term of
    Zellinger et al., Central Moment Discrepancy, arXiv 1702.08811, squared and without its scale factor.

    >>> import torch
    >>> float(moment_gap(torch.tensor([[3.0]]), torch.tensor([[1.0], [2.0]])))
    42.25
    """
    moments = [(x - central * x.mean(0)).square().mean(0) for x in (real, synthetic)]
    return (moments[0] - moments[1]).square().sum()


class SecondMoment(ddkit.Loss):
    """Squared distance of class-wise second moments of features, real to synthetic: what dm's means leave out."""

    central: bool = ddkit.option(False, "compare variances instead of mean squares; needs ipc of 2 or more")

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, synthetic = step.real, step.embeddings
        total = 0.0 * synthetic.sum()  # attached to the graph even if no class has real images
        for label in sorted(step.class_slices.keys() & real.class_slices.keys()):
            ours, theirs = synthetic[step.class_slices[label]], real.embeddings[real.class_slices[label]]
            total = total + moment_gap(theirs, ours, central=self.central)
        return total
