"""Images as tensors: in memory or in a file, one shape for all, and pixel units to normalised and back.

Images that exceed the memory budget lie in a file, and are read where they are looked at. Such a tensor is one as any other. Pages of the
file that were read stay in memory until they are given back, which `blocks` and `rows_of` do as they go, so that a pass over all images
leaves none of them there.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ddkit.data.whitening import Whitening

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts
PART_BYTES = 2**24  # of pages of a file that are in memory at once
MOST_IMAGES = 1000  # that stand for all of a set


def memmap(path: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Returns the tensor that the file `path` holds; the file may lose its name afterwards.

    The mapping is private: writing into the tensor stays in this process, and is lost where pages are given back.
    """
    found = torch.from_file(path, shared=False, size=math.prod(shape), dtype=dtype).view(*shape)
    # torch keeps the attribute for as long as the storage; it knows the name of the file only if writing reached the file.
    vars(found.untyped_storage())["file"] = path
    return found


def on_disk(images: Tensor) -> bool:
    """Returns whether the values of a tensor lie in a file because they exceed the memory budget.

    Examples:
        >>> ddkit.data.on_disk(torch.zeros(2))
        False
    """
    return images.device.type == "cpu" and hasattr(images.untyped_storage(), "file")


def give_back(images: Tensor) -> None:
    """Gives the pages of a tensor in a file back to the system; what is read later comes from the file again."""
    if on_disk(images) and hasattr(mmap, "MADV_DONTNEED"):
        storage = images.untyped_storage()
        ctypes.CDLL(None).madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)


def blocks(images: Tensor, rows: int) -> Iterator[Tensor]:
    """Yields consecutive blocks of at most `rows` rows of a tensor (n, ...); of one in a file, pages are given back after each block.

    Examples:
        >>> [len(block) for block in ddkit.data.blocks(torch.zeros(7, 3), 3)]
        [3, 3, 1]
    """
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


def spread(images: Tensor, most: int = MOST_IMAGES) -> Tensor:
    """Returns at most `most` of the images (n, ...), evenly spread over them, so over all classes if they are grouped by class.

    Examples:
        >>> ddkit.data.spread(torch.arange(10)[:, None], most=5).flatten().tolist()
        [0, 2, 4, 7, 9]
    """
    if len(images) <= most:
        return images
    return rows_of(images, torch.linspace(0, len(images) - 1, most).round().long())


class Kinds:
    """What some images are like: how many of each size (height, width), whether all are grey, and whether all are bytes."""

    def __init__(self) -> None:
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.grey = self.bytes = True

    def __len__(self) -> int:
        return self.sizes.total()

    def add(self, images: Sequence[Tensor] | Tensor) -> None:
        """Counts images (C, H, W)."""
        self.add_shapes([tuple(image.shape) for image in images])
        self.bytes &= all(image.dtype == torch.uint8 for image in images)

    def add_shapes(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Counts images of uint8 by their shapes (C, H, W)."""
        for channels, height, width in shapes:
            self.sizes[height, width] += 1
            self.grey &= channels == 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W): 1 channel if all have one, else 3; the most frequent size (of equals, the larger)."""
        height, width = max(self.sizes, key=lambda size: (self.sizes[size], size))
        return 1 if self.grey else 3, height, width

    def others(self, shape: tuple[int, int, int]) -> int:
        """Returns how many have another height or width than `shape`."""
        return len(self) - self.sizes[shape[1], shape[2]]


def conform(images: list[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """Returns the images (C, H, W) as one tensor (n, *shape): uint8 if all are, else float32 in 0..1.

    Other sizes are resized (bilinear, antialiased), other channel counts repeated or reduced to luminance. Empties the
    list as it goes, so that a large set is not held twice.

    Examples:
        >>> grey, colour = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> ddkit.data.conform([grey, colour], (3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    whole_bytes = all(image.dtype == torch.uint8 for image in images)
    found = torch.empty((len(images), *shape), dtype=torch.uint8 if whole_bytes else torch.float32)
    while images:
        fitted = _fitted(images.pop(), shape)
        found[len(images)] = fitted if whole_bytes else to_unit(fitted)
    return found


def _fitted(image: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if tuple(image.shape) == shape:
        return image
    x = to_unit(image)
    if x.shape[0] == 1 and shape[0] == 3:
        x = x.expand(3, -1, -1)
    elif x.shape[0] == 3 and shape[0] == 1:
        x = (x * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)
    if tuple(x.shape[1:]) != shape[1:]:
        x = torch.nn.functional.interpolate(x[None], shape[1:], mode="bilinear", antialias=True)[0]
    return (x * 255).round().to(torch.uint8) if image.dtype == torch.uint8 else x


def to_unit(images: Tensor) -> Tensor:
    """Returns images of any shape, uint8 or floats, as float32 in pixel units (0..1); float64 stays, for checks.

    Examples:
        >>> ddkit.data.to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    if images.dtype == torch.float64:
        return images
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


MOST_VALUES = 1000 * 3 * 32 * 32  # in float64 at once


def channel_statistics(
    images: Tensor, *, rows: int | None = None, total: Callable[[Tensor], Tensor] = lambda own: own
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, std) of each channel of images (n, C, H, W) in pixel units, computed in float64.

    Where these are a part of `rows` images, `total` returns a sum over all parts.
    """
    count = (images.shape[0] if rows is None else rows) * images.shape[2] * images.shape[3]
    at_once = max(1, min(1000, MOST_VALUES // max(1, images[:1].numel())))
    mean, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in blocks(images, at_once):
        mean = mean + to_unit(part).double().sum((0, 2, 3)) / count
    mean = total(mean)
    for part in blocks(images, at_once):
        squares = squares + (to_unit(part).double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
    std = (total(squares) / count).sqrt().clamp_min(1e-6)
    return tuple(mean.tolist()), tuple(std.tolist())


class Normalisation:
    """Maps images in pixel units to normalised ones, (x - mean) / std per channel, and back; with a `whitening` to whitened images.

    Examples:
        >>> normalisation = ddkit.data.Normalisation(mean=(0.5,), std=(0.25,))
        >>> images = normalisation.normalise(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
        >>> images.unique().item(), normalisation.to_pixels(images).unique().item()
        (2.0, 1.0)
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], whitening: Whitening | None = None) -> None:
        self.mean = tuple(map(float, mean))
        self.std = tuple(map(float, std))
        self.whitening = whitening
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std, default=0) <= 0:
            raise ValueError(f"Normalisation(mean={mean}, std={std}): each channel needs a finite mean and a finite std above 0.")
        self._kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and std as tensors, made once for each device: making them there makes a GPU wait."""
        key = like.device, like.dtype
        if key not in self._kept:
            self._kept[key] = like.new_tensor(self.mean).view(-1, 1, 1), like.new_tensor(self.std).view(-1, 1, 1)
        return self._kept[key]

    def normalise(self, images: Tensor) -> Tensor:
        """Returns float32 normalised images (n, C, H, W) from uint8 or pixel units."""
        x = to_unit(images)
        if self.whitening is not None:
            return self.whitening.whiten(x)
        mean, std = self._constants(x)
        return (x - mean) / std

    def same(self, other: Normalisation) -> bool:
        """Whether both give the same images."""
        digests = [None if each.whitening is None else each.whitening.digest for each in (self, other)]
        return (self.mean, self.std, digests[0]) == (other.mean, other.std, digests[1])

    def lazily(self, images: Tensor) -> Tensor | NormalisedRows:
        """Returns normalised images: a tensor, or for images on the disk, rows that are normalised when they are read."""
        return NormalisedRows(images, self) if on_disk(images) else self.normalise(images)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Returns images in pixel units from normalised ones; not clipped."""
        if self.whitening is not None:
            return self.whitening.undo(images)
        mean, std = self._constants(images)
        return images * std + mean


class NormalisedRows:
    """Images (n, C, H, W), mostly on the disk, normalised when they are read: `rows[index]` is a tensor of those rows, on `device`.

    No row is kept in memory. Used as a whole, as in `rows.mean(0)`, it becomes a tensor of all rows, which may not fit in memory.

    Examples:
        >>> images = torch.zeros(100, 1, 2, 2, dtype=torch.uint8)
        >>> rows = ddkit.data.NormalisedRows(images, ddkit.data.Normalisation(mean=(0.5,), std=(0.25,)))
        >>> tuple(rows[:3].shape), rows[torch.tensor([4])].unique().item()
        ((3, 1, 2, 2), -2.0)
    """

    def __init__(self, images: Tensor, normalisation: Normalisation, device: torch.device | str = "cpu") -> None:
        self.images = images
        self.normalisation = normalisation
        self.device = torch.device(device)

    @property
    def shape(self) -> torch.Size:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice | int) -> Tensor:
        """Returns the normalised images of an index, a mask, a slice, or one number."""
        rows = torch.arange(len(self.images))[index.cpu() if isinstance(index, Tensor) else index]
        return self.normalisation.normalise(rows_of(self.images, rows).to(self.device))

    def split(self, rows: int) -> Iterator[Tensor]:
        """Yields consecutive blocks of at most `rows` rows."""
        for part in blocks(self.images, rows):
            yield self.normalisation.normalise(part.to(self.device))

    def to(self, device: torch.device | str) -> NormalisedRows:
        """Returns the same rows, to come on `device`."""
        return NormalisedRows(self.images, self.normalisation, device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self[:], name)


def most_classes(images: int) -> int:
    """Returns how many class names a set of so many images may have: some of its classes may have no image, but not most of very many."""
    return max(1000, 10 * images)
