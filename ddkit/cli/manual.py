"""The facts of a component, recipe, protocol or study, as data and as the page that `ddkit info` prints and the docs have."""

from __future__ import annotations

import json
import textwrap
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddkit.components import registry
from ddkit.components.kinds import CHECKED, DATA_KINDS, KINDS

WIDEST = 100
ASKS = {
    "real": "real images that the run may use (--pipc)",
    "network": "the network of each step, or its features",
    "teacher": "a trained model (--teacher FILE, else one is trained)",
    "second_order": "second derivatives, through gradients by parameters of the network or trained model, in float32 and not compiled",
    "views": "augmented views of the set, recipe tables [views.NAME]",
    "parameters": "extra parameters of the set, which are optimised with its images",
    "reduce": "the value can be computed for parts of the set, so that large sets fit into memory",
}


def namesakes(plugin: registry.Plugin, among: Collection[str] = KINDS) -> list[str]:
    """Returns the other kinds, of those `among`, that have a component or recipe of the plugin's name."""
    kinds = {p.kind for p in registry.plugins() if p.name == plugin.name} - {plugin.kind}
    return [kind for kind in KINDS if kind in kinds and kind in among]


def facts(plugin: registry.Plugin) -> dict[str, Any]:
    """Returns what `ddkit info --json` prints: docstring, options and requirements of a component, the text of one that is a file."""
    base: dict[str, Any] = {"kind": plugin.kind, "name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
    base |= {"namesakes": namesakes(plugin)}
    if plugin.kind == "loss-group":
        return base | {"description": registry.status(plugin)[1], "members": list(registry.members(plugin))}
    if plugin.kind in DATA_KINDS:
        from ddkit.recipes.resolve import described, parse_toml

        base |= {"text": Path(plugin.value).read_text(encoding="utf-8")}
        if plugin.kind == "study":
            return base
        raw = parse_toml(Path(plugin.value))
        return base | {"summary": raw.get("summary", ""), "source": raw.get("source", ""), "settings": described(raw)}
    import inspect

    import msgspec

    from ddkit.components.options import describe_options

    found = registry.load_plugin(plugin)
    base |= {"description": inspect.getdoc(found) or ""}
    if plugin.kind == "observer":
        return base
    requires = msgspec.to_builtins(registry.required_by(plugin))
    asked = {key: value for key, value in requires.items() if value not in (False, None, [], {}, ())}
    return base | {"argument": found.argument, "options": describe_options(found), "requires": asked}


def page(told: Mapping[str, Any], width: int = WIDEST) -> str:
    """Returns the page of a component, recipe, protocol or study in Markdown, `told` being its facts; prose fits into `width`."""
    kind, name = told["kind"], told["name"]
    text = told.get("description", "")
    if "text" in told:
        table = tomllib.loads(told["text"])
        text = str(table.get("summary") or table.get("title") or f"a {kind}")
        text += f"\n\nSource: {table['source']}" if table.get("source") else ""
    others = [f"`ddkit info {other} {name}` (the {other} of that name)" for other in told["namesakes"]]
    others += [f"`ddkit info {member}`" for member in told.get("members", ())]
    others += [f"`ddkit list {kind}`", f"`ddkit check {kind} {name}`" if kind in CHECKED else f"`ddkit info {kind} {name} --json`"]
    settings = told.get("settings", [])
    noted = any(row["origin"] for row in settings)
    sections = {
        "Use": _fenced("bash", _commands(told)),
        "Members": ", ".join(f"`{member}`" for member in told.get("members", ())),
        "Options": "\n".join(_option(option, width) for option in told.get("options", ())),
        "Settings": _fenced("text", _settings_table(settings)) if noted else "",
        "File": _fenced("toml", told["text"].rstrip()) if "text" in told and not noted else "",
        "Requirements": "\n".join(
            _item(f"`{key}`: {json.dumps(value)}" + (f" - {ASKS[key]}" if key in ASKS else ""), width)
            for key, value in told.get("requires", {}).items()
        ),
        "See also": _wrapped(", ".join(others), width),
    }
    parts = [f"# {kind.replace('-', ' ').capitalize()} `{name}`", _wrapped(text, width)]
    return "\n\n".join(parts + [f"## {title}\n\n{section}" for title, section in sections.items() if section])


def _commands(told: Mapping[str, Any]) -> str:
    """Returns the commands that use it, and --set for its options."""
    kind, name, argument = told["kind"], told["name"], told.get("argument")
    if kind == "recipe":
        trains = "losses" not in tomllib.loads(told["text"])
        return f"ddkit train --recipe {name} --out teacher.safetensors" if trains else f"ddkit distill --recipe {name} --plan"
    lines = [line.replace("NAME", f"{name}:{argument.upper()}" if argument else name) for line in KINDS[kind].uses]
    if kind == "protocol":
        lines += ["--set evaluators.accuracy.KEY=VALUE"]
    if told.get("options"):
        lines += [f"--set {path}.OPTION=VALUE".replace("NAME", name) for path in KINDS[kind].paths]
        lines += ["--set OPTION=VALUE"] if kind == "exporter" else []
    return "\n".join(lines) or "# used in every run, once it is installed"


def _option(option: Mapping[str, Any], width: int) -> str:
    default = "left out" if option["default"] is None else json.dumps(option["default"], ensure_ascii=False)
    values = ", ".join(filter(None, (option["type"], option["bounds"])))
    told = f": {option['description']}" if option["description"] else ""
    return _item(f"`{option['name']} = {default}` ({values}){told}", width)


def _settings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    from tabulate import tabulate

    signs = {"min": ">=", "max": "<="}
    cells = []
    for row in rows:
        rules = [
            f"{json.dumps(rule['value'], ensure_ascii=False)} if "
            + " and ".join(f"{key[:-4]} {signs[key[-3:]]} {bound}" for key, bound in rule["when"].items())
            for rule in row["rules"]
        ]
        own = [json.dumps(row["value"], ensure_ascii=False)] if row["value"] is not None else [] if rules else ["(default)"]
        lines = [line for text in own + rules for line in textwrap.wrap(text, 34)]
        cells.append([row["path"], "\n".join(lines), row["origin"], textwrap.fill(row["why"], 56)])
    return tabulate(cells, ["setting", "value", "from", "why"], tablefmt="simple", disable_numparse=True)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _item(text: str, width: int) -> str:
    return textwrap.fill(f"- {text}", width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _wrapped(text: str, width: int) -> str:
    """Returns paragraphs in lines that fit; items of lists hang, and what is indented stays as it is."""
    blocks = []
    for block in text.split("\n\n"):
        items: list[str] = []
        for line in block.splitlines():
            if not items or line.startswith(("- ", "* ")):
                items.append(line)
            else:
                items[-1] += f" {line.strip()}"
        hanging = [("  " if item.startswith(("- ", "* ")) else "", item) for item in items]
        filled = [textwrap.fill(i, width, subsequent_indent=h, break_long_words=False, break_on_hyphens=False) for h, i in hanging]
        blocks.append(block if block.startswith(" ") else "\n".join(filled))
    return "\n\n".join(blocks)
