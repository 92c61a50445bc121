"""The checkpoints of a run: the last two states from which it goes on exactly, in one file each or in one for each process.

A process of several writes the rows of its own classes. Such a checkpoint counts only when all its parts are there, read
whole, and are of one state: each records the sha256 of all. It is read like any other, by any number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import torch

from ddkit.distributed import ALONE, Ranks
from ddkit.errors import RunFilesError
from ddkit.files import read_tensors, sync, tensors_digest, write_tensors
from ddkit.run.manifest import CHECKPOINT, CHECKPOINTS, RECIPE
from ddkit.run.warnings import NEWS, warnings

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("ddkit")
KEPT = 2


def is_due(step: int, every: int) -> bool:
    """Whether a checkpoint is written after `step` steps: after every `every` ones. The first and the last state have one too."""
    return step % every == 0


class Checkpoint(NamedTuple):
    """The state before step `step`, the run's plugin files, path to sha256, the sha256 of its inputs, by name, and its warnings.

    `seconds` are those that the steps before took, 0 where a checkpoint of an earlier version does not tell.
    """

    step: int
    state: dict[str, Tensor]
    plugin_files: dict[str, str]
    inputs: dict[str, str]
    warnings: list[str]
    seconds: float


class Checkpoints:
    """The checkpoints in the run directory `run`, of a run whose recipe has the keys `recipe`: the first is written, each is read."""

    def __init__(self, run: Path, recipe: Sequence[str]) -> None:
        self.folder, self.recipe = run / CHECKPOINTS, recipe

    def write(
        self,
        step: int,
        state: Mapping[str, Tensor],
        *,
        plugin_files: Mapping[str, str],
        inputs: Mapping[str, str],
        seconds: float = 0.0,
        rowwise: Collection[str] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        """Writes the state before step `step`, and then removes all but the last two checkpoints.

        `plugin_files` (path to sha256), `inputs` (name to sha256), `seconds` and what the run warned of go into the metadata: an
        unfinished run has no manifest to tell them. Of several processes each writes its rows of the tensors named `rowwise`, and the
        first the others too.
        """
        if ranks.first:
            self._make()
        record: dict[str, Any] = {"step": step, "recipe": self.recipe[0], "inputs": dict(inputs), "seconds": round(seconds, 3)}
        record |= {"plugin_files": dict(plugin_files)} if plugin_files else {}
        record |= {"warnings": warnings()} if warnings() else {}
        if ranks.size == 1:
            write_tensors(self.folder / f"step-{step:08d}.safetensors", state, record)
        else:
            self._write_part(step, {key: value for key, value in state.items() if ranks.first or key in rowwise}, record, rowwise, ranks)
        if ranks.first:
            self._keep(step, parts=ranks.size)

    def _make(self) -> None:
        try:
            if not self.folder.is_dir():
                self.folder.mkdir()
                sync(self.folder.parent)
        except OSError as error:
            raise RunFilesError(f"{self.folder} cannot be written: {error.strerror or error}.") from error

    def _write_part(self, step: int, state: Mapping[str, Tensor], record: dict[str, Any], rowwise: Collection[str], ranks: Ranks) -> None:
        on_host = {key: value.detach().cpu() for key, value in state.items()}
        digests = ranks.heard(tensors_digest(on_host, {}))  # also waits until the first has made the folder
        record |= {"rowwise": sorted(key for key in state if key in rowwise), "digests": digests}
        write_tensors(self.folder / f"step-{step:08d}.part-{ranks.rank + 1}-of-{ranks.size}.safetensors", on_host, record)
        ranks.wait()  # every part is on the disk before an older checkpoint goes

    def files(self) -> dict[int, dict[int, list[Path]]]:
        """Returns the files of each step, newest first, by the number of their parts, in order of part."""
        found: dict[int, dict[int, dict[int, Path]]] = {}
        for file in self.folder.glob("step-*.safetensors"):
            name = CHECKPOINT.fullmatch(file.name)
            if name is not None:
                step, part, parts = int(name[1]), int(name[2] or 1), int(name[3] or 1)
                found.setdefault(step, {}).setdefault(parts, {})[part] = file
        return {
            step: {parts: [files[part] for part in sorted(files)] for parts, files in sorted(found[step].items())}
            for step in sorted(found, reverse=True)
        }

    def _keep(self, step: int, *, parts: int) -> None:
        """Removes all but the last two steps, and of `step` what was written by another number of processes."""
        files = self.files()
        self._drop([file for old in list(files)[KEPT:] for some in files[old].values() for file in some])
        self._drop([file for count, some in files.get(step, {}).items() if count != parts for file in some])

    def keep_until(self, step: int) -> None:
        """Removes checkpoints of later steps, which could not be read and would push good ones out, and all but two of the others."""
        files = self.files()
        older = [other for other in files if other <= step]
        gone = [other for other in files if other > step] + older[KEPT:]
        self._drop([file for other in gone for some in files[other].values() for file in some])

    @staticmethod
    def _drop(files: Sequence[Path]) -> None:
        for file in files:
            with suppress(OSError):  # one too many does no harm
                file.unlink()

    def newest(self, restart: str) -> Checkpoint | None:
        """Returns the newest checkpoint that reads whole, None where none was written yet.

        Tells of those that it passes over; raises RunFilesError, which ends with `restart`, where there are some and none can be read.
        """
        reasons = []
        for step, by_parts in self.files().items():
            for parts, files in by_parts.items():
                try:
                    found = self._read(step, files, parts)
                except ValueError as error:
                    reasons.append(str(error))
                    continue
                for reason in reasons:
                    log.warning("A checkpoint is passed over: %s.", reason, extra=NEWS)
                return found
        if reasons:
            raise RunFilesError(f"{self.folder} has no readable checkpoint: {reasons[0]}. {restart}")
        return None

    def _read(self, step: int, files: Sequence[Path], parts: int) -> Checkpoint:
        """Returns a checkpoint; raises ValueError saying why it cannot be used."""
        if len(files) < parts:
            raise ValueError(f"{self.folder}/step-{step:08d} has {len(files)} of {parts} parts")
        found = [self._read_file(file, step) for file in files]
        tensors, record = found[0]
        if parts > 1:
            tensors = _joined([part for part, _ in found], [part for _, part in found], files)
        try:
            plugin_files, inputs = [msgspec.convert(record.get(key, {}), dict[str, str]) for key in ("plugin_files", "inputs")]
            warned = msgspec.convert(record.get("warnings", []), list[str])
            seconds = msgspec.convert(record.get("seconds", 0.0), Annotated[float, msgspec.Meta(ge=0, le=1e12)])
        except msgspec.ValidationError as error:
            raise ValueError(f"{files[0]} names plugin files, inputs, warnings or seconds that are none: {error}") from None
        return Checkpoint(step, tensors, plugin_files, inputs, warned, seconds)

    def _read_file(self, file: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, record = read_tensors(file)
        if record.get("step") != step or isinstance(record["step"], bool):
            raise ValueError(f"{file} does not record the step of its name")
        if self.recipe[0] and record.get("recipe", self.recipe[0]) not in self.recipe:
            raise ValueError(
                f"{file} is a checkpoint of another recipe than {self.folder.parent / RECIPE}, which was damaged or edited, or one of the "
                "two is of another run. A run goes on with its own recipe"
            )
        return tensors, record


def _joined(parts: Sequence[dict[str, Tensor]], records: Sequence[dict[str, Any]], files: Sequence[Path]) -> dict[str, Tensor]:
    """Returns the state that `parts` are the rows of, in order; raises ValueError where they are not of one state."""
    digests = [tensors_digest(part, {}) for part in parts]
    for file, record in zip(files, records, strict=True):
        if record.get("digests") != digests:
            raise ValueError(f"{file} is a part of another state than the parts beside it")
    rowwise = records[0].get("rowwise")
    if not isinstance(rowwise, list) or any(record.get("rowwise") != rowwise for record in records):
        raise ValueError(f"{files[0]} does not say which of its tensors have rows")
    try:
        return parts[0] | {key: torch.cat([part[key] for part in parts]) for key in rowwise}
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{files[0]} and the parts beside it do not fit together: {error}") from None
