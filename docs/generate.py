"""Writes the pages that the code can write: components.md, a page for each component, cli.md. `python docs/generate.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from ddkit import plugins
from ddkit.cli import cli
from ddkit.options import describe_options

DOCS = Path(__file__).parent
HEAD = """# Components

What comes with ddkit, by kind. `ddkit list` shows the same and whatever else is installed; `ddkit info NAME` shows
one component with its options and bounds. Options are set in a recipe or with `--set`, see [recipes](recipes.md).

This page and those that it links to are written by `python docs/generate.py`; a test compares them with the code.
"""
CLI_HEAD = """# Commands

Every command with its arguments and flags, as its `--help` shows them. stdout is data, stderr is progress and messages;
the exit codes are in [getting started](getting-started.md#exit-codes).

This page is written by `python docs/generate.py`; a test compares it with the code.
"""
CHOSEN = {
    "loss": "ddkit distill --losses NAME",
    "loss-group": "ddkit distill --losses NAME",
    "initializer": "ddkit distill --init NAME",
    "augmenter": "ddkit distill --augment NAME",
    "evaluator": "ddkit distill --evaluate NAME",
    "model": "ddkit distill --model NAME",
    "dataset": "ddkit distill --dataset NAME",
}
WHERE = {
    "loss": "`losses.NAME`",
    "initializer": "`initializer`",
    "augmenter": "`augmenter`, `views.NAME` or `train`",
    "evaluator": "`evaluators.NAME`",
    "model": "`network` (the network that embeds or is matched) or `teacher`",
    "dataset": "`data`",
}


def pages() -> dict[Path, str]:
    """Returns the text of every page that is generated, by its file."""
    own = [p for p in plugins.plugins() if p.first_party and p.kind not in plugins.DATA_KINDS]
    return {DOCS / "components.md": _list(), DOCS / "cli.md": _commands(), **{DOCS / _file(p): _component(p) for p in own}}


def _file(plugin: plugins.Plugin) -> str:
    return f"components/{plugin.kind}-{plugin.name}.md"


def _component(plugin: plugins.Plugin) -> str:
    """Returns the page of one component: docstring, options, what it requires."""
    found = plugins.load_plugin(plugin)
    text = inspect.getdoc(found if inspect.isclass(found) else type(found)) or ""
    parts = [f"# {plugin.kind.replace('-', ' ').capitalize()} `{plugin.name}`\n\n{_prose(text)}\n"]
    if plugin.kind in CHOSEN:
        name = f"{plugin.name}:{found.argument.upper()}" if getattr(found, "argument", None) else plugin.name
        parts.append(f"```bash\n{CHOSEN[plugin.kind].replace('NAME', name)}\n```\n")
    if plugin.kind == "loss-group":
        parts.append(f"Members: {', '.join(f'[`{name}`](loss-{name}.md)' for name in found.members)}.\n")
    options = describe_options(found.Options) if hasattr(found, "Options") else []
    if options:
        rows = [f"| `{o['name']}` | {_default(o)} | {_kind(o)} | {_cell(o['description'])} |" for o in options]
        head = f"## Options\n\nUnder {WHERE[plugin.kind]}." if plugin.kind in WHERE else "## Options"
        parts.append("\n".join([head, "", "| option | default | values | meaning |", "|---|---|---|---|", *rows, ""]))
    asked = _asked(found)
    if asked:
        rows = [f"| `{key}` | {_cell(value)} |" for key, value in asked.items()]
        parts.append("\n".join(["## What it requires", "", "| requirement | value |", "|---|---|", *rows, ""]))
    parts.append("[All components](../components.md)\n")
    return "\n".join(parts)


def _prose(text: str) -> str:
    return re.sub(r"(?<!`)\*(?!\*)", r"\*", text)


def _cell(value: Any) -> str:
    return str(value or "").replace("|", "\\|").replace("\n", " ")


def _default(option: dict[str, Any]) -> str:
    return _option(option).partition("` ")[2]


def _kind(option: dict[str, Any]) -> str:
    return _cell(", ".join(str(part) for part in (option["type"], option["bounds"]) if part))


def _asked(found: Any) -> dict[str, Any]:
    """Returns the requirements that ask for something, with default options."""
    if not hasattr(found, "requires"):
        return {}
    requires = found.requires if not isinstance(found.requires, property) else found(found.Options()).requires
    plain = {key: value for key, value in msgspec.to_builtins(requires).items() if value not in (False, None, [], {}, ())}
    return {
        key: "yes" if value is True else ", ".join(value) if isinstance(value, list | tuple | dict) else value
        for key, value in plain.items()
    }


def _commands() -> str:
    """Returns the page of all commands."""
    context = click.Context(cli, info_name="ddkit", help_option_names=[])  # click keeps the option of the first context
    parts = [CLI_HEAD]
    for name, command in sorted(cli.commands.items()):
        inside = click.Context(command, info_name=name, parent=context, max_content_width=110, terminal_width=110)
        parts.append(f"## {name}\n\n```text\n{command.get_help(inside)}\n```\n")
    return "\n".join(parts)


def _list() -> str:
    """Returns the page of all first-party components."""
    parts = [HEAD]
    for kind in plugins.GROUPS:
        found = [p for p in plugins.plugins() if p.kind == kind and p.first_party]
        if found:
            parts.append("\n".join(_section(kind, found)))
    return "\n".join(parts)


def _section(kind: str, found: list[plugins.Plugin]) -> Iterator[str]:
    title = {"loss": "Losses", "study": "Studies"}.get(kind, f"{kind.replace('-', ' ').capitalize()}s")
    yield f"## {title}\n"
    if kind in WHERE:
        yield f"Options go under {WHERE[kind]}.\n"
    last = {"loss-group": "members", "recipe": "", "study": ""}.get(kind, "options and defaults")
    yield f"| name | what it is |{f' {last} |' if last else ''}"
    yield f"|---|---|{'---|' if last else ''}"
    for plugin in found:
        summary = plugins.status(plugin)[1].replace("|", "\\|")
        name = f"`{plugin.name}`" if plugin.kind in plugins.DATA_KINDS else f"[`{plugin.name}`]({_file(plugin)})"
        yield f"| {name} | {summary} |{f' {_details(plugin)} |' if last else ''}"
    yield ""


def _details(plugin: plugins.Plugin) -> str:
    found = plugins.load_plugin(plugin)
    if plugin.kind == "loss-group":
        return ", ".join(f"`{name}`" for name in found.members)
    if not hasattr(found, "Options"):
        return "none"
    return "<br>".join(_option(option) for option in describe_options(found.Options)) or "none"


def _option(option: dict[str, Any]) -> str:
    default = option["default"]
    text = "left out" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{option['name']}` {text or 'required'}"


if __name__ == "__main__":
    for file, text in pages().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for file in set((DOCS / "components").glob("*.md")) - set(pages()):
        file.unlink()
