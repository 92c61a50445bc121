"""The user's own images: a folder of class folders, of which only the asked-for files are opened."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import PIL
import torch
from torch import Tensor

import ddkit
from ddkit_datasets.arrays import holdout
from ddkit_datasets.decoding import decode_images, image_shapes

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Files(NamedTuple):
    """The image files of a split: `names` without their folders, `labels` (n,) int64 ascending, the folder of each label.

    Names alone, because 50,000 paths took longer to build than the folders to list.
    """

    folders: list[str]
    labels: Tensor
    names: list[str]

    def paths(self, indices: Sequence[int]) -> list[str]:
        """Returns FOLDER/NAME of each index."""
        labels = self.labels[torch.as_tensor(list(indices), dtype=torch.int64)].tolist()
        return [f"{self.folders[label]}/{self.names[index]}" for label, index in zip(labels, indices, strict=True)]

    def rows(self, kept: Tensor) -> Files:
        """Returns the files of some rows, in that order."""
        return Files(self.folders, self.labels[kept], [self.names[row] for row in kept.tolist()])


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
        if not self.options.path:
            raise ddkit.InputError(f"The dataset '{self.name}' needs a folder: --dataset {self.name}:PATH", "data.path")
        self.root = Path(self.options.path).absolute()
        self.options = msgspec.structs.replace(self.options, path=str(self.root))
        if not self.root.is_dir():
            raise ddkit.InputError(f"The image folder {self.root} does not exist or is no folder.")
        self._whole = not (self.root / "train").is_dir()
        self.train_root = self.root if self._whole else self.root / "train"
        self._names = _subfolders(self.train_root)
        if not self._names:
            raise ddkit.InputError(f"{self.train_root} holds no class folders; the layout is {self.train_root}/CLASS/IMAGE.")
        self._check_case()
        empty = [name for name, count in zip(self._names, self._counts(), strict=True) if count == 0]
        if empty:
            raise ddkit.InputError(f"The class folder {self.train_root / empty[0]} holds no image ({', '.join(SUFFIXES)}).")

    def _check_case(self) -> None:
        """Raises InputError for class folders that are one folder on other systems, and most likely one class."""
        seen: dict[str, str] = {}
        for name in self._names:
            other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            if other != name:
                raise ddkit.InputError(
                    f"{self.train_root} has the class folders '{other}' and '{name}', which differ in case or accents' spelling alone. "
                    "Put their images into one, or rename one."
                )

    def _counts(self) -> list[int]:
        return torch.bincount(self._listing.labels, minlength=len(self._names)).tolist()

    @property
    def class_names(self) -> Sequence[str]:
        return self._names

    @cached_property
    def _listing(self) -> Files:
        return _list_files(self.train_root, self._names)

    @cached_property
    def _files(self) -> dict[str, Files]:
        if not self._whole:
            return {"train": self._listing, "test": self._test_files(self.root / "test")}
        kept, held = holdout(self._listing.labels, self.options.holdout, self.options.holdout_seed)
        return {"train": self._listing.rows(kept), "test": self._listing.rows(held)}

    def _test_files(self, folder: Path) -> Files:
        if not folder.is_dir():
            return Files([], torch.zeros(0, dtype=torch.int64), [])
        strangers = sorted(set(_subfolders(folder)).difference(self._names))
        if strangers:
            raise ddkit.InputError(f"{folder} has a class '{strangers[0]}' that {self.train_root} lacks.")
        return _list_files(folder, self._names)

    def labels(self, split: str) -> Tensor:
        return self._files[split].labels

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor] | Tensor:
        resized: list[str] = []
        found = decode_images(self._files[split].paths(indices), self.options.size, resized)
        self.resized += len(resized)
        return found

    def shapes(self, split: str, indices: Sequence[int]) -> list[tuple[int, int, int]]:
        return image_shapes(self._files[split].paths(indices), self.options.size)

    def stamps(self, split: str, indices: Sequence[int]) -> list[tuple[str, int, int]] | None:
        try:
            found = [(path, os.stat(path)) for path in self._files[split].paths(indices)]
        except OSError:  # decoding it will say what is wrong
            return None
        return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]

    def decoding_key(self) -> str:
        return f"size {self.options.size}, Pillow {PIL.__version__}"

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        return list(self._relative(self._files[split].paths(indices)))

    def _relative(self, paths: Sequence[str]) -> list[str]:
        """Returns PATHS as seen from the root, with forward slashes."""
        start = len(self.root.as_posix().rstrip("/")) + 1
        return [path[start:] for path in paths]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.options.size).encode())
        for split in ("train", "test"):
            labels = self.labels(split).tolist()
            paths = self._files[split].paths(range(len(labels)))
            for path, name, label in zip(paths, self._relative(paths), labels, strict=True):
                digest.update(f"{split} {label} {name}\n".encode())
                with open(path, "rb") as stream:
                    digest.update(hashlib.sha256(stream.read()).digest())
        return digest.hexdigest()


def _list_files(root: Path, names: Sequence[str]) -> Files:
    """Returns the image files in the folders `names` of `root`, folder by folder, each in order of name."""
    folders = [root / name for name in names]
    inside = [_visible(folder, _is_image) if folder.is_dir() else [] for folder in folders]
    _check_text(folders, inside)
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(files) for files in inside], dtype=torch.int64))
    return Files([folder.as_posix() for folder in folders], labels, [file for files in inside for file in files])


def _check_text(folders: Sequence[Path], inside: Sequence[Sequence[str]]) -> None:
    """Raises InputError for a file name of bytes that are no UTF-8: the manifest could not list it."""
    for folder, names in zip(folders, inside, strict=True):
        try:
            f"{folder.name}{''.join(names)}".encode()
        except UnicodeEncodeError:
            raise ddkit.InputError(f"In {folder} a name is no UTF-8 text; rename it so that the manifest can list it.") from None


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def _subfolders(folder: Path) -> list[str]:
    return _visible(folder, lambda entry: entry.is_dir())


def _visible(folder: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Returns the sorted names of the wanted entries, without hidden ones (macOS leaves ._NAME.png beside NAME.png).

    Whether an entry is a file is known from the listing: only symbolic links are looked at one by one.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and wanted(entry))
    except OSError as error:
        raise ddkit.InputError(f"The folder {folder} cannot be listed: {error.strerror or error}.") from None
