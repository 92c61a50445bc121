"""How the network of a step classifies the synthetic images: the loss `classification`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import ddkit


def class_cross_entropy(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns sum over classes of the mean cross-entropy of a class's logits (n, K), labels (n,) int64, a scalar.

    >>> import torch
    >>> float(class_cross_entropy(torch.zeros(3, 2), torch.tensor([0, 0, 1]), 2).exp())  # log 2 for each class
    4.0
    """
    counts = labels.new_zeros(classes).index_add(0, labels, torch.ones_like(labels))
    return (functional.cross_entropy(logits, labels, reduction="none") / counts[labels]).sum()


class Classification(ddkit.Loss):
    """Cross-entropy of the synthetic images in the step's network, times that network's accuracy on real images, summed over classes.

    It keeps the classes apart, while matched features may be among those of another class. The weight of a network is its accuracy:
    small for an untrained one, and larger for a trained one.

    Source: Zhao et al., Improved Distribution Matching for Dataset Condensation, CVPR 2023, arXiv 2307.09742, Section 4.3, whose accuracy
    is the mean over the batches of the network's training; here it is measured on real images of the step, which may be new to the network.
    """

    judges: int = ddkit.option(
        16, "number of real images per class, without augmentation, for the accuracy of the network, at most those of a step", ge=1
    )

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="global")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real = step.real
        rows = [index for each in real.class_slices.values() for index in range(each.start, min(each.stop, each.start + self.judges))]
        with torch.no_grad():
            found = step.network(real.images[rows]).argmax(1) == real.labels[rows]
        synthetic = class_cross_entropy(step.network(step.augmented), step.labels, step.info.classes)
        right, judged = step.all_reduce(torch.stack([found.sum(), synthetic.new_tensor(len(rows))]).to(synthetic))
        accuracy = right / judged.clamp_min(1)
        step.log("accuracy", accuracy)
        return accuracy * step.all_reduce(synthetic)
