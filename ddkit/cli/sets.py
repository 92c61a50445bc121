"""The commands that make a set of others: blend, join and split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddkit.cli.common import Kind, Place, as_json, echo_json, names_of, show

if TYPE_CHECKING:
    from ddkit.api import Run

out_of_set = click.option("--out", required=True, metavar="DIR", type=Place(), help="Run directory, absent or empty.")


@click.command()
@click.argument("first", metavar="A", type=click.Path())
@click.argument("second", metavar="B", type=click.Path())
@click.option("--alpha", type=float, default=0.5, show_default=True, help="Share of B: the result is (1 - alpha) A + alpha B.")
@out_of_set
@as_json
def blend(first: str, second: str, alpha: float, out: Path, as_json: bool) -> None:
    """Average two synthetic sets, image by image. Both have the same classes and ipc.

    A and B are run directories or files. Images are matched by class name, and within a class by their order.
    """
    from ddkit import api

    run = api.blend(first, second, alpha=alpha, out=out)
    if as_json:
        echo_json({"schema": 1, "run": str(run.path), "alpha": alpha, "first": first, "second": second})
    else:
        _show_files(run)


@click.command()
@click.argument("sets", metavar="A B ...", nargs=-1, required=True, type=click.Path())
@out_of_set
@as_json
def join(sets: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Join synthetic sets of different classes, or of the same ones, into one with all of their images.

    Each is a run directory or a file. Classes of one name are one class. The images must have one shape and be stored in one way.
    """
    from ddkit import api

    run = api.join(sets, out=out)
    if as_json:
        echo_json({"schema": 1, "run": str(run.path), "sets": list(sets), **_counts(run)})
    else:
        _show_files(run)


@click.command()
@click.argument("target", metavar="SET", type=click.Path())
@click.option(
    "--classes", required=True, type=Kind("names|file", names_of), help="Names of classes, separated by commas, or a file of them."
)
@out_of_set
@as_json
def split(target: str, classes: list[str], out: Path, as_json: bool) -> None:
    """Make a set of some classes of a synthetic set. SET is a run directory or a file."""
    from ddkit import api

    run = api.split(target, classes, out=out)
    if as_json:
        echo_json({"schema": 1, "run": str(run.path), "set": target, **_counts(run)})
    else:
        _show_files(run)


def _counts(run: Run) -> dict[str, dict[str, int]]:
    """Returns how many images the set of a run has of each class."""
    from ddkit.run.artifact import load

    found = load(run.path)
    return {"classes": dict(zip(found.class_names, found.labels.bincount(minlength=len(found.class_names)).tolist(), strict=True))}


def _show_files(run: Run) -> None:
    show(f"run      {run.path}\npicture  {run.path / 'preview.png'}\nreport   {run.path / 'report.html'}")
