"""A third-party loss for ddkit: Gram matrices of convolutional features, class by class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ddkit
from ddkit.nn import layer_features


def gram(features: Tensor) -> Tensor:
    """Returns the mean over images and places of f f^T, (C, C), f the C channels of features (n, C, H, W) at a place.

    Source: Gatys, Ecker and Bethge, A Neural Algorithm of Artistic Style, arXiv 1508.06576, Eq. 3, as a mean.

    >>> import torch
    >>> gram(torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])).tolist()
    [[5.0, 3.0], [3.0, 2.0]]
    """
    flat = features.transpose(0, 1).flatten(1)
    return flat @ flat.T / flat.shape[1]


class GramMatching(ddkit.Loss):
    """Squared distance of class-mean Gram matrices of each convolution, real to synthetic: which features come together."""

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        if network is not None and not any(isinstance(each, nn.Conv2d) for each in network.modules()):
            raise ddkit.InputError(
                "gram-matching: the network has no convolution. Use another network, e.g. --model convnet.", "network.model"
            )

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, images = step.real, step.augmented
        with torch.no_grad():
            theirs = layer_features(step.network, real.augmented, nn.Conv2d)
        total = 0.0 * images.sum()  # attached to the graph even if no class has real images
        for name, ours in layer_features(step.network, images, nn.Conv2d).items():
            for label in sorted(step.class_slices.keys() & real.class_slices.keys()):
                gap = gram(ours[step.class_slices[label]]) - gram(theirs[name][real.class_slices[label]])
                total = total + gap.square().mean()
        return total
