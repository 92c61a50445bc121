"""Networks: built or drawn anew from a seed, and what is found out about one by trying it: second derivatives, memory, work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddkit.components.base import DataInfo, Model
from ddkit.components.guard import blamed
from ddkit.nn.device import differentiable_attention, to_device
from ddkit.nn.embedder import embed
from ddkit.seeding import drawn_from


def build_network(model: Model, info: DataInfo, seed: int, *purpose: str | int) -> nn.Module:
    """Returns a fresh module of `model` for the data, its weights a function of (seed, purpose).

    Examples:
        >>> info = ddkit.DataInfo(class_names=("cat", "dog"), channels=3, size=(8, 8))
        >>> network = ddkit.nn.build_network(ddkit.create("model", "mlp"), info, 0, "example")
        >>> tuple(network(torch.rand(5, 3, 8, 8)).shape)
        (5, 2)
    """
    with blamed("model", model, building=True), drawn_from(seed, *purpose):
        return model(info.channels, info.size, info.classes)


def network_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, also buffers that a state dict leaves out, detached: writing to them writes the module."""
    return {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}


def redraw(module: nn.Module, model: Model, info: DataInfo, seed: int, *purpose: str | int) -> None:
    """Gives `module` the weights that build_network would give it, in place: compiled code and hooks stay valid.

    `module` must be one that `model` built for `info`. The draw is made on the CPU, whatever the module's device.

    Examples:
        >>> info, model = ddkit.DataInfo(class_names=("cat", "dog"), channels=3, size=(8, 8)), ddkit.create("model", "mlp")
        >>> network, other = (ddkit.nn.build_network(model, info, seed, "example") for seed in (0, 1))
        >>> ddkit.nn.redraw(network, model, info, 1, "example")
        >>> all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters()))
        True
    """
    load_weights(module, network_tensors(build_network(model, info, seed, *purpose)))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Writes weights and buffers by name into `module`, in place: compiled code and hooks stay valid."""
    with torch.no_grad():
        for name, value in network_tensors(module).items():
            value.copy_(to_device(weights[name], value.device))


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Puts each module of `module` back afterwards in the mode, of training or evaluation, that it has now."""
    modes = {each: each.training for each in module.modules()}
    try:
        yield
    finally:
        for each, mode in modes.items():
            if each.training != mode:
                each.training = mode


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Returns the layers of batch norm that have running statistics."""
    return [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.track_running_stats]


def set_statistics(module: nn.Module, images: Tensor) -> None:
    """Makes the running statistics of batch norm those of normalised images (n, C, H, W), and these layers use them from then on.

    Else the network stays in the mode that it has. Then the features of an image do not depend on the others in its batch.
    """
    layers: list[Any] = batch_norms(module)
    momenta = [layer.momentum for layer in layers]
    with modes_kept(module), torch.no_grad():
        module.eval()
        for layer in layers:
            layer.train().momentum = 1.0
        module(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.eval().momentum = momentum


def couples_samples(module: nn.Module, info: DataInfo) -> bool:
    """Returns whether the features of an image depend on the others in its batch (batch norm in training mode)."""
    x = torch.randn((4, *info.shape), generator=torch.Generator().manual_seed(0))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        together, alone = embed(module, x)[:2], embed(module, x[:2])
    module.load_state_dict(state)
    return not torch.allclose(together, alone, rtol=1e-3, atol=1e-4)


NO_SECOND = ("is not implemented", "differentiate twice")  # how torch puts it


def no_second_derivative(module: nn.Module, info: DataInfo) -> str:
    """Returns why the gradient of a cross-entropy by the parameters has no gradient itself; "" if it has one.

    A layer of torch's own raises. One whose backward pass computes outside of the graph makes it wrong in silence: a gradient that
    depended on others goes in, and one that depends on nothing comes out. `module` is a probe, which is changed.
    """
    module.eval().requires_grad_()
    device = next(module.parameters(), torch.zeros(0)).device
    x = torch.randn((1, *info.shape), generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    cut: list[str] = []

    def look(made: Sequence[Tensor | None], given: Sequence[Tensor | None], name: str) -> None:
        depends = any(each is not None and each.requires_grad for each in given)
        if depends and any(each is not None and not each.requires_grad and bool(each.any()) for each in made):
            cut.append(name)

    try:
        with differentiable_attention(True):
            loss = nn.functional.cross_entropy(module(x), torch.zeros(1, dtype=torch.int64, device=device))
            seen: set[Any] = set()
            waiting = [loss.grad_fn]
            while waiting:
                node = waiting.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    waiting += [before for before, _ in node.next_functions]
                    node.register_hook(partial(look, name=node.name()))
            first = torch.autograd.grad(loss, list(module.parameters()), create_graph=True, materialize_grads=True)
            torch.stack([each.square().sum() for each in first]).sum().backward()
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_SECOND):
            raise
        return str(error).strip().splitlines()[0]
    return f"the backward pass of {cut[0]} is not recorded by torch's autograd" if cut else ""


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


def forward_flops(module: nn.Module, info: DataInfo, *, features: bool = False) -> float:
    """Returns the floating-point operations (multiply and add are two) of one image's forward pass, or of its features."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros((2, *info.shape), device=next(module.parameters(), torch.zeros(0)).device)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _ = embed(module, x) if features else module(x)
    module.load_state_dict(state)  # running statistics as before
    return counter.get_total_flops() / 2


def training_flops(module: nn.Module, info: DataInfo, *, images: int, epochs: int, tests: int = 0) -> float:
    """Returns the operations of training on `images` for `epochs` (forward, and twice that backward) and of testing once.

    Examples:
        >>> info = ddkit.DataInfo(class_names=("cat", "dog"), channels=1, size=(2, 2))
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> ddkit.nn.training_flops(module, info, images=10, epochs=5)
        2400.0
    """
    return forward_flops(module, info) * (3 * images * epochs + tests)
