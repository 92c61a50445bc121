"""The result of a run: a synthetic set read back from its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ddkit.data.images import Normalisation, most_classes
from ddkit.engine.bank import decoded
from ddkit.errors import RunFilesError
from ddkit.files import read_tensors, write_tensors
from ddkit.run.manifest import SET, check_finished, check_listed, check_own


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a set comes from, as its files tell: empty where they do not, as beside a file without its run.

    sha256: of the set's own file; recipe: the resolved recipe as TOML data; manifest: what manifest.json says; evaluations:
    the rows of evaluation.json, accuracies as fractions.
    """

    sha256: str = ""
    recipe: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    evaluations: list[dict[str, Any]] = []


class Artifact:
    """A synthetic set: `images` (n, C, H, W) float32 in pixel units (0..1 nominal, not clipped), `labels` (n,) int64.

    Where several images are decoded from each stored one (metadata `decode`), these are the decoded ones, which networks train on;
    `stored_images` and `stored_labels` are those of the file, ipc a class. `mean` and `std` are the channel statistics that training on it
    should use; `parameters` are extra tensors that losses declared (DKKT's multipliers); `metadata` is what the file records; `provenance`
    is filled in for exporters.
    """

    def __init__(self, images: Tensor, labels: Tensor, metadata: dict[str, Any], parameters: dict[str, Tensor] | None = None):
        """`images` and `labels` are those to be stored."""
        self.stored_images = images
        self.stored_labels = labels
        self.metadata = metadata
        self.parameters = dict(parameters or {})
        self.provenance = Provenance()
        factor = (metadata.get("decode") or {}).get("factor", 1)
        self.images = decoded(images, factor)
        self.labels = labels if factor == 1 else labels.repeat_interleave(factor**2)

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
        """The seeds that chose its accessible images, as far as it records them; a blend has several."""
        return list(self.metadata.get("seeds", [self.metadata["seed"]] if "seed" in self.metadata else []))

    @property
    def normalised(self) -> Tensor:
        """(n, C, H, W) images as (x - mean) / std."""
        return Normalisation(self.mean, self.std).normalise(self.images)

    def as_dataset(self, *, normalised: bool = True) -> TensorDataset:
        """Returns a torch Dataset of (image, label), normalised or in pixel units."""
        return TensorDataset(self.normalised if normalised else self.images, self.labels)

    def save(self, path: Path) -> None:
        """Writes the set as safetensors, whole or not at all."""
        write_tensors(path, {**self.parameters, "images": self.stored_images, "labels": self.stored_labels}, self.metadata)


def load(path: str | Path) -> Artifact:
    """Returns the synthetic set of a run directory or of a file; raises RunFilesError naming the file if it is unusable."""
    file = Path(path)
    if file.is_dir():
        check_own(file)
        check_finished(file)
        check_listed(file, SET)
        file = file / SET
    if not file.exists():
        what = f"The folder {path} has no {SET}" if Path(path).is_dir() else f"There is no file or folder {path}"
        raise RunFilesError(f"{what}, so it is no finished run. Name a run directory or a synthetic set's file.")
    try:
        tensors, metadata = read_tensors(file)
    except ValueError as error:
        hint = "" if file.suffix == ".safetensors" else " Name a run directory or a synthetic set's file."
        raise RunFilesError(f"{error}.{hint}") from None
    problem = _problem(tensors, metadata)
    if problem:
        raise RunFilesError(f"{file} is no synthetic set: {problem}.")
    parameters = {name: value for name, value in tensors.items() if name not in ("images", "labels")}
    return Artifact(tensors["images"], tensors["labels"], metadata, parameters)


class _Decode(msgspec.Struct):
    factor: Annotated[int, msgspec.Meta(ge=1, le=8)]


class Record(msgspec.Struct):
    """What ddkit reads of a set's metadata."""

    class_names: list[str]
    mean: list[float]
    std: list[float]
    ipc: Annotated[int, msgspec.Meta(ge=1)] | None = None
    pipc: Annotated[int, msgspec.Meta(ge=0)] | Literal["all"] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    seeds: list[int] = []
    decode: _Decode | None = None


def _problem(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str | None:
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or labels is None:
        return "it has no tensors 'images' and 'labels'"
    if images.ndim != 4 or images.dtype != torch.float32 or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"images are {images.dtype} {tuple(images.shape)}, labels {labels.dtype} {tuple(labels.shape)}"
    if images.numel() == 0:
        return f"its images have the shape {tuple(images.shape)}, so it holds none"
    missing = [key for key in ("class_names", "mean", "std") if not isinstance(metadata.get(key), list)]
    if missing:
        return f"its metadata lacks {', '.join(missing)}"
    try:
        record = msgspec.convert(metadata, Record)
    except msgspec.ValidationError as error:
        return f"its metadata cannot be used ({error})"
    if record.decode and any(side % record.decode.factor for side in images.shape[2:]):
        return f"its images of {images.shape[2]} x {images.shape[3]} pixels cannot be cut into {record.decode.factor} parts a side"
    if len(record.mean) != images.shape[1] or len(record.std) != images.shape[1]:
        return "its mean and std do not fit its channels"
    if not all(math.isfinite(value) for value in (*record.mean, *record.std)) or min(record.std) <= 0:
        return "its mean and std are not finite, or a std is not positive"
    if len(record.class_names) > most_classes(len(images)):
        return (
            f"it names {len(record.class_names):,} classes for {len(images):,} images, and at most {most_classes(len(images)):,} are taken"
        )
    if len(set(record.class_names)) < len(record.class_names):
        return "a class name stands there twice"
    if not (int(labels.min()) >= 0 and int(labels.max()) < len(record.class_names)):
        return "a label lies outside its class names"
    return None if bool(images.isfinite().all()) else "an image value is not finite"
