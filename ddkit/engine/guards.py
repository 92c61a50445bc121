"""What may end a run between two steps: values that are not finite, and signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddkit.distributed import ending_signals
from ddkit.engine.chunking import dependent_sums
from ddkit.errors import DdkitError, RunFailed

if TYPE_CHECKING:
    from ddkit.engine.loop import Engine, Evaluated


class Finiteness:
    """Knows what was first not finite, and at which step, without asking the device at every step.

    That is kept on the device: for each loss, and for each parameter of the set, the first step at which it, its gradient or its
    optimizer's state was not finite. It is read at logged and checkpointed steps, where the state is kept too: if something went wrong
    since, the state of the last such step is loaded and saved, and RunFailed raised.
    """

    def __init__(self, engine: Engine, start: int, save: Callable[[int], None]) -> None:
        self.engine, self.save = engine, save
        self.losses, self.parameters = [each.label for each in engine.losses], list(engine.bank.tensors())
        self.index, self.state = start, engine.state(start)  # the last that was read to be finite
        device = engine.bank.images.device
        self.values = torch.zeros(len(self.losses), device=device)  # of each loss, where it was first not finite
        self.first = torch.full((2 * len(self.losses) + len(self.parameters),), -1, device=device)  # step, -1: finite so far

    def note(self, index: int, found: Evaluated) -> None:
        """Adds what step `index` computed, and the bank after its update."""
        bank = self.engine.bank
        values = torch.stack([found.values[label].float() for label in self.losses])
        fine = [all_finite([found.gradients[name], *bank.kept(name)]) for name in self.parameters]
        never = torch.zeros_like(fine[0])
        bad = torch.cat([~values.isfinite(), ~torch.stack(fine), torch.stack([found.differ.get(label, never) for label in self.losses])])
        new = bad & (self.first < 0)
        self.values = torch.where(new[: len(values)], values, self.values)
        self.first = torch.where(new, index, self.first)

    def check(self, index: int) -> None:
        """Makes the state before step `index` the one that is kept; raises RunFailed if something was not finite since the last."""
        if not self.engine.ranks.all(bool((self.first < 0).all())):
            self._fail()
        self.index, self.state = index, self.engine.state(index)

    def _fail(self) -> None:
        engine = self.engine
        found = engine.ranks.all_gather_object([self.first.tolist(), [str(value) for value in self.values.tolist()]])
        entries = [(step, place, rank) for rank, (first, _) in enumerate(found) for place, step in enumerate(first) if step >= 0]
        step, place, rank = min(entries)
        engine.load_state(self.index, self.state)
        kept = f"The state after step {self.index - 1}, the last that was checked, is kept in checkpoints/. " if self.index else ""
        if place < len(self.losses):
            loss = engine.losses[place]
            message = (
                f"The {loss} became {found[rank][1][place]} at step {step}. {kept}Try a smaller learning rate "
                f"({engine.bank.smaller_rate('images')}{', or a smaller network.inner_lr' if engine.source.inner else ''}), a smaller "
                f"weight, or float32 (--set engine.precision=float32).{loss.advice}"
            )
        elif place < len(self.losses) + len(self.parameters):
            name = self.parameters[place - len(self.losses)]
            message = (
                f"The update of step {step} gave values of '{name}' that are not finite, with every loss finite "
                f"({', '.join(self.losses)}). {kept}Try a smaller learning rate: {engine.bank.smaller_rate(name)}"
            )
        else:
            message = f"{dependent_sums(engine.losses[place - len(self.losses) - len(self.parameters)])} {kept}".rstrip()
        self.save(self.index)
        raise RunFailed(message)  # every process of a run does, at the same step

    @contextmanager
    def around(self, index: int) -> Iterator[None]:
        """Saves the state before step `index` where the step inside raises a DdkitError.

        One of several processes cannot do that alone: the newest checkpoint is what stays.
        """
        try:
            yield
        except DdkitError:
            if self.engine.ranks.world_size == 1:
                if index > self.index:
                    self.check(index)  # what it raised may come of values that were not finite: tell of those
                self.save(index)
            raise


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Returns whether every value of `tensors` is finite, as a boolean scalar on their device: nothing is read back."""
    return torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all()


@contextmanager
def interruption() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP are noted in the list, and a second SIGINT acts at once.

    A second one of the others is the same request once more, as a cluster sends it to all processes and torchrun, or a study, passes it
    on.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch refuses operations that are not deterministic on this device, if that is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA's matrix products when the first is made
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
