"""`python`: a dataset that is an object in Python, such as torch's and torchvision's, passed to ddkit.distill; and what objects hold."""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ddkit
from ddkit_datasets import layout
from ddkit_datasets.arrays import holdout
from ddkit_datasets.decoding import channels_first, upright

log = logging.getLogger("ddkit")


class OfItems(ddkit.Dataset):
    """Base of datasets whose splits are objects with a length and items by index."""

    takes_directory = False

    holdout: float = ddkit.option(0.2, "share of each class that is held out for testing, if there is no test dataset", gt=0, lt=1)
    holdout_seed: int = ddkit.option(0, "seed of the split for testing", ge=0)
    mirror: bool = ddkit.option(True, "whether a mirrored image has the same class")

    def take(self, items: list[Items]) -> None:
        """Takes the items of the training and of the test split; of training items alone a share is held out."""
        self.items = items
        train, test = items[0], items[-1]
        kept, held = torch.arange(len(train)), torch.arange(len(test))
        if test is train:
            kept, held = holdout(train.labels, self.holdout, self.holdout_seed)
        self._rows = {"train": (train, kept), "test": (test, held)}  # whose items a split consists of, and which rows

    def digest(self) -> str:
        """Returns a sha256 of the labels and class names."""
        digest = hashlib.sha256(repr(list(self.class_names)).encode())
        for each in self.items:
            digest.update(each.labels.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def class_names(self) -> Sequence[str]:
        """At least as many as there are labels: those that are missing by number, those that are there twice with their number."""
        names = self.items[0].texts or self.items[0].names or []
        classes = 1 + max(int(each.labels.max()) for each in self.items)
        whole = [*names, *(str(label) for label in range(len(names), classes))]
        often = Counter(whole)
        return [f"{name} ({label})" if often[name] > 1 else name for label, name in enumerate(whole)]

    def labels(self, split: str) -> Tensor:
        items, rows = self._rows[split]
        return items.labels[rows]

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        items, rows = self._rows[split]
        return [items.image(row) for row in rows[torch.as_tensor(list(indices), dtype=torch.int64)].tolist()]

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        return list(self._rows[split][1][torch.as_tensor(list(indices), dtype=torch.int64)].tolist())

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.digest().encode())
        for split in ("train", "test"):
            for index in range(len(self.labels(split))):
                image = self.images(split, [index])[0]
                digest.update(f"{split} {tuple(image.shape)} {image.dtype}".encode())
                digest.update(image.contiguous().numpy().data)
        return digest.hexdigest()


class Python(OfItems):
    """A dataset object passed to ddkit.distill(dataset=...) in Python: (image, label) by index, like a map-style dataset of torch.

    Pass (training, test), or one dataset, of which a share `holdout` of each class is held out for testing. Images are PIL images, or
    arrays and tensors of uint8, or of floats in 0..1 or up to 255: (H, W), tensors (C, H, W) or arrays (H, W, C), with C up to 4. Labels
    are integers from 0, whole floats, one-hot rows, or texts, which become the class names. They come from `.targets` or `.labels`, class
    names from `.classes`, also through torch's Subset, ConcatDataset and TensorDataset. Without these, every item is opened once for its
    label, and classes have numbers as names. Items may be dicts, as in a Dataset or DatasetDict of Hugging Face, or in a list. The types in
    `.features`, or else the names of the columns, show which is the image and which the label. Random numbers of a transform are drawn for
    each image from its index, and are the same in every run. A file cannot contain an object, so to continue or evaluate such a run, pass
    the dataset again.
    """

    of: str = ddkit.option("", "type and length of the passed dataset, filled in by ddkit")
    labels_: str = ddkit.option("", "sha256 of the labels and class names of the passed dataset, filled in by ddkit")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        passed = ddkit.data.passed_dataset()
        if passed is None:
            told = f" (it was {self.of})" if self.of else ""
            raise ddkit.InputError(
                f"The dataset 'python' is an object that was passed to ddkit.distill in Python{told}, and a command or file cannot "
                "contain it. Pass it again: ddkit.distill(recipe, dataset=...), ddkit.resume(run, dataset=...), ddkit.evaluate(run, "
                "dataset=...). Or save the images as files, and use --dataset imagefolder:PATH or npz:PATH.",
                "data.use",
            )
        if "python" not in passed.known:
            passed.known["python"] = numbered([Items(each) for each in (passed.train, passed.test) if each is not None])
        self.take(passed.known["python"])
        self.of = " and ".join(f"{each.title} of {len(each):,}" for each in self.items)
        self.labels_ = self.digest()


class Items:
    """One dataset with a length and items by index: its labels, class names, and images. `path` is that of its files, if it has any."""

    def __init__(self, dataset: Any, path: str = "") -> None:
        self.dataset = dataset
        self.title = path or f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        self.named = f"dataset {path}" if path else f"dataset that was passed, {self.title},"  # in a sentence
        try:
            self._length = len(dataset)
        except Exception as error:
            raise ddkit.InputError(f"The {self.named} has no length ({_said(error)}).") from error
        if self._length == 0:
            raise ddkit.InputError(f"The {self.named} is empty.")
        self.columns: tuple[str, str] | None = None  # of items that are dicts: image and label
        self.labels = torch.empty(0, dtype=torch.int64)
        self.texts: list[str] | None = None

    def __len__(self) -> int:
        return self._length

    @cached_property
    def given(self) -> Any:
        """(n,) labels as they are: an array of int64, or of texts."""
        found = _labels_of(self.dataset)
        if found is None:
            found = _read_labels(self._column())
        if found is None or len(found) != len(self):
            log.warning(
                "%s has no attribute .targets or .labels, so all of its %d items are opened once to read their labels.",
                self.title,
                len(self),
            )
            each = [self._label(row, self._item(row)[1]) for row in range(len(self))]
            for row, label in enumerate(each):
                if type(label) is not type(each[0]):
                    raise self._wrong(row, f"has the label {label!r}. Labels must be integers from 0, or all of them texts")
            found = np.array(each, dtype=object if isinstance(each[0], str) else np.int64)
        if found.dtype != object and int(found.min()) < 0:
            raise ddkit.InputError(f"The {self.named} has the label {int(found.min())}, but labels count from 0.")
        return found

    def _column(self) -> Any:
        """Returns the labels of a dataset of columns, such as Hugging Face's, None of another."""
        if not hasattr(self.dataset, "column_names"):
            return None
        self._item(0)
        column = self.columns[1] if self.columns else None
        return None if column is None else list(self.dataset[column])

    @property
    def names(self) -> list[str] | None:
        """The class names that it has, None if it has none; known once the labels are."""
        features = getattr(self.dataset, "features", None)
        if self.columns and isinstance(features, Mapping):
            return getattr(features.get(self.columns[1]), "names", None)
        return _names_of(self.dataset)

    def image(self, row: int) -> Tensor:
        """Returns image `row`, (1 or 3, H, W), uint8 or float32 in 0..1; raises InputError naming an item that cannot be used."""
        image, label = self._item(row)
        found, listed = self._label(row, label), self.given[row]
        if found != listed:
            raise self._wrong(row, f"has the label {found}, but .targets or .labels have {listed}")
        try:
            return _pixels(image, self._divisor if _floats(image) else 1)
        except Exception as error:
            raise self._wrong(row, f"is not a usable image: {error}") from error

    @cached_property
    def _divisor(self) -> int:
        """By what floats are divided: 255 if those of some images, of 16 at most, lie between 0 and 255 and go further than 2, else 1."""
        rows = sorted({round(row) for row in np.linspace(0, len(self) - 1, 16)})
        images = [image for row in rows if _floats(image := self._item(row)[0])]
        low, high = min(float(image.min()) for image in images), max(float(image.max()) for image in images)
        if not (low >= 0 and 2 < high <= 255):
            return 1
        log.warning("The pixels of %s are floats up to %.4g, so they are read as 0 (black) to 255 (white).", self.title, high)
        return 255

    def _wrong(self, row: int, what: str) -> ddkit.InputError:
        return ddkit.InputError(f"Item {row} of the {self.named} {what}.")

    def _item(self, row: int) -> tuple[Any, Any]:
        try:
            with _own_draws(row):
                found = self.dataset[row]
        except Exception as error:  # a dataset of the user's can raise anything
            raise self._wrong(row, f"cannot be read: {_said(error)}") from error
        if isinstance(found, Mapping):
            if self.columns is None:
                self.columns = self._columns_of(found)
            image, label = self.columns
            if image not in found or label not in found:
                raise self._wrong(row, f"has no '{label if image in found else image}'")
            return found[image], found[label]
        if not isinstance(found, tuple | list) or len(found) < 2:
            raise self._wrong(row, f"is a {type(found).__name__}, but must be (image, label), or a dict of both")
        return found[0], found[1]

    def _columns_of(self, item: Mapping[str, Any]) -> tuple[str, str]:
        """Returns the names of image and label in items that are dicts; says which label is taken if there are several."""
        features = getattr(self.dataset, "features", None)
        kinds = {name: type(kind).__name__ for name, kind in features.items()} if isinstance(features, Mapping) else {}
        images = [name for name in item if kinds.get(name) == "Image"] or [name for name in layout.IMAGES if name in item]
        images = images or [name for name, value in item.items() if isinstance(value, Image.Image)]
        labels = [name for name in item if kinds.get(name) == "ClassLabel"]
        labels = labels or [name for name in item if re.fullmatch(rf"(fine_|class_)?({'|'.join(layout.LABELS)}|class)", name)]
        if not images or not labels:
            what = "label" if images else "image"
            raise self._wrong(
                0,
                f"is a dict of {', '.join(map(str, item))}, and none of these names is known for the {what}. Rename the {what} to '{what}'",
            )
        label = next((name for name in ("label", "labels", "fine_label") if name in labels), labels[0])
        if len(labels) > 1:
            log.warning(
                "%s has several labels (%s), and '%s' is used. To use another one, rename it to 'label'.",
                self.title,
                ", ".join(labels),
                label,
            )
        return images[0], label

    def _label(self, row: int, label: Any) -> int | str:
        if type(label) is int or isinstance(label, str):
            return label if type(label) is int else str(label)
        try:
            value = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
            if value.dtype == bool and value.size == 1:
                raise ValueError("it is true or false")
            return int(layout.labels_of(value.reshape(1, -1))[0][0])
        except Exception:
            raise self._wrong(row, f"has the label {str(label)[:60]!r}, but must be an integer from 0, a one-hot row or a text") from None


def numbered(items: list[Items]) -> list[Items]:
    """Returns the datasets with `labels` as numbers (n,), int64; texts are numbered in their natural order, and are the class names."""
    given = {str(place): each.given for place, each in enumerate(items)}
    names = None
    if any(each.dtype == object for each in given.values()):
        try:
            names, given = layout.numbered(given)
        except ValueError as error:
            raise ddkit.InputError(f"The {items[0].named} and its test split do not fit: {error}.") from None
    for place, each in enumerate(items):
        each.labels = torch.from_numpy(given[str(place)])
        each.texts = names
    return items


def _floats(image: Any) -> bool:
    return (isinstance(image, Tensor) and image.is_floating_point()) or (isinstance(image, np.ndarray) and image.dtype.kind == "f")


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def _own_draws(row: int) -> Iterator[None]:
    """Inside, what is drawn from the global generators follows from `row`; afterwards they are as before."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        torch.default_generator.manual_seed(row)
        random.seed(row)
        np.random.seed(row % 2**32)
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _labels_of(dataset: Any) -> Any:
    """Returns the labels that a dataset has without opening an item, (n,) int64 or texts, None if it has none."""
    if isinstance(dataset, torch.utils.data.Subset):
        inner = _labels_of(dataset.dataset)
        return None if inner is None else inner[np.asarray(list(dataset.indices), dtype=np.int64)]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [_labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate([part for part in parts if part is not None])
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return _read_labels(dataset.tensors[1]) if len(dataset.tensors) > 1 else None
    changed: Callable[[Any], Any] | None = getattr(dataset, "target_transform", None)
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if found is not None and not callable(found):
            return _read_labels([changed(each) for each in found] if changed else found)
    return None


def _read_labels(values: Any) -> Any:
    try:
        return layout.labels_of(np.asarray(values))[0]
    except Exception:  # of another kind, or third-party code
        return None


def _names_of(dataset: Any) -> list[str] | None:
    """Returns the class names that a dataset has, None if it has none: torchvision's ImageNet has several words for each."""
    if isinstance(dataset, torch.utils.data.Subset):
        return _names_of(dataset.dataset)
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return _names_of(dataset.datasets[0])
    found = getattr(dataset, "classes", None)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return None
    return [", ".join(map(str, each)) if isinstance(each, tuple | list) else str(each) for each in found]


def _pixels(image: Any, divisor: int) -> Tensor:
    """Returns (1 or 3, H, W), uint8 or float32 in 0..1; without alpha; a PIL image is turned upright. Raises ValueError saying why not.

    Floats are divided by `divisor`.
    """
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(channels_first(upright(image)), order="C"))
    if isinstance(image, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(image if image.dtype != np.uint16 else image.astype(np.int32)))
        found = found.permute(2, 0, 1) if found.ndim == 3 else found
        sixteen = image.dtype == np.uint16
    elif isinstance(image, Tensor):
        found, sixteen = image.detach().cpu(), image.dtype == torch.uint16
    else:
        raise ValueError(f"it is a {type(image).__name__}, not a PIL image, tensor or array")
    found = found[None] if found.ndim == 2 else found
    if found.ndim != 3 or found.shape[0] not in (1, 2, 3, 4) or 0 in found.shape:
        raise ValueError(
            f"it has the shape {tuple(image.shape)}, but must be (H, W), a tensor (C, H, W) or an array (H, W, C), with C from 1 to 4"
        )
    found = found[: 1 if found.shape[0] < 3 else 3].contiguous()
    if sixteen:
        return (found.float() / 257).round().to(torch.uint8)
    if found.dtype == torch.uint8:
        return found.clone()
    if found.dtype == torch.bool:
        return found.to(torch.uint8) * 255
    if not found.is_floating_point():
        raise ValueError(f"its pixels are {str(found.dtype).removeprefix('torch.')}, not uint8, uint16, or floats in 0..1")
    found = found / divisor
    low, high = float(found.min()), float(found.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"its pixels go from {low:.3g} to {high:.3g}, not from 0 to 1. Remove Normalize, as ddkit normalises images itself"
        )
    found = found.float()
    bytes_ = (found * 255).round()
    return bytes_.to(torch.uint8) if torch.equal(bytes_ / 255, found) else found  # what ToTensor made of bytes takes a quarter as bytes
