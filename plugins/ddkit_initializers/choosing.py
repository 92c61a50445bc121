"""What initializers that choose among real images share: class by class, enough of them, in the images' own order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

import ddkit


class Class(NamedTuple):
    """One class of a set to begin: how many images it gets, and the accessible ones (m, C, H, W), normalised."""

    label: int
    ipc: int
    images: Tensor


def classes(start: ddkit.Start) -> Iterator[Class]:
    """Yields the classes of the set in ascending order of label."""
    for label, count in zip(*start.labels.unique(return_counts=True), strict=True):
        yield Class(int(label), int(count), start.real_images[start.real_labels == label])
