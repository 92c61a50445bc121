"""Components of one Python file: to try a plugin before it is a package."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ddkit.errors import FlagError, PluginError, RunFilesError, is_its_own, told
from ddkit.files import read_bytes

_KNOWN: dict[str, str] = {}  # path to sha256, of the files that were given in this process, or handed to it by the one that started it


class FileChanged(PluginError):
    """A plugin file is another one than it was when the run that uses it began."""


def checked(path: str | Path) -> Path:
    """Returns the absolute path of a plugin file; raises FlagError where there is none."""
    file = Path(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise FlagError(f"--plugin {path}: there is no such Python file. Name a file that ends in .py and holds a component's class.")
    return file


def remember(files: Mapping[str, str]) -> None:
    """Makes these the plugin files of this process, path to sha256."""
    given = dict(files)
    _KNOWN.clear()
    _KNOWN.update(given)


def known() -> dict[str, str]:
    """Returns the plugin files of this process, path to sha256, in the order in which they were given."""
    return dict(_KNOWN)


def check_unchanged(began: Mapping[str, str], run: Path) -> None:
    """Raises RunFilesError where a plugin file that `run` began with (path to sha256) is another one in this process.

    A file that moved is the same one; one that is not given at all is told where its component is looked for.
    """
    now = known()
    gone = {file: digest for file, digest in began.items() if digest not in now.values()}
    new = {file: digest for file, digest in now.items() if digest not in began.values()}
    if not gone or not new:
        return
    file = next(iter([each for each in gone if each in new] or gone))
    other = file if file in new else next(iter([each for each in new if Path(each).name == Path(file).name] or new))
    what = "has changed since" if other == file else f"is not {other}"
    raise RunFilesError(
        f"{run} began with the plugin file {file}, which {what}: its sha256 was {gone[file][:12]}, and is {new[other][:12]} now. A run is "
        f"continued with the code that it began with: bring the file back as it was, or start anew with "
        f"`ddkit distill --recipe {run / 'recipe.toml'} --plugin {other}`."
    )


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
    """A plugin file as it was read: its `sha256`, and the `module` that was made of those very bytes.

    Raises PluginError where it cannot be read or imported; with `expected`, FileChanged where its sha256 is another, having
    run none of it.
    """

    def __init__(self, file: Path, expected: str = "") -> None:
        try:
            content = read_bytes(file)
        except OSError as error:
            raise PluginError(f"The plugin file {file} could not be read: {error.strerror or error}.") from None
        self.file, self.sha256 = file, hashlib.sha256(content).hexdigest()
        if expected and self.sha256 != expected:
            raise FileChanged(
                f"The plugin file {file} has changed since the process that started this one read it: its sha256 was {expected[:12]}, "
                f"and is {self.sha256[:12]} now. Bring the file back as it was, or start anew."
            )
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
        from ddkit.components.globalstate import unchanged  # imports torch

        try:
            with unchanged(f"plugin file {self.file}", "Mend it."):
                loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if not is_its_own(error):
                raise
            raise PluginError(f"The plugin file {self.file} could not be imported: {told(error)}{_line(error, self.file)}.") from error
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


_OPENED: dict[tuple[str, str], PluginFile] = {}


def opened(file: str, digest: str = "") -> PluginFile:
    """Returns the plugin file as this process read it when its sha256 was `digest`, or as it is now.

    Raises FileChanged where this process has not read it and it is another one by now; without `digest` it is read anew.
    """
    if (file, digest) not in _OPENED:
        found = PluginFile(Path(file), digest)
        _OPENED[file, found.sha256] = found
        return found
    return _OPENED[file, digest]


def hyphenated(name: str) -> str:
    """Returns a class name as a component's name.

    >>> hyphenated("ClassMean"), hyphenated("DKKTLoss"), hyphenated("L2"), hyphenated("total_variation")
    ('class-mean', 'dkkt-loss', 'l2', 'total-variation')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.replace("_", "-").strip("-").lower()
