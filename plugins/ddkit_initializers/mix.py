"""`mix`: several shrunken real images in one picture."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

import ddkit
from ddkit_initializers import classes


class Mix(ddkit.Initializer):
    """Grids of shrunken accessible real images of the class: factor x factor in one picture.

    The grid of IDC (Kim et al., arXiv 2205.14959) as plain pixels: the picture is not cut up again when it is trained on. Where the class
    has enough images none is used twice; else each picture draws anew.
    """

    requires = ddkit.Requires(real=True)

    factor: int = ddkit.option(2, "images side by side, and one below the other", ge=1)

    def needed(self, ipc: int) -> int:
        found: int = self.factor**2
        return found

    @property
    def remedy(self) -> str:
        return "lower --set initializer.factor, or use --init noise"

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        factor, size = self.factor, start.shape[1:]
        if min(size) < factor:
            raise ddkit.InputError(
                f"initializer.factor = {factor}: images of {size[0]} x {size[1]} pixels have no room for {factor} in a row.",
                "initializer.factor",
            )
        pictures = [
            ddkit.data.grid(each.take(chosen), factor)
            for each in classes(start)
            for chosen in _drawn(len(each.rows), factor**2, each.ipc, start.generator(each.label))
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
