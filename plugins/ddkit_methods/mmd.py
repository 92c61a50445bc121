"""The maximum mean discrepancy of features: the loss `mmd`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import ddkit
from ddkit_methods import class_pairs


def gaussian_kernel(x: Tensor, scales: int) -> Tensor:
    """Returns the sums of `scales` Gaussians (n, n) of the distances of the rows of x (n, d), n at least 2.

    exp(-|x_i - x_j|² / (2^s w)) for s = -(scales // 2), ..., w the mean of |x_i - x_j|² over i != j, through which no gradient flows.

    >>> import torch
    >>> gaussian_kernel(torch.tensor([[0.0], [2.0]]), 1)[0, 1].log().item()
    -1.0
    """
    centred = x - x.mean(0)  # the distances are the same, and rounded less
    squares = centred.square().sum(1)
    distances = (squares[:, None] + squares - 2 * centred @ centred.T).clamp_min(0)
    width = distances.detach().sum() / (len(x) * (len(x) - 1))
    exponents = torch.arange(scales, dtype=x.dtype, device=x.device) - scales // 2
    return torch.exp(-distances / (width.clamp_min(1e-12) * 2.0 ** exponents[:, None, None])).sum(0)


def squared_mmd(real: Tensor, synthetic: Tensor, kernel: str = "gaussian", scales: int = 5) -> Tensor:
    """Returns mean k(r, r') - 2 mean k(r, s) + mean k(s, s'), a scalar, over all rows of real (m, d) and synthetic (n, d).

    "gaussian" is `gaussian_kernel` over both sides, "linear" the inner product, which leaves the squared distance of the means. Source:
    Gretton et al., A Kernel Two-Sample Test, JMLR 2012, Eq. 5 (the biased estimate), as in Zhang et al., M3D, arXiv 2312.15927.

    >>> import torch
    >>> float(squared_mmd(torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]]), "linear"))
    9.0
    """
    if kernel == "linear":
        return (real.mean(0) - synthetic.mean(0)).square().sum()
    found = gaussian_kernel(torch.cat([real, synthetic]), scales)
    m = len(real)
    return found[:m, :m].mean() - 2 * found[:m, m:].mean() + found[m:, m:].mean()


class MaximumMeanDiscrepancy(ddkit.Loss):
    """Squared maximum mean discrepancy between real and synthetic features of the step's network, summed over classes.

    With the Gaussian kernel it is 0 only if the features have the same distribution, with all moments, while `dm` compares means.
    With the linear kernel it is `dm`.

    Source: Zhang et al., M3D: Dataset Condensation by Minimizing Maximum Mean Discrepancy, AAAI 2024, arXiv 2312.15927.
    """

    kernel: Literal["gaussian", "linear"] = ddkit.option(
        "gaussian", "kernel: gaussian compares all moments of the features, linear only their means"
    )
    scales: int = ddkit.option(5, "number of Gaussians, with widths that double, around the mean squared distance", ge=1, le=20)

    order_invariant = True
    deviations = {
        "gradcheck-in-float64": "the width of the Gaussians follows the features, and no gradient flows through it, as in the paper's code"
    }
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, synthetic = step.real, step.embeddings
        total = 0.0 * synthetic.sum()  # attached to the graph even if no class has real images
        for ours, theirs in class_pairs(step, synthetic, real.embeddings):
            total = total + squared_mmd(theirs, ours, self.kernel, self.scales)
        return total
