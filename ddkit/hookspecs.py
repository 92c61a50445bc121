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
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ddkit.components import Evaluation
    from ddkit.recipe import Recipe

hookspec = pluggy.HookspecMarker("ddkit")
hookimpl = pluggy.HookimplMarker("ddkit")
log = logging.getLogger("ddkit")


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
    """Called: when the run starts or goes on, and after each checkpoint. Receives: the number of steps done, copies of the images.

    The images are (n, C, H, W) in pixel units, the labels (n,), both on the CPU, with the class names in label order.
    May: write or draw. May not: change the run. Since: 0.1.
    """


@hookspec
def stage_progress(stage: str, done: int, total: int) -> None:
    """Called: during "teacher" training and "evaluation". Receives: the stage and how far it is.

    May: write or draw. May not: assume that every value of `done` is seen. Since: 0.1.
    """


@hookspec
def run_finished(path: Path, evaluations: list[Evaluation]) -> None:
    """Called: once, after the manifest is written. Receives: the run directory and its evaluations.

    May: read the run's files. May not: change them. Since: 0.1.
    """


HOOKS = ("run_started", "step_finished", "checkpoint_written", "stage_progress", "run_finished")
TRACE = "DDKIT_TRACE"  # where it is 1, every call of a hook is told on stderr with its time


class Observers:
    """Calls the hooks of every observer; one that raises is reported once and left out from then on.

    With `strict` it raises instead, for tests.
    """

    def __init__(self, observers: Iterable[tuple[str, Any]], *, strict: bool = False) -> None:
        self._strict, self._traced = strict, os.environ.get(TRACE) == "1"
        self._manager = pluggy.PluginManager("ddkit")
        self._manager.add_hookspecs(__import__(__name__, fromlist=["hookspecs"]))
        for name, observer in observers:
            self._register(name, observer)
        self._hooks = [(name, self._alone(observer)) for name, observer in self._manager.list_name_plugin() if observer is not None]

    def _register(self, name: str, observer: Any) -> None:
        try:
            self._manager.register(observer, name)
        except Exception as error:  # not an observer, or the same one twice, or whatever its attributes raise
            if self._strict:
                raise
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            log.warning("The observer '%s' cannot be used: %s", name, " ".join(str(error).split()))

    def _alone(self, observer: Any) -> dict[str, Any]:
        others = [other for other in self._manager.get_plugins() if other is not observer]
        return {name: self._manager.subset_hook_caller(name, others) for name in HOOKS}

    def has(self, hook: str) -> bool:
        """Whether an observer implements `hook`."""
        return any(hooks[hook].get_hookimpls() for _, hooks in self._hooks)

    def call(self, hook: str, **arguments: Any) -> None:
        """Calls `hook` of every observer that has it, each with copies of its own."""
        for entry in list(self._hooks):
            name, hooks = entry
            if not hooks[hook].get_hookimpls():
                continue
            began = time.perf_counter()
            try:
                hooks[hook](**copy.deepcopy(arguments))
            except (Exception, SystemExit) as error:  # an observer can raise anything
                if self._strict:
                    raise
                log.warning("The observer '%s' raised %s: %s; the run goes on without it.", name, type(error).__name__, error)
                self._hooks.remove(entry)
            if self._traced:
                print(f"{hook} {name} {1000 * (time.perf_counter() - began):.3f} ms", file=sys.stderr)
