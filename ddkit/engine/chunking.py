"""Sums over a whole set that is looked at in chunks of classes: they are found first, and given to every chunk afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddkit.distributed import Ranks
from ddkit.errors import RunFailed

Sums = Callable[[Sequence[Tensor]], list[Tensor]]  # what the parts of a set together have of some tensors
NEARLY = 1e-4  # how far apart sums may be that a device adds up in another order each time, of the parts' norms


class Totals:
    """What one loss passes through step.totals in a step that is taken in chunks, call by call.

    Every chunk is evaluated at least twice: `record` adds up what each gives, and `replay` gives each what all together gave. A call
    may depend on what an earlier one returned (as when images are blended with those of other chunks): then the sums are right after
    as many passes of `record` as calls build on one another. `held` tells whether they were.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._known: list[list[Tensor]] = []  # of all parts, after the last pass
        self._given: list[list[Tensor]] = []  # of this process's chunks, in the last pass
        self._found: list[list[Tensor]] = []  # likewise, in this pass
        self._sizes: list[Tensor] = []  # the norms of the chunks' tensors, added up
        self._call = 0

    def begin(self) -> None:
        """From now on the calls are those of another chunk."""
        self._call = 0

    def record(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Adds a chunk's tensors; returns the sums as far as a pass before has found them, else the tensors themselves."""
        own = self._add(tensors)
        sums = self._known[self._call - 1] if self._call <= len(self._known) else own
        return [tensor.clone() for tensor in sums]

    def replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums of the call at hand; adds the chunk's tensors too, to see whether they are those of the last pass."""
        self._add(tensors)
        return self._sums()

    def known(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums of the call at hand, for a chunk that is evaluated once more: its tensors are counted already."""
        self._call += 1
        return self._sums()

    def _sums(self) -> list[Tensor]:
        if self._call > len(self._known):
            raise RunFailed(f"The loss '{self.label}' calls step.total more often with the totals of the set than it did without them.")
        return [tensor.clone() for tensor in self._known[self._call - 1]]

    def settle(self, ranks: Ranks) -> None:
        """Ends a pass over all chunks: its sums, over all processes, are known from now on."""
        self._known = [ranks.sums(sums, self.label) for sums in self._found]
        self._given, self._found, self._sizes = self._found, [], []

    def held(self, *, exactly: bool) -> bool:
        """Whether the chunks gave in this pass what they gave in the last one, `exactly` or nearly; nan is nan."""
        if len(self._found) != len(self._given):
            return False
        pairs = zip(self._found, self._given, self._sizes, strict=True)
        return all(_equal(ones, others) or (not exactly and _near(ones, others, size)) for ones, others, size in pairs)

    def _add(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        own = [tensor.detach() for tensor in tensors]
        if self._call == len(self._found):
            self._found.append([tensor.clone() for tensor in own])
            self._sizes.append(_norm(own))
        else:
            sums = self._found[self._call]
            if [tensor.shape for tensor in sums] != [tensor.shape for tensor in own]:
                raise RunFailed(
                    f"The loss '{self.label}' gives step.total tensors whose shapes differ between parts of the set. A total adds them up, "
                    "so they have the shape that the whole set's has; rows go through step.gather."
                )
            self._found[self._call] = [one + other for one, other in zip(sums, own, strict=True)]
            self._sizes[self._call] = self._sizes[self._call] + _norm(own)
        self._call += 1
        return own


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def _equal(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in zip(ones, others, strict=True))


def _near(ones: Sequence[Tensor], others: Sequence[Tensor], size: Tensor) -> bool:
    return bool(_norm([a.double() - b.double() for a, b in zip(ones, others, strict=True)]) <= NEARLY * size)
