"""Images of a set as pictures inside a page: PNG in data URIs, enlarged by whole pixels."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

CELL = 64  # pixels of the longer side of an image, at least
GAP = 2  # transparent pixels between two images


def scale_of(images: Tensor, cell: int = CELL) -> int:
    """Returns by how much images (..., H, W) are enlarged: the longer side has about `cell` pixels then."""
    return max(1, round(cell / max(images.shape[-2:])))


def picture(rows: list[Tensor], alt: str, *, cell: int = CELL) -> str:
    """Returns an <img> of rows of images, each (n, C, H, W) uint8; `alt` is escaped text that says what is seen."""
    scale = scale_of(rows[0], cell)
    canvas = _canvas(rows, scale)
    height, width = canvas.shape[:2]
    return f'<img src="{_data_uri(canvas)}" width="{width}" height="{height}" alt="{alt}">'


def _canvas(rows: list[Tensor], scale: int) -> Tensor:
    """Returns the rows as one picture (H, W, 4), red, green, blue and opacity, with transparent gaps."""
    height, width = (side * scale for side in rows[0].shape[-2:])
    most = max(len(row) for row in rows)
    canvas = torch.zeros((len(rows) * (height + GAP) - GAP, most * (width + GAP) - GAP, 4), dtype=torch.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(_colours(row)):
            large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0)
            top, left = y * (height + GAP), x * (width + GAP)
            canvas[top : top + height, left : left + width, :3] = large
            canvas[top : top + height, left : left + width, 3] = 255
    return canvas


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
