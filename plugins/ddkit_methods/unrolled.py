"""How good a network is after it was trained on the set: the loss `unrolled`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

import ddkit
from ddkit.nn import to_device, unrolled_sgd


def rows_of_steps(slices: Mapping[int, slice], images: int) -> list[Tensor]:
    """Returns the rows of each step of an epoch: the next `images` (0: all) of each class, in order, of those that have some left.

    >>> [rows.tolist() for rows in rows_of_steps({0: slice(0, 1), 1: slice(1, 4)}, 2)]
    [[0, 1, 2], [3]]
    """
    most = max(rows.stop - rows.start for rows in slices.values())
    every = images or most
    return [
        torch.cat([torch.arange(rows.start, rows.stop)[first : first + every] for rows in slices.values()])
        for first in range(0, most, every)
    ]


class Unrolled(ddkit.Loss):
    """Cross-entropy on real images of the step's network, after it was trained on the set.

    The training is plain SGD in the order of the images, with the learned learning rate `step_size`, which is stored with the set. The
    gradient goes through all training steps.

    Source: Wang et al., Dataset Distillation, arXiv 1811.10959, Algorithm 1, with the epochs of Section 3.4.
    """

    epochs: int = ddkit.option(3, "passes over the set", ge=1)
    images: int = ddkit.option(1, "synthetic images per class in a training step, 0 for all", ge=0)
    step_size: float = ddkit.option(0.01, "initial value of the learned learning rate", gt=0)
    graph: Literal["whole", "again"] = ddkit.option(
        "whole", "computation of the gradient: whole keeps the graph of all steps, and again computes each step again for the same gradient"
    )

    def requires(self) -> ddkit.Requires:
        rate = ddkit.Parameter(per="set", init=self.step_size, constraint="nonnegative", lr=1e-4)
        return ddkit.Requires(real=True, network=True, second_order=True, parameters={"step_size": rate})

    def __call__(self, step: ddkit.Step) -> Tensor:
        images, targets, real = step.augmented, step.targets, step.real
        rows_on_device = [to_device(rows, images.device) for rows in rows_of_steps(step.class_slices, self.images)]
        batches = [(images[rows], targets[rows]) for rows in rows_on_device]
        weights = {name: value.detach() for name, value in step.network.named_parameters()}
        rate = step.parameters["step_size"]
        found = unrolled_sgd(step.network, weights, batches * self.epochs, rate, constant_memory=self.graph == "again")
        return functional.cross_entropy(torch.func.functional_call(step.network, found, (real.augmented,)), real.labels)
