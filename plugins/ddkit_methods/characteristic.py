"""The distance of characteristic functions of features: the loss `characteristic-function`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import ddkit
from ddkit_methods import class_pairs


def characteristic_function(x: Tensor, frequencies: Tensor) -> Tensor:
    """Returns mean over rows of exp(i t · x) at each frequency t, as real and imaginary parts (2, f), of x (n, d) and frequencies (f, d).

    >>> import torch
    >>> characteristic_function(torch.zeros(3, 2), torch.ones(1, 2)).tolist()
    [[1.0], [0.0]]
    """
    angles = frequencies @ x.T
    return torch.stack([angles.cos().mean(1), angles.sin().mean(1)])


def characteristic_distance(real: Tensor, synthetic: Tensor, frequencies: Tensor, amplitude: float, phase: float) -> Tensor:
    """Returns the mean over frequencies (f, d) of sqrt(amplitude (|a| - |b|)² + phase · 2 (|a| |b| - Re a b*)), a scalar.

    a and b are the characteristic functions of real (m, d) and synthetic (n, d). Under the root the two parts, with factors of 1, add up to
    |a - b|². Where both are 0 no gradient flows. Source: Wang et al., Dataset Distillation with Neural Characteristic Function: A Minmax
    Perspective, CVPR 2025, arXiv 2502.20653.

    >>> import torch
    >>> found = characteristic_distance(torch.zeros(2, 1), torch.full((1, 1), torch.pi), torch.ones(1, 1), 0.5, 0.5)
    >>> round(float(found) ** 2, 4)
    2.0
    """
    a, b = characteristic_function(real, frequencies), characteristic_function(synthetic, frequencies)
    by_amplitude = (a.norm(dim=0) - b.norm(dim=0)).square()
    by_phase = (a - b).square().sum(0) - by_amplitude
    return (amplitude * by_amplitude + phase * by_phase).clamp_min(1e-12).sqrt().mean()


class CharacteristicFunction(ddkit.Loss):
    """Distance between the characteristic functions of real and synthetic features of unit length, summed over classes.

    If the characteristic functions are equal, the features have the same distribution. In the paper the phases carry realism, and the
    amplitudes diversity. Frequencies are normal random numbers, drawn in each step, the same for all classes.

    Source: Wang et al., Dataset Distillation with Neural Characteristic Function: A Minmax Perspective, CVPR 2025, arXiv 2502.20653.
    """

    frequencies: int = ddkit.option(4096, "number of frequencies at which the functions are compared", ge=1)
    amplitude: float = ddkit.option(0.5, "factor of the squared difference of amplitudes", ge=0)
    phase: float = ddkit.option(0.5, "factor of the difference of phases", ge=0)

    order_invariant = True
    requires = ddkit.Requires(real=True, network=True, reduce="sum")

    def __call__(self, step: ddkit.Step) -> Tensor:
        real, synthetic = step.real, step.embeddings
        drawn = torch.randn(self.frequencies, synthetic.shape[1], generator=step.generator)
        frequencies = ddkit.nn.to_device(drawn, synthetic.device).to(synthetic.dtype)
        ours, theirs = functional.normalize(synthetic), functional.normalize(real.embeddings)
        total = 0.0 * synthetic.sum()  # attached to the graph even if no class has real images
        for own, other in class_pairs(step, ours, theirs):
            total = total + characteristic_distance(other, own, frequencies, self.amplitude, self.phase)
        return total
