"""What initializers that choose among real images share: class by class, enough of them, in the images' own order."""

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
        images: Tensor = self.start.real_images[self.rows[chosen]]
        return images

    @property
    def images(self) -> Tensor:
        """All of the class."""
        return self.take(torch.arange(len(self.rows)))


def classes(start: ddkit.InitContext) -> Iterator[Class]:
    """Yields the classes of the set in ascending order of label."""
    for label, count in zip(*start.labels.unique(return_counts=True), strict=True):
        yield Class(int(label), int(count), (start.real_labels == label).nonzero().flatten(), start)
