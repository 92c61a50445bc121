"""`file:PATH`: a set that is there already, as a run, a file, or a folder of images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ddkit

log = logging.getLogger("ddkit")
OF_A_RUN = ("synthetic.safetensors", "manifest.json", "recipe.toml")


class Source(NamedTuple):
    """A set to continue from: the images of each class name, `counts` known before one is opened, `images(name, n)` the first n.

    `labels(name, n, class_names)` are the probabilities (n, K) of these images for the class names of a run; None if the set has none.
    """

    counts: dict[str, int]
    images: Callable[[str, int], list[Tensor]]
    labels: Callable[[str, int, Sequence[str]], Tensor] | None = None


class File(ddkit.Initializer):
    """An existing set, `file:PATH`: an earlier run, a synthetic.safetensors, or class folders of images.

    Classes are matched by name, and the first ipc images of each are used, in the order of the set or of the file names. Images of
    another size or other channels are converted, with a warning. Pixels are normalised with the statistics of the new run.
    Learned labels (labels.kind) start from the labels stored with the set.
    """

    argument = "path"

    path: str = ddkit.option("", "run directory, .safetensors file, or folder with class folders")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.path:
            raise ddkit.InputError("The initializer 'file' needs a path, as in --init file:PATH.", "initializer.path")
        self.path = str(Path(self.path).absolute())

    @cached_property
    def source(self) -> Source:
        """The set; raises InputError where there is none, RunFilesError where a run or file is damaged."""
        path = Path(self.path)
        if not path.exists():
            raise ddkit.InputError(f"The initializer 'file' cannot read {path}, which does not exist.", "initializer.path")
        if path.is_file() or any((path / name).exists() for name in OF_A_RUN):
            return _of_artifact(ddkit.load(path))
        return _of_folder(path)

    def check(self, ipc: int, available: Mapping[str, int]) -> None:
        counts, path = self.source.counts, self.path
        missing = [name for name in available if name not in counts]
        if missing:
            raise ddkit.InputError(
                f"{path} has no class {ddkit.data.few([repr(name) for name in missing])}. Its classes are "
                f"{ddkit.data.few([repr(name) for name in counts], 12)}. An initial set needs all classes of the data, with "
                "the same names.",
                "initializer.path",
            )
        short = [f"'{name}' has {counts[name]}" for name in available if counts[name] < ipc]
        if short:
            raise ddkit.InputError(f"{path} has too few images for ipc {ipc}: {ddkit.data.few(short)}. Lower --ipc.", "ipc")

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        images: list[Tensor] = []
        for label, count in zip(*start.labels.unique(return_counts=True), strict=True):
            images += self.source.images(start.class_names[int(label)], int(count))
        others = sum(tuple(image.shape) != tuple(start.shape) for image in images)
        if others:
            channels, height, width = start.shape
            log.warning(
                "%s: %d of %d images were converted to %d channel%s and %d x %d pixels.",
                self.path, others, len(images), channels, "s" if channels > 1 else "", height, width,
            )  # fmt: skip
        return start.normalisation.normalise(ddkit.data.conform(images, start.shape))

    def soft_labels(self, start: ddkit.InitContext) -> Tensor | None:
        labels = self.source.labels
        if labels is None:
            return None
        counts = zip(*start.labels.unique(return_counts=True), strict=True)
        return torch.cat([labels(start.class_names[int(label)], int(count), start.class_names) for label, count in counts])


def _of_artifact(artifact: ddkit.Artifact) -> Source:
    names = artifact.class_names
    counts = torch.bincount(artifact.labels, minlength=len(names)).tolist()

    def images(name: str, count: int) -> list[Tensor]:
        return list(artifact.images[artifact.labels == names.index(name)][:count])

    def labels(name: str, count: int, classes: Sequence[str]) -> Tensor:
        assert artifact.soft_labels is not None
        return artifact.soft_labels[artifact.labels == names.index(name)][:count, [names.index(each) for each in classes]]

    found = {name: count for name, count in zip(names, counts, strict=True) if count}
    return Source(found, images, None if artifact.soft_labels is None else labels)


def _of_folder(path: Path) -> Source:
    """Returns the images of PATH/CLASS, or of PATH/train/CLASS, in the order of their names."""
    dataset: ddkit.Dataset = ddkit.create("dataset", f"imagefolder:{path}")
    splits = ("train",) if (path / "train").is_dir() else ("train", "test")  # without a folder of its own the test split is part of it
    files: dict[str, list[tuple[str, str, int]]] = {name: [] for name in dataset.class_names}
    for split in splits:
        labels = dataset.labels(split).tolist()
        for index, source in enumerate(dataset.sources(split, range(len(labels)))):
            files[dataset.class_names[labels[index]]].append((str(source), split, index))

    def images(name: str, count: int) -> list[Tensor]:
        return [dataset.images(split, [index])[0] for _, split, index in sorted(files[name])[:count]]

    return Source({name: len(found) for name, found in files.items()}, images)
