"""The result of a run: a synthetic set read back from its file."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ddkit.components import registry
from ddkit.components.base import Parametrization
from ddkit.components.figures import budget
from ddkit.components.guard import blamed
from ddkit.components.options import Count, written_options
from ddkit.data.images import Normalisation, most_classes
from ddkit.data.whitening import NAMES, Whitening
from ddkit.errors import InputError, RunFailed, RunFilesError
from ddkit.files import read_tensors, write_tensors
from ddkit.run.manifest import SET, check_finished, check_listed, check_own
from ddkit.run.notebook import sheet, table
from ddkit.text import shown

MOST_MADE = 10_000  # numbers of images for each number that is stored


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of a set as its files record it; fields are empty if they do not, for example for a file without its run.

    sha256: of the set's own file; recipe: the resolved recipe as TOML data; manifest: what manifest.json says; evaluations:
    the rows of evaluation.json, accuracies as fractions.
    """

    sha256: str = ""
    recipe: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    evaluations: list[dict[str, Any]] = []


class Artifact:
    """A synthetic set: `images` (n, C, H, W) float32 in pixel units (0..1 nominal, not clipped), `labels` (n,) int64.

    If its labels are not hard, `soft_labels` (n, K) are rows of probabilities (else None), and `labels` the likeliest class of each image.

    Its file has `stored`, the rows from which the parametrization named in the metadata makes the images, and `row_labels` of these rows.
    Without a parametrization the rows are the images. `stored_images` and `stored_labels` are for pictures: the rows if they are images,
    else the images made from them. `mean` and `std` are the channel statistics for training on the set, and `whitening` is the transform
    if networks see whitened images. `normalisation` applies them. `parameters` are extra tensors: those that losses declare (DKKT's
    multipliers), and those that all classes share to make images. `metadata` has the record of the file, `provenance` is for exporters.

    Examples:
        >>> synthetic = ddkit.load("my-run")
        >>> tuple(synthetic.images.shape), synthetic.class_names[:3]
        ((10, 1, 8, 8), ['0', '1', '2'])
        >>> normalised, label = synthetic.as_dataset()[0]
    """

    def __init__(self, images: Tensor, labels: Tensor, metadata: dict[str, Any], parameters: dict[str, Tensor] | None = None):
        """`images` and `labels` are those to be stored: of a parametrization the rows. The tensors of a whitening are among `parameters`.

        Raises InputError if these make no images.
        """
        self.stored = images
        self.row_labels = labels
        self.metadata = metadata
        self.parameters = dict(parameters or {})
        self.provenance = Provenance()
        self.parametrization = parametrization_of(metadata)
        in_pixels = stored_in_pixels(self.parametrization, NAMES[0] in self.parameters)
        shape = tuple(images.shape[1:] if in_pixels else metadata["image_shape"])
        self.whitening = Whitening.taken(self.parameters, shape)
        self.normalisation = Normalisation(self.mean, self.std, self.whitening)
        self.images = images
        self.labels = labels
        self.stored_images = images
        self.stored_labels = labels
        if self.parametrization is not None:
            makes = self.parametrization
            channels, height, width = shape
            with blamed("parametrization", makes):
                made = makes.decode(images, (channels, height, width), self.parameters)
            self.images = made if in_pixels else self.normalisation.to_pixels(made)
            self.labels = labels if makes.per_row == 1 else labels.repeat_interleave(makes.per_row)
            if not in_pixels:
                self.stored_images = self.images
                self.stored_labels = self.labels
        self.soft_labels = self.parameters.get("soft_labels")
        if self.soft_labels is not None:
            own = self.soft_labels.gather(1, self.labels[:, None])[:, 0]
            best = self.soft_labels.max(1)
            self.labels = torch.where(own < best.values, best.indices, self.labels)

    def __repr__(self) -> str:
        return f"<ddkit.Artifact of {len(self.images):,} images {self.shape}, {len(self.class_names):,} classes>"

    def _repr_html_(self) -> str:
        """Returns the HTML that a notebook shows for the set: some of its images and a table of its facts."""
        counts = self.stored_labels.bincount(minlength=len(self.class_names))
        low, high = int(counts.min()), int(counts.max())
        rows = {
            "images": f"{len(self.images):,} of {' x '.join(map(str, self.shape))} (channels, height, width)",
            "classes": f"{len(self.class_names):,}, of {low if low == high else f'{low} to {high}'} images each",
            "labels": "hard" if self.soft_labels is None else "probabilities (soft_labels)",
            "stored per class": budget(self.stored_numbers, self.stored_as_images),
            "recipe": str(self.metadata.get("recipe", "-")),
        }
        return sheet(self.stored_images, self.stored_labels, self.class_names) + table(rows)

    @property
    def stored_numbers(self) -> float:
        """The numbers that a class stores, on average and without labels; numbers shared by all classes are divided among them."""
        names = () if self.parametrization is None else self.parametrization.shared(self.shape)
        return (self.stored.numel() + sum(self.parameters[name].numel() for name in names)) / len(self.class_names)

    @property
    def stored_by_class(self) -> dict[str, float]:
        """The numbers that each class stores, whose average is stored_numbers."""
        counts = self.row_labels.bincount(minlength=len(self.class_names)).tolist()
        each = math.prod(self.stored.shape[1:])
        shared = self.stored_numbers - each * len(self.stored) / len(counts)
        return {name: each * count + shared for name, count in zip(self.class_names, counts, strict=True)}

    @property
    def stored_as_images(self) -> float:
        """The number of images of this size that have as many numbers as a class stores."""
        return self.stored_numbers / math.prod(self.shape)

    @property
    def stored_counts(self) -> Tensor:
        """(K,) int64: how many images of this size the rows of each class are at most, rounded up; random real ones beside are as many."""
        numbers = self.row_labels.bincount(minlength=len(self.class_names)) * math.prod(self.stored.shape[1:])
        return -(-numbers // math.prod(self.shape))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def class_names(self) -> list[str]:
        return list(self.metadata["class_names"])

    @property
    def mean(self) -> list[float]:
        return list(self.metadata["mean"])

    @property
    def std(self) -> list[float]:
        return list(self.metadata["std"])

    @property
    def seeds(self) -> list[int]:
        """The recorded seeds that chose the accessible images; a blend has several."""
        seed = self.metadata.get("seed")
        return list(self.metadata.get("seeds", [] if seed is None else [seed]))

    @property
    def normalised(self) -> Tensor:
        """(n, C, H, W) images as networks see them: (x - mean) / std, or whitened."""
        return self.normalisation.normalise(self.images)

    @property
    def targets(self) -> Tensor:
        """(n, K) float32 labels as rows of probabilities, for a cross-entropy."""
        hard = torch.nn.functional.one_hot(self.labels, len(self.class_names)).float()
        return hard if self.soft_labels is None else self.soft_labels

    def as_dataset(self, *, normalised: bool = True, targets: bool = False) -> TensorDataset:
        """Returns a torch Dataset of (image, label), normalised or in pixel units; with `targets` a label is probabilities (K,)."""
        return TensorDataset(self.normalised if normalised else self.images, self.targets if targets else self.labels)

    def save(self, path: Path) -> None:
        """Writes the set as safetensors, whole or not at all."""
        name = "images" if stored_in_pixels(self.parametrization, self.whitening is not None) else "stored"
        write_tensors(path, {**self.all_parameters, name: self.stored, "labels": self.row_labels}, self.metadata)

    @property
    def all_parameters(self) -> dict[str, Tensor]:
        """The parameters and the tensors of the whitening, from which Artifact(...) makes such a set."""
        return {**self.parameters, **({} if self.whitening is None else self.whitening.tensors)}


def stored_in_pixels(makes: Parametrization | None, whitened: bool) -> bool:
    """Whether a set stores images in pixel units: not if others are made of them and it makes a difference in which units."""
    return makes is None or (makes.stores_images and not whitened)


def made_with(makes: Parametrization, use: str, shape: Sequence[int], *, whitened: bool = False) -> dict[str, Any]:
    """Returns what the metadata of a set say of its parametrization, called `use`: name and options; {} if the rows are the images.

    It has the `shape` (C, H, W) of the images if the rows do not show it, or are not in pixel units as those of a `whitened` set.
    """
    if use == "pixels":
        return {}
    found = {"parametrization": {"use": use, **written_options(makes.options)}}
    return found if stored_in_pixels(makes, whitened) else {**found, "image_shape": list(shape)}


def parametrization_of(metadata: Mapping[str, Any]) -> Parametrization | None:
    """Returns the parametrization of a set, None if its rows are the images; raises InputError or PluginError if there is none like it.

    Version 0.1 wrote {"decode": {"factor": 2}} of a grid.
    """
    table = {"use": "grid", **metadata["decode"]} if "decode" in metadata else dict(metadata.get("parametrization", {}))
    use = table.pop("use", "pixels")
    if not isinstance(use, str):
        raise InputError(f"parametrization.use is a text; got {shown(use)}.", "parametrization.use")
    found: Parametrization | None = None if use == "pixels" else registry.create("parametrization", use, table, where="parametrization")
    return found


def load(path: str | Path) -> Artifact:
    """Returns the synthetic set of a run directory or of a file; raises RunFilesError naming the file if it is unusable.

    Examples:
        >>> synthetic = ddkit.load("my-run/synthetic.safetensors")
        >>> loader = torch.utils.data.DataLoader(synthetic.as_dataset(), batch_size=256, shuffle=True)
    """
    file = Path(path)
    if file.is_dir():
        check_own(file)
        check_finished(file)
        check_listed(file, SET)
        file = file / SET
    if not file.exists():
        what = f"The folder {path} has no {SET}" if Path(path).is_dir() else f"There is no file or folder {path}"
        raise RunFilesError(f"{what}. Name a finished run, or the file of a synthetic set.")
    try:
        tensors, metadata = read_tensors(file)
    except ValueError as error:
        hint = f" To import a file of another project: `ddkit import {shlex.quote(str(file))} --out NAME`."
        hint = "" if file.suffix == ".safetensors" else f"{hint} Name a run directory or the file of a synthetic set."
        raise RunFilesError(f"{error}.{hint}") from None
    problem = _problem(tensors, metadata)
    if problem:
        raise RunFilesError(f"{file} is not a synthetic set: {problem}.")
    labels, name = tensors.pop("labels"), "images" if "images" in tensors else "stored"
    try:
        found = Artifact(tensors.pop(name), labels, metadata, tensors)
    except RunFailed as error:
        raise RunFilesError(f"{file} is not a synthetic set: {error}") from None
    if found.images.shape != (len(found.labels), *found.images.shape[1:]) or not bool(found.images.isfinite().all()):
        raise RunFilesError(f"{file} is not a synthetic set: its stored numbers do not give a finite image for each label.")
    return found


class Record(msgspec.Struct):
    """What ddkit reads of a set's metadata."""

    class_names: list[str]
    mean: list[float]
    std: list[float]
    ipc: Annotated[int, msgspec.Meta(ge=1)] | None = None
    pipc: Annotated[int, msgspec.Meta(ge=0)] | Literal["all"] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    seeds: list[int] = []
    decode: dict[str, Any] | None = None
    parametrization: dict[str, Any] | None = None
    image_shape: tuple[Count, Count, Count] | None = None


def _problem(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str | None:
    images, labels = tensors.get("images", tensors.get("stored")), tensors.get("labels")
    if images is None or labels is None:
        return "it has no tensors 'images' and 'labels'"
    of_images = 4 if "images" in tensors else images.ndim
    if images.ndim != max(of_images, 1) or images.dtype != torch.float32 or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"images are {images.dtype} {tuple(images.shape)}, labels {labels.dtype} {tuple(labels.shape)}"
    if images.numel() == 0:
        return f"its images have the shape {tuple(images.shape)}, so there are none"
    missing = [key for key in ("class_names", "mean", "std") if not isinstance(metadata.get(key), list)]
    if missing:
        return f"its metadata has no {', '.join(missing)}"
    try:
        record = msgspec.convert(metadata, Record)
    except msgspec.ValidationError as error:
        return f"its metadata cannot be used ({error})"
    shape = record.image_shape if "images" not in tensors else (images.shape[1], images.shape[2], images.shape[3])
    try:
        makes = parametrization_of(metadata)
        if shape is None or stored_in_pixels(makes, NAMES[0] in tensors) != ("images" in tensors):
            return "its tensors do not fit its parametrization"
        if makes is not None:
            makes.check(shape)
            lacking = [name for name, value in makes.shared(shape).items() if tensors.get(name, labels).shape != value.shape]
            if lacking:
                return f"it has no tensor '{lacking[0]}' of the shape that its parametrization needs"
            if makes.per_row * math.prod(shape) > MOST_MADE * math.prod(images.shape[1:]):
                return f"its images of shape {shape} would have more than {MOST_MADE:,} times as many values as it stores"
    except InputError as error:
        return f"its images cannot be made: {error}"
    try:
        Whitening.taken(dict(tensors), shape)
    except ValueError as error:
        return str(error)
    if len(record.mean) != shape[0] or len(record.std) != shape[0]:
        return "its mean and std do not have one value per channel"
    if not all(math.isfinite(value) for value in (*record.mean, *record.std)) or min(record.std) <= 0:
        return "its mean or std is not finite, or a std is not positive"
    if len(record.class_names) > most_classes(len(images)):
        return f"it has {len(record.class_names):,} classes for {len(images):,} images, but the limit is {most_classes(len(images)):,}"
    if len(set(record.class_names)) < len(record.class_names):
        return "two classes have the same name"
    if not (int(labels.min()) >= 0 and int(labels.max()) < len(record.class_names)):
        return "a label has no class name"
    soft, rows = tensors.get("soft_labels"), len(images) * (1 if makes is None else makes.per_row)
    if soft is not None and not are_probabilities(soft, (rows, len(record.class_names))):
        return f"its soft_labels ({soft.dtype}, {tuple(soft.shape)}) are not float32 probabilities of its classes, one row per image"
    return None if bool(images.isfinite().all()) else "an image value is not finite"


def are_probabilities(values: Tensor, shape: tuple[int, int]) -> bool:
    """Whether `values` are float32 rows of `shape` that are at least 0 and add up to 1, with a tolerance of 0.001."""
    fits = values.shape == shape and values.dtype == torch.float32
    return fits and bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < 1e-3).all())
