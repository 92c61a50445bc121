"""What all code of a process shares, and no plugin may change: the global random generators, torch's settings and torch's functions."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ddkit.errors import PluginError

SETTINGS = "torch's settings"
NAMES = ("the default dtype", "the number of threads", "whether gradients are computed", "whether algorithms are deterministic")
OWNERS: dict[str, Any] = {  # whose functions all code calls
    "torch": torch, "torch.Tensor": torch.Tensor, "torch.autograd": torch.autograd, "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg, "torch.fft": torch.fft,
}  # fmt: skip
for _package in (torch.nn, torch.optim):
    OWNERS |= {f"{_package.__name__}.{name}": kind for name, kind in vars(_package).items() if isinstance(kind, type)}


def random_states() -> dict[str, Any]:
    """Returns the states of the global random generators on the CPU, and torch's settings, to compare."""
    numpy = np.random.get_state(legacy=False)["state"]
    settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "Python": random.getstate(),
        "numpy": (numpy["pos"], numpy["key"].tobytes()),
        SETTINGS: settings,
    }


@contextmanager
def unchanged(who: str, remedy: str) -> Iterator[None]:
    """Puts back what code inside, an import, changes of what all code shares, and raises PluginError that names `who` and what it was.

    Python's own generator is put back without a word: large libraries draw from it when they are imported.
    """
    before = random_states()
    drawn = torch.get_rng_state(), np.random.get_state(legacy=False)
    folder = _folder()
    functions = {label: dict(vars(owner)) for label, owner in OWNERS.items()}
    try:
        yield
    finally:
        after = random_states()
        changed = [name for name, one, other in zip(NAMES, before[SETTINGS], after[SETTINGS], strict=True) if one != other]
        changed += [f"the random state of {library}" for library in ("torch", "numpy") if before[library] != after[library]]
        changed += _put_back(functions)
        if folder and _folder() != folder:
            changed.append("the current folder")
            os.chdir(folder)
        torch.set_rng_state(drawn[0])
        np.random.set_state(drawn[1])
        random.setstate(before["Python"])
        for set_, one, other in zip(_SETTERS, before[SETTINGS], after[SETTINGS], strict=True):
            if one != other:
                set_(one)
    if changed:
        raise PluginError(
            f"The {who} changes what all code of the process shares when it is imported: {', '.join(changed[:5])}. That is put back, and "
            f"the plugin is not used: it has to set and draw nothing globally, and to leave torch's functions alone. {remedy}"
        )


_SETTERS: tuple[Callable[[Any], Any], ...] = (
    torch.set_default_dtype, torch.set_num_threads, torch.set_grad_enabled, torch.use_deterministic_algorithms,
)  # fmt: skip


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
            if (name in own or name in inherited) and value is not own.get(name) and callable(value) and not _torchs_own(value):
                found.append(f"{label}.{name}")
                if name in own:
                    setattr(owner, name, own[name])
                else:
                    delattr(owner, name)
    return found


def _torchs_own(function: Any) -> bool:
    """Whether a function is written in torch; what it says of itself may be copied, its globals are not."""
    place = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
    return str(place).partition(".")[0] == "torch"
