"""The commands that tell what is installed and what a recipe may hold: list, info and schema."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import Names, as_json, echo_json, plugin_files, refuse_given, show
from ddkit.components import registry
from ddkit.errors import PluginError


@click.command(name="list")
@click.argument("kind", required=False)
@plugin_files
@click.option("--check", is_flag=True, help="Import each component, in another process, and say which fail.")
@as_json
def list_components(kind: str | None, check: bool, as_json: bool) -> None:
    """List the installed components. KIND names one kind (losses, recipes, ...). None of them is imported."""
    wanted = registry.parse_kind(kind) if kind else None
    if wanted in registry.DATA_KINDS:
        refuse_given(["check"], f"a {wanted} is a file, which nothing imports.")
    found = [p for p in registry.plugins() if wanted in (None, p.kind)]
    rows = [_row(p) for p in found]
    if check:
        for row, problem in zip(rows, _check(found), strict=True):
            row["status"] = problem if row["status"] == "ok" else row["status"]
    if as_json:
        echo_json({"schema": 1, "components": rows})
        return
    from tabulate import tabulate

    table = [[r["kind"], r["name"], r["distribution"], r["status"], r["summary"]] for r in rows]
    show(tabulate(table, ["kind", "name", "from", "status", "summary"], tablefmt="simple", disable_numparse=True))


def _row(plugin: registry.Plugin) -> dict[str, str]:
    status, summary = registry.status(plugin)
    return {
        "kind": plugin.kind, "name": plugin.name, "distribution": plugin.distribution, "version": plugin.version,
        "summary": summary, "status": status,
    }  # fmt: skip


_CHECKER = """
import json
from ddkit import errors
from ddkit.components import registry
try:
    listed = registry.plugins()
except errors.DdkitError as error:
    children.reply({"error": str(error)})
    sys.exit(error.exit_code)
for plugin in listed:
    if plugin.kind in registry.DATA_KINDS or [plugin.kind, plugin.distribution, plugin.name] not in json.loads(sys.argv[1]):
        continue
    try:
        registry.load_plugin(plugin)
        problem = "ok"
    except BaseException as error:
        problem = str(error)
    children.reply({"plugin": [plugin.kind, plugin.distribution, plugin.name], "problem": problem})
"""


def _check(found: list[registry.Plugin]) -> list[str]:
    """Returns "ok" or what went wrong for each plugin; a process that dies blames the plugin it was importing."""
    from ddkit.run import children

    results: dict[tuple[str, ...], str] = {}
    waiting = [p for p in found if p.kind not in registry.DATA_KINDS]
    while waiting:
        keys = [[p.kind, p.distribution, p.name] for p in waiting]
        done = children.run(_CHECKER, json.dumps(keys))
        for told in map(json.loads, done.stdout.splitlines()):
            if "error" in told:
                raise PluginError(told["error"])
            results[tuple(told["plugin"])] = told["problem"]
        waiting = [p for p in waiting if (p.kind, p.distribution, p.name) not in results]
        if waiting:
            culprit = waiting.pop(0)
            results[culprit.kind, culprit.distribution, culprit.name] = f"importing it ended the process (exit {done.returncode})"
    return [results.get((p.kind, p.distribution, p.name), "ok") for p in found]


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[KIND] NAME", type=Names(*registry.GROUPS))
@plugin_files
@as_json
def info(words: tuple[str, ...], as_json: bool) -> None:
    """Show what a component or recipe is. The manual page has its use, options, requirements, an example and its source."""
    if len(words) > 2:
        raise click.UsageError("info takes [KIND] NAME.")
    facts = _facts(found_plugin(words))
    if as_json:
        echo_json({"schema": 1, **facts})
    else:
        show(_page(facts))


def found_plugin(words: tuple[str, ...], among: Collection[str] = registry.GROUPS) -> registry.Plugin:
    """Returns the plugin that the words [KIND] NAME mean; without a KIND it is of the first kind, of those `among`, that has the name.

    Kinds are in the order of plugins.GROUPS: a loss or another component comes before a recipe.
    """
    name = words[-1]
    if len(words) == 2:
        return registry.find(registry.parse_kind(words[0]), name)
    short = name.rpartition("/")[2]
    found = {p.kind for p in registry.plugins() if p.name == short}
    kinds = [kind for kind in registry.GROUPS if kind in found]
    kinds = [kind for kind in kinds if kind in among] or kinds
    if not kinds:
        near = difflib.get_close_matches(short, {p.name for p in registry.plugins()}, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise PluginError(f"There is no component '{name}'.{hint} `ddkit list` shows them all.")
    return registry.find(kinds[0], name)


def namesakes(plugin: registry.Plugin, among: Collection[str] = registry.GROUPS) -> list[str]:
    """Returns the other kinds, of those `among`, that have a component or recipe of the plugin's name."""
    kinds = {p.kind for p in registry.plugins() if p.name == plugin.name} - {plugin.kind}
    return [kind for kind in registry.GROUPS if kind in kinds and kind in among]


def _facts(plugin: registry.Plugin) -> dict[str, Any]:
    base: dict[str, Any] = {"kind": plugin.kind, "name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
    base |= {"namesakes": namesakes(plugin)}
    if plugin.kind in registry.DATA_KINDS:
        return base | _file_facts(plugin)
    import inspect

    import msgspec

    from ddkit.components.options import describe_options

    found = registry.load_plugin(plugin)
    facts: dict[str, Any] = base | {"description": inspect.getdoc(found) or ""}
    if plugin.kind == "loss-group":
        return facts | {"members": list(found.members)}
    if plugin.kind == "observer":
        return facts
    requires = msgspec.to_builtins(registry.required_by(plugin))
    asked = {key: value for key, value in requires.items() if value not in (False, None, [], {}, ())}
    return facts | {"argument": found.argument, "options": describe_options(found), "requires": asked}


def _file_facts(plugin: registry.Plugin) -> dict[str, Any]:
    """Returns the text of a recipe or study, and what a recipe says of its settings."""
    from ddkit.recipes.resolve import described, parse_toml

    file = Path(plugin.value)
    facts = {"text": file.read_text(encoding="utf-8")}
    if plugin.kind == "study":
        return facts
    raw = parse_toml(file)
    return facts | {"summary": raw.get("summary", ""), "source": raw.get("source", ""), "settings": described(raw)}


def _settings_table(rows: list[dict[str, Any]]) -> str:
    from tabulate import tabulate

    cells = []
    for row in rows:
        rules = [f"{_shown(rule['value'])} if {_condition(rule['when'])}" for rule in row["rules"]]
        value = [_shown(row["value"])] if row["value"] is not None else [] if rules else ["(default)"]
        lines = [line for text in value + rules for line in textwrap.wrap(text, 34)]
        cells.append([row["path"], "\n".join(lines), row["origin"], textwrap.fill(row["why"], 56)])
    return tabulate(cells, ["setting", "value", "from", "why"], tablefmt="simple", disable_numparse=True)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _condition(when: dict[str, int]) -> str:
    """Returns {"ipc_min": 3, "pipc_max": 10} as "ipc >= 3 and pipc <= 10"."""
    signs = {"min": ">=", "max": "<="}
    return " and ".join(f"{key[:-4]} {signs[key[-3:]]} {bound}" for key, bound in when.items())


def _page(facts: dict[str, Any]) -> str:
    """Returns the page of a component, recipe or study; the settings of a recipe as a table where it says where they come from."""
    from ddkit.cli.manual import manual_page

    rows = facts.get("settings", [])
    return manual_page(facts, _settings_table(rows) if any(row["origin"] for row in rows) else "")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same on one line.")
def schema(as_json: bool) -> None:
    """Print the JSON schema of a recipe file. It has the options of ddkit's own components.

    For editors that check TOML against a schema, and for programs that write recipes.
    """
    from ddkit.recipes.schema import recipe_schema

    if as_json:
        echo_json(recipe_schema())
    else:
        show(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
