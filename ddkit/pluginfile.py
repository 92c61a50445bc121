"""Components of one Python file: to try a plugin before it is a package."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from ddkit.errors import FlagError, PluginError
from ddkit.files import sha256

VARIABLE = "DDKIT_PLUGIN_FILES"  # how processes that a run starts know the files


def checked(path: Path) -> Path:
    """Returns the absolute path of a plugin file; raises FlagError where there is none."""
    file = path.absolute()
    if not file.is_file() or file.suffix != ".py":
        raise FlagError(f"--plugin {path}: there is no such Python file. Name a file that ends in .py and holds a component's class.")
    return file


def remember(file: Path) -> None:
    """Makes `file` one of the plugin files of this process and of those that it starts."""
    if file not in paths():
        os.environ[VARIABLE] = os.pathsep.join(str(each) for each in (*paths(), file))


def paths() -> tuple[Path, ...]:
    """Returns the plugin files of this process, in the order in which they were given."""
    return tuple(Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part)


def module_name(file: Path) -> str:
    """Returns the name under which a plugin file is imported: it changes with its content."""
    return f"ddkit_file_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}_{sha256(file)[:12]}"


@cache
def module_of(file: Path) -> ModuleType:
    """Returns the module of a plugin file, imported once; raises PluginError with cause and line where it cannot be."""
    name = module_name(file)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a stranger's file can raise anything
        del sys.modules[name]
        raise PluginError(f"The plugin file {file} could not be imported: {type(error).__name__}: {error}{_line(error, file)}.") from error
    return module


def _line(error: BaseException, file: Path) -> str:
    """Returns ", line N" of the file where the error came from, as far as it is known."""
    if isinstance(error, SyntaxError):
        return ""  # its message has it
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


def classes(file: Path, bases: Mapping[str, type]) -> Iterator[tuple[str, str, type]]:
    """Yields (kind, name, class) of every component that the file itself defines; raises PluginError where there is none.

    A component's name is its class name in lower case with hyphens, `ClassMean` being class-mean. Names with a leading
    underscore are not the user's.
    """
    module = module_of(file)
    own = [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]
    found = [(kind, each) for each in own for kind, base in bases.items() if issubclass(each, base) and not each.__name__.startswith("_")]
    if not found:
        kinds = ", ".join(f"ddkit.{base.__name__}" for base in bases.values())
        raise PluginError(f"The plugin file {file} defines no component: a class that is a subclass of one of {kinds}.")
    for kind, each in found:
        yield kind, hyphenated(each.__name__), each


def hyphenated(name: str) -> str:
    """Returns a class name as a component's name.

    >>> hyphenated("ClassMean"), hyphenated("DKKTLoss"), hyphenated("L2"), hyphenated("total_variation")
    ('class-mean', 'dkkt-loss', 'l2', 'total-variation')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.replace("_", "-").strip("-").lower()
