"""The commands about components: list, info, cite, check and new, and schema, which prints what a recipe may hold."""

from __future__ import annotations

import difflib
import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import msgspec

from ddkit.cli.common import Names, Place, as_json, echo_json, percent, plugin_files, refuse_given, set_option, show, show_table
from ddkit.components import registry, source
from ddkit.errors import DdkitError, FlagError, PluginError


@click.command(name="list")
@click.argument("kind", required=False)
@click.argument("folder", required=False, type=Place())
@plugin_files
@click.option("--check", is_flag=True, help="Import each component, in another process, and say which fail.")
@as_json
def list_components(kind: str | None, folder: Path | None, check: bool, as_json: bool) -> None:
    """List the installed components, or runs. KIND names one kind (losses, recipes, ...). None of them is imported.

    `ddkit list runs` lists the runs in the folder runs, `ddkit list runs FOLDER` those in another one: method, data, steps, accuracy.
    """
    if kind in ("run", "runs"):
        refuse_given(["check", "plugin_files"], "a run is no component.")
        _list_runs(folder or Path("runs"), as_json)
        return
    if folder is not None:
        raise FlagError(f"A FOLDER has runs alone: ddkit list runs {shlex.quote(str(folder))}")
    wanted = registry.parse_kind(kind) if kind else None
    if wanted in registry.DATA_KINDS:
        refuse_given(["check"], f"a {wanted} is a file, which nothing imports.")
    rows = []
    with source.no_collection():
        found = [p for p in registry.plugins() if wanted in (None, p.kind)]
        for plugin in found:
            status, summary = registry.status(plugin)
            own = {key: getattr(plugin, key) for key in ("kind", "name", "distribution", "version")}
            rows.append({**own, "summary": summary, "status": status})
    if check:
        for row, problem in zip(rows, _check(found), strict=True):
            row["status"] = problem if row["status"] == "ok" else row["status"]
    if as_json:
        echo_json({"schema": 1, "components": rows})
        return
    keys = {"kind": "kind", "name": "name", "from": "distribution", "status": "status", "summary": "summary"}
    show_table({head: [row[key] for row in rows] for head, key in keys.items()}, ("from", "summary", "status"))


def _list_runs(folder: Path, as_json: bool) -> None:
    from ddkit import api

    runs = api.list_runs(folder)
    if as_json:
        echo_json({"schema": 1, "runs": [msgspec.to_builtins(run) for run in runs]})
        return
    columns: dict[str, list[Any]] = {
        "run": [run.path for run in runs],
        "method": [run.method for run in runs],
        "data": [run.dataset for run in runs],
        "ipc": [",".join(f"{name}={n}" for name, n in run.ipc.items()) if isinstance(run.ipc, dict) else run.ipc for run in runs],
        "real images": [run.pipc for run in runs],
        "steps": [f"{run.steps:,} of {run.all_steps:,}" if run.state == "not finished" else run.steps for run in runs],
        "seconds": [None if run.seconds is None else f"{run.seconds:,.1f}" for run in runs],
        "accuracy": [percent(run.accuracy_mean, run.accuracy_std) for run in runs],
        "random real": [percent(run.random_real_mean, run.random_real_std) for run in runs],
        "evaluated": [", ".join(filter(None, (run.model, run.protocol))) for run in runs],
        "status": [run.problem or run.state for run in runs],
    }
    show_table(columns, ("seconds", "data", "real images", "evaluated", "random real", "steps", "ipc", "status", "method"))


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
    """Show what a component or recipe is. The page has its use, options, requirements and source."""
    from ddkit.cli.manual import WIDEST, facts, page

    if len(words) > 2:
        raise click.UsageError("info takes [KIND] NAME.")
    told = facts(_found_plugin(words))
    if as_json:
        echo_json({"schema": 1, **told})
    else:
        width = max(40, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))
        show(f"{page(told, width)}\n\nFrom {told['distribution']} {told['version']}.")


def _found_plugin(words: tuple[str, ...], among: Collection[str] = registry.GROUPS) -> registry.Plugin:
    """Returns the plugin that the words [KIND] NAME mean; without a KIND it is of the first kind, of those `among`, that has the name.

    Kinds are in the order of registry.GROUPS: a loss or another component comes before a recipe.
    """
    name = words[-1]
    if len(words) == 2:
        return registry.find(registry.parse_kind(words[0]), name)
    short = name.rpartition("/")[2]
    found = {p.kind for p in registry.plugins() if p.name == short}
    kinds = [kind for kind in registry.GROUPS if kind in found]
    kinds = [kind for kind in kinds if kind in among] or kinds
    if not kinds:
        raise PluginError(f"There is no component '{name}'. {_instead(short)}")
    return registry.find(kinds[0], name)


def _instead(name: str) -> str:
    """Returns what helps where `name` is no component: it may be a kind, an option of some, or nearly the name of one."""
    with suppress(FlagError):
        kind = registry.parse_kind(name)
        told = "A view is an augmenter, with noise, that a recipe has in [views.NAME]. " if name.startswith("view") else ""
        return f"{told}`ddkit list {kind}` shows those of this kind, `ddkit info {kind} NAME` one of them."
    own = [p for p in registry.plugins() if p.kind in registry.BASES and name in source.option_names(p.value)]
    if own:
        told = " and ".join(f"the {p.kind} '{p.name}'" for p in own[:2]) + (" and others" if len(own) > 2 else "")
        return f"It is an option of {told}: ddkit info {own[0].kind} {own[0].name}"
    near = difflib.get_close_matches(name, {p.name for p in registry.plugins()}, n=1)
    return (f"Did you mean '{near[0]}'? " if near else "") + "`ddkit list` shows them all."


@click.command()
@click.argument("target", metavar="RECIPE|FILE|RUN", type=Names("recipe", files=".toml"))
@plugin_files
@as_json
def cite(target: str, as_json: bool) -> None:
    """Print the BibTeX entries of a recipe's paper, of the papers of its losses and other parts, and of ddkit.

    RECIPE is a recipe's name, a file, or a run directory. A line above each entry gives the part of the recipe that it is for. A source of
    a third party that names no arXiv number becomes a @misc entry of its own words.
    """
    from ddkit import api

    found = api.cite(target)
    if as_json:
        echo_json({"schema": 1, "citations": [msgspec.to_builtins(each) for each in found]})
    else:
        show("\n\n".join(map(str, found)))


@click.command()
@click.argument("kind", type=click.Choice(["recipe", "protocol"]), default="recipe", required=False)
@click.option("--json", "as_json", is_flag=True, help="The same on one line.")
def schema(kind: str, as_json: bool) -> None:
    """Print the JSON schema of a recipe or protocol file. A recipe's has the options of ddkit's own components.

    For editors that check TOML against a schema, and for programs that write recipes.
    """
    from ddkit.recipes.schema import protocol_schema, recipe_schema

    found = recipe_schema() if kind == "recipe" else protocol_schema()
    if as_json:
        echo_json(found)
    else:
        show(json.dumps(found, indent=2, ensure_ascii=False))


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[KIND] NAME", type=Names(*registry.GROUPS))
@set_option("An option of the component, where its default does not suit.", "OPTION=VALUE")
@click.option("--data-dir", metavar="DIR", help="Folder for a dataset that downloads.")
@plugin_files
@as_json
def check(words: tuple[str, ...], sets: dict[str, Any], data_dir: str | None, as_json: bool) -> None:
    """Check what a component promises. This runs the conformance suite of its kind, without pytest.

    Exit code 0 where every check holds or deviates as the component declares, 1 where one is broken.
    """
    if len(words) > 2:
        raise FlagError(f"ddkit check takes [KIND] NAME; got {' '.join(words)}.")
    name, _, argument = words[-1].partition(":")
    from ddkit import testing
    from ddkit.cli.manual import namesakes

    plugin = _found_plugin((*words[:-1], name), testing.SUITES)
    if plugin.kind != "dataset" or not registry.load_plugin(plugin).takes_directory:
        refuse_given(["data_dir"], f"the {plugin.kind} '{plugin.name}' downloads nothing.")
    if plugin.kind == "observer":
        refuse_given(["sets"], "an observer has no options.")
    from ddkit.recipes.resolve import assign

    table: dict[str, Any] = {"evaluators": {name: {}}}  # any table of a recipe that holds a component's options
    for path, value in sets.items():
        assign(table, f"evaluators.{name}.{path}", value)
    options = table["evaluators"][name]
    qualified = name if "/" in name else f"{plugin.distribution}/{name}" if not plugin.first_party else name
    others = [f"The {kind} of that name is checked by: ddkit check {kind} {plugin.name}" for kind in namesakes(plugin, testing.SUITES)]
    try:
        outcomes = testing.check(plugin.kind, f"{qualified}:{argument}" if argument else qualified, options, directory=data_dir)
    except DdkitError as error:
        error.args = (" ".join([str(error), *([] if len(words) > 1 else others)]),)
        raise
    if as_json:
        rows = [{"check": each.check, "status": each.status, "problem": each.problem, "reason": each.reason} for each in outcomes]
        echo_json({"schema": 1, "kind": plugin.kind, "name": plugin.name, "distribution": plugin.distribution, "checks": rows})
    else:
        for outcome in outcomes:
            show(f"{outcome.status:8}  {outcome.check}")
            if outcome.status != "ok":
                show(f"          {outcome.problem or outcome.reason}{f' ({outcome.place})' if outcome.place else ''}")
        count = Counter(outcome.status for outcome in outcomes)
        deviating = f", {count['deviates']} deviate{'s' if count['deviates'] == 1 else ''} on purpose" if count["deviates"] else ""
        show("\n".join([f"\n{plugin.label}: {count['ok']} of {len(outcomes)} checks hold{deviating}", *others]))
    sys.exit(1 if any(outcome.status == "broken" for outcome in outcomes) else 0)


@click.command()
@click.argument("kind")
@click.argument("name")
@click.option("--out", metavar="DIR", type=Place(), help="Folder to write, absent or empty (default: ddkit-NAME).")
def new(kind: str, name: str, out: Path | None) -> None:
    """Write the package of a new plugin.

    KIND is loss, initializer, parametrization, augmenter, evaluator, model, dataset, exporter or observer.

    It installs, passes its conformance test and runs as it is written; then the class is yours to change.
    """
    from ddkit.testing import scaffold  # whose neighbours import torch

    wanted = registry.parse_kind(kind)
    folder = scaffold.new_package(wanted, name, out)
    show(f"{folder}\n  pip install -e {shlex.quote(str(folder))}\n  ddkit check {wanted} {name}")
