"""`python`: a dataset that is an object in Python, such as torch's and torchvision's, passed to ddkit.distill."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ddkit
from ddkit_datasets.arrays import holdout
from ddkit_datasets.decoding import channels_first, upright

log = logging.getLogger("ddkit")


class Python(ddkit.Dataset):
    """A Dataset object passed to ddkit.distill(dataset=...) in Python: (image, label) by index, as torch's map-style datasets have it.

    Pass (training, test), or one of which `holdout` of each class becomes the test split. Images are PIL images, or arrays and tensors
    of uint8, or of floats in 0..1: (H, W), or (C, H, W) as tensors and (H, W, C) as arrays, C up to 4. Labels come from `.targets` or
    `.labels`, class names from `.classes`, also through torch's Subset, ConcatDataset and TensorDataset; without these every item is
    opened once for its label, and classes are called by number. What a transform draws at random is drawn anew for each image, from its
    index, and is the same in every run. A file cannot hold an object: to continue or evaluate such a run, pass the dataset again.
    """

    takes_directory = False

    holdout: float = ddkit.option(0.2, "test share of each class, without a test dataset", gt=0, lt=1)
    holdout_seed: int = ddkit.option(0, "seed of that split", ge=0)
    mirror: bool = ddkit.option(True, "whether a mirrored image keeps its class")
    of: str = ddkit.option("", "what was passed: type and length, filled in")
    labels_: str = ddkit.option("", "sha256 of the labels and class names that were passed, filled in")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        passed = ddkit.data.passed_dataset()
        if passed is None:
            told = f" (then: {self.of})" if self.of else ""
            raise ddkit.InputError(
                f"The dataset 'python' is an object that was passed to ddkit.distill in Python{told}, and no command or file can hold it. "
                "Pass it again: ddkit.distill(recipe, dataset=...), ddkit.resume(run, dataset=...), ddkit.evaluate(run, dataset=...). Or "
                "keep the images as files, and use --dataset imagefolder:PATH or npz:PATH.",
                "data.use",
            )
        if "python" not in passed.known:
            passed.known["python"] = [_Items(each) for each in (passed.train, passed.test) if each is not None]
        self._passed: list[_Items] = passed.known["python"]
        train, test = self._passed[0], self._passed[-1]
        kept, held = torch.arange(len(train)), torch.arange(len(test))
        if test is train:
            kept, held = holdout(train.labels, self.holdout, self.holdout_seed)
        self._rows = {"train": (train, kept), "test": (test, held)}  # whose items a split consists of, and which rows
        self.of = " and ".join(f"{each.title} of {len(each):,}" for each in self._passed)
        self.labels_ = self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256(repr(list(self.class_names)).encode())
        for each in self._passed:
            digest.update(each.labels.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def class_names(self) -> Sequence[str]:
        """At least as many as there are labels: those that are missing by number, those that are there twice with their number."""
        names = self._passed[0].names or []
        classes = 1 + max(int(each.labels.max()) for each in self._passed)
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
        digest = hashlib.sha256(self._digest().encode())
        for split in ("train", "test"):
            for index in range(len(self.labels(split))):
                image = self.images(split, [index])[0]
                digest.update(f"{split} {tuple(image.shape)} {image.dtype}".encode())
                digest.update(image.contiguous().numpy().data)
        return digest.hexdigest()


class _Items:
    """One dataset that was passed: its length, labels, class names, and images by index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.title = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        try:
            self._length = len(dataset)
        except Exception as error:
            raise ddkit.InputError(f"The dataset that was passed, {self.title}, has no length ({_said(error)}).") from error
        if self._length == 0:
            raise ddkit.InputError(f"The dataset that was passed, {self.title}, is empty.")
        self.names = _names_of(dataset)

    def __len__(self) -> int:
        return self._length

    @cached_property
    def labels(self) -> Tensor:
        """(n,) int64."""
        found = _labels_of(self.dataset)
        if found is None or len(found) != len(self):
            log.warning("%s has no labels (.targets or .labels): all of its %d items are opened once for them.", self.title, len(self))
            found = torch.tensor([self._label(row, self._item(row)[1]) for row in range(len(self))])
        if int(found.min()) < 0:
            raise ddkit.InputError(f"The dataset that was passed, {self.title}, has the label {int(found.min())}; labels count from 0.")
        return found

    def image(self, row: int) -> Tensor:
        """Returns image `row`, (1 or 3, H, W), uint8 or float32 in 0..1; raises InputError naming an item that cannot be used."""
        image, label = self._item(row)
        found, listed = self._label(row, label), int(self.labels[row])
        if found != listed:
            raise self._wrong(row, f"has the label {found}, but its .targets or .labels say {listed}")
        try:
            return _pixels(image)
        except Exception as error:
            raise self._wrong(row, f"is no image that can be used: {error}") from error

    def _wrong(self, row: int, what: str) -> ddkit.InputError:
        return ddkit.InputError(f"Item {row} of the dataset that was passed, {self.title}, {what}.")

    def _item(self, row: int) -> tuple[Any, Any]:
        try:
            with _own_draws(row):
                found = self.dataset[row]
        except Exception as error:  # a dataset of the user's can raise anything
            raise self._wrong(row, f"cannot be had: {_said(error)}") from error
        if not isinstance(found, tuple | list) or len(found) < 2:
            raise self._wrong(row, f"is a {type(found).__name__}; it has to be (image, label)")
        return found[0], found[1]

    def _label(self, row: int, label: Any) -> int:
        one = (isinstance(label, Tensor) and label.numel() == 1) or (isinstance(label, np.generic | np.ndarray) and label.size == 1)
        value = label.item() if one else label
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(row, f"has the label {str(label)[:60]!r}; it has to be an integer from 0")
        return value


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


def _labels_of(dataset: Any) -> Tensor | None:
    """Returns the labels that a dataset has without opening an item, None if it has none."""
    if isinstance(dataset, torch.utils.data.Subset):
        inner = _labels_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [_labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return _integers(dataset.tensors[1]) if len(dataset.tensors) > 1 else None
    changed: Callable[[Any], Any] | None = getattr(dataset, "target_transform", None)
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if found is not None and not callable(found):
            return _integers([changed(each) for each in found] if changed else found)
    return None


def _integers(values: Any) -> Tensor | None:
    try:
        found = np.asarray(values)
    except Exception:
        return None
    return torch.from_numpy(found.astype(np.int64)) if found.ndim == 1 and found.dtype.kind in "iu" else None


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


def _pixels(image: Any) -> Tensor:
    """Returns (1 or 3, H, W), uint8 or float32 in 0..1; without alpha; a PIL image is turned upright. Raises ValueError saying why not."""
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
            f"it has the shape {tuple(image.shape)}, not (H, W), or channels first in a tensor and last in an array, 1 to 4 of them"
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
    low, high = float(found.min()), float(found.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"its pixels lie between {low:.3g} and {high:.3g}, not in 0..1; leave out Normalize, ddkit normalises by itself")
    found = found.float()
    bytes_ = (found * 255).round()
    return bytes_.to(torch.uint8) if torch.equal(bytes_ / 255, found) else found  # what ToTensor made of bytes takes a quarter as bytes
