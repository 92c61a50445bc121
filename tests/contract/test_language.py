"""Help, errors, warnings, pages of components, notes of recipes and public docstrings avoid words that are hard to read."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import ddkit
import ddkit.data
import ddkit.nn
from ddkit.cli import cli
from ddkit.components import registry
from ddkit.components.kinds import DATA_KINDS
from ddkit.components.options import describe_options

ROOT = Path(__file__).parents[2]
AVOIDED = {
    "likewise, as above: a text stands alone": r"\blikewise\b|\bas (above|below)\b",
    "told: error, reported": r"\btold\b",
    "stranger: third-party": r"\bstrangers?\b",
    "and more, or more: at least": r"\b(and|or) more\b(?! \w)",
    "of adam: name the thing first": r"^of \w",
    "what ...: name the thing": r"\bwhat\b(?![^.]*\?)",
    "where there is: if for a condition": r"\bwhere (an?|it|none|that|the|there|they|this) (\w+ )?(is|are|has|have|does|do|was|were)\b",
    "a chain of colons and semicolons": r";[^.]*;|(?<!paper): [^.]*;(?! ours:)[^.]*: ",
}


def _commands() -> Iterator[tuple[str, str]]:
    for name in cli.commands:
        command = cli.commands[name]
        yield f"ddkit {name}", command.help or ""
        yield from ((f"ddkit {name} {option.opts[0]}", option.help or "") for option in command.params if isinstance(option, click.Option))


def _components() -> Iterator[tuple[str, str]]:
    for plugin in registry.plugins():
        if not plugin.first_party or plugin.kind == "loss-group":
            continue
        if plugin.kind in DATA_KINDS:
            table = tomllib.loads(Path(plugin.value).read_text(encoding="utf-8"))
            yield from ((f"{plugin.kind} {plugin.name} {key}", table.get(key, "")) for key in ("summary", "source"))
            yield from ((f"{plugin.kind} {plugin.name} {key}", note) for key, note in table.get("notes", {}).items())
            continue
        found = registry.load_plugin(plugin)
        yield f"{plugin.kind} {plugin.name}", inspect.getdoc(found) or ""
        if plugin.kind != "observer":
            yield from ((f"{plugin.kind} {plugin.name} {option['name']}", option["description"]) for option in describe_options(found))


def _public() -> Iterator[tuple[str, str]]:
    for module in (ddkit, ddkit.nn, ddkit.data):
        for name in module.__all__:
            found = getattr(module, name)
            inner = vars(found) if inspect.isclass(found) else {}
            members = [(name, found), *((f"{name}.{key}", value) for key, value in inner.items() if key[0] != "_")]
            own = ((label, each) for label, each in members if getattr(each, "__module__", "ddkit").startswith("ddkit"))
            yield from (
                (f"{module.__name__}.{label}", (each.__doc__ or "").partition(">>>")[0]) for label, each in own if not isinstance(each, str)
            )


def _literals(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of each literal with at least four words that is no docstring; an expression in it is `{}`."""
    nodes, skipped = list(ast.walk(ast.parse(source))), set()
    for node in nodes:
        skipped |= {id(part) for part in getattr(node, "values", ())} if isinstance(node, ast.JoinedStr) else set()
        skipped |= {id(node.value)} if isinstance(node, ast.Expr) else set()
    for node in nodes:
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in skipped:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            if text.count(" ") > 2:
                yield node.lineno, text


def _messages() -> Iterator[tuple[str, str]]:
    for folder in ("ddkit", "plugins"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            where = file.relative_to(ROOT)
            yield from ((f"{where}:{line}", text) for line, text in _literals(file.read_text(encoding="utf-8")))


def avoided(text: str) -> list[str]:
    """Returns why a text is hard to read, [] if it is not."""
    return [why for why, pattern in AVOIDED.items() if re.search(pattern, text)]


def test_hard_texts_are_found_and_plain_ones_are_not() -> None:
    bad = (
        "likewise with 0.5",
        "options as above",
        "it is told so",
        "a stranger's file",
        "give 1 or more",
        "of adam",
        "what is not the protocol's",
        "where there is none",
        "stored: the set's own; soft: the teacher's; auto: as the protocol says",
    )
    assert [len(avoided(text)) for text in bad] == [1] * len(bad)
    good = (
        "at least 1",
        "the folder where runs are kept",
        "paper: SGD; ours: Adam",
        "the rate of adam",
        "if there is none, use all; see below",
    )
    assert [avoided(text) for text in good] == [[]] * len(good)


@pytest.mark.parametrize("texts", [_commands, _components, _public, _messages])
def test_texts_that_a_user_meets_avoid_them(texts: Callable[[], Iterator[tuple[str, str]]]) -> None:
    found = list(texts())
    assert len(found) > 60
    hard = [f"{where}: {'; '.join(reasons)}: {text[:200]}" for where, text in found if (reasons := avoided(text))]
    assert not hard, "\n" + "\n".join(hard)
