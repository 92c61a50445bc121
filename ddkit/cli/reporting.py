"""The commands that tell of runs and recipes to people and programs: report and schema."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ddkit.cli.common import Place, echo_json, show


@click.command()
@click.argument("target", metavar="RUN", type=click.Path())
@click.option("--out", metavar="FILE", type=Place(), help="New file to write (default: report.html of the run).")
@click.option("--figures", metavar="DIR", type=Place(), help="Also write each chart as a PDF and a PNG file into a new folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def report(target: str, out: Path | None, figures: Path | None, as_json: bool) -> None:
    """Make the report of a finished run again. It is one HTML page with images, curves and figures.

    A run writes it at its end, and evaluate renews it. It opens from the disk and asks for nothing from outside.
    """
    from ddkit.run.report import report as write

    file = write(target, out=out, figures=figures)
    charts = [] if figures is None else [str(chart) for chart in sorted(figures.iterdir())]
    if as_json:
        echo_json({"schema": 1, "run": target, "report": str(file)} | ({} if figures is None else {"figures": charts}))
    else:
        show("\n".join([f"report   {file}", *(f"figure   {chart}" for chart in charts)]))


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


COMMANDS = (report, schema)
