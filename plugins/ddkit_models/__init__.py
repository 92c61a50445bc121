"""Classifiers: `convnet`, the field's standard network, and `mlp`; the others have modules of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

import ddkit
from ddkit_models.layers import Classifier, norm_layer

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid,
}


class ConvNetModule(Classifier):
    """`features` (blocks of 3x3 convolution, normalisation, activation, 2x2 pooling) and a linear `classifier`.

    Parameter names are those of the public DatasetCondensation code, so its state dicts load.
    """

    def __init__(self, channels: int, size: tuple[int, int], classes: int, model: ConvNet) -> None:
        height, width = size
        depth = model.depth or depth_for(size)
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = model.one_channel_padding if block == 0 and channels == 1 else 1
            height, width = height + 2 * padding - 2, width + 2 * padding - 2
            layers += _block(channels if block == 0 else model.width, model, padding, (height, width))
            if model.pooling != "none":
                height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise ddkit.InputError(
                f"convnet: images of {size[0]} x {size[1]} pixels are too small for {depth} poolings; use a smaller depth, or pooling none."
            )
        super().__init__(nn.Sequential(*layers), model.width * height * width, classes)


def _block(channels: int, model: ConvNet, padding: int, size: tuple[int, int]) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, model.width, kernel_size=3, padding=padding)]
    layers += norm_layer(model.norm, model.width, size, model="convnet")
    layers.append(ACTIVATIONS[model.activation]())
    if model.pooling != "none":
        layers.append(nn.AvgPool2d(2) if model.pooling == "avg" else nn.MaxPool2d(2))
    return layers


def depth_for(size: tuple[int, int]) -> int:
    """Returns the depth for an image size: 3 for 28 and 32 pixels, 4 for 64, 2 for 8 and 16; the shorter side decides."""
    side = min(size)
    return max(1, min(max(2, round(math.log2(side / 4))), int(math.log2(side))))


class ConvNet(ddkit.Model):
    """Convolutional network of the distillation literature: 3 blocks of 128 channels for 32x32 images."""

    depth: int | None = ddkit.option(None, "blocks; left out: from the image size", ge=1, le=10)
    width: int = ddkit.option(128, "channels of each block", ge=1)
    norm: Literal["instance", "batch", "group", "layer", "none"] = ddkit.option(
        "instance", "normalisation; group: four groups of channels; layer: all values of an image"
    )
    activation: Literal["relu", "leaky-relu", "sigmoid"] = ddkit.option("relu")
    pooling: Literal["avg", "max", "none"] = ddkit.option("avg", "2x2 pooling of each block")
    one_channel_padding: int = ddkit.option(1, "padding of the first convolution for one-channel images; the public code has 3", ge=1, le=3)

    @classmethod
    def resolve(cls, options: Any, data: ddkit.DataInfo) -> Mapping[str, Any]:
        return {"depth": options.depth or depth_for(data.size)}

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        return ConvNetModule(channels, size, classes, self)


class MlpModule(Classifier):
    """`features` (hidden layers with ReLU) and a linear `classifier`."""

    def __init__(self, inputs: int, classes: int, width: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for layer in range(depth):
            layers += [nn.Linear(inputs if layer == 0 else width, width), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), width, classes)


class Mlp(ddkit.Model):
    """Multilayer perceptron: hidden layers of equal width with ReLU."""

    width: int = ddkit.option(128, "units of each hidden layer", ge=1)
    depth: int = ddkit.option(2, "hidden layers", ge=1)

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        return MlpModule(channels * size[0] * size[1], classes, self.width, self.depth)
