"""What the networks share: a linear classifier on features, normalisation by name, how many halvings an image size allows."""

from __future__ import annotations

import math

from torch import Tensor, nn

import ddkit

GROUPS = 4  # of norm = group, as in the public DatasetCondensation code


class Classifier(nn.Module):
    """`features`, whose output is flattened, and a linear `classifier`."""

    def __init__(self, features: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Returns the input (n, width) of the classifier."""
        result: Tensor = self.features(x).flatten(1)
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.embed(x))
        return result


def norm_layer(norm: str, channels: int, size: tuple[int, int], *, model: str) -> list[nn.Module]:
    """Returns the normalisation of maps (channels, *size) as a list of no layer or one.

    instance: each channel of each image; batch: each channel over the batch; group: GROUPS groups of channels of each image;
    layer: all values of each image, with a scale and a shift for each value; none. Raises InputError where `channels` cannot be
    grouped.
    """
    if norm == "instance":
        return [nn.GroupNorm(channels, channels)]
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if norm == "group":
        if channels % GROUPS:
            raise ddkit.InputError(f"{model}: norm = group needs a width that is a multiple of {GROUPS}, not {channels}.")
        return [nn.GroupNorm(GROUPS, channels)]
    return [nn.LayerNorm([channels, *size])] if norm == "layer" else []


def halvings(size: tuple[int, int], most: int, *, least: int = 1) -> int:
    """Returns how often a map of `size` can be halved before its shorter side is below `least` pixels, at most `most` times.

    >>> halvings((32, 32), 5), halvings((28, 28), 5), halvings((8, 8), 5), halvings((8, 8), 3, least=2)
    (5, 4, 3, 2)
    """
    return min(most, max(0, int(math.log2(max(1, min(size) // least)))))
