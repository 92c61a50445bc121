"""The commands about several sets: compare, and blend, join and split, which make sets of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ddkit.cli.common import Kind, Place, as_json, echo_json, names_of, show
from ddkit.components.figures import budget, percent
from ddkit.text import printable

if TYPE_CHECKING:
    from ddkit.api import Run
    from ddkit.run.comparison import ComparedRow, ComparedSet

out_of_set = click.option("--out", required=True, metavar="DIR", type=Place(), help="New or empty run directory.")


@click.command()
@click.argument("first", metavar="A", type=click.Path())
@click.argument("second", metavar="B", type=click.Path())
@click.option("--alpha", type=float, default=0.5, show_default=True, help="Share of B. The result is (1 - alpha) A + alpha B.")
@out_of_set
@as_json
def blend(first: str, second: str, alpha: float, out: Path, as_json: bool) -> None:
    """Average two synthetic sets, image by image. Both must have the same classes and ipc.

    A and B are run directories or files. Images are matched by class name, and within a class by their order.
    """
    from ddkit import api

    run = api.blend(first, second, alpha=alpha, out=out)
    if as_json:
        echo_json({"run": str(run.path), "alpha": alpha, "first": first, "second": second})
    else:
        _show_files(run)


@click.command()
@click.argument("sets", metavar="A B ...", nargs=-1, required=True, type=click.Path())
@out_of_set
@as_json
def join(sets: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Join synthetic sets into one set with all of their images. The sets may have different classes or the same ones.

    Each set is a run directory or a file. Classes with the same name become one class. All images must have the same shape and be stored
    in the same way.
    """
    from ddkit import api

    run = api.join(sets, out=out)
    if as_json:
        echo_json({"run": str(run.path), "sets": list(sets), **_counts(run)})
    else:
        _show_files(run)


@click.command()
@click.argument("target", metavar="SET", type=click.Path())
@click.option(
    "--classes",
    required=True,
    type=Kind("names|file", names_of),
    help="Names of classes, separated by commas, or a file with a name on each line.",
)
@out_of_set
@as_json
def split(target: str, classes: list[str], out: Path, as_json: bool) -> None:
    """Make a new set from some classes of a synthetic set. SET is a run directory or a file."""
    from ddkit import api

    run = api.split(target, classes, out=out)
    if as_json:
        echo_json({"run": str(run.path), "set": target, **_counts(run)})
    else:
        _show_files(run)


def _counts(run: Run) -> dict[str, dict[str, int]]:
    """Returns how many images the set of a run has of each class."""
    from ddkit.run.artifact import load

    found = load(run.path)
    return {"classes": dict(zip(found.class_names, found.labels.bincount(minlength=len(found.class_names)).tolist(), strict=True))}


def _show_files(run: Run) -> None:
    show(f"run      {run.path}\npicture  {run.path / 'preview.png'}\nreport   {run.path / 'report.html'}")


@click.command()
@click.argument("targets", metavar="RUN RUN ...|FOLDER", nargs=-1, required=True, type=Place())
@click.option(
    "--titles",
    type=Kind("names|file", names_of),
    help="Name of each set in tables and charts, in their order: separated by commas, or a file with a name on each line.",
)
@click.option("--out", metavar="FILE", type=Place(), help="New .png or .pdf file with the images of the sets side by side.")
@click.option(
    "--figures", metavar="DIR", type=Place(), help="New or empty folder for charts of the images and accuracies, as PDF and PNG files."
)
@as_json
def compare(targets: tuple[Path, ...], titles: list[str] | None, out: Path | None, figures: Path | None, as_json: bool) -> None:
    """Compare runs: accuracy, random real, budget, cost and images. Nothing is computed again.

    RUN is a run directory or the file of a set. FOLDER stands for all finished runs in it. The runs must have the same data and at least
    one evaluation in common. If they have none, the error shows the command that adds one. Notes below the table list other differences.
    """
    from ddkit import api

    found = api.compare(targets, titles=titles, out=out, figures=figures)
    charts = [] if figures is None else [str(chart) for chart in sorted(figures.iterdir())]
    if as_json:
        drawn = ({"out": str(out)} if out else {}) | ({"figures": charts} if figures else {})
        echo_json({**msgspec.to_builtins(found), **drawn})
        return
    tables = [f"{each}\n\n{_comparison_table(found.sets, each.rows)}" for each in found.evaluations] or [_comparison_table(found.sets, [])]
    lines = [*found.notes, *([f"picture  {out}"] if out else []), *(f"figure   {chart}" for chart in charts)]
    show("\n\n".join([*tables, *(["\n".join(lines)] if lines else [])]))


def _comparison_table(sets: Sequence[ComparedSet], rows: Sequence[ComparedRow]) -> str:
    """Returns the table of `sets`, with their figures if there are `rows` of one evaluation."""
    from tabulate import tabulate

    columns: dict[str, list[Any]] = {
        "set": [printable(each.title or each.name) for each in sets],
        "method": [printable(each.method) for each in sets],
        "ipc": [each.ipc for each in sets],
        "real images": [each.pipc for each in sets],
        "labels": [each.labels for each in sets],
        "stored per class": [budget(each.stored_numbers, each.stored_as_images) for each in sets],
        "seconds": [None if each.seconds is None else f"{each.seconds:,.1f}" for each in sets],
    }
    if rows:
        columns["accuracy"] = [percent(row.accuracy_mean, row.accuracy_std) for row in rows]
        columns["random real"] = [
            percent(row.random_real_mean, row.random_real_std) + (f" ({row.random_real})" if row.random_real else "") for row in rows
        ]
        columns["networks"] = [row.repeats for row in rows]
    return tabulate(columns, headers="keys", tablefmt="simple", disable_numparse=True, missingval="-")
