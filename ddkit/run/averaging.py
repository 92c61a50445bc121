"""The average of two synthetic sets, image by image."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ddkit.errors import FlagError, InputError
from ddkit.run.artifact import Artifact

log = logging.getLogger("ddkit")


def blended(first: Artifact, second: Artifact, alpha: float) -> Artifact:
    """Returns the set (1 - alpha) * first + alpha * second, in pixel units; alpha 0 is the first, 1 the second.

    Images are matched by class name, and within a class by their order in each file. The result has the order, the
    normalisation and the other metadata of the first, without its multipliers. Raises FlagError for an alpha outside
    0..1, InputError where classes, images a class or shapes differ.
    """
    if not 0 <= alpha <= 1:
        raise FlagError(f"--alpha {alpha}: it is the share of the second set, from 0 to 1.")
    partner = partners(first, second)
    if (first.mean, first.std) != (second.mean, second.std):
        log.warning("The two sets have different normalisation; they are averaged in pixel units, and the first's is kept.")
    images = torch.lerp(first.stored_images, second.stored_images[partner], alpha)
    pipc = _larger(first.metadata.get("pipc"), second.metadata.get("pipc"))
    seeds = sorted({seed for part in (first, second) for seed in seeds_of(part)})
    metadata = first.metadata | {"recipe": "blend", "alpha": alpha, "seeds": seeds} | ({} if pipc is None else {"pipc": pipc})
    return Artifact(images, first.stored_labels, {key: value for key, value in metadata.items() if key != "schema"})


def seeds_of(artifact: Artifact) -> list[int]:
    """Returns the seeds that chose the accessible images of a set, as far as it records them; a blend has several."""
    found = artifact.metadata.get("seeds", [artifact.metadata["seed"]] if "seed" in artifact.metadata else [])
    return [int(seed) for seed in found]


def partners(first: Artifact, second: Artifact) -> Tensor:
    """Returns (n,) int64: for each stored row of the first set the row of the second that it is averaged with.

    Raises InputError where classes, images a class or shapes differ.
    """
    ours, theirs = first.class_names, second.class_names
    if sorted(ours) != sorted(theirs):
        raise InputError(f"The two sets have different classes, so they cannot be averaged: {_difference(ours, theirs)}.")
    if first.images.shape[1:] != second.images.shape[1:]:
        shapes = [tuple(each.images.shape[1:]) for each in (first, second)]
        raise InputError(f"The first set has images of shape {shapes[0]} (C, H, W), the second of {shapes[1]}; they cannot be averaged.")
    if first.metadata.get("decode") != second.metadata.get("decode"):
        raise InputError("Images are decoded from those of one set and not in the same way from the other's; the two cannot be averaged.")
    partner = torch.empty(len(first.stored_labels), dtype=torch.int64)
    for label, name in enumerate(ours):
        rows = (first.stored_labels == label).nonzero().flatten()
        others = (second.stored_labels == theirs.index(name)).nonzero().flatten()
        if len(rows) != len(others):
            raise InputError(
                f"The first set has {len(rows)} images of the class '{name}', the second {len(others)}: only sets of the same ipc "
                "can be averaged."
            )
        partner[rows] = others
    return partner


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    return f"only the first has {_some(ours, theirs)}, only the second has {_some(theirs, ours)}"


def _some(names: Sequence[str], others: Sequence[str], most: int = 5) -> str:
    """Returns the names that are not among the others, the first few of them."""
    own = [name for name in names if name not in others]
    more = f" and {len(own) - most} more" if len(own) > most else ""
    return f"{', '.join(own[:most])}{more}" if own else "none of its own"


def _larger(first: object, second: object) -> object:
    """Returns the pipc that both together had access to, as far as it is known: the larger, "all" being the largest."""
    known = [value for value in (first, second) if value is not None]
    if "all" in known:
        return "all"
    return max((value for value in known if isinstance(value, int)), default=None)
