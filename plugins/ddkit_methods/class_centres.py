"""Real features, classified by the centres of synthetic ones: the loss `class-centres`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

import ddkit


def centre_loss(real: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Returns the mean cross-entropy of real @ centres^T, features (m, d) and centres (K, d), against labels (m,), a scalar.

    Source: Wang et al., CAFE, CVPR 2022, arXiv 2203.01531, Eq. 5 to 7.

    >>> import torch
    >>> float(centre_loss(torch.ones(1, 2), torch.tensor([0]), torch.zeros(2, 2)).exp())
    2.0
    """
    return functional.cross_entropy(real @ centres.T, labels)


class ClassCentres(ddkit.Loss):
    """Cross-entropy of real features under a classifier whose weights are the class means of the synthetic features.

    So the synthetic images of a class move towards its real images and away from other classes, which matching of means does not
    ensure. The features are those of the step's network.

    Source: Wang et al., CAFE: Learning to Condense Dataset by Aligning Features, CVPR 2022, arXiv 2203.01531, Eq. 5 to 7.
    """

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="global")

    def __call__(self, step: ddkit.Step) -> Tensor:
        own = step.embeddings
        sums = own.new_zeros(step.info.classes, own.shape[1]).index_add(0, step.labels, own)
        counts = own.new_zeros(step.info.classes).index_add(0, step.labels, own.new_ones(len(own)))
        sums, counts = step.all_reduce([sums, counts])
        real = step.all_gather(step.real.embeddings, real=True)
        return centre_loss(real, step.real.all_labels, sums / counts[:, None])
