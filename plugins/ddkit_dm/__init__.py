"""Distribution matching: the loss `dm` and its recipe."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

import ddkit


def class_sums(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Returns the sum (classes, d) of rows of values (n, d) by label, and the count (classes,) of rows."""
    sums = values.new_zeros(classes, values.shape[1]).index_add(0, labels, values)
    counts = values.new_zeros(classes).index_add(0, labels, values.new_ones(len(labels)))
    return sums, counts


def dm_loss(real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns sum over classes of || mean real feature - mean synthetic feature ||^2, a scalar.

    real (m, d) and synthetic (n, d) are features, their labels int64 in 0..classes-1. A class that lacks either side
    adds 0. Source: Zhao and Bilen, Dataset Condensation with Distribution Matching, arXiv 2110.04181, Eq. 4.

    >>> import torch
    >>> float(dm_loss(torch.ones(2, 3), torch.tensor([0, 0]), torch.zeros(1, 3), torch.tensor([0]), 1))
    3.0
    """
    real_sums, real_counts = class_sums(real, real_labels, classes)
    sums, counts = class_sums(synthetic, labels, classes)
    both = ((real_counts > 0) & (counts > 0)).to(synthetic)
    gap = real_sums / real_counts.clamp_min(1)[:, None] - sums / counts.clamp_min(1)[:, None]
    return (gap.square().sum(1) * both).sum()


class DistributionMatching(ddkit.Loss):
    """Squared distance between the class means of real and synthetic features, in a new random network in each step.

    On average, untrained networks should see the same features in synthetic and real images of a class. No network is trained.
    The sum grows with the number of classes and of features, so also with the image size. The mean does not, so a weight
    for the mean suits other data too. For CIFAR-10 and `convnet` (10 classes of 2,048 features) the sum is 20,480 times the mean.

    Source: Zhao and Bilen, Dataset Condensation with Distribution Matching, arXiv 2110.04181, Eq. 4.
    """

    normalise: Literal["sum", "mean"] = ddkit.option(
        "sum", "sum over classes and features, as published, or their mean, whose scale does not depend on their number"
    )

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real = step.real
        value = dm_loss(real.embeddings, real.labels, step.embeddings, step.labels, step.info.classes)
        if self.normalise == "sum":
            return value
        return value / (step.info.classes * step.embeddings.shape[1])  # of the whole set, so that parts of it add up
