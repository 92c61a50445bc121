"""The checkpoints of a run: the last two states from which it goes on exactly, each of the whole set, in a file.

The main process of several writes them; any number of processes goes on from one.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from ddkit.errors import NEWS, RunFilesError
from ddkit.files import json_digest, read_tensors, sync, write_tensors
from ddkit.run.manifest import CHECKPOINT, CHECKPOINTS, METRICS, RECIPE
from ddkit.run.warnings import warnings

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("ddkit")
KEPT = 2


def is_due(step: int, every: int) -> bool:
    """Whether a checkpoint is written after `step` steps: after every `every` ones. The first and the last state have one too."""
    return step % every == 0


class Checkpoint(NamedTuple):
    """The state before step `step`, the run's plugin files, path to sha256, the sha256 of its inputs, by name, and its warnings.

    `seconds` are those that the steps before took, 0 if a checkpoint of an earlier version does not record them.
    """

    step: int
    state: dict[str, Tensor]
    plugin_files: dict[str, str]
    inputs: dict[str, str]
    warnings: list[str]
    seconds: float


def recipe_keys(table: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the key of a recipe that its checkpoints record, and the one that those of 0.1 record.

    It says nothing of the number of steps, which a run may prolong, of protocols, to which a later evaluation may add, and of the places of
    data and teacher, which may be moved: their content has digests of its own.
    """
    kept = {key: value for key, value in table.items() if key not in ("steps", "protocols")}
    makes = kept.get("parametrization")
    if isinstance(makes, dict) and makes.get("use") == "grid":
        kept["decode"] = {"factor": kept.pop("parametrization").get("factor")}  # as version 0.1 wrote it
    places = {"data": ("path", "dir"), "teacher": ("use",)}
    unplaced = {
        key: {name: each for name, each in value.items() if name not in places[key]} if key in places and isinstance(value, dict) else value
        for key, value in kept.items()
    }
    return json_digest(unplaced), json_digest(kept)


def write_checkpoint(
    run: Path, step: int, state: Mapping[str, Tensor], *, recipe: str, plugin_files: Mapping[str, str], inputs: Mapping[str, str],
    seconds: float,
) -> None:  # fmt: skip
    """Writes the state before step `step`, of the whole set, and then removes all but the last two checkpoints.

    `recipe` (its key), `plugin_files` (path to sha256), `inputs` (name to sha256), `seconds` and what the run warned of go into the
    metadata: an unfinished run has no manifest to tell them.
    """
    folder, metrics = run / CHECKPOINTS, run / METRICS
    try:
        if metrics.is_file():  # which a checkpoint relies on
            sync(metrics)
        if not folder.is_dir():
            folder.mkdir()
            sync(run)
    except OSError as error:
        raise RunFilesError(f"{error.filename or folder} cannot be written: {error.strerror or error}.") from error
    record: dict[str, Any] = {"step": step, "recipe": recipe, "inputs": dict(inputs), "seconds": round(seconds, 3)}
    record |= {"plugin_files": dict(plugin_files)} if plugin_files else {}
    record |= {"warnings": warnings()} if warnings() else {}
    write_tensors(folder / f"step-{step:08d}.safetensors", state, record)
    keep_until(run, step)


def keep_until(run: Path, step: int) -> None:
    """Removes checkpoints of later steps, which could not be read and would push good ones out, and all but two of the others."""
    files = _files(run)
    kept = [other for other in files if other <= step][:KEPT]
    for file in (file for other, file in files.items() if other not in kept):
        with suppress(OSError):  # one too many does no harm
            file.unlink()


def newest_checkpoint(run: Path, recipes: Sequence[str]) -> Checkpoint | None:
    """Returns the newest checkpoint that reads whole and is of one of `recipes` (keys), None where none was written yet.

    Warns of those that it passes over; raises RunFilesError if there are some and none can be read.
    """
    reasons = []
    for step, file in _files(run).items():
        try:
            found = _read(file, step, recipes)
        except ValueError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            log.warning("A checkpoint is ignored, and an older one is used: %s.", reason, extra=NEWS)
        return found
    if reasons:
        raise RunFilesError(
            f"{run / CHECKPOINTS} has no readable checkpoint: {reasons[0]}. To start again: ddkit distill --recipe "
            f"{shlex.quote(str(run / RECIPE))} (a set of a study: remove the folder {run}, and the same command makes it anew)"
        )
    return None


def _files(run: Path) -> dict[int, Path]:
    """Returns the file of each step, newest first; of a step that several processes of version 0.1 wrote in parts, the first part."""
    named = [(name, file) for file in (run / CHECKPOINTS).glob("step-*.safetensors") if (name := CHECKPOINT.fullmatch(file.name))]
    named.sort(key=lambda each: (-int(each[0][1]), int(each[0][2] or 0)))
    found: dict[int, Path] = {}
    for name, file in named:
        found.setdefault(int(name[1]), file)
    return found


def _read(file: Path, step: int, recipes: Sequence[str]) -> Checkpoint:
    """Returns a checkpoint; raises ValueError saying why it cannot be used."""
    if ".part-" in file.name:
        raise ValueError(f"{file} was written by several processes of version 0.1, and only that version can read it")
    tensors, record = read_tensors(file)
    if record.get("step") != step or isinstance(record["step"], bool):
        raise ValueError(f"{file} records another step than its name")
    if recipes and record.get("recipe", recipes[0]) not in recipes:
        raise ValueError(
            f"{file} belongs to another recipe than {file.parents[1] / RECIPE}: that file was damaged or edited, or one of the two files "
            "is from another run. A run can only continue with its own recipe"
        )
    try:
        plugin_files, inputs = [msgspec.convert(record.get(key, {}), dict[str, str]) for key in ("plugin_files", "inputs")]
        warned = msgspec.convert(record.get("warnings", []), list[str])
        seconds = msgspec.convert(record.get("seconds", 0.0), Annotated[float, msgspec.Meta(ge=0, le=1e12)])
    except msgspec.ValidationError as error:
        raise ValueError(f"{file} has damaged plugin files, inputs, warnings or seconds: {error}") from None
    return Checkpoint(step, tensors, plugin_files, inputs, warned, seconds)
