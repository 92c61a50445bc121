"""The command that judges a synthetic set: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import Pipc, blaming_flags, echo_json, evaluation_table, protocol, quiet, set_verbosity, shared, show, verbose
from ddkit.cli.names import Names
from ddkit.recipes.resolve import parse_set


@click.command()
@click.argument("target", metavar="RUN|FILE", type=click.Path())
@shared
@click.option(
    "--evaluate",
    "evaluators",
    type=Names("evaluator", many=True),
    metavar="NAMES",
    help="Evaluators (default: those of the run, else accuracy).",
)
@click.option("--model", type=Names("model", many=True), metavar="NAMES", help="Networks to train on the set, separated by commas.")
@protocol
@click.option("--repeats", type=click.IntRange(min=1), help="Networks trained (default: the protocol's).")
@click.option("--teacher", metavar="FILE", help="Trained model, for evaluators that use one.")
@click.option("--pipc", type=Pipc(), help="Real images per class for the random-real baseline (default: the run's).")
@quiet
@verbose
def evaluate(target: str, **flags: Any) -> None:
    """Evaluate the synthetic set of a run directory or file."""
    set_verbosity(flags["quiet"], flags["verbose"])
    from ddkit import api
    from ddkit.cli.progress import watching

    with blaming_flags(flags), watching(flags["quiet"], flags["verbose"]) as observers:
        rows = api.evaluate(
            target, dataset=flags["dataset"], data_dir=flags["data_dir"], evaluators=flags["evaluators"], protocol=flags["protocol"],
            model=flags["model"], repeats=flags["repeats"], teacher=flags["teacher"], seed=flags["seed"], pipc=flags["pipc"],
            sets=dict(parse_set(text) for text in flags["sets"]), device=flags["device"],
            observers=observers, distributed=True,
        )  # fmt: skip
    if flags["as_json"]:
        import msgspec

        echo_json({"schema": 1, "run": target, **_made_in(Path(target)), "evaluations": msgspec.to_builtins(rows)})
    else:
        show(evaluation_table(rows))


def _made_in(target: Path) -> dict[str, Any]:
    """Returns the steps and seconds that the run took, None where `target` is a file and does not tell."""
    from ddkit.run.directory import RunDirectory

    manifest = RunDirectory(target).read_manifest() if target.is_dir() else {}
    return {key: manifest.get(key) for key in ("steps", "seconds")}


COMMANDS = (evaluate,)
