"""Datasets that are arrays in memory: scikit-learn's digits, those of torchvision, downloaded on first use, and the user's npz files."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddkit

Splits = dict[str, tuple[Tensor, Tensor]]
DIGITS = tuple("0123456789")
FINE_LABELS = (  # of CIFAR-100, in the order of its labels
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish "
    "forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle "
    "mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine "
    "possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
    "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree "
    "wolf woman worm"
)


class InMemory(ddkit.Dataset):
    """A dataset whose splits are tensors, images (n, C, H, W) and labels (n,), of the classes `names`."""

    splits: Splits
    names: Sequence[str]

    @property
    def class_names(self) -> Sequence[str]:
        return self.names

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
    names = DIGITS

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        pixels, targets = _digits()
        images = torch.from_numpy(pixels).float().div(16).unsqueeze(1)
        labels = torch.from_numpy(targets).long()
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(10):
            held_out[(labels == label).nonzero().flatten()[4::5]] = True
        self.splits = {"train": (images[~held_out], labels[~held_out]), "test": (images[held_out], labels[held_out])}


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


class Torchvision(InMemory):
    """Base of the downloaded datasets; `source` is the name of torchvision's class."""

    source: str

    @cached_property
    def splits(self) -> Splits:  # type: ignore[override]
        """Both splits, downloaded into `directory` (default: ddkit's cache) if they are not there."""
        return {"train": self._load(train=True), "test": self._load(train=False)}

    def _load(self, *, train: bool) -> tuple[Tensor, Tensor]:
        import torchvision.datasets

        folder = Path(self.directory) if self.directory else ddkit.data.cache_folder() / "datasets"
        part: dict[str, Any] = {"split": "train" if train else "test"} if self.source == "SVHN" else {"train": train}
        try:
            folder.mkdir(mode=0o777 if self.directory else 0o700, parents=True, exist_ok=True)
            found: Any = getattr(torchvision.datasets, self.source)(str(folder), download=True, **part)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise ddkit.InputError(
                f"The dataset '{self.name}' is not in {folder} and could not be downloaded ({reason}). Without a network "
                "use --dataset digits, which is installed with ddkit, or your own images with --dataset imagefolder:PATH; "
                "--data-dir names a folder that holds the download already."
            ) from None
        images = torch.as_tensor(found.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        labels = found.labels if self.source == "SVHN" else found.targets
        return images.contiguous(), torch.as_tensor(labels, dtype=torch.int64)


class Mnist(Torchvision):
    """MNIST: 70,000 handwritten digits, 28 x 28 grey (torchvision, downloaded on first use)."""

    source = "MNIST"
    mirror = False
    names = DIGITS


class FashionMnist(Torchvision):
    """Fashion-MNIST: 70,000 garments, 28 x 28 grey (torchvision, downloaded on first use)."""

    source = "FashionMNIST"
    names = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Cifar10(Torchvision):
    """CIFAR-10: 60,000 photographs, 32 x 32 RGB (torchvision, downloaded on first use)."""

    source = "CIFAR10"
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Svhn(Torchvision):
    """SVHN: 99,289 house numbers in photographs, 32 x 32 RGB (torchvision, downloaded on first use); without the extra images."""

    source = "SVHN"
    mirror = False
    names = DIGITS


class Cifar100(Torchvision):
    """CIFAR-100: 60,000 photographs of 100 classes, 32 x 32 RGB (torchvision, downloaded on first use)."""

    source = "CIFAR100"
    names = tuple(FINE_LABELS.split())


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
        arrays = ddkit.data.read_arrays(path)
        if "x_train" not in arrays or "y_train" not in arrays:
            raise ddkit.InputError(f"{path} needs the arrays x_train and y_train; it has {', '.join(sorted(arrays)) or 'none'}.")
        self.splits = {"train": _split(arrays, "train", path)}
        if "x_test" in arrays:
            self.splits["test"] = _split(arrays, "test", path)
        else:
            images, labels = self.splits["train"]
            kept, held = holdout(labels, self.holdout, self.holdout_seed)
            self.splits = {"train": (images[kept], labels[kept]), "test": (images[held], labels[held])}
        self.names = _class_names(arrays, torch.cat([labels for _, labels in self.splits.values()]), path)


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


def _split(arrays: dict[str, Any], split: str, path: Path) -> tuple[Tensor, Tensor]:
    x, y = arrays[f"x_{split}"], arrays.get(f"y_{split}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ddkit.InputError(f"{path}: x_{split} has shape {x.shape}; it must be (n, H, W), (n, H, W, C) or (n, C, H, W), C 1 or 3.")
    if x.dtype != np.uint8:
        outside = bool(x.size) and "unclipped" not in arrays and (x.min() < 0 or x.max() > 1)
        if x.dtype.kind != "f" or not np.isfinite(x).all() or outside:
            raise ddkit.InputError(f"{path}: x_{split} must be uint8, or finite floats in 0..1.")
    if y is None or y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu":
        raise ddkit.InputError(f"{path}: y_{split} must be integers, one for each image of x_{split}.")
    if split == "train" and len(y) == 0:
        raise ddkit.InputError(f"{path}: x_train holds no image.")
    if len(y) and int(y.min()) < 0:
        raise ddkit.InputError(f"{path}: y_{split} holds a negative label; labels count from 0.")
    x = np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32)
    images = torch.from_numpy(x).view(-1).view(x.shape)  # with one channel at the end its strides would choose another convolution
    return images, torch.from_numpy(y.astype(np.int64))


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
