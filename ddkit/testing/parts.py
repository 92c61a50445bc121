"""A step whose set is dealt out to several parts, as to the processes of a run: here each part is a thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddkit.distributed import Ranks, class_rows
from ddkit.testing.world import World

T = TypeVar("T")


class _Table:
    """Where the threads lay what they exchange, and wait for one another. Elsewhere one thread runs at a time: modules are shared."""

    def __init__(self, size: int) -> None:
        self.places: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.turn = threading.Lock()

    def exchanged(self, rank: int, value: Any) -> list[Any]:
        """Returns the values of all; only those who have a turn may ask."""
        self.places[rank] = value
        self._wait()
        found = list(self.places)
        self._wait()
        return found

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class Thread(Ranks):
    """One of several threads that stand for the processes of a run."""

    def __init__(self, rank: int, table: _Table) -> None:
        super().__init__()
        self.rank, self.world_size, self._table = rank, len(table.places), table

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._table.exchanged(self.rank, value)

    def all_reduce(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        self.exchanged[purpose] += sum(tensor.nbytes for tensor in tensors)
        parts = self.all_gather_object([tensor.detach().clone() for tensor in tensors])
        return [torch.stack(list(each)).sum(0) for each in zip(*parts, strict=True)]

    def max(self, number: int) -> int:
        return max(self.all_gather_object(number))


def in_parts(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Returns what `work` returns in each of `size` parts; raises what the first of them raised that was not left waiting."""
    table = _Table(size)

    def guarded(rank: int) -> T:
        with table.turn:
            try:
                return work(Thread(rank, table))
            except BaseException:
                table.barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error.__cause__ or error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def part_of(world: World, ranks: Ranks) -> World:
    """Returns the world of one part: its classes' rows and real images."""
    found = copy.copy(world)
    found.source = copy.copy(world.source)
    found.source.ranks, found.source.own_classes = ranks, ranks.classes(world.info.classes)
    found.source.own_real = class_rows(world.source.real_labels, found.source.own_classes)
    found.source.real_images = world.source.real_images[found.source.own_real]
    found.source._embedder = None  # a network of its own
    rows = class_rows(world.bank.labels, found.source.own_classes)
    found.bank = type(world.bank)(
        world.bank.images[rows], world.bank.labels[rows], world.loss.requires.parameters, {}, start=rows.start, size=len(world.bank.labels)
    )
    found.bank.load_state(found.bank.own_part(world.bank.state()))
    return found
