"""A third-party loss for ddkit: the sliced Wasserstein distance of features, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

import ddkit


def sliced_distance(real: Tensor, synthetic: Tensor, directions: Tensor) -> Tensor:
    """Returns the mean over directions of the squared 2-Wasserstein distance of features along each, a scalar.

    real (m, d) and synthetic (n, d) are features of one class, directions (d, L) unit vectors. Along a line the i-th smallest of n values
    goes to the (i + 1/2) / n quantile of the real ones. Source: Bonneel et al., Sliced and Radon Wasserstein Barycenters of Measures, 2015.

    >>> import torch
    >>> float(sliced_distance(torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [0.0]]), torch.tensor([[1.0]])))
    2.5
    """
    ours = (synthetic @ directions).sort(dim=0).values
    places = (torch.arange(len(ours), dtype=real.dtype, device=real.device) + 0.5) / len(ours) * len(real) - 0.5
    theirs = (real @ directions).sort(dim=0).values
    below = places.floor().long().clamp(0, len(real) - 1)
    above = (below + 1).clamp(max=len(real) - 1)
    share = (places - below).clamp(0, 1)[:, None]
    return (ours - torch.lerp(theirs[below], theirs[above], share)).square().mean(0).mean()


class SlicedWasserstein(ddkit.Loss):
    """Squared sliced Wasserstein distance of features, real to synthetic, summed over classes: where dm compares means, all quantiles."""

    directions: int = ddkit.option(64, "random directions a step", ge=1)

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, synthetic = step.real, step.embeddings
        drawn = torch.randn((synthetic.shape[1], self.directions), generator=step.generator).to(synthetic)
        drawn = torch.nn.functional.normalize(drawn, dim=0)
        total = 0.0 * synthetic.sum()  # attached to the graph even if no class has real images
        for label in sorted(step.class_slices.keys() & real.class_slices.keys()):
            ours, theirs = synthetic[step.class_slices[label]], real.embeddings[real.class_slices[label]]
            total = total + sliced_distance(theirs, ours, drawn)
        return total
