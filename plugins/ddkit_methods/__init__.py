"""Losses of published methods, one module each, named after what it computes; their recipes, named as in the papers, are in `recipes`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

import ddkit


def class_pairs(step: ddkit.Step, synthetic: Tensor, real: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each class that has both, in order, its rows of `synthetic` and of `real`: one row for each image of the step."""
    ours, theirs = step.class_slices, step.real.class_slices
    for label in sorted(ours.keys() & theirs.keys()):
        yield synthetic[ours[label]], real[theirs[label]]
