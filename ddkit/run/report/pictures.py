"""Images of a set as pictures inside a page, PNG in data URIs, and as an animated one, enlarged by whole pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ddkit.data.pictures import WIDE

GAP = 2  # transparent pixels between two images
NARROW = 368  # pixels across that a page of 400 has
LARGE = 112  # pixels of the longer side to which an image is reduced at most
MOST_ACROSS = 5
HEAD = 36  # height of the line above an animated picture


class Picture(NamedTuple):
    """An <img>: `alt` says in plain words what is seen."""

    source: str
    width: int
    height: int
    alt: str


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


def pictures(layers: Sequence[Tensor], alt: str, *, cell: int) -> list[Picture]:
    """Returns pictures of layers above each other, each (n, C, H, W) uint8 with n images beside each other.

    Each picture has so many of the n images that it fits a narrow page.
    """
    across = max(1, min(MOST_ACROSS, (NARROW + GAP) // (sides(layers[0], cell)[1] + GAP)))
    parts = list(zip(*(layer.split(across) for layer in layers), strict=True))
    told = [alt if len(parts) == 1 else f"{alt}, part {number} of {len(parts)}" for number in range(1, len(parts) + 1)]
    return [picture(part, words, cell=cell) for part, words in zip(parts, told, strict=True)]


def picture(rows: Sequence[Tensor], alt: str, *, cell: int) -> Picture:
    """Returns a picture of rows of images, each (n, C, H, W) uint8, with transparent gaps: pixels repeated, or averaged if reduced."""
    canvas, buffer = _canvas(rows, cell), io.BytesIO()
    canvas.save(buffer, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(source, canvas.width, canvas.height, alt)


def animation(frames: Sequence[tuple[str, Tensor]], columns: int) -> bytes:
    """Returns a GIF of frames (title, images (n, C, H, W) uint8), with `columns` images beside each other; it rests at the last frame."""
    from PIL import Image, ImageDraw, ImageFont

    made = []
    for title, images in frames:
        shown = _canvas(images.split(columns), max(72, WIDE // min(columns, len(images))))
        frame = Image.new("RGB", (shown.width, shown.height + HEAD), "white")
        frame.paste(shown, (0, HEAD), shown)
        ImageDraw.Draw(frame).text((4, HEAD // 2), title, fill="black", font=ImageFont.load_default(size=20), anchor="lm")
        made.append(frame)
    buffer = io.BytesIO()
    made[0].save(buffer, format="GIF", save_all=True, append_images=made[1:], duration=[700] * (len(made) - 1) + [2500], loop=0)
    return buffer.getvalue()


def _canvas(rows: Sequence[Tensor], cell: int) -> Any:
    """Returns Pillow's image of rows of images."""
    from PIL import Image

    height, width = sides(rows[0], cell)
    across = max(len(row) for row in rows)
    canvas = Image.new("RGBA", (across * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP))
    for y, row in enumerate(rows):
        for x, image in enumerate(colours(row)):
            smaller = height < image.shape[1] or width < image.shape[2]
            tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((width, height), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
            canvas.paste(tile, (x * (width + GAP), y * (height + GAP)))
    return canvas


def colours(images: Tensor) -> Tensor:
    """Returns images (n, 3, H, W): as they are, or grey, the mean where there are neither 1 nor 3 channels."""
    if images.shape[1] == 3:
        return images
    grey = images if images.shape[1] == 1 else images.float().mean(1, keepdim=True).round().byte()
    return grey.expand(-1, 3, -1, -1)
