"""Small data that the suites of several kinds use."""

from __future__ import annotations

from torch import Tensor, randn

from ddkit.components.base import DataInfo
from ddkit.seeding import generator


def info_of(shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3) -> DataInfo:
    return DataInfo(class_names=tuple(f"class {i}" for i in range(classes)), channels=shape[0], size=shape[1:])


def noise(shape: tuple[int, ...], *purpose: str) -> Tensor:
    """Returns Gaussian noise, the same for the same purpose."""
    return randn(shape, generator=generator(0, "conformance", *purpose))
