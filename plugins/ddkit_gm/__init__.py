"""Gradient matching: the loss `gm`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

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


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """Puts the network, which other losses share, in evaluation mode inside and back afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield network
    finally:
        for module, mode in modes.items():
            module.training = mode


class GradientMatching(ddkit.Loss):
    """Distance of the network gradients of real and synthetic images, class by class, on the network of the step.

    A network that is trained on the set is to take the steps that it would take on the real images.

    Source: Zhao, Mopuri and Bilen, Dataset Condensation with Gradient Matching, ICLR 2021, arXiv 2006.05929, Algorithm 1.
    """

    distance: Literal["layer-cosine", "mse", "cosine"] = ddkit.option("layer-cosine", "layer-wise cosine is the original's")

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, second_order=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        terms, real = [], step.real
        with _evaluating(step.network) as network:  # the running statistics of batch norm stay as they are
            parameters = list(network.parameters())
            for label, ours in step.class_slices.items():
                theirs = real.class_slices.get(label)
                if theirs is None:  # nothing to match: 0, as in distribution matching
                    terms.append(step.images[ours].sum() * 0)
                    continue
                loss = functional.cross_entropy(network(real.augmented[theirs].detach()), real.labels[theirs])
                wanted = torch.autograd.grad(loss, parameters)
                loss = functional.cross_entropy(network(step.augmented[ours]), step.labels[ours])
                terms.append(gradient_distance(wanted, torch.autograd.grad(loss, parameters, create_graph=True), self.distance))
        return torch.stack(terms).sum()
