"""Models as a user has them: functions of a module. For `python:tests.factories.NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def small(channels: int, size: tuple[int, int], classes: int) -> nn.Sequential:
    """A convolution, a pooling and a linear layer."""
    height, width = size
    pooled = (height // 2) * (width // 2)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * pooled, classes))


def with_dropout(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels * size[0] * size[1], classes))


def no_module(channels: int, size: tuple[int, int], classes: int) -> int:
    return 0


def convolution_last(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Ends in a convolution: no linear layer, no method embed."""
    return nn.Sequential(nn.Conv2d(channels, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


not_callable = 3


def attentive(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """A vision transformer of one block of torch's own attention, whose fused kernels have no second derivative."""
    from torchvision.models import VisionTransformer

    module = VisionTransformer(size[0], patch_size=size[0] // 2, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=classes)
    module.conv_proj = nn.Conv2d(channels, 8, size[0] // 2, size[0] // 2)
    return module


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()


class Custom(nn.Module):
    """A ReLU with a backward pass of its own."""

    def __init__(self, backward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function: Any = type("Relu", (_Relu,), {"backward": staticmethod(backward)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x)
        return result


def _with(backward: Callable[[Any, Tensor], Tensor], *given: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given[0], 4, 3, padding=1), Custom(backward), *small(*given)[2:])


def once(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Its backward pass says that it cannot be differentiated."""
    backward = torch.autograd.function.once_differentiable(lambda ctx, gradient: gradient * (ctx.saved_tensors[0] > 0))
    return _with(backward, channels, size, classes)


def silent(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Its backward pass is computed where torch does not see it."""
    return _with(lambda ctx, gradient: gradient.detach() * (ctx.saved_tensors[0] > 0), channels, size, classes)


def twice(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Its backward pass is in torch's graph, as a straight-through estimator's is too."""
    return _with(lambda ctx, gradient: gradient * (ctx.saved_tensors[0] > 0), channels, size, classes)
