"""Trains one network after another on a synthetic set, or on random real images beside it, and tests each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

import ddkit

Task = tuple[str, int]  # (what it is trained on: "synthetic", "random real" or a baseline, number of the network)
Images = Tensor | ddkit.data.NormalisedRows
Labelled = tuple[Images, Tensor]  # normalised images (n, C, H, W), labels (n,) or probabilities (n, K)
MOST_CONFUSED = 30  # classes of which it is counted as which of the others a network takes each


class Result(NamedTuple):
    """The test accuracy of a network, and `counts`: test images by class and found class (K, K), of many classes right and wrong (K, 2).

    `finite`: whether its weights are finite numbers, without which the accuracy says nothing.
    """

    accuracy: float
    counts: list[list[int]]
    finite: bool = True

    @classmethod
    def of(cls, found: Tensor, labels: Tensor, classes: int) -> Result:
        """Returns the result of a network that finds the classes `found` (n,) for test images of `labels` (n,)."""
        right = found == labels
        columns, place = (classes, found) if classes <= MOST_CONFUSED else (2, (~right).long())
        counts = (labels * columns + place).cpu().bincount(minlength=classes * columns).view(classes, columns)
        return cls(int(right.sum()) / len(labels), counts.tolist())

    def class_accuracies(self) -> list[float | None]:
        """Returns the accuracy of each class, None without test images."""
        every = len(self.counts) <= MOST_CONFUSED
        return [row[label if every else 0] / sum(row) if sum(row) else None for label, row in enumerate(self.counts)]

    def balanced(self) -> float:
        """Returns the mean of the accuracies of the classes."""
        known = [accuracy for accuracy in self.class_accuracies() if accuracy is not None]
        return sum(known) / len(known)


Keep = Callable[[Task, int, Result], object]  # called with a network, the threads of the process that trained it, and its result


def fields_of(record: Any) -> dict[str, Any]:
    """Returns the values of a record of ddkit's by name, for another one that differs in a few or for a file."""
    return {name: getattr(record, name) for name in record.__struct_fields__}


def augmenter_of(protocol: ddkit.nn.Protocol, info: ddkit.DataInfo, where: str = "augmenter") -> ddkit.Augmenter:
    """Returns the augmenter of a protocol for the data; `where` is a recipe path, for messages."""
    made: ddkit.Augmenter = ddkit.create("augmenter", protocol.augmenter, protocol.augmenter_options, data=info, where=where)
    return made


def real_counts(artifact: ddkit.Artifact, real_labels: Tensor) -> tuple[list[int], str]:
    """Returns how many random real images of each class stand beside a set, and in words how that differs from the set, "" if it does not.

    They are as many as have the numbers that the set stores, or fewer if fewer are accessible. Networks may see more images of the set.
    """
    classes = len(artifact.class_names)
    stored = artifact.stored_counts
    found = stored.minimum(real_labels.bincount(minlength=classes)[:classes])
    uniform, enough = len(stored.unique()) == len(found.unique()) == 1, torch.equal(found, stored)
    have, of = (int(counts[0] if uniform else counts.sum()) for counts in (found, stored))
    decoded = len(artifact.labels) // int(stored.sum())
    words = f"{have}{'' if enough else f' of {of}'} {'per class' if uniform else 'in all'}"
    words += f", while the set shows {of * decoded}" if decoded > 1 else ""
    return found.tolist(), "" if enough and decoded == 1 else words


class SoftLabels:
    """What a teacher says of images in the units of a set: softmax(logits / temperature), without gradients."""

    def __init__(self, teacher: ddkit.nn.Teacher, artifact: ddkit.Artifact, temperature: float) -> None:
        self.teacher = teacher
        self.temperature = temperature
        self._from = artifact.normalisation
        self._to = teacher.normalisation
        self._same = self._from.same(self._to)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns probabilities (n, K) of normalised images (n, C, H, W), whatever their labels."""
        if not self._same:
            images = self._to.normalise(self._from.to_pixels(images))
        with torch.no_grad():
            return (self.teacher.logits(images).float() / self.temperature).softmax(1)


class Trainer:
    """Trains networks of one kind, re-drawn in place so that a compiled forward stays valid; each is tested once.

    With `soft` they learn what a teacher says of every augmented batch, if the labels are `stored` the set's own probabilities, else its
    hard labels.
    """

    def __init__(
        self,
        name: str,
        model: ddkit.Model,
        artifact: ddkit.Artifact,
        data: ddkit.data.EvaluationData,
        protocol: ddkit.nn.Protocol,
        arithmetic: ddkit.nn.Arithmetic,
        soft: SoftLabels | None = None,
        *,
        stored: bool = False,
        threads: int = 0,
    ) -> None:
        """`threads` train a network; 0: all that torch has."""
        self.name = name
        self.model = model
        self.artifact = artifact
        self.data = data
        self.protocol = protocol
        self.schedule = ddkit.nn.Schedule.of(msgspec.structs.asdict(protocol))
        self.arithmetic = arithmetic
        self.soft = soft
        self.stored = stored
        self.threads = threads
        self.augmenter = augmenter_of(protocol, data.info)
        self.module = ddkit.nn.build_network(model, data.info, data.seed, "evaluate", name, 0).to(data.device)
        self.forward: Callable[[Tensor], Tensor] = ddkit.nn.compiled(self.module, wanted=arithmetic.compile, graphs=arithmetic.graphs)
        self.gave_up_compiling = False
        self._tests: Labelled | None = None

    @property
    def tests(self) -> Labelled:
        """Normalised test images and their labels, on the device; made once for all networks, unless they lie on the disk."""
        if self._tests is None:
            images = self.artifact.normalisation.lazily(self.data.test_images).to(self.data.device)
            self._tests = images, self.data.test_labels.to(self.data.device)
        return self._tests

    def tested(self, kind: str, repeat: int, report: Callable[[int, int], None] | None = None) -> Result:
        """Returns the result of network `repeat`; whatever it is trained on, it starts from the same weights.

        `report(epoch, epochs)` is called after each epoch of its training.
        """
        images, labels = self.training_set(kind, repeat)
        ddkit.nn.redraw(self.module, self.model, self.data.info, self.data.seed, "evaluate", self.name, repeat)
        with ddkit.nn.products(self.data.device, self.arithmetic.precision):
            self._fit(images, labels, self.schedule, ddkit.generator(self.data.seed, "evaluate", kind, self.name, repeat), report)
            found = ddkit.nn.predicted(self.module, self.tests[0], batch=self._test_batch, **self._how)
        finite = all(bool(value.isfinite().all()) for value in self.module.state_dict().values())
        return Result.of(found, self.tests[1], self.data.info.classes)._replace(finite=finite)

    @property
    def _test_batch(self) -> int:
        """Few images at a time stay in a processor's cache; a GPU wants many."""
        return 50 if self.arithmetic.compile and self.data.device.type == "cpu" else 500

    @property
    def compiled(self) -> bool:
        """Whether compiled code runs, here and in the processes that train for this one."""
        return ddkit.nn.is_compiled(self.forward) and not self.gave_up_compiling

    def warm_up(self) -> None:
        """Compiles what tested() runs; the network is drawn anew afterwards."""
        schedule = ddkit.nn.Schedule(epochs=1, batch=self.schedule.batch)
        self._fit(self.artifact.normalised, self.artifact.labels, schedule, ddkit.generator(0, "warm up"))
        images, labels = self.tests
        ddkit.nn.accuracy(self.module, images[:50], labels[:50], batch=self._test_batch, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        return {"forward": self.forward, "precision": self.arithmetic.dtype, "channels_last": self.arithmetic.compile}

    def _fit(
        self,
        images: Images,
        labels: Tensor,
        schedule: ddkit.nn.Schedule,
        generator: torch.Generator,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        device = self.data.device
        how = self._how if self.soft is None else self._how | {"targets": self.soft, "temperature": self.soft.temperature}
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            ddkit.nn.fit(
                self.module, images.to(device), labels.to(device), schedule, augmenter=self.augmenter, generator=generator, report=report,
                **how,
            )  # fmt: skip
        finally:
            torch.set_num_threads(before)

    def training_set(self, kind: str, repeat: int) -> Labelled:
        """Returns what network `repeat` of a kind is trained on; real images are normalised as the set is.

        Random real are as many accessible images of each class as the set stores, or all where there are fewer; see real_counts. Means
        are of disjoint groups of accessible images, as many per class as the set has, or fewer for want of images: the groups of a class
        hold all of its images and differ in size by one at most.
        """
        norm = self.artifact.normalisation
        if kind == "synthetic":
            return self.artifact.normalised, self.artifact.targets if self.stored else self.artifact.labels
        if kind == "pipc-real":
            return norm.lazily(self.data.real_images), self.data.real_labels
        if kind == "random real":
            chosen = torch.cat([rows[:count] for rows, count in self._shuffled(kind, repeat)])
            return norm.normalise(self.data.real_images[chosen]), self.data.real_labels[chosen]
        images, labels = [], []
        for rows, count in self._shuffled(kind, repeat):
            for group in rows.tensor_split(max(1, min(count, len(rows)))) if len(rows) else ():
                images.append(norm.normalise(self.data.real_images[group]).mean(0))
                labels.append(self.data.real_labels[group[0]])
        return torch.stack(images), torch.stack(labels)

    def _shuffled(self, purpose: str, repeat: int) -> Iterator[tuple[Tensor, int]]:
        """Yields for each class its accessible rows in an order drawn anew per repeat, and how many images of it the set stores."""
        for label, count in enumerate(self.artifact.stored_counts.tolist()):
            if not count:
                continue
            own = (self.data.real_labels == label).nonzero().flatten()
            draw = ddkit.generator(self.data.seed, purpose, repeat, label)
            yield own[torch.randperm(len(own), generator=draw)], count


def trained_in_turn(trainer: Trainer, tasks: Sequence[Task], keep: Keep, *, done: int = 0) -> list[Result]:
    """Returns the result of every task; `done` of them were reported before."""
    found, total, report_part = list[Result](), done + len(tasks), trainer.data.report_part
    for number, task in enumerate(tasks, start=done):

        def tell(epoch: int, epochs: int, number: int = number) -> None:
            assert report_part is not None
            report_part(number, total, epoch / (epochs + 1))  # testing is still to come

        found.append(trainer.tested(*task, tell if report_part else None))
        keep(task, torch.get_num_threads(), found[-1])
        trainer.data.report(number + 1, total)
    return found
