"""Datasets that are arrays in memory: scikit-learn's digits, the user's npz files."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddkit

Splits = dict[str, tuple[Tensor, Tensor]]


class InMemory(ddkit.Dataset):
    """A dataset whose splits are tensors: images (n, C, H, W) and labels (n,)."""

    splits: Splits

    def labels(self, split: str) -> Tensor:
        return self.splits[split][1]

    def images(self, split: str, indices: Sequence[int]) -> Tensor:
        return self.splits[split][0][torch.as_tensor(list(indices), dtype=torch.long)]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            for tensor in self.splits[name]:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.numpy().data)  # without a copy
        return digest.hexdigest()


class Digits(InMemory):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, offline; every fifth of each class is the test split."""

    takes_directory = False

    mirror = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        pixels, targets = _digits()
        images = torch.from_numpy(pixels).float().div(16).unsqueeze(1)
        labels = torch.from_numpy(targets).long()
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(10):
            held_out[(labels == label).nonzero().flatten()[4::5]] = True
        self.splits = {"train": (images[~held_out], labels[~held_out]), "test": (images[held_out], labels[held_out])}

    @property
    def class_names(self) -> Sequence[str]:
        return [str(digit) for digit in range(10)]


def _digits() -> tuple[Any, Any]:
    """Returns scikit-learn's digits, (n, 8, 8) in 0..16 and (n,): its file read alone, as importing it takes a second."""
    found = find_spec("sklearn")
    files = [Path(folder, "datasets", "data", "digits.csv.gz") for folder in (found.submodule_search_locations or [])] if found else []
    if files and files[0].is_file():
        with gzip.open(files[0], "rt", encoding="ascii") as stream:
            table = np.loadtxt(stream, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # another release may keep it elsewhere

    data = load_digits()
    return data.images, data.target


class Npz(InMemory):
    """A NumPy .npz file of the user's: arrays x_train, y_train, x_test, y_test (and class_names, if you like).

    Images are (n, H, W), (n, H, W, C) or (n, C, H, W) with C 1 or 3; uint8, or floats in 0..1. Labels are integers
    from 0. Without x_test, `holdout` of each class becomes the test split. With an array `unclipped`, as the exporter npz
    writes it, floats may lie outside 0..1. Nothing is unpickled. A packed file may declare 1,024 MiB, or 100 times its own size up to
    4,096 MiB, or 10 times its own size; more is refused before it is unpacked.
    """

    takes_directory = False
    argument = "path"

    path: str = ddkit.option("", "the .npz file")
    holdout: float = ddkit.option(0.2, "test share of each class, without x_test", gt=0, lt=1)
    holdout_seed: int = ddkit.option(0, "seed of that split", ge=0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.path:
            raise ddkit.InputError(f"The dataset '{self.name}' needs a file: --dataset {self.name}:PATH", "data.path")
        path = Path(self.path).absolute()
        self.path = str(path)
        arrays = _read(path)
        self.splits = {"train": _split(arrays, "train", path)}
        if "x_test" in arrays:
            self.splits["test"] = _split(arrays, "test", path)
        else:
            images, labels = self.splits["train"]
            kept, held = holdout(labels, self.holdout, self.holdout_seed)
            self.splits = {"train": (images[kept], labels[kept]), "test": (images[held], labels[held])}
        self._names = _class_names(arrays, torch.cat([labels for _, labels in self.splits.values()]), path)

    @property
    def class_names(self) -> Sequence[str]:
        return self._names


def holdout(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns (kept, held out) row indices, ascending: `share` of each class, at least one where it has two, is held out."""
    kept, held = [], []
    classes, sizes = labels.unique(return_counts=True)
    for label, rows in zip(classes.tolist(), labels.argsort(stable=True).split(sizes.tolist()), strict=True):
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + label))
        held.append(rows[order[:count]])
        kept.append(rows[order[count:]])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def _read(path: Path) -> dict[str, Any]:
    arrays = ddkit.data.read_arrays(path)
    if "x_train" not in arrays or "y_train" not in arrays:
        raise ddkit.InputError(f"{path} needs the arrays x_train and y_train; it has {', '.join(sorted(arrays)) or 'none'}.")
    return arrays


def _split(arrays: dict[str, Any], split: str, path: Path) -> tuple[Tensor, Tensor]:
    x, y = arrays[f"x_{split}"], arrays.get(f"y_{split}")
    images = _images(x, split, path, unclipped="unclipped" in arrays)
    if y is None or y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu":
        raise ddkit.InputError(f"{path}: y_{split} must be integers, one for each image of x_{split}.")
    if split == "train" and len(y) == 0:
        raise ddkit.InputError(f"{path}: x_train holds no image.")
    if len(y) and int(y.min()) < 0:
        raise ddkit.InputError(f"{path}: y_{split} holds a negative label; labels count from 0.")
    return images, torch.from_numpy(y.astype(np.int64))


def _images(x: Any, split: str, path: Path, *, unclipped: bool) -> Tensor:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ddkit.InputError(f"{path}: x_{split} has shape {x.shape}; it must be (n, H, W), (n, H, W, C) or (n, C, H, W), C 1 or 3.")
    if x.dtype == np.uint8:
        return _plain(np.ascontiguousarray(x))
    outside = bool(x.size) and not unclipped and (x.min() < 0 or x.max() > 1)
    if x.dtype.kind != "f" or not np.isfinite(x).all() or outside:
        raise ddkit.InputError(f"{path}: x_{split} must be uint8, or finite floats in 0..1.")
    return _plain(np.ascontiguousarray(x, dtype=np.float32))


def _plain(x: Any) -> Tensor:
    """Returns an array as a tensor with the usual strides: with one channel at the end they would choose another convolution."""
    return torch.from_numpy(x).view(-1).view(x.shape)


def _class_names(arrays: dict[str, Any], labels: Tensor, path: Path) -> list[str]:
    classes = int(labels.max()) + 1
    if classes > len(labels):  # so that a stray label makes an error, not a million classes
        raise ddkit.InputError(f"{path}: the largest label is {classes - 1}, but there are only {len(labels)} images; labels count from 0.")
    if "class_names" not in arrays:
        return [str(label) for label in range(classes)]
    found = np.atleast_1d(arrays["class_names"])
    try:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in found]
    except UnicodeDecodeError:
        raise ddkit.InputError(f"{path}: class_names holds bytes that are no UTF-8 text; save them as text.") from None
    if len(names) < classes:
        raise ddkit.InputError(f"{path}: class_names has {len(names)} names for {classes} classes.")
    return names
