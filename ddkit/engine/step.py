"""One step as losses see it: everything they declared, each thing built when it is first used, once, and shared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Self, TypeVar, overload

import torch
from torch import Tensor, nn

from ddkit.components.base import DataInfo
from ddkit.components.guard import Watch
from ddkit.distributed import class_rows
from ddkit.engine.bank import Bank
from ddkit.engine.chunking import Exchange, Sums
from ddkit.engine.draws import class_slices
from ddkit.engine.labels import targets_of
from ddkit.engine.losses import WeightedLoss
from ddkit.engine.source import StepSource
from ddkit.errors import RunFailed
from ddkit.nn.device import to_device
from ddkit.nn.embedder import Embedder
from ddkit.nn.experts import Trajectory
from ddkit.nn.teacher import Teacher
from ddkit.seeding import generator

T = TypeVar("T")


def _member(needs: str = "", watched: str = "") -> Callable[[Callable[[Any], T]], T]:
    """Makes a read-only member of a step of the function that builds it: on first use, once, whatever the number of losses.

    A loss that does not declare `needs` gets an error. What losses may not write to is watched under the name `watched`.
    """

    def member(build: Callable[[Any], T]) -> property:
        name = build.__name__

        def get(step: Any) -> T:
            step._declared(needs, name)
            if name not in step._built:
                step._built[name] = made = build(step)
                if watched:
                    step._watch.note(watched, made)
            found: T = step._built[name]
            return found

        return property(get, doc=build.__doc__)

    return member  # type: ignore[return-value]  # for who reads a member it is what is built


class View(NamedTuple):
    """A named view of the synthetic set: images (n, C, H, W), labels (n,), teacher_logits (n, K)."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor


class ExpertStep:
    """The experts of a step."""

    def __init__(self, source: StepSource, index: int, watch: Watch) -> None:
        self._source = source
        self._index = index
        self._watch = watch

    def draw(self, span: int = 0, *, first: int = 0, last: int | None = None) -> Trajectory:
        """Returns `expert`, `epoch` t, and by name the weights and buffers at t (`start`) and at t + `span` (`end`), without gradients.

        The expert and t, from the saved epochs `first` to `last` (None: the last that has a later one), are a function of seed and
        step. Raises InputError where no two saved epochs are so. To differentiate by the weights, make leaves of them.
        """
        found = self._source.networks.trajectory(self._index, span, first, last)
        for part in (found.start, found.end):
            for name, value in part.items():
                self._watch.note(f"the experts' {name}", value)
        return found


class RealStep:
    """The real images of a step, of this part of the set; `size` is their number in all parts."""

    def __init__(self, source: StepSource, index: int, classes: range, embedder: Callable[[], Embedder], watch: Watch) -> None:
        drawn = source.draws.real_rows(index)
        labels = source.draws.real_labels[drawn]
        self.size = len(drawn)
        self.part = class_rows(labels, classes)
        self._rows = drawn[self.part]
        self._host_labels = labels[self.part]
        self._source = source
        self._index = index
        self._embedder = embedder
        self._watch = watch
        self._built: dict[str, Any] = {}
        self._check: Callable[[str, str], None] = lambda needs, member: None

    def for_loss(self, check: Callable[[str, str], None]) -> Self:
        """Returns them as a loss sees them: `check(needs, member)` raises where it does not declare what a member needs."""
        seen = copy.copy(self)
        seen._check = check
        return seen

    def _declared(self, needs: str, member: str) -> None:
        self._check(needs, f"real.{member}")

    @_member(watched="the real images")
    def images(self) -> Tensor:
        """(m, C, H, W) normalised."""
        return self._source.draws.real_of(self._rows)

    @_member(watched="the real labels")
    def labels(self) -> Tensor:
        """(m,) int64, ascending."""
        return to_device(self._host_labels, self._source.draws.device)

    @_member()
    def class_slices(self) -> Mapping[int, slice]:
        """The rows of each class as a slice, without waiting for the device."""
        return class_slices(self._host_labels)

    @_member(watched="the augmented real images")
    def augmented(self) -> Tensor:
        """The real images under the step's augmentation."""
        return self._source.draws.augmented(self._index, self.images, self._host_labels)

    @_member(needs="network", watched="the real images' embeddings")
    def embeddings(self) -> Tensor:
        """(m, d) features of the augmented real images, without a graph (declare network)."""
        with torch.no_grad():
            return self._embedder()(self.augmented)

    @_member(needs="second_order")
    def class_gradients(self) -> Mapping[int, Sequence[Tensor]]:
        """For each class that has real images `step.class_gradients` of its augmented real images, without a graph."""
        differentiated = self._source.networks.class_gradients(self._embedder().module)
        return differentiated(self.augmented.detach(), self.labels, self.class_slices, real=True)

    @_member(watched="the real images of all parts")
    def all_images(self) -> Tensor:
        """(size, C, H, W) the real images of all parts of the set, in order of class."""
        return self.images if len(self._rows) == self.size else self._source.draws.all_real(self._index)

    @_member(watched="the real labels of all parts")
    def all_labels(self) -> Tensor:
        """(size,) int64, ascending: the labels of `all_images`."""
        draws = self._source.draws
        return to_device(draws.real_labels[draws.real_rows(self._index)], draws.device)


class Step:
    """One step, for all classes of this process or for some. A loss sees it through `for_loss`: read-only, with the members it declares.

    Using a member that the loss does not declare raises an error that names the loss and the member.

    Examples:
        >>> class Features(ddkit.Loss):
        ...     '''Squared distance of class-mean features: distribution matching in four lines.'''
        ...     requires = ddkit.Requires(real=True, network=True, reduce="sum")
        ...     def __call__(self, step: ddkit.Step) -> torch.Tensor:
        ...         rows, real = step.class_slices, step.real.class_slices
        ...         means = [step.embeddings[rows[c]].mean(0) - step.real.embeddings[real[c]].mean(0) for c in rows]
        ...         return torch.stack(means).square().sum()
    """

    def __init__(
        self,
        source: StepSource,
        bank: Bank,
        index: int,
        classes: range | None = None,
        losses: Sequence[WeightedLoss] = (),
        *,
        sums: Mapping[str, Sums] | None = None,
        logged: dict[str, dict[str, Tensor]] | None = None,
        like: Step | None = None,
    ) -> None:
        """`losses` are to see it; `sums` are, by label of a loss, those over chunks of classes; `logged` takes what losses log.

        `like`: a step that was evaluated already, and is evaluated once more; what has no graph, network and real images, is its.
        """
        self._source = source
        self._bank = bank
        self._index = index
        self._losses = losses
        self._sums = sums or {}
        self._counted = like is None
        self._classes = source.draws.own_classes if classes is None else classes
        self._rows = bank.rows(classes)
        self._host_labels = bank.host_labels[self._rows]
        kept = ("real", "_embedder", "network")
        self._built: dict[str, Any] = {} if like is None else {name: made for name, made in like._built.items() if name in kept}
        self._logged = {} if logged is None else logged
        self._watch = Watch()
        for name, tensor in bank.parameters.items():
            self._watch.note(f"the parameter '{name}'", tensor)
        self._loss: WeightedLoss | None = None  # that sees it
        self._exchange: Exchange | None = None

    def for_loss(self, weighted: WeightedLoss) -> Self:
        """Returns the step as one loss sees it in one evaluation. Values that were computed are shared with the other losses."""
        seen, ranks = copy.copy(self), self._source.draws.ranks
        seen._loss = weighted
        if weighted.label in self._sums:
            seen._exchange = self._sums[weighted.label].calls(counted=self._counted)
        elif ranks.world_size > 1:
            seen._exchange = lambda tensors: ranks.all_reduce(tensors, weighted.label)
        return seen

    def _declared(self, needs: str, member: str) -> None:
        """Raises RunFailed where the loss uses `member` and does not declare what it `needs`."""
        if needs and self._loss is not None and not getattr(self._loss.requires, needs):
            raise RunFailed(
                f"The loss '{self._loss.label}' uses step.{member}, which it does not declare. Add {needs}=True to its ddkit.Requires(...)."
            )

    @property
    def size(self) -> int:
        """Number of images in the whole synthetic set (a part of it has fewer)."""
        return self._bank.size

    @property
    def index(self) -> int:
        """The number of this step, from 0."""
        return self._index

    @property
    def info(self) -> DataInfo:
        """Class names, channels and size of the data."""
        return self._source.draws.info

    @_member(watched="the images")
    def images(self) -> Tensor:
        """(n, C, H, W) synthetic images, normalised, differentiable."""
        return self._bank.decoded(self._rows)

    @_member(watched="the labels")
    def labels(self) -> Tensor:
        """(n,) int64, the classes of the images, rows grouped by ascending class."""
        return self._bank.decoded_labels[self._rows]

    @_member(watched="the targets")
    def targets(self) -> Tensor:
        """(n, K) the labels as rows of probabilities, of the images' type: one-hot, the teacher's, or learned and differentiable."""
        return targets_of(self._source, self._bank, self._index, self._rows)

    @_member()
    def class_slices(self) -> Mapping[int, slice]:
        """The rows of each class as a slice, without waiting for the device."""
        return class_slices(self._host_labels)

    def augment(self, x: Tensor, labels: Tensor | None = None, *, draw: int = 0) -> Tensor:
        """Returns x under the step's siamese augmentation: one operation and parameter set per class (None: `labels`).

        Each `draw` from 0 on is another augmentation in the same step, for a loss that trains a network on the set.
        """
        return self._source.draws.augmented(self._index, x, self._host_labels if labels is None else labels.cpu(), draw=draw)

    @_member(watched="the augmented images")
    def augmented(self) -> Tensor:
        """The synthetic images under `augment`."""
        return self.augment(self.images)

    @cached_property
    def generator(self) -> torch.Generator:
        """A CPU generator keyed by the loss's label and the step."""
        assert self._loss is not None
        return generator(self._source.draws.seed, "loss", self._loss.label, self._index)

    @overload
    def all_reduce(self, t: Tensor) -> Tensor: ...

    @overload
    def all_reduce(self, t: Sequence[Tensor]) -> list[Tensor]: ...

    def all_reduce(self, t: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Returns t, or each tensor of a sequence of one dtype, summed over all parts of the set; in a plain run t itself.

        Gradients only flow into the t of this part, as needed for a value that every part computes (declare reduce="global").
        """
        self._may_exchange("all_reduce")
        tensors = [t] if isinstance(t, Tensor) else list(t)
        found = tensors if self._exchange is None else list(_Summed.apply(self._exchange, *tensors))
        return found[0] if isinstance(t, Tensor) else found

    def all_gather(self, t: Tensor, *, real: bool = False) -> Tensor:
        """Returns the rows t (n, ...) of this part's images (`real`: real images) among those of all parts, in order of class.

        In a plain run t itself. Gradients only flow into the rows of this part, as in `all_reduce`.
        """
        self._may_exchange("all_gather")
        if self._exchange is None:
            return t
        size, part = self._place(real)
        return self.all_reduce(torch.cat([t.new_zeros((part.start, *t.shape[1:])), t, t.new_zeros((size - part.stop, *t.shape[1:]))]))

    def local_rows(self, t: Tensor, *, real: bool = False) -> Tensor:
        """Returns this part's rows of t (`size`, ...), which has a row for each image (`real`: real image) of all parts.

        So random numbers drawn by row do not depend on how the set is divided.
        """
        return t[self._place(real)[1]]

    def _place(self, real: bool) -> tuple[int, slice]:
        """Returns the number of rows in all parts, and which of them are this part's."""
        if real:
            return self.real.size, self.real.part
        first = self._bank.start
        return self.size, slice(first + self._rows.start, first + self._rows.stop)

    def _may_exchange(self, member: str) -> None:
        """Raises RunFailed where the loss would add up some of the parts alone."""
        if self._loss is not None and self._loss.requires.reduce != "global" and len(self._host_labels) < self.size:
            raise RunFailed(
                f"The loss '{self._loss.label}' uses step.{member}, but is evaluated on parts of the set. "
                'Add reduce="global" to its ddkit.Requires(...).'
            )

    def log(self, name: str, value: Tensor) -> None:
        """Records a diagnostic scalar or short vector with the value of the loss in metrics.jsonl."""
        assert self._loss is not None
        self._logged.setdefault(self._loss.label, {})[name] = value.detach()

    def _differentiates(self, needs: str) -> bool:
        """Whether a loss asks for gradients by the parameters of what it `needs`, the network or the teacher."""
        return any(getattr(each.requires, needs) and each.requires.second_order for each in self._losses)

    @property
    def real(self) -> RealStep:
        """This step's real images, their labels, augmentation and (declare network) embeddings (declare real)."""
        self._declared("real", "real")
        if "real" not in self._built:
            embedder = partial(self._source.networks.at, self._index, gradients=self._differentiates("network"))
            self._built["real"] = RealStep(self._source, self._index, self._classes, embedder, self._watch)
        real: RealStep = self._built["real"]
        return real.for_loss(self._declared)

    @_member(needs="network")
    def _embedder(self) -> Embedder:
        return self._source.networks.at(self._index, gradients=self._differentiates("network"))

    @_member(needs="network", watched="the network")
    def network(self) -> nn.Module:
        """This step's network (declare network); its parameters require gradients if second_order is declared."""
        return self._embedder.module

    def embed(self, x: Tensor) -> Tensor:
        """Returns features (n, d) of this step's network (declare network)."""
        self._declared("network", "embed")
        return self._embedder(x)

    @_member(needs="network", watched="the embeddings")
    def embeddings(self) -> Tensor:
        """(n, d) features of the augmented synthetic images (declare network)."""
        return self.embed(self.augmented)

    @_member(needs="second_order")
    def class_gradients(self) -> Mapping[int, Sequence[Tensor]]:
        """For each class the gradients, by the parameters of `network` in their order, of the mean cross-entropy of its augmented images.

        The network is in evaluation mode. The gradients are differentiable by the images (declare network and second_order).
        """
        differentiated = self._source.networks.class_gradients(self.network)
        return differentiated(self.augmented, self.labels, self.class_slices, real=False)

    @_member(needs="teacher")
    def teacher(self) -> Teacher:
        """The teacher; its module is never updated (declare teacher)."""
        if self._source.teacher is None:
            raise RunFailed("This run has no teacher.")
        self._watch.note("the teacher", self._source.teacher.module)
        return self._source.teacher

    @_member(needs="teacher")
    def teacher_parameters(self) -> Mapping[str, Tensor]:
        """The teacher's parameters by name; they require gradients if second_order is declared."""
        gradients = self._differentiates("teacher")
        return {name: value.detach().requires_grad_(gradients) for name, value in self.teacher.parameters.items()}

    @_member(needs="experts")
    def experts(self) -> ExpertStep:
        """Networks trained on real images, with their weights at several epochs; `draw` returns those of one network (declare experts)."""
        return ExpertStep(self._source, self._index, self._watch)

    def view(self, name: str) -> View:
        """Returns images, labels and teacher logits of a named view (declare teacher and the view's name in views)."""
        self._declared("teacher", "view")
        if self._loss is not None and name not in self._loss.requires.views:
            raise RunFailed(
                f"The loss '{self._loss.label}' uses the view '{name}', which it does not declare. Add it to its ddkit.Requires(views=...)."
            )
        key = f"the view '{name}'"
        if key not in self._built:
            viewed = self._source.draws.viewed
            images = self.augmented if name == "augmented" else viewed(self._index, name, self.images, self._host_labels)
            self._watch.note(key, images)
            twice = self._source.twice if any(each.requires.second_order and name in each.requires.views for each in self._losses) else None
            logits = (twice or self.teacher.logits)(images, self.teacher_parameters)
            self._built[key] = View(images, self.labels, logits)
        found: View = self._built[key]
        return found

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The extra parameters that this loss declared, by name."""
        assert self._loss is not None
        found = _Declared(self._loss.label)
        for name, spec in self._loss.requires.parameters.items():
            tensor = self._bank.parameters[name]
            found[name] = tensor[self._rows] if spec.per == "sample" else tensor
        return found


class _Summed(torch.autograd.Function):
    """The sum over all parts of the set; the gradient is that of this part's summand, and is not summed again."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(exchange(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *gradients)


class _Declared(dict[str, Tensor]):
    def __init__(self, label: str) -> None:
        self.label = label

    def __missing__(self, name: str) -> Any:
        raise RunFailed(
            f"The loss '{self.label}' uses step.parameters['{name}'], which it does not declare. Add it to its "
            "ddkit.Requires(parameters=...)."
        )
