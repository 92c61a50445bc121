"""Components of one Python file: to try a plugin before it is a package."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ddkit.errors import FlagError, PluginError

VARIABLE = "DDKIT_PLUGIN_FILES"  # a JSON list of paths: how processes that a run starts know the files


def checked(path: str | Path) -> Path:
    """Returns the absolute path of a plugin file; raises FlagError where there is none."""
    file = Path(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise FlagError(f"--plugin {path}: there is no such Python file. Name a file that ends in .py and holds a component's class.")
    return file


def remember(file: Path) -> None:
    """Makes `file` one of the plugin files of this process and of those that it starts."""
    if file not in paths():
        os.environ[VARIABLE] = json.dumps([str(each) for each in (*paths(), file)])


def paths() -> tuple[Path, ...]:
    """Returns the plugin files of this process, in the order in which they were given."""
    try:
        return tuple(Path(part) for part in json.loads(os.environ.get(VARIABLE) or "[]"))
    except (ValueError, TypeError):
        raise FlagError(f"The environment variable {VARIABLE} is no JSON list of paths. Unset it, and name files with --plugin.") from None


class _Loader(SourceFileLoader):
    """Loads a module from the bytes that were read, whatever the file holds by then, and keeps no bytecode of it."""

    def __init__(self, name: str, file: Path, content: bytes) -> None:
        super().__init__(name, str(file))
        self._content = content

    def get_data(self, path: str) -> bytes:
        if path != self.path:
            raise FileNotFoundError(path)  # bytecode of an earlier time
        return self._content

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Writes nothing."""


class PluginFile:
    """A plugin file as it was read: its `sha256`, and the `module` that was made of those very bytes."""

    def __init__(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise PluginError(f"The plugin file {file} could not be read: {error.strerror}.") from None
        self.file, self.sha256 = file, hashlib.sha256(content).hexdigest()
        self.module = self._module(content)

    def _module(self, content: bytes) -> ModuleType:
        """Returns the module of `content`, run once a process; raises PluginError with cause and line where it cannot be."""
        place = hashlib.sha256(str(self.file).encode()).hexdigest()[:6]
        name = f"ddkit_file_{re.sub(r'[^0-9a-zA-Z]', '_', self.file.stem)}_{place}_{self.sha256[:12]}"
        if name in sys.modules:
            return sys.modules[name]
        loader = _Loader(name, self.file, content)
        spec = importlib.util.spec_from_file_location(name, self.file, loader=loader)
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the command's
                loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a stranger's file can raise anything
            del sys.modules[name]
            cause = f"{type(error).__name__}: {error}{_line(error, self.file)}"
            raise PluginError(f"The plugin file {self.file} could not be imported: {cause}.") from error
        return module

    def classes(self, bases: Mapping[str, type]) -> Iterator[tuple[str, str, type]]:
        """Yields (kind, name, class) of every component that the file itself defines; raises PluginError where there is none.

        A component's name is its class name in lower case with hyphens, `ClassMean` being class-mean. Names with a leading
        underscore are not the user's.
        """
        own = [each for each in vars(self.module).values() if inspect.isclass(each) and each.__module__ == self.module.__name__]
        public = [each for each in dict.fromkeys(own) if not each.__name__.startswith("_")]
        found = [(kind, hyphenated(each.__name__), each) for each in public for kind, base in bases.items() if issubclass(each, base)]
        if not found:
            kinds = ", ".join(f"ddkit.{base.__name__}" for base in bases.values())
            raise PluginError(f"The plugin file {self.file} defines no component: a class that is a subclass of one of {kinds}.")
        yield from found


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


def hyphenated(name: str) -> str:
    """Returns a class name as a component's name.

    >>> hyphenated("ClassMean"), hyphenated("DKKTLoss"), hyphenated("L2"), hyphenated("total_variation")
    ('class-mean', 'dkkt-loss', 'l2', 'total-variation')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.replace("_", "-").strip("-").lower()
