"""Trains a classifier on a labelled set of images held as tensors: teachers and the networks of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor, nn

from ddkit.components import Augmenter
from ddkit.options import Option

log = logging.getLogger("ddkit")


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """How a network is trained. "step" multiplies the rate by 0.1 after half of the epochs; "one-cycle" warms up over a fifth."""

    epochs: Annotated[int, Option(ge=1)]
    batch: int = 256
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    weight_decay: float = 5e-4
    schedule: Literal["one-cycle", "constant", "step"] = "step"


def fit(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    *,
    augmenter: Augmenter | None,
    generator: torch.Generator,
    forward: Callable[[Tensor], Tensor] | None = None,
    precision: torch.dtype = torch.float32,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Trains `module` in place by cross-entropy on normalised images (n, C, H, W) and labels (n,) int64.

    Each epoch is one pass in random order; each batch is augmented by one draw of `augmenter` (one operation per
    batch, parameters per image). Everything random comes from `generator`. `forward` is a compiled version of
    `module`, if there is one. `report(epoch, epochs)` is called after each epoch.
    """
    module.train()
    forward = forward or module
    device = images.device
    optimizer = _optimizer(module, schedule)
    batches = -(-len(images) // schedule.batch)
    scheduler = _scheduler(optimizer, schedule, batches)
    for epoch in range(schedule.epochs):
        order = torch.randperm(len(images), generator=generator).to(device)
        for rows in order.split(schedule.batch):
            x = images[rows]
            if augmenter is not None:
                x = augmenter.apply(x, augmenter.sample_batch(generator, len(rows)))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                logits = forward(x)
            loss = nn.functional.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
        if report is not None:
            report(epoch + 1, schedule.epochs)
    module.eval()


def _optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adam":
        return torch.optim.Adam(module.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(module.parameters(), lr=schedule.lr, momentum=0.9, weight_decay=schedule.weight_decay)


def _scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, batches: int) -> torch.optim.lr_scheduler.LambdaLR:
    total = schedule.epochs * batches

    def factor(step: int) -> float:
        if schedule.schedule == "constant":
            return 1.0
        if schedule.schedule == "step":
            return 1.0 if step < -(-schedule.epochs // 2) * batches else 0.1
        warm = max(1, total // 5)
        return min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def accuracy(module: nn.Module, images: Tensor, labels: Tensor, *, batch: int = 500, precision: torch.dtype = torch.float32) -> float:
    """Returns the fraction of normalised images (n, C, H, W) that `module` classifies as `labels` (n,)."""
    module.eval().to(memory_format=torch.contiguous_format)
    reduced = precision == torch.bfloat16
    correct = 0
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=reduced):
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            correct += int((module(x).argmax(1) == y).sum())
    return correct / len(labels)


def pick_device(name: str) -> torch.device:
    """Returns the device that --device names; "auto" is CUDA, else the CPU (mps has no float64: ask for it by name)."""
    from ddkit.errors import FlagError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise FlagError(f"--device {name}: it is auto, cpu, cuda, cuda:N or mps.")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(number or 0) >= counts[kind]:
        raise FlagError(f"--device {name}: there is no such device here ({counts[kind]} of kind {kind}). Use --device auto or cpu.")
    return torch.device(name)


def native_bfloat16(device: torch.device) -> bool:
    """Returns whether bfloat16 products are faster than float32 ones on `device` by hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def pick_precision(setting: str, device: torch.device, *, automatic: bool) -> torch.dtype:
    """Returns the dtype of a precision setting; "auto" is bfloat16 where `automatic` allows it and hardware has it."""
    if setting == "auto":
        return torch.bfloat16 if automatic and native_bfloat16(device) else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def compiled(module: nn.Module, *, wanted: bool) -> Callable[[Tensor], Tensor]:
    """Returns a compiled forward of `module` where wanted and possible, else `module`; says so when it is not possible."""
    if not wanted:
        return module
    forward = torch.compile(module)
    broken = False

    def safe(x: Tensor) -> Tensor:
        nonlocal broken
        if broken:
            return module(x)
        try:
            return forward(x)
        except Exception as error:  # torch.compile needs a C++ compiler and raises many kinds
            log.warning("torch.compile did not work here (%s); going on without.", type(error).__name__)
            broken = True
            return module(x)

    return safe
