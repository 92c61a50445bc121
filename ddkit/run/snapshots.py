"""The film of a run: a few of its images at a few of its steps, in eight bits, kept as it goes for its report.

A blend has no steps: its film holds its two sets instead, as steps 0 and 1, in the order of the blend's own images.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddkit.data.pictures import eight_bits
from ddkit.files import read_tensors, write_tensors
from ddkit.run.manifest import FILM

log = logging.getLogger("ddkit")
MOST_IMAGES, MOST_BYTES = 100, 2**20  # of a frame


class Film(NamedTuple):
    """`steps` (k,) int64 ascending: updates done; `rows` (m,) int64: of the set; `images` (k, m, C, H, W) uint8, clipped to 0..1."""

    steps: Tensor
    rows: Tensor
    images: Tensor


def is_frame(step: int) -> bool:
    """Whether a picture is kept after `step` updates: at 0 and at powers of 4, whatever the number of steps, which a run may prolong."""
    return step == 0 or (step.bit_count() == 1 and step.bit_length() % 2 == 1)


def film_rows(labels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Returns the rows (m,) that are kept: the first of each class, equally many, of the first classes where there are very many."""
    most = max(1, min(MOST_IMAGES, MOST_BYTES // (shape[0] * shape[1] * shape[2])))
    classes = labels.unique()[:most]
    each = max(1, most // len(classes))
    return torch.cat([(labels == label).nonzero().flatten()[:each] for label in classes])


def read_film(folder: Path) -> Film | None:
    """Returns the film of the run in `folder`, None where it has none; raises ValueError where it cannot be read."""
    file = folder / FILM
    if not file.is_file():
        return None
    tensors, _ = read_tensors(file)
    try:
        film = Film(tensors["steps"], tensors["rows"], tensors["images"])
    except KeyError as error:
        raise ValueError(f"{file} is not a film of a run: it has no tensor {error}") from None
    for name, values in (("steps", film.steps), ("rows", film.rows)):
        if values.ndim != 1 or values.dtype != torch.int64 or bool((values < 0).any()):
            raise ValueError(f"{file} is not a film of a run: {name} are {values.dtype} {tuple(values.shape)}, or negative")
    if len(film.steps) == 0 or bool((film.steps.diff() <= 0).any()):
        raise ValueError(f"{file} is not a film of a run: its steps are not ascending")
    if film.images.ndim != 5 or film.images.dtype != torch.uint8 or film.images.shape[:2] != (len(film.steps), len(film.rows)):
        raise ValueError(f"{file} is not a film of a run: its images have the shape {tuple(film.images.shape)}")
    return film


def add_frame(folder: Path, step: int, images: Tensor, labels: Tensor) -> None:
    """Adds the frame of `step`, of images (n, C, H, W) in pixel units, and drops those of later steps; the frame of step 0 begins a film.

    A run that was cut off has seen later steps before.
    """
    channels, height, width = images.shape[1:]
    rows = film_rows(labels, (channels, height, width))
    film = Film(torch.tensor([step]), rows, eight_bits(images[rows])[None])
    try:
        before = read_film(folder) if step else None
    except ValueError as error:
        log.warning("The report of %s will have no frames of earlier steps: %s.", folder, error)
        before = None
    if before is not None and torch.equal(before.rows, rows) and before.images.shape[2:] == film.images.shape[2:]:
        kept = before.steps < step
        film = Film(torch.cat([before.steps[kept], film.steps]), rows, torch.cat([before.images[kept], film.images]))
    write_tensors(folder / FILM, film._asdict(), {"content": "film"})
