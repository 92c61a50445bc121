"""Writes a file of docs/data, a row for each finished figure, from the report of `ddkit reproduce practical-zoo FLAGS ... --show --json`.

`python docs/zoo.py REPORT.json FILE.csv MACHINE FLAGS`. Accuracies are in percent. "random" is the accuracy of ipc real images under the
same protocol, with the teacher's labels beside sets that store labels of their own.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

WITH = " + DKKT"  # how the titles of systems end to which DKKT is added
COMMAND = "ddkit reproduce practical-zoo {flags} --cells {ipc}:{pipc} --systems {system} --seeds {sets}"


def rows(report: dict[str, Any], machine: str, flags: str) -> list[dict[str, Any]]:
    """Returns the rows of the table, those of a cell together, in the order of the study."""
    done = [figure for figure in report["figures"] if figure["state"] in ("done", "partly")]
    random = {(f["ipc"], f["pipc"], f["labels"] == "hard"): f for f in done if f["system"].startswith("random-real")}
    found = []
    for figure in done:
        beside = random.get((figure["ipc"], figure["pipc"], figure["labels"] == "hard"), {})
        row = {"method": figure["title"].removesuffix(WITH), "losses": "own,dkkt" if figure["title"].endswith(WITH) else "own"}
        row |= {key: figure[key] for key in ("labels", "ipc", "pipc", "sets", "networks")}
        row |= {"accuracy": _percent(figure["mean"]), "std": _percent(figure["std"])}
        row |= {"random": _percent(beside.get("mean")), "random_std": _percent(beside.get("std"))}
        row |= {key: figure[key] for key in ("stored_numbers", "protocol", "steps", "teacher")}
        found.append(row | {"machine": machine, "command": COMMAND.format(flags=flags, **figure)})
    return found


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    source, file, machine, flags = sys.argv[1:]
    table = rows(json.loads(Path(source).read_text(encoding="utf-8")), machine, flags)
    with Path(file).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
