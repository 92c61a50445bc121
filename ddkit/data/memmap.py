"""Tensors whose values lie in a file: images that exceed the memory budget are read where they are looked at.

Such a tensor is one as any other. Pages of the file that were read stay in memory until they are given back, which `blocks` and `rows_of`
do as they go, so that a pass over all images leaves none of them there.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from math import prod
from typing import IO
from weakref import WeakValueDictionary

import torch
from torch import Tensor

PART_BYTES = 2**24  # of pages that are in memory at once
_FILES: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by the address of the tensor's first value


def mapped(file: IO[bytes], dtype: torch.dtype, shape: Sequence[int], offset: int = 0) -> Tensor:
    """Returns the tensor of `shape` at byte `offset` of an open file, which may be closed afterwards.

    The mapping is private: writing into the tensor stays in this process, and is lost where pages are given back.
    """
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found = torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=offset).view(*shape)
    _FILES[found.data_ptr()] = memory
    return found


def on_disk(images: Tensor) -> bool:
    """Whether the values of a tensor, not those of a part of it, lie in a file because they exceed the memory budget."""
    return _file(images) is not None


def _file(images: Tensor) -> mmap.mmap | None:
    return _FILES.get(images.data_ptr()) if images.numel() and images.device.type == "cpu" else None


def blocks(images: Tensor, rows: int) -> Iterator[Tensor]:
    """Yields consecutive blocks of at most `rows` rows of a tensor; of one in a file, pages are given back after each block."""
    for part in images.split(rows):
        yield part
        give_back(images)


def rows_of(images: Tensor, rows: Tensor) -> Tensor:
    """Returns a copy of some rows, by index or mask; of a tensor in a file, pages are given back."""
    if not on_disk(images) or rows.ndim == 0:
        return images[rows]
    rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
    found = images.new_empty((len(rows), *images.shape[1:]))
    size = max(1, PART_BYTES // images[0].nbytes)
    for part, chosen in zip(found.split(size), rows.split(size), strict=True):
        part.copy_(images[chosen])
        give_back(images)
    return found


def give_back(images: Tensor) -> None:
    """Gives the pages of a tensor in a file back to the system; what is read later comes from the file again."""
    memory = _file(images)
    if memory is not None and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)
