"""The real data of a run: the accessible images, the test set, and nothing opened that need not be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ddkit import plugins
from ddkit.components import DataInfo, Dataset
from ddkit.errors import DdkitError, InputError
from ddkit.imagecache import entry_of
from ddkit.images import common_shape, conform, other_sizes, to_unit
from ddkit.randomness import generator
from ddkit.recipe import DataTable

log = logging.getLogger("ddkit")


def open_dataset(table: DataTable) -> Dataset:
    """Returns the recipe's dataset; raises InputError where its files cannot be used."""
    try:
        dataset: Dataset = plugins.create("dataset", table.use, table.options, where="data", directory=table.dir)
        names, counts = list(dataset.class_names), class_counts(dataset.labels("train"), len(dataset.class_names))
    except DdkitError:
        raise
    except Exception as error:  # a stranger's dataset can raise anything
        raise InputError(f"The dataset '{table.use}' could not be opened: {type(error).__name__}: {error}.") from error
    if len(counts) > len(names):
        raise InputError(f"The dataset '{table.use}' has the label {len(counts) - 1} but only {len(names)} class names.")
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise InputError(f"The class '{name}' of the dataset '{table.use}' has no training image. Add some or remove the class.")
    return dataset


def data_info(dataset: Dataset, shape: Sequence[int]) -> DataInfo:
    """Returns what is known of `dataset` with images of `shape` (C, H, W)."""
    channels, height, width = shape
    return DataInfo(class_names=tuple(dataset.class_names), channels=channels, size=(height, width), mirror=dataset.mirror)


def check_classes(dataset: Dataset) -> None:
    """Raises InputError where there are fewer classes than a classifier can tell apart."""
    if len(dataset.class_names) < 2:
        raise InputError(f"The data has the classes {list(dataset.class_names)}; a classifier needs at least two.")


def class_counts(labels: Tensor, classes: int) -> list[int]:
    """Returns the number of rows of each class 0..classes-1."""
    return torch.bincount(labels, minlength=classes).tolist()


def accessible_indices(labels: Tensor, classes: int, pipc: int | str, seed: int) -> list[int]:
    """Returns the indices of at most `pipc` rows of each class, class by class, each class's in ascending order.

    The choice for a class depends on (seed, class) alone.
    """
    order = labels.argsort(stable=True)  # stable: each class's rows ascend
    if pipc == "all":
        return order.tolist()
    chosen = [order[:0]]
    for label, rows in enumerate(order.split(class_counts(labels, classes))):
        if int(pipc) < len(rows):
            rows = rows[torch.randperm(len(rows), generator=generator(seed, "accessible", label))[: int(pipc)].sort().values]
        chosen.append(rows)
    return torch.cat(chosen).tolist()


def load_images(dataset: Dataset, split: str, indices: Sequence[int], shape: tuple[int, int, int] | None) -> Tensor:
    """Returns images `indices` of a split as (n, C, H, W) of `shape` (None: the most common one among them).

    They come from ddkit's cache where no file has changed since they were decoded. Warns of images that were resized.
    """
    entry = entry_of(dataset, split, indices, shape)
    found = None if entry is None else entry.read()
    if found is None:
        found = _decoded(dataset, split, indices, shape)
        if entry is not None:
            entry.write(*found)
    images, resized = found
    if resized:
        height, width = images.shape[2:]
        log.warning("%d of %d images were resized to %d x %d pixels.", resized, len(images), height, width)
    return images


def _decoded(dataset: Dataset, split: str, indices: Sequence[int], shape: tuple[int, int, int] | None) -> tuple[Tensor, int]:
    """Returns (images, how many were resized) of the dataset itself."""
    images = dataset.images(split, indices)
    if isinstance(images, Tensor) and len(images) and images[0].shape == (shape or common_shape([images[0]])):
        return images if images.dtype == torch.uint8 else to_unit(images), 0
    pending = list(images)
    del images  # `conform` frees one image after the other
    shape = shape or common_shape(pending)
    resized = other_sizes(pending, shape)
    return conform(pending, shape), resized


class NoImages(Dataset):
    """The classes that a teacher knows, and not one image: for runs that need no real data."""

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self._names = list(class_names)

    @property
    def class_names(self) -> Sequence[str]:
        return self._names

    def labels(self, split: str) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        return []


class RealData:
    """The accessible real images of a run: `images` (m, C, H, W) in pixel units (uint8 or float), `labels` (m,)."""

    def __init__(self, dataset: Dataset, pipc: int | str, seed: int, shape: tuple[int, int, int] | None = None) -> None:
        """Opens only the accessible images; `shape` is needed where pipc is 0."""
        self.dataset = dataset
        labels = dataset.labels("train")
        self.indices = accessible_indices(labels, len(dataset.class_names), pipc, seed)
        if not self.indices and shape is None:
            raise InputError(
                "With --pipc 0 nothing tells the image shape: give a teacher made by ddkit, which records it (--teacher FILE)."
            )
        self.images = load_images(dataset, "train", self.indices, shape)
        self.labels = labels[torch.tensor(self.indices, dtype=torch.int64)]
        self.info = data_info(dataset, self.images.shape[1:])

    @property
    def sources(self) -> list[str | int]:
        """File names or indices of the accessible images."""
        return self.dataset.sources("train", self.indices)

    def counts(self) -> dict[str, int]:
        """Returns the number of accessible images by class name."""
        return dict(zip(self.info.class_names, class_counts(self.labels, self.info.classes), strict=True))

    def check_test_set(self) -> None:
        """Raises InputError if the test split is empty."""
        if len(self.dataset.labels("test")) == 0:
            raise InputError("The dataset has no test images, so nothing can be evaluated. Use --evaluate none.")

    @cached_property
    def test_set(self) -> tuple[Tensor, Tensor]:
        """(images, labels) of the test split, read once; raises InputError if it is empty."""
        self.check_test_set()
        labels = self.dataset.labels("test")
        return load_images(self.dataset, "test", range(len(labels)), self.info.shape), labels
