"""A set that is looked at in chunks of classes: which losses see which chunk, and sums over the whole of it.

What a loss passes through step.all_reduce is added up in a first pass over all chunks, and given to every chunk in the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddkit.distributed import Ranks
from ddkit.engine.losses import WeightedLoss
from ddkit.errors import RunFailed

Exchange = Callable[[Sequence[Tensor]], list[Tensor]]  # gives of some tensors of a part what all parts of the set together have
Part = tuple[range | None, list[WeightedLoss]]  # classes (None: the whole set of this process), and the losses that see them at once
NEARLY = 1e-4  # how far apart the sums of two passes may be, of the parts' norms: a device may add up in another order each time


def parts_of(losses: Sequence[WeightedLoss], chunk: int, classes: range) -> list[Part]:
    """Returns the parts in which a set of `classes` is looked at: `chunk` classes (0: all) at once for losses with `reduce`."""
    reducible = [each for each in losses if each.requires.reduce is not None]
    if not chunk or not reducible:
        return [(None, list(losses))]
    whole: list[Part] = [(None, [each for each in losses if each.requires.reduce is None])]
    chunks: list[Part] = [(range(first, min(first + chunk, classes.stop)), reducible) for first in classes[::chunk]]
    return (whole if whole[0][1] else []) + chunks


class Sums:
    """What one loss passes through step.all_reduce in the chunks of one step, call by call."""

    def __init__(self, weighted: WeightedLoss) -> None:
        self.weighted = weighted
        self._whole: list[list[Tensor]] | None = None  # the sums over all parts, known after the first pass
        self._first: list[list[Tensor]] = []  # of this process's chunks, in the first pass
        self._found: list[list[Tensor]] = []  # of them in the pass at hand
        self._sizes: list[Tensor] = []  # the norms of the chunks' tensors, added up

    def calls(self, *, counted: bool = True) -> Exchange:
        """Returns the exchange for one evaluation of the loss; not `counted` where its chunk is evaluated once more."""
        numbers = itertools.count()

        def exchange(tensors: Sequence[Tensor]) -> list[Tensor]:
            call, own = next(numbers), [tensor.detach() for tensor in tensors]
            if counted:
                self._add(call, own)
            if self._whole is None:
                return [tensor.clone() for tensor in own]
            if call >= len(self._whole):
                raise RunFailed(dependent_sums(self.weighted))
            return [tensor.clone() for tensor in self._whole[call]]

        return exchange

    def _add(self, call: int, own: list[Tensor]) -> None:
        if call == len(self._found):
            self._found.append([tensor.clone() for tensor in own])
            self._sizes.append(_norm(own))
            return
        sums = self._found[call]
        if [tensor.shape for tensor in sums] != [tensor.shape for tensor in own]:
            raise RunFailed(
                f"The {self.weighted} calls step.all_reduce with tensors whose shapes differ between parts of the set, so they cannot be "
                f"added. All parts must pass the same shape. For rows use step.all_gather.{self.weighted.advice}"
            )
        self._found[call] = [one + other for one, other in zip(sums, own, strict=True)]
        self._sizes[call] = self._sizes[call] + _norm(own)

    def settle(self, ranks: Ranks) -> None:
        """Ends the first pass: its sums, over all processes, are those of the whole set."""
        self._whole = [ranks.all_reduce(sums, self.weighted.label) for sums in self._found]
        self._first = self._found
        self._found = []
        self._sizes = []

    def differences(self) -> list[Tensor]:
        """Returns by call whether the chunks gave other tensors in the second pass than in the first: boolean scalars on the device."""
        if len(self._found) != len(self._first):
            raise RunFailed(dependent_sums(self.weighted))
        pairs = zip(self._first, self._found, self._sizes, strict=True)
        return [~(_norm(list(map(_gap, one, other))) <= NEARLY * size) for one, other, size in pairs]


def dependent_sums(weighted: WeightedLoss) -> str:
    """Returns what is said of a loss that two passes do not suffice for."""
    return (
        f"The {weighted} cannot be evaluated in chunks of classes: its sums depend on one another, or on a random draw that is not from "
        f"step.generator. Turn chunking off: --set engine.chunk=0.{weighted.advice}"
    )


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """Returns one - other, 0 where both are the same infinity or not a number."""
    return torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).double())
