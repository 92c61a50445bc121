"""The user's own images: a folder of class folders, or of images and a table, of which only the asked-for files are opened."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import PIL
import torch
from torch import Tensor

import ddkit
from ddkit.data import natural
from ddkit_datasets.arrays import holdout
from ddkit_datasets.class_folders import SUFFIXES, Walked, check_case, innermost, layout_of, packed_in, quoted, subfolders, walk
from ddkit_datasets.decoding import Decoding, any_coloured, decode_images, image_shapes
from ddkit_datasets.splits import TEST, TRAIN
from ddkit_datasets.tables import TABLES, Row, read_table, table_in

log = logging.getLogger("ddkit")
MOST_HEADERS = 5000  # that are read to learn whether images are grey: a quarter of a second
DECODING = 2  # its version, part of the fingerprint: the first did not turn files as EXIF says


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

    def inner_classes(self) -> list[str]:
        """Returns folders inside of class folders that look like classes: several in each class, other ones in each, no images beside."""
        if not all("/" in name for name in self.names[:1]):
            return []
        parts: list[set[str]] = [set() for _ in self.folders]
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            parts[label].add(name.rpartition("/")[0])
        found = [name for part in parts for name in sorted(part)]
        return found if all(len(part) > 1 for part in parts) and "" not in found and len(set(found)) == len(found) else []


class ImageFolder(ddkit.Dataset):
    """Class folders of image files: PATH/train/CLASS and PATH/test/CLASS, or PATH/CLASS with a seeded held-out split.

    Classes are in alphabetical order, with numbers as numbers. Folders inside a class folder belong to the class. `train` may be
    named training, and `test` testing, val, valid or validation, in any case. Instead of class folders there may be a table of files and
    labels: metadata.csv or metadata.jsonl in PATH or in its split folders, Tiny-ImageNet's val_annotations.txt, or a CSV or JSONL file
    as PATH. Only names are listed, and a file is opened when a run needs its image. If all accessible images are grey,
    the headers of other training files are read, to see whether some are in colour.
    """

    takes_directory = False
    argument = "path"

    path: str = ddkit.option("", "folder of images, or a CSV or JSONL file with paths and labels")
    class_order: Literal["natural", "alphabetical"] = ddkit.option(
        "natural", "order of the classes: natural (2 before 10), or alphabetical (10 before 2), as in older versions"
    )
    nested: bool = ddkit.option(False, "whether folders inside class folders are classes too, named PARENT/CLASS")
    columns: tuple[str, ...] = ddkit.option((), "columns of file and label in a table; if left out, they are found by their names")
    size: tuple[int, ...] | None = ddkit.option(None, "height and width to resize to; if left out, the most common size")
    channels: Literal[1, 3] | None = ddkit.option(
        None, "1 for grey or 3 for colour; if left out, 1 if all training images are grey, and else 3"
    )
    bits: int = ddkit.option(16, "number of used bits in 16-bit grey files, e.g. 12 scales 0..4095 to 0..255", ge=8, le=16)
    holdout: float = ddkit.option(0.2, "share of each class that is held out for testing, if there is no test folder", gt=0, lt=1)
    holdout_seed: int = ddkit.option(0, "seed of the split for testing", ge=0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        size = self.size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ddkit.InputError(f"data.size = {list(size)}: write [height, width], both at least 1.", "data.size")
        if not self.path:
            raise ddkit.InputError(f"The dataset '{self.name}' needs the path of a folder, as in --dataset {self.name}:PATH.", "data.path")
        if len(self.columns) not in (0, 2):
            raise ddkit.InputError(f"data.columns = {list(self.columns)}: write [FILE, LABEL], the names of two columns.", "data.columns")
        self.root = Path(self.path).absolute()
        self.path = str(self.root)
        table = self.root if self.root.is_file() and self.root.suffix.lower() in TABLES else None
        if table is None and self.root.exists() and not self.root.is_dir():
            if packed := packed_in(self.root):
                raise ddkit.InputError(f"{self.root} is not a folder of images. {packed}")
            raise ddkit.InputError(
                f"{self.root} is a file, but the dataset '{self.name}' reads a folder, or a table ({', '.join(TABLES)}). Use "
                f"--dataset {self.name}:FOLDER"
            )
        if not self.root.exists():
            near = difflib.get_close_matches(self.root.name, subfolders(self.root.parent) if self.root.parent.is_dir() else [], n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ddkit.InputError(f"The image folder {self.root} does not exist.{hint}")
        self.root = self.root if table is None else self.root.parent
        self._how = Decoding(size, self.channels, self.bits)
        self._test_listing: Files | None = None
        rows = _listed(self.root, table, self.columns)
        said, unread = self._read_rows(rows) if rows else self._read_folders()
        if said:
            log.warning("%s: %s.", self.root, said, extra={"news": True})
        if unread:
            log.warning(
                "%s: ddkit cannot read some files and ignores them: %s. Convert images to .png or .jpg.", self.root, _counted(unread)
            )

    def _read_folders(self) -> tuple[str, Counter[str]]:
        """Finds the images of class folders; returns a line that says what is not obvious, and what was left out, by ending."""
        if self.columns:
            raise ddkit.InputError(
                f"data.columns: {self.root} has no table with labels, so there are no columns. Leave it out.", "data.columns"
            )
        train_root, names, test_root, said = layout_of(self.root)
        self._holds_out = train_root == self.root or train_root.name.casefold() in TEST
        names = innermost(train_root, names) if self.nested else names
        check_case(train_root, names)
        self._names, self._listing, unread = _classes(train_root, self._ordered(names))
        inner = [] if self.nested else self._listing.inner_classes()
        if inner:
            said = "; ".join(
                [*filter(None, [said]), f"{quoted(inner)} are parts of the classes (to make them classes: --set data.nested=true)"]
            )
        if test_root is None:
            return said, unread
        found = innermost(test_root, subfolders(test_root)) if self.nested else subfolders(test_root)
        table = None if set(found) & set(self._names) else table_in(test_root)
        rows = [] if table is None else read_table(table, self.root)
        unknown = sorted({row.label for row in rows}.difference(self._names) if rows else set(found).difference(self._names))
        if unknown:
            raise ddkit.InputError(f"{table or test_root} has a class '{unknown[0]}', but {train_root} does not. Add or remove it.")
        if rows:
            self._test_listing = _files_of(self.root, self._names, rows)
            return said, unread
        walked = [walk(test_root / name) if name in found else Walked([], Counter(), run=False) for name in self._names]
        self._test_listing = _files(test_root, self._names, walked)
        return said, sum((each.unread for each in walked), unread)

    def _read_rows(self, rows: Sequence[Row]) -> tuple[str, Counter[str]]:
        """Finds the images of a table; returns as _read_folders does."""
        train = [row for row in rows if row.split.casefold() in ("", *TRAIN)]
        tests = sorted({row.split for row in rows} - {row.split for row in train}, key=lambda name: TEST.index(name.casefold()))
        if not train:
            raise ddkit.InputError(
                f"{self.root}: its table only has images of the split {quoted(tests)}. Images to train on must have the split train."
            )
        self._holds_out = not any(row.split for row in train)
        self._names = self._ordered({row.label for row in train})
        self._listing = _files_of(self.root, self._names, train)
        said = ["labels come from a table"]
        if tests:
            own = [row for row in rows if row.split == tests[0]]
            unknown = sorted({row.label for row in own}.difference(self._names))
            if unknown:
                raise ddkit.InputError(
                    f"{self.root}: the split '{tests[0]}' of its table has a class '{unknown[0]}', but the training split does not."
                )
            self._test_listing = _files_of(self.root, self._names, own)
            said.append(f"the test split is '{tests[0]}'")
            said += [f"not used: {quoted(tests[1:])}"] if tests[1:] else []
        walked = walk(self.root)
        others = len(set(walked.names).difference(row.file for row in rows))
        said += [f"{others} image{'s' if others > 1 else ''} not in the table {'are' if others > 1 else 'is'} ignored"] if others else []
        return "; ".join(said), walked.unread

    def _ordered(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=natural) if self.class_order == "natural" else sorted(names)

    @property
    def class_names(self) -> Sequence[str]:
        return self._names

    @cached_property
    def _split_files(self) -> dict[str, Files]:
        if self._test_listing is not None:
            return {"train": self._listing, "test": self._test_listing}
        if not self._holds_out:
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
        return f"{DECODING}, {tuple(self._how)}, Pillow {PIL.__version__}"

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        return list(self._relative(self._split_files[split].paths(indices)))

    def _relative(self, paths: Sequence[str]) -> list[str]:
        """Returns PATHS as seen from the root, with forward slashes."""
        start = len(self.root.as_posix().rstrip("/")) + 1
        return [path[start:] for path in paths]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((DECODING, *self._how)).encode())
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
        if not any(walked[name].names for name in classes) and (packed := packed_in(root)):
            raise ddkit.InputError(f"{root} contains no image. {packed}")
        left_out = walked[empty[0]].unread
        why = f"{_counted(left_out)} which ddkit cannot read, and no " if left_out else ""
        suffixes = ", ".join(SUFFIXES)
        raise ddkit.InputError(f"The class folder {root / empty[0]} contains no image ({why or 'no '}{suffixes}). Add some, or remove it.")
    if not classes:
        raise ddkit.InputError(f"{root} contains no class folders. The layout must be {root}/CLASS/IMAGE.")
    return classes, _files(root, classes, [walked[name] for name in classes]), unread


def _listed(root: Path, table: Path | None, columns: Sequence[str]) -> list[Row]:
    """Returns the images of the table that was named, or that lies in `root` or in its split folders; [] if none has labels."""
    if table is not None:
        return read_table(table, root, columns)
    found = table_in(root)
    if found is not None and (rows := read_table(found, root, columns)):
        return rows
    splits = [root / name for name in subfolders(root) if name.casefold() in (*TRAIN, *TEST)]
    if not any(split.name.casefold() in TRAIN and table_in(split) for split in splits):
        return []
    return [row for split in splits if (found := table_in(split)) for row in read_table(found, root, columns)]


def _files_of(root: Path, names: Sequence[str], rows: Iterable[Row]) -> Files:
    """Returns the files of a table's rows, class by class."""
    label_of = {name: label for label, name in enumerate(names)}
    ordered = sorted((label_of[row.label], row.file) for row in rows)
    return Files([root.as_posix()] * len(names), torch.tensor([label for label, _ in ordered]), [file for _, file in ordered])


def _counted(unread: Counter[str]) -> str:
    """Returns for example "12 .heic, 1 .avif"."""
    return ", ".join(f"{count} {ending}" for ending, count in unread.most_common())


def _files(root: Path, names: Sequence[str], walked: Sequence[Walked]) -> Files:
    """Returns the image files in the folders `names` of `root`, folder by folder; raises InputError for a name that is no text."""
    for name, each in zip(names, walked, strict=True):
        try:
            f"{name}{''.join(each.names)}".encode()
        except UnicodeEncodeError:
            raise ddkit.InputError(f"In {root / name} the name of a file or folder is not UTF-8 text. Rename it.") from None
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(each.names) for each in walked], dtype=torch.int64))
    return Files([(root / name).as_posix() for name in names], labels, [file for each in walked for file in each.names])
