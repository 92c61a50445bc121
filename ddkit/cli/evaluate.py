"""The command that judges a synthetic set: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import PIPC, Names, echo_json, evaluation_table, protocol, quiet, set_verbosity, shared, show, verbose


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
@click.option("--pipc", type=PIPC, help="Real images per class for the random-real baseline (default: the run's).")
@quiet
@verbose
def evaluate(target: str, as_json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Evaluate the synthetic set of a run directory or file."""
    set_verbosity(quiet, verbose)
    from ddkit import api
    from ddkit.cli.progress import watching

    with watching(quiet, verbose) as observers:
        rows = api.evaluate(target, observers=observers, distributed=True, **flags)
    if not as_json:
        show(evaluation_table(rows))
        return
    import msgspec

    from ddkit.run.manifest import read_manifest

    manifest = read_manifest(Path(target)) if Path(target).is_dir() else {}  # a file does not tell how it was made
    made_in = {key: manifest.get(key) for key in ("steps", "seconds")}
    echo_json({"schema": 1, "run": target, **made_in, "evaluations": msgspec.to_builtins(rows)})
