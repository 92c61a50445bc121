"""Training on the set, matched with the training of an expert on real images: the loss `trajectory`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

import ddkit
from ddkit.nn import to_device, unrolled_sgd

Weights = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]


def trajectory_distance(found: Weights, start: Weights, end: Weights) -> Tensor:
    """Returns |found - end|² / |start - end|² over weights of any shapes by name, a scalar: [MTT Eq. 2].

    >>> import torch
    >>> start, end = {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    >>> float(trajectory_distance({"w": torch.tensor([0.0, 1.0])}, start, end))
    0.25
    """
    missed = torch.stack([(found[name] - value).square().sum() for name, value in end.items()]).sum()
    return missed / torch.stack([(start[name] - value).square().sum() for name, value in end.items()]).sum()


def separate_steps(module: nn.Module, start: Weights, batches: Sequence[Batch], rate: Tensor) -> dict[str, Tensor]:
    """Returns what unrolled_sgd does, with gradients that take the weights before each step as constants.

    A step keeps its batch and one copy of the weights, and is computed again in the backward pass. Source: the public code of TESLA.
    """
    found = dict(start)
    for batch in batches:
        held = {name: value.detach() for name, value in found.items()}
        after = unrolled_sgd(module, held, [batch], rate, constant_memory=True)
        found = {name: value + (after[name] - held[name]) for name, value in found.items()}
    return found


def rows_of_batches(rows: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the rows of each of `steps` batches of `batch` rows, of as many passes in random order as they need."""
    left: list[Tensor] = []
    for _ in range(steps):
        left = left or list(torch.randperm(rows, generator=generator).split(batch))
        yield left.pop(0)


class Trajectory(ddkit.Loss):
    """Distance between a network trained on the set from an expert's weights, and the expert's weights some epochs later.

    The distance is squared and divided by that between both weights of the expert. Each training step is plain SGD on a batch of the set,
    with an augmentation of its own and the learned learning rate `step_size`, which is stored with the set.

    Source: Cazenavette et al., Dataset Distillation by Matching Training Trajectories, CVPR 2022, arXiv 2203.11932, Algorithm 1; with
    `graph = "separate"` Cui et al., Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory, ICML 2023, arXiv 2211.10586; with
    `widening` and `most` Guo et al., Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching, ICLR 2024, arXiv
    2310.05773.
    """

    steps: int = ddkit.option(10, "number of training steps on the set", ge=1)
    batch: int = ddkit.option(0, "synthetic images per training step, 0 for all", ge=0)
    span: int = ddkit.option(2, "number of epochs between the two weights of the expert", ge=1)
    first: int = ddkit.option(0, "first epoch of the experts to start from", ge=0)
    last: int | None = ddkit.option(
        None, "last epoch of the experts to start from; if left out, the last one with a saved epoch `span` epochs later", ge=0
    )
    last_at_first: int | None = ddkit.option(None, "value of `last` in the first step of the run; if left out, it does not change", ge=0)
    widening: int = ddkit.option(0, "number of steps of the run in which `last_at_first` grows to `last`", ge=0)
    most: float | None = ddkit.option(
        None,
        "largest distance at which a step has a gradient; if left out, all steps have one. If the distance is above it in the first step "
        "(metrics.jsonl has it), use a smaller step_size",
        gt=0,
    )
    step_size: float = ddkit.option(0.01, "initial value of the learned learning rate", gt=0)
    graph: Literal["whole", "again", "separate"] = ddkit.option(
        "whole",
        "computation of the gradient: whole keeps the graph of all steps, again computes each step again for the same gradient, and "
        "separate does so without gradients through the weights between steps",
    )

    def requires(self) -> ddkit.Requires:
        rate = ddkit.Parameter(per="set", init=self.step_size, constraint="nonnegative", lr=1e-4)
        return ddkit.Requires(network=True, experts=True, second_order=True, parameters={"step_size": rate})

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        if network is not None and any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in network.modules()):
            raise ddkit.InputError(
                "trajectory: the network has batch norm, for which experts record no statistics between their epochs. Use "
                "--set network.norm=instance for convnet, or another --model.",
                "network",
            )
        if (self.last_at_first is not None) != (self.widening > 0) or (self.widening and self.last is None):
            raise ddkit.InputError(
                f"trajectory: last_at_first and widening only have an effect together and with last. Set all three in "
                f"{self.recipe_path}, or neither of the two.",
                f"{self.recipe_path}.last_at_first",
            )

    def expert_draws(self) -> Collection[tuple[int, int, int | None]]:
        return {(self.span, self.first, self.last_at(0)), (self.span, self.first, self.last)}

    def last_at(self, index: int) -> int | None:
        """Returns the last epoch to start from in step `index` of the run."""
        if self.last is None or self.last_at_first is None or index >= self.widening:
            return self.last
        return self.last_at_first + (self.last - self.last_at_first) * index // self.widening

    def __call__(self, step: ddkit.Step) -> Tensor:
        drawn = step.experts.draw(self.span, first=self.first, last=self.last_at(step.index))
        names = [name for name, _ in step.network.named_parameters()]
        start, end = ({name: weights[name].to(step.images.dtype) for name in names} for weights in (drawn.start, drawn.end))
        batches, rate = list(self.batches(step)), step.parameters["step_size"]
        if self.graph == "separate":
            found = separate_steps(step.network, start, batches, rate)
        else:
            found = unrolled_sgd(step.network, start, batches, rate, constant_memory=self.graph == "again")
        value = trajectory_distance(found, start, end)
        step.log("distance", value)
        return value if self.most is None else value.clamp(max=self.most)

    def batches(self, step: ddkit.Step) -> Iterator[Batch]:
        """Yields the augmented images and the targets of each step of training."""
        slices = step.class_slices
        labels = torch.tensor(list(slices)).repeat_interleave(torch.tensor([rows.stop - rows.start for rows in slices.values()]))
        for number, rows in enumerate(rows_of_batches(len(labels), self.batch or len(labels), self.steps, step.generator)):
            there = to_device(rows, step.images.device)
            yield step.augment(step.images[there], labels[rows], draw=number), step.targets[there]
