"""The loop of a run. It knows no loss by name and writes no file:

for each step:
    the network is drawn anew, or trained on the set
    losses that need sums over chunks of classes are evaluated once, to record them
    for each part of the set (all of it, or a chunk of classes):
        step = what is drawn for the part: real images, augmentations, views; built when a loss asks for it
        total = sum of weight * loss(step)
        the gradient of total by images and extra parameters is added up
    update: a step of each parameter's optimizer, then its constraint
    where the step is logged or checkpointed: was everything finite since the last time? then the state is kept
    observe: the record of the step is written
    a signal: the state is saved, and the run ends
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddkit.engine.bank import Bank
from ddkit.engine.chunking import Sums, dependent_sums, parts_of
from ddkit.engine.guards import interruption
from ddkit.engine.labels import SOFT_LABELS, begin_labels, targets_of
from ddkit.engine.losses import WeightedLoss, differentiated
from ddkit.engine.source import StepSource
from ddkit.engine.step import Step
from ddkit.errors import DdkitError, InputError, Interrupted, RunFailed
from ddkit.nn.device import differentiable_attention

Record = dict[str, Any]
Gradient = Sequence[Tensor | None]


class Evaluated(NamedTuple):
    """One step before its update: raw values by loss, the gradient of the weighted sum by parameter, diagnostics by loss.

    `norms`: by loss the norm of its weighted gradient on the images of the whole set, where it was asked for. `differ`: by loss whether
    the sums of its chunks differed between the two passes.
    """

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    logged: dict[str, dict[str, Tensor]]
    norms: dict[str, Tensor]
    differ: dict[str, Tensor]


class Hooks(NamedTuple):
    """What is done beside the steps of a run.

    `observe(index, record)` sees every step (`record()` reads its values back), `save(index)` keeps the state before step `index`.
    `is_read(index)`: whether the step is logged or checkpointed; `is_logged(index)`: whether its record has the norms of gradients.
    """

    observe: Callable[[int, Callable[[], Record]], None] = lambda index, record: None
    save: Callable[[int], None] = lambda index: None
    is_read: Callable[[int], bool] = lambda index: True
    is_logged: Callable[[int], bool] = lambda index: False


def distill(engine: Engine, start: int, stop: int, hooks: Hooks = Hooks(), *, dry: bool = False) -> Evaluated | None:  # noqa: B008
    """Takes the steps start..stop-1; `dry`: returns what step `start` computes, and changes nothing.

    A value that is not finite, a loss that raises, or a signal saves the last good state, then raises.
    """
    bank, finite = engine.bank, Finiteness(engine, start, hooks.save)
    zero = bank.images.new_zeros(())
    with interruption() as signals:
        for index in range(start, stop):
            with finite.around(index), differentiable_attention(engine.second_order):
                engine.source.networks.advance(index, partial(engine.whole_set, index))
                found = Evaluated({}, {}, {}, {}, {})
                sums = engine.record_sums(index)
                for classes, losses in engine.parts:
                    step = Step(engine.source, bank, index, classes, losses, sums=sums, logged=found.logged)
                    values = {each.label: each.value(step.for_loss(each), watched=index == 0) for each in losses}
                    total = sum((each.weight * values[each.label] for each in losses), zero)
                    with differentiated(losses):
                        gradient = torch.autograd.grad(total, list(bank.tensors().values()), allow_unused=True)
                    engine.add(found, losses, values, gradient)
                    if hooks.is_logged(index):
                        engine.measure(found, step, classes, losses, sums, gradient)
                engine.complete(found, sums)
                if dry and signals:
                    raise Interrupted("Interrupted before the first step.", 128 + signals[0])
                if dry:
                    return found
                bank.update(found.gradients)
            finite.note(index, found)
            if hooks.is_read(index) or index == stop - 1:
                finite.check(index + 1)
            hooks.observe(index, partial(record_of, index, engine.losses, found))
            signalled = engine.ranks.max(signals[0] if signals else 0)
            if signalled:
                finite.check(index + 1)
                hooks.save(index + 1)
                raise Interrupted(f"Interrupted after step {index + 1} of {stop}.", 128 + signalled)
    return None


class Engine:
    """What the loop works with: the set, what its steps draw, and the losses in order of label, in chunks of `chunk` classes (0: all)."""

    def __init__(self, bank: Bank, source: StepSource, losses: Sequence[WeightedLoss], *, chunk: int = 0) -> None:
        self.bank = bank
        self.source = source
        self.ranks = source.draws.ranks
        self.losses = sorted(losses, key=lambda each: each.label)
        most = -(-source.draws.info.classes // self.ranks.world_size)  # classes of a process: all of them do chunks, or none does
        self.parts = parts_of(self.losses, chunk if chunk < most else 0, source.draws.own_classes)
        self.second_order = any(each.requires.second_order for each in self.losses)

    def start(self, labels: Tensor | None = None) -> None:
        """Fills learned labels, and the extra parameters whose initial values a loss computes from the first step.

        `labels` (n, K): what learned labels begin as, if the initializer has them.
        """
        begin_labels(self.source, self.bank, labels)
        with differentiable_attention(self.second_order):
            step = Step(self.source, self.bank, 0, None, self.losses)
            for each in self.losses:
                with each.blamed():
                    self._fill(each, each.loss.initial(step.for_loss(each)))

    def _fill(self, weighted: WeightedLoss, values: Mapping[str, Tensor]) -> None:
        declared = weighted.requires.parameters
        for name, value in values.items():
            if name not in declared:
                raise RunFailed(
                    f"The {weighted} returns initial values of '{name}'. Declare this parameter in its ddkit.Requires(parameters=...)."
                )
            self.bank.fill(name, value)
            if not self.ranks.all(bool(self.bank.parameters[name].isfinite().all())):
                raise RunFailed(f"The {weighted} returns initial values of '{name}' that are not finite.")
            if declared[name].per == "set":
                self.ranks.check_same(f"The initial value of '{name}' from the {weighted}", self.bank.parameters[name].tolist())

    def state(self, index: int) -> dict[str, Tensor]:
        """Returns copies of all that an exact continuation at step `index` needs: the bank, and a network that was trained."""
        return self.bank.state() | self.source.networks.state(index)

    def load_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Continues at step `index` from what state(index) returned; raises KeyError or ValueError where it does not fit."""
        self.bank.load_state(state)
        self.source.networks.load_state(index, state)

    def evaluate(self, index: int, *, measured: bool = False) -> Evaluated:
        """Returns values, gradients and diagnostics of step `index`, and if `measured` the norms of the losses' gradients."""
        found = distill(self, index, index + 1, Hooks(is_logged=lambda index: measured), dry=True)
        assert found is not None
        return found

    def whole_set(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the images (n, C, H, W) of all processes before step `index`, and their labels: hard ones (n,), or others (n, K)."""
        bank, rows = self.bank, self.bank.rows(None)
        images = self.ranks.all_gather(bank.decoded(rows), "the network's training")
        hard = self.source.labels.kind == "hard"
        labels = bank.decoded_labels if hard else targets_of(self.source, bank, index, rows).detach()
        return images, self.ranks.all_gather(labels, "the network's training")

    def record_sums(self, index: int) -> dict[str, Sums]:
        """Returns what losses add up over all chunks, by label: the first of two passes over these losses."""
        chunks = [classes for classes, _ in self.parts if classes is not None]
        losses = [each for each in self.losses if chunks and each.requires.reduce == "global"]
        sums = {each.label: Sums(each) for each in losses}
        for classes in chunks if losses else ():
            step = Step(self.source, self.bank, index, classes, losses, sums=sums)
            for each in losses:
                each.value(step.for_loss(each))
        for own in sums.values():
            own.settle(self.ranks)
        return sums

    def add(self, found: Evaluated, losses: Sequence[WeightedLoss], values: Mapping[str, Tensor], gradient: Gradient) -> None:
        """Adds the values and the gradient of a part of the set."""
        for each in losses:
            value = values[each.label].detach()
            summed = each.label in found.values and each.requires.reduce != "global"  # of which each part has the whole value
            found.values[each.label] = found.values[each.label] + value if summed else value
        for name, part in zip(self.bank.tensors(), gradient, strict=True):
            if part is not None:
                found.gradients[name] = found.gradients[name] + part if name in found.gradients else part

    def measure(
        self,
        found: Evaluated,
        step: Step,
        classes: range | None,
        losses: Sequence[WeightedLoss],
        sums: Mapping[str, Sums],
        gradient: Gradient,
    ) -> None:
        """Adds the squared norm of the gradient on the images of each weighted loss alone. Parts have images of their own.

        Each loss is evaluated once more: compiled code gives its buffers away in the first pass through a graph, so a graph has one.
        """
        zero = self.bank.images.new_zeros(())
        for each in losses:
            own = gradient[0]  # of the images
            if len(losses) > 1:
                anew = Step(self.source, self.bank, step.index, classes, losses, sums=sums, like=step)
                with differentiated([each]):
                    own = torch.autograd.grad(each.weight * each.value(anew.for_loss(each)), self.bank.images, allow_unused=True)[0]
            found.norms[each.label] = found.norms.get(each.label, zero) + (zero if own is None else own.square().sum())

    def complete(self, found: Evaluated, sums: Mapping[str, Sums]) -> None:
        """Makes what was added up over the parts of the set that of all of it: sums over the processes, roots, zeros."""
        if SOFT_LABELS in self.bank.parameters and SOFT_LABELS not in found.gradients:
            raise InputError(
                f"labels.kind = learned: none of the losses ({', '.join(each.label for each in self.losses)}) uses the labels "
                "(step.targets), so they would not change. Add a loss that uses them, for example feature-regression, or use --set "
                "labels.kind=teacher.",
                "labels.kind",
            )
        for name, tensor in self.bank.tensors().items():
            found.gradients.setdefault(name, torch.zeros_like(tensor))
        for label, own in sums.items():
            differences = own.differences()
            if differences:
                found.differ[label] = torch.stack(differences).any()
        if self.ranks.world_size > 1:
            apart = [each.label for each in self.losses if each.requires.reduce != "global"]
            shared = [name for name, spec in self.bank.declared.items() if spec.per == "set"]
            self._sum({label: found.values[label].double() for label in apart}, found.values, "values")
            self._sum({name: found.gradients[name] for name in shared}, found.gradients, "shared parameters")
            self._sum(found.norms, found.norms, "values")
        for label, square in found.norms.items():
            found.norms[label] = square.sqrt()

    def _sum(self, own: Mapping[str, Tensor], found: dict[str, Tensor], purpose: str) -> None:
        """Puts the sums of `own` over all processes into `found`."""
        if own:
            found.update(zip(own, self.ranks.all_reduce(list(own.values()), purpose), strict=True))


class Finiteness:
    """Knows what was first not finite, and at which step, without asking the device at every step.

    That is kept on the device: for each loss, and for each parameter of the set, the first step at which it, its gradient or its
    optimizer's state was not finite. It is read at logged and checkpointed steps, where the state is kept too: if something went wrong
    since, the state of the last such step is loaded and saved, and RunFailed raised.
    """

    def __init__(self, engine: Engine, start: int, save: Callable[[int], None]) -> None:
        self.engine = engine
        self.save = save
        self.losses = [each.label for each in engine.losses]
        self.parameters = list(engine.bank.tensors())
        self.index = start  # the last step that was read to be finite
        self.state = engine.state(start)
        device = engine.bank.images.device
        self.values = torch.zeros(len(self.losses), device=device)  # of each loss, where it was first not finite
        self.first = torch.full((2 * len(self.losses) + len(self.parameters),), -1, device=device)  # step, -1: finite so far

    def note(self, index: int, found: Evaluated) -> None:
        """Adds what step `index` computed, and the bank after its update."""
        bank = self.engine.bank
        values = torch.stack([found.values[label].float() for label in self.losses])
        fine = [all_finite([found.gradients[name], *bank.kept(name)]) for name in self.parameters]
        never = torch.zeros_like(fine[0])
        bad = torch.cat([~values.isfinite(), ~torch.stack(fine), torch.stack([found.differ.get(label, never) for label in self.losses])])
        new = bad & (self.first < 0)
        self.values = torch.where(new[: len(values)], values, self.values)
        self.first = torch.where(new, index, self.first)

    def check(self, index: int) -> None:
        """Makes the state before step `index` the one that is kept; raises RunFailed if something was not finite since the last."""
        if not self.engine.ranks.all(bool((self.first < 0).all())):
            self._fail()
        self.index = index
        self.state = self.engine.state(index)

    def _fail(self) -> None:
        engine = self.engine
        found = engine.ranks.all_gather_object([self.first.tolist(), [str(value) for value in self.values.tolist()]])
        entries = [(step, place, rank) for rank, (first, _) in enumerate(found) for place, step in enumerate(first) if step >= 0]
        step, place, rank = min(entries)
        engine.load_state(self.index, self.state)
        kept = f"The state after step {self.index - 1}, the last checked step, is kept in checkpoints/. " if self.index else ""
        if place < len(self.losses):
            loss = engine.losses[place]
            smaller = f"a smaller learning rate ({engine.bank.smaller_rate('images')}"
            smaller += f"{', or a smaller network.inner_lr' if engine.source.networks.inner else ''}), a smaller weight"
            first = (
                "No update was made before: look at its formula, for example a variance of one image. Or try"
                if step == 0
                else f"Try {smaller}, or"
            )
            message = (
                f"The value of the {loss} became {found[rank][1][place]} at step {step}. {kept}{first} float32 "
                f"(--set engine.precision=float32).{loss.advice}"
            )
        elif place < len(self.losses) + len(self.parameters):
            name = self.parameters[place - len(self.losses)]
            message = (
                f"The update of step {step} made values of '{name}' that are not finite, although every loss was finite "
                f"({', '.join(self.losses)}). {kept}Try a smaller learning rate: {engine.bank.smaller_rate(name)}, or smaller weights "
                "of the losses."
            )
        else:
            message = f"{dependent_sums(engine.losses[place - len(self.losses) - len(self.parameters)])} {kept}".rstrip()
        self.save(self.index)
        raise RunFailed(message)  # every process of a run does, at the same step

    @contextmanager
    def around(self, index: int) -> Iterator[None]:
        """Saves the state before step `index` where the step inside raises a DdkitError.

        One of several processes cannot do that alone: the newest checkpoint is what stays.
        """
        try:
            yield
        except DdkitError:
            if self.engine.ranks.world_size == 1:
                if index > self.index:
                    self.check(index)  # if values were not finite, they are the cause, and are reported
                self.save(index)
            raise


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Returns whether every value of `tensors` is finite, as a boolean scalar on their device: nothing is read back."""
    return torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all()


def record_of(index: int, losses: Sequence[WeightedLoss], found: Evaluated) -> Record:
    """Returns the record of step `index` for metrics.jsonl; its values are read back."""
    raw = {each.label: float(found.values[each.label]) for each in losses}
    by_loss = {each.label: {"raw": raw[each.label], "weighted": each.weight * raw[each.label]} for each in losses}
    for label, norm in found.norms.items():
        by_loss[label]["gradient"] = float(norm)
    record: Record = {"step": index, "total": sum(each["weighted"] for each in by_loss.values()), "losses": by_loss}
    if found.logged:
        logged = sorted(found.logged.items())
        record["logged"] = {label: {name: value.tolist() for name, value in items.items()} for label, items in logged}
    return record
