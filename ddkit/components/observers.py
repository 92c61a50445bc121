"""Hook specifications for observers: any number at once, loaded when a run starts, never able to spoil it.

An observer is a module or object whose functions carry `@ddkit.hookimpl`; its distribution names it in the entry-point
group `ddkit.hooks`. Implementations may take any subset of a hook's arguments.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import pluggy

from ddkit.errors import Interrupted, told

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ddkit.components.base import Evaluation

hookspec = pluggy.HookspecMarker("ddkit")
hookimpl = pluggy.HookimplMarker("ddkit")
log = logging.getLogger("ddkit")
Recipe: TypeAlias = Any  # ddkit.recipes.tables.Recipe, of a package above this one


@hookspec
def run_started(recipe: Recipe, path: Path, start: int) -> None:
    """Called: once, before the first step. Receives: the resolved recipe, the run directory, the first step's number.

    May: open files of its own. May not: change the recipe. Since: 0.1.
    """


@hookspec
def step_finished(index: int, steps: int, record: Mapping[str, Any] | None) -> None:
    """Called: after each step. Receives: its number, the number of steps, and the logged values every log_every-th step.

    May: write or draw. May not: touch the bank. Since: 0.1.
    """


@hookspec
def checkpoint_written(index: int, images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    """Called: when the run starts or continues, and after each checkpoint. Receives: the number of finished steps, copies of the images.

    The images are (n, C, H, W) in pixel units, the labels (n,), both on the CPU, with the class names in label order.
    May: write or draw. May not: change the run. Since: 0.1.
    """


@hookspec
def stage_started(stage: str, text: str, done: int, total: int) -> None:
    """Called: when a stage begins. Receives: its name, a line of text about it, and its progress in its own units.

    The stages are "reading" (images), "teacher" (epochs), "experts" (networks), "start" (the first images), "distilling" (steps),
    "evaluation" (networks, once for each evaluator) and "writing"; of a study "merging", and "sets" whenever one begins or ends. `total` is
    0 if it is not known, and `done` is above 0 if a run or a study continues.
    May: write or draw. May not: assume that every stage comes, or comes once. Since: 0.2.
    """


@hookspec
def stage_progress(stage: str, done: int, total: int, part: float, values: Mapping[str, float]) -> None:
    """Called: during each stage except "distilling", which has step_finished. Receives: the stage, its progress, and figures to show.

    `part`, from 0 to 1, is the finished part of the next unit. `values` may be empty, and has the "training accuracy" of a teacher.
    May: write or draw. May not: assume that every value of `done` is seen. Since: 0.1; `part` and `values`: 0.2.
    """


@hookspec
def run_finished(path: Path, evaluations: list[Evaluation]) -> None:
    """Called: once, after the manifest is written. Receives: the run directory and its evaluations.

    May: read the run's files. May not: change them. Since: 0.1.
    """


HOOKS = ("run_started", "step_finished", "checkpoint_written", "stage_started", "stage_progress", "run_finished")
Report = Callable[..., None]  # of (done, total, part=0.0, **values): how far a stage is
TRACE = "DDKIT_TRACE"  # where it is 1, every call of a hook is told on stderr with its time


class Observers:
    """Calls the hooks of every observer; one that raises is reported once and left out from then on.

    With `strict` it raises instead, for tests. All stages of a command begin with begin().
    """

    def __init__(self, observers: Iterable[tuple[str, Any]] = (), *, strict: bool = False) -> None:
        self._doing = ""
        self._strict = strict
        self._traced = os.environ.get(TRACE) == "1"
        self._manager = pluggy.PluginManager("ddkit")
        self._manager.add_hookspecs(sys.modules[__name__])
        for name, observer in observers:
            try:
                self._manager.register(observer, name)
            except BaseException as error:  # not an observer, or the same one twice, or whatever its attributes raise
                if self._strict or isinstance(error, KeyboardInterrupt):
                    raise
                if self._manager.has_plugin(name):
                    self._manager.unregister(name=name)
                log.warning("The observer '%s' cannot be used, and the run continues without it: %s", name, " ".join(told(error).split()))
        known = self._manager.list_name_plugin()
        self._hooks: list[tuple[str, dict[str, Any]]] = []  # of each observer alone
        for name, observer in known:
            others = [other for _, other in known if other is not observer]
            self._hooks.append((name, {hook: self._manager.subset_hook_caller(hook, others) for hook in HOOKS}))

    def has(self, hook: str) -> bool:
        """Whether an observer implements `hook`."""
        return any(hooks[hook].get_hookimpls() for _, hooks in self._hooks)

    def begin(self, stage: str, text: str, *, done: int = 0, total: int = 0) -> Report:
        """Tells that `stage` begins, and returns what tells how far it is; `text` begins with a word such as "Reading"."""
        self._doing = text
        self.call("stage_started", stage=stage, text=text, done=done, total=total)

        def report(done: int, total: int, part: float = 0.0, **values: float) -> None:
            self.call("stage_progress", stage=stage, done=done, total=total, part=part, values=values)

        return report

    @contextmanager
    def interruptible(self, advice: Callable[[], str]) -> Iterator[None]:
        """Inside, an interruption says what was being done, and `advice()`: what is kept, and the command that goes on.

        Of two of these, one inside the other, the inner one has said it.
        """
        try:
            yield
        except Interrupted as stop:  # by the loop, after a checkpoint
            if not stop.advised:
                stop.args = (f"{stop} {advice()}",)
                stop.advised = True
            raise
        except KeyboardInterrupt as stop:
            if not stop.args:
                doing = f" while {self._doing[0].lower()}{self._doing[1:]}" if self._doing else ""
                stop.args = (f"Interrupted{doing}. {advice()}",)
            raise

    def call(self, hook: str, **arguments: Any) -> None:
        """Calls `hook` of every observer that has it, each with copies of its own."""
        for entry in list(self._hooks):
            name, hooks = entry
            if not hooks[hook].get_hookimpls():
                continue
            began = time.perf_counter()
            try:
                hooks[hook](**copy.deepcopy(arguments))
            except BaseException as error:
                if self._strict or isinstance(error, KeyboardInterrupt):
                    raise
                log.warning("The observer '%s' raised %s. The run continues without it.", name, told(error))
                self._hooks.remove(entry)
            if self._traced:
                print(f"{hook} {name} {1000 * (time.perf_counter() - began):.3f} ms", file=sys.stderr)
