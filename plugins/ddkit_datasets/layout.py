"""What arrays are: which of several are images and labels of which split, where the channels are, what the numbers of labels mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddkit.data import natural
from ddkit_datasets.splits import TEST, TRAIN, VALIDATION

SPLITS = {"train": (*TRAIN, "tr"), "test": ("te", *(word for word in TEST if word not in VALIDATION)), "val": VALIDATION}
IMAGES = ("x", "images", "image", "imgs", "img", "data", "features", "inputs", "pixels")
LABELS = ("y", "labels", "label", "targets", "target", "classes")
PLAIN = {f"{kind}_{split}" for kind in "xy" for split in ("train", "test")}  # names that need no word


class Pair(NamedTuple):
    """The names of the arrays of a split: images and labels ("" where it has none)."""

    images: str
    labels: str


def splits_of(names: Sequence[str]) -> dict[str, Pair]:
    """Returns by split ("train", "test", "val") the arrays of images and labels; a pair of no split is "train".

    >>> splits_of(["train_images", "train_labels", "Xtest", "Ytest"])
    {'train': Pair(images='train_images', labels='train_labels'), 'test': Pair(images='Xtest', labels='Ytest')}
    >>> splits_of(["X", "y", "note"])
    {'train': Pair(images='X', labels='y')}
    """
    found: dict[tuple[str, str], str] = {}
    for name in names:
        key = _role(name)
        if key is not None:
            found.setdefault(key, name)
    if not any(split == "train" for split, _ in found):
        found = {("train" if split == "" else split, kind): name for (split, kind), name in found.items()}
    order = [split for split in SPLITS if (split, "images") in found]
    return {split: Pair(found[split, "images"], found.get((split, "labels"), "")) for split in order}


def _role(name: str) -> tuple[str, str] | None:
    """Returns the split ("" for none) and the kind, "images" or "labels", that the name of an array says; None for another array."""
    text = name.lower()
    for kind, words in (("images", IMAGES), ("labels", LABELS)):
        for word in words:
            if text == word:
                return "", kind
            for split, forms in SPLITS.items():
                form = "|".join(forms)
                if re.fullmatch(rf"({form})[_.-]?{word}|{word}[_.-]?({form})", text):
                    return split, kind
    return None


def images_of(x: Any, shape: Sequence[int], what: str) -> Any:
    """Returns images (n, C, H, W) with C 1 or 3, as a view.

    `x` is (n, H, W), (n, H, W, C) or (n, C, H, W), or rows of numbers that `shape`, of one image, arranges. Transparency is left out.
    Raises ValueError.
    """
    if shape:
        if math.prod(shape) != math.prod(x.shape[1:]) or len(shape) not in (2, 3):
            raise ValueError(f"{what} has shape {x.shape}, but data.shape = {list(shape)} has {math.prod(shape)} numbers per image")
        x = x.reshape(len(x), *shape)
    if x.ndim == 2:
        raise ValueError(f"{what} has shape {x.shape}: rows of numbers. Add the shape of an image: {_shapes(x.shape[1])}")
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim == 4 and x.shape[1] == 4:
        x = x[:, :3]
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"{what} has shape {x.shape}, but must be (n, H, W), (n, H, W, C) or (n, C, H, W) with C 1, 3 or 4")
    return x


def _shapes(numbers: int) -> str:
    """Returns --set data.shape=... for the square images that have so many numbers."""
    found = []
    for channels in (1, 3, 4):
        side = math.isqrt(numbers // channels)
        if side and channels * side * side == numbers:
            found += [[side, side]] if channels == 1 else [[channels, side, side], [side, side, channels]]
    told = " or ".join(f"--set 'data.shape=[{','.join(map(str, shape))}]'" for shape in found)
    return told or "--set 'data.shape=[HEIGHT,WIDTH,CHANNELS]'"


def labels_of(y: Any) -> tuple[Any, int, str]:
    """Returns labels (n,): int64 numbers, or texts as they are, then the number of classes that they name (0: unknown), and what they were.

    `y` is (n,) or (n, 1): integers, whole floats, or texts; or one-hot rows (n, K). Raises ValueError.

    >>> labels_of(np.array([[0, 1], [1, 0]]))
    (array([1, 0]), 2, 'one-hot labels')
    >>> labels_of(np.array([[2.0], [0.0]]))
    (array([2, 0]), 0, '')
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "biufUS" or y.ndim not in (1, 2):
        raise ValueError(f"they are {y.dtype} of shape {y.shape}")
    if y.ndim == 2:
        if y.dtype.kind in "US" or not bool(((y == 0) | (y == 1)).all()):
            raise ValueError(f"they are rows {y.shape} that are not one-hot, and each real image must have one class")
        if not bool((y.sum(1) == 1).all()):
            raise ValueError(f"they are rows {y.shape} that give an image several classes, or none")
        return y.argmax(1).astype(np.int64), y.shape[1], "one-hot labels"
    if y.dtype.kind in "US":
        return np.array([each.decode() if isinstance(each, bytes) else str(each) for each in y], dtype=object), 0, "class names as labels"
    if y.dtype.kind == "f" and not bool((np.isfinite(y) & (y == np.round(y)) & (np.abs(y) < 2**53)).all()):
        raise ValueError(f"they are {y.dtype} and not all whole numbers")
    return y.astype(np.int64), 0, ""


def numbered(labels: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns the class names, in natural order, and labels by split as numbers, of labels that are texts. Raises ValueError."""
    if any(each.dtype != object for each in labels.values() if len(each)):
        raise ValueError("the labels of one split are texts, but those of the other are numbers")
    names = sorted({name for each in labels.values() for name in each.tolist()}, key=natural)
    number = {name: place for place, name in enumerate(names)}
    return names, {split: np.array([number[name] for name in each.tolist()], dtype=np.int64) for split, each in labels.items()}


def pixels_of(x: Any, name: str) -> Any:
    """Returns images as uint8, or as floats: bool and integers in 0..255 as bytes, those of 16 bits scaled to bytes. Raises ValueError."""
    if x.dtype.kind == "f" or x.dtype == np.uint8:
        return x
    if x.dtype.kind == "b":
        return x.astype(np.uint8) * np.uint8(255)
    low, high = (int(x.min()), int(x.max())) if x.size and x.dtype.kind in "iu" else (0, 0)
    if x.dtype.kind not in "iu" or low < 0 or high > (65535 if x.dtype == np.uint16 else 255):
        raise ValueError(f"{name} must be uint8, or floats in 0..1 or 0..255, but is {x.dtype} from {low} to {high}")
    return (x / 257).round().astype(np.uint8) if high > 255 else x.astype(np.uint8)


def divisor_of(arrays: Mapping[str, Any]) -> int:
    """Returns by what to divide floats (arrays by name) to have them in 0..1: 1, or 255 if they go further than 2. Raises ValueError."""
    high = 0.0
    for name, x in arrays.items():
        if not x.size:
            continue
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be uint8, or finite floats in 0..1 or 0..255")
        least, most = float(x.min()), float(x.max())
        if least < 0 or 1 < most <= 2 or most > 255:
            raise ValueError(
                f"{name} must be uint8, or floats in 0..1 or 0..255, but goes from {least:.4g} to {most:.4g}. If it was normalised, save "
                "the pixels from before: ddkit normalises them itself"
            )
        high = max(high, most)
    return 255 if high > 2 else 1
