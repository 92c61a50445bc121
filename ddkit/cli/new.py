"""The command that begins a plugin: new."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ddkit.cli.common import Place, show
from ddkit.components import registry


@click.command()
@click.argument("kind")
@click.argument("name")
@click.option("--out", metavar="DIR", type=Place(), help="Folder to write, absent or empty (default: ddkit-NAME).")
def new(kind: str, name: str, out: Path | None) -> None:
    """Write the package of a new plugin. KIND is loss, initializer, augmenter, evaluator, model, dataset, exporter or observer.

    It installs, passes its conformance test and runs as it is written; then the class is yours to change.
    """
    from ddkit.testing import scaffold  # whose neighbours import torch

    wanted = registry.parse_kind(kind)
    folder = scaffold.new_package(wanted, name, out)
    show(f"{folder}\n  pip install -e {shlex.quote(str(folder))}\n  ddkit check {wanted} {name}")
