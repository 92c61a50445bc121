"""Writes the package of a new plugin: what `ddkit new` makes."""

from __future__ import annotations

import importlib.resources
import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

import ddkit
from ddkit.components import registry
from ddkit.components.kinds import CHECKED, KINDS
from ddkit.errors import FlagError, RunFilesError
from ddkit.files import write_atomic
from ddkit.text import suggestion


def new_package(kind: str, name: str, folder: Path | None = None) -> Path:
    """Writes the package of a new `kind` called `name` into `folder` (None: ./ddkit-NAME) and returns that folder.

    Raises FlagError for a kind or name that cannot be, RunFilesError where the folder is there already or cannot be written.
    """
    if kind not in CHECKED:
        raise FlagError(f"There is no scaffold for a {kind}. {suggestion(kind, CHECKED)}")
    distribution, package = f"ddkit-{name}", f"ddkit_{name.replace('-', '_')}"
    class_name = "".join(part.capitalize() for part in name.split("-"))
    _check_name(kind, name, package, class_name)
    target = folder or Path(distribution)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFilesError(f"{target} exists already. Name another folder with --out, or remove it.")
    values = {
        "kind": kind, "name": name, "distribution": distribution, "package": package, "group": KINDS[kind].group,
        "class_name": class_name, "value": package if kind == "observer" else f"{package}:{class_name}",
        "suite": f"{kind.title().replace('-', '')}Conformance", "use": KINDS[kind].tried(name),
        "ddkit_version": ".".join(ddkit.__version__.split(".")[:2]),
    }  # fmt: skip
    files = {
        "pyproject.toml": "pyproject.toml", "README.md": "README.md", f"src/{package}/__init__.py": f"{kind}.py",
        "tests/test_conformance.py": "test.py",
    }  # fmt: skip
    for path, name_of_template in files.items():
        file = target / path
        text = Template(_template(name_of_template)).substitute(values)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFilesError(f"{file.parent} cannot be made ({error.strerror}). Name a writable folder with --out.") from None
        write_atomic(file, text.encode())
    return target


def _check_name(kind: str, name: str, package: str, class_name: str) -> None:
    if not registry.NAME.fullmatch(name) or name.endswith("-") or "--" in name:
        raise FlagError(f"A {kind} cannot be named '{name}'. Names consist of lower-case letters, digits and hyphens, such as my-{kind}.")
    if keyword.iskeyword(class_name) or re.search(rf"\b{class_name}\b", _template(f"{kind}.py").replace("$class_name", "")):
        raise FlagError(
            f"A {kind} cannot be named '{name}', because its class {class_name} would hide a name that the code needs. Try my-{name}."
        )
    taken = [plugin for plugin in registry.plugins() if plugin.name == name and registry.share_names(plugin.kind, kind)]
    if taken:
        raise FlagError(f"The {taken[0].label} has that name already. Choose another.")
    if importlib.util.find_spec(package) is not None:
        raise FlagError(f"A {kind} cannot be named '{name}', because a package {package} exists already. Try my-{name}.")


def _template(name: str) -> str:
    return (importlib.resources.files(__package__) / "templates" / f"{name}.txt").read_text(encoding="utf-8")
