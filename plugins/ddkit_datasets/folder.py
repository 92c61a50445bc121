"""The user's own images: a folder of class folders, of which only the asked-for files are opened."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import PIL
import torch
from torch import Tensor

import ddkit
from ddkit_datasets.arrays import holdout
from ddkit_datasets.decoding import Decoding, any_coloured, decode_images, image_shapes
from ddkit_datasets.layout import SUFFIXES, Walked, check_case, layout_of, subfolders, walk

log = logging.getLogger("ddkit")
MOST_HEADERS = 5000  # that are read to learn whether images are grey: a quarter of a second
UPRIGHT = 2  # the version of decoding, part of the fingerprint: files were not turned as EXIF says before


class Files(NamedTuple):
    """The image files of a split: `names` relative to their class folders, `labels` (n,) int64 ascending, the folder of each label.

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

    Classes are in alphabetical order; folders inside of a class folder belong to the class. `train` may be called training, and `test`
    testing, val, valid or validation, in any case. Listing reads names only; a file is opened when its image is asked for. If all
    accessible images are grey, headers of other training files are read, to learn whether there are any in colour.
    """

    takes_directory = False
    argument = "path"

    path: str = ddkit.option("", "the folder")
    size: tuple[int, ...] | None = ddkit.option(None, "height and width to resize to; left out: the most common size")
    channels: Literal[1, 3] | None = ddkit.option(None, "1 for grey or 3 for colour; left out: 1 if all training images are grey, else 3")
    bits: int = ddkit.option(16, "bits that hold the values of 16-bit grey files: 12 scales 0..4095 to 0..255", ge=8, le=16)
    holdout: float = ddkit.option(0.2, "test share of each class, without a test folder", gt=0, lt=1)
    holdout_seed: int = ddkit.option(0, "seed of that split", ge=0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        size = self.size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ddkit.InputError(f"data.size = {list(size)}: it is [height, width], both at least 1.", "data.size")
        if not self.path:
            raise ddkit.InputError(f"The dataset '{self.name}' needs a folder: --dataset {self.name}:PATH", "data.path")
        self.root = Path(self.path).absolute()
        self.path = str(self.root)
        if not self.root.is_dir():
            raise ddkit.InputError(_not_there(self.name, self.root))
        self._how = Decoding(size, self.channels, self.bits)
        self.train_root, names, self.test_root, said = layout_of(self.root)
        check_case(self.train_root, names)
        self._names, self._listing, unread = _classes(self.train_root, names)
        self._test_listing = None if self.test_root is None else self._test_files(self.test_root, unread)
        if said:
            log.warning("%s: %s.", self.root, said, extra={"news": True})
        if unread:
            log.warning("%s: images that ddkit does not read are left out: %s. Convert them to .png or .jpg.", self.root, _counted(unread))

    def _test_files(self, folder: Path, unread: Counter[str]) -> Files:
        """Returns the files of the test split, and adds to `unread` those that are left out."""
        found = subfolders(folder)
        strangers = sorted(set(found).difference(self._names))
        if strangers:
            raise ddkit.InputError(f"{folder} has a class '{strangers[0]}' that {self.train_root} lacks.")
        walked = [walk(folder / name) if name in found else Walked([], Counter(), run=False) for name in self._names]
        for each in walked:
            unread.update(each.unread)
        return _files(folder, self._names, walked)

    @property
    def class_names(self) -> Sequence[str]:
        return self._names

    @cached_property
    def _split_files(self) -> dict[str, Files]:
        if self._test_listing is not None:
            return {"train": self._listing, "test": self._test_listing}
        if self.train_root != self.root:
            return {"train": self._listing, "test": self._listing.rows(torch.arange(0))}
        kept, held = holdout(self._listing.labels, self.holdout, self.holdout_seed)
        return {"train": self._listing.rows(kept), "test": self._listing.rows(held)}

    def labels(self, split: str) -> Tensor:
        return self._split_files[split].labels

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor] | Tensor:
        resized: list[str] = []
        found = decode_images(self._split_files[split].paths(indices), self._how, resized)
        self.resized += len(resized)
        return found

    def shapes(self, split: str, indices: Sequence[int]) -> list[tuple[int, int, int]]:
        return image_shapes(self._split_files[split].paths(indices), self._how)

    def grey(self) -> bool:
        if self.channels is not None:
            return bool(self.channels == 1)
        count = len(self._listing.names)
        rows = [row * count // MOST_HEADERS for row in range(MOST_HEADERS)] if count > MOST_HEADERS else range(count)
        return not any_coloured(self._listing.paths(rows))

    def files(self, split: str, indices: Sequence[int]) -> list[str]:
        return self._split_files[split].paths(indices)

    def decoding_key(self) -> str:
        return f"{UPRIGHT}, {tuple(self._how)}, Pillow {PIL.__version__}"

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        return list(self._relative(self._split_files[split].paths(indices)))

    def _relative(self, paths: Sequence[str]) -> list[str]:
        """Returns PATHS as seen from the root, with forward slashes."""
        start = len(self.root.as_posix().rstrip("/")) + 1
        return [path[start:] for path in paths]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((UPRIGHT, *self._how)).encode())
        for split in ("train", "test"):
            labels = self.labels(split).tolist()
            paths = self._split_files[split].paths(range(len(labels)))
            for path, name, label in zip(paths, self._relative(paths), labels, strict=True):
                digest.update(f"{split} {label} {name}\n".encode())
                with ddkit.data.open_regular(path) as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def _classes(root: Path, names: Sequence[str]) -> tuple[list[str], Files, Counter[str]]:
    """Returns the class names, the image files in their folders, and how many were left out, by ending.

    A folder that holds a run of ddkit's and no image of its own is no class.
    """
    walked = {name: walk(root / name) for name in names}
    classes = [name for name, each in walked.items() if each.names or not each.run]
    unread = sum((each.unread for each in walked.values()), Counter[str]())
    empty = [name for name in classes if not walked[name].names]
    if empty:
        left_out = walked[empty[0]].unread
        why = f"{_counted(left_out)}, which ddkit does not read, and none of " if left_out else ""
        raise ddkit.InputError(f"The class folder {root / empty[0]} holds no image ({why}{', '.join(SUFFIXES)}).")
    if not classes:
        raise ddkit.InputError(f"{root} holds no class folders; the layout is {root}/CLASS/IMAGE.")
    return classes, _files(root, classes, [walked[name] for name in classes]), unread


def _not_there(name: str, root: Path) -> str:
    """Returns the message for a path `root` that is no folder, with the folder beside it whose name is nearest."""
    if root.exists():
        return f"{root} is a file, and the dataset '{name}' reads a folder: --dataset {name}:FOLDER"
    beside = subfolders(root.parent) if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, beside, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"The image folder {root} does not exist.{hint}"


def _counted(unread: Counter[str]) -> str:
    """Returns for example "12 .heic, 1 .avif"."""
    return ", ".join(f"{count} {ending}" for ending, count in unread.most_common())


def _files(root: Path, names: Sequence[str], walked: Sequence[Walked]) -> Files:
    """Returns the image files in the folders `names` of `root`, folder by folder."""
    folders = [root / name for name in names]
    inside = [each.names for each in walked]
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
