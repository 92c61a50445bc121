"""The loop: iterate over the bank, sum the weighted losses, update. It knows no loss by name."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddkit.bank import Bank
from ddkit.components import Loss
from ddkit.errors import DdkitError, Interrupted, RunFailed
from ddkit.step import SharedStep, Step, StepSource

Record = dict[str, Any]


class Term(NamedTuple):
    """One weighted loss of a recipe."""

    label: str
    loss: Loss
    weight: float


class Engine:
    """Distils: `terms` in order of label, separable ones in chunks of `chunk` classes (0: all at once)."""

    def __init__(self, bank: Bank, source: StepSource, terms: Sequence[Term], *, chunk: int = 0) -> None:
        self.bank, self.source, self.terms = bank, source, sorted(terms, key=lambda term: term.label)
        self.parts = _parts(self.terms, chunk, source.info.classes)

    def start(self) -> None:
        """Fills the extra parameters whose initial values a loss computes from the first step."""
        shared = self._shared(0, None, self.terms)
        for term in self.terms:
            _calling(term, lambda t=term: self._fill(t, shared))  # type: ignore[misc]

    def _fill(self, term: Term, shared: SharedStep) -> None:
        requires = term.loss.requires
        for name, value in term.loss.initial(Step(shared, term.label, requires)).items():
            if name not in requires.parameters:
                raise RunFailed(
                    f"The loss '{term.label}' gives initial values of '{name}', "
                    "which it does not declare in ddkit.Requires(parameters=...)."
                )
            self.bank.fill(name, value)
            if not self.bank.finite():
                raise RunFailed(f"The loss '{term.label}' gives initial values of '{name}' that are not finite.")

    def run(
        self,
        start: int,
        steps: int,
        *,
        observe: Callable[[int, Callable[[], Record]], None],
        save: Callable[[int], None],
    ) -> None:
        """Runs steps start..steps-1.

        `observe(index, record)` sees every step before its update (`record()` reads the values back); `save(index)`
        keeps the state before step `index`. A non-finite value or a signal saves the last good state, then raises.
        """
        with _interruption() as stop:
            for index in range(start, steps):
                try:
                    values, gradients, logged = self.evaluate(index)
                    self._update(index, gradients)
                except DdkitError:
                    save(index)
                    raise
                observe(index, lambda: _record(index, self.terms, values, logged))  # noqa: B023 (read at once)
                if stop:
                    save(index + 1)
                    raise Interrupted(f"Interrupted after step {index + 1} of {steps}; --resume continues.", 128 + stop[0])

    def evaluate(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Returns raw values and diagnostics by loss, and the gradient of the weighted sum by parameter."""
        values: dict[str, Tensor] = {}
        gradients = {name: torch.zeros_like(tensor) for name, tensor in self.bank.tensors().items()}
        logged: dict[str, dict[str, Tensor]] = {}
        for classes, terms in self.parts:
            shared = self._shared(index, classes, terms)
            total: Tensor | None = None
            for term in terms:
                value = self._value(term, shared)
                values[term.label] = values.get(term.label, 0) + value.detach()
                total = term.weight * value if total is None else total + term.weight * value
            logged.update(shared.logged)
            assert total is not None
            for name, part in self._gradients(total).items():
                gradients[name] += part
        for term in self.terms:
            if not bool(values[term.label].isfinite()):
                raise RunFailed(
                    f"The loss '{term.label}' became {float(values[term.label])} at step {index}. The last good state is kept in "
                    "checkpoints/. Try a smaller learning rate or weight, or float32 (--set engine.precision=float32)."
                )
        return values, gradients, logged

    def _shared(self, index: int, classes: range | None, terms: Sequence[Term]) -> SharedStep:
        shared = SharedStep(self.source, self.bank, index, classes)
        shared.network_gradients = any(term.loss.requires.network_gradients for term in terms)
        shared.teacher_gradients = any(term.loss.requires.teacher_gradients for term in terms)
        return shared

    def _value(self, term: Term, shared: SharedStep) -> Tensor:
        value = _calling(term, lambda: term.loss(Step(shared, term.label, term.loss.requires)))
        if not isinstance(value, Tensor) or value.ndim != 0 or not value.requires_grad:
            what = f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}" if isinstance(value, Tensor) else repr(value)
            raise RunFailed(f"The loss '{term.label}' must return a scalar tensor attached to the graph of the images; got {what}.")
        share = len(shared.labels) / shared.size if term.loss.requires.separable == "mean" else 1.0
        return value * share if share != 1.0 else value

    def _gradients(self, total: Tensor) -> dict[str, Tensor]:
        tensors = self.bank.tensors()
        parts = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
        return {name: part for name, part in zip(tensors, parts, strict=True) if part is not None}

    def _update(self, index: int, gradients: Mapping[str, Tensor]) -> None:
        before = self.bank.state()
        if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):  # a projection could hide one that is not
            self.bank.update(gradients)
            if self.bank.finite():
                return
            self.bank.load_state(before)
        raise RunFailed(
            f"The update of step {index} gave values that are not finite, with every loss term finite "
            f"({', '.join(term.label for term in self.terms)}). The last good state is kept. Try a smaller --set optimizer.images.lr."
        )


def _parts(terms: Sequence[Term], chunk: int, classes: int) -> list[tuple[range | None, list[Term]]]:
    separable = [term for term in terms if term.loss.requires.separable is not None]
    if not chunk or chunk >= classes or not separable:
        return [(None, list(terms))]
    whole = [term for term in terms if term.loss.requires.separable is None]
    chunks: list[tuple[range | None, list[Term]]] = [
        (range(first, min(first + chunk, classes)), separable) for first in range(0, classes, chunk)
    ]
    return ([(None, whole)] if whole else []) + chunks


def _calling(term: Term, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except DdkitError:
        raise
    except Exception as error:  # a stranger's loss can raise anything
        raise RunFailed(f"The loss '{term.label}' raised {type(error).__name__}: {error}.") from error


def _record(index: int, terms: Sequence[Term], values: Mapping[str, Tensor], logged: Mapping[str, Mapping[str, Tensor]]) -> Record:
    raw = {term.label: float(values[term.label]) for term in terms}
    record: Record = {
        "step": index,
        "total": sum(term.weight * raw[term.label] for term in terms),
        "losses": {term.label: {"raw": raw[term.label], "weighted": term.weight * raw[term.label]} for term in terms},
    }
    if logged:
        record["logged"] = {label: {name: value.tolist() for name, value in items.items()} for label, items in sorted(logged.items())}
    return record


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch refuses operations that are not deterministic on this device, if that is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM is noted in the list and the next acts at once."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
