"""Evaluators: `accuracy`, under the protocols of the field's public code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch

import ddkit
from ddkit_evaluators.trainer import Trainer, trained_in_turn
from ddkit_evaluators.workers import trained_apart


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


# On 2 CPU cores, two processes of one thread each train small batches faster than one of two threads: by a fifth at 10 images a
# batch, by a twentieth at 100 (docs/performance.md). A process costs some seconds and some hundred MiB.
SMALL_BATCH, FEW_NETWORKS, MOST_WORKERS = 64, 4, 4


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
        workers: Annotated[int, ddkit.Option("processes that train networks at the same time", ge=1)] | Literal["auto"] = "auto"

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
        trainer = Trainer(
            name,
            model,
            artifact,
            data,
            schedule,
            protocol.augmenter,
            self._arithmetic(model, artifact, data, schedule, repeats * (1 + compare)),
        )
        tasks = [("synthetic", repeat) for repeat in range(repeats)] + [("random real", repeat) for repeat in range(repeats * compare)]
        workers = self._workers(trainer, len(tasks))
        found = trained_apart(trainer, tasks, workers) if workers > 1 else trained_in_turn(trainer, tasks)
        made, real = found[:repeats], found[repeats:]
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
            details={
                "epochs": schedule.epochs, "accuracies": made, "random_real_accuracies": real, "precision": trainer.arithmetic.precision,
                "compiled": trainer.compiled, "workers": workers,
            },
        )  # fmt: skip

    def _arithmetic(
        self, model: ddkit.Model, artifact: ddkit.Artifact, data: ddkit.EvaluationData, schedule: ddkit.Schedule, networks: int
    ) -> ddkit.Arithmetic:
        """Returns how the networks are computed, decided from the operations of training and testing all of them."""
        rows, options = len(artifact.labels), self.options
        module = ddkit.build_network(model, data.info, data.seed, "evaluate", "probe")
        work = networks * ddkit.training_flops(module, data.info, images=rows, epochs=schedule.epochs, tests=len(data.test_labels))
        step_work = ddkit.training_flops(module, data.info, images=min(rows, schedule.batch), epochs=1)
        compile_ = options.compile if options.compile == "auto" else options.compile == "always"
        return ddkit.decide_arithmetic(compile_, options.precision, data.device, work=work, step_work=step_work)

    def _workers(self, trainer: Trainer, networks: int) -> int:
        """Returns how many processes train networks at the same time; 1: this one, in turn."""
        if self.options.workers != "auto":
            if self.options.workers > 1 and trainer.data.device.type != "cpu":
                raise ddkit.InputError(
                    f"evaluators.accuracy.workers = {self.options.workers}: several processes train on the CPU only, not on "
                    f"{trainer.data.device}. Leave it at auto, or use --device cpu.",
                    "evaluators.accuracy.workers",
                )
            return min(self.options.workers, networks)
        small = min(len(trainer.artifact.labels), trainer.schedule.batch) <= SMALL_BATCH
        if trainer.data.device.type != "cpu" or not trainer.arithmetic.compile or not small or networks < FEW_NETWORKS:
            return 1
        return min(torch.get_num_threads(), MOST_WORKERS)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation, None for fewer than two values."""
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else None
