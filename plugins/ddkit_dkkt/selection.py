"""`multiplier`: the accessible real images that carry the teacher, by the multipliers of the DeepKKT conditions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

import ddkit
from ddkit_dkkt.stationarity import included_parameters

log = logging.getLogger("ddkit")
Vector = NDArray[np.float64]
BLOCK_MIB = 256  # gradients kept at once, twice
GAP = 1e-6  # of the largest right-hand side: where the solver stops


class Solution(NamedTuple):
    """Multipliers (m,) >= 0, each image's share lambda |g|, and its slack <g, theta - sum lambda g> / |g|."""

    multipliers: Vector
    shares: Vector
    slack: Vector


def nonnegative_solution(gram: Vector, right: Vector, *, sweeps: int) -> tuple[Vector, float]:
    """Returns (x, remaining gap): x >= 0 that minimises x' gram x / 2 - right' x, by coordinate descent.

    gram (m, m) positive semidefinite with a diagonal of ones, or zero where x is to stay 0; right (m,). It stops where the optimality
    conditions hold to GAP times the largest |right|: the gradient is 0 where x > 0, and not negative elsewhere.
    """
    x, gradient = np.zeros_like(right), -right
    scale, left = float(np.abs(right).max(initial=0.0)) or 1.0, 0.0
    free = np.flatnonzero(np.diag(gram) > 0)
    for _ in range(sweeps):
        left = float(np.abs(np.minimum(x, gradient))[free].max(initial=0.0)) / scale
        if left <= GAP:
            break
        for i in free:
            moved = max(0.0, x[i] - gradient[i]) - x[i]
            if moved:
                x[i] += moved
                gradient += moved * gram[i]
    return x, left


def solve(gram: Vector, right: Vector, *, sweeps: int) -> Solution:
    """Returns the multipliers lambda >= 0 that minimise || theta - sum_i lambda_i g_i ||^2.

    gram (m, m) holds <g_i, g_j>, right (m,) <g_i, theta>. Solved for the shares lambda_i |g_i|, whose problem has a diagonal of ones:
    the gradient of an image that the teacher is sure of is tiny, and its multiplier huge.
    """
    lengths = np.sqrt(np.diag(gram))
    usable = lengths > 1e-12 * lengths.max(initial=0.0)
    inverse = np.where(usable, 1.0 / np.where(usable, lengths, 1.0), 0.0)
    scaled = gram * inverse[:, None] * inverse[None, :]
    shares, left = nonnegative_solution(scaled, right * inverse, sweeps=sweeps)
    if left > GAP:
        log.warning("multiplier: after %d sweeps the optimality conditions hold to %.1g only. Raise initializer.sweeps.", sweeps, left)
    return Solution(shares * inverse, shares, right * inverse - scaled @ shares)


def gram_matrix(gradients: Callable[[range], Tensor], target: Tensor, count: int, block: int) -> tuple[Vector, Vector]:
    """Returns (<g_i, g_j>, <g_i, target>) of `count` vectors, of which `gradients(rows)` gives `block` at a time, (rows, P)."""
    gram, right = np.zeros((count, count)), np.zeros(count)
    parts = [range(first, min(first + block, count)) for first in range(0, count, block)]
    for number, rows in enumerate(parts):
        one = gradients(rows)
        right[rows.start : rows.stop] = (one @ target).double().cpu().numpy()
        for others in parts[number:]:
            two = one if others is rows else gradients(others)
            inner = (one @ two.T).double().cpu().numpy()
            gram[rows.start : rows.stop, others.start : others.stop] = inner
            gram[others.start : others.stop, rows.start : rows.stop] = inner.T
    return gram, right


def negative_gradients(teacher: ddkit.nn.Teacher, names: Sequence[str], images: Tensor, labels: Tensor) -> Tensor:
    """Returns -grad_theta L(Phi(x_i; theta), y_i), (n, P), of normalised images (n, C, H, W) one by one, theta being `names`."""
    leaves = {name: value.detach().requires_grad_() for name, value in teacher.parameters.items()}
    wanted, device = [leaves[name] for name in names], next(iter(leaves.values())).device
    rows = []
    for image, label in zip(images.to(device), labels.to(device), strict=True):
        loss = functional.cross_entropy(teacher.logits(image[None], leaves), label[None])
        parts = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        rows.append(-torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


class Multiplier(ddkit.Initializer):
    """Accessible real images with the highest multipliers in the DeepKKT conditions, on which the teacher depends most.

    The images are not changed, and the multipliers are the exact minimum of || theta - sum_i lambda_i g_i ||^2 over lambda >= 0, with
    g_i = -grad L(Phi(x_i; theta), y_i): stationarity and dual feasibility of Lee et al., Deep Support Vectors, arXiv 2403.17329,
    Eq. 6, with the squared distance of Algorithm 1. Up to their scale they also minimise the cosine distance: the nearest point of a
    cone has the smallest angle. Parameters of scale-invariant layers are left out, as in `dkkt-stationarity`.
    """

    requires = ddkit.Requires(real=True, teacher=True)
    deviations = {"a-class-does-not-depend-on-others": "the parameters of the teacher are one sum over the images of all classes"}

    rank: Literal["multiplier", "share"] = ddkit.option(
        "multiplier", "value by which images are chosen: lambda, or lambda |g|, the length of the image's part in the sum"
    )
    parameters: str = ddkit.option(
        "all", "parameters of the teacher: all, weights (no biases or norms), classifier (the last layer), or a name pattern"
    )
    scale_invariant: Literal["skip", "keep"] = ddkit.option("skip", "whether scale-invariant parameter groups are skipped or kept")
    candidates: int = ddkit.option(100, "largest number of images per class that take part, drawn by the seed, at least ipc", ge=1)
    sweeps: int = ddkit.option(2000, "largest number of passes over all multipliers", ge=1)

    def needed(self, ipc: int) -> int:
        return ipc

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        teacher, rows = start.teacher, self._candidates(start)
        images, labels = start.real_images[rows], start.real_labels[rows]
        names = included_parameters(teacher, start.shape, self.parameters, skip=self.scale_invariant == "skip", who="multiplier")
        theta = torch.cat([teacher.parameters[name].detach().flatten() for name in names])

        def gradients(part: range) -> Tensor:
            return negative_gradients(teacher, names, images[part.start : part.stop], labels[part.start : part.stop])

        gram, right = gram_matrix(gradients, theta, len(labels), max(1, BLOCK_MIB * 2**20 // (4 * len(theta))))
        found = solve(gram, right, sweeps=self.sweeps)
        norm = math.sqrt(max(float(found.multipliers @ gram @ found.multipliers), 0.0)) * float(theta.double().norm())
        cosine = float(found.multipliers @ right) / norm if norm > 0 else 0.0
        log.info(
            "multiplier: %d of %d multipliers are positive; cosine of the sum and the teacher's parameters %.3f.",
            int((found.multipliers > 0).sum()), len(labels), cosine,
        )  # fmt: skip
        score = found.multipliers if self.rank == "multiplier" else found.shares
        chosen = []
        for label, count in zip(*start.labels.unique(return_counts=True), strict=True):
            own = (labels == label).nonzero().flatten().numpy()
            order = np.lexsort((own, -found.slack[own], -score[own]))  # the last key first: score, then what would come in next
            chosen.append(torch.from_numpy(np.sort(own[order[: int(count)]])))
        return images[torch.cat(chosen)]

    def _candidates(self, start: ddkit.InitContext) -> Tensor:
        """Returns rows of the real images, ascending: at most `candidates` of each class."""
        kept = []
        for label, count in zip(*start.labels.unique(return_counts=True), strict=True):
            own = (start.real_labels == label).nonzero().flatten()
            most = max(self.candidates, int(count))
            order = torch.randperm(len(own), generator=start.generator(int(label)))[:most]
            kept.append(own[order.sort().values])
        return torch.cat(kept)
