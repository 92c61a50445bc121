"""Blends: the average of two synthetic sets, image by image, and the run that it is written as."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddkit.errors import FlagError, InputError
from ddkit.run import warnings
from ddkit.run.artifact import Artifact, load, stored_in_pixels
from ddkit.run.derived import access, write_derived
from ddkit.run.directory import Run, RunDirectory
from ddkit.text import few

log = logging.getLogger("ddkit")


def blend(first: str | Path, second: str | Path, *, alpha: float = 0.5, out: str | Path) -> Run:
    """Writes the set (1 - alpha) * first + alpha * second into the run directory `out`, and returns that run.

    `first` and `second` are run directories or files with the same classes, images per class and shape. Images are matched by
    class name, and within a class by their order. If one of them is a run, `ddkit evaluate` uses its real data.
    Raises DdkitError.

    Examples:
        >>> ddkit.blend("my-run", "other-run", alpha=0.25, out="both").path.name
        'both'
    """
    ours, theirs = load(first), load(second)
    with warnings.recording(), RunDirectory.whole_or_absent(Path(out)) as directory:
        result = blended(ours, theirs, alpha)
        partner = Artifact(theirs.stored[partners(ours, theirs)], ours.row_labels, theirs.metadata, theirs.all_parameters)
        sets = [(Path(first), ours), (Path(second), theirs)]
        return write_derived(result, sets, directory, "blend", {"alpha": alpha}, [ours.stored_images, partner.stored_images])


def blended(first: Artifact, second: Artifact, alpha: float) -> Artifact:
    """Returns the set (1 - alpha) * first + alpha * second, in pixel units; alpha 0 is the first, 1 the second.

    Images are matched by class name, and within a class by their order in each file. The result has the order, the
    normalisation and the other metadata of the first, without its multipliers. Labels that are not hard are averaged too. Raises
    FlagError for an alpha outside 0..1, InputError where classes, images per class or shapes differ.
    """
    if not 0 <= alpha <= 1:
        raise FlagError(f"--alpha {alpha}: the share of the second set must be from 0 to 1.")
    partner = partners(first, second)
    if not first.normalisation.same(second.normalisation):
        log.warning(
            "The two sets have different normalisations. They are averaged in pixel units, and the blend has the normalisation of the "
            "first."
        )
    rows = torch.lerp(first.stored, second.stored[partner], alpha)
    metadata = first.metadata | {"recipe": "blend", "alpha": alpha} | access([first, second])
    soft = {} if first.whitening is None else first.whitening.tensors
    if first.soft_labels is not None or second.soft_labels is not None:
        metadata["labels"] = "blended"
        theirs = second.targets.unflatten(0, (len(partner), -1))[partner].flatten(0, 1)  # a stored image may be decoded into several
        columns = [second.class_names.index(name) for name in first.class_names]
        soft |= {"soft_labels": torch.lerp(first.targets, theirs[:, columns], alpha)}
    return Artifact(rows, first.row_labels, {key: value for key, value in metadata.items() if key != "schema"}, soft)


def partners(first: Artifact, second: Artifact) -> Tensor:
    """Returns (n,) int64: for each stored row of the first set the row of the second that it is averaged with.

    Raises InputError where classes, images per class or shapes differ.
    """
    ours, theirs = first.class_names, second.class_names
    if sorted(ours) != sorted(theirs):
        raise InputError(
            f"The two sets have different classes, so they cannot be averaged. Only the first has {_own(ours, theirs)}, only the second "
            f"has {_own(theirs, ours)}."
        )
    if first.images.shape[1:] != second.images.shape[1:]:
        shapes = [tuple(each.images.shape[1:]) for each in (first, second)]
        raise InputError(
            f"The first set has images of shape {shapes[0]} (C, H, W), but the second of {shapes[1]}, so they cannot be averaged."
        )
    made = [(each.parametrization.name, each.parametrization.options) if each.parametrization else None for each in (first, second)]
    if made[0] != made[1] or first.stored.shape[1:] != second.stored.shape[1:]:  # an older version's
        raise InputError("The two sets have different parametrizations, so they cannot be averaged.")
    makes = first.parametrization
    in_pixels = all(stored_in_pixels(makes, each.whitening is not None) for each in (first, second))
    if makes is not None and not (makes.linear and (in_pixels or first.normalisation.same(second.normalisation))):
        why = "their normalisations differ" if makes.linear else "the average of its numbers does not give the average of the images"
        raise InputError(f"The sets have the parametrization {makes.name}, and {why}, so they cannot be averaged.")
    partner = torch.empty(len(first.row_labels), dtype=torch.int64)
    for label, name in enumerate(ours):
        rows = (first.row_labels == label).nonzero().flatten()
        others = (second.row_labels == theirs.index(name)).nonzero().flatten()
        if len(rows) != len(others):
            raise InputError(
                f"The first set has {len(rows)} images of the class '{name}', but the second has {len(others)}. Only sets with the same "
                "ipc can be averaged."
            )
        partner[rows] = others
    return partner


def _own(names: Sequence[str], others: Sequence[str]) -> str:
    """Returns the names that are not among the others, the first few of them."""
    return few([name for name in names if name not in others]) or "no others"
