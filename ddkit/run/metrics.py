"""The log of a run, metrics.jsonl: which steps have a line, what stands in it, and how it is cut where a run goes on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ddkit.errors import RunFilesError
from ddkit.files import append_text, parse_json, read_bytes, write_atomic
from ddkit.run.manifest import METRICS, check_listed


class _Term(msgspec.Struct):
    raw: float
    weighted: float
    gradient: Annotated[float, msgspec.Meta(ge=0)] | msgspec.UnsetType = msgspec.UNSET


class _Line(msgspec.Struct):
    """What is read of a line: sum, terms and seconds of a step; more may stand in it."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    total: float
    losses: dict[str, _Term]
    seconds: Annotated[float, msgspec.Meta(ge=0)]


def is_logged(index: int, steps: int, log_every: int) -> bool:
    """Returns whether step `index` of `steps` has a line in metrics.jsonl: the first, the last, every log_every-th."""
    return index in (0, steps - 1) or index % log_every == 0


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Appends one line to the metrics of the run in `folder`."""
    append_text(folder / METRICS, json.dumps(record) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of the metrics of a run, by ascending step, [] for a run without; raises RunFilesError if one is damaged."""
    check_listed(folder, METRICS)
    file = folder / METRICS
    found = [_parsed(line, file, number) for number, line in enumerate(_lines(file), start=1)]
    for number, (one, other) in enumerate(itertools.pairwise(found), start=2):
        if other["step"] <= one["step"]:
            raise RunFilesError(
                f"{file} is damaged: line {number} has step {other['step']}, but the line before it has step {one['step']}."
            )
    return found


def cut_metrics(folder: Path, step: int, steps: int, log_every: int) -> None:
    """Removes metrics of `step` and later, a half-written last line, and lines that a run of `steps` steps would not log.

    Raises RunFilesError where another line cannot be read, or one is missing that was written before the checkpoint of `step`.
    """
    file = folder / METRICS
    lines = _lines(file)
    kept: dict[int, bytes] = {}
    for number, line in enumerate(lines, start=1):
        try:
            index = _parsed(line, file, number)["step"]
        except RunFilesError:
            if number < len(lines):
                raise
            break
        if index < step and is_logged(index, steps, log_every):
            kept[index] = line + b"\n"
    lost = [index for index in range(0, step, log_every) if index not in kept]
    if lost:
        raise RunFilesError(f"{file} is damaged: it has no line for step {lost[0]}. Restore it from a copy, or make the run again.")
    if lines:
        write_atomic(file, b"".join(kept[index] for index in sorted(kept)))


def _lines(file: Path) -> list[bytes]:
    try:
        return read_bytes(file).splitlines() if file.exists() else []
    except OSError as error:
        raise RunFilesError(f"{file} cannot be read: {error}.") from None


def _parsed(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(line)
        msgspec.convert(found, _Line)
    except (ValueError, msgspec.ValidationError) as error:
        raise RunFilesError(
            f"{file} is damaged: line {number} cannot be read ({error}). Restore it from a copy, or make the run again."
        ) from None
    return found
