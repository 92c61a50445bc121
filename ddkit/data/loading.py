"""Loads images of a dataset as one tensor: from the cache, or decoded in blocks, in memory or, if they exceed `data.memory`, in a file.

The cache keeps decoded images between runs if there are so many that decoding takes half a second: one file of pixels for each set of
image files that was asked for. Its name is a digest over the stamp of every file, in order, and over what else decides the pixels. So a
changed file is another entry, and the old one goes when the folder is full. The record of an entry is kept apart, in the private part
of the cache, with the stamp of the entry, so that no other file is taken for it. A stamp has the inode and the time of change, which
nobody can set: of data that are unpacked over older ones, size and time of modification may be the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ddkit import __version__
from ddkit.cache import cache_folder, make_folder, mark_of, private_folder, vouch, vouched
from ddkit.components.base import Dataset
from ddkit.components.observers import Report
from ddkit.data.images import Kinds, conform, memmap, to_unit
from ddkit.errors import InputError, RunFilesError
from ddkit.files import read_text, replace_whole, write_atomic

log = logging.getLogger("ddkit")

FIRST = 16  # images of the first block, which shows how large they are
BLOCK_BYTES = 64 * 2**20  # of the others, at most; an eighth of data.memory where that is less
FORMAT = 3  # of the cache: raised when the same files, shape and key give other pixels or another layout
LIMIT_BYTES = 4 * 2**30  # of the cache's folder
# Below both, decoding is too short to be worth a file: 5,000 images of 32 x 32, or 16 MiB of photographs, take half a second.
FEW_IMAGES, FEW_BYTES = 5000, 16 * 2**20
SETTLED_NS = 2 * 10**9  # the coarsest clock of a common file system (FAT); in one tick of it a file can change unseen

Shape = tuple[int, int, int]
Block = Sequence[Tensor] | Tensor


def load_images(dataset: Dataset, split: str, indices: Sequence[int], shape: Shape | None, report: Report | None = None) -> Tensor:
    """Returns images `indices` of a split as (n, C, H, W) of `shape` (None: the most common one among them): uint8 where all are.

    They come from ddkit's cache where no file has changed since they were decoded. Where they are larger than dataset.memory_mib they
    are not held in memory: the tensor lies in a file, in the cache or, where they are not cached, one that goes with the tensor.
    `report(done, total)` is called while they are read. Warns of images that were resized. Raises InputError where there is no room for
    that file.
    """
    entry: Path | None = None
    with contextlib.suppress(RunFilesError):  # no folder can be written
        key = _key(dataset, [dataset.files(split, indices)], shape)
        entry = None if key is None else cache_folder() / "images" / f"{key}.pixels"
    limit = dataset.memory_mib * 2**20
    found = None if entry is None else _cached(entry, limit)
    if found is None:
        found = _held(dataset, split, indices, shape, limit, report)
        if found is None:
            found = _streamed(dataset, split, indices, shape, entry, report)
        elif entry is not None:
            images, resized = found
            _keep(entry, [images], images.dtype, images.shape, lambda: resized)
    images, resized = found
    if resized:
        height, width = images.shape[2:]
        log.warning("%d of %d images were resized to %d x %d pixels.", resized, len(images), height, width)
    return images


def _blocks(dataset: Dataset, split: str, indices: Sequence[int], report: Report | None = None) -> Iterator[Block]:
    """Yields the images in order, as the dataset gives them, some at a time."""
    start, rows, most = 0, FIRST, min(BLOCK_BYTES, dataset.memory_mib * 2**20 // 8)
    while start < len(indices):
        block = dataset.images(split, indices[start : start + rows])
        yield block
        start += rows
        if report is not None:
            report(min(start, len(indices)), len(indices))
        rows = max(1, most * len(block) // max(1, _bytes(block)))


def _bytes(block: Block) -> int:
    return block.nbytes if isinstance(block, Tensor) else sum(image.nbytes for image in block)


def _held(
    dataset: Dataset, split: str, indices: Sequence[int], shape: Shape | None, limit: int, report: Report | None
) -> tuple[Tensor, int] | None:
    """Returns (images, how many were resized), or None where they take more than `limit` bytes as they come."""
    kinds, before, size = Kinds(), dataset.resized, 0
    room = torch.empty(0)  # for all images like the first ones
    odd: dict[int, Tensor] = {}  # the others, by row
    for block in _blocks(dataset, split, indices, report):
        start = len(kinds)
        kinds.add(block)
        size += _bytes(block)
        if size > limit or (start == 0 and size * len(indices) > limit * len(block)):  # as far as the first block shows
            return None
        if start == 0:
            room = torch.empty((len(indices), *(shape or kinds.shape)), dtype=block[0].dtype)
        if isinstance(block, Tensor) and block.shape[1:] == room.shape[1:] and block.dtype == room.dtype:
            room[start : start + len(block)] = block
            continue
        for row, image in enumerate(block, start):
            if image.shape == room.shape[1:] and image.dtype == room.dtype:
                room[row] = image
            else:
                odd[row] = image
    resized, shape = dataset.resized - before, shape or kinds.shape
    if not odd and room.shape[1:] == shape:
        return room if room.dtype == torch.uint8 else to_unit(room), resized
    images = [odd[row] if row in odd else room[row] for row in range(len(kinds))]
    return conform(images, shape), resized + kinds.others(shape)


def _streamed(
    dataset: Dataset, split: str, indices: Sequence[int], shape: Shape | None, entry: Path | None, report: Report | None
) -> tuple[Tensor, int]:
    """Returns (images, how many were resized) in a file, or after all in memory, where they are small once they are resized."""
    kinds = surveyed(dataset, split, indices)
    shape = shape or kinds.shape
    dtype = torch.uint8 if kinds.bytes else torch.float32
    whole, before = (len(indices), *shape), dataset.resized

    def fitted() -> Iterator[Tensor]:
        dataset.resized = before  # counted anew where this is begun again
        for block in _blocks(dataset, split, indices, report):
            images = block if isinstance(block, Tensor) and block.shape[1:] == shape else conform(list(block), shape)
            yield images if dtype == torch.uint8 else to_unit(images).to(dtype)

    def resized() -> int:
        return kinds.others(shape) + dataset.resized - before

    if prod(whole) * dtype.itemsize <= dataset.memory_mib * 2**20:
        return torch.cat(list(fitted())), resized()
    log.info(
        "%d images of %d x %d pixels exceed data.memory: they are read from the disk when a step needs them.", len(indices), *shape[1:]
    )
    kept = _cached(entry, 0) if entry is not None and _keep(entry, fitted(), dtype, whole, resized) else None
    return kept or (_unnamed(fitted(), dtype, whole), resized())


def surveyed(dataset: Dataset, split: str, indices: Sequence[int]) -> Kinds:
    """Returns what the images are like, from their sizes alone where the dataset knows them."""
    kinds, shapes = Kinds(), dataset.shapes(split, indices)
    if shapes is not None:
        kinds.add_shapes(shapes)
        return kinds
    for block in _blocks(dataset, split, indices):
        kinds.add(block)
    return kinds


def _write(file: IO[bytes], made: Iterable[Tensor]) -> None:
    """Writes the pixels of blocks of images into a file, one after the other."""
    for block in made:
        file.write(block.contiguous().numpy().data)
    file.flush()


def _unnamed(made: Iterable[Tensor], dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Returns blocks of images as one tensor in a file without a name, which goes with the tensor."""
    folder: Path | None = None  # where there can be no cache, that for temporary files, which may lie in memory itself
    with contextlib.suppress(OSError, RunFilesError):
        folder = make_folder(cache_folder())
        tempfile.TemporaryFile(dir=folder).close()
    try:
        with tempfile.TemporaryFile(prefix="ddkit-", dir=folder) as file:
            _write(file, made)
            return memmap(f"/dev/fd/{file.fileno()}", dtype, shape)
    except OSError as error:
        where, needed = folder or tempfile.gettempdir(), prod(shape) * dtype.itemsize / 2**20
        raise InputError(
            f"{shape[0]:,} images take {needed:,.0f} MiB, more than data.memory, and they do not fit into {where} "
            f"({error.strerror or error}). Make room, name another place with the environment variable DDKIT_CACHE, use fewer (--pipc), "
            "or raise data.memory.",
            "data.memory",
        ) from None


# The cache


def _stamp(path: str) -> tuple[int, int, int, int]:
    """Returns what changes when a file does: its size, times of modification and of change, and inode."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


_writes: ContextVar[bool] = ContextVar("writes", default=True)


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Inside, the caches of images and fingerprints are read and not written."""
    token = _writes.set(False)
    try:
        yield
    finally:
        _writes.reset(token)


def _key(dataset: Dataset, files: Sequence[Sequence[str] | None], *what: object) -> str | None:
    """Returns the key of what comes of some files and of `what`, None where keeping it is not possible or no use.

    It is of use if there is much to read, and no file was changed a moment ago.
    """
    try:
        stamps = [(file, *_stamp(file)) for part in files for file in part or ()]
    except OSError:  # decoding it will say what is wrong
        return None
    if None in files or (len(stamps) < FEW_IMAGES and sum(size for _, size, *_ in stamps) < FEW_BYTES):
        return None
    if max(modified for _, _, modified, *_ in stamps) >= time.time_ns() - SETTLED_NS:
        return None
    kind = type(dataset)
    how = [FORMAT, __version__, str(torch.__version__), kind.__module__, kind.__qualname__, dataset.decoding_key(), *what]
    digest = hashlib.sha256(json.dumps(how).encode() + b"\0")
    digest.update(os.fsencode("".join(f"{part}\0" for stamp in stamps for part in stamp)))
    return digest.hexdigest()


def _cached(entry: Path, limit: int) -> tuple[Tensor, int] | None:
    """Returns (images, how many were resized) of an entry, or None where there is none that can be trusted. It never fails a run.

    Images of more than `limit` bytes stay on the disk.
    """
    record = vouched(entry)
    if record is None:
        return None
    try:
        known = json.loads(record)
        dtype, shape = torch.uint8 if known["bytes"] else torch.float32, tuple(known["shape"])
        if known["stamp"] != list(_stamp(str(entry))) or prod(shape) * dtype.itemsize != known["stamp"][0]:
            raise ValueError("this user did not write them")
        if prod(shape) * dtype.itemsize > limit:
            images = memmap(str(entry), dtype, shape)
        else:
            images = torch.from_numpy(np.fromfile(entry, np.uint8 if known["bytes"] else np.float32)).view(shape)
        os.utime(mark_of(entry))  # the least recently used go first
        return images, int(known["resized"])
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        log.info("The cached images %s are not used: %s.", entry, error)
        return None


def _keep(entry: Path, made: Iterable[Tensor], dtype: torch.dtype, shape: Sequence[int], resized: Callable[[], int]) -> bool:
    """Keeps blocks of images, of `shape` (n, C, H, W) in all, without holding them; returns whether they could be kept.

    `resized()` is asked afterwards how many were. They are not kept where they are too large for the cache, or it cannot be written.
    """
    if prod(shape) * dtype.itemsize > LIMIT_BYTES or not _writes.get():
        return False

    def write(name: str) -> None:
        with open(name, "wb") as file:
            _write(file, made)

    try:
        make_folder(entry.parent)
        replace_whole(entry, write)
        vouch(entry, json.dumps({"stamp": _stamp(str(entry)), "bytes": dtype == torch.uint8, "shape": list(shape), "resized": resized()}))
        _make_room(entry)
    except (OSError, RunFilesError) as error:
        log.info("The decoded images could not be cached: %s", error)
        return False
    return True


def _make_room(newest: Path) -> None:
    """Removes the least recently used files until the folder is within its limit; `newest` stays."""
    files = [file for file in newest.parent.iterdir() if file.is_file()]
    excess = sum(file.stat().st_size for file in files) - LIMIT_BYTES
    for file in sorted(files, key=_last_use):
        if excess > 0 and file != newest:
            excess -= file.stat().st_size
            file.unlink(missing_ok=True)
            mark_of(file).unlink(missing_ok=True)


def _last_use(entry: Path) -> int:
    """Returns when an entry was used, in nanoseconds; 0 for one that nobody vouches for."""
    mark = mark_of(entry)
    return mark.stat().st_mtime_ns if mark.exists() else 0


def fingerprint(dataset: Dataset) -> str:
    """Returns dataset.fingerprint(); of many files of which none has changed since, without reading them again."""
    files = [dataset.files(split, range(len(dataset.labels(split)))) for split in ("train", "test")]
    key = _key(dataset, files, list(dataset.class_names), len(files[0] or ()))
    if key is None:
        return dataset.fingerprint()
    try:
        file = private_folder("fingerprints") / key
    except RunFilesError:  # no folder can be written
        return dataset.fingerprint()
    with contextlib.suppress(OSError, ValueError):
        return read_text(file)
    found = dataset.fingerprint()
    if _writes.get():
        try:
            write_atomic(file, found.encode())
        except RunFilesError as error:
            log.info("The fingerprint of the data could not be cached: %s", error)
    return found
