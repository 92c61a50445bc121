"""Class means of the features of every layer: the loss `layer-means`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ddkit
from ddkit.nn import layer_features
from ddkit_methods import class_pairs
from ddkit_methods.attention import ACTIVATIONS


def mean_gap(real: Tensor, synthetic: Tensor) -> Tensor:
    """Returns the squared distance of the mean of real (m, ...) to that of synthetic (n, ...), a scalar.

    Source: Wang et al., CAFE, CVPR 2022, arXiv 2203.01531, Eq. 3, for one class and layer.

    >>> float(mean_gap(torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]])))
    9.0
    """
    return (real.mean(0) - synthetic.mean(0)).square().sum()


class LayerMeans(ddkit.Loss):
    """Squared distance between class means of real and synthetic features after each activation, summed over classes.

    The features are those of the step's network. The loss `dm` compares the last features in the same way.

    Source: Wang et al., CAFE: Learning to Condense Dataset by Aligning Features, CVPR 2022, arXiv 2203.01531, Eq. 3.
    """

    shallow: float = ddkit.option(0.1, "factor of all activations except the last", ge=0)

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        if network is not None and not any(isinstance(each, ACTIVATIONS) for each in network.modules()):
            names = ", ".join(each.__name__ for each in ACTIVATIONS)
            raise ddkit.InputError(
                f"layer-means: the network has no activation ({names}). Use another network, e.g. --model convnet.", "network.model"
            )

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, images = step.real, step.augmented
        with torch.no_grad():
            theirs = list(layer_features(step.network, real.augmented, ACTIVATIONS).values())
        ours = list(layer_features(step.network, images, ACTIVATIONS).values())
        factors = [self.shallow] * (len(ours) - 1) + [1.0]
        total = 0.0 * images.sum()  # attached to the graph even if no class has real images
        for factor, own, wanted in zip(factors, ours, theirs, strict=True):
            for mine, other in class_pairs(step, own, wanted):
                total = total + factor * mean_gap(other, mine)
        return total
