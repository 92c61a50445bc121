"""The command that checks a component's promises: check."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import click

from ddkit.cli.catalogue import found_plugin
from ddkit.cli.common import Names, as_json, echo_json, plugin_files, refuse_given, set_option, show
from ddkit.components import registry
from ddkit.errors import DdkitError, FlagError


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

    plugin = found_plugin((*words[:-1], name), testing.SUITES)
    if plugin.kind != "dataset" or not registry.load_plugin(plugin).takes_directory:
        refuse_given(["data_dir"], f"the {plugin.kind} '{plugin.name}' downloads nothing.")
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
        _show(plugin, outcomes)
        for line in others:
            show(line)
    sys.exit(1 if any(outcome.status == "broken" for outcome in outcomes) else 0)


def _show(plugin: registry.Plugin, outcomes: list[Any]) -> None:
    for outcome in outcomes:
        show(f"{outcome.status:8}  {outcome.check}")
        if outcome.status != "ok":
            show(f"          {outcome.problem or outcome.reason}{f' ({outcome.place})' if outcome.place else ''}")
    count = Counter(outcome.status for outcome in outcomes)
    deviating = f", {count['deviates']} deviate{'s' if count['deviates'] == 1 else ''} on purpose" if count["deviates"] else ""
    show(f"\n{plugin.label}: {count['ok']} of {len(outcomes)} checks hold{deviating}")
