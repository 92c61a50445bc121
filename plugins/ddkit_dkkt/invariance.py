"""Finds the teacher's scale-invariant parameter groups, where stationarity cannot be attained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

THRESHOLD = 1e-4  # measured cosines: instance norm at most 5e-6, evaluation-mode batch norm at least 1e-3


def module_groups(names: list[str]) -> dict[str, list[str]]:
    """Returns parameter names by the module that owns them: a layer's weight and bias scale together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups


def group_cosine(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], names: list[str]) -> float:
    """Returns |cosine| of the parameters `names` and their gradient, taken as one vector; 0 for a zero gradient."""
    theta = torch.cat([parameters[name].detach().flatten() for name in names])
    gradient = torch.cat([gradients[name].flatten() for name in names])
    scale = theta.norm() * gradient.norm()
    return float((theta @ gradient).abs() / scale) if float(scale) > 0 else 0.0


def scale_invariant_groups(
    logits: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    shape: tuple[int, int, int],
    *,
    draws: int = 8,
) -> dict[str, float]:
    """Returns the groups whose gradient is orthogonal to their parameters for every random input, with the largest |cosine|.

    Scaling such a group changes no output, so <theta, grad L> = 0 and -sum lambda grad L can never point along theta.
    Tested numerically in float64, per owning module, on `draws` random images (layer types do not tell).
    """
    exact = {name: value.detach().cpu().double().requires_grad_() for name, value in parameters.items()}
    groups = module_groups(list(exact))
    largest = dict.fromkeys(groups, 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        x = torch.randn((1, *shape), generator=generator, dtype=torch.float64)
        output = logits(x, exact)
        label = torch.randint(output.shape[1], (1,), generator=generator)
        loss = functional.cross_entropy(output, label)
        found = torch.autograd.grad(loss, list(exact.values()), allow_unused=True)
        gradients = {n: torch.zeros_like(exact[n]) if g is None else g for n, g in zip(exact, found, strict=True)}
        for group, names in groups.items():
            largest[group] = max(largest[group], group_cosine(exact, gradients, names))
    return {group: value for group, value in largest.items() if value < THRESHOLD}
