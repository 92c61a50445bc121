"""The boundary around a component's code: what it raises names it, and what all code of the process shares stays as it was.

Shared are the global random generators, torch's settings and functions, the current folder, and the tensors of a step.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddkit.components.base import Component
from ddkit.errors import PluginError, RunFailed, is_its_own, told

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {  # of torch: how each is read and set
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the use of deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}
OWNERS: dict[str, Any] = {  # whose functions all code calls
    "torch": torch, "torch.Tensor": torch.Tensor, "torch.autograd": torch.autograd, "torch.nn.functional": nn.functional,
    "torch.linalg": torch.linalg, "torch.fft": torch.fft,
}  # fmt: skip
for _package in (nn, torch.optim):
    OWNERS |= {f"{_package.__name__}.{name}": kind for name, kind in vars(_package).items() if isinstance(kind, type)}


@contextmanager
def blamed(kind: str, component: Component, *, building: bool = False, may_draw: bool = False) -> Iterator[None]:
    """Inside runs code of `component`: what it raises becomes a RunFailed (a PluginError while `building`) that names it.

    It has to leave the global random generators and torch's settings as they were, unless it `may_draw`. That is looked at when it is
    called first, as at every step it would cost time; the conformance suite looks at every method.
    """
    watched = not may_draw and not component._left_shared_state
    before = shared_state() if watched else {}
    try:
        yield
    except BaseException as error:
        if not is_its_own(error):
            raise
        kind_of_error = PluginError if building else RunFailed
        raise kind_of_error(f"The {called(kind, component)} raised {told(error)}.{component.advice}") from error
    if watched:
        check_shared_state(before, called(kind, component), component.advice)
        component._left_shared_state = True


def called(kind: str, component: Component, label: str = "") -> str:
    """Returns how messages call a component, by its `label` in the recipe if it has one, with the origin of a third party's."""
    return f"{kind} '{label or component.name}'" + (f" ({component.origin})" if component.origin else "")


def shared_state() -> dict[str, Any]:
    """Returns the states of the global random generators on the CPU and torch's settings, to compare."""
    numpy = np.random.get_state(legacy=False)["state"]
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "Python": random.getstate(),
        "numpy": (numpy["pos"], numpy["key"].tobytes()),
        "modules": len(sys.modules),
        **{name: read() for name, (read, _) in SETTINGS.items()},
    }


def moved_since(before: dict[str, Any]) -> list[str]:
    """Returns the names of what is not as it was `before`.

    If something was imported since, Python's own generator is put back without a word: large libraries draw from it then.
    """
    after = shared_state()
    if after.pop("modules") != before["modules"]:
        random.setstate(before["Python"])
        after["Python"] = before["Python"]
    return [name for name, value in after.items() if value != before[name]]


def check_shared_state(before: dict[str, Any], who: str, helps: str) -> None:
    """Raises RunFailed where a global random generator or a setting of torch is not as it was `before`."""
    moved = moved_since(before)
    settings = [name for name in moved if name in SETTINGS]
    if settings:
        raise RunFailed(
            f"The {who} changes torch's settings ({', '.join(settings)}), which every other component uses too. It must leave them "
            f"unchanged.{helps}"
        )
    if moved:
        raise RunFailed(
            f"The {who} changes the global random state of {' and '.join(moved)}, so the run could not be repeated. It must draw from the "
            f"generator that it gets from ddkit.{helps}"
        )


@contextmanager
def unchanged(who: str, remedy: str) -> Iterator[None]:
    """Puts back what code inside, an import, changes of what all code shares, and raises PluginError that names `who` and what it was."""
    before, folder = shared_state(), _folder()
    drawn = torch.get_rng_state(), np.random.get_state(legacy=False)
    functions = {label: dict(vars(owner)) for label, owner in OWNERS.items()}
    try:
        yield
    finally:
        moved = moved_since(before)
        changed = [name if name in SETTINGS else f"the random state of {name}" for name in moved if name != "Python"]
        for name in SETTINGS.keys() & set(moved):
            SETTINGS[name][1](before[name])
        torch.set_rng_state(drawn[0])
        np.random.set_state(drawn[1])
        random.setstate(before["Python"])
        changed += _put_back(functions)
        if folder and _folder() != folder:
            changed.append("the current folder")
            os.chdir(folder)
    if changed:
        raise PluginError(
            f"The {who} changes global state when it is imported: {', '.join(changed[:5])}. The changes are undone, and the plugin is not "
            f"used. A plugin must not change global settings, random generators or the functions of torch.{remedy}"
        )


def _folder() -> str:
    """Returns the current folder, "" if it is gone."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _put_back(functions: dict[str, dict[str, Any]]) -> list[str]:
    """Makes torch's functions those that they were, and returns the names of those that were not; torch replaces some itself."""
    found = []
    for label, own in functions.items():
        owner = OWNERS[label]
        inherited = {name for base in getattr(owner, "__mro__", ())[1:] for name in vars(base)}
        for name, value in list(vars(owner).items()):
            if (name in own or name in inherited) and value is not own.get(name) and callable(value):
                # what a function says of itself may be copied from another, its globals are not
                place = getattr(value, "__globals__", {}).get("__name__") or getattr(value, "__module__", None)
                if str(place).partition(".")[0] == "torch":
                    continue
                found.append(f"{label}.{name}")
                if name in own:
                    setattr(owner, name, own[name])
                else:
                    delattr(owner, name)
    return found


class Watch:
    """Remembers the versions of tensors and modules that several may read and nobody may write to; reads nothing from a device."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor | nn.Module, int]] = {}

    def note(self, name: str, made: Tensor | nn.Module) -> None:
        """Watches `made` from now on, under `name`."""
        self._known[name] = (made, _version(made))

    def written(self) -> list[str]:
        """Returns the names of what was written to since it was noted, or since this was asked."""
        found = [name for name, (made, version) in self._known.items() if _version(made) != version]
        for name in found:
            self.note(name, self._known[name][0])
        return found


def _version(made: Tensor | nn.Module) -> int:
    """Returns a number that grows with every write to a tensor, or to a parameter or buffer of a module."""
    if isinstance(made, nn.Module):
        return sum(each._version for each in (*made.parameters(), *made.buffers()))
    return made._version
