"""How a run goes on from its newest checkpoint, with data and teacher where they are now, to the same bytes as without a break."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ddkit.components import registry
from ddkit.components.base import Evaluation
from ddkit.components.observers import Observers
from ddkit.components.plugin_file import check_unchanged, known
from ddkit.engine.guards import deterministic
from ddkit.errors import NEWS, FlagError, InputError, PluginError, RunFilesError, refuse_unused
from ddkit.recipes.tables import parse_recipe, recipe_dict
from ddkit.run import warnings
from ddkit.run.checkpoints import keep_until
from ddkit.run.directory import Run, RunDirectory
from ddkit.run.manifest import MANIFEST, check_listed, read_evaluations, read_manifest
from ddkit.run.metrics import cut_metrics
from ddkit.run.run import Place, begin, finish
from ddkit.run.setup import AUTOMATIC_EXPERTS, AUTOMATIC_TEACHER, TEACHER_FILE, RunSetup

log = logging.getLogger("ddkit")


def go_on(directory: RunDirectory, place: Place, *, steps: int | None, moved: Mapping[str, str]) -> Run:
    """Continues the run in `directory` from its newest checkpoint; `moved` is where data and teacher are now, by flag."""
    path, ranks = directory.path, place.ranks
    with place.watching(directory) as watchers:
        table = directory.read_recipe()
        finished = ranks.broadcast(steps in (None, parse_recipe(table).steps) and (path / MANIFEST).is_file())
        refuse_unused(moved if finished else (), f"the run {path} is finished.")
        if finished:
            return _finished(directory, watchers)
        table = _moved(table, moved, path) | ({} if steps is None else {"steps": steps})
        recipe = parse_recipe(table)
        with deterministic(recipe.engine.deterministic):
            newest = directory.newest_checkpoint()
            ranks.check_same("The newest checkpoint", None if newest is None else newest.step)
            if newest is not None:
                warnings.add(newest.warnings)
                check_unchanged(newest.plugin_files, path)
                if newest.step > recipe.steps:
                    raise RunFilesError(f"--steps {recipe.steps}: {path} is already at step {newest.step}. Use a larger number.")
            try:
                setup = RunSetup(recipe, device=place.device, begun=newest is not None, ranks=place.ranks, watchers=watchers)
                setup.prepare()
            except InputError as error:
                places = {f"--dataset {recipe.data.use}:PATH": recipe.data.options.get("path"), "--teacher FILE": recipe.teacher.use}
                gone = [flag for flag, at in places.items() if at not in (None, "auto") and not Path(str(at)).exists()]
                if gone:
                    error.args = (f"{error} If it was moved: ddkit distill --resume --out {shlex.quote(str(path))} {' '.join(gone)}",)
                raise
            except PluginError as error:
                files = [file for file, digest in (newest.plugin_files if newest else {}).items() if digest not in known().values()]
                if files:
                    flags = " ".join(f"--plugin {shlex.quote(file)}" for file in files)
                    error.args = (f"{error} The run began with {flags}: add it to this command.",)
                raise
            if newest is None:
                if ranks.is_main:
                    log.warning("%s has no checkpoint, so the run begins again with step 0.", path, extra=NEWS)
                    directory.reopen()
                begin(setup, directory)
                return finish(setup, directory, start=0)
            start = newest.step
            _check_inputs(newest.inputs, setup, path)
            setup.plugin_files = newest.plugin_files | setup.plugin_files
            try:
                setup.engine.load_state(start, setup.bank.own_part(newest.state))
            except (KeyError, ValueError) as error:
                raise RunFilesError(f"The checkpoint of step {start} in {path} does not fit the recipe of the run: {error}.") from None
            if ranks.is_main:
                directory.reopen()
                keep_until(directory.path, start)
                places_now = {key: value for key, value in recipe_dict(setup.resolved_recipe).items() if key in ("data", "teacher")}
                directory.write_recipe(table | places_now)
                cut_metrics(directory.path, start, recipe.steps, recipe.engine.log_every)
            return finish(setup, directory, start=start, spent=newest.seconds)


def _moved(table: dict[str, Any], given: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Returns the resolved recipe `table` with the places of data and teacher that are `given`; raises FlagError for other ones."""
    table = copy.deepcopy(table)
    if "--dataset" in given:
        name, argument = registry.split_name(given["--dataset"])
        own = table.get("data", {}).get("use", "digits")
        key = registry.load("dataset", own).argument
        if name != own or not argument or key is None:
            now = f"If the data were moved: --dataset {own}:PATH" if key else "Leave it out."
            raise FlagError(f"--dataset {given['--dataset']}: {path} can only continue with its own dataset, '{own}'. {now}")
        table["data"][key] = argument
    if "--teacher" in given:
        if given["--teacher"] == "auto" or table.get("teacher", {}).get("use", "auto") == "auto":
            raise FlagError(
                f"--teacher {given['--teacher']}: --resume only takes the new path of a teacher file that was moved. Leave it out."
            )
        table["teacher"]["use"] = given["--teacher"]
    return table


def _check_inputs(began: Mapping[str, str], setup: RunSetup, path: Path) -> None:
    """Raises RunFilesError where the run at `path` began with another teacher or other images; warns for an automatic teacher."""
    renamed = next((digest for name, digest in began.items() if name.startswith(TEACHER_FILE)), None)
    for name, digest in setup.inputs.items():
        then = began.get(name, renamed if name.startswith(TEACHER_FILE) else None)
        if then in (None, digest):
            continue
        told = f"{name} has changed since the run {path} began (its sha256 was {str(then)[:12]}, and is now {digest[:12]})"
        if name not in (AUTOMATIC_TEACHER, AUTOMATIC_EXPERTS):
            raise RunFilesError(f"{told}, so the run cannot be continued exactly. Restore the original, or start a new run.")
        log.warning(
            "%s, because it was trained again. The run continues with the new one, so its result is not the same as without the "
            "interruption.",
            told,
        )


def _finished(directory: RunDirectory, watchers: Observers) -> Run:
    """Returns a run that has all that it will have, from its files."""
    facts = read_manifest(directory.path)
    for name in facts["files"]:
        check_listed(directory.path, name)
    rows = msgspec.convert(read_evaluations(directory.path), list[Evaluation])
    log.warning("%s is finished already.", directory.path)
    watchers.call("run_finished", path=directory.path, evaluations=rows)
    return Run(path=directory.path, steps=facts["steps"], seconds=facts["seconds"], evaluations=rows)
