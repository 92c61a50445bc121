"""Networks of the cross-architecture tables of the distillation literature: `lenet`, `alexnet`, `vgg11` and `resnet18`.

They are the small-image variants of Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (ICLR 2021), written from
their description. For images too small for all of their halvings the first ones are left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import ddkit
from ddkit_models import Classifier, halvings, norm_layer

Norm = Literal["instance", "batch", "none"]


class LeNet(ddkit.Model):
    """LeNet-5: two 5x5 convolutions (6 and 16 channels) with ReLU and max pooling, then linear layers of 120 and 84.

    The first convolution pads images of one channel by 2, as the original does for 28 pixels; below 28 pixels both pad by 2.
    The smallest image is 4 x 4 pixels.
    """

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        small = min(size) < 28
        paddings = (2 if small or channels == 1 else 0, 2 if small else 0)
        height, width = size
        for padding in paddings:
            height, width = (height + 2 * padding - 4) // 2, (width + 2 * padding - 4) // 2
        if min(height, width) < 1:
            raise ddkit.InputError(
                f"lenet: images of {size[0]} x {size[1]} pixels are too small. They must be at least 4 x 4. Use --model mlp."
            )
        layers: list[nn.Module] = []
        for before, after, padding in zip((channels, 6), (6, 16), paddings, strict=True):
            layers += [nn.Conv2d(before, after, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
        return Classifier(nn.Sequential(*layers), 84, classes)


Plan = list[tuple[int, int, int, bool]]  # a convolution's channels, kernel size and padding, and whether a 2x2 max pooling follows


def plain(channels: int, size: tuple[int, int], classes: int, plan: Plan, *, norm: str, model: str) -> nn.Module:
    """Returns convolutions, each with its norm and a ReLU, and one linear layer; only the first convolution may change the map's size."""
    _, kernel, padding, _ = plan[0]
    map_size = (size[0] + 2 * padding - kernel + 1, size[1] + 2 * padding - kernel + 1)
    poolings = sum(pools for *_, pools in plan)
    left_out = poolings - halvings(map_size, poolings)
    layers: list[nn.Module] = []
    before = channels
    for after, kernel, padding, pools in plan:
        layers += [nn.Conv2d(before, after, kernel, padding=padding), *norm_layer(norm, after, map_size, model=model), nn.ReLU()]
        before = after
        if pools and left_out:
            left_out -= 1
        elif pools:
            layers.append(nn.MaxPool2d(2))
            map_size = (map_size[0] // 2, map_size[1] // 2)
    return Classifier(nn.Sequential(*layers), before * map_size[0] * map_size[1], classes)


class AlexNet(ddkit.Model):
    """AlexNet for small images: five convolutions of 128 to 256 channels, three max poolings, one linear layer, no norm."""

    one_channel_padding: int = ddkit.option(2, "padding of the first convolution for one-channel images (4 in the public code)", ge=2, le=4)

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        padding = self.one_channel_padding if channels == 1 else 2
        plan = [(128, 5, padding, True), (192, 5, 2, True), (256, 3, 1, False), (192, 3, 1, False), (192, 3, 1, True)]
        return plain(channels, size, classes, plan, norm="none", model="alexnet")


class Vgg11(ddkit.Model):
    """VGG-11 for small images: eight 3x3 convolutions of 64 to 512 channels, five max poolings, one linear layer."""

    norm: Norm = ddkit.option("instance", "normalisation")
    width: int = ddkit.option(64, "number of channels of the first convolution, the last has eight times as many", ge=1)
    one_channel_padding: int = ddkit.option(1, "padding of the first convolution for one-channel images (3 in the public code)", ge=1, le=3)

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        stages = ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, True))
        plan = [(factor * self.width, 3, 1, pools) for factor, pools in stages]
        plan[0] = (self.width, 3, self.one_channel_padding if channels == 1 else 1, True)
        return plain(channels, size, classes, plan, norm=self.norm, model="vgg11")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, before: int, after: int, stride: int, size: tuple[int, int], norm: str) -> None:
        super().__init__()
        own = lambda: nn.Sequential(*norm_layer(norm, after, size, model="resnet18"))  # noqa: E731
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = own()
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = own()
        same = stride == 1 and before == after
        self.shortcut = nn.Sequential(*([] if same else [nn.Conv2d(before, after, 1, stride, bias=False), own()]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(result)) + self.shortcut(x))


class _Mean(nn.Module):
    """Mean over all pixels: (n, C, H, W) to (n, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x, (2, 3))


class ResNet18(ddkit.Model):
    """ResNet-18 for small images: a 3x3 convolution without pooling, four stages of two blocks, mean over all pixels.

    A stage halves the map only if at least 2 x 2 pixels remain, as the normalisation of single pixels is always 0. If they would
    not, the first stages do not halve. The network of torchvision is `torchvision:resnet18`.
    """

    norm: Norm = ddkit.option("instance", "normalisation")
    width: int = ddkit.option(64, "number of channels of the first stage, the last has eight times as many", ge=1)

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        norm, width = self.norm, self.width
        left_out = 3 - halvings(size, 3, least=2)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        layers += [*norm_layer(norm, width, size, model="resnet18"), nn.ReLU()]
        before, map_size = width, size
        for stage in range(4):
            halve = stage > left_out
            if halve:
                map_size = ((map_size[0] + 1) // 2, (map_size[1] + 1) // 2)
            after = width * 2**stage
            blocks = [Block(before, after, 2 if halve else 1, map_size, norm), Block(after, after, 1, map_size, norm)]
            layers.append(nn.Sequential(*blocks))
            before = after
        return Classifier(nn.Sequential(*layers, _Mean()), before, classes)
