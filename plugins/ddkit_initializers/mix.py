"""`mix`: several shrunken real images in one picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from torch import Generator, Tensor
from torch.nn import functional

import ddkit
from ddkit_initializers.choosing import check_enough, classes


class Mix(ddkit.Initializer):
    """Grids of shrunken accessible real images of the class: factor x factor in one picture.

    The grid of IDC (Kim et al., arXiv 2205.14959) as plain pixels: the picture is not cut up again when it is trained on. Where the class
    has enough images none is used twice; else each picture draws anew.
    """

    requires = ddkit.Requires(real=True)

    class Options(ddkit.Options):
        factor: Annotated[int, ddkit.Option("images side by side, and one below the other", ge=1)] = 2

    def check(self, ipc: int, available: Mapping[str, int]) -> None:
        check_enough("mix", self.options.factor**2, ipc, available, otherwise="lower --set initializer.factor, or use --init noise")

    def __call__(self, start: ddkit.Start) -> Tensor:
        factor, size = self.options.factor, start.shape[1:]
        if min(size) < factor:
            raise ddkit.InputError(
                f"initializer.factor = {factor}: images of {size[0]} x {size[1]} pixels have no room for {factor} in a row.",
                "initializer.factor",
            )
        pictures = [
            grid(images[rows], factor)
            for label, count, images in classes(start)
            for rows in _drawn(len(images), factor**2, count, start.generator(label))
        ]
        return torch.stack(pictures)


def _drawn(available: int, each: int, count: int, generator: Generator) -> Iterator[Tensor]:
    """Yields `count` times `each` different rows: none twice where there are enough."""
    order = torch.randperm(available, generator=generator)
    for number in range(count):
        if count * each <= available:
            yield order[number * each : (number + 1) * each]
        else:
            yield torch.randperm(available, generator=generator)[:each]


def grid(images: Tensor, factor: int) -> Tensor:
    """Returns one picture (C, H, W) of factor * factor images (n, C, H, W), row by row, each resized to its cell.

    Cells differ by a pixel where a side is no multiple of `factor`. Bilinear, antialiased.
    """
    rows, columns = (torch.linspace(0, side, factor + 1).round().int().tolist() for side in images.shape[2:])
    picture = torch.empty_like(images[0])
    for number in range(factor**2):
        top, bottom = rows[number // factor], rows[number // factor + 1]
        left, right = columns[number % factor], columns[number % factor + 1]
        cell = functional.interpolate(images[number : number + 1], (bottom - top, right - left), mode="bilinear", antialias=True)
        picture[:, top:bottom, left:right] = cell[0]
    return picture
