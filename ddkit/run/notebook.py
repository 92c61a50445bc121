"""The HTML that a notebook shows for a run and for a set: small pictures and tables, every text escaped. Nothing here raises."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ddkit.data.pictures import sheet_png
from ddkit.files import read_bytes
from ddkit.run.manifest import PREVIEW
from ddkit.text import printable

MOST_BYTES = 256 * 1024  # of a picture that is shown as it is
CORNER = (640, 640)  # width and height of the part of a larger picture that is shown
MOST_CLASSES = 10  # of a set, that are shown
MOST_IMAGES = 50
SIDE = 64  # pixels of an image of a set


def written(text: object) -> str:
    """Returns a text for a page: escaped, and with control and invisible characters made visible."""
    return html.escape(printable(str(text)))


def table(rows: Mapping[str, str]) -> str:
    """Returns a table of two columns."""
    cells = "".join(f"<tr><th>{written(name)}</th><td>{written(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


def preview(run: Path) -> str:
    """Returns the picture of the run in the folder `run`, the corner of a large one, or the sentence that says why there is none."""
    from PIL import Image

    if not run.is_dir():
        place = f"The folder {run} is not there: it was moved or deleted, or the current folder is another one now. "
        return f'<p>{written(place)}If it was moved, <code>ddkit.load("NEW PLACE")</code> reads its set.</p>'
    try:
        content = read_bytes(run / PREVIEW)
        picture = Image.open(io.BytesIO(content), formats=["PNG"])
        if len(content) <= MOST_BYTES:
            picture.verify()
            return _image(content, f"Synthetic images of {run.name}")
        buffer = io.BytesIO()
        picture.crop((0, 0, min(CORNER[0], picture.width), min(CORNER[1], picture.height))).save(buffer, format="PNG")
        return _image(buffer.getvalue(), f"Some synthetic images of {run.name}", f"A corner of {PREVIEW}, which is larger.")
    except Exception as error:  # no PNG file, one that is cut off, or one that cannot be read
        return f"<p>{written(f'{run / PREVIEW} cannot be shown: {error}.')}</p>"


def sheet(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> str:
    """Returns a picture of the first images (n, C, H, W) of the first classes, in pixel units."""
    shown = labels.unique()[:MOST_CLASSES].tolist()
    each = max(1, MOST_IMAGES // len(shown))
    rows = torch.cat([(labels == label).nonzero().flatten()[:each] for label in shown])
    chosen = images[rows].float()
    size = [max(1, round(side * SIDE / max(images.shape[2:]))) for side in images.shape[2:]]
    if max(images.shape[2:]) > SIDE:
        chosen = functional.interpolate(chosen, size, mode="bilinear", antialias=True)
    what = f"{len(rows):,} of {len(images):,} images." if len(rows) < len(images) else ""
    return _image(sheet_png(chosen, labels[rows], class_names, columns=each), "Synthetic images, a row for each class", what)


def _image(png: bytes, alt: str, caption: str = "") -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img style="max-width:100%" alt="{written(alt)}" src="{source}">' + (f"<p>{written(caption)}</p>" if caption else "")
