"""First synthetic images: `noise` and `real`; the others have modules of their own, and share how they choose, class by class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import ddkit


class Class(NamedTuple):
    """One class of a set to begin: how many images it gets, and the `rows` of the accessible ones among all."""

    label: int
    ipc: int
    rows: Tensor
    start: ddkit.InitContext

    def take(self, chosen: Tensor) -> Tensor:
        """Returns images (n, C, H, W), normalised, by their place in the class; no other is looked at."""
        return self.start.real_images[self.rows[chosen]]

    @property
    def images(self) -> Tensor:
        """All of the class."""
        return self.take(torch.arange(len(self.rows)))


def classes(start: ddkit.InitContext) -> Iterator[Class]:
    """Yields the classes of the set in ascending order of label."""
    for label, count in zip(*start.labels.unique(return_counts=True), strict=True):
        yield Class(int(label), int(count), (start.real_labels == label).nonzero().flatten(), start)


class Noise(ddkit.Initializer):
    """Gaussian noise in normalised units."""

    std: float = ddkit.option(1.0, "standard deviation of the noise, in normalised units", gt=0)

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        parts = [torch.randn((each.ipc, *start.shape), generator=start.generator(each.label)) for each in classes(start)]
        return self.std * torch.cat(parts)


class Real(ddkit.Initializer):
    """Accessible real images of the class, drawn without replacement."""

    requires = ddkit.Requires(real=True)

    def needed(self, ipc: int) -> int:
        return ipc

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        parts = []
        for each in classes(start):
            chosen = torch.randperm(len(each.rows), generator=start.generator(each.label))[: each.ipc]
            parts.append(each.take(chosen.sort().values))  # in order: ipc = pipc gives exactly the real set
        return torch.cat(parts)
