"""Writes docs/components.md from the installed first-party components: `python docs/generate_components.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddkit import plugins
from ddkit.options import describe_options

PAGE = Path(__file__).with_name("components.md")
HEAD = """# Components

What comes with ddkit, by kind. `ddkit list` shows the same and whatever else is installed; `ddkit info NAME` shows
one component with its options and bounds. Options are set in a recipe or with `--set`, see [recipes](recipes.md).

This page is written by `python docs/generate_components.py`; a test compares it with the code.
"""
WHERE = {
    "loss": "`losses.NAME`",
    "initializer": "`initializer`",
    "augmenter": "`augmenter`, `views.NAME` or `train`",
    "evaluator": "`evaluators.NAME`",
    "model": "`network` (the network that embeds or is matched) or `teacher`",
    "dataset": "`data`",
}


def page() -> str:
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
        yield f"| `{plugin.name}` | {summary} |{f' {_details(plugin)} |' if last else ''}"
    yield ""


def _details(plugin: plugins.Plugin) -> str:
    found = plugins.load_plugin(plugin)
    if plugin.kind == "loss-group":
        return ", ".join(f"`{name}`" for name in found.members)
    return "<br>".join(_option(option) for option in describe_options(found.Options)) or "none"


def _option(option: dict[str, Any]) -> str:
    default = option["default"]
    text = "left out" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{option['name']}` {text or 'required'}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
