"""A third-party loss for ddkit: spatial attention maps of every layer but the last, as in DataDAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ddkit

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.GELU, nn.SiLU)


def attention(features: Tensor, power: float) -> Tensor:
    """Returns the unit vectors (n, h * w) of sum_c |features_c|^power, features (n, c, h, w): [DataDAM Eq. 2].

    >>> import torch
    >>> attention(torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]]), 2.0).mul(97**0.5).round().tolist()
    [[9.0, 4.0]]
    """
    return nn.functional.normalize(features.abs().pow(power).sum(1).flatten(1), dim=1)


def attention_maps(network: nn.Module, x: Tensor, power: float) -> list[Tensor]:
    """Returns the attention maps of images x (n, C, H, W) after each activation of `network` but the last."""
    found: list[Tensor] = []
    layers = [each for each in network.modules() if isinstance(each, ACTIVATIONS)][:-1]
    hooks = [each.register_forward_hook(lambda module, inputs, output: found.append(output)) for each in layers]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [attention(output, power) for output in found if output.ndim == 4]
    if not maps:
        raise ddkit.RunFailed("attention-matching: the network has no two activations over places; use a convolutional one.")
    return maps


class AttentionMatching(ddkit.Loss):
    """Squared distance of class-mean spatial attention maps, real to synthetic, over the layers of the step's network."""

    power: float = ddkit.option(4.0, "exponent of the activations", gt=0)

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, images, power = step.real, step.augmented, self.power
        with torch.no_grad():
            theirs = attention_maps(step.network, real.augmented, power)
        total = 0.0 * images.sum()  # attached to the graph even where no class has real images
        for ours, wanted in zip(attention_maps(step.network, images, power), theirs, strict=True):
            for label in sorted(step.class_slices.keys() & real.class_slices.keys()):
                gap = ours[step.class_slices[label]].mean(0) - wanted[real.class_slices[label]].mean(0)
                total = total + gap.square().sum()
        return total
