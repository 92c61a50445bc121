"""Finds the teacher's scale-invariant parameter groups, where stationarity cannot be attained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

Logits = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
# The normalisation's epsilon leaves a cosine that shrinks as 1 / scale^2 when the group is scaled up: measured up to 2e-3 at
# scale 1 and 2e-5 at 10 (gamma and beta of a late block), while groups of batch-norm and norm-free teachers stay above 1e-3 at both.
CANDIDATE, SCALE, THRESHOLD = 1e-2, 10.0, 1e-4
DRAWS = 8  # random images and labels


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


def scale_invariant_groups(logits: Logits, parameters: Mapping[str, Tensor], shape: tuple[int, int, int]) -> dict[str, float]:
    """Returns the groups whose gradient is orthogonal to their parameters for every random input, with the largest |cosine|.

    Scaling such a group changes no output, so <theta, grad L> = 0 and -sum lambda grad L can never point along theta.
    Tested numerically in float64, per owning module, on DRAWS random images (layer types do not tell): the |cosine| is
    below CANDIDATE, and below THRESHOLD once the group is scaled by SCALE, which takes out the normalisation's epsilon.
    """
    exact = {name: value.detach().cpu().double() for name, value in parameters.items()}
    groups = module_groups(list(exact))
    found = {}
    for group, value in _largest(logits, exact, groups, shape).items():
        names = groups[group]
        scaled = exact | {name: SCALE * exact[name] for name in names}
        if value < CANDIDATE and _largest(logits, scaled, {group: names}, shape)[group] < THRESHOLD:
            found[group] = value
    return found


def _largest(
    logits: Logits, parameters: Mapping[str, Tensor], groups: Mapping[str, list[str]], shape: tuple[int, int, int]
) -> dict[str, float]:
    """Returns the largest |cosine| of each group and its gradient over DRAWS random images and labels."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    wanted = {name: leaves[name] for names in groups.values() for name in names}
    largest = dict.fromkeys(groups, 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        x = torch.randn((1, *shape), generator=generator, dtype=torch.float64)
        output = logits(x, leaves)
        label = torch.randint(output.shape[1], (1,), generator=generator)
        gradients = torch.autograd.grad(
            functional.cross_entropy(output, label), list(wanted.values()), allow_unused=True, materialize_grads=True
        )
        by_name = dict(zip(wanted, gradients, strict=True))
        for group, names in groups.items():
            largest[group] = max(largest[group], group_cosine(leaves, by_name, names))
    return largest
