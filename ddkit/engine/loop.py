"""The loop: iterate over the bank, sum the weighted losses, update. It knows no loss by name."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddkit.components.globalstate import random_states
from ddkit.components.guard import check_random_states
from ddkit.distributed import ending_signals
from ddkit.engine.bank import Bank, all_finite
from ddkit.engine.chunking import Totals
from ddkit.engine.draws import StepSource
from ddkit.engine.losses import WeightedLoss
from ddkit.engine.step import SharedStep, Step
from ddkit.errors import DdkitError, Interrupted, RunFailed, is_its_own, shown, told
from ddkit.nn.device import differentiable_attention

Record = dict[str, Any]
MOST_PASSES = 6  # ddkit's own losses need one or two


class Evaluated(NamedTuple):
    """One step before its update: raw values by loss, the gradient of the weighted sum by parameter, diagnostics by loss.

    `norms`: by loss the norm of its weighted gradient on the images of the whole set, where it was asked for.
    """

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    logged: dict[str, dict[str, Tensor]]
    norms: dict[str, Tensor]


class Engine:
    """Distils: `terms` in order of label, those with `reduce` in chunks of `chunk` classes (0: all at once)."""

    def __init__(self, bank: Bank, source: StepSource, terms: Sequence[WeightedLoss], *, chunk: int = 0) -> None:
        self.bank, self.source, self.terms = bank, source, sorted(terms, key=lambda term: term.label)
        self.ranks = source.ranks
        most = -(-source.info.classes // self.ranks.size)  # classes of a process: all of them do chunks, or none does
        self.parts = _parts(self.terms, chunk if chunk < most else 0, source.own_classes)
        self._second_order = any(term.loss.requires.second_order for term in self.terms)
        self._chunks = [classes for classes, _ in self.parts if classes is not None]
        self._totalling = [term for term in self.terms if self._chunks and term.loss.requires.reduce == "global"]
        self._passes = 1  # over all chunks, until what their losses total is known; more where a step shows that it takes more

    def start(self) -> None:
        """Fills the extra parameters whose initial values a loss computes from the first step."""
        with differentiable_attention(self._second_order):
            shared = self._shared(0, None, self.terms)
            for term in self.terms:
                _calling(term, lambda t=term: self._fill(t, shared))  # type: ignore[misc]

    def _fill(self, term: WeightedLoss, shared: SharedStep) -> None:
        requires = term.loss.requires
        for name, value in term.loss.initial(Step(shared, term.label, requires)).items():
            if name not in requires.parameters:
                raise RunFailed(
                    f"The {term} gives initial values of '{name}', which it does not declare in ddkit.Requires(parameters=...)."
                )
            self.bank.fill(name, value)
            if not self.ranks.all(bool(self.bank.finite())):
                raise RunFailed(f"The {term} gives initial values of '{name}' that are not finite.")
            if requires.parameters[name].per == "set":
                self.ranks.same(f"The initial value of '{name}' that the {term} gives", self.bank.parameters[name].tolist())

    def state(self, index: int) -> dict[str, Tensor]:
        """Returns copies of all that an exact continuation at step `index` needs: the bank, and a network that was trained."""
        return self.bank.state() | self.source.network_state(index)

    def load_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Continues at step `index` from what state(index) returned; raises KeyError or ValueError where it does not fit."""
        self.bank.load_state(state)
        self.source.load_network(index, state)

    def run(
        self,
        start: int,
        steps: int,
        *,
        observe: Callable[[int, Callable[[], Record]], None],
        save: Callable[[int], None],
        is_read: Callable[[int], bool] = lambda index: True,
        is_logged: Callable[[int], bool] = lambda index: False,
    ) -> None:
        """Runs steps start..steps-1.

        `observe(index, record)` sees every step (`record()` reads its values back); `save(index)` keeps the state before
        step `index`. `is_read(index)`: whether the step is logged or checkpointed. Only there, and before a return, the
        device is asked whether all values were finite; where they were not, the steps since are taken again one by one.
        `is_logged(index)`: whether the record of the step has the norms of the terms' gradients.
        A non-finite value, a loss that raises, or a signal saves the last good state, then raises.
        """
        guard = _Guard(self, start, save)
        with _interruption() as stop:
            for index in range(start, steps):
                with guard.around(index):
                    found = self.evaluate(index, measured=is_logged(index))
                    self.bank.update(found.gradients)
                    guard.note(found)
                if is_read(index) or index == steps - 1:
                    found = guard.check(index + 1, measured=is_logged(index)) or found
                observe(index, lambda: _record(index, self.terms, found))  # noqa: B023 (read at once)
                signalled = self.ranks.agreed(stop[0] if stop else 0)
                if signalled:
                    guard.check(index + 1)
                    save(index + 1)
                    raise Interrupted(f"Interrupted after step {index + 1} of {steps}.", 128 + signalled)

    def evaluate(self, index: int, *, measured: bool = False) -> Evaluated:
        """Returns values, gradients and diagnostics of step `index`, and if `measured` the norms of the terms' gradients."""
        with differentiable_attention(self._second_order):
            self.source.advance(index, self._whole_set)
            return self._evaluated_in_passes(index, measured) if self._totalling else self._evaluated(index, {}, measured)

    def _evaluated_in_passes(self, index: int, measured: bool) -> Evaluated:
        """Returns what `evaluate` does, where losses total over the chunks: once their totals are those of the whole set."""
        while True:
            totals = self._totals(index)
            found = self._evaluated(index, totals, measured)
            exactly = self.bank.images.device.type == "cpu" and self._passes < MOST_PASSES  # a GPU may add up in another order
            if self.ranks.all(all([each.held(exactly=exactly) for each in totals.values()])):
                return found
            if self._passes == MOST_PASSES:
                raise RunFailed(
                    f"What the losses {', '.join(totals)} give step.all_reduce did not settle in {MOST_PASSES} passes over the "
                    "chunks of the set. It may depend on a few earlier totals, and on no random draw but those of step.generator. "
                    "Use --set engine.chunk=0."
                )
            self._passes += 1

    def _totals(self, index: int) -> dict[str, Totals]:
        """Returns what losses total over all chunks, by label, after as many passes over the chunks as are thought to be needed."""
        totals = {term.label: Totals(term.label) for term in self._totalling}
        for _ in range(self._passes):
            for classes in self._chunks:
                shared = self._shared(index, classes, self._totalling)
                for term in self._totalling:
                    totals[term.label].begin()
                    shared.totals[term.label] = totals[term.label].record
                    self._value(term, shared)
            for each in totals.values():
                each.settle(self.ranks)
        return totals

    def _evaluated(self, index: int, totals: Mapping[str, Totals], measured: bool) -> Evaluated:
        """Returns what `evaluate` does; `totals` are known, by label, of losses that are done in chunks and need some."""
        values: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        logged: dict[str, dict[str, Tensor]] = {}
        squares: dict[str, Tensor] = {}
        tensors, zero = self.bank.tensors(), self.bank.images.new_zeros(())
        for classes, terms in self.parts:
            shared = self._shared(index, classes, terms)
            total: Tensor | None = None
            for term in terms:
                if term.label in totals:
                    totals[term.label].begin()
                    shared.totals[term.label] = totals[term.label].replay
                value = self._value(term, shared)
                summed = term.label in values and term.label not in totals  # each part has the whole value of a loss with totals
                values[term.label] = values[term.label] + value.detach() if summed else value.detach()
                total = term.weight * value if total is None else total + term.weight * value
            logged.update(shared.logged)
            assert total is not None
            parts = self._gradients(total, list(tensors.values()))
            for name, part in zip(tensors, parts, strict=True):
                if part is not None:
                    gradients[name] = gradients[name] + part if name in gradients else part
            if measured:
                apart = self._apart(shared, terms, totals) if len(terms) > 1 else {terms[0].label: parts[0]}
                for label, own in apart.items():  # parts have images of their own, so the squares add up
                    squares[label] = squares.get(label, zero) + (zero if own is None else own.square().sum())
        for name, tensor in tensors.items():
            gradients.setdefault(name, torch.zeros_like(tensor))
        norms = self._norms(squares) if measured else {}
        return Evaluated(self._summed(values), gradients | self._of_the_whole_set(gradients), logged, norms)

    def _apart(self, shared: SharedStep, terms: Sequence[WeightedLoss], totals: Mapping[str, Totals]) -> dict[str, Tensor | None]:
        """Returns by label the gradient of each weighted term alone on the images.

        Each is evaluated once more: compiled code gives its buffers away in the first pass through a graph, so a graph has one.
        """
        found = {}
        for term in terms:
            anew = shared.anew()
            if term.label in totals:
                totals[term.label].begin()
                anew.totals[term.label] = totals[term.label].known
            found[term.label] = self._gradients(term.weight * self._value(term, anew), [self.bank.images])[0]
        return found

    def _norms(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the roots of `squares`, summed over the processes, each of which has images of its own."""
        sums = self.ranks.sums(list(squares.values()), "values")
        return {label: value.sqrt() for label, value in zip(squares, sums, strict=True)}

    def _whole_set(self) -> tuple[Tensor, Tensor]:
        """Returns the images and labels of the set, of all processes, as losses see them."""
        images = self.ranks.whole(self.bank.decoded(self.bank.rows(None)), "the network's training")
        return images, self.ranks.whole(self.bank.decoded_labels, "the network's training")

    def _summed(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the values of the whole set: those of a loss that every process computes whole count once."""
        labels = [term.label for term in self.terms if term.loss.requires.reduce != "global"]
        if self.ranks.size == 1 or not labels:
            return values
        return values | dict(zip(labels, self.ranks.sums([values[label].double() for label in labels], "values"), strict=True))

    def _of_the_whole_set(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the gradients of parameters that the whole set shares, summed over the processes, each of which has them all."""
        names = [name for name, spec in self.bank.declared.items() if spec.per == "set"]
        if not names or self.ranks.size == 1:
            return {}
        return dict(zip(names, self.ranks.sums([gradients[name] for name in names], "shared parameters"), strict=True))

    def _shared(self, index: int, classes: range | None, terms: Sequence[WeightedLoss]) -> SharedStep:
        shared = SharedStep(self.source, self.bank, index, classes)
        shared.network_gradients = any(term.loss.requires.network and term.loss.requires.second_order for term in terms)
        shared.teacher_gradients = any(term.loss.requires.teacher and term.loss.requires.second_order for term in terms)
        return shared

    def _value(self, term: WeightedLoss, shared: SharedStep) -> Tensor:
        with _nothing_else_changes(term, shared):
            value = _calling(term, lambda: term.loss(Step(shared, term.label, term.loss.requires)))
        if not isinstance(value, Tensor) or value.ndim != 0 or not value.requires_grad or value.is_complex():
            what = shown(value)
            if isinstance(value, Tensor):
                what = f"{'complex values of ' * value.is_complex()}shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
            raise RunFailed(f"The {term} must return a scalar tensor attached to the graph of the images; got {what}.{term.advice}")
        share = len(shared.labels) / shared.size if term.loss.requires.reduce == "mean" else 1.0
        return value * share if share != 1.0 else value

    def _gradients(self, value: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(value, tensors, allow_unused=True)
        except BaseException as error:
            if not is_its_own(error):
                raise
            labels = ", ".join(term.label for term in self.terms)
            if "is not implemented" not in str(error):
                raise RunFailed(f"The gradient of the losses ({labels}) raised {told(error)}.") from error
            raise RunFailed(
                f"The losses ({labels}) have no gradient here: {error}. A layer of the teacher or "
                "network has no second derivative in torch, and one of the losses takes it. Choose another model, or another loss."
            ) from error

    def careful_step(self, index: int, *, measured: bool = False) -> Evaluated:
        """Takes step `index` and returns what `evaluate` does, or leaves bank and network as they were and raises RunFailed."""
        before = self.state(index)
        try:
            return self._checked_step(index, measured)
        except DdkitError:
            self.load_state(index, before)
            raise

    def _checked_step(self, index: int, measured: bool) -> Evaluated:
        found = self.evaluate(index, measured=measured)
        for term in self.terms:
            if not bool(found.values[term.label].isfinite()):
                raise NotFinite(
                    f"The {term} became {float(found.values[term.label])} at step {index}. {_kept(index)}"
                    f"Try a smaller learning rate ({self.bank.smaller_rate('images')}"
                    f"{', or a smaller network.inner_lr' if self.source.inner else ''}), a smaller weight, or float32 "
                    f"(--set engine.precision=float32).{term.advice}"
                )
        if self.ranks.all(bool(all_finite(found.gradients.values()))):  # a projection could hide one that is not
            self.bank.update(found.gradients)
            if self.ranks.all(bool(self.bank.finite())):
                return found
        name = next((name for name, tensor in self.bank.tensors().items() if not bool(tensor.isfinite().all())), "images")
        raise NotFinite(
            f"The update of step {index} gave values that are not finite, with every loss term finite "
            f"({', '.join(term.label for term in self.terms)}). {_kept(index)}Try a smaller learning rate: "
            f"{self.bank.smaller_rate(name)}"
        )


def _kept(index: int) -> str:
    """Returns what is said of the state before step `index`; a run that took no step leaves nothing."""
    return "The last good state is kept in checkpoints/. " if index else ""


class NotFinite(RunFailed):
    """A step gave values that are not finite: every process of a run raises it, at the same step."""


class _Guard:
    """Knows whether all values since the last check were finite, without asking the device at every step.

    A step is a function of its number, the bank and a network that was trained, so what went wrong between two checks
    is found by going back to the state of the last one and taking the steps again, carefully. (A GPU may add up in
    another order the second time; where the steps then succeed, the run goes on from them.)
    """

    def __init__(self, engine: Engine, start: int, save: Callable[[int], None]) -> None:
        self.engine, self.save = engine, save
        self._good(start)

    def _good(self, index: int) -> None:
        self.index, self.state = index, self.engine.state(index)
        self.fine = torch.ones((), dtype=torch.bool, device=self.engine.bank.images.device)

    def note(self, found: Evaluated) -> None:
        """Adds what a step computed, and the bank after its update."""
        computed = [*found.values.values(), *found.gradients.values()]
        self.fine = self.fine & all_finite(computed) & self.engine.bank.finite()

    def check(self, index: int, *, measured: bool = False) -> Evaluated | None:
        """Makes the state before step `index` the last good one, or goes back, saves the last good state and raises.

        Returns the last step, `measured` or not, where going back mended it, else None.
        """
        mended = None if self.engine.ranks.all(bool(self.fine)) else self._replay(index, measured)
        self._good(index)
        return mended

    def _replay(self, end: int, measured: bool = False) -> Evaluated | None:
        self.engine.load_state(self.index, self.state)
        found = None
        for index in range(self.index, end):
            try:
                found = self.engine.careful_step(index, measured=measured and index == end - 1)
            except DdkitError as error:
                if self.engine.ranks.size == 1 or isinstance(error, NotFinite):
                    self.save(index)
                raise
        return found

    @contextmanager
    def around(self, index: int) -> Iterator[None]:
        """Saves the last good state where the step inside, number `index`, raises a DdkitError.

        One of several processes cannot do that alone: the newest checkpoint is what stays.
        """
        try:
            yield
        except DdkitError:
            if self.engine.ranks.size > 1:
                raise
            if not bool(self.fine):  # what it raised may come of values that were not finite: tell of those
                self._replay(index)
            self.save(index)
            raise


def _parts(terms: Sequence[WeightedLoss], chunk: int, classes: range) -> list[tuple[range | None, list[WeightedLoss]]]:
    separable = [term for term in terms if term.loss.requires.reduce is not None]
    if not chunk or not separable:
        return [(None, list(terms))]
    whole = [term for term in terms if term not in separable]
    chunks: list[tuple[range | None, list[WeightedLoss]]] = [
        (range(first, min(first + chunk, classes.stop)), separable) for first in classes[::chunk]
    ]
    return ([(None, whole)] if whole else []) + chunks


def _calling(term: WeightedLoss, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:
        if not is_its_own(error):
            raise
        raise RunFailed(f"The {term} raised {told(error)}.{term.advice}") from error


@contextmanager
def _nothing_else_changes(term: WeightedLoss, shared: SharedStep) -> Iterator[None]:
    """Raises RunFailed where a stranger's loss, called inside, writes to what losses share, or to a global random state.

    Tensors are told by their version counters, so nothing is read back from a device. (Code that goes around them, such
    as `x.data`, is found by the conformance suite alone, which ddkit's own losses pass.)
    """
    if not term.loss.origin:
        yield
        return
    shared.watch.written()  # what was written before this loss is not its fault
    before = random_states()
    yield
    written = shared.watch.written()
    if written:
        raise RunFailed(
            f"The {term} writes to {' and '.join(written)}, which other losses use too. It has to compute with copies.{term.advice}"
        )
    check_random_states(before, str(term), term.advice)


def _record(index: int, terms: Sequence[WeightedLoss], found: Evaluated) -> Record:
    raw = {term.label: float(found.values[term.label]) for term in terms}
    losses = {term.label: {"raw": raw[term.label], "weighted": term.weight * raw[term.label]} for term in terms}
    for label, norm in found.norms.items():
        losses[label]["gradient"] = float(norm)
    record: Record = {"step": index, "total": sum(each["weighted"] for each in losses.values()), "losses": losses}
    if found.logged:
        logged = sorted(found.logged.items())
        record["logged"] = {label: {name: value.tolist() for name, value in items.items()} for label, items in logged}
    return record


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch refuses operations that are not deterministic on this device, if that is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA's matrix products when the first is made
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP are noted in the list, and a second SIGINT acts at once.

    A second one of the others is the same request once more, as a cluster sends it to all processes and torchrun, or a study, passes it
    on.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
