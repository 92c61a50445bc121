"""Networks: built or re-drawn from a seed, and their features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddkit.components import DataInfo, Model
from ddkit.errors import RunFailed
from ddkit.randomness import drawn_from


def build_network(model: Model, info: DataInfo, seed: int, *purpose: str | int) -> nn.Module:
    """Returns a fresh module of `model` for the data, its weights a function of (seed, purpose)."""
    with drawn_from(seed, *purpose):
        return model(info.channels, info.size, info.classes)


def redraw(module: nn.Module, model: Model, info: DataInfo, seed: int, *purpose: str | int) -> None:
    """Gives `module` the weights that build_network would give it, in place: compiled code and hooks stay valid."""
    module.load_state_dict(build_network(model, info, seed, *purpose).state_dict())


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


def couples_samples(module: nn.Module, info: DataInfo) -> bool:
    """Returns whether the features of an image depend on the others in its batch (batch norm in training mode)."""
    x = torch.randn((4, *info.shape), generator=torch.Generator().manual_seed(0))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        together, alone = embed(module, x)[:2], embed(module, x[:2])
    module.load_state_dict(state)
    return not torch.allclose(together, alone, rtol=1e-3, atol=1e-4)


def saved_bytes(module: nn.Module, info: DataInfo) -> int:
    """Returns the bytes that one image's features keep for their gradient, measured on one forward pass."""
    seen: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros((2, *info.shape), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = embed(module, x)
    del features
    return sum(seen.values()) // 2
