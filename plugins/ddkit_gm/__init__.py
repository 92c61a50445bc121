"""Gradient matching: the loss `gm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

import ddkit

EPSILON = 1e-6  # of the public code's cosine


def layer_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """Returns the sum over output channels of 1 - cosine of two weight gradients (out, ...); 0 for biases and norms."""
    if real.ndim < 2:
        return synthetic.sum() * 0
    a, b = real.flatten(1), synthetic.flatten(1)
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)).sum()


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor], distance: str) -> Tensor:
    """Returns the distance of two lists of gradients (same shapes), a scalar.

    "layer-cosine" sums layer_distance over the tensors; "mse" is the squared distance and "cosine" one minus the cosine
    of the concatenated vectors. Source: Zhao, Mopuri and Bilen, Dataset Condensation with Gradient Matching, ICLR 2021.
    """
    if distance == "layer-cosine":
        return torch.stack([layer_distance(a, b) for a, b in zip(real, synthetic, strict=True)]).sum()
    a, b = (torch.cat([g.flatten() for g in side]) for side in (real, synthetic))
    if distance == "mse":
        return (a - b).square().sum()
    return 1 - (a * b).sum() / (a.norm() * b.norm() + EPSILON)


class GradientMatching(ddkit.Loss):
    """Distance between the gradients of real and synthetic images, class by class, in the network of the step.

    So a network trained on the set takes the same steps as on the real images.

    Source: Zhao, Mopuri and Bilen, Dataset Condensation with Gradient Matching, ICLR 2021, arXiv 2006.05929, Algorithm 1.
    """

    distance: Literal["layer-cosine", "mse", "cosine"] = ddkit.option(
        "layer-cosine", "distance of two gradients; layer-cosine is that of the paper"
    )
    kernels: bool = ddkit.option(
        False, "whether only the kernels of convolutions are compared, as in IDC, and no linear layers, biases or norms"
    )

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, second_order=True, reduce="sum")

    def initial(self, step: ddkit.Step) -> Mapping[str, Tensor]:
        if not self._compared(step.network, list(step.network.parameters())):
            raise ddkit.InputError(
                f"{self.recipe_path}.kernels compares the kernels of convolutions, but the network has none. Use another network, e.g. "
                f"--set network.model=convnet, or --set {self.recipe_path}.kernels=false.",
                f"{self.recipe_path}.kernels",
            )
        return {}

    def __call__(self, step: ddkit.Step) -> Tensor:
        network, real, terms = step.network, step.real.class_gradients, []
        for label, synthetic in step.class_gradients.items():
            if label in real:
                terms.append(gradient_distance(self._compared(network, real[label]), self._compared(network, synthetic), self.distance))
            else:  # nothing to match: 0, as in distribution matching
                terms.append(step.images[step.class_slices[label]].sum() * 0)
        return torch.stack(terms).sum()

    def _compared(self, network: nn.Module, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns those of the gradients, one for each parameter of the network, that are compared."""
        if not self.kernels:
            return gradients
        kernels = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.modules.conv._ConvNd)}
        return [each for each, parameter in zip(gradients, network.parameters(), strict=True) if id(parameter) in kernels]
