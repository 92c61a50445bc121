"""Writes docs/data/practical-zoo.csv, a row for each finished figure, from the report of `ddkit reproduce practical-zoo ... --show --json`.

`python docs/zoo.py REPORT.json MACHINE`. Accuracies are in percent. "random" is the accuracy of ipc real images under the same protocol,
with the teacher's labels beside sets that store labels of their own.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "data" / "practical-zoo.csv"
WITH = " + DKKT"  # how the titles of systems end to which DKKT is added
COMMAND = (
    "ddkit reproduce practical-zoo --dataset imagefolder:cifar --teacher convnet3-batchnorm.safetensors --set teacher.norm=batch "
    "--set 'teacher.mean=[0.4914,0.4822,0.4465]' --set 'teacher.std=[0.2023,0.1994,0.2010]' "
    "--cells {ipc}:{pipc} --systems {system} --seeds {sets}"
)


def rows(report: dict[str, Any], machine: str) -> list[dict[str, Any]]:
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
        found.append(row | {"machine": machine, "command": COMMAND.format(**figure)})
    return found


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    table = rows(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2])
    with FILE.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
