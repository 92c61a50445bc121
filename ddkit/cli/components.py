"""The commands about components: list, info, cite, check and new, and schema, which prints what a recipe may hold."""

from __future__ import annotations

import difflib
import json
import os
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

from ddkit.cli.common import Names, Place, as_json, echo_json, plugin_files, refuse_given, set_option, show, show_table
from ddkit.components import registry, source
from ddkit.components.figures import percent
from ddkit.components.kinds import BASES, DATA_KINDS, KINDS
from ddkit.errors import DdkitError, FlagError, PluginError


@click.command(name="list")
@click.argument("kind", required=False)
@click.argument("folder", required=False, type=Place())
@plugin_files
@click.option("--check", is_flag=True, help="Import each component in another process and show which ones fail.")
@as_json
def list_components(kind: str | None, folder: Path | None, check: bool, as_json: bool) -> None:
    """List the installed components, or runs. KIND is one kind (losses, recipes, ...). Nothing is imported.

    `ddkit list runs` lists the runs in the folder runs, and `ddkit list runs FOLDER` those in FOLDER, with method, data, steps and
    accuracy.
    """
    if kind and kind.lower() in ("run", "runs"):
        refuse_given(["check", "plugin_files"], "a run is not a component.")
        _list_runs(folder or Path("runs"), as_json)
        return
    wanted = registry.parse_kind(kind) if kind else None
    if folder is not None:
        raise FlagError(f"A FOLDER only contains runs. To list them: ddkit list runs {shlex.quote(str(folder))}")
    if wanted in DATA_KINDS:
        refuse_given(["check"], f"a {wanted} is a TOML file, which is never imported.")
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
        echo_json({"components": rows})
        return
    keys = {"kind": "kind", "name": "name", "from": "distribution", "status": "status", "summary": "summary"}
    show_table({head: [row[key] for row in rows] for head, key in keys.items()}, ("from", "summary", "status"))


def _list_runs(folder: Path, as_json: bool) -> None:
    from ddkit import api

    runs = api.list_runs(folder)
    if as_json:
        echo_json({"runs": [msgspec.to_builtins(run) for run in runs]})
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
from ddkit.components.kinds import DATA_KINDS
try:
    listed = registry.plugins()
except errors.DdkitError as error:
    children.reply({"error": str(error)})
    sys.exit(error.exit_code)
for plugin in listed:
    if plugin.kind in DATA_KINDS or [plugin.kind, plugin.distribution, plugin.name] not in json.loads(sys.argv[1]):
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
    waiting = [p for p in found if p.kind not in DATA_KINDS]
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
@click.argument("words", nargs=-1, required=True, metavar="[KIND] NAME", type=Names(*KINDS))
@plugin_files
@as_json
def info(words: tuple[str, ...], as_json: bool) -> None:
    """Show the page of a component or recipe: its use, options, requirements and source."""
    from ddkit.cli.manual import WIDEST, facts, page

    if len(words) > 2:
        raise click.UsageError("The arguments are [KIND] NAME, at most two words.")
    told = facts(_found_plugin(words))
    if as_json:
        echo_json(told)
    else:
        width = max(40, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))
        show(f"{page(told, width)}\n\nFrom {told['distribution']} {told['version']}.")


def _found_plugin(words: tuple[str, ...], among: Collection[str] = KINDS) -> registry.Plugin:
    """Returns the plugin that the words [KIND] NAME mean; without a KIND it is of the first kind, of those `among`, that has the name.

    Kinds are in the order of KINDS: a loss or another component comes before a recipe.
    """
    name = words[-1]
    if len(words) == 2:
        return registry.find(registry.parse_kind(words[0]), name)
    short = name.rpartition("/")[2]
    found = {p.kind for p in registry.plugins() if p.name == short}
    kinds = [kind for kind in KINDS if kind in found]
    kinds = [kind for kind in kinds if kind in among] or kinds
    if not kinds:
        raise PluginError(f"There is no component '{name}'. {_instead(name)}")
    return registry.find(kinds[0], name)


def _instead(name: str) -> str:
    """Returns what helps where `name` is no component: it may be a run, a recipe file, a kind, an option of some, or nearly a name."""
    from ddkit.run.manifest import MANIFEST

    if os.path.isfile(os.path.join(name, MANIFEST)):  # Path.is_file fails on a long name
        return f"To look at a run or set: ddkit report {shlex.quote(name)}"
    if name.endswith(".toml") and os.path.isfile(name):
        return f"To look at a recipe file: ddkit distill --plan --recipe {shlex.quote(name)}"
    short = name.rpartition("/")[2]
    with suppress(FlagError):
        kind = registry.parse_kind(short)
        told = "A view is an augmenter with noise, in the table [views.NAME] of a recipe. " if short.startswith("view") else ""
        return f"{told}`ddkit list {kind}` shows all components of this kind, and `ddkit info {kind} NAME` shows one."
    own = [p for p in registry.plugins() if p.kind in BASES and short in source.option_names(p.value)]
    if own:
        told = " and ".join(f"the {p.kind} '{p.name}'" for p in own[:2]) + (" and others" if len(own) > 2 else "")
        return f"It is an option of {told}: ddkit info {own[0].kind} {own[0].name}"
    near = difflib.get_close_matches(short, {p.name for p in registry.plugins()}, n=1)
    return (f"Did you mean '{near[0]}'? " if near else "") + "`ddkit list` shows all components."


@click.command()
@click.argument("target", metavar="RECIPE|FILE|RUN", type=Names("recipe", files=".toml"))
@plugin_files
@as_json
def cite(target: str, as_json: bool) -> None:
    """Print the BibTeX entries of a recipe's paper, of the papers of its losses and other parts, and of ddkit.

    The argument is the name of a recipe, a recipe file or a run directory. The line above each entry names the part of the recipe that it
    belongs to. A third-party source without an arXiv number becomes a @misc entry with the words of that source.
    """
    from ddkit import api

    found = api.cite(target)
    if as_json:
        echo_json({"citations": [msgspec.to_builtins(each) for each in found]})
    else:
        show("\n\n".join(map(str, found)))


@click.command()
@click.argument("kind", type=click.Choice(["recipe", "protocol"]), default="recipe", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the schema on one line.")
def schema(kind: str, as_json: bool) -> None:
    """Print the JSON schema of a recipe or protocol file. The recipe schema contains the options of ddkit's own components.

    The schema is for editors that check TOML files, and for programs that write recipes.
    """
    from ddkit.recipes.schema import protocol_schema, recipe_schema

    found = recipe_schema() if kind == "recipe" else protocol_schema()
    show(json.dumps(found, indent=None if as_json else 2, ensure_ascii=False))


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[KIND] NAME", type=Names(*KINDS))
@set_option("Set an option of the component, for the checks.", "OPTION=VALUE")
@click.option("--data-dir", metavar="DIR", help="Folder for a downloaded dataset.")
@plugin_files
@as_json
def check(words: tuple[str, ...], sets: dict[str, Any], data_dir: str | None, as_json: bool) -> None:
    """Check a component with the conformance suite of its kind. pytest is not needed.

    The exit code is 0 if every check holds or deviates as the component declares, and 1 if a check is broken.
    """
    if len(words) > 2:
        raise FlagError(f"The arguments of ddkit check are [KIND] NAME, and {' '.join(words)} has more.")
    name, _, argument = words[-1].partition(":")
    from ddkit import testing
    from ddkit.cli.manual import namesakes

    plugin = _found_plugin((*words[:-1], name), testing.SUITES)
    if plugin.kind != "dataset" or not registry.load_plugin(plugin).takes_directory:
        refuse_given(["data_dir"], f"the {plugin.kind} '{plugin.name}' downloads nothing.")
    if plugin.kind == "observer":
        refuse_given(["sets"], "an observer has no options.")
    from ddkit.recipes.settings import assign

    table: dict[str, Any] = {"evaluators": {name: {}}}  # any table of a recipe that holds a component's options
    for path, value in sets.items():
        assign(table, f"evaluators.{name}.{path}", value)
    options = table["evaluators"][name]
    qualified = name if "/" in name else f"{plugin.distribution}/{name}" if not plugin.first_party else name
    others = [f"To check the {kind} of that name: ddkit check {kind} {plugin.name}" for kind in namesakes(plugin, testing.SUITES)]
    try:
        outcomes = testing.check(plugin.kind, f"{qualified}:{argument}" if argument else qualified, options, directory=data_dir)
    except DdkitError as error:
        error.args = (" ".join([str(error), *([] if len(words) > 1 else others)]),)
        raise
    if as_json:
        rows = [{"check": each.check, "status": each.status, "problem": each.problem, "reason": each.reason} for each in outcomes]
        echo_json({"kind": plugin.kind, "name": plugin.name, "distribution": plugin.distribution, "checks": rows})
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
@click.option("--out", metavar="DIR", type=Place(), help="New or empty folder to write (default: ddkit-NAME).")
def new(kind: str, name: str, out: Path | None) -> None:
    """Write a new plugin as an installable package.

    KIND is loss, initializer, parametrization, augmenter, evaluator, model, dataset, exporter or observer.

    The package can be installed, passes its conformance test and runs without a change. Change its class to your own.
    """
    from ddkit.testing import scaffold  # whose neighbours import torch

    wanted = registry.parse_kind(kind)
    folder = scaffold.new_package(wanted, name, out)
    show(f"{folder}\n  pip install -e {shlex.quote(str(folder))}\n  ddkit check {wanted} {name}")
