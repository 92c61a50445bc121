"""Classifiers: `convnet`, the field's standard network, and `mlp`, with what the others share, which have modules of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

import ddkit

DEEPEST = 10  # blocks of a ConvNet
GROUPS = 4  # of norm = group, as in the public DatasetCondensation code
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid,
}


class Classifier(nn.Module):
    """`features`, whose output is flattened, and a linear `classifier`."""

    def __init__(self, features: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Returns the input (n, width) of the classifier."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


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
            raise ddkit.InputError(f"{model}: norm = group needs a number of channels that is a multiple of {GROUPS}, not {channels}.")
        return [nn.GroupNorm(GROUPS, channels)]
    return [nn.LayerNorm([channels, *size])] if norm == "layer" else []


def halvings(size: tuple[int, int], most: int, *, least: int = 1) -> int:
    """Returns how often a map of `size` can be halved before its shorter side is below `least` pixels, at most `most` times.

    >>> halvings((32, 32), 5), halvings((28, 28), 5), halvings((8, 8), 5), halvings((8, 8), 3, least=2)
    (5, 4, 3, 2)
    """
    return min(most, max(0, int(math.log2(max(1, min(size) // least)))))


def depth_for(size: tuple[int, int]) -> int:
    """Returns the depth for an image size: 3 for 28 and 32 pixels, 4 for 64, 2 for 8 and 16; the shorter side decides."""
    side = min(size)
    return max(1, min(max(2, round(math.log2(side / 4))), int(math.log2(side)), DEEPEST))


class ConvNet(ddkit.Model):
    """The usual convolutional network of the distillation literature: 3 blocks of 128 channels for 32x32 images.

    A block has a 3x3 convolution, normalisation, activation and 2x2 pooling. Parameters have the names of the public DatasetCondensation
    code, so its state dicts can be loaded.
    """

    depth: int | None = ddkit.option(None, "number of blocks; if left out, it depends on the image size", ge=1, le=DEEPEST)
    width: int = ddkit.option(128, "number of channels of each block", ge=1)
    norm: Literal["instance", "batch", "group", "layer", "none"] = ddkit.option(
        "instance", "normalisation; group has four groups of channels, and layer all values of an image"
    )
    activation: Literal["relu", "leaky-relu", "sigmoid"] = ddkit.option("relu")
    pooling: Literal["avg", "max", "none"] = ddkit.option("avg", "2x2 pooling of each block")
    one_channel_padding: int = ddkit.option(1, "padding of the first convolution for one-channel images (3 in the public code)", ge=1, le=3)

    @classmethod
    def resolve(cls, options: Any, data: ddkit.DataInfo) -> Mapping[str, Any]:
        return {"depth": options.depth or depth_for(data.size)}

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        height, width = size
        depth = self.depth or depth_for(size)
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = self.one_channel_padding if block == 0 and channels == 1 else 1
            height, width = height + 2 * padding - 2, width + 2 * padding - 2
            layers.append(nn.Conv2d(channels if block == 0 else self.width, self.width, kernel_size=3, padding=padding))
            layers += norm_layer(self.norm, self.width, (height, width), model="convnet")
            layers.append(ACTIVATIONS[self.activation]())
            if self.pooling != "none":
                layers.append(nn.AvgPool2d(2) if self.pooling == "avg" else nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise ddkit.InputError(
                f"convnet: images of {size[0]} x {size[1]} pixels are too small for {depth} pooling{'s' if depth > 1 else ''}. Use no "
                "pooling (--set network.pooling=none, for a teacher --set teacher.pooling=none), or a smaller depth."
            )
        return Classifier(nn.Sequential(*layers), self.width * height * width, classes)


class Mlp(ddkit.Model):
    """Multilayer perceptron: hidden layers of equal width with ReLU."""

    width: int = ddkit.option(128, "number of units of each hidden layer", ge=1)
    depth: int = ddkit.option(2, "hidden layers", ge=1)

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs in [channels * size[0] * size[1], *[self.width] * (self.depth - 1)]:
            layers += [nn.Linear(inputs, self.width), nn.ReLU()]
        return Classifier(nn.Sequential(*layers), self.width, classes)
