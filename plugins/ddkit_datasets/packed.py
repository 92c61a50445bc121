"""Datasets in files that hold many images each, read by the libraries that write them: Hugging Face's `datasets` and `webdataset`."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import shlex
import tarfile
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

import ddkit
from ddkit_datasets.class_folders import SUFFIXES
from ddkit_datasets.decoding import strict_pillow
from ddkit_datasets.objects import Items, OfItems, numbered
from ddkit_datasets.splits import TEST, TRAIN
from ddkit_datasets.tables import LABEL, label_text

log = logging.getLogger("ddkit")


class Packed(OfItems):
    """Base of datasets in files of another library's: their splits are told by the names of files and of their folders."""

    argument = "path"
    endings: tuple[str, ...]
    library: str

    path: str = ddkit.option("", "folder of the files, or one file")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.path:
            raise ddkit.InputError(f"The dataset '{self.name}' needs the path of a folder, as in --dataset {self.name}:PATH.", "data.path")
        root = Path(self.path).absolute()
        self.path = str(root)
        if not root.exists():
            raise ddkit.InputError(f"{root} does not exist.")
        splits = self._splits(root)
        try:
            library = importlib.import_module(self.library)
        except ImportError as error:
            raise ddkit.PluginError(
                f"The dataset '{self.name}' needs the library {self.library}, which cannot be imported ({error}). Install it: "
                f"pip install 'ddkit[{self.library}]'"
            ) from None
        self.take(numbered([Items(self.read(library, files, root), f"{root} ({split})") for split, files in splits.items()]))

    def read(self, library: Any, files: Sequence[Path], root: Path) -> Any:
        """Returns the items of the files of a split: an object with a length and an index."""
        raise NotImplementedError

    def _splits(self, root: Path) -> dict[str, list[Path]]:
        """Returns the files of the training and, if there is one, of the test split, by the name of the split."""
        found: dict[str, list[Path]] = {}
        for file in self.files_in(root):
            parts = () if root.is_file() else reversed(file.relative_to(root).parts)
            words = [word for part in parts for word in re.split(r"[^a-z]+", part.casefold())]
            found.setdefault(next((word for word in words if word in (*TRAIN, *TEST)), ""), []).append(file)
        if not found:
            raise ddkit.InputError(f"{root} contains no {' or '.join(self.endings)} file.")
        named = [file for name in TRAIN for file in found.pop(name, [])]
        others = found.pop("", [])
        train = named or others
        if not train:
            part = shlex.quote(f"{self.name}:{next(iter(found.values()))[0]}")
            raise ddkit.InputError(
                f"{root} only contains files of the split {', '.join(found)}. Files to train on must have train in their name or folder. "
                f"To train on a part of a file and test on the rest: --dataset {part}"
            )
        tests = sorted(found, key=TEST.index)
        unused = [*tests[1:], *([file.name for file in others[:8]] if named else [])]
        said = [f"the test split is '{tests[0]}'"] if tests[:1] not in ([], ["test"]) else []
        said += [f"not used: {', '.join(unused)}"] if unused else []
        if said:
            log.warning("%s: %s.", root, "; ".join(said), extra={"news": True})
        return {"train": train} | {name: found[name] for name in tests[:1]}

    def files_in(self, root: Path) -> list[Path]:
        """Returns the files in a folder and below it, without hidden ones, or the one that `root` is."""
        files = [root] if root.is_file() else sorted(root.rglob("*"))
        return [file for file in files if file.name.endswith(self.endings) and not file.name.startswith(".")]


class HuggingFace(Packed):
    """Files of the Hugging Face library datasets: parquet files of its hub, or arrow files of `save_to_disk` and of its cache.

    The columns of image and label and the class names are found by the types in the files, or else by the names of the columns. A file
    belongs to the split whose name (train, test, validation) is a word of its own name or of a folder. Without a test split, a share
    `holdout` of each class is held out. Needs the library datasets: pip install 'ddkit[datasets]'. No network is used, and no script is
    run.
    """

    library = "datasets"
    endings = (".parquet", ".arrow")

    def read(self, library: Any, files: Sequence[Path], root: Path) -> Any:
        folders = sorted({file.parent for file in files})
        saved = [folder for folder in folders if (folder / "state.json").is_file()]
        if len(folders) > 1:
            names = ", ".join(f"'{folder.relative_to(root)}'" for folder in folders[:8])
            raise ddkit.InputError(
                f"{root} contains several sets of the same split, in {names}. Name the folder of one set: --dataset "
                f"{self.name}:{folders[0]}"
            )
        try:
            with _silent(library):
                if saved:
                    found = library.Dataset.load_from_disk(str(saved[0]))
                elif files[0].suffix == ".arrow":
                    found = library.concatenate_datasets([library.Dataset.from_file(str(file)) for file in files])
                else:
                    cache = ddkit.data.cache_folder() / "datasets" / "parquet"
                    found = library.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache))
                for name, kind in dict(found.features).items():
                    bytes_alone = isinstance(kind, Mapping) and "bytes" in kind
                    if bytes_alone or getattr(kind, "dtype", "") in ("binary", "large_binary"):  # written without the type Image
                        found = found.cast_column(name, library.Image())
        except Exception as error:  # damaged files, or another library's
            said = " ".join(f"{error.__cause__ or error}".split())[:300]
            raise ddkit.InputError(f"The files of {root} cannot be read ({type(error).__name__}: {said}).") from None
        return found


@contextmanager
def _silent(library: Any) -> Iterator[None]:
    """Inside, Hugging Face's library shows no progress bar and logs nothing: what it raises says the same."""
    logger = logging.getLogger("datasets")
    level = logger.level
    shows_bars = not library.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    library.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shows_bars:
            library.enable_progress_bars()


class WebDataset(Packed):
    """Tar shards of WebDataset: samples of an image (.jpg, .png, ...) and its label (.cls, or a field of .json) under one key.

    A shard belongs to the split whose name (train, test, val) is a word of its own name or of a folder. Without a test split, a share
    `holdout` of each class is held out. Labels are used as class names, also if they are numbers. The shards are read once, and their
    encoded images are kept in a temporary file. Needs the library webdataset: pip install 'ddkit[webdataset]'.
    """

    library = "webdataset"
    endings = (".tar", ".tar.gz", ".tgz")

    def read(self, library: Any, files: Sequence[Path], root: Path) -> Any:
        iterators = importlib.import_module("webdataset.tariterators")
        found = Samples()
        for file in files:
            try:
                with ddkit.data.open_regular(file) as stream:
                    found.add(file, iterators.group_by_keys(iterators.tar_file_expander([{"url": str(file), "stream": stream}])))
            except (OSError, EOFError, ValueError, tarfile.TarError) as error:
                said = " ".join(str(error.args[0] if error.args else error).split())[:200]
                raise ddkit.InputError(f"The shard {file} cannot be read ({said}). Repair or remove it.") from None
        return found


class Samples:
    """Images and labels of tar shards: `targets` are texts, and items (image, text); the packed images lie in a temporary file."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self._places: list[tuple[str, int, int]] = []  # where an image is from, where it begins, and its bytes
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the samples are used
        self._end = 0
        weakref.finalize(self, self._file.close)

    def add(self, file: Path, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds the samples of a shard; raises InputError naming one that has not one image and one label."""
        for sample in samples:
            where = f"{file}, sample {sample['__key__']}"
            fields = {name: value for name, value in sample.items() if not name.startswith("__")}
            images = [name for name in fields if f".{name}".endswith(SUFFIXES)]
            if len(images) != 1:
                what = f"has several images ({', '.join(images)})" if images else f"has no image ({', '.join(fields)})"
                raise ddkit.InputError(f"{where}: it {what}, but a sample must be one image and its label.")
            self.targets.append(_label(fields, where, file))
            content = fields[images[0]]
            self._places.append((f"{where}.{images[0]}", self._end, len(content)))
            self._file.write(content)
            self._end += len(content)
        self._file.flush()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Any, str]:
        where, start, count = self._places[row]
        content = os.pread(self._file.fileno(), count, start)  # of an own place, so that processes may share the file
        try:
            with strict_pillow():
                image = Image.open(io.BytesIO(content))
                image.load()
        except Exception as error:  # a damaged file can make a decoder raise anything
            said = str(error).partition(" <_io")[0]
            raise ddkit.InputError(f"{where} cannot be decoded ({said})") from None
        return image, self.targets[row]


def _label(fields: Mapping[str, bytes], where: str, file: Path) -> str:
    """Returns the label of a sample: that of .cls, else a field of .json."""
    try:
        if "cls" in fields:
            return label_text(fields["cls"].decode(), where, "cls")
        record = json.loads(fields.get("json", b"{}"))
    except ValueError as error:
        raise ddkit.InputError(f"{where}: its label cannot be read ({error}).") from None
    named = [name for name in (*LABEL, "cls") if isinstance(record, dict) and name in record]
    if not named:
        have = f" (its .json has {', '.join(record)})" if record and isinstance(record, dict) else ""
        raise ddkit.InputError(
            f"{where}: it has no label. A label is .cls, or a field of .json named {', '.join(LABEL)}{have}. If folders in the shard are "
            f"the classes, unpack it with `mkdir FOLDER && tar -xf {file} -C FOLDER`, and use --dataset imagefolder:FOLDER"
        )
    return label_text(record[named[0]], where, named[0])
