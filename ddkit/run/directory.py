"""A run directory: claimed before the run, every file whole or absent, the manifest last."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import tomli_w

from ddkit.components.base import Evaluation
from ddkit.components.figures import evaluation_table
from ddkit.data.pictures import sheet_png
from ddkit.errors import InputError, RunFilesError
from ddkit.files import MOST_TOML, check_out, is_leftover, path_part, read_text, remove_leftovers, sync, write_atomic
from ddkit.recipes.tables import check_depth, parse_recipe
from ddkit.run.checkpoints import Checkpoint, newest_checkpoint, recipe_keys, write_checkpoint
from ddkit.run.doubts import typical_shares
from ddkit.run.lock import FolderLock
from ddkit.run.manifest import (
    CHECKPOINT,
    CHECKPOINTS,
    EVALUATION,
    JOURNAL,
    LISTED,
    LOCK,
    MANIFEST,
    METRICS,
    PREVIEW,
    RECIPE,
    REPORT,
    SET,
    check_listed,
    check_own,
    file_entry,
    is_left_behind,
    read_manifest,
    remove_own,
    versions,
    write_manifest,
)
from ddkit.run.metrics import read_metrics
from ddkit.run.notebook import preview, written

if TYPE_CHECKING:
    from torch import Tensor

    from ddkit.run.artifact import Artifact

log = logging.getLogger("ddkit")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run: its directory, steps, seconds of distillation (without training a teacher), and evaluations."""

    path: Path
    steps: int
    seconds: float
    evaluations: list[Evaluation]

    @property
    def shares(self) -> dict[str, float]:
        """The losses' median shares of the gradient on the images, {} for a run of one loss or of an older version."""
        return typical_shares(read_metrics(self.path))

    def _repr_html_(self) -> str:
        """Returns the HTML that a notebook shows for the run: its picture and evaluations, or a sentence if its folder is gone."""
        head = f"<b>{written(self.path)}</b>: {self.steps:,} steps in {self.seconds:,.1f} s"
        table = evaluation_table(self.evaluations, "html") if self.evaluations else ""
        return f"<p>{head}</p>{preview(self.path)}{table}"


class RunDirectory:
    """The files of one run at `path`.

    Whoever writes a run holds its lock: claim() and numbered() take it, as does take(), and `with` lets go of it at the end.
    """

    def __init__(self, path: Path, created: tuple[Path, ...] | None = None) -> None:
        """`created` are the folders that did not exist before, innermost first; None: the run was there already."""
        self.path = path
        self._created = created
        self._lock: FolderLock | None = None
        self._replaces = False  # a run that is there
        self._recipes: tuple[str, ...] = ()  # keys of the recipe, which checkpoints record, known once it is written or read

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Lets go of the lock, if it is held."""
        if self._lock is not None:
            self._lock.release()

    def take(self, *, wait: float = 0.0) -> RunDirectory:
        """Takes the lock and removes what a process that was killed left half-written.

        Raises RunFilesError where another process holds it for longer than `wait` seconds.
        """
        check_own(self.path)
        try:
            self._lock = FolderLock(self.path, wait=wait)
            for folder in (self.path, self.path / CHECKPOINTS):
                remove_leftovers(folder)
        except OSError as error:
            raise RunFilesError(f"{self.path} cannot be written: {error.strerror or error}.") from None
        return self

    @classmethod
    def claim(cls, path: Path, *, force: bool | None = None) -> RunDirectory:
        """Returns an absent or empty `path`, made and locked; raises RunFilesError if it is neither, or cannot be written.

        What a command of ddkit left there when it was killed is removed. With `force` a run may be there, which replace() removes; None:
        the command has no such flag.
        """
        check_claimable(path, force=force)
        try:
            created = tuple(p for p in (path, *path.parents) if not p.exists())
            path.mkdir(parents=True, exist_ok=True)
            for made in created:
                sync(made.parent)
            directory = cls(path, created)
            was_killed = _was_killed(path)
            directory.take()
            if force and is_run(path):
                directory._created = None
                directory._replaces = True
            elif was_killed and is_left_behind(path):
                remove_own(path)
            if not (directory._replaces or _is_empty(path)):
                directory.release()
                raise _occupied(path, force)
        except OSError as error:
            raise RunFilesError(f"--out {path} cannot be written: {error.strerror or error}.") from None
        return directory

    @classmethod
    @contextmanager
    def whole_or_absent(cls, path: Path) -> Iterator[RunDirectory]:
        """Yields an absent or empty `path` as claim() does; if the work inside fails, nothing of it stays."""
        with cls.claim(path) as directory:
            try:
                yield directory
            except BaseException:
                directory.discard()
                raise

    @classmethod
    def numbered(cls, stem: str) -> RunDirectory:
        """Returns runs/<stem>-<n>, locked, for the first n that is free, also where another process looks for one just now."""
        folder = Path("runs")
        created = () if folder.exists() else (folder,)
        try:
            folder.mkdir(exist_ok=True)
            for number in itertools.count(1):
                path = folder / f"{path_part(stem)}-{number}"
                with suppress(FileExistsError):
                    path.mkdir()
                    break
        except OSError as error:
            raise RunFilesError(f"{folder} cannot be written: {error.strerror or error}. Name another place with --out DIR.") from None
        return cls(path, (path, *created)).take()

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Returns the run at `path`; raises RunFilesError if there is none."""
        check_own(path)
        if (path / MANIFEST).is_file() and not (path / RECIPE).is_file():
            raise RunFilesError(f"{path / RECIPE} is missing. Restore it from a copy, or make the run again.")
        if not (path / RECIPE).is_file():
            raise RunFilesError(
                f"{path} is not a run directory: it has no {RECIPE}. (A run that ended before its first step, for example while its "
                "teacher was trained, cannot be continued. Run its first command again.)"
            )
        return cls(path)

    def replace(self) -> None:
        """Removes the run that claim() found with `force`: from now on the folder is that of the new run."""
        if self._replaces:
            remove_own(self.path)
            self._created = ()
            self._replaces = False

    def has_stepped(self) -> bool:
        """Whether a step was taken: the first one is always logged."""
        return (self.path / METRICS).is_file() and (self.path / METRICS).stat().st_size > 0

    def discard(self) -> None:
        """Removes what was written into a claimed folder, and the folders made for it that are then empty.

        So nothing half-written stays behind a run that never began, and what others put beside it stays.
        """
        if self._created is None:
            return
        remove_own(self.path)
        self.release()
        with suppress(OSError):
            for folder in self._created:
                folder.rmdir()

    def write_recipe(self, table: Mapping[str, Any]) -> None:
        """Writes recipe.toml; checkpoints record its digest."""
        text = tomli_w.dumps(dict(table))
        self._recipes = recipe_keys(tomllib.loads(text))
        write_atomic(self.path / RECIPE, text.encode())

    def read_recipe(self) -> dict[str, Any]:
        """Returns the resolved recipe as TOML data; raises RunFilesError if it cannot be read, or is not the one that the manifest lists.

        The recipe of an unfinished run is compared when its newest checkpoint is read.
        """
        file = self.path / RECIPE
        check_listed(self.path, RECIPE)
        try:
            table = tomllib.loads(read_text(file, most=MOST_TOML))
            check_depth(table, "it")
            if (self.path / MANIFEST).is_file():
                table.pop("blend", None)  # version 0.1 wrote there what the manifest says too
            if "decode" in table and "parametrization" not in table:  # version 0.1 called it so
                table["parametrization"] = {"use": "grid", **table.pop("decode")}
            data = table.get("data", {})
            if isinstance(data, dict) and data.get("use") in ("imagefolder", "ddkit/imagefolder"):  # before 0.3 there was no other order
                data.setdefault("class_order", "alphabetical")
            parse_recipe(table)
        except (OSError, ValueError, RecursionError, InputError) as error:
            raise RunFilesError(f"{file} cannot be read: {error}.") from None
        self._recipes = recipe_keys(table)
        return table

    def write_checkpoint(
        self,
        step: int,
        state: Mapping[str, Tensor],
        plugin_files: Mapping[str, str] | None = None,
        inputs: Mapping[str, str] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Writes the state before step `step` and removes all but the last two checkpoints, as ddkit.run.checkpoints does."""
        recipe = self._recipes[0]
        write_checkpoint(self.path, step, state, recipe=recipe, plugin_files=plugin_files or {}, inputs=inputs or {}, seconds=seconds)

    def newest_checkpoint(self) -> Checkpoint | None:
        """Returns the newest checkpoint of the run's recipe that reads whole, None where none was written yet."""
        return newest_checkpoint(self.path, self._recipes)

    def reopen(self) -> None:
        """Removes the manifest, as its run is about to go on, and what was said of its set so far; all of it is written anew.

        Raises RunFilesError where a file is not as listed.
        """
        check_listed(self.path, METRICS)
        try:
            for name in (MANIFEST, EVALUATION, REPORT):
                (self.path / name).unlink(missing_ok=True)
            sync(self.path)
        except OSError as error:
            raise RunFilesError(f"{self.path / MANIFEST} cannot be removed: {error.strerror or error}.") from None

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Writes manifest.json, last: `facts`, versions, and size and sha256 of every file that is there."""
        files = {name: file_entry(self.path / name) for name in LISTED if (self.path / name).is_file()}
        write_manifest(self.path, {**facts, "versions": versions(), "files": files})

    def rewrite(self, name: str, content: bytes) -> None:
        """Writes the file `name` of a finished run anew; the manifest never lists another content than is there."""
        manifest = read_manifest(self.path)
        others = {key: entry for key, entry in manifest["files"].items() if key != name}
        write_manifest(self.path, manifest | {"files": others})
        write_atomic(self.path / name, content)
        write_manifest(self.path, manifest | {"files": others | {name: file_entry(self.path / name)}})


def check_claimable(path: Path, *, force: bool | None = None) -> None:
    """Raises RunFilesError if RunDirectory.claim(path, force=force) would refuse `path`, as far as that shows without writing."""
    check_out(path)
    try:
        if path.exists() and not path.is_dir():
            raise RunFilesError(f"--out {path} is a file. Name a new folder.")
        if path.is_dir() and not (_is_empty(path) or (_was_killed(path) and is_left_behind(path)) or (force and is_run(path))):
            raise _occupied(path, force)
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise RunFilesError(f"--out {path} cannot be written: {there} {'is not writable' if there.is_dir() else 'is not a folder'}.")
    except OSError as error:
        raise RunFilesError(f"--out {path} cannot be written: {error.strerror or error}.") from None


def _was_killed(path: Path) -> bool:
    """Whether the command that wrote to `path` was killed: one that ends by itself leaves neither of these files."""
    return (path / LOCK).exists() or (path / JOURNAL).exists()


def _is_empty(path: Path) -> bool:
    return all(entry.name == LOCK or is_leftover(entry) for entry in path.iterdir())


def is_run(path: Path) -> bool:
    """Whether ddkit's own run is at `path`, by what nobody else writes: a manifest, or a checkpoint beside a recipe."""
    with suppress(RunFilesError):
        read_manifest(path)
        return True
    return (path / RECIPE).is_file() and any(CHECKPOINT.fullmatch(file.name) for file in (path / CHECKPOINTS).glob("*"))


def _occupied(path: Path, force: bool | None) -> RunFilesError:
    unfinished = (path / RECIPE).is_file() and not (path / MANIFEST).is_file()
    going_on = f", or continue the run that is there: ddkit distill --out {shlex.quote(str(path))} --resume" if unfinished else ""
    if force:
        return RunFilesError(
            f"--out {path} contains files that are not a run of ddkit, and --force replaces runs only. Name another folder."
        )
    instead = ", or replace the run that is there with --force" if force is False and is_run(path) else ""
    return RunFilesError(f"--out {path} is not empty. Name another folder{instead}{going_on}.")


def save_set(result: Artifact, directory: RunDirectory) -> None:
    """Writes the set and its picture."""
    result.save(directory.path / SET)
    write_atomic(directory.path / PREVIEW, sheet_png(result.stored_images, result.stored_labels, result.class_names))
