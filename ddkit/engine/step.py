"""One step as losses see it: everything they declared, each thing built once and shared."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from ddkit.components.base import Augmenter, DataInfo
from ddkit.components.guard import blamed
from ddkit.components.options import Requires
from ddkit.components.watch import Watch
from ddkit.distributed import class_rows
from ddkit.engine.bank import Bank
from ddkit.engine.chunking import Sums
from ddkit.engine.draws import Parameters, StepSource, class_slices
from ddkit.errors import RunFailed
from ddkit.nn.device import to_device
from ddkit.nn.embedder import Embedder
from ddkit.nn.teacher import Teacher
from ddkit.seeding import generator


class View(NamedTuple):
    """A named view of the synthetic set: images (n, C, H, W), labels (n,), teacher_logits (n, K)."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor


class RealStep:
    """The real images of a step: `images` (m, C, H, W) normalised, `labels` (m,), `augmented`, `embeddings`.

    Labels are ascending; `class_slices` has the rows of each class as a slice, without asking the device. `size` is the number of
    real images of the step in all parts of the set.
    """

    def __init__(self, step: SharedStep) -> None:
        self._step = weakref.proxy(step)  # which has this: in a circle both, and their graphs, would wait for the garbage collector
        source = step.source
        drawn = source.real_rows(step.index)
        self.size, self.part = len(drawn), class_rows(source.real_labels[drawn], step.classes or source.own_classes)
        rows = drawn[self.part]
        labels = source.real_labels[rows]
        self.labels, self.class_slices = step.on_device(labels), class_slices(labels)
        self.images = source.normalisation.normalise(source.real_pixels(rows - source.own_real.start))
        step.watch.note("the real images", self.images)
        step.watch.note("the real labels", self.labels)

    @cached_property
    def augmented(self) -> Tensor:
        return self._step.watch.noted("the augmented real images", self._step.augment(self.images, self.labels))

    @cached_property
    def embeddings(self) -> Tensor:
        with torch.no_grad():
            return self._step.watch.noted("the real images' embeddings", self._step.embed(self.augmented))


class SharedStep:
    """All members of one step for the classes `classes` (None: all); every member is built once, on first use."""

    def __init__(self, source: StepSource, bank: Bank, index: int, classes: range | None = None) -> None:
        self.source, self.bank, self.index, self.classes = source, bank, index, classes
        self.rows = bank.rows(classes)
        self.images, self.labels, self.size = bank.decoded(self.rows), bank.decoded_labels[self.rows], bank.size
        self._host_labels = [(self.labels, bank.host_labels[self.rows])]  # labels on the device, and the same on the CPU
        self.network_gradients = self.teacher_gradients = False  # whether their parameters require gradients
        self.logged: dict[str, dict[str, Tensor]] = {}
        self.totals: dict[str, Sums] = {}  # by label of a loss: what adds up its totals over the chunks of the set
        self._views: dict[str, View] = {}
        self.watch = Watch()
        self.watch.note("the images", self.images)  # a view of the bank's shares its counter
        self.watch.note("the labels", self.labels)
        for name, value in bank.parameters.items():
            self.watch.note(f"the parameter '{name}'", value)
        if source.teacher is not None:
            self.watch.note("the teacher", source.teacher.module)

    def anew(self) -> SharedStep:
        """Returns this step with nothing built but what has no graph: the network, and the real images with their features."""
        found = SharedStep(self.source, self.bank, self.index, self.classes)
        found.network_gradients, found.teacher_gradients = self.network_gradients, self.teacher_gradients
        vars(found).update({name: value for name, value in vars(self).items() if name in ("embedder", "real")})
        return found

    def augment(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        drawn = self.source.augmentation(self.index, "augmentation", self.source.augmenter)
        return self._apply(self.source.augmenter, drawn, x, self.labels if labels is None else labels)

    def _apply(self, augmenter: Augmenter, drawn: Parameters, x: Tensor, labels: Tensor) -> Tensor:
        host = self._on_host(labels)
        with blamed("augmenter", augmenter):
            return augmenter.apply(x, {key: value[host] for key, value in drawn.items()})

    def on_device(self, labels: Tensor) -> Tensor:
        """Returns labels (CPU) on the run's device; augment knows them again without asking the device."""
        moved = to_device(labels, self.source.device)
        self._host_labels.append((moved, labels))
        return moved

    def _on_host(self, labels: Tensor) -> Tensor:
        for known, host in self._host_labels:
            if known is labels:
                return host
        return labels.cpu()  # a loss's own labels

    @cached_property
    def class_slices(self) -> dict[int, slice]:
        return class_slices(self._on_host(self.labels))

    @cached_property
    def augmented(self) -> Tensor:
        return self.watch.noted("the augmented images", self.augment(self.images))

    @cached_property
    def real(self) -> RealStep:
        return RealStep(self)

    @cached_property
    def network(self) -> nn.Module:
        return self.embedder.module

    @cached_property
    def embedder(self) -> Embedder:
        found = self.source.embedder(self.index)
        found.module.requires_grad_(self.network_gradients)
        self.watch.note("the network", found.module)
        return found

    def embed(self, x: Tensor) -> Tensor:
        return self.embedder(x)

    @cached_property
    def embeddings(self) -> Tensor:
        return self.watch.noted("the embeddings", self.embed(self.augmented))

    @property
    def teacher(self) -> Teacher:
        if self.source.teacher is None:
            raise RunFailed("This run has no teacher.")
        return self.source.teacher

    @cached_property
    def teacher_parameters(self) -> Parameters:
        own = self.teacher.parameters
        return {name: value.detach().requires_grad_(self.teacher_gradients) for name, value in own.items()}

    def view(self, name: str) -> View:
        if name not in self._views:
            images = self._view_images(name)
            if images is not self.images and images is not vars(self).get("augmented"):
                self.watch.note(f"the view '{name}'", images)
            self._views[name] = View(images, self.labels, self.teacher.logits(images, self.teacher_parameters))
        return self._views[name]

    def _view_images(self, name: str) -> Tensor:
        if name == "augmented":
            return self.augmented
        spec = self.source.views.get(name)
        if spec is None:
            return self.images  # "raw", and "default" where the recipe defines no other
        drawn = self.source.augmentation(self.index, f"view {name}", spec.augmenter)
        images = self._apply(spec.augmenter, drawn, self.images, self.labels)
        if spec.noise == 0:
            return images
        noise = self.source.noise(self.index, name, self._on_host(self.labels))
        return images + spec.noise * to_device(noise, images.device).to(images.dtype)


class Step:
    """One step as one loss sees it: read-only, holding exactly what the loss declared in `requires`.

    Touching an undeclared member raises an error that names the loss and the member.
    """

    def __init__(self, shared: SharedStep, label: str, requires: Requires) -> None:
        self._shared, self._label, self._requires = shared, label, requires

    def _declared(self, requirement: str, member: str) -> SharedStep:
        if not getattr(self._requires, requirement):
            raise RunFailed(
                f"The loss '{self._label}' uses step.{member}, which it does not declare: "
                f"add {requirement}=True to its ddkit.Requires(...)."
            )
        return self._shared

    @property
    def images(self) -> Tensor:
        """(n, C, H, W) synthetic images, normalised, differentiable."""
        return self._shared.images

    @property
    def labels(self) -> Tensor:
        """(n,) int64, rows grouped by ascending class."""
        return self._shared.labels

    @cached_property
    def targets(self) -> Tensor:
        """(n, K) the labels as rows of probabilities, one-hot, of the images' type."""
        classes = torch.arange(self.info.classes, device=self.labels.device)
        return (self.labels[:, None] == classes).to(self.images.dtype)

    @property
    def class_slices(self) -> Mapping[int, slice]:
        """The rows of each class as a slice, without asking the device."""
        return self._shared.class_slices

    @property
    def size(self) -> int:
        """Rows in the whole synthetic set (n is fewer in a part of it)."""
        return self._shared.size

    @property
    def index(self) -> int:
        """The number of this step, from 0."""
        return self._shared.index

    @property
    def info(self) -> DataInfo:
        """Class names, channels and size of the data."""
        return self._shared.source.info

    def augment(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns x under the step's siamese augmentation: one operation and parameter set per class (None: `labels`)."""
        return self._shared.augment(x, labels)

    @property
    def augmented(self) -> Tensor:
        """The synthetic images under `augment`."""
        return self._shared.augmented

    @cached_property
    def generator(self) -> torch.Generator:
        """A CPU generator keyed by the loss's label and the step."""
        return generator(self._shared.source.seed, "loss", self._label, self.index)

    @overload
    def all_reduce(self, t: Tensor) -> Tensor: ...

    @overload
    def all_reduce(self, t: Sequence[Tensor]) -> list[Tensor]: ...

    def all_reduce(self, t: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Returns t, or each tensor of a sequence of one dtype, summed over all parts that the loss is evaluated on; in a plain run t.

        Gradients flow into this part's t alone, which is what a value that every part computes needs (declare reduce="global").
        """
        tensors = [t] if isinstance(t, Tensor) else list(t)
        sums = self._parted("all_reduce")
        found = tensors if sums is None else list(_Total.apply(sums, *tensors))
        return found[0] if isinstance(t, Tensor) else found

    def all_gather(self, t: Tensor, *, real: bool = False) -> Tensor:
        """Returns the rows t (n, ...) of this part's images (`real`: real images) among those of all parts, in order of class.

        In a plain run t itself. Gradients flow into this part's rows alone, as in `all_reduce`.
        """
        if self._parted("all_gather") is None:
            return t
        size, part = self._place(real)
        return self.all_reduce(torch.cat([t.new_zeros((part.start, *t.shape[1:])), t, t.new_zeros((size - part.stop, *t.shape[1:]))]))

    def local_rows(self, t: Tensor, *, real: bool = False) -> Tensor:
        """Returns this part's rows of t (`size`, ...), which has a row for each image (`real`: real image) of all parts.

        So what is drawn by row does not depend on how the set is parted.
        """
        return t[self._place(real)[1]]

    def _place(self, real: bool) -> tuple[int, slice]:
        """Returns the number of rows in all parts, and which of them are this part's."""
        if real:
            return self._shared.real.size, self._shared.real.part
        first = self._shared.bank.start
        return self.size, slice(first + self._shared.rows.start, first + self._shared.rows.stop)

    def _parted(self, member: str) -> Sums | None:
        """Returns what adds up the parts of the set, None where this is the whole of it.

        Raises RunFailed where the loss would add up but a part of them.
        """
        shared = self._shared
        if self._requires.reduce != "global" and len(shared.labels) < shared.size:
            raise RunFailed(
                f"The loss '{self._label}' uses step.{member}, and it is evaluated on parts of the set: "
                'declare reduce="global" in its ddkit.Requires(...).'
            )
        if self._label in shared.totals:
            return shared.totals[self._label]
        ranks = shared.source.ranks
        return (lambda tensors: ranks.sums(tensors, self._label)) if ranks.size > 1 else None

    def log(self, name: str, value: Tensor) -> None:
        """Records a diagnostic scalar or short vector beside the loss's value in metrics.jsonl."""
        self._shared.logged.setdefault(self._label, {})[name] = value.detach()

    @property
    def real(self) -> RealStep:
        """This step's real images, their labels, augmentation and (declare network) embeddings (declare real)."""
        return _DeclaredReal(self, self._declared("real", "real").real)

    def embed(self, x: Tensor) -> Tensor:
        """Returns features (n, d) of this step's network (declare network)."""
        return self._declared("network", "embed").embed(x)

    @property
    def embeddings(self) -> Tensor:
        """(n, d) features of the augmented synthetic images (declare network)."""
        return self._declared("network", "embeddings").embeddings

    @property
    def network(self) -> nn.Module:
        """This step's network (declare network); its parameters require gradients where second_order is declared."""
        return self._declared("network", "network").network

    @property
    def teacher(self) -> Teacher:
        """The teacher; its module is never updated (declare teacher)."""
        return self._declared("teacher", "teacher").teacher

    @property
    def teacher_parameters(self) -> Mapping[str, Tensor]:
        """The teacher's parameters by name; they require gradients where second_order is declared."""
        return self._declared("teacher", "teacher_parameters").teacher_parameters

    def view(self, name: str) -> View:
        """Returns images, labels and teacher logits of a named view (declare teacher and the view's name in views)."""
        shared = self._declared("teacher", "view")
        if name not in self._requires.views:
            raise RunFailed(f"The loss '{self._label}' uses view '{name}', which it does not declare in ddkit.Requires(views=...).")
        return shared.view(name)

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """The extra parameters that this loss declared, by name."""
        shared, declared = self._shared, self._requires.parameters
        return _DeclaredOnly(
            self._label,
            {
                name: shared.bank.parameters[name][shared.rows] if spec.per == "sample" else shared.bank.parameters[name]
                for name, spec in declared.items()
            },
        )


class _Total(torch.autograd.Function):
    """The sum over all parts of the set; the gradient is that of this part's summand, and is not summed again."""

    @staticmethod
    def forward(ctx: Any, sums: Sums, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(sums(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *gradients)


class _DeclaredReal(RealStep):
    """The shared RealStep as one loss sees it."""

    def __init__(self, step: Step, shared: RealStep) -> None:
        self._own, self._shared = step, shared
        self.images, self.labels, self.class_slices = shared.images, shared.labels, shared.class_slices
        self.size, self.part = shared.size, shared.part

    @property
    def augmented(self) -> Tensor:
        return self._shared.augmented

    @property
    def embeddings(self) -> Tensor:
        self._own._declared("network", "real.embeddings")
        return self._shared.embeddings


class _DeclaredOnly(dict[str, Tensor]):
    def __init__(self, label: str, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self._label = label

    def __missing__(self, name: str) -> Any:
        raise RunFailed(
            f"The loss '{self._label}' uses step.parameters['{name}'], which it does not declare in ddkit.Requires(parameters=...)."
        )
