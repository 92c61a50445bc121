"""Models as a user has them: functions of a module. For `python:tests.factories.NAME`."""

from __future__ import annotations

from torch import nn


def small(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """A convolution, a pooling and a linear layer."""
    height, width = size
    pooled = (height // 2) * (width // 2)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * pooled, classes))


def tiny(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """One linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))


def with_dropout(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels * size[0] * size[1], classes))


def no_module(channels: int, size: tuple[int, int], classes: int) -> int:
    return 0


def convolution_last(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Ends in a convolution: no linear layer, no method embed."""
    return nn.Sequential(nn.Conv2d(channels, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


not_callable = 3
