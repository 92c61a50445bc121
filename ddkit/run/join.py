"""Sets of different classes, or of the same ones, joined into one, and the classes of a set apart."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ddkit.components.options import written_options
from ddkit.errors import NEWS, FlagError, InputError
from ddkit.files import sha256
from ddkit.run import warnings
from ddkit.run.artifact import Artifact, load, stored_in_pixels
from ddkit.run.derived import access, file_of, write_derived
from ddkit.run.directory import Run, RunDirectory
from ddkit.text import doubles, shown, suggestion

log = logging.getLogger("ddkit")
HOW_MADE = ("decode", "parametrization", "image_shape", "whitening")  # keys of a set's metadata


def join(sets: Sequence[str | Path], *, out: str | Path) -> Run:
    """Writes one set with all images of `sets` into the run directory `out`, and returns that run.

    `sets` are at least two run directories or files, whose images have the same shape and are stored in the same way. Classes are the same
    if their names are. If one run has all classes, or all have the same real data, `ddkit evaluate` uses these data. Raises DdkitError.

    Examples:
        >>> joined = ddkit.load(ddkit.join(["my-run", "other-run"], out="joined").path)
        >>> len(joined.images) == 2 * len(ddkit.load("my-run").images)
        True
    """
    places = [Path(each) for each in sets]
    if len(places) < 2:
        raise FlagError("`ddkit join A B ... --out DIR` needs at least two sets.")
    parts = [(place, load(place)) for place in places]
    digests = [sha256(file_of(place)) for place in places]
    for double in doubles(digests):
        same = [str(place) for place, digest in zip(places, digests, strict=True) if digest == double]
        raise InputError(f"{' and '.join(same)} are the same set. Name each set once.")
    with warnings.recording(), RunDirectory.whole_or_absent(Path(out)) as directory:
        result = joined(parts)
        return write_derived(result, parts, directory, "join", {})


def split(target: str | Path, classes: Sequence[str], *, out: str | Path) -> Run:
    """Writes the set of some `classes` of a run or file into the run directory `out`, and returns that run.

    Classes keep their order in the set. Raises DdkitError.

    Examples:
        >>> ddkit.load(ddkit.split("my-run", ["3", "5"], out="two-classes").path).class_names
        ['3', '5']
    """
    found = load(target)
    with warnings.recording(), RunDirectory.whole_or_absent(Path(out)) as directory:
        result = of_classes(found, classes)
        return write_derived(result, [(Path(target), found)], directory, "split", {"class_names": result.class_names})


def joined(parts: Sequence[tuple[Path, Artifact]]) -> Artifact:
    """Returns the set of all images of `parts`, class by class; its classes are in the order in which the sets name them first.

    Where means and standard deviations differ, the set's are those of all classes together. Soft labels are 0 for classes that a part
    does not have. Of other parameters a learned step size is kept if it is one. Raises InputError if the parts do not fit together.
    """
    check_parts(parts)
    sets = [part for _, part in parts]
    first = sets[0]
    names = list(dict.fromkeys(name for part in sets for name in part.class_names))
    _warn_of_names(names)
    places = [torch.tensor([names.index(name) for name in part.class_names]) for part in sets]
    labels = torch.cat([place[part.row_labels] for place, part in zip(places, sets, strict=True)])
    order = labels.argsort(stable=True)
    metadata = {key: first.metadata[key] for key in HOW_MADE if key in first.metadata}
    metadata |= {"class_names": names, **_statistics(sets), **access(sets), "recipe": "join"}
    parameters = _shared(first) | _step_size(sets)
    if any(part.soft_labels is not None for part in sets):
        metadata["labels"] = "joined"
        rows = [
            part.targets.new_zeros(len(part.images), len(names)).index_copy(1, place, part.targets)
            for place, part in zip(places, sets, strict=True)
        ]
        parameters["soft_labels"] = _of_rows(torch.cat(rows), order, len(labels))
    return Artifact(torch.cat([part.stored for part in sets])[order], labels[order], metadata, parameters)


def of_classes(whole: Artifact, classes: Sequence[str]) -> Artifact:
    """Returns the set of some classes, in the order of the whole set.

    Soft labels are the probabilities among these classes; an image that has none of them gets its class. Of other parameters a learned
    step size is kept. Raises FlagError if a class is not in the set, or is there twice.
    """
    if isinstance(classes, str) or not classes:
        raise FlagError("--classes: name at least one class, for example --classes cat,dog.")
    for name in classes:
        if name not in whole.class_names:
            raise FlagError(f"--classes: the set has no class {shown(name)}. {suggestion(str(name), whole.class_names)}")
    for name in doubles(classes):
        raise FlagError(f"--classes names {shown(name)} twice. Name it once.")
    names = [name for name in whole.class_names if name in classes]
    chosen = torch.tensor([whole.class_names.index(name) for name in names])
    for name, label in zip(names, chosen.tolist(), strict=True):
        if not bool((whole.row_labels == label).any()):
            raise InputError(f"The set has no image of the class '{name}'. Leave it out of --classes.")
    place = torch.full((len(whole.class_names),), -1)
    place[chosen] = torch.arange(len(names))
    rows = (place[whole.row_labels] >= 0).nonzero().flatten()
    labels = place[whole.row_labels[rows]]
    metadata = {key: value for key, value in whole.metadata.items() if key != "schema"} | {"class_names": names}
    parameters = _shared(whole) | _step_size([whole])
    if whole.soft_labels is not None:
        soft = _of_rows(whole.soft_labels, rows, len(whole.row_labels))[:, chosen]
        hard = functional.one_hot(labels.repeat_interleave(len(soft) // len(labels)), len(names)).to(soft)
        total = soft.sum(1, keepdim=True)
        parameters["soft_labels"] = torch.where(total > 0, soft / total.clamp_min(torch.finfo(soft.dtype).tiny), hard)
    return Artifact(whole.stored[rows], labels, metadata, parameters)


def check_parts(parts: Sequence[tuple[Path, Artifact]]) -> None:
    """Raises InputError, naming two sets and what differs, if the images of `parts` cannot stand in one set."""
    (place, first), *others = parts
    in_pixels = stored_in_pixels(first.parametrization, first.whitening is not None)
    pixels = "To make a set of pixels: `ddkit export SET --to npz --out DIR`, and `ddkit import` of the file that this writes."
    for other, part in others:
        for told, what, remedy in (
            (_shape, "another image shape", "Distil both at the same size: --set 'data.size=[HEIGHT,WIDTH]'."),
            (_whitening, "another whitening", "Distil both with the same whitening, or without."),
            (_made_by, "another parametrization", pixels),
            (_rows, "other stored rows", pixels),  # an older version may have had another default of an option
        ):
            if told(first) != told(part):
                raise InputError(f"{other} cannot be joined to {place}: it has {what} ({told(part)}, not {told(first)}). {remedy}")
        shared = _shared(part)
        if any(not torch.equal(value, shared[name]) for name, value in _shared(first).items()):
            raise InputError(f"{other} cannot be joined to {place}: their parametrizations have different shared tensors. {pixels}")
        if not in_pixels and not part.normalisation.same(first.normalisation):
            raise InputError(f"{other} cannot be joined to {place}: both store normalised numbers, but their mean or std differs. {pixels}")


def _shape(part: Artifact) -> str:
    return f"{part.shape} (C, H, W)"


def _whitening(part: Artifact) -> str:
    return "none" if part.whitening is None else f"sha256 {part.whitening.digest[:12]}"


def _made_by(part: Artifact) -> str:
    makes = part.parametrization
    return "pixels" if makes is None else f"{makes.name} {written_options(makes.options) or ''}".strip()


def _rows(part: Artifact) -> str:
    return " x ".join(map(str, part.stored.shape[1:]))


def _shared(part: Artifact) -> dict[str, Tensor]:
    """Returns the tensors that all classes of a set share: those of its parametrization and of its whitening."""
    names = () if part.parametrization is None else part.parametrization.shared(part.shape)
    return {name: part.parameters[name] for name in names} | ({} if part.whitening is None else part.whitening.tensors)


def _of_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Returns of `values`, one for each image, those of some of the `count` stored rows, each of which makes as many images."""
    return values.unflatten(0, (count, -1))[rows].flatten(0, 1)


def _statistics(sets: Sequence[Artifact]) -> dict[str, list[float]]:
    """Returns mean and std of each channel: those of the sets if they have the same, else those of all their classes together."""
    if all((part.mean, part.std) == (sets[0].mean, sets[0].std) for part in sets):
        return {"mean": sets[0].mean, "std": sets[0].std}
    mean, std = (torch.tensor([getattr(part, name) for part in sets], dtype=torch.float64) for name in ("mean", "std"))
    weights = torch.tensor([len(part.class_names) for part in sets], dtype=torch.float64)[:, None]
    weights /= weights.sum()
    centre = (weights * mean).sum(0)
    spread = (weights * (std.square() + (mean - centre).square())).sum(0).sqrt()
    words = ", ".join(f"{value:.3f}" for value in centre.tolist())
    log.warning(
        "The sets have different means and stds. The joined set has the mean and std of all their classes together (mean %s).",
        words,
        extra=NEWS,
    )
    return {"mean": centre.tolist(), "std": spread.tolist()}


def _step_size(sets: Sequence[Artifact]) -> dict[str, Tensor]:
    """Returns the learned step size of the sets, if they have one, and the same."""
    found = [part.parameters["step_size"] for part in sets if "step_size" in part.parameters]
    if found and (len(found) < len(sets) or not all(torch.equal(found[0], each) for each in found)):
        log.warning("The learned step sizes of the sets differ, so the joined set has none.")
        return {}
    return {"step_size": found[0]} if found else {}


def _warn_of_names(names: Sequence[str]) -> None:
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(filter(str.isalnum, name.casefold())) or name, []).append(name)
    for several in alike.values():
        if len(several) > 1:
            log.warning(
                "The joined set has the classes %s. They are different classes, because their names differ.",
                " and ".join(map(repr, several)),
            )
