"""Loads images of a dataset as one tensor: block by block, in memory, or where they exceed `data.memory`, in a file."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ddkit.components.base import Dataset
from ddkit.components.observers import Report
from ddkit.data.image_cache import Entry, Shape, entry_of
from ddkit.data.images import Kinds, conform, to_unit
from ddkit.data.memmap import mapped
from ddkit.errors import InputError, RunFilesError
from ddkit.files import cache_folder, make_folder

log = logging.getLogger("ddkit")

FIRST = 16  # images of the first block, which tells how large they are
BLOCK_BYTES = 64 * 2**20  # of the others, at most; an eighth of data.memory where that is less

Block = Sequence[Tensor] | Tensor


def load_images(dataset: Dataset, split: str, indices: Sequence[int], shape: Shape | None, report: Report | None = None) -> Tensor:
    """Returns images `indices` of a split as (n, C, H, W) of `shape` (None: the most common one among them): uint8 where all are.

    They come from ddkit's cache where no file has changed since they were decoded. Where they are larger than dataset.memory_mib they
    are not held in memory: the tensor lies in a file, in the cache or, where they are not cached, one that goes with the tensor.
    `report(done, total)` is called while they are read. Warns of images that were resized. Raises InputError where there is no room for
    that file.
    """
    entry = entry_of(dataset, split, indices, shape)
    limit = dataset.memory_mib * 2**20
    found = None if entry is None else entry.read(limit)
    if found is None:
        found = _in_memory(dataset, split, indices, shape, limit, report)
        if found is None:
            found = _streamed(dataset, split, indices, shape, entry, report)
        elif entry is not None:
            entry.write(*found)
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


def _in_memory(
    dataset: Dataset, split: str, indices: Sequence[int], shape: Shape | None, limit: int, report: Report | None
) -> tuple[Tensor, int] | None:
    """Returns (images, how many were resized), or None where they take more than `limit` bytes as they come."""
    kinds, before = Kinds(), dataset.resized
    room: Tensor | None = None  # for all, as long as they are alike
    filled, pending = 0, list[Tensor]()
    for block in _blocks(dataset, split, indices, report):
        kinds.add(block)
        if len(kinds) == len(block) and _bytes(block) * len(indices) > limit * len(block):
            return None  # as far as the first block tells
        if isinstance(block, Tensor) and room is None and not pending:
            room = block if len(block) == len(indices) else block.new_empty((len(indices), *block.shape[1:]))
        if isinstance(block, Tensor) and room is not None and not pending and _alike(block, room):
            room[filled : filled + len(block)] = block
            filled += len(block)
            continue
        pending += block
        if (0 if room is None else room[:filled].nbytes) + _bytes(pending) > limit:
            return None
    resized = dataset.resized - before
    if room is not None and not pending and (shape or kinds.shape) == room.shape[1:]:
        return room if room.dtype == torch.uint8 else to_unit(room), resized
    pending = [*([] if room is None else room[:filled]), *pending]
    del room  # `conform` frees one image after the other
    shape = shape or kinds.shape
    return conform(pending, shape), resized + kinds.others(shape)


def _alike(block: Tensor, room: Tensor) -> bool:
    return block.shape[1:] == room.shape[1:] and block.dtype == room.dtype


def _streamed(
    dataset: Dataset, split: str, indices: Sequence[int], shape: Shape | None, entry: Entry | None, report: Report | None
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

    nbytes = prod(whole) * dtype.itemsize
    if nbytes <= dataset.memory_mib * 2**20:
        room, filled = torch.empty(whole, dtype=dtype), 0
        for block in fitted():
            room[filled : filled + len(block)] = block
            filled += len(block)
        return room, resized()
    log.info("%d images of %d x %d pixels exceed data.memory: they are read from the disk where they are needed.", len(indices), *shape[1:])
    kept = None if entry is None else entry.stream(dtype, whole, fitted, resized)
    return _in_file(dtype, whole, fitted) if kept is None else kept, resized()


def surveyed(dataset: Dataset, split: str, indices: Sequence[int]) -> Kinds:
    """Returns what the images are like, from their sizes alone where the dataset knows them."""
    kinds, shapes = Kinds(), dataset.shapes(split, indices)
    if shapes is not None:
        kinds.add_shapes(shapes)
        return kinds
    for block in _blocks(dataset, split, indices):
        kinds.add(block)
    return kinds


def _in_file(dtype: torch.dtype, shape: Sequence[int], made: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Returns the blocks that `made()` yields as one tensor in a file without a name, which goes with the tensor."""
    folder = _writable_folder()
    try:
        with tempfile.TemporaryFile(prefix="ddkit-", dir=folder) as file:
            for block in made():
                file.write(block.contiguous().numpy().data)
            file.flush()
            return mapped(file, dtype, shape)
    except OSError as error:
        where, needed = folder or tempfile.gettempdir(), prod(shape) * dtype.itemsize / 2**20
        raise InputError(
            f"{shape[0]:,} images take {needed:,.0f} MiB, more than data.memory, and there is no room for them in {where} "
            f"({error.strerror or error}). Make room, name another place with the environment variable DDKIT_CACHE, use fewer (--pipc), "
            "or raise data.memory.",
            "data.memory",
        ) from None


def _writable_folder() -> Path | None:
    """Returns the folder of the cache, None where there can be none: a folder for temporary files may lie in memory itself."""
    try:
        folder = make_folder(cache_folder())
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RunFilesError):
        return None
