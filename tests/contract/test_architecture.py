"""The shape of the house: public names, what the source must not contain, what is shipped. Who imports whom is import-linter's."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
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
PLUGIN_PACKAGES = {Path(folder).name for folder in WHEEL if folder.startswith("plugins/")}
CORE, PLUGINS = ({file: file.read_text(encoding="utf-8") for file in sorted((ROOT / part).rglob("*.py"))} for part in ("ddkit", "plugins"))
ENTRY_POINTS: dict[str, dict[str, str]] = PROJECT["project"]["entry-points"]
PUBLIC = {"ddkit": ddkit, "ddkit.nn": ddkit.nn, "ddkit.data": ddkit.data}
UNPICKLERS = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yields the dotted name of every import, `from a import b` as "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _private(text: str) -> set[str]:
    """Returns the names of ddkit that a source uses and that are not public."""
    tree = ast.parse(text)
    used = {name for name in _imports(tree) if name.startswith("ddkit.")}
    used |= {
        text for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.fullmatch(r"ddkit(\.\w+)+", text := ast.unparse(node))
    }
    public = [f"{module}.{name}." for module, found in PUBLIC.items() for name in found.__all__ if name not in ("nn", "data")]
    return {name for name in used if name not in PUBLIC and not f"{name}.".startswith(tuple(public))}


def test_plugins_use_public_names_alone() -> None:
    assert {file.name: names for file, text in PLUGINS.items() if (names := _private(text))} == {}
    assert _private("import ddkit\nddkit.engine\nddkit.nn.fit\nfrom ddkit.engine.bank import Bank") == {
        "ddkit.engine",
        "ddkit.engine.bank.Bank",
    }


@pytest.mark.parametrize("module", PUBLIC.values(), ids=PUBLIC)
def test_every_public_name_is_there_and_documented(module: Any) -> None:
    homes = {*module._HOME_OF, *({"__version__", "data", "nn"} if module is ddkit else ())}
    assert module.__all__ == sorted(homes)
    assert [name for name in module.__all__ if not getattr(module, name).__doc__] == []
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_the_core_names_no_plugin_package() -> None:
    assert [(file.name, name) for file, text in CORE.items() for name in PLUGIN_PACKAGES if name in text] == []


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
    yield from (name for name in _imports(tree) if name.split(".")[0] in UNPICKLERS or name in ("torch.load", "numpy.load"))


def _loads_tensors_alone(call: ast.Call) -> bool:
    only = [word.value for word in call.keywords if word.arg == "weights_only"]
    return ast.unparse(call.func) == "torch.load" and [ast.unparse(value) for value in only] == ["True"]


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert {file.name: found for file, text in {**CORE, **PLUGINS}.items() if (found := list(_forbidden(text)))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle\neval('1')", ["eval", "pickle"]),
        ("torch.load(f)", ["torch.load"]),
        ("torch.load(f, weights_only=False)", ["torch.load"]),
        ("torch.load(f, weights_only=flag)", ["torch.load"]),
        ("load = torch.load; load(f, weights_only=True)", ["torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("import joblib", ["joblib"]),
        ("np.load(f, allow_pickle=True)", ["allow_pickle"]),
        ("np.load(f)", []),
        ("network.eval()", []),
    ],
)
def test_the_check_of_forbidden_calls_can_fail(text: str, found: list[str]) -> None:
    assert list(_forbidden(text)) == found


def test_every_component_has_a_summary_and_ships() -> None:
    assert {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")} == PLUGIN_PACKAGES
    for group, points in ENTRY_POINTS.items():
        for name, value in points.items():
            assert value.partition(":")[0].split(".")[0] in PLUGIN_PACKAGES
            if group in ("ddkit.recipes", "ddkit.protocols", "ddkit.studies"):
                folder = source.package_folder(value)
                assert folder is not None
                assert list(folder.glob("*.toml"))
            else:
                status, summary = source.summary(value)
                assert (status, summary[-1:]) == ("ok", "."), f"{name}: the first line of the docstring is one sentence"


# A loss of a paper has to have an example.
LOSSES = [file for file in PLUGINS if file.parent.name == "ddkit_methods" and file.stem != "__init__"]
EXAMPLES = [file for file, text in {**CORE, **PLUGINS}.items() if ">>> " in text or file in LOSSES]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_examples_in_docstrings_hold(file: Path) -> None:
    """But for those of public names: test_docs.py runs these beside a finished run."""
    named = [getattr(module, name) for module in PUBLIC.values() for name in module.__all__]
    public = {f"{each.__module__}.{each.__qualname__}" for each in named if hasattr(each, "__qualname__")}
    place = file.relative_to(ROOT / "plugins" if file.is_relative_to(ROOT / "plugins") else ROOT).with_suffix("")
    module = importlib.import_module(".".join(place.parts).removesuffix(".__init__"))
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples and test.name not in public]
    assert (sum(doctest.DocTestRunner().run(test).failed for test in tests), bool(tests) or file not in LOSSES) == (0, True)


def _definitions(file: Path) -> set[str]:
    """Returns the names that a module defines, those in a class as Class.name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    found = {each.name for each in tree.body if isinstance(each, kinds)}
    found |= {each.target.id for each in tree.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)}
    return found | {
        f"{outer.name}.{each.name}"
        for outer in tree.body
        if isinstance(outer, ast.ClassDef)
        for each in outer.body
        if isinstance(each, kinds)
    }


def test_what_contributing_says_is_where_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| .+ \| \[(\S+)\]\((\S+)\) \| `(\S+)` \|$", text.partition("## Where is what")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert len(rows) >= 20
    assert [row for row in rows if row[0] != row[1] or not (ROOT / row[0]).is_file() or row[2] not in _definitions(ROOT / row[0])] == []
    assert "Step.no_such_member" not in _definitions(ROOT / "ddkit/engine/step.py")
