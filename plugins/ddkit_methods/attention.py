"""Spatial attention maps, matched layer by layer: the loss `attention-matching`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import ddkit
from ddkit.nn import layer_features
from ddkit_methods import class_pairs

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.GELU, nn.SiLU)


def attention(features: Tensor, power: float) -> Tensor:
    """Returns the unit vectors (n, h * w) of sum_c |features_c|^power, features (n, c, h, w): [DataDAM Eq. 2].

    >>> import torch
    >>> attention(torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]]), 2.0).mul(97**0.5).round().tolist()
    [[9.0, 4.0]]
    """
    return nn.functional.normalize(features.abs().pow(power).sum(1).flatten(1), dim=1)


def attention_maps(network: nn.Module, x: Tensor, power: float) -> list[Tensor]:
    """Returns the attention maps of images x (n, C, H, W) after each activation of `network` but the last; InputError if there is none."""
    found = list(layer_features(network, x, ACTIVATIONS).values())[:-1]
    maps = [attention(output, power) for output in found if output.ndim == 4]
    if not maps:
        raise ddkit.InputError(
            "attention-matching: the network needs at least two convolutional blocks with an activation. Use another network, "
            "for example --set network.model=convnet."
        )
    return maps


class AttentionMatching(ddkit.Loss):
    """Squared distance between class means of real and synthetic attention maps, over all layers of the step's network except the last.

    The map of a layer is the sum over channels of the activations to a power, at each position, as a unit vector. It shows where the
    network looks.

    Source: Sajedi et al., DataDAM: Efficient Dataset Distillation with Attention Matching, ICCV 2023, arXiv 2310.00093, Eq. 2 and 3.
    """

    power: float = ddkit.option(4.0, "exponent of the activations", gt=0)

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def initial(self, step: ddkit.Step) -> Mapping[str, Tensor]:
        attention_maps(step.network, step.images[:1].detach(), self.power)  # a network without places is refused here
        return {}

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, images = step.real, step.augmented
        with torch.no_grad():
            theirs = attention_maps(step.network, real.augmented, self.power)
        total = 0.0 * images.sum()  # attached to the graph even if no class has real images
        for ours, wanted in zip(attention_maps(step.network, images, self.power), theirs, strict=True):
            for own, other in class_pairs(step, ours, wanted):
                total = total + (own.mean(0) - other.mean(0)).square().sum()
        return total
