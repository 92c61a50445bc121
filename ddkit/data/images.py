"""Images as tensors: one shape for all, pixel units to normalised and back, and the picture of a set."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddkit.data.memmap import blocks, on_disk, rows_of
from ddkit.errors import printable

LONGEST_NAME = 60  # characters of a class name in a picture
MANY_CLASSES = 100  # whose rows, of 64 pixels, may stand below each other; more are drawn smaller
MOST_HEIGHT, MOST_PIXELS = 7000, 10_000_000  # of a picture; viewers give up on towers
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts


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
    """Returns the images (C, H, W) as one tensor (n, *shape): uint8 where all are, else float32 in 0..1.

    Other sizes are resized (bilinear, antialiased), other channel counts repeated or reduced to luminance. Empties the
    list as it goes, so that a large set is not held twice.
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
    """Returns images as float32 in pixel units (0..1); float64 stays, for checks."""
    if images.dtype == torch.float64:
        return images
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


STATISTICS_VALUES = 1000 * 3 * 32 * 32  # taken into account at once, in float64


def channel_statistics(
    images: Tensor, *, rows: int | None = None, total: Callable[[Tensor], Tensor] = lambda own: own
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, std) of each channel of images (n, C, H, W) in pixel units, computed in float64.

    Where these are a part of `rows` images, `total` returns a sum over all parts.
    """
    count = (images.shape[0] if rows is None else rows) * images.shape[2] * images.shape[3]
    at_once = max(1, min(1000, STATISTICS_VALUES // max(1, images[:1].numel())))
    mean, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in blocks(images, at_once):
        mean = mean + to_unit(part).double().sum((0, 2, 3)) / count
    mean = total(mean)
    for part in blocks(images, at_once):
        squares = squares + (to_unit(part).double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
    std = (total(squares) / count).sqrt().clamp_min(1e-6)
    return tuple(mean.tolist()), tuple(std.tolist())


class Normalisation:
    """Maps images in pixel units to normalised ones, (x - mean) / std a channel, and back."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(map(float, mean))
        self.std = tuple(map(float, std))
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std, default=0) <= 0:
            raise ValueError(f"Normalisation(mean={mean}, std={std}): a finite mean and a finite std above 0 for each channel are needed.")
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
        mean, std = self._constants(x)
        return (x - mean) / std

    def lazily(self, images: Tensor) -> Tensor | NormalisedRows:
        """Returns normalised images: a tensor, or where `images` lie on the disk, rows that are normalised where they are looked at."""
        return NormalisedRows(images, self) if on_disk(images) else self.normalise(images)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Returns images in pixel units from normalised ones; not clipped."""
        mean, std = self._constants(images)
        return images * std + mean


class NormalisedRows:
    """Images (n, C, H, W), mostly on the disk, seen as normalised ones: `rows[index]` is a tensor of those rows, on `device`.

    Not one of them is kept. Used as a whole, as in `rows.mean(0)`, it is a tensor of all of them, which may not fit in memory.
    """

    def __init__(self, images: Tensor, normalisation: Normalisation, device: torch.device | str = "cpu") -> None:
        self.images, self.normalisation, self.device = images, normalisation, torch.device(device)

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


def sheet_png(images: Tensor, labels: Tensor, class_names: Sequence[str], *, columns: int = 20) -> bytes:
    """Returns a PNG with a row per class (at most `columns` images of each), names at the left, enlarged by whole pixels.

    Where the rows would make a tower they stand in several columns, and of very many classes the first are shown; a line says so. Names
    in letters that Pillow's own font lacks are in a font of the system, and where it has none the class is called by its number.
    """
    from PIL import Image, ImageDraw

    height, width = images.shape[2:]
    rows = labels.unique().tolist()
    scale = max(1, round((64 if len(rows) <= MANY_CLASSES else 32) / max(height, width)))
    most = min(columns, int(labels.bincount().max()))
    cell_h, cell_w = height * scale + 4, width * scale + 4
    most_rows = MOST_PIXELS // (cell_h * cell_w) + 1
    names = {label: _written(" ".join(printable(class_names[label]).split())[:LONGEST_NAME], label) for label in rows[:most_rows]}
    margin = 12 + max(int(font.getlength(name)) for name, font in names.values())
    row_w = margin + most * cell_w
    shown = rows[: max(1, MOST_PIXELS // (row_w * cell_h))]
    deep = _depth(len(shown), row_w, cell_h)
    footer = 24 if len(shown) < len(rows) else 0
    sheet = Image.new("RGB", (-(-len(shown) // deep) * row_w, min(deep, len(shown)) * cell_h + footer), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    for number, label in enumerate(shown):
        left, top = number // deep * row_w, number % deep * cell_h
        name, own = names[label]
        draw.text((left + 6, top + cell_h // 2), name, fill="black", font=own, anchor="lm")
        for x, image in enumerate(pixels[labels == label][:most]):
            array = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
            tile = Image.fromarray(array).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + margin + x * cell_w, top + 2))
    if footer:
        draw.text(
            (6, sheet.height - 12), f"The first {len(shown):,} of {len(rows):,} classes.", fill="black", font=_fonts()[0], anchor="lm"
        )
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msgothic.ttc",
    "YuGothM.ttc",
)


@cache
def _fonts() -> tuple[Any, ...]:
    """Returns Pillow's own font, then those of the system that are there."""
    from PIL import ImageFont

    found = [ImageFont.load_default(size=14)]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size=14))
    return tuple(found)


def _written(name: str, label: int) -> tuple[str, Any]:
    """Returns (name, font) as it can be drawn: the first font that has all of its letters."""
    for font in _fonts()[: 1 if name.isascii() else None]:
        if all(_has(font, letter) for letter in set(name)):
            return name, font
    return f"class {label}", _fonts()[0]


@cache
def _has(font: Any, letter: str) -> bool:
    """Whether a font has a letter: what it lacks is drawn as one and the same box."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


def _depth(rows: int, width: int, height: int) -> int:
    """Returns how many of `rows` rows, each of width x height pixels, stand below each other: all, or as many as make a square."""
    if rows * height <= MOST_HEIGHT:
        return rows
    return -(-rows // max(2, round((rows * height / width) ** 0.5)))
