"""Experts: networks trained on real images, with their weights at the start and after every few epochs, and how a step draws from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddkit.components.base import DataInfo, Model
from ddkit.data.images import Normalisation
from ddkit.errors import InputError
from ddkit.nn.networks import build_network, network_tensors
from ddkit.recipes.tables import ExpertsTable

COUNT, EPOCHS, SAVE_EVERY = 20, 10, 1  # of experts that are trained, if the recipe leaves them open


class Trajectory(NamedTuple):
    """Weights and buffers by name of one expert after `epoch` epochs, and `span` epochs later: float32, on the run's device."""

    expert: int
    epoch: int
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]


@dataclass(eq=False, kw_only=True)
class Experts:
    """The experts of a run: `count` networks that were `trained` for so many epochs, with their weights at 0 and every `save_every`.

    `weights(expert, row)` reads those of epoch `epochs[row]`, by name, in float32 on the CPU. `normalisation` is that of the images which
    they are trained on, `digest` a sha256 of all of them.
    """

    count: int
    trained: int
    save_every: int
    normalisation: Normalisation
    weights: Callable[[int, int], dict[str, Tensor]]
    accuracy: Sequence[float | None] = ()  # on the batches of each saved epoch, as they were learned from, the mean of all experts
    digest: str = ""
    path: str = ""

    @property
    def epochs(self) -> range:
        """The saved epochs, ascending from 0."""
        return saved_epochs(self.trained, self.save_every)

    def rows(self, first: int, last: int | None, span: int = 0, where: str = "network") -> list[tuple[int, int]]:
        """Returns the rows of the saved epochs t from `first` to `last` (None: the end), each with the row of t + span.

        Raises InputError if there is none, whose path is in the table `where` that asks for them.
        """
        row_of = {epoch: row for row, epoch in enumerate(self.epochs)}
        end = self.epochs[-1] if last is None else last
        if end > self.trained:
            raise InputError(
                f"The experts are trained for {self.trained} epochs, so they have no weights of epoch {end}. Train them longer (--set "
                f"experts.epochs={end + span}), or use earlier epochs.",
                f"{where}.last",
            )
        found = [(row, row_of[epoch + span]) for epoch, row in row_of.items() if first <= epoch <= end and epoch + span in row_of]
        if not found:
            later = f" with a saved epoch {span} epochs later" if span else ""
            raise InputError(
                f"The experts have no saved epoch from {first} to {end}{later}. Saved are the epochs 0 to {self.epochs[-1]} in steps of "
                f"{self.save_every}. Choose other epochs, train longer (experts.epochs), or save more often (experts.save_every).",
                f"{where}.first",
            )
        return found

    def drawn(self, draw: torch.Generator, *, span: int = 0, first: int = 0, last: int | None = None) -> Trajectory:
        """Returns the weights of one expert at one of its saved epochs and `span` epochs later, both drawn evenly from `draw`."""
        rows = self.rows(first, last, span)
        expert = int(torch.randint(self.count, (), generator=draw))
        row, later = rows[int(torch.randint(len(rows), (), generator=draw))]
        start = self.weights(expert, row)
        return Trajectory(expert, self.epochs[row], start, self.weights(expert, later) if span else start)

    def between(self, draw: torch.Generator, first: int, last: int | None) -> dict[str, Tensor]:
        """Returns weights at a point, drawn evenly, of the line between those of one expert at the epochs `first` and `last`."""
        ends = self.drawn(draw, span=self.span(first, last), first=first, last=first)
        share = float(torch.rand((), generator=draw))
        return {name: start.lerp(ends.end[name], share) if start.is_floating_point() else start for name, start in ends.start.items()}

    def span(self, first: int, last: int | None) -> int:
        """Returns the epochs from `first` to `last` (None: the end)."""
        return (self.epochs[-1] if last is None else last) - first


def untrained(model: Model, info: DataInfo, table: ExpertsTable, normalisation: Normalisation) -> Experts:
    """Returns fresh networks in the place of experts: for the checks of a plan, and of losses."""
    return Experts(
        count=table.count or COUNT, trained=table.epochs or EPOCHS, save_every=table.save_every or SAVE_EVERY, normalisation=normalisation,
        weights=lambda expert, row: network_tensors(build_network(model, info, 0, "untrained expert", expert, row)),
    )  # fmt: skip


def saved_epochs(epochs: int, every: int) -> range:
    return range(0, epochs + 1, every)
