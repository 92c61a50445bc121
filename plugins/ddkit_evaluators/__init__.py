"""Evaluators: `accuracy`, under the protocols of the field's public code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

import ddkit


class Protocol(NamedTuple):
    """How networks are trained on a synthetic set, and how many."""

    schedule: ddkit.Schedule
    augmenter: str
    repeats: int


# SGD 0.01, momentum 0.9, weight decay 5e-4, batch 256, rate x 0.1 after half: the public DC, DSA and DM code.
PROTOCOLS = {
    "dm-official": Protocol(ddkit.Schedule(epochs=1000), "dsa", 20),
    "dc-official": Protocol(ddkit.Schedule(epochs=300), "none", 20),
    "short": Protocol(ddkit.Schedule(epochs=300), "dsa", 3),
}


class Accuracy(ddkit.Evaluator):
    """Test accuracy, last epoch, of networks trained from scratch on the set, beside random real images.

    Protocol "short" is dm-official cut from 1,000 to 300 epochs and from 20 to 3 networks: for a first look, not for a
    table beside published figures.
    """

    class Options(ddkit.Options):
        protocol: Annotated[Literal["short", "dm-official", "dc-official"], ddkit.Option("how networks are trained")] = "short"
        model: Annotated[str, ddkit.Option("network, or several separated by commas")] = "convnet"
        model_options: Annotated[dict[str, Any], ddkit.Option("options of those models")] = msgspec.field(default_factory=dict)
        repeats: Annotated[int, ddkit.Option("networks; left out: the protocol's", ge=1)] | None = None
        epochs: Annotated[int, ddkit.Option("passes over the set; left out: the protocol's", ge=1)] | None = None
        random_real: Annotated[bool, ddkit.Option("whether random real images are evaluated beside the set")] = True
        precision: Literal["auto", "float32", "bfloat16"] = "auto"
        compile: Annotated[Literal["auto", "always", "never"], ddkit.Option("auto: where it pays back")] = "auto"

    def check(self, info: ddkit.DataInfo) -> None:
        self._models(info)

    def _models(self, info: ddkit.DataInfo) -> dict[str, ddkit.Model]:
        names = [name.strip() for name in self.options.model.split(",")]
        options = self.options.model_options
        return {name: ddkit.create("model", name, options, data=info, where="evaluators.accuracy.model_options") for name in names}

    def __call__(self, artifact: ddkit.Artifact, data: ddkit.EvaluationData, teacher: ddkit.Teacher | None) -> list[ddkit.Evaluation]:
        models = self._models(data.info)
        return [self._evaluation(name, model, artifact, data) for name, model in models.items()]

    def _evaluation(self, name: str, model: ddkit.Model, artifact: ddkit.Artifact, data: ddkit.EvaluationData) -> ddkit.Evaluation:
        protocol = PROTOCOLS[self.options.protocol]
        schedule = msgspec.structs.replace(protocol.schedule, epochs=self.options.epochs or protocol.schedule.epochs)
        repeats = self.options.repeats or protocol.repeats
        compare = self.options.random_real and len(data.real_images) > 0
        trainer = _Trainer(self.options, name, model, artifact, data, schedule, protocol.augmenter, networks=repeats * (1 + compare))
        made = [trainer.accuracy(artifact.normalised, artifact.labels, "synthetic", repeat) for repeat in range(repeats)]
        real = [trainer.accuracy(*_random_real(artifact, data, repeat), "random real", repeat) for repeat in range(repeats * compare)]
        return ddkit.Evaluation(
            evaluator=self.name,
            model=name,
            protocol=self.options.protocol,
            labels="hard",
            repeats=repeats,
            accuracy_mean=_mean(made),
            accuracy_std=_std(made),
            random_real_mean=_mean(real) if real else None,
            random_real_std=_std(real),
            details={"epochs": schedule.epochs, "accuracies": made, "random_real_accuracies": real, **trainer.decided},
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation, None for fewer than two values."""
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else None


def _random_real(artifact: ddkit.Artifact, data: ddkit.EvaluationData, repeat: int) -> tuple[Tensor, Tensor]:
    """Returns as many accessible real images of each class as the set has, drawn anew per repeat, normalised alike."""
    rows = []
    for label, count in zip(*artifact.labels.unique(return_counts=True), strict=True):
        own = (data.real_labels == label).nonzero().flatten()
        draw = ddkit.generator(data.seed, "random real", repeat, int(label))
        rows.append(own[torch.randperm(len(own), generator=draw)[: int(count)]])
    chosen = torch.cat(rows)
    return ddkit.Normalisation(artifact.mean, artifact.std).normalise(data.real_images[chosen]), data.real_labels[chosen]


class _Trainer:
    """Trains one network after another, re-drawn in place so that a compiled forward stays valid."""

    def __init__(
        self,
        options: Any,
        name: str,
        model: ddkit.Model,
        artifact: ddkit.Artifact,
        data: ddkit.EvaluationData,
        schedule: ddkit.Schedule,
        augmenter: str,
        *,
        networks: int,
    ) -> None:
        self.name, self.model, self.data, self.schedule, self.networks = name, model, data, schedule, networks
        self.augmenter = ddkit.create("augmenter", augmenter, data=data.info)
        self.module = ddkit.build_network(model, data.info, data.seed, "evaluate", name, 0).to(data.device)
        self.arithmetic = _arithmetic(options, self.module, artifact, data, schedule.epochs, networks)
        self.decided = {"precision": self.arithmetic.precision, "compiled": self.arithmetic.compile}
        self.forward: Callable[[Tensor], Tensor] = ddkit.compiled(
            self.module, wanted=self.arithmetic.compile, graphs=self.arithmetic.graphs
        )
        self.test_images = ddkit.Normalisation(artifact.mean, artifact.std).normalise(data.test_images).to(data.device)
        self.test_labels = data.test_labels.to(data.device)
        self.done = 0

    def accuracy(self, images: Tensor, labels: Tensor, kind: str, repeat: int) -> float:
        """Returns the test accuracy of a fresh network trained on normalised images; synthetic and real start alike."""
        data = self.data
        ddkit.redraw(self.module, self.model, data.info, data.seed, "evaluate", self.name, repeat)
        how: dict[str, Any] = {
            "forward": self.forward, "precision": self.arithmetic.dtype, "channels_last": self.arithmetic.compile,
        }  # fmt: skip
        ddkit.fit(
            self.module,
            images.to(data.device),
            labels.to(data.device),
            self.schedule,
            augmenter=self.augmenter,
            generator=ddkit.generator(data.seed, "evaluate", kind, self.name, repeat),
            **how,
        )
        found = ddkit.accuracy(self.module, self.test_images, self.test_labels, batch=100, **how)
        self.done += 1
        data.report(self.done, self.networks)
        return found


def _arithmetic(
    options: Any, module: torch.nn.Module, artifact: ddkit.Artifact, data: ddkit.EvaluationData, epochs: int, networks: int
) -> ddkit.Arithmetic:
    """Returns how the networks are computed, decided from the operations of training and testing all of them."""
    rows = len(artifact.labels)
    work = networks * ddkit.training_flops(module, data.info, images=rows, epochs=epochs, tests=len(data.test_labels))
    step_work = ddkit.training_flops(module, data.info, images=min(rows, 256), epochs=1)
    compile_ = options.compile if options.compile == "auto" else options.compile == "always"
    return ddkit.decide_arithmetic(compile_, options.precision, data.device, work=work, step_work=step_work)
