"""Trains one network after another on a synthetic set, or on random real images beside it, and tests each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ddkit

Task = tuple[str, int]  # ("synthetic" or "random real", number of the network)


class Trainer:
    """Trains networks of one kind, re-drawn in place so that a compiled forward stays valid; each is tested once."""

    def __init__(
        self,
        name: str,
        model: ddkit.Model,
        artifact: ddkit.Artifact,
        data: ddkit.EvaluationData,
        schedule: ddkit.Schedule,
        augmenter: str,
        arithmetic: ddkit.Arithmetic,
    ) -> None:
        self.name, self.model, self.artifact, self.data = name, model, artifact, data
        self.schedule, self.arithmetic, self.augmenter_name = schedule, arithmetic, augmenter
        self.augmenter = ddkit.create("augmenter", augmenter, data=data.info)
        self.module = ddkit.build_network(model, data.info, data.seed, "evaluate", name, 0).to(data.device)
        self.forward: Callable[[Tensor], Tensor] = ddkit.compiled(self.module, wanted=arithmetic.compile, graphs=arithmetic.graphs)
        self.gave_up_compiling = False
        self._tests: tuple[Tensor, Tensor] | None = None

    @property
    def tests(self) -> tuple[Tensor, Tensor]:
        """Normalised test images and their labels, on the device; made once for all networks."""
        if self._tests is None:
            images = self._normalised(self.data.test_images).to(self.data.device)
            self._tests = images, self.data.test_labels.to(self.data.device)
        return self._tests

    def _normalised(self, images: Tensor) -> Tensor:
        return ddkit.Normalisation(self.artifact.mean, self.artifact.std).normalise(images)

    def accuracy(self, kind: str, repeat: int) -> float:
        """Returns the test accuracy of network `repeat`; on synthetic and on real images it starts from the same weights."""
        images, labels = (self.artifact.normalised, self.artifact.labels) if kind == "synthetic" else self._random_real(repeat)
        ddkit.redraw(self.module, self.model, self.data.info, self.data.seed, "evaluate", self.name, repeat)
        with ddkit.products(self.data.device, self.arithmetic.precision):
            self._fit(images, labels, self.schedule, ddkit.generator(self.data.seed, "evaluate", kind, self.name, repeat))
            return ddkit.accuracy(self.module, *self.tests, batch=self._test_batch, **self._how)

    @property
    def _test_batch(self) -> int:
        """Few images at a time stay in a processor's cache; a GPU wants many."""
        return 50 if self.arithmetic.compile and self.data.device.type == "cpu" else 500

    @property
    def compiled(self) -> bool:
        """Whether compiled code runs, here and in the processes that train for this one."""
        return ddkit.is_compiled(self.forward) and not self.gave_up_compiling

    def warm_up(self) -> None:
        """Compiles what accuracy() runs; the network is drawn anew afterwards."""
        schedule = ddkit.Schedule(epochs=1, batch=self.schedule.batch)
        self._fit(self.artifact.normalised, self.artifact.labels, schedule, ddkit.generator(0, "warm up"))
        images, labels = self.tests
        ddkit.accuracy(self.module, images[:50], labels[:50], batch=self._test_batch, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        return {"forward": self.forward, "precision": self.arithmetic.dtype, "channels_last": self.arithmetic.compile}

    def _fit(self, images: Tensor, labels: Tensor, schedule: ddkit.Schedule, generator: torch.Generator) -> None:
        device = self.data.device
        ddkit.fit(self.module, images.to(device), labels.to(device), schedule, augmenter=self.augmenter, generator=generator, **self._how)

    def _random_real(self, repeat: int) -> tuple[Tensor, Tensor]:
        """Returns as many accessible real images of each class as the set has, drawn anew per repeat, normalised alike."""
        rows = []
        for label, count in zip(*self.artifact.labels.unique(return_counts=True), strict=True):
            own = (self.data.real_labels == label).nonzero().flatten()
            draw = ddkit.generator(self.data.seed, "random real", repeat, int(label))
            rows.append(own[torch.randperm(len(own), generator=draw)[: int(count)]])
        chosen = torch.cat(rows)
        return self._normalised(self.data.real_images[chosen]), self.data.real_labels[chosen]


def trained_in_turn(trainer: Trainer, tasks: Sequence[Task], *, done: int = 0) -> list[float]:
    """Returns the accuracy of every task; `done` of them were reported before."""
    found = []
    for number, task in enumerate(tasks, start=1):
        found.append(trainer.accuracy(*task))
        trainer.data.report(done + number, done + len(tasks))
    return found
