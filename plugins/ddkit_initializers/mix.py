"""`mix`: several shrunken real images in one picture."""

from __future__ import annotations

import torch
from torch import Tensor

import ddkit
from ddkit_initializers import classes


class Mix(ddkit.Initializer):
    """Grids of factor x factor reduced real images of the class in each picture.

    The grid of IDC (Kim et al., arXiv 2205.14959) as plain pixels, so networks are trained on the whole picture. If the class
    has enough images, none is used twice; else each picture is a new draw.
    """

    requires = ddkit.Requires(real=True)

    factor: int = ddkit.option(2, "number of images along each side of a picture", ge=1)

    def needed(self, ipc: int) -> int:
        return self.factor**2

    @property
    def remedy(self) -> str:
        return "lower initializer.factor (--set), use --init noise, or --set initializer.reuse=true"

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        factor, size = self.factor, start.shape[1:]
        if min(size) < factor:
            raise ddkit.InputError(
                f"initializer.factor = {factor}: images of {size[0]} x {size[1]} pixels are too small for {factor} in a row. Use a "
                "smaller factor.",
                "initializer.factor",
            )
        pictures, cells = [], factor**2
        for each in classes(start):
            available, draws = len(each.rows), start.generator(each.label)
            order = torch.randperm(available, generator=draws)
            for number in range(each.ipc):
                if each.ipc * cells <= available:
                    chosen = order[number * cells : (number + 1) * cells]
                else:
                    chosen = torch.randperm(available, generator=draws)[:cells]
                pictures.append(ddkit.data.grid(each.take(chosen), factor))
        return torch.stack(pictures)
