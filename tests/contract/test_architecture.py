"""The shape of the house: who imports whom, what importing costs, what the source must not contain, what is shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ddkit
from ddkit.components import source

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEEL: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
PLUGIN_PACKAGES = [Path(folder).name for folder in WHEEL if folder.startswith("plugins/")]
CORE_FILES = sorted((ROOT / "ddkit").rglob("*.py"))
PLUGIN_FILES = sorted((ROOT / "plugins").rglob("*.py"))
ENTRY_POINTS = [
    (group, name, value)
    for group, points in PROJECT["project"]["entry-points"].items()
    for name, value in points.items()
    if group not in ("ddkit.recipes", "ddkit.studies")
]


def _label(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _imports(text: str) -> Iterator[str]:
    """Yields the dotted name of every import, `from a import b` as "a.b"."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _core_names(text: str) -> Iterator[str]:
    """Yields every NAME of `ddkit.NAME` and `from ddkit import NAME`, whole where it is a module of ddkit."""
    yield from (name.removeprefix("ddkit.") for name in _imports(text) if name.startswith("ddkit."))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ddkit":
            yield node.attr


@pytest.mark.parametrize("file", PLUGIN_FILES, ids=_label)
def test_plugins_use_public_names_of_ddkit_only(file: Path) -> None:
    used = set(_core_names(file.read_text(encoding="utf-8")))
    assert used <= set(ddkit.__all__), f"not in ddkit.__all__: {sorted(used - set(ddkit.__all__))}"


def test_no_public_name_is_that_of_a_module_which_would_take_its_place_when_it_is_imported() -> None:
    modules = {file.stem if file.stem != "__init__" else file.parent.name for file in (ROOT / "ddkit").glob("*.py")}
    assert set(ddkit.__all__) & (modules | {file.parent.name for file in (ROOT / "ddkit").glob("*/__init__.py")}) == set()


def test_the_check_of_public_names_sees_private_ones() -> None:
    assert list(_core_names("import ddkit\nddkit.engine\nfrom ddkit.engine.bank import Bank")) == ["engine.bank.Bank", "engine"]


@pytest.mark.parametrize("file", PLUGIN_FILES, ids=_label)
def test_plugins_import_no_other_plugin(file: Path) -> None:
    own = file.relative_to(ROOT / "plugins").parts[0]
    others = {name.split(".")[0] for name in _imports(file.read_text(encoding="utf-8"))} & set(PLUGIN_PACKAGES)
    assert others <= {own}


@pytest.mark.parametrize("file", CORE_FILES, ids=_label)
def test_the_core_names_no_plugin_package(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert [name for name in PLUGIN_PACKAGES if name in text] == []


def _heavy_modules_after(code: str) -> list[str]:
    """Returns which of torch and numpy a fresh interpreter has imported after `code`."""
    report = "\nimport sys\nprint('\\nheavy:', *[m for m in ('torch', 'numpy') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return done.stderr.rpartition("heavy:")[2].split()


LIST = "import ddkit.cli; ddkit.cli.cli.main(['list'], standalone_mode=False)"


@pytest.mark.parametrize("code", ["import ddkit", "import ddkit.cli", LIST], ids=["ddkit", "cli", "list"])
def test_importing_and_listing_cost_neither_torch_nor_numpy(code: str) -> None:
    assert _heavy_modules_after(code) == []


def test_the_check_of_import_cost_can_fail() -> None:
    assert _heavy_modules_after("import numpy") == ["numpy"]


def _forbidden(text: str) -> Iterator[str]:
    """Yields uses of pickle, torch.load (but of tensors alone) and torch.save, eval and exec as functions, and numpy's allow_pickle."""
    tree = ast.parse(text)
    safe = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and _loads_tensors_alone(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "pickle"):
            yield node.id
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save") and node not in safe:
            yield ast.unparse(node)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield "allow_pickle"
    yield from (name for name in _imports(text) if name.split(".")[0] in UNPICKLERS)
    yield from (name for name in _imports(text) if name in ("torch.load", "numpy.load"))


UNPICKLERS = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def _loads_tensors_alone(call: ast.Call) -> bool:
    only = [word.value for word in call.keywords if word.arg == "weights_only"]
    return ast.unparse(call.func) == "torch.load" and [ast.unparse(value) for value in only] == ["True"]


@pytest.mark.parametrize("file", [*CORE_FILES, *PLUGIN_FILES], ids=_label)
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    assert list(_forbidden(file.read_text(encoding="utf-8"))) == []


def test_the_check_of_forbidden_calls_can_fail() -> None:
    assert list(_forbidden("import pickle\neval('1')")) == ["eval", "pickle"]
    assert list(_forbidden("torch.load(f)")) == ["torch.load"]
    assert list(_forbidden("torch.load(f, weights_only=False)")) == ["torch.load"]
    assert list(_forbidden("torch.load(f, weights_only=flag)")) == ["torch.load"]
    assert list(_forbidden("load = torch.load; load(f, weights_only=True)")) == ["torch.load"]
    assert list(_forbidden("torch.load(f, weights_only=True)")) == []
    assert list(_forbidden("import joblib")) == ["joblib"]
    assert list(_forbidden("np.load(f, allow_pickle=True)")) == ["allow_pickle"]
    assert list(_forbidden("np.load(f)")) == []
    assert list(_forbidden("network.eval()")) == []


@pytest.mark.parametrize(("group", "name", "value"), ENTRY_POINTS, ids=[f"{group}:{name}" for group, name, _ in ENTRY_POINTS])
def test_every_component_has_a_summary_and_ships(group: str, name: str, value: str) -> None:
    status, summary = source.summary(value)
    assert status == "ok"
    assert summary.endswith("."), "the first line of the docstring is one sentence"
    assert value.partition(":")[0].split(".")[0] in {"ddkit", *PLUGIN_PACKAGES}


def test_every_plugin_folder_ships() -> None:
    folders = {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
    assert folders == set(PLUGIN_PACKAGES)


@pytest.mark.parametrize("group", ["ddkit.recipes", "ddkit.studies"])
def test_every_package_of_recipes_or_studies_holds_some(group: str) -> None:
    for package in PROJECT["project"]["entry-points"][group].values():
        folder = source.package_folder(package)
        assert folder is not None
        assert list(folder.glob("*.toml"))
        assert folder.relative_to(ROOT / "plugins").parts[0] in PLUGIN_PACKAGES
