"""Which output of a teacher is which class of the data: by their names, and by trying it on real images."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SURE = 3.0  # standard errors


def by_name(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Returns for each class of the data the output that `names` call so, None if one has no output, or a name stands there twice.

    >>> by_name(["dog", "owl", "cat"], ["cat", "dog", "owl"]), by_name(["dog", "owl", "cat"], ["cat", "dog"])
    ([2, 0, 1], [2, 0])
    """
    known = set(classes) <= set(names) and len(set(names)) == len(names)
    return [list(names).index(name) for name in classes] if known else None


def are_proof(names: Sequence[str] | None, classes: Sequence[str]) -> bool:
    """Whether `names` of outputs tell which class each of them is: all of the data's are among them, and some are no numbers."""
    return names is not None and by_name(names, classes) is not None and not all(name.isdecimal() for name in names)


def bring_into_order(module: nn.Module, order: Sequence[int]) -> None:
    """Makes output k of `module` the one that was output order[k], for whoever calls it; its state dict stays as it is.

    Outputs that `order` leaves out are gone.
    """
    module.register_forward_hook(partial(_reordered, torch.tensor(order, device=next(module.parameters()).device)))


def _reordered(order: Tensor, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    return logits.index_select(1, order.to(logits.device))


def fitting(labels: Tensor, found: Tensor, classes: int) -> Tensor | None:
    """Returns (K,) for each class the output that says it, if that fits better than output k for class k; None if it does not.

    labels (n,): the classes of images, in ascending order; found (n,): the largest outputs. Each half of the images is judged by the order
    that fits the other half. The order is better if the images that it alone has right are more than those that it alone has wrong, by SURE
    standard errors.

    >>> labels = torch.arange(3).repeat_interleave(6)
    >>> fitting(labels, torch.tensor([1, 0, 2])[labels], 3)
    tensor([1, 0, 2])
    >>> fitting(labels, labels, 3)
    """
    if len(labels) < 2 * classes:
        return None
    halves = [slice(0, None, 2), slice(1, None, 2)]
    gained = lost = 0
    for known, other in (halves, halves[::-1]):
        said = _assigned(labels[known], found[known], classes)[labels[other]] == found[other]
        plain = labels[other] == found[other]
        gained += int((said & ~plain).sum())
        lost += int((plain & ~said).sum())
    better = gained > lost and gained - lost >= SURE * (gained + lost) ** 0.5
    return _assigned(labels, found, classes) if better else None


def _assigned(labels: Tensor, found: Tensor, classes: int) -> Tensor:
    """Returns (K,) an output of its own for each class, so that as many images as possible are right; where that is open, its own."""
    from scipy.optimize import linear_sum_assignment

    counts = torch.bincount(labels * classes + found, minlength=classes * classes).view(classes, classes)
    return torch.from_numpy(linear_sum_assignment((counts + 0.5 * torch.eye(classes)).numpy(), maximize=True)[1])


def as_flag(names: Sequence[str]) -> str:
    """Returns the flag that says which class each output is, for a shell."""
    written = json.dumps(list(names), ensure_ascii=False, separators=(",", ":"))  # without a space a line of the terminal does not cut it
    return f"--set {shlex.quote(f'teacher.classes={written}')}"
