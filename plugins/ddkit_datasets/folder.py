"""The user's own images: a folder of class folders, of which only the asked-for files are opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ddkit
from ddkit_datasets.arrays import holdout

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
Files = list[tuple[Path, int]]


class ImageFolder(ddkit.Dataset):
    """Class folders of image files: PATH/train/CLASS and PATH/test/CLASS, or PATH/CLASS with a seeded held-out split.

    Classes are in alphabetical order. Listing reads names only; a file is opened when its image is asked for.
    """

    argument = "path"

    class Options(ddkit.Options):
        path: Annotated[str, ddkit.Option("the folder")] = ""
        size: Annotated[tuple[int, ...], ddkit.Option("height and width to resize to; left out: the most common size")] | None = None
        holdout: Annotated[float, ddkit.Option("test share of each class, without a test folder", gt=0, lt=1)] = 0.2
        holdout_seed: Annotated[int, ddkit.Option("seed of that split", ge=0)] = 0

    def __init__(self, options: Any = None, *, name: str | None = None, directory: str | None = None) -> None:
        super().__init__(options, name=name, directory=directory)
        size = self.options.size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ddkit.InputError(f"data.size = {list(size)}: it is [height, width], both at least 1.", "data.size")
        self.root = Path(self.options.path).absolute()
        self.options = msgspec.structs.replace(self.options, path=str(self.root))
        if not self.root.is_dir():
            raise ddkit.InputError(f"The image folder {self.root} does not exist or is no folder.")
        self._whole = not (self.root / "train").is_dir()
        self.train_root = self.root if self._whole else self.root / "train"
        self._names = [entry.name for entry in _visible(self.train_root) if entry.is_dir()]
        if not self._names:
            raise ddkit.InputError(f"{self.train_root} holds no class folders; the layout is {self.train_root}/CLASS/IMAGE.")
        empty = [name for name, count in zip(self._names, self._counts(), strict=True) if count == 0]
        if empty:
            raise ddkit.InputError(f"The class folder {self.train_root / empty[0]} holds no image ({', '.join(sorted(SUFFIXES))}).")

    def _counts(self) -> list[int]:
        labels = torch.tensor([label for _, label in self._listing], dtype=torch.int64)
        return torch.bincount(labels, minlength=len(self._names)).tolist()

    @property
    def class_names(self) -> Sequence[str]:
        return self._names

    @cached_property
    def _listing(self) -> Files:
        return _list_files(self.train_root, self._names)

    @cached_property
    def _files(self) -> dict[str, Files]:
        if not self._whole:
            test = self.root / "test"
            return {"train": self._listing, "test": self._test_files(test) if test.is_dir() else []}
        labels = torch.tensor([label for _, label in self._listing])
        kept, held = holdout(labels, self.options.holdout, self.options.holdout_seed)
        return {"train": [self._listing[i] for i in kept.tolist()], "test": [self._listing[i] for i in held.tolist()]}

    def _test_files(self, folder: Path) -> Files:
        strangers = [entry.name for entry in _visible(folder) if entry.is_dir() and entry.name not in self._names]
        if strangers:
            raise ddkit.InputError(f"{folder} has a class '{strangers[0]}' that {self.train_root} lacks.")
        return _list_files(folder, self._names)

    def labels(self, split: str) -> Tensor:
        return torch.tensor([label for _, label in self._files[split]], dtype=torch.int64)

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        files = [self._files[split][index][0] for index in indices]
        size = self.options.size
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda file: _decode(file, size), files))

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        return [self._files[split][index][0].relative_to(self.root).as_posix() for index in indices]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.options.size).encode())
        for split in ("train", "test"):
            for path, label in self._files[split]:
                digest.update(f"{split} {label} {path.relative_to(self.root).as_posix()}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def _list_files(root: Path, names: Sequence[str]) -> Files:
    found: Files = []
    for label, name in enumerate(names):
        folder = root / name
        if not folder.is_dir():
            continue
        inside = [e.name for e in _visible(folder) if os.path.splitext(e.name)[1].lower() in SUFFIXES and e.is_file()]
        found += [(folder / file, label) for file in inside]
    return found


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder in order of name, without the hidden ones (macOS leaves ._NAME.png beside NAME.png)."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ddkit.InputError(f"The folder {folder} cannot be listed: {error.strerror or error}.") from None


def _decode(file: Path, size: tuple[int, ...] | None) -> Tensor:
    """Returns the image (C, H, W) uint8: one channel if the file is grey, else RGB."""
    try:
        with Image.open(file) as image:
            found = _eight_bit(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ddkit.InputError(f"The image {file} cannot be decoded ({error}). Repair or remove it.") from None
    if size is not None and found.size != (size[1], size[0]):
        found = found.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    array = np.asarray(found)
    return torch.from_numpy(array.copy()).permute(2, 0, 1) if array.ndim == 3 else torch.from_numpy(array.copy())[None]


def _eight_bit(image: Image.Image) -> Image.Image:
    """Returns the image in mode L or RGB; 16-bit grey is scaled, which Pillow's own conversion would clip."""
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers of unknown range, mode {image.mode}; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
