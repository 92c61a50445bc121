"""Sums over a whole set that is looked at in chunks of classes: they are found first, and given to every chunk afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddkit.errors import RunFailed
from ddkit.ranks import Ranks

Sums = Callable[[Sequence[Tensor]], list[Tensor]]  # what the parts of a set together have of some tensors


class Totals:
    """What one loss passes through step.totals in a step that is taken in chunks, call by call.

    Every chunk is evaluated twice: `record` adds up what each gives, and `replay` gives each what all together gave. A call may
    depend on what an earlier one returned (as when images are blended with those of other chunks): then the sums are right after
    as many passes as calls build on one another.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._known: list[list[Tensor]] = []
        self._found: list[list[Tensor]] = []
        self._call = 0

    def begin(self) -> None:
        """From now on the calls are those of another chunk."""
        self._call = 0

    def record(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Adds a chunk's tensors; returns the sums as far as a pass before has found them, else the tensors themselves."""
        own = [tensor.detach() for tensor in tensors]
        if self._call == len(self._found):
            self._found.append([tensor.clone() for tensor in own])
        else:
            sums = self._found[self._call]
            if [tensor.shape for tensor in sums] != [tensor.shape for tensor in own]:
                raise RunFailed(
                    f"The loss '{self.label}' gives step.total tensors whose shapes differ between parts of the set. A total adds them up, "
                    "so they have the shape that the whole set's has; rows go through step.gather."
                )
            torch._foreach_add_(sums, own)
        self._call += 1
        return self._known[self._call - 1] if self._call <= len(self._known) else own

    def settle(self, ranks: Ranks) -> bool:
        """Ends a pass over all chunks: its sums, over all processes, are known from now on. Returns whether they were known already."""
        found = [ranks.sums(sums, self.label) for sums in self._found]
        same = len(found) == len(self._known) and all(map(_alike, found, self._known))
        self._known, self._found = found, []
        return same

    def replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums of the call at hand."""
        self._call += 1
        return [sums.clone() for sums in self._known[self._call - 1]]


def _alike(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors differ by no more than a device that adds up in another order each time.

    What is not finite does: the step tells of it afterwards.
    """
    shapes = [tensor.shape for tensor in ones] == [tensor.shape for tensor in others]
    return shapes and not any(bool((a - b).norm() > 1e-4 * b.norm()) for a, b in zip(ones, others, strict=True))
