"""The distance of covariances of features: the loss `covariance-matching`."""

from __future__ import annotations

import torch
from torch import Tensor

import ddkit
from ddkit_methods import class_pairs


def covariance_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """Returns |C(real) - C(synthetic)|² / d, a scalar: the squared difference of the covariances (d, d) of rows (m, d) and (n, d).

    Covariances are sums over n - 1; that of a single row is 0. By inner products of rows, so that no matrix has d² numbers.

    >>> import torch
    >>> float(covariance_distance(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.ones(1, 2)))  # (2² + 0 + 0 + 0) / 2
    2.0
    """
    both = torch.cat([(each - each.mean(0)) / max(len(each) - 1, 1) ** 0.5 for each in (real, synthetic)])
    sign = torch.cat([both.new_ones(len(real)), -both.new_ones(len(synthetic))])
    return sign @ (both @ both.T).square() @ sign / real.shape[1]


class CovarianceMatching(ddkit.Loss):
    """Squared distance between covariances of real and synthetic features, divided by the number of features, summed over classes.

    Together with `dm`, which compares the means, it makes the images of a class as diverse as the real ones. A class needs at least two
    synthetic images, for example those of a grid, as a single image has no covariance and gets no gradient.

    Source: Li et al., Diversified Semantic Distribution Matching for Dataset Distillation, ACM Multimedia 2024,
    openreview.net/forum?id=Karxz3LH0u.
    """

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, synthetic = step.real, step.embeddings
        total = 0.0 * synthetic.sum()  # attached to the graph even if no class has real images
        for ours, theirs in class_pairs(step, synthetic, real.embeddings):
            total = total + covariance_distance(theirs, ours)
        return total
