"""Decoded images kept between runs: one memory-mapped file for each set of image files that was asked for.

An entry's name is a digest over the stamp of every file, in order, and over what else decides the pixels. So a changed file is another
entry, and the old one goes when the folder is full. The stamp of an entry is kept apart, in the private part of the cache, so that no other
file is taken for it. A stamp has the inode and the time of change, which nobody can set: of data that are
unpacked over older ones, size and time of modification may be the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ddkit import __version__
from ddkit.data.memmap import mapped
from ddkit.errors import RunFilesError
from ddkit.files import (
    SCHEMA,
    cache_folder,
    make_folder,
    mark_of,
    open_regular,
    private_folder,
    read_bytes,
    read_tensors,
    replace_whole,
    vouch,
    vouched,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from ddkit.components.base import Dataset

log = logging.getLogger("ddkit")

FORMAT = 2  # raised when the same files, shape and key give other pixels or another layout
LIMIT_BYTES = 4 * 2**30  # of the folder
CHECKED_BYTES = 64 * 2**20  # up to here a checksum costs some 20 ms; beyond, it would read what mapping leaves on the disk
# Below both, decoding is too short to be worth a file: 31 images of 32 x 32 take 3 ms, 1 MiB of photographs 30 ms.
FEW_IMAGES, FEW_BYTES = 32, 2**20
SETTLED_NS = 2 * 10**9  # the coarsest clock of a common file system (FAT); in one tick of it a file can change unseen

Shape = tuple[int, int, int]


class Stamp(NamedTuple):
    """What a file had when it was looked at: path, size in bytes, and what changes when it changes."""

    path: str
    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: str) -> Stamp:
        found = os.stat(path)
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


Stamps = Sequence[Stamp]


_writes: ContextVar[bool] = ContextVar("writes", default=True)


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Inside, the caches of images and fingerprints are read and not written."""
    token = _writes.set(False)
    try:
        yield
    finally:
        _writes.reset(token)


class Entry:
    """The place of `rows` decoded images of `shape` (None: the most common one) in the cache. Using it never fails a run."""

    def __init__(self, path: Path, rows: int, shape: Shape | None) -> None:
        self.path, self.rows, self.shape = path, rows, shape

    def read(self, limit: int) -> tuple[Tensor, int] | None:
        """Returns (images, how many were resized), or None where there is no such file or it cannot be trusted.

        The tensor is a private mapping of the file: pages are read when used, and writing into it stays in this process. Images of more
        than `limit` bytes are "on disk" in the sense of ddkit.data.memmap, whose functions give pages back.
        """
        if not os.path.isfile(self.path):
            return None
        if vouched(self.path) != _mark(self.path):
            log.info("The cached images of %s are not used: they are not what this user put there.", self.path)
            return None
        try:
            tensors, metadata = read_tensors(self.path, verify=False)  # its own checksum stops where mapping saves reading
            images, resized = tensors["images"], int(metadata["resized"])
            trusted = metadata["key"] == self.path.stem and self._fits(images) and metadata["checksum"] == _checksum(images)
            images = _as_file(self.path, images) if images.nbytes > limit else images
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            log.info("The cached images of %s are not used: %s.", self.path, error)
            return None
        if not trusted:
            log.info("The cached images of %s are not used: they are not what the name says.", self.path)
            return None
        with contextlib.suppress(OSError):
            os.utime(mark_of(self.path))  # the least recently used go first
        return images, resized

    def _fits(self, images: Tensor) -> bool:
        shape = images.shape[1:] if self.shape is None else self.shape
        return tuple(images.shape) == (self.rows, *shape)

    def write(self, images: Tensor, resized: int) -> None:
        """Keeps the images (n, C, H, W) and the number of resized ones, unless there is no room for them."""
        if images.nbytes > LIMIT_BYTES or not _writes.get():
            return
        record = {"key": self.path.stem, "resized": resized, "checksum": _checksum(images)}
        try:
            make_folder(self.path.parent)
            write_tensors(self.path, {"images": images}, record, digest=False)
            vouch(self.path, _mark(self.path))
            _make_room(self.path)
        except (OSError, RunFilesError) as error:
            log.info("The decoded images could not be cached: %s", error)

    def stream(
        self, dtype: torch.dtype, shape: Sequence[int], made: Callable[[], Iterator[Tensor]], resized: Callable[[], int]
    ) -> Tensor | None:
        """Keeps what `made()` yields, blocks of images (n, C, H, W), without holding them; returns them as they lie in the file.

        `resized()` is asked afterwards how many were. None where they are too large for the cache, or it cannot be written.
        """
        if prod(shape) * dtype.itemsize > LIMIT_BYTES or not _writes.get():
            return None
        try:
            make_folder(self.path.parent)
            replace_whole(self.path, lambda name: _write_streamed(name, self.path.stem, dtype, shape, made(), resized))
            vouch(self.path, _mark(self.path))
            _make_room(self.path)
        except (OSError, RunFilesError) as error:
            log.info("The decoded images could not be cached: %s", error)
            return None
        found = self.read(0)
        return None if found is None else found[0]


HEADER_BYTES = 1024  # of a streamed file: known before what stands in it


def _write_streamed(
    name: str, key: str, dtype: torch.dtype, shape: Sequence[int], made: Iterator[Tensor], resized: Callable[[], int]
) -> None:
    """Writes what write_tensors would write of Entry.write, block by block: a safetensors file."""
    nbytes, checksum = prod(shape) * dtype.itemsize, 0
    with open(name, "wb") as file:
        file.seek(8 + HEADER_BYTES)
        for block in made:
            content = block.contiguous().numpy().data
            checksum = zlib.crc32(content, checksum) if nbytes <= CHECKED_BYTES else 0
            file.write(content)
        record = {"schema": SCHEMA, "key": key, "resized": resized(), "checksum": checksum if nbytes <= CHECKED_BYTES else None}
        images = {"dtype": "U8" if dtype == torch.uint8 else "F32", "shape": list(shape), "data_offsets": [0, nbytes]}
        header = json.dumps({"__metadata__": {"ddkit": json.dumps(record)}, "images": images}).encode()
        file.seek(0)
        file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))


def _as_file(path: Path, images: Tensor) -> Tensor:
    """Returns the only tensor of a safetensors file, `images`, as one that lies on the disk."""
    with open_regular(path) as file:
        return mapped(file, images.dtype, images.shape, offset=8 + int.from_bytes(file.read(8), "little"))


def stamps_of(dataset: Dataset, split: str, indices: Sequence[int]) -> Stamps | None:
    """Returns the stamp of each image's file, None where the dataset has no files or one cannot be looked at."""
    files = dataset.files(split, indices)
    try:
        return None if files is None else [Stamp.of(file) for file in files]
    except OSError:  # decoding it will say what is wrong
        return None


def entry_of(dataset: Dataset, split: str, indices: Sequence[int], shape: Shape | None) -> Entry | None:
    """Returns where the decoded images `indices` of a split are kept, None where keeping them is not possible or no use."""
    stamps = stamps_of(dataset, split, indices)
    if stamps is None or not _worth_keeping(stamps):
        return None
    with contextlib.suppress(RunFilesError):  # no folder can be written
        return Entry(cache_folder() / "images" / f"{_key(dataset, stamps, shape)}.safetensors", len(stamps), shape)
    return None


def fingerprint(dataset: Dataset) -> str:
    """Returns dataset.fingerprint(); where it comes from files of which none has changed since, without reading them again."""
    file = _fingerprint_file(dataset)
    if file is None:
        return dataset.fingerprint()
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(read_bytes(file))
        if isinstance(kept, dict) and kept.get("key") == file.stem and isinstance(kept.get("fingerprint"), str):
            return str(kept["fingerprint"])
    found = dataset.fingerprint()
    if not _writes.get():
        return found
    try:
        write_json(file, {"key": file.stem, "fingerprint": found})
    except (OSError, RunFilesError) as error:
        log.info("The fingerprint of the data could not be cached: %s", error)
    return found


def _fingerprint_file(dataset: Dataset) -> Path | None:
    splits = [stamps_of(dataset, split, range(len(dataset.labels(split)))) for split in ("train", "test")]
    if any(stamps is None for stamps in splits):
        return None
    digest = hashlib.sha256(json.dumps(list(dataset.class_names)).encode())
    for stamps in splits:
        assert stamps is not None
        if stamps and not _settled(stamps):
            return None
        digest.update(_key(dataset, stamps, None).encode())
    with contextlib.suppress(RunFilesError):  # no folder can be written
        return private_folder("fingerprints") / f"{digest.hexdigest()}.json"
    return None


def _worth_keeping(stamps: Stamps) -> bool:
    if len(stamps) < FEW_IMAGES and sum(stamp.size for stamp in stamps) < FEW_BYTES:
        return False
    return _settled(stamps)


def _settled(stamps: Stamps) -> bool:
    return max(stamp.modified_ns for stamp in stamps) < time.time_ns() - SETTLED_NS


def _key(dataset: Dataset, stamps: Stamps, shape: Shape | None) -> str:
    kind = type(dataset)
    how = [FORMAT, __version__, str(torch.__version__), kind.__module__, kind.__qualname__, dataset.decoding_key(), shape]
    digest = hashlib.sha256(json.dumps(how).encode() + b"\0")
    digest.update(os.fsencode("".join(f"{part}\0" for stamp in stamps for part in stamp)))
    return digest.hexdigest()


def _checksum(images: Tensor) -> int | None:
    return zlib.crc32(images.numpy()) if images.nbytes <= CHECKED_BYTES else None


def _mark(path: Path) -> str:
    """Returns the mark of an entry: its stamp, which no other file can have, and no file that was written since."""
    return " ".join(map(str, Stamp.of(str(path))[1:]))


def _make_room(newest: Path) -> None:
    """Removes the least recently used files until the folder is within its limit; `newest` stays."""
    with os.scandir(newest.parent) as entries:
        found = sorted((_last_use(Path(entry.path)), entry.stat().st_size, entry.path) for entry in entries if entry.is_file())
    excess = sum(size for _, size, _ in found) - LIMIT_BYTES
    for _, size, path in found:
        if excess <= 0:
            return
        if path != str(newest):
            Path(path).unlink(missing_ok=True)
            mark_of(Path(path)).unlink(missing_ok=True)
            excess -= size


def _last_use(path: Path) -> int:
    """Returns when an entry was used, in nanoseconds; 0 for one that nobody vouches for."""
    try:
        return mark_of(path).stat().st_mtime_ns
    except OSError:
        return 0
