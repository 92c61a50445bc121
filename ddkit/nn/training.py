"""Trains a classifier on a labelled set of images held as tensors: teachers and the networks of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ddkit.components.base import Augmenter
from ddkit.data.images import NormalisedRows
from ddkit.nn.device import to_device
from ddkit.recipes.protocols import Schedule

Parameters = dict[str, Tensor]
Targets = Callable[[Tensor, Tensor], Tensor]


def fit(
    module: nn.Module,
    images: Tensor | NormalisedRows,
    labels: Tensor,
    schedule: Schedule,
    *,
    augmenter: Augmenter | None,
    generator: torch.Generator,
    forward: Callable[[Tensor], Tensor] | None = None,
    precision: torch.dtype = torch.float32,
    channels_last: bool = False,
    report: Callable[[int, int], None] | None = None,
    on_batch: Callable[[Tensor, Tensor], None] | None = None,
    targets: Targets | None = None,
    temperature: float = 1.0,
    steps: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Trains `module` in place by cross-entropy on normalised images (n, C, H, W) and labels (n,) int64, or probabilities (n, K).

    Images on the disk must be the result of Normalisation.lazily.

    Each epoch is one pass in random order; each batch is augmented by one draw of `augmenter` (one operation per
    batch, parameters per image) and then mixed as the schedule says. Everything random comes from `generator`. `forward` is a
    compiled version of `module`, if there is one; with `channels_last` it gets its images in that layout. `report(epoch, epochs)` is called
    after each epoch, `on_batch(logits, labels)` once for each batch, with its logits (b, K) as they were before the update and the labels
    (b,) that it had before it was mixed.

    With `targets` a batch is trained not on its labels, but on the probabilities (n, K) that `targets(batch, labels)`
    returns for the augmented batch. The loss is their cross-entropy with softmax(logits / temperature), times
    temperature squared, so that gradients keep their scale.

    With `steps` above 0 it trains on so many batches, in as many epochs as needed, instead of the schedule's epochs. An `optimizer` of the
    parameters of `module` continues with its own state; without one a new one is made.

    Examples:
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> images, labels = torch.rand(6, 3, 2, 2), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> ddkit.nn.fit(module, images, labels, ddkit.nn.Schedule(epochs=2), augmenter=None, generator=ddkit.generator(0, "fit"))
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.to(memory_format=layout)
    mixed = None if schedule.mix == "none" else _mixing(schedule, _classes(module, images[torch.zeros(1, dtype=torch.int64)]), generator)
    module.train()
    forward = forward or module
    count = -(-len(images) // schedule.batch)
    if steps:
        schedule = msgspec.structs.replace(schedule, epochs=-(-steps // count))
    optimizer = optimizer or optimizer_of(module, schedule)
    scheduler = _scheduler(optimizer, schedule, count)
    average = None
    if schedule.ema:
        moving = torch.optim.swa_utils.get_ema_multi_avg_fn(schedule.ema)
        average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=moving, use_buffers=True)
    batches = islice(_batches(images, labels, schedule, augmenter, generator), steps or None)
    for number, (x, y) in enumerate(batches, start=1):
        x, mixed_y = (x, y) if mixed is None else mixed(x, y)
        x, wanted = x.contiguous(memory_format=layout), mixed_y if targets is None else targets(x, y)

        def gradient(x: Tensor = x, y: Tensor = y, wanted: Tensor = wanted) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                found = forward(x)
            logits = found.float() if found.dtype == torch.bfloat16 else found
            if wanted.ndim == 1:
                loss = nn.functional.cross_entropy(logits, wanted)
            else:
                loss = nn.functional.cross_entropy(logits / temperature, wanted) * temperature**2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            return found.detach()

        logits = gradient()
        if on_batch is not None:
            on_batch(logits, y)
        if schedule.rho:
            _sharpen(module, schedule.rho, gradient)
        optimizer.step()
        scheduler.step()
        if average is not None:
            average.update_parameters(module)
        if report is not None and number % count == 0:
            report(number // count, schedule.epochs)
    if average is not None:
        module.load_state_dict(average.module.state_dict())
    module.eval()


class BatchAccuracy:
    """The share of the images whose class a network had right in their own batches: the `on_batch` of `fit`."""

    def __init__(self, device: torch.device) -> None:
        self._right = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> None:
        self._right.add_((logits.argmax(1) == labels).sum())
        self._seen += len(labels)

    def taken(self) -> float | None:
        """Returns the share since the last call, None if there was no batch."""
        share = int(self._right) / self._seen if self._seen else None
        self._right.zero_()
        self._seen = 0
        return share


def optimizer_of(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Returns the optimizer of a schedule for the parameters of `module`."""
    parameters = list(module.parameters())
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    chosen: dict[str, Any] = {"lr": schedule.lr, "weight_decay": schedule.weight_decay, "fused": fused}
    if schedule.optimizer == "adam":
        return torch.optim.Adam(parameters, **chosen)
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **chosen)
    return torch.optim.SGD(parameters, **chosen, momentum=schedule.momentum)


def _scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, batches: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns what sets the rate of an optimizer, for so many batches an epoch."""
    total = schedule.epochs * batches
    warm = max(1, total // 5)

    def factor(step: int) -> float:
        if schedule.schedule == "constant":
            return 1.0
        if schedule.schedule == "step":
            return 1.0 if step < -(-schedule.epochs // 2) * batches else schedule.gamma
        if schedule.schedule == "multi-step":
            return schedule.gamma ** sum(step >= round(part * schedule.epochs) * batches for part in schedule.milestones)
        if schedule.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / total))
        return min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _classes(module: nn.Module, image: Tensor) -> int:
    """Returns how many classes `module` tells apart, which it is asked in evaluation."""
    with torch.no_grad():
        return int(module.eval()(image).shape[1])


def _mixing(schedule: Schedule, classes: int, generator: torch.Generator) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns a function that mixes images (b, C, H, W) and labels (b,), which become probabilities (b, K), of a batch in a call.

    torchvision draws from the global generator, which is set for the call from a generator that `generator` seeds, and is then as before.
    """
    from torchvision.transforms import v2

    mixer = {"cutmix": v2.CutMix, "mixup": v2.MixUp}[schedule.mix](alpha=schedule.mix_alpha, num_classes=classes)
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

    def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**62, (), generator=own))
        if float(torch.rand((), generator=own)) >= schedule.mix_share:
            return x, y
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            mixed: tuple[Tensor, Tensor] = mixer(x, y)
        return mixed

    return mix


def _sharpen(module: nn.Module, rho: float, gradient: Callable[[], object]) -> None:
    """Replaces the gradient g of `module` by the one that `gradient()` leaves at weights + rho * g / |g|, |g| over all of them.

    Weights and buffers (running statistics) are as before afterwards.
    """
    moved = [parameter for parameter in module.parameters() if parameter.grad is not None]
    with torch.no_grad():
        kept = [(tensor, tensor.clone()) for tensor in (*moved, *module.buffers())]
        slopes = [parameter.grad for parameter in moved if parameter.grad is not None]
        norm = torch.stack([slope.norm() for slope in slopes]).norm().clamp_min(1e-12)
        for parameter, slope in zip(moved, slopes, strict=True):
            parameter.add_(slope * (rho / norm))
    gradient()
    with torch.no_grad():
        for tensor, before in kept:
            tensor.copy_(before)


AHEAD = 256  # images augmented in one call: small batches cost as much as one of this size


def _batches(
    images: Tensor | NormalisedRows, labels: Tensor, schedule: Schedule, augmenter: Augmenter | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the augmented batches of all epochs, in order.

    What is drawn does not depend on the network, so batches of a few images are augmented several at a time.
    """
    waiting: list[tuple[Tensor, Parameters]] = []
    left = schedule.epochs * -(-len(images) // schedule.batch)
    for _ in range(schedule.epochs):
        for own in torch.randperm(len(images), generator=generator).split(schedule.batch):
            waiting.append((own, {} if augmenter is None else augmenter.sample_batch(generator, len(own))))
            left -= 1
            sizes = [len(each) for each, _ in waiting]
            if left and augmenter is not None and augmenter.rowwise and sum(sizes) < AHEAD:
                continue
            rows = to_device(torch.cat([each for each, _ in waiting]), images.device)
            x = images[rows]
            if augmenter is not None:
                x = augmenter.apply(x, {key: torch.cat([drawn[key] for _, drawn in waiting]) for key in waiting[0][1]})
            yield from zip(x.split(sizes), labels[rows].split(sizes), strict=True)
            waiting = []


def accuracy(module: nn.Module, images: Tensor | NormalisedRows, labels: Tensor, **how: Any) -> float:
    """Returns the fraction of normalised images (n, C, H, W) that `module` classifies as `labels` (n,); the rest is as in predicted.

    Examples:
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> 0 <= ddkit.nn.accuracy(module, torch.rand(6, 3, 2, 2), torch.tensor([0, 0, 0, 1, 1, 1])) <= 1
        True
    """
    return int((predicted(module, images, **how) == labels).sum()) / len(labels)


def predicted(
    module: nn.Module,
    images: Tensor | NormalisedRows,
    *,
    batch: int = 500,
    precision: torch.dtype = torch.float32,
    forward: Callable[[Tensor], Tensor] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Returns the classes (n,) int64 that `module` finds for normalised images (n, C, H, W).

    `forward` and `channels_last` are as in fit.

    Examples:
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> ddkit.nn.predicted(module, torch.rand(6, 3, 2, 2)).shape
        torch.Size([6])
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.eval().to(memory_format=layout)
    forward = forward or module
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        return torch.cat([forward(x.contiguous(memory_format=layout)).argmax(1) for x in images.split(batch)])
