"""What is shown of a set: its images in one picture, and its spectrum, how the images' power is spread over spatial frequencies."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ddkit.data.images import MOST_VALUES, blocks, to_unit
from ddkit.errors import InputError
from ddkit.text import printable

LONGEST_NAME = 60  # characters of a class name in a picture
MANY_CLASSES = 100  # whose rows, of 64 pixels, may stand below each other; more are drawn smaller
WIDE = 640  # pixels across that a picture has at least
MOST_HEIGHT, MOST_PIXELS = 7000, 10_000_000  # of a picture; viewers give up on towers
HIGH = 0.25  # cycles per pixel: half of the highest frequency that an axis can hold


def grid(images: Tensor, factor: int) -> Tensor:
    """Returns one picture (C, H, W) of factor * factor images (n, C, H, W), row by row, each resized to its cell.

    Cells differ by a pixel if a side is not a multiple of `factor`. Bilinear, antialiased.

    Examples:
        >>> tuple(ddkit.data.grid(torch.rand(4, 3, 8, 8), 2).shape)
        (3, 8, 8)
    """
    rows, columns = (torch.linspace(0, side, factor + 1).round().int().tolist() for side in images.shape[2:])
    picture = torch.empty_like(images[0])
    for number in range(factor**2):
        top, bottom = rows[number // factor], rows[number // factor + 1]
        left, right = columns[number % factor], columns[number % factor + 1]
        cell = functional.interpolate(images[number : number + 1], (bottom - top, right - left), mode="bilinear", antialias=True)
        picture[:, top:bottom, left:right] = cell[0]
    return picture


def eight_bits(images: Tensor) -> Tensor:
    """Returns images in pixel units as uint8: clipped to 0..1, and rounded."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def sheet_png(images: Tensor, labels: Tensor, class_names: Sequence[str], *, columns: int = 20) -> bytes:
    """Returns a PNG with a row per class (at most `columns` images of each), names at the left, enlarged by whole pixels.

    It is at least WIDE pixels wide, with rows of few images in several columns and larger images. Of very many classes only the first are
    shown, with a line that says so. Names in letters that Pillow's own font lacks use a font of the system, and if it has none, the class
    has its number.

    Examples:
        >>> png = ddkit.data.sheet_png(torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]), ["cat", "dog"])
        >>> png[1:4]
        b'PNG'
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
    deep = len(shown)  # rows below each other: all, or as many as make a square
    if deep * cell_h > MOST_HEIGHT:
        deep = -(-deep // max(2, round((deep * cell_h / row_w) ** 0.5)))
    deep = min(deep, -(-len(shown) // -(-WIDE // row_w)))
    across = -(-len(shown) // deep)
    while across * row_w < WIDE:
        scale += 1
        cell_h, cell_w = height * scale + 4, width * scale + 4
        row_w = margin + most * cell_w
    footer = 24 if len(shown) < len(rows) else 0
    sheet = Image.new("RGB", (across * row_w, min(deep, len(shown)) * cell_h + footer), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = eight_bits(images)
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


def power(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (frequency, power) of every Fourier coefficient of images (n, C, H, W), floats or uint8: two tensors (H, W // 2 + 1).

    Frequencies are radial, in cycles per pixel, 0 to 0.71. The power is averaged over images and channels, after each
    channel's mean was taken off; coefficients that stand for a mirrored one too count twice.
    """
    height, width = images.shape[-2:]
    found = torch.zeros(height, width // 2 + 1, dtype=torch.float64)
    for part in blocks(images, max(1, MOST_VALUES // max(1, images[:1].numel()))):
        x = to_unit(part).double()
        size = torch.fft.rfft2(x - x.mean((-2, -1), keepdim=True)).abs()
        found = found + len(part) / max(1, len(images)) * size.square().flatten(0, 1).mean(0)
    across = torch.fft.rfftfreq(width, dtype=torch.float64)
    twice = 2.0 - ((across == 0) | (across == 0.5)).double()
    frequency = (torch.fft.fftfreq(height, dtype=torch.float64)[:, None].square() + across.square()).sqrt()
    return frequency, found * twice


def radial_spectrum(images: Tensor, bins: int = 16) -> tuple[list[float], list[float]]:
    """Returns (frequencies, shares): the middle of `bins` equal bands from 0 to 0.5 cycles per pixel, and each band's share.

    `images` are (n, C, H, W), uint8 or floats.
    Shares are of the power without the mean; frequencies above 0.5 (diagonals) count to the last band. Shares are 0 for
    images without contrast. Raises InputError for images of one pixel.

    Examples:
        >>> frequencies, shares = ddkit.data.radial_spectrum(torch.rand(5, 3, 32, 32), bins=4)
        >>> frequencies, round(sum(shares), 6)
        ([0.0625, 0.1875, 0.3125, 0.4375], 1.0)
    """
    frequency, found = power(images)
    if frequency.numel() < 2:
        raise InputError("A spectrum needs images larger than one pixel.")
    band = (frequency * 2 * bins).long().clamp_max(bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, band.flatten(), found.flatten())
    total = float(sums.sum())
    shares = [float(value) / total if total > 0 else 0.0 for value in sums]
    return [(index + 0.5) / (2 * bins) for index in range(bins)], shares


def high_frequency_share(images: Tensor) -> float:
    """Returns the share of the power of images (n, C, H, W), without the mean's, at more than 0.25 cycles per pixel: 0 to 1.

    Examples:
        >>> board = (torch.arange(8)[:, None] + torch.arange(8)) % 2  # black, white, black, ...
        >>> round(ddkit.data.high_frequency_share(board[None, None].float()), 3)
        1.0
    """
    frequency, found = power(images)
    total = float(found.sum())
    return float(found[frequency > HIGH].sum()) / total if total > 0 else 0.0
