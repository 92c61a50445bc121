"""`python:module.factory`: a model that is a function of the user's."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import ddkit

log = logging.getLogger("ddkit")
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_TOLD: set[str] = set()


class Python(ddkit.Model):
    """Your own model, `python:module.factory`: factory(channels, (height, width), classes) returns an nn.Module.

    The module is imported from the current folder or from the installed packages. A recipe, run or teacher file may only name one
    with `--allow-code`. In a flag or in Python you can always name one.
    """

    argument = "factory"
    runs_code = True

    factory: str = ddkit.option("", "the function, as module.function")
    sha256: str | None = ddkit.option(None, "sha256 of the module's file, filled in by ddkit, which warns if the file changes")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._build = found(self.factory)

    @classmethod
    def resolve(cls, options: Any, data: ddkit.DataInfo) -> Mapping[str, Any]:
        file = getattr(sys.modules.get(found(options.factory).__module__), "__file__", None)
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else None
        if options.sha256 not in (None, digest):
            log.warning(
                "python:%s: %s has changed since this was recorded (its sha256 began with %s).",
                options.factory, file, options.sha256[:12],
            )  # fmt: skip
        return {"sha256": digest}

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        path = self.factory
        module = self._build(channels, size, classes)
        if not isinstance(module, nn.Module):
            raise ddkit.PluginError(f"python:{path} returned {type(module).__name__}, but must return a torch.nn.Module.")
        drops = [name for name, layer in module.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0]
        if drops and path not in _TOLD:
            _TOLD.add(path)
            log.warning(
                "python:%s: its dropout (%s) draws from torch's global generator, so each run has another result. "
                "Use p = 0.", path, ", ".join(drops[:5]),
            )  # fmt: skip
        return module


def found(path: str) -> Callable[[int, tuple[int, int], int], Any]:
    """Returns the callable at `path`, module.attribute.

    Raises InputError where the path has another form, PluginError where nothing is there.
    """
    if not PATH.fullmatch(path):
        raise ddkit.InputError(
            f"--model python:{path} does not name a function. Write python:MODULE.FUNCTION, such as python:my_models.small."
        )
    name, _, attribute = path.rpartition(".")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # the current folder first, as `python -m` does
    try:
        module = importlib.import_module(name)
    except Exception as error:  # the user's module can raise anything
        raise ddkit.PluginError(
            f"python:{path}: the module {name} could not be imported, neither from {folder} nor from the installed packages: "
            f"{type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path.remove(folder)
    made = getattr(module, attribute, None)
    if not callable(made):
        near = difflib.get_close_matches(attribute, [each for each, value in vars(module).items() if callable(value)], 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ddkit.PluginError(f"python:{path}: {getattr(module, '__file__', name)} has no function '{attribute}'.{hint}")
    return made
