"""The conformance suite of observers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ddkit.components import registry
from ddkit.components.base import DataInfo, Evaluation
from ddkit.components.observers import HOOKS, Observers
from ddkit.testing.suite import Broken, Conformance, check


class ObserverConformance(Conformance):
    """Checks of an observer: a module or object whose functions carry `@ddkit.hookimpl`."""

    kind = "observer"

    @property
    def label(self) -> str:
        return self.component if isinstance(self.component, str) else getattr(self.component, "__name__", repr(self.component))

    def make(self, info: DataInfo | None = None, **arguments: Any) -> Any:
        return registry.load("observer", self.component) if isinstance(self.component, str) else self.component

    def found(self) -> Any:
        return self.make()

    @check
    def test_is_of_its_kind(self) -> None:
        """It has at least one hook: a function of a hook's name, marked `@ddkit.hookimpl`, with arguments that the hook has."""
        observers = Observers([("checked", self.make())])
        if not any(observers.has(hook) for hook in HOOKS):
            raise Broken(f"The observer '{self.label}' has no hook: mark at least one of {', '.join(HOOKS)} with @ddkit.hookimpl.")

    @check
    def test_options_survive_a_recipe(self) -> None:
        """Holds always: an observer has no options."""

    @check
    def test_every_hook_can_be_called(self) -> None:
        """Each of its hooks takes what a run passes, also a record that is None, and raises nothing."""
        from ddkit.recipes.tables import parse_recipe

        observer = self.make()
        record = {"step": 0, "total": 1.0, "losses": {"dm": {"raw": 1.0, "weighted": 1.0}}, "seconds": 0.1}
        row = Evaluation(
            evaluator="accuracy", model="convnet", protocol="short", labels="hard", repeats=1, accuracy_mean=0.5, accuracy_std=None
        )
        with tempfile.TemporaryDirectory() as folder:
            observers = Observers([("checked", observer)], strict=True)
            observers.call("run_started", recipe=parse_recipe({"losses": {"dm": {}}}), path=Path(folder), start=0)
            observers.call("step_finished", index=0, steps=2, record=record)
            observers.call("step_finished", index=1, steps=2, record=None)
            observers.call(
                "checkpoint_written", index=2, images=torch.rand(3, 1, 8, 8), labels=torch.arange(3), class_names=["a", "b", "c"]
            )
            observers.call("stage_started", stage="teacher", text="Training a teacher (convnet, 3 epochs on 12 images)", done=0, total=3)
            observers.call("stage_progress", stage="teacher", done=1, total=3, part=0.0, values={"training accuracy": 0.5})
            observers.call("stage_started", stage="evaluation", text="Evaluating: accuracy", done=0, total=0)
            observers.call("stage_progress", stage="evaluation", done=1, total=3, part=0.5, values={})
            observers.call("run_finished", path=Path(folder), evaluations=[row])
