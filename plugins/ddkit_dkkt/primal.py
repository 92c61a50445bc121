"""Primal feasibility: the teacher classifies each synthetic image as its label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import ddkit

VIEWS = "views on which the loss is evaluated, each with a factor above 0"  # below 0 a loss would lead away from what it asks for


def primal_loss(logits: Tensor, labels: Tensor, *, masked: bool) -> Tensor:
    """Returns the mean cross-entropy of logits (n, K) against labels (n,), a scalar.

    masked: rows already classified as their label count 0 (and stay in the mean): [D Eq. 7]; without it, plain
    cross-entropy: Algorithm 1 of [D]. Source: Lee et al., Deep Support Vectors, arXiv 2403.17329.

    >>> import torch
    >>> float(primal_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), masked=True))
    0.0
    """
    values = functional.cross_entropy(logits, labels, reduction="none")
    if masked:
        values = values * (logits.argmax(1) != labels)
    return values.mean()


class Primal(ddkit.Loss):
    """Cross-entropy of the teacher on the synthetic images, which is primal feasibility in the DeepKKT conditions.

    Source: Lee et al., Deep Support Vectors, arXiv 2403.17329, Eq. 7 (masked) and Algorithm 1 (plain).
    """

    masked: bool = ddkit.option(False, "whether an image that the teacher classifies correctly counts 0")
    views: dict[str, float] = ddkit.option({"default": 1.0}, VIEWS, gt=0, min_length=1)

    order_invariant = True

    def requires(self) -> ddkit.Requires:
        return ddkit.Requires(teacher=True, views=tuple(self.views), reduce="mean")

    def __call__(self, step: ddkit.Step) -> Tensor:
        terms = []
        for name, factor in sorted(self.views.items()):
            view = step.view(name)
            terms.append(factor * primal_loss(view.teacher_logits, view.labels, masked=self.masked))
        return torch.stack(terms).sum()
