"""Steps of gradient descent on a set, through which the set, its labels and the learning rate get gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddkit.nn.embedder import with_weights

LossFunction = Callable[[Tensor, Tensor], Tensor]


def unrolled_sgd(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: Tensor | float,
    *,
    loss: LossFunction = functional.cross_entropy,
    constant_memory: bool = False,
) -> dict[str, Tensor]:
    """Returns the weights, by name, after a step of plain SGD on each of the `batches`, differentiable by all that is given.

    `weights` are all parameters of `module` by name; its own are neither read nor written, and its running statistics stay. A batch is
    images (n, C, H, W) and targets, labels (n,) or probabilities (n, K). `lr` is a scalar. `loss` takes logits (n, K) and targets.

    Without `constant_memory` the graphs of all steps are kept. With it a step only keeps its weights and batch, and is computed again in
    the backward pass: the same gradient for about half more time, and memory that grows by one copy of the weights a step. Such
    gradients cannot be differentiated again, and `module` must not draw in its forward pass, as dropout does: the second time it would
    draw anew.

    Sources: Wang et al., Dataset Distillation, arXiv 1811.10959, Algorithm 1; Cazenavette et al., arXiv 2203.11932, Algorithm 1.

    Examples:
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> images, labels = torch.rand(6, 3, 2, 2, requires_grad=True), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> trained = ddkit.nn.unrolled_sgd(module, dict(module.named_parameters()), [(images, labels)] * 3, lr=0.1)
        >>> tuple(torch.autograd.grad(trained["1.weight"].sum(), images)[0].shape)
        (6, 3, 2, 2)
    """
    names = list(weights)
    values = list(weights.values())
    rate = torch.as_tensor(lr, dtype=values[0].dtype, device=values[0].device)

    def step(images: Tensor, targets: Tensor, rate: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            varied = [each if each.requires_grad else each.detach().requires_grad_() for each in values]
            value = loss(with_weights(module, images, dict(zip(names, varied, strict=True))), targets)
            gradients = torch.autograd.grad(value, varied, create_graph=True, materialize_grads=True)
            return tuple(each - rate * gradient for each, gradient in zip(varied, gradients, strict=True))

    for images, targets in batches:
        given = (images, targets, rate, *values)
        values = list(_Again.apply(step, *given) if constant_memory else step(*given))
    return dict(zip(names, values, strict=True))


class _Again(torch.autograd.Function):
    """A step that keeps what it is given and nothing else, and is computed once more for its gradient."""

    @staticmethod
    def forward(ctx: Any, step: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(*given)
        return tuple(each.detach() for each in step(*given))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        given = [each.detach().requires_grad_(asked) for each, asked in zip(ctx.saved_tensors, wanted, strict=True)]
        asked = [each for each in given if each.requires_grad]
        with torch.enable_grad():
            made = ctx.step(*given)
        found = iter(torch.autograd.grad(made, asked, gradients, materialize_grads=True))
        return (None, *(next(found) if each else None for each in wanted))
