"""What a plugin's source tells without importing it: where it is, whether it parses, its summary line."""

from __future__ import annotations

import ast
import gc
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddkit.files import MOST_TOML, read_text


def _top_spec(name: str) -> ModuleSpec | None:
    return _top_spec_on(name, tuple(sys.path))


@lru_cache(maxsize=256)
def _top_spec_on(name: str, path: tuple[str, ...]) -> ModuleSpec | None:
    """Returns the spec of a top-level module. It is kept as long as `path` is the same, so a package of many components is found once."""
    try:
        return find_spec(name)  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        return None


def package_folder(name: str) -> Path | None:
    """Returns the folder of package `name` without importing it or a parent, None if there is none."""
    top, *rest = name.split(".")
    spec = _top_spec(top)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location, *rest)
        if folder.is_dir():
            return folder
    return None


def module_file(name: str) -> Path | None:
    """Returns the source file of module `name` without importing it, None if there is none."""
    folder = package_folder(name)
    if folder is not None and (folder / "__init__.py").is_file():
        return folder / "__init__.py"
    parent, _, leaf = name.rpartition(".")
    if parent:
        above = package_folder(parent)
        return above / f"{leaf}.py" if above and (above / f"{leaf}.py").is_file() else None
    spec = _top_spec(name)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def summary(value: str) -> tuple[str, str]:
    """Returns (status, first line of the docstring) of the class that an entry point's `value` names."""
    status, found = _located(value)
    text = ast.get_docstring(found) if isinstance(found, ast.ClassDef | ast.FunctionDef | ast.Module) else None
    return status, (text or "").partition("\n")[0]


def option_names(value: str) -> list[str]:
    """Returns the names of the annotated fields in the body of the class that an entry point's `value` names: its own options."""
    found = _located(value)[1]
    body = found.body if isinstance(found, ast.ClassDef) else []
    own = [node for node in body if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)]
    return [node.target.id for node in own if isinstance(node.target, ast.Name)]


def _located(value: str) -> tuple[str, ast.stmt | ast.Module | None]:
    """Returns (status, definition) of the class that an entry point's `value` names, or whose object it names; None if it is not found."""
    module, _, attribute = value.partition(":")
    for _ in range(4):  # follows `from .other import Class`
        file = module_file(module)
        if file is None:
            return f"module {module} not found", None
        try:
            tree = _parsed(file, file.stat().st_mtime_ns)
        except (SyntaxError, ValueError, OSError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            return f"{type(error).__name__} in {file.name}{line}", None
        found = _definition(tree, attribute) if attribute else tree
        if isinstance(found, ast.Assign) and isinstance(found.value, ast.Call) and isinstance(found.value.func, ast.Name):
            found = _definition(tree, found.value.func.id) or found  # an object: its class describes it
        if not isinstance(found, ast.ImportFrom):
            return f"{module} has no {attribute}" if found is None else "ok", found
        attribute = next(alias.name for alias in found.names if (alias.asname or alias.name) == attribute)
        if found.level:
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            module = ".".join([*package[: len(package) - found.level + 1], *([found.module] if found.module else [])])
        else:
            module = found.module or ""
    return "ok", None


@lru_cache(maxsize=64)
def _parsed(file: Path, changed: int) -> ast.Module:
    """Returns the syntax tree of a file as it is at its modification time `changed`: a module may define many components."""
    return ast.parse(read_text(file))


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python looks for no garbage: a listing parses many files, and looking after each took a quarter of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # so that it does not look after all of it as soon as it looks again
        if collects:
            gc.enable()


def _definition(tree: ast.Module, name: str) -> ast.stmt | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            return node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node
    return None


def _table(file: Path) -> tuple[str, dict[str, Any]]:
    """Returns (status, content) of a TOML file."""
    try:
        return "ok", tomllib.loads(read_text(file, most=MOST_TOML))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        return f"{type(error).__name__}: {error}", {}


def toml_summary(file: Path) -> tuple[str, str]:
    """Returns (status, summary) of a recipe or study file."""
    status, table = _table(file)
    return status, str(table.get("summary", ""))


def group_names(file: Path) -> list[str]:
    """Returns the names of the loss groups of a file of groups; of one that cannot be read its own, which stands for them."""
    table = _table(file)[1].get("groups")
    return list(table) if isinstance(table, dict) else [file.stem]


def group(file: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """Returns (status, members) of the loss group `name` of a file of groups."""
    status, table = _table(file)
    groups = table.get("groups")
    names: Any = groups.get(name) if isinstance(groups, dict) else None
    fits = isinstance(names, list) and names and all(isinstance(each, str) for each in names)
    if fits and len({each.rpartition("/")[2] for each in names}) == len(names):
        return "ok", tuple(names)
    return status if status != "ok" else f"the line {name} = [...] in the table [groups] must be a list of different losses", ()
