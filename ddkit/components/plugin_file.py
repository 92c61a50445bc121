"""Components of one Python file: to try a plugin before it is a package."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
import traceback
from collections.abc import Mapping
from importlib.abc import InspectLoader
from importlib.util import decode_source, module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

from ddkit.components import upgrade
from ddkit.errors import PluginError, RunFilesError, is_its_own, told
from ddkit.files import read_bytes

_KNOWN: dict[str, str] = {}  # path to sha256, of the files that were given in this process, or handed to it by the one that started it


class FileChanged(PluginError):
    """A plugin file is another one than it was when the run that uses it began."""


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
        f"{run} was made with the plugin file {file}, which {what}: the sha256 was {gone[file][:12]}, and is now {new[other][:12]}. A run "
        "can only be continued with the same code. Restore the file, or start a new run: `ddkit distill --recipe "
        f"{shlex.quote(str(run / 'recipe.toml'))} --plugin {shlex.quote(other)}`."
    )


class PluginFile(NamedTuple):
    """A plugin file as it was read, and the module that was made of those very bytes."""

    file: Path
    sha256: str
    module: ModuleType


class _Loader(InspectLoader):
    """Runs the bytes that were read, whatever the file holds by then, and keeps no bytecode."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file = file
        self.content = content

    def get_source(self, fullname: str) -> str:
        return decode_source(self.content)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.content, str(self.file))


_OPENED: dict[tuple[str, str], PluginFile] = {}


def opened(path: str, digest: str = "") -> PluginFile:
    """Returns the plugin file as this process read it when its sha256 was `digest`, or as it is now.

    Raises PluginError if it cannot be read or imported; with a `digest` that this process has not read, FileChanged if the file has
    another one by now, and then runs none of it.
    """
    if (path, digest) in _OPENED:
        return _OPENED[path, digest]
    file = Path(path)
    try:
        content = read_bytes(file)
    except OSError as error:
        raise PluginError(f"The plugin file {file} could not be read: {error.strerror or error}.") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if digest and sha256 != digest:
        raise FileChanged(
            f"The plugin file {file} has changed since the process that started this one read it: its sha256 was {digest[:12]}, "
            f"and is now {sha256[:12]}. Restore the file, or start again."
        )
    if (path, sha256) in _OPENED:
        return _OPENED[path, sha256]
    from ddkit.components.guard import unchanged  # imports torch

    place = hashlib.sha256(str(file).encode()).hexdigest()[:6]  # two files may have the same text
    name = f"ddkit_file_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}_{place}_{sha256[:12]}"
    spec = spec_from_file_location(name, file, loader=_Loader(file, content))
    assert spec is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        with unchanged(f"plugin file {file}", " Fix the file."):
            spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException as error:
        del sys.modules[name]
        if not is_its_own(error):
            raise
        changes = upgrade.problem(f"plugin file {file}", file)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines and not isinstance(error, SyntaxError) else ""  # the message of that one has it
        raise PluginError(changes or f"The plugin file {file} could not be imported: {told(error)}{where}.") from error
    _OPENED[path, sha256] = PluginFile(file, sha256, module)
    return _OPENED[path, sha256]


def hyphenated(name: str) -> str:
    """Returns a class name as a component's name.

    >>> hyphenated("ClassMean"), hyphenated("DKKTLoss"), hyphenated("L2"), hyphenated("total_variation")
    ('class-mean', 'dkkt-loss', 'l2', 'total-variation')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.replace("_", "-").strip("-").lower()
