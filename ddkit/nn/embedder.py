"""Features of images in a network, as losses match them: plain, or compiled with the same code for every image."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ddkit.errors import RunFailed
from ddkit.nn.compiling import Arithmetic, compiled, is_compiled


def embed(module: nn.Module, x: Tensor) -> Tensor:
    """Returns features (n, d): `module.embed(x)` flattened where there is one, else the input of its last linear layer."""
    if hasattr(module, "embed"):
        return module.embed(x).flatten(1)  # type: ignore[operator]
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise RunFailed(f"The model {type(module).__name__} has neither an embed method nor a linear layer to embed with.")
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = linear[-1].register_forward_pre_hook(keep)
    try:
        module(x)
    finally:
        handle.remove()
    return seen[-1].flatten(1)


def features_of(module: nn.Module, images: Tensor) -> Tensor:
    """Returns features (n, d) on the CPU, without gradients, of normalised images (n, C, H, W) on any device."""
    device = next(module.parameters(), images).device
    with torch.no_grad():
        return torch.cat([embed(module, part.to(device)).cpu() for part in images.split(256)])


class Embedder:
    """Embeds images with `module` in blocks of at most `block` (0: all at once), differentiably where the images ask for it.

    Real images, whose features need no gradient, and synthetic ones go through the same code in blocks of one kind, so
    that equal images have equal features, bit for bit, also in bfloat16: a set that matches its real images stays there.
    Blocks also keep the intermediate values in the processor's cache, and bound the memory of images without gradient.
    """

    def __init__(self, module: nn.Module, arithmetic: Arithmetic, *, block: int = 0) -> None:
        self.module = module
        self.arithmetic = arithmetic
        self.block = block
        self.layout = torch.channels_last if arithmetic.compile else torch.contiguous_format
        module.to(memory_format=self.layout)
        self._forward = compiled(_Features(module), wanted=arithmetic.compile, graphs=arithmetic.graphs)

    @property
    def compiled(self) -> bool:
        """Whether compiled code runs."""
        return is_compiled(self._forward)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns float32 features (n, d) of normalised images x (n, C, H, W); float64 where network and images are."""
        count = -(-len(x) // self.block) if self.block else 1  # the fewest parts, of nearly equal length
        differentiable = torch.is_grad_enabled() and x.requires_grad
        parts = []
        for part in x.tensor_split(count) if count > 1 else (x,):
            if differentiable:
                parts.append(self._features(part))
            elif self.arithmetic.compile:
                with torch.enable_grad():  # the code that is compiled for images with gradients, not another
                    parts.append(self._features(part.detach().requires_grad_()).detach())
            else:
                with torch.no_grad():
                    parts.append(self._features(part))
        return torch.cat(parts) if count > 1 else parts[0]

    def _features(self, x: Tensor) -> Tensor:
        reduced = self.arithmetic.dtype == torch.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16) if reduced else nullcontext():
            if self.arithmetic.compile:
                rows = len(x)
                x = x.expand(2, -1, -1, -1) if rows == 1 else x  # torch would compile anew for one row
                x = x.contiguous(memory_format=self.layout)
                torch._dynamo.maybe_mark_dynamic(x, 0)
                features = self._forward(x)[:rows]
            else:  # running statistics that the pass updates are copies, so no loss or step depends on another's pass
                buffers = {f"network.{name}": value.clone() for name, value in self.module.named_buffers()}
                features = torch.func.functional_call(_Features(self.module), buffers, (x,)) if buffers else embed(self.module, x)
        features = features if features.dtype == torch.float64 else features.float()
        return features.clone() if self.arithmetic.graphs else features  # a graph's next replay overwrites its output


class _Features(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return embed(self.network, x)
