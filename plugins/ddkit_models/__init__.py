"""Classifiers: `convnet`, the field's standard network, and `mlp`; the others have modules of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
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

    def __init__(self, channels: int, size: tuple[int, int], classes: int, options: ConvNet.Options) -> None:
        height, width = size
        layers: list[nn.Module] = []
        for block in range(options.depth or 1):
            padding = options.one_channel_padding if block == 0 and channels == 1 else 1
            height, width = height + 2 * padding - 2, width + 2 * padding - 2
            layers += _block(channels if block == 0 else options.width, options, padding, (height, width))
            if options.pooling != "none":
                height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise ddkit.InputError(
                f"convnet: images of {size[0]} x {size[1]} pixels are too small for {options.depth} poolings; "
                "use a smaller depth, or pooling none."
            )
        super().__init__(nn.Sequential(*layers), options.width * height * width, classes)


def _block(channels: int, options: ConvNet.Options, padding: int, size: tuple[int, int]) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, options.width, kernel_size=3, padding=padding)]
    layers += norm_layer(options.norm, options.width, size, model="convnet")
    layers.append(ACTIVATIONS[options.activation]())
    if options.pooling != "none":
        layers.append(nn.AvgPool2d(2) if options.pooling == "avg" else nn.MaxPool2d(2))
    return layers


def depth_for(size: tuple[int, int]) -> int:
    """Returns the depth for an image size: 3 for 28 and 32 pixels, 4 for 64, 2 for 8 and 16; the shorter side decides."""
    side = min(size)
    return max(1, min(max(2, round(math.log2(side / 4))), int(math.log2(side))))


class ConvNet(ddkit.Model):
    """Convolutional network of the distillation literature: 3 blocks of 128 channels for 32x32 images."""

    class Options(ddkit.Options):
        depth: Annotated[int, ddkit.Option("blocks; left out: from the image size", ge=1, le=10)] | None = None
        width: Annotated[int, ddkit.Option("channels of each block", ge=1)] = 128
        norm: Annotated[
            Literal["instance", "batch", "group", "layer", "none"],
            ddkit.Option("normalisation; group: four groups of channels; layer: all values of an image"),
        ] = "instance"
        activation: Literal["relu", "leaky-relu", "sigmoid"] = "relu"
        pooling: Annotated[Literal["avg", "max", "none"], ddkit.Option("2x2 pooling of each block")] = "avg"
        one_channel_padding: Annotated[
            int,
            ddkit.Option("padding of the first convolution for one-channel images; the public code has 3", ge=1, le=3),
        ] = 1

    @classmethod
    def resolve(cls, options: Any, data: ddkit.DataInfo) -> Any:
        return msgspec.structs.replace(options, depth=options.depth or depth_for(data.size))

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        options = msgspec.structs.replace(self.options, depth=self.options.depth or depth_for(size))
        return ConvNetModule(channels, size, classes, options)


class MlpModule(Classifier):
    """`features` (hidden layers with ReLU) and a linear `classifier`."""

    def __init__(self, inputs: int, classes: int, width: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for layer in range(depth):
            layers += [nn.Linear(inputs if layer == 0 else width, width), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), width, classes)


class Mlp(ddkit.Model):
    """Multilayer perceptron: hidden layers of equal width with ReLU."""

    class Options(ddkit.Options):
        width: Annotated[int, ddkit.Option("units of each hidden layer", ge=1)] = 128
        depth: Annotated[int, ddkit.Option("hidden layers", ge=1)] = 2

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        return MlpModule(channels * size[0] * size[1], classes, self.options.width, self.options.depth)
