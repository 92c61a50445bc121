"""The command that writes a set for others to read: export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import Place, as_json, echo_json, plugin_files, set_option, show

SHOWN = 12  # files that the text names; --json has all


@click.command()
@click.argument("target", metavar="RUN|FILE", type=click.Path())
@click.option("--to", required=True, metavar="NAME[:ARG]", help="Exporter: imagefolder, npz, png, card, ...")
@click.option("--out", required=True, metavar="DIR", type=Place(), help="Folder to write, absent or empty.")
@set_option("An option of the exporter, e.g. columns=10.", "OPTION=VALUE")
@plugin_files
@as_json
def export(target: str, to: str, out: Path, sets: dict[str, Any], as_json: bool) -> None:
    """Write a synthetic set in a format that others read. The card beside it says what it is.

    `ddkit list exporters` shows the formats, `ddkit info exporter NAME` the options of one.
    """
    from ddkit import api
    from ddkit.run.manifest import file_entry

    folder = api.export(target, to, out, options=sets)
    found = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (len(path.parts), path))
    files = [{"name": path.relative_to(folder).as_posix(), **file_entry(path)} for path in found]
    if as_json:
        echo_json({"schema": 1, "exporter": to.partition(":")[0], "out": str(out), "files": files})
        return
    for entry in files[:SHOWN]:
        show(f"{entry['bytes']:>12,}  {out / entry['name']}")
    if len(files) > SHOWN:
        show(f"{sum(entry['bytes'] for entry in files[SHOWN:]):>12,}  in {len(files) - SHOWN} more files")
