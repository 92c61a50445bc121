"""Datasets that are arrays in memory: scikit-learn's digits, those of torchvision, downloaded on first use, and the user's npz files."""

from __future__ import annotations

import gzip
import hashlib
import logging
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddkit
from ddkit_datasets import layout

log = logging.getLogger("ddkit")
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


@cache
def _digits() -> tuple[Any, Any]:
    """Returns scikit-learn's digits, (n, 8, 8) in 0..16 and (n,), which stay as they are: the file alone, as importing takes a second."""
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
                f"The dataset '{self.name}' is not in {folder} and could not be downloaded ({reason}). Without a network, "
                "use --dataset digits, which is included in ddkit, or your own images with --dataset imagefolder:PATH. If you have the "
                "download already, name its folder with --data-dir."
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
    """Your NumPy arrays: an .npz file, a folder of .npy files, or an .npy file of images with `labels`.

    Images are x_train or train_images, labels y_train or train_labels. The test split is x_test or test_images, or else x_val or
    val_images. X and y, or images and labels, are all images, or have their splits in an array `split` of names. Images are (n, H, W), (n,
    H, W, C) or (n, C, H, W) with C 1, 3 or 4 (transparency is ignored), or rows of numbers with `shape`. They are bytes, floats in 0..1, or
    floats up to 255. Labels are integers from 0, also (n, 1), whole floats or one-hot rows, or texts, which become the class names. Other
    labels have their names in `class_names`. Without a test split, a share `holdout` of each class is held out. With an array `unclipped`,
    as the exporter npz writes it, floats may be outside 0..1. Nothing is unpickled. A packed file may declare 1,024 MiB, or 100 times its
    own size up to 4,096 MiB, or 10 times its own size. A larger one is refused before it is unpacked.
    """

    takes_directory = False
    argument = "path"

    path: str = ddkit.option("", ".npz file, folder of .npy files, or .npy file of images")
    labels_: str = ddkit.option("", ".npy file of labels, if path is an .npy file of images")
    shape: tuple[int, ...] = ddkit.option(
        (), "shape of an image (height, width and channels, in any order), if images are stored as rows of numbers"
    )
    holdout: float = ddkit.option(0.2, "share of each class that is held out for testing, if there is no test split", gt=0, lt=1)
    holdout_seed: int = ddkit.option(0, "seed of the split for testing", ge=0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.path:
            raise ddkit.InputError(f"The dataset '{self.name}' needs the path of a file, as in --dataset {self.name}:PATH.", "data.path")
        path = Path(self.path).absolute()
        self.path = str(path)
        if self.labels_:
            self.labels_ = str(Path(self.labels_).absolute())
        arrays = self._arrays(path)
        splits = layout.splits_of(list(arrays))
        if "train" not in splits or not splits["train"].labels:
            raise ddkit.InputError(f"{path} must contain the arrays x_train and y_train, but contains {_listed(arrays)}.{self._help(path)}")
        try:
            self.splits, self.names = self._read(arrays, splits, path)
        except ValueError as error:
            raise ddkit.InputError(f"{path}: {error}.") from None

    def _arrays(self, path: Path) -> dict[str, Any]:
        """Returns the arrays by name, an array `split` taken apart: X and y become x_train, y_train, x_test and so on."""
        if path.is_dir():
            found = {name: array for file in sorted(path.glob("*.npy")) for name, array in ddkit.data.read_arrays(file).items()}
        else:
            found = ddkit.data.read_arrays(path)
            if len(found) == 1 and path.suffix == ".npy":
                found = {"x": found[path.stem]}
        if self.labels_:
            labels = Path(self.labels_)
            read = ddkit.data.read_arrays(labels)
            if set(found) != {"x"} or set(read) != {labels.stem}:
                raise ddkit.InputError(
                    "data.labels only works with two .npy files: path with the images, and data.labels with the labels.", "data.labels"
                )
            found["y"] = read[labels.stem]
        plain, of_rows = layout.splits_of(list(found)).get("train"), found.get("split")
        if of_rows is None or of_rows.ndim != 1 or of_rows.dtype.kind not in "US" or plain is None or not plain.labels:
            return found
        rows = [each.decode() if isinstance(each, bytes) else str(each) for each in of_rows]
        parts: dict[str, Any] = {name: array for name, array in found.items() if name not in (*plain, "split")}
        for name in sorted(set(rows)):
            chosen = np.array([row == name for row in rows])
            if any(len(found[each]) != len(rows) for each in plain):
                raise ddkit.InputError(f"{path}: split has {len(rows)} names, but {plain.images} has {len(found[plain.images])} images.")
            parts |= {f"x_{name}": found[plain.images][chosen], f"y_{name}": found[plain.labels][chosen]}
        return parts

    def _help(self, path: Path) -> str:
        """Returns how to name the labels of an .npy file of images."""
        return " Add the file of the labels: --set data.labels=LABELS.npy" if path.suffix == ".npy" else ""

    def _read(self, arrays: dict[str, Any], found: dict[str, layout.Pair], path: Path) -> tuple[Splits, list[str]]:
        """Returns the splits and the class names; raises ValueError saying what is wrong."""
        used = {"train": found["train"]}
        test = next((split for split in ("test", "val") if split in found), None)
        if test is not None:
            used["test"] = found[test]
        images: dict[str, Any] = {}
        labels: dict[str, Any] = {}
        told = []
        named = 0
        for split, (x, y) in used.items():
            images[split] = layout.pixels_of(layout.images_of(arrays[x], self.shape, x), x)
            if not y:
                raise ValueError(f"y_{split} is missing: each image of {x} needs an integer label")
            try:
                labels[split], classes, what = layout.labels_of(arrays[y])
            except ValueError as error:
                raise ValueError(f"{y} must be integers, one-hot rows or texts, one for each image of {x}, but {error}") from None
            if len(labels[split]) != len(images[split]):
                raise ValueError(f"{y} has {len(labels[split])} labels, but {x} has {len(images[split])} images")
            named = max(named, classes)
            told += [f"{y} {what}"] if what and split == "train" else []
        if not len(images["train"]):
            raise ValueError(f"{used['train'].images} contains no image")
        names = None
        if any(each.dtype == object for each in labels.values()):
            names, labels = layout.numbered(labels)
        for split, y in labels.items():
            if len(y) and int(y.min()) < 0:
                raise ValueError(f"{used[split].labels} contains a negative label, but labels count from 0")
        floats = {used[split].images: x for split, x in images.items() if x.dtype.kind == "f"}
        divisor = 1 if "unclipped" in arrays else layout.divisor_of(floats)
        told += ["floats up to 255 are divided by 255"] if divisor > 1 else []
        if not {name for pair in used.values() for name in pair} <= layout.PLAIN or set(found) - {"train", "test"}:
            left = ", ".join(found[split].images for split in found if split not in ("train", test))
            told = [
                f"training images {used['train'].images}", f"test images {used['test'].images}" if test else "no test images", *told,
                *([f"{left} is not used"] if left else []),
            ]  # fmt: skip
        if told:
            log.warning("%s: %s.", path.name, ", ".join(told))
        splits = {split: (_tensor(x, divisor), torch.from_numpy(labels[split])) for split, x in images.items()}
        if test is None:
            whole, classes_of_it = splits["train"]
            kept, held = holdout(classes_of_it, self.holdout, self.holdout_seed)
            splits = {"train": (whole[kept], classes_of_it[kept]), "test": (whole[held], classes_of_it[held])}
        return splits, names or _class_names(arrays, torch.cat([y for _, y in splits.values()]), named, path)


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


def _listed(arrays: dict[str, Any]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in sorted(arrays.items())) or "none"


def _tensor(x: Any, divisor: int) -> Tensor:
    """Returns images as a contiguous tensor, uint8 or float32; floats are divided."""
    x = np.ascontiguousarray(
        x if divisor == 1 or x.dtype == np.uint8 else x / divisor, dtype=np.uint8 if x.dtype == np.uint8 else np.float32
    )
    return torch.from_numpy(x).view(-1).view(x.shape)  # with one channel at the end its strides would choose another convolution


def _class_names(arrays: dict[str, Any], labels: Tensor, named: int, path: Path) -> list[str]:
    """Returns the class names: those that the arrays give, else numbers; `named` is how many classes one-hot labels have."""
    classes = max(named, int(labels.max()) + 1)
    if classes > len(labels):  # so that a stray label makes an error, not a million classes
        raise ddkit.InputError(
            f"{path}: the largest label is {classes - 1}, but there are only {len(labels)} images. Labels must count from 0."
        )
    if "class_names" not in arrays:
        return [str(label) for label in range(classes)]
    found = np.atleast_1d(arrays["class_names"])
    try:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in found]
    except UnicodeDecodeError:
        raise ddkit.InputError(f"{path}: class_names contains bytes that are not UTF-8 text. Save them as text.") from None
    if len(names) < classes:
        raise ddkit.InputError(f"{path}: class_names has {len(names)} names, but there are {classes} classes.")
    return names
