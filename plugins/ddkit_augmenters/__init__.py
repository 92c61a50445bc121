"""Differentiable augmentations: `none`, `dsa` (siamese augmentation) and `dsv` (that of deep support vectors)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

import ddkit
from ddkit_augmenters import operations

Operation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
WARP = "the backward pass of bilinear sampling"  # adds up by atomic operations on a GPU


class Identity(ddkit.Augmenter):
    """No augmentation."""

    rowwise = True

    def sample(self, generator: torch.Generator, groups: int) -> dict[str, Tensor]:
        return {}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return x


class SiameseAugmentation(ddkit.Augmenter):
    """Differentiable siamese augmentation: one of six operations per class and step, with the published strengths.

    With `compose` several operations are applied. Many operations make small images ambiguous, so "auto" is 2 for images of
    8 pixels, and all six for images of at least 24 pixels.

    Source: Zhao and Bilen, Dataset Condensation with Differentiable Siamese Augmentation, ICML 2021, arXiv 2102.08259,
    Section 3.
    """

    rowwise = True

    operations: tuple[Operation, ...] = ddkit.option(
        ("color", "crop", "cutout", "flip", "scale", "rotate"), "operations to choose from, separated by underscores", min_length=1
    )
    always: tuple[Operation, ...] = ddkit.option((), "operations that are always applied, before the chosen ones")
    compose: int | Literal["auto"] = ddkit.option(
        1, "number of different operations that are applied, or auto for one per 4 pixels of the image's side", ge=1
    )
    flip: bool | None = ddkit.option(None, "whether flip is allowed; if left out, as the dataset declares (not for digits)")
    brightness: float = ddkit.option(1.0, "width of the uniform brightness shift", ge=0)
    saturation: float = ddkit.option(2.0, "largest factor", ge=0)
    contrast: float = ddkit.option(0.5, "smallest factor, the largest is 1 higher", ge=0)
    crop: float = ddkit.option(0.125, "largest shift, as a fraction of the side", ge=0, le=1)
    cutout: float = ddkit.option(0.5, "side of the square, as a fraction of the image's side", ge=0, le=1)
    flip_probability: float = ddkit.option(0.5, ge=0, le=1)
    scale: float = ddkit.option(1.2, "largest factor of each axis, the smallest is its inverse", ge=1)
    rotate: float = ddkit.option(15.0, "largest angle in degrees", ge=0, le=180)

    @classmethod
    def resolve(cls, options: Any, data: ddkit.DataInfo) -> Mapping[str, Any]:
        return {
            "flip": data.mirror if options.flip is None else options.flip,
            "compose": max(1, min(min(data.size) // 4, len(operations.FUNCTIONS))) if options.compose == "auto" else options.compose,
        }

    @property
    def strategy(self) -> list[str]:
        """The operations in use, in order."""
        allowed = [name for name in (*self.always, *self.operations) if name != "flip" or self.flip is not False]
        return list(dict.fromkeys(allowed))

    def nondeterministic(self, device: str) -> str:
        warps = [name for name in self.strategy if name in operations.WARPS]
        return f"{WARP} ({', '.join(warps)})" if device == "cuda" and warps else ""

    def sample(self, generator: torch.Generator, groups: int) -> dict[str, Tensor]:
        """Returns `chosen` (groups, operations) bool, and uniform numbers (groups, k) for each operation."""
        names = self.strategy
        order = torch.rand(groups, len(names), generator=generator)
        always = [column for column, name in enumerate(names) if name in self.always]
        order[:, always] -= 1  # they come first
        drawn = {name: torch.rand(groups, operations.NUMBERS[name], generator=generator) for name in names}
        compose = len(names) if self.compose == "auto" else self.compose  # without data all are applied
        return {"chosen": order.argsort(1).argsort(1) < compose + len(always), **drawn}

    def sample_batch(self, generator: torch.Generator, rows: int) -> dict[str, Tensor]:
        """Returns the parameters of a training batch: the same operations for all, numbers per image."""
        drawn = self.sample(generator, rows)
        return drawn | {"chosen": drawn["chosen"][:1].expand(rows, -1)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        chosen = parameters["chosen"].cpu()
        if len(x) and bool((chosen.sum(1) == 1).all()):
            return self._apply_one_each(x, chosen.int().argmax(1), parameters)
        for column, name in enumerate(self.strategy):
            rows = chosen[:, column].nonzero().flatten()
            if len(rows) == len(x):
                x = self._operation(name, x, parameters[name])
            elif len(rows):
                x = x.index_copy(0, ddkit.nn.to_device(rows, x.device), self._on_rows(rows, name, x, parameters[name]))
        return x

    def _apply_one_each(self, x: Tensor, column: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns x with operation `column[i]` on row i: the rows are sorted by operation, and each operation is done once."""
        order = column.argsort(stable=True)
        counts = torch.bincount(column, minlength=len(self.strategy)).tolist()
        parts = []
        for name, rows in zip(self.strategy, order.split(counts), strict=True):
            if len(rows) == len(x):
                return self._operation(name, x, parameters[name])
            if len(rows):
                parts.append(self._on_rows(rows, name, x, parameters[name]))
        return torch.cat(parts)[ddkit.nn.to_device(order.argsort(), x.device)]

    def _on_rows(self, rows: Tensor, name: str, x: Tensor, numbers: Tensor) -> Tensor:
        """Returns rows of x (rows on the CPU) under operation `name`."""
        return self._operation(name, x[ddkit.nn.to_device(rows, x.device)], numbers[rows.to(numbers.device)])

    def _operation(self, name: str, x: Tensor, numbers: Tensor) -> Tensor:
        return operations.FUNCTIONS[name](x, ddkit.nn.to_device(numbers, x.device), self)


class SupportVectorAugmentation(ddkit.Augmenter):
    """Translation, zoomed crop and flip together: the augmentation under which deep support vectors must stay valid.

    The input noise of 0.01 is a setting of the view (`[views.NAME] noise = 0.01`).
    Source: Lee et al., Deep Support Vectors, arXiv 2403.17329, implementation details; the order and the reading of
    "crop 0.2" (up to a fifth of each side is cut away, the rest enlarged) are ddkit's.
    """

    rowwise = True

    translation: float = ddkit.option(0.125, "largest shift, as a fraction of the side", ge=0, le=1)
    crop: float = ddkit.option(0.2, "largest fraction of each side that is cut away", ge=0, lt=1)
    flip_probability: float = ddkit.option(0.5, ge=0, le=1)
    flip: bool | None = ddkit.option(None, "whether flip is allowed; if left out, as the dataset declares")

    @classmethod
    def resolve(cls, options: Any, data: ddkit.DataInfo) -> Mapping[str, Any]:
        return {"flip": data.mirror if options.flip is None else options.flip}

    def nondeterministic(self, device: str) -> str:
        return WARP if device == "cuda" else ""

    def sample(self, generator: torch.Generator, groups: int) -> dict[str, Tensor]:
        return {"numbers": torch.rand(groups, 6, generator=generator)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        numbers = ddkit.nn.to_device(parameters["numbers"], x.device).to(x.dtype)
        kept = 1 - self.crop * numbers[:, 0]
        room = 1 - kept
        centre_x = room * (2 * numbers[:, 1] - 1) + 2 * self.translation * (2 * numbers[:, 3] - 1)
        centre_y = room * (2 * numbers[:, 2] - 1) + 2 * self.translation * (2 * numbers[:, 4] - 1)
        mirrored = (numbers[:, 5] < self.flip_probability) & (self.flip is not False)
        side = torch.where(mirrored, -kept, kept)
        zero = torch.zeros_like(kept)
        return operations.warp(x, [side, zero, centre_x], [zero, kept, centre_y])
