"""Primal feasibility: the teacher classifies each synthetic image as its label."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

import ddkit
from ddkit_dkkt.views import Views


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
    """Cross-entropy of the teacher on the synthetic images: primal feasibility of the DeepKKT conditions.

    Source: Lee et al., Deep Support Vectors, arXiv 2403.17329, Eq. 7 (masked) and Algorithm 1 (plain).
    """

    class Options(ddkit.Options):
        masked: Annotated[bool, ddkit.Option("whether images already classified as their label count 0")] = False
        views: Views = msgspec.field(default_factory=lambda: {"default": 1.0})

    order_invariant = True

    @property
    def requires(self) -> ddkit.Requires:  # type: ignore[override]
        return ddkit.Requires(teacher=True, views=tuple(self.options.views), reduce="mean")

    def __call__(self, step: ddkit.Step) -> Tensor:
        terms = []
        for name, factor in sorted(self.options.views.items()):
            view = step.view(name)
            terms.append(factor * primal_loss(view.teacher_logits, view.labels, masked=self.options.masked))
        return torch.stack(terms).sum()
