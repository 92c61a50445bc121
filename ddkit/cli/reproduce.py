"""The command reproduce: a paper's table, published figures beside measured ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import ROWS, Kind, Names, Place, converted, echo_json, quiet, refuse_given, set_verbosity, shared, show
from ddkit.cli.progress import watching
from ddkit.components import trust
from ddkit.errors import FlagError, RunFailed
from ddkit.text import doubles


def _alphas(text: str) -> tuple[float, ...]:
    """Returns the shares of blends."""
    alphas = converted(text.split(","), float, f"{text!r} is not a list of numbers such as 0,0.5,1.")
    for alpha in doubles(alphas):
        raise ValueError(f"{text!r} has {alpha:g} twice. Name it once.")
    return alphas


def _shard(text: str) -> tuple[int, int]:
    """Returns a share I/N of the work, I from 1 to N, as (I - 1, N)."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ValueError(f"{text!r} is not a share I/N with I from 1 to N, such as 1/4.")
    return int(number) - 1, int(of)


@click.command()
@click.argument("study", metavar="STUDY|FILE")
@shared
@click.option("--cells", type=ROWS, help="Rows of the study, as ipc:pipc, e.g. 1:10,10:50. Default: all.")
@click.option("--systems", metavar="NAMES", help="Columns of the study, separated by commas. Default: all.")
@click.option("--alphas", type=Kind("alpha,...", _alphas), help="Blends of the study, e.g. 0,0.5. Default: all.")
@click.option("--seeds", type=click.IntRange(min=1), help="Number of sets per cell, with the seeds 0, 1, ... (default: as in the study).")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    help="Number of networks trained on each set (default: as in the study, or else as in the protocol).",
)
@click.option(
    "--protocol",
    type=Names("protocol", files=".toml"),
    metavar="NAME|FILE",
    help="Evaluation protocol for all systems (default: as in the study).",
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    help="Number of updates of each set (default: as in the recipe). Systems with their own number of steps keep it.",
)
@click.option("--teacher", metavar="FILE|auto", help="File of a trained model, for all systems.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of sets that are made at the same time and share the cores.",
)
@click.option("--out", metavar="DIR", type=Place(), help="Folder of the sets (default: runs/STUDY).")
@click.option("--shard", type=Kind("i/n", _shard), help="Make only share I of N, on one of N machines: 1/4, 2/4, 3/4 or 4/4.")
@click.option("--merge", "merged", multiple=True, metavar="DIR", type=Place(), help="First copy the finished sets of another --out.")
@click.option("--show", is_flag=True, help="Show the finished results. Nothing is run.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--pivot", is_flag=True, help="Print the table with one column for each system.")
@click.option("--figures", metavar="DIR", type=Place(), help="New folder for the charts as PDF and PNG files.")
@quiet
def reproduce(study: str, as_json: bool, quiet: bool, markdown: bool, pivot: bool, **flags: Any) -> None:
    """Run a study and compare its figures with the published ones. A study has a figure for each system and cell.

    Finished sets are kept, and a second call continues. `ddkit list studies` shows the installed studies. Under torchrun each process makes
    a share of the sets. On machines that are not connected, use --shard I/N, and then --merge to bring the results together.

    The folder of the sets also gets the table as report.md, report.tex, report.csv and report.json, and with charts as report.html.
    """
    set_verbosity(quiet)
    if markdown and as_json:
        raise FlagError("--markdown and --json are two forms of one output. Choose one of them.")
    if pivot and as_json:
        raise FlagError("--pivot changes the table, and --json prints none. Choose one of them.")
    if flags["seed"] is not None:
        raise FlagError("--seed: a study makes sets with the seeds 0, 1, ... Use --seeds N for the number of sets.")
    if flags["show"]:
        refuse_given(("jobs", "shard", "device"), "--show runs nothing.")
    from ddkit.studies import runner
    from ddkit.studies.grid import Settings
    from ddkit.studies.results import report_json, report_table
    from ddkit.studies.study import read_study

    found = read_study(study)
    settings = Settings(
        networks=flags["repeats"], sets=tuple(flags["sets"].items()),
        **{key: flags[key] for key in ("seeds", "protocol", "steps", "dataset", "data_dir", "teacher", "device", "jobs", "alphas")},
    )  # fmt: skip
    grants = trust.granting({"dataset": flags["dataset"]}, flags["sets"], everything=flags["allow_code"])
    with grants, watching(quiet) as observers:
        report = runner.reproduce(
            found, flags["out"] or Path("runs") / found.name, settings, cells=flags["cells"],
            systems=None if flags["systems"] is None else _names(flags["systems"]), run=not flags["show"],
            observers=observers, part=flags["shard"] or (0, 1), merged=flags["merged"], figures=flags["figures"],
        )  # fmt: skip
    charts = [] if flags["figures"] is None else [str(chart) for chart in sorted(flags["figures"].iterdir())]
    if as_json:
        echo_json(report_json(report) | ({"charts": charts} if charts else {}))
    else:
        show(report_table(report, "pipe" if markdown else "simple", pivot=pivot))
        for kind, files in (("picture", report.pictures), ("figure", charts)):
            for file in files:
                show(f"{kind:8} {file}")
    if any(figure.failed for figure in report.figures):
        raise RunFailed("Some sets failed. The table names them, and the same command tries them again.")


def _names(text: str) -> list[str]:
    """Returns the names of a list with commas; raises FlagError for one that is empty or there twice."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise FlagError(
            f"--systems '{text}': a name is empty. Write names of systems, separated by commas, or leave --systems out for all."
        )
    for double in doubles(names):
        raise FlagError(f"--systems '{text}' names '{double}' twice. Name it once.")
    return names
