"""Images of a set as pictures inside a page: PNG in data URIs, enlarged by whole pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from torch import Tensor

GAP = 2  # transparent pixels between two images
NARROW = 368  # pixels across that a page of 400 has
LARGE = 112  # pixels of the longer side to which an image is reduced at most
MOST_ACROSS = 5


def sides(images: Tensor, cell: int) -> tuple[int, int]:
    """Returns (height, width) of images (..., H, W) in the report: whole multiples, the longer side at most `cell`.

    Larger ones than `cell` are left as they are up to LARGE pixels, and above reduced to that.
    """
    height, width = images.shape[-2:]
    longer = max(height, width)
    if longer > max(cell, LARGE):
        return max(1, round(height * LARGE / longer)), max(1, round(width * LARGE / longer))
    scale = max(1, cell // longer)
    return height * scale, width * scale


def pictures(layers: Sequence[Tensor], alt: str, *, cell: int) -> str:
    """Returns <img>s of layers above each other, each (n, C, H, W) uint8 with n images beside each other; `alt` is escaped text.

    Each <img> has so many of the n images that it fits a narrow page.
    """
    across = max(1, min(MOST_ACROSS, (NARROW + GAP) // (sides(layers[0], cell)[1] + GAP)))
    parts = list(zip(*(layer.split(across) for layer in layers), strict=True))
    told = [alt if len(parts) == 1 else f"{alt}, part {number} of {len(parts)}" for number in range(1, len(parts) + 1)]
    return "".join(picture(part, words, cell=cell) for part, words in zip(parts, told, strict=True))


def picture(rows: Sequence[Tensor], alt: str, *, cell: int) -> str:
    """Returns an <img> of rows of images, each (n, C, H, W) uint8; `alt` is escaped text that says what is seen."""
    canvas = _canvas(rows, *sides(rows[0], cell))
    height, width = canvas.shape[:2]
    return f'<img src="{_data_uri(canvas)}" width="{width}" height="{height}" alt="{alt}">'


def _canvas(rows: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Returns the rows as one picture (H, W, 4), red, green, blue and opacity, of images height x width with transparent gaps."""
    most = max(len(row) for row in rows)
    canvas = torch.zeros((len(rows) * (height + GAP) - GAP, most * (width + GAP) - GAP, 4), dtype=torch.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(_sized(_colours(row), height, width)):
            top, left = y * (height + GAP), x * (width + GAP)
            canvas[top : top + height, left : left + width, :3] = image.permute(1, 2, 0)
            canvas[top : top + height, left : left + width, 3] = 255
    return canvas


def _sized(images: Tensor, height: int, width: int) -> Tensor:
    """Returns images (n, 3, height, width): pixels repeated, or averaged where they are to be smaller."""
    if height < images.shape[2] or width < images.shape[3]:
        small = torch.nn.functional.interpolate(images.float(), (height, width), mode="area")
        return small.round().to(torch.uint8)
    scale = height // images.shape[2]
    return images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def _colours(images: Tensor) -> Tensor:
    """Returns images (n, 3, H, W): as they are, or grey, the mean where there are neither 1 nor 3 channels."""
    if images.shape[1] == 3:
        return images
    grey = images if images.shape[1] == 1 else images.float().mean(1, keepdim=True).round().to(torch.uint8)
    return grey.expand(-1, 3, -1, -1)


def _data_uri(canvas: Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(canvas.numpy(), "RGBA").save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
