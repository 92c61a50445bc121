"""Logits of a network for losses that differentiate the gradient by its parameters once more: in passes of first order.

A loss of the logits f(x; theta) has the gradient G = J^T u by theta, with J = df/dtheta and u its gradient by f. A loss of G, such as a
distance to theta, needs the gradient of <V, G> by x, where V is its own gradient by G. Double backward takes that through the graph of the
backward pass. As <V, G> = <J V, u>, it can also be taken so:

    1. f and G by a forward and a backward pass,
    2. J V, the derivative of f along V, by a forward pass in forward mode: the gradient of <V, G> by u,
    3. the gradient of <J V, u> by x with u held, by a backward pass, which takes along that of all other losses of f.

Each of them is compiled, computed in bfloat16, and in blocks of images that stay in the processor's cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ddkit.components.base import DataInfo
from ddkit.nn.compiling import Arithmetic, compiled, is_compiled
from ddkit.nn.device import differentiable_attention
from ddkit.nn.networks import modes_kept

NEARLY = 1e-3  # how far from double backward's a gradient in float32 may be, of its norm, on a network that forward mode can take


class SecondOrder:
    """Logits of `module` in blocks of `block` images (0: all at once), for losses that differentiate gradients by its parameters.

    A loss takes them as it would of any network: torch.autograd.grad(loss, parameters, create_graph=True).
    """

    def __init__(self, module: nn.Module, arithmetic: Arithmetic, *, block: int = 0) -> None:
        with warnings.catch_warnings():  # torch's forward mode loads torch.jit, which is deprecated
            warnings.simplefilter("ignore", FutureWarning)
            torch.func.jvp(torch.clone, (torch.zeros(1),), (torch.zeros(1),))
        self.module = module
        self.arithmetic = arithmetic
        self.block = block
        self.names = [name for name, _ in module.named_parameters()]
        self.forward = compiled(self.logits, wanted=arithmetic.compile, static=True)
        self.forward_along = compiled(self._logits_along, wanted=arithmetic.compile, static=True)

    @property
    def compiled(self) -> bool:
        """Whether compiled code runs."""
        return is_compiled(self.forward) and is_compiled(self.forward_along)

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns float32 logits (n, K) of normalised images x (n, C, H, W) under all `parameters` of the module, by name."""
        inputs = [x, *(parameters[name] for name in self.names)]
        found: Tensor = _Logits.apply(
            _Passes(self, x, inputs[1:]), *(each.view_as(each) for each in inputs)
        )  # a node for each: see _wanted
        return found

    def logits(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Returns the logits in one block, by plain operations."""
        return _wide(torch.func.functional_call(self.module, dict(zip(self.names, parameters, strict=True)), (x,)))

    def _logits_along(
        self, x: Tensor, parameters: Sequence[Tensor], chosen: Sequence[int], direction: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns the logits and their derivative along `direction` of the `chosen` parameters."""

        def logits(*varied: Tensor) -> Tensor:
            every = list(parameters)
            for index, parameter in zip(chosen, varied, strict=True):
                every[index] = parameter
            return self.logits(x, *every)

        with _Norms():
            value, derivative = torch.func.jvp(logits, tuple(parameters[index] for index in chosen), tuple(direction))  # type: ignore[misc]
        return value, derivative

    def blocks(self, t: Tensor) -> list[Tensor]:
        """Returns the rows of t in blocks of one size, which compiled code of one shape takes: the last is filled up with zeros."""
        size = self.block or len(t)
        lacking = t.new_zeros((-len(t) % size, *t.shape[1:]))
        return list((torch.cat([t, lacking]) if len(lacking) else t).split(size))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the module is in evaluation mode, and products are in bfloat16 if that was decided."""
        reduced = self.arithmetic.dtype == torch.bfloat16
        device = next(self.module.parameters()).device
        with evaluating(self.module), torch.autocast(device.type, torch.bfloat16) if reduced else nullcontext():
            yield


class ClassGradients:
    """For each class the gradient, by the parameters of `module` in evaluation mode, of the mean cross-entropy of its images.

    If `arithmetic` is given, compiled code takes `blocks` synthetic and real images of a class at once; else plain operations take all.
    """

    def __init__(self, module: nn.Module, arithmetic: Arithmetic | None = None, *, blocks: tuple[int, int] = (0, 0)) -> None:
        self.module = module
        self.fast = [SecondOrder(module, arithmetic, block=block) for block in blocks] if arithmetic else []

    @property
    def compiled(self) -> bool:
        """Whether compiled code runs."""
        return bool(self.fast) and all(is_compiled(each.forward) for each in self.fast) and is_compiled(self.fast[0].forward_along)

    def __call__(self, x: Tensor, labels: Tensor, class_slices: Mapping[int, slice], *, real: bool) -> dict[int, Sequence[Tensor]]:
        """Returns the gradients by label, in the order of the parameters; if the images are not `real`, with a graph to them."""
        parameters = dict(self.module.named_parameters())
        found: dict[int, Sequence[Tensor]] = {}
        with evaluating(self.module):
            for label, rows in class_slices.items():
                logits = self.fast[real](x[rows], parameters) if self.fast else self.module(x[rows])
                loss = functional.cross_entropy(logits, labels[rows])
                found[label] = torch.autograd.grad(loss, list(parameters.values()), create_graph=not real)
        return found


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in evaluation mode inside."""
    with modes_kept(module):
        for each in module.modules():
            if each.training:
                each.training = False
        yield


class _Passes:
    """The passes over the images of one call, in blocks, and what one pass leaves for another."""

    def __init__(self, network: SecondOrder, x: Tensor, parameters: Sequence[Tensor]) -> None:
        self.network = network
        self.count = len(x)
        layout = torch.channels_last if network.arithmetic.compile else torch.contiguous_format
        self.images = [part.contiguous(memory_format=layout) for part in network.blocks(x.detach())]
        self.leaves = [part.detach().requires_grad_() for part in self.images]
        self.parameters = [each.detach() for each in parameters]
        self.varied = [each.detach().requires_grad_() for each in parameters]
        self._graph: list[Tensor] = []  # logits by block
        self._waiting: list[_Waiting] = []

    def logits(self) -> Tensor:
        """Returns the logits (n, K); their graph is kept for one gradient by the parameters."""
        with torch.enable_grad(), self.network.computing():
            self._graph = [self.network.forward(part, *self.varied) for part in self.images]
        return torch.cat([part.detach() for part in self._graph])[: self.count]

    def gradient(self, chosen: Sequence[int], u: Tensor) -> list[Tensor]:
        """Returns J^T u for the `chosen` parameters, u (n, K)."""
        if not self._graph:  # another gradient has used it up
            self.logits()
        graph = self._graph
        self._graph = []
        wanted = [self.varied[index] for index in chosen]
        parts = [
            torch.autograd.grad(logits, wanted, cotangent, materialize_grads=True)
            for logits, cotangent in zip(graph, self.network.blocks(u.detach()), strict=True)
        ]
        return [torch.stack(own).sum(0) if len(own) > 1 else own[0] for own in zip(*parts, strict=True)]

    def along(self, chosen: Sequence[int], direction: Sequence[Tensor], u: Tensor) -> Tensor:
        """Returns J V (n, K), V being `direction` of the `chosen` parameters; the gradient of <J V, u> waits for `image_gradient`."""
        with torch.enable_grad(), self.network.computing():
            found = [self.network.forward_along(leaf, self.parameters, chosen, direction) for leaf in self.leaves]
        logits, derivatives = ([pair[side] for pair in found] for side in (0, 1))
        self._waiting.append(_Waiting(current_pass(), logits, derivatives, self.network.blocks(u.detach())))
        return torch.cat([part.detach() for part in derivatives])[: self.count]

    def image_gradient(self, g: Tensor) -> Tensor:
        """Returns the gradient (n, C, H, W) of <f, g> by the images, g (n, K), plus the gradients that wait in this backward pass."""
        waiting = [each for each in self._waiting if each.of == current_pass()]
        self._waiting = []
        if waiting:
            logits = waiting[0].logits
        else:
            with torch.enable_grad(), self.network.computing():
                logits = [self.network.logits(leaf, *self.parameters) for leaf in self.leaves]
        outputs = zip(logits, *(each.derivatives for each in waiting), strict=True)
        cotangents = zip(self.network.blocks(g.detach()), *(each.cotangents for each in waiting), strict=True)
        parts = [torch.autograd.grad(*each)[0] for each in zip(outputs, self.leaves, cotangents, strict=True)]
        return torch.cat(parts)[: self.count]


class _Waiting(NamedTuple):
    """Of a gradient: logits, J V and u by block, the first two with their graphs, and the backward pass `of` which they are."""

    of: int
    logits: list[Tensor]
    derivatives: list[Tensor]
    cotangents: list[Tensor]


def current_pass() -> int:
    """Returns the number of the backward pass that torch is in."""
    return torch._C._current_graph_task_id()


def _wanted(ctx: Any) -> list[bool]:
    """Returns for each input of a node whether the backward pass at hand leads to it. (ctx.needs_input_grad says whether one could.)"""
    return [node is not None and torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions]


class _Logits(torch.autograd.Function):
    """f(x; theta), whose gradients by theta are nodes that can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, passes: _Passes, x: Tensor, *parameters: Tensor) -> Tensor:
        logits = passes.logits()
        ctx.passes = passes
        ctx.save_for_backward(logits, x, *parameters)
        return logits

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        passes: _Passes = ctx.passes
        images_wanted, *wanted = _wanted(ctx)
        chosen = [index for index, each in enumerate(wanted) if each]
        by_images: Tensor | None = None
        by_parameters: Sequence[Tensor] = ()
        logits, x, *parameters = ctx.saved_tensors
        if not torch.is_grad_enabled():
            by_images = passes.image_gradient(g) if images_wanted else None
            by_parameters = passes.gradient(chosen, g) if chosen else ()
        elif not images_wanted:
            by_parameters = _Gradient.apply(passes, chosen, logits, g)
        else:  # a gradient by the images that is differentiated again: double backward, in float32
            found = passes.network.logits(x, *parameters)
            by_images, *by_parameters = torch.autograd.grad(
                found, [x, *(parameters[index] for index in chosen)], g, create_graph=True, materialize_grads=True
            )
        gradients: list[Tensor | None] = [None] * len(wanted)
        for index, gradient in zip(chosen, by_parameters, strict=True):
            gradients[index] = gradient
        return (None, by_images, *gradients)


class _Gradient(torch.autograd.Function):
    """G = J^T u by the `chosen` parameters. Its gradient by the images is left to the node of the logits, which comes after it."""

    @staticmethod
    def forward(ctx: Any, passes: _Passes, chosen: Sequence[int], logits: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        ctx.passes = passes
        ctx.chosen = chosen
        ctx.save_for_backward(u)
        return tuple(passes.gradient(chosen, u))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *direction: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = ctx.saved_tensors
        return None, None, None, ctx.passes.along(ctx.chosen, direction, u)


NORMS = {torch.batch_norm, functional.batch_norm, functional.group_norm, functional.instance_norm}


class _Norms(TorchFunctionMode):
    """Inside, layers that normalise compute in float32, or their input's type if it is wider, and return their input's type.

    In forward mode torch gives a derivative of the type of their parameters beside a value of the type of their input. That of its layer
    norm, moreover, has no gradient by the input's mean and variance, so it is written out.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        if func in NORMS:
            return func(_wide(args[0]), *args[1:], **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    sides = tuple(range(-len(normalized_shape), 0))
    centred = _wide(x) - _wide(x).mean(sides, keepdim=True)
    found = centred * (centred.square().mean(sides, keepdim=True) + eps).rsqrt()
    found = found if weight is None else found * weight
    return (found if bias is None else found + bias).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_forward_mode(module: nn.Module, info: DataInfo) -> str:
    """Returns why SecondOrder does not have the gradients of double backward on `module`, a probe in evaluation mode; "" if it has them."""
    module.requires_grad_(False)
    device = next(module.parameters(), torch.zeros(0)).device
    draws = torch.Generator().manual_seed(0)
    images = torch.randn((2, *info.shape), generator=draws).to(device)
    labels = torch.arange(2, device=device) % info.classes

    def gradient(logits: Callable[[Tensor, Mapping[str, Tensor]], Tensor]) -> Tensor:
        x = images.clone().requires_grad_()
        parameters = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}
        loss = functional.cross_entropy(logits(x, parameters), labels)
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
        return torch.autograd.grad(torch.stack([each.square().sum() for each in found]).sum(), x)[0]

    try:
        with differentiable_attention(True):
            expected = gradient(lambda x, parameters: torch.func.functional_call(module, dict(parameters), (x,)))
            plain = Arithmetic(compile=False, precision="float32")
            found = gradient(SecondOrder(module, plain, block=1))  # image by image: one must not depend on the others
    except (RuntimeError, AttributeError) as error:  # of layers without forward mode, and of a torch without what SecondOrder asks of it
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    near = float((found - expected).norm()) <= NEARLY * float(expected.norm())
    return "" if near else "in forward mode, or image by image, the gradients differ"
