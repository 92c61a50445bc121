"""Features of images in a network, as losses match them: plain, or compiled with the same code for every image."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ddkit.errors import InputError, RunFailed
from ddkit.nn.compiling import Arithmetic, compiled, is_compiled
from ddkit.text import suggestion


def embed(module: nn.Module, x: Tensor) -> Tensor:
    """Returns features (n, d): `module.embed(x)` flattened where there is one, else the input of its last linear layer."""
    if hasattr(module, "embed"):
        return module.embed(x).flatten(1)  # type: ignore[operator]
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise RunFailed(f"The model {type(module).__name__} has no features: it has neither a method embed nor a linear layer.")
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = linear[-1].register_forward_pre_hook(keep)
    try:
        module(x)
    finally:
        handle.remove()
    return seen[-1].flatten(1)


def layer_features(
    module: nn.Module,
    x: Tensor,
    layers: str | type[nn.Module] | tuple[type[nn.Module], ...],
    *,
    inputs: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Returns the outputs (`inputs`: the first inputs) of the `layers` of `module` on x (n, C, H, W), by name and in order of use.

    `layers` is a class of layers or several, or a pattern of their names such as `features.*` (`*`, `?`, `[...]`). A layer that is used k
    times is `NAME`, `NAME:2`, ..., `NAME:k`. `weights` are used in the place of the module's own parameters and buffers, by name. The
    module's running statistics stay as they are. Differentiable by x and `weights`. Raises InputError if there is no such layer.

    Examples:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> found = ddkit.nn.layer_features(network, torch.ones(5, 2), torch.nn.ReLU)
        >>> {name: tuple(value.shape) for name, value in found.items()}
        {'1': (5, 3), '3': (5, 2)}
    """
    named = dict(module.named_modules())
    if isinstance(layers, str):
        chosen = {name: each for name, each in named.items() if fnmatchcase(name, layers)}
        missing = f"named {layers}. {suggestion(layers, named)}"
    else:
        chosen = {name: each for name, each in named.items() if isinstance(each, layers)}
        missing = f"that is a {' or '.join(each.__name__ for each in (layers if isinstance(layers, tuple) else (layers,)))}."
    if not chosen:
        raise InputError(f"The network {type(module).__name__} has no layer {missing}")
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        uses = 1 + sum(key.partition(":")[0] == name for key in found)
        found[name if uses == 1 else f"{name}:{uses}"] = value

    def hook(name: str, each: nn.Module) -> Any:
        if inputs:
            return each.register_forward_pre_hook(lambda layer, given: keep(name, given[0]))
        return each.register_forward_hook(lambda layer, given, made: keep(name, made.clone()))  # the next layer may work in place

    hooks = [hook(name, each) for name, each in chosen.items()]
    try:
        with_weights(module, x, weights or {})
    finally:
        for each in hooks:
            each.remove()
    return found


def with_weights(module: nn.Module, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Returns the output of `module` on x with `weights`, parameters and buffers by name, in the place of its own.

    Running statistics that the pass updates are copies, so that no loss or step depends on the pass of another.
    """
    buffers = {name: value.clone() for name, value in module.named_buffers() if name not in weights}
    found: Tensor = torch.func.functional_call(module, {**buffers, **weights}, (x,)) if buffers or weights else module(x)
    return found


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
            else:
                features = with_weights(_Features(self.module), x, {})
        features = features if features.dtype == torch.float64 else features.float()
        return features.clone() if self.arithmetic.graphs else features  # a graph's next replay overwrites its output


class _Features(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return embed(self.network, x)
