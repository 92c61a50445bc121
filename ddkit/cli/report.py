"""The command that writes the page of a run again: report."""

from __future__ import annotations

from pathlib import Path

import click

from ddkit.cli.common import Place, as_json, echo_json, show


@click.command()
@click.argument("target", metavar="RUN", type=click.Path())
@click.option("--out", metavar="FILE", type=Place(), help="New file to write (default: report.html of the run).")
@click.option("--figures", metavar="DIR", type=Place(), help="Also write each chart as a PDF and a PNG file into a new folder.")
@as_json
def report(target: str, out: Path | None, figures: Path | None, as_json: bool) -> None:
    """Make the report of a finished run again. It is one HTML page with images, curves and figures.

    A run writes it at its end, and evaluate renews it. It opens from the disk and asks for nothing from outside.
    """
    from ddkit import api

    file = api.report(target, out=out, figures=figures)
    charts = [] if figures is None else [str(chart) for chart in sorted(figures.iterdir())]
    if as_json:
        echo_json({"schema": 1, "run": target, "report": str(file)} | ({} if figures is None else {"figures": charts}))
    else:
        show("\n".join([f"report   {file}", *(f"figure   {chart}" for chart in charts)]))
