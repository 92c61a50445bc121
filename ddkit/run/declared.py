"""What the caller of an import declares beside the file: statistics, whitening and classes, which files of other projects do not record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddkit.components import trust
from ddkit.data.images import Normalisation
from ddkit.data.loading import load_images
from ddkit.data.passed import passing
from ddkit.data.real import open_dataset
from ddkit.data.whitening import EPS, Whitening, normalisation_of
from ddkit.errors import FlagError, InputError
from ddkit.recipes.resolve import Part, resolve
from ddkit.text import counted, is_text, shown

Classes = Sequence[str] | int | None
FLAGS = {"index": "--run"}  # whose name is not that of the argument
WHITENED = "with --whitened the training images of the dataset give the normalisation."
OF_WHITENING = Part(
    ("data",),
    ("data.batch", "data.test", "data.held_out", "data.whiten"),
    "--whitened uses only data.whiten_eps, data.whiten_absolute and the options of the dataset.",
)


@dataclass(frozen=True)
class Declared:
    """What `import_file` gets beside the files: each as there, `whitening` the options of `dataset`, `settings` the other ones."""

    mean: Sequence[float] | None
    std: Sequence[float] | None
    classes: Classes
    pixels: str | None
    labels: Sequence[str]
    ipc: int | None
    index: int | None
    grid: int | None
    whitened: bool | None
    dataset: Any
    whitening: Mapping[str, Any]
    step_size: float | str | Path | None
    size: Sequence[int] | None
    model: str | None
    settings: Mapping[str, Any]

    def given(self, *names: str) -> list[str]:
        """Returns the flags of those arguments that are given."""
        return [FLAGS.get(name, f"--{name}").replace("_", "-") for name in names if getattr(self, name) not in (None, [])]


def whitening_of(declared: Declared) -> tuple[Normalisation, list[str]]:
    """Returns the normalisation of all training images of a dataset, which whitens, and the names of its classes."""
    dataset, settings = declared.dataset, declared.whitening
    if dataset is None:
        raise InputError("--whitened computes the whitening from the training images of a dataset. Add --dataset NAME[:PATH].")
    with passing(dataset) as named, trust.granting({"dataset": dataset}, settings):
        own = {key: value for key, value in named.items() if key != "dataset"}
        recipe = {"name": "import", "data": {"whiten": True, "whiten_eps": EPS}}
        table = resolve(recipe, dataset=named["dataset"], evaluators="none", sets={**own, **settings}, part=OF_WHITENING).data
        found = open_dataset(table)
        images = load_images(found, "train", range(len(found.labels("train"))), None)
    return normalisation_of(images, table), list(found.class_names)


def statistics_of(
    path: Path, mean: Sequence[float] | None, std: Sequence[float] | None, whitening: Whitening | None = None
) -> Normalisation:
    """Returns what images are normalised with, which files of others do not record."""
    if mean is None or std is None:
        raise InputError(
            f"{path} does not record how images are normalised. Add the mean and std of each channel, for pixels in 0..1, for example "
            "--mean 0.4914,0.4822,0.4465 --std 0.2023,0.1994,0.2010"
        )
    if len(mean) != len(std) or not mean:
        raise FlagError(f"--mean has {counted(len(mean), 'value')}, but --std has {len(std)}. Both need one value per channel.")
    if not all(torch.tensor([*mean, *std]).isfinite()) or min(std) <= 0:
        raise FlagError("--mean and --std must be finite, and each std must be positive.")
    if max(mean) > 1:
        of_unit = [",".join(f"{value / 255:.4g}" for value in values) for values in (mean, std)]
        raise FlagError(
            f"--mean is for pixels in 0..1, so it is at most 1. If yours is for pixels in 0..255: --mean {of_unit[0]} --std {of_unit[1]}"
        )
    return Normalisation(mean, std, whitening)


def class_names_of(classes: Classes, least: int, path: Path) -> list[str]:
    """Returns the class names: as given, or numbers."""
    names = [str(number) for number in range(classes)] if isinstance(classes, int) else list(classes or map(str, range(least)))
    if unwritable := [name for name in names if not is_text(name)]:
        raise InputError(f"{path}: the name of a class is not UTF-8 text ({shown(unwritable[0])}). Give the names with --classes.")
    if len(set(names)) < len(names) or not all(names):
        raise FlagError(f"--classes: each class needs its own name, but the names are {', '.join(names[:20])}.")
    if len(names) < max(least, 2):
        if not classes:
            raise InputError(f"{path} only has the label 0, but a set needs at least two classes. Name all of them with --classes.")
        raise InputError(f"{path} has the label {least - 1}, but --classes has {len(names)}. Name all classes, at least two.")
    return names
