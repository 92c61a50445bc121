"""How far a run is, for people: a line at the start of each stage, then a bar or a line now and then. Observers like any other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from ddkit.components.observers import hookimpl
from ddkit.text import printable

UNITS = {
    "reading": "image",
    "teacher": "epoch",
    "experts": "network",
    "distilling": "step",
    "evaluation": "network",
}  # what a stage is counted in


class ProgressLines:
    """Writes to stderr what a stage does when it begins, then every `every` seconds how far it is and how long it will take.

        ddkit.distill(losses="dm", observers=[ProgressLines()])

    A command shows these by itself if stderr is no terminal. `clock()` returns seconds.
    """

    def __init__(self, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._begin("")

    def _begin(self, stage: str) -> None:
        self._stage = stage
        self._told = self._clock()
        self._first: tuple[float, float] | None = None  # time and place of the first report: what is compiled before it is no pace
        self._values: dict[str, float] = {}

    def _at(self, stage: str, done: int, total: int, part: float, values: Mapping[str, float]) -> None:
        if stage != self._stage:
            self._begin(stage)
        now, reached = self._clock(), done + part
        began, before = self._first = self._first or (now, reached)
        self._values.update(values)
        if now - self._told < self._every or done >= total:
            return
        self._told = now
        parts = [f"{stage}: {UNITS.get(stage, 'part')} {min(done + (part > 0), total):,} of {total:,}", f"{100 * reached / total:.0f} %"]
        parts += [f"about {duration((now - began) / (reached - before) * (total - reached))} left"] if reached > before else []
        _tell(", ".join([*parts, *(f"{name} {_figure(name, value)}" for name, value in self._values.items())]))

    @hookimpl
    def stage_started(self, stage: str, text: str) -> None:
        _tell(text)
        self._begin(stage)

    @hookimpl
    def step_finished(self, index: int, steps: int, record: Mapping[str, Any] | None) -> None:
        self._at("distilling", index + 1, steps, 0.0, _losses(record))

    @hookimpl
    def stage_progress(self, stage: str, done: int, total: int, part: float, values: Mapping[str, float]) -> None:
        self._at(stage, done, total, part, values)


class ProgressBar:
    """Writes a line when a stage begins, and shows a bar with the time left: on stderr, in a notebook in the output of the cell.

    A command shows one by itself if stderr is a terminal.

    Examples:
        >>> run = ddkit.resume("my-run", observers=[ddkit.ProgressBar()])  # or ddkit.distill(..., observers=...)
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def _to(self, name: str, reached: float, total: int, values: Mapping[str, float]) -> None:
        if self._name != name:
            self.close()
            self._bar = _new_bar(name, total)
            self._name = name
        if self._bar is None:
            return
        if values:
            self._bar.set_postfix({label: _figure(label, value) for label, value in values.items()}, refresh=False)
        self._bar.update(reached - self._bar.n)
        if reached >= total:
            self.close()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._name = ""

    @hookimpl
    def stage_started(self, stage: str, text: str, done: int, total: int) -> None:
        if self._name == stage and self._bar.total == total and done >= self._bar.n:  # it goes on, and its pace counts on
            self._bar.clear()
            _tell(text)
            self._bar.update(done - self._bar.n)
            self._bar.refresh()
            return
        self.close()
        _tell(text)
        if total:
            self._bar = _new_bar(stage, total, done)
            self._name = stage

    @hookimpl
    def step_finished(self, index: int, steps: int, record: Mapping[str, Any] | None) -> None:
        self._to("distilling", index + 1, steps, _losses(record))

    @hookimpl
    def stage_progress(self, stage: str, done: int, total: int, part: float = 0.0, values: Mapping[str, float] | None = None) -> None:
        self._to(stage, done + part if part else done, total, values or {})


def _losses(record: Mapping[str, Any] | None) -> dict[str, float]:
    return {} if record is None else {label: term["raw"] for label, term in record["losses"].items()}


def _figure(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Returns a time for people, no more exact than an estimate is: "20 s", "5 min", "3 h 10 min"."""
    if seconds < 90:
        return f"{10 * max(1, round(seconds / 10))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _tell(text: str) -> None:
    stream = sys.stdout if in_notebook() else sys.stderr
    if stream is not None:
        print(printable(text), file=stream, flush=True)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell is not None else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(found).__mro__)  # Colab has one of its own that is derived from it


def _new_bar(name: str, total: int, done: int = 0) -> Any:
    given: dict[str, Any] = {"total": total, "desc": name, "leave": False, **({"initial": done} if done else {})}
    if UNITS.get(name) == "network":  # parts of networks count
        given["bar_format"] = "{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    from tqdm import tqdm

    if in_notebook():  # a line that is written over works in every one, and needs no widgets
        return tqdm(**given, file=sys.stdout, ncols=100, mininterval=0.5)
    return tqdm(**given, file=sys.stderr, dynamic_ncols=True)
