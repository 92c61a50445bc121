"""What to change in a plugin that was written for ddkit 0.1: read from its source, as such a module cannot be imported any more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddkit.files import read_text

INSTEAD = {  # names of ddkit in 0.1 that went, and what is written now; others moved to ddkit.nn or ddkit.data
    "Option": 'NAME: TYPE = ddkit.option(DEFAULT, "its help") in the class itself',
    "Options": 'NAME: TYPE = ddkit.option(DEFAULT, "its help") in the class itself, for each option',
    "Start": "ddkit.InitContext",
    "LossGroup": '[groups] NAME = ["loss", "other loss"] in a file groups.toml beside recipes',
    "API_VERSION": 'dependencies = ["ddkit>=0.2"] in pyproject.toml',
}
MEMBERS = {  # of a step
    "rows_by_class": "class_slices", "total": "all_reduce", "totals": "all_reduce", "gather": "all_gather", "scatter": "local_rows",
}  # fmt: skip
REQUIRES = {  # fields of ddkit.Requires
    "embedder=True": "network=True",
    "network_gradients=True": "network=True, second_order=True",
    "teacher_gradients=True": "teacher=True, second_order=True",
    "separable='total'": 'reduce="global"',
    "separable='mean'": 'reduce="mean"',
    "separable='sum'": 'reduce="sum"',
}


def instead(name: str) -> str:
    """Returns what is written now for `ddkit.NAME`, "" if 0.1 had no such name or it is there still."""
    import ddkit

    for module in (ddkit.nn, ddkit.data):
        if name in module.__all__:
            return f"{module.__name__}.{name}"
    return INSTEAD.get(name, "")


def problem(who: str, file: Path | None) -> str:
    """Returns the message that refuses `who`, defined in `file`, with the lines to change; "" if the file is not of 0.1."""
    try:
        tree = ast.parse(read_text(file)) if file is not None else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return ""
    lines = sorted({(node.lineno, old, new) for node, old, new in _changes(tree)})
    if all(old.startswith(("self.options.", "step.")) for _, old, _ in lines):  # may be anybody's names
        return ""
    told = "; ".join(f"line {number}: {old} -> {new}" for number, old, new in lines)
    return f"The {who} is written for the plugin API of ddkit 0.1. This version has a new one. Change these lines of {file}: {told}."


def _changes(tree: ast.Module) -> Iterator[tuple[Any, str, str]]:
    """Yields (node, old text, new text) of everything in a source that 0.2 does not have."""
    own: list[ast.stmt] = [member for outer in ast.walk(tree) if isinstance(outer, ast.ClassDef) for member in outer.body]
    for statement in own:
        text = ast.unparse(statement)
        if isinstance(statement, ast.ClassDef) and statement.name == "Options":
            yield statement, text.splitlines()[0], "no line: each option is a field of the class around it"
            yield from ((field, ast.unparse(field), option_line(field)) for field in statement.body if isinstance(field, ast.AnnAssign))
        elif isinstance(statement, ast.Assign) and text.startswith("api = "):
            yield statement, text, "no line"
        elif isinstance(statement, ast.FunctionDef) and statement.name == "requires" and statement.decorator_list:
            yield statement, "@property", "no line: requires is a method"
        elif (
            isinstance(statement, ast.FunctionDef)
            and statement.name == "__init__"
            and "options" in {each.arg for each in statement.args.args}
        ):
            yield statement, text.splitlines()[0], "def __init__(self, **options):"
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.keyword | ast.Call) else ""
        if isinstance(node, ast.keyword) and text in REQUIRES:
            yield node.value, text.replace("'", '"'), REQUIRES[text]
        elif isinstance(node, ast.Call) and re.fullmatch(r"super\(\)\.__init__\(options\b.*\)", text):
            yield node, text, "super().__init__(**options)"
        elif isinstance(node, ast.Attribute) and text.startswith("self.options."):
            yield node, text, text.replace(".options", "", 1)
        elif isinstance(node, ast.Attribute) and text in {f"step.{name}" for name in MEMBERS}:
            yield node, text, f"step.{MEMBERS[node.attr]}"
        elif text.startswith("ddkit.") and text not in ("ddkit.Option", "ddkit.Options") and (new := instead(text[6:])):
            yield node, text, new  # the two are told with the fields


def option_line(field: ast.AnnAssign) -> str:
    """Returns the line that declares a field of a class Options of 0.1 as an option of the class around it."""
    calls: list[ast.Call] = []

    class Unfold(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            self.generic_visit(node)
            if ast.unparse(node.value).rpartition(".")[2] == "Annotated" and isinstance(node.slice, ast.Tuple):
                calls.extend(each for each in node.slice.elts[1:] if isinstance(each, ast.Call))
                return node.slice.elts[0]
            return node

    hint = ast.unparse(Unfold().visit(field.annotation))
    default = field.value or ast.Constant(None)
    if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field") and default.keywords:
        factory = default.keywords[0].value  # msgspec.field(default_factory=...)
        default = factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
    arguments = [default, *(argument for call in calls for argument in (*call.args, *call.keywords))]
    return f"{ast.unparse(field.target)}: {hint} = ddkit.option({', '.join(_doubled(each) for each in arguments)})"


def _doubled(node: ast.AST) -> str:
    """Returns the source of an argument, a plain text in double quotes, as the project's formatter writes it."""
    text = ast.unparse(node)
    plain = isinstance(node, ast.Constant) and isinstance(node.value, str) and '"' not in node.value and "\\" not in text
    return f'"{text[1:-1]}"' if plain and text.startswith("'") else text
