"""The public functions: distill, evaluate, train, blend. The command line is a thin layer over them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ddkit.components import registry, trust
from ddkit.components.base import Evaluation
from ddkit.components.observers import Observers
from ddkit.components.plugin_file import check_unchanged
from ddkit.data.loading import left_alone
from ddkit.data.real import check_classes, open_dataset, passing
from ddkit.distributed import Ranks, group, own_device
from ddkit.engine.loop import deterministic
from ddkit.errors import FlagError, InputError, Interrupted, RunFilesError, refuse_unused
from ddkit.files import check_out, check_writable, folders_of
from ddkit.nn.automatic_teacher import train_teacher
from ddkit.nn.device import pick_device
from ddkit.nn.teacher import Teacher, save_teacher
from ddkit.recipes.resolve import check_used, flattened, recipe_for
from ddkit.recipes.tables import Recipe, parse_recipe, recipe_dict
from ddkit.run import run, warnings
from ddkit.run.blend import blend
from ddkit.run.directory import Run, RunDirectory
from ddkit.run.estimates import estimated
from ddkit.run.evaluation import evaluate
from ddkit.run.manifest import MANIFEST, check_listed
from ddkit.run.run import Place
from ddkit.run.setup import AUTOMATIC_TEACHER, TEACHER_FILE, RunSetup

log = logging.getLogger("ddkit")
TRAINING = ("data", "teacher", "train", "seed")  # what of a recipe matters to `train`, and what of it does not
NOT_TRAINING = ("data.batch", "data.test", "data.held_out", "teacher.use", "teacher.mean", "teacher.std")
PICKLED = (".pt", ".pth", ".pkl", ".bin", ".ckpt")  # how files end that others would unpickle

__all__ = ["Run", "blend", "distill", "evaluate", "plan", "resume", "run_recipe", "train"]


def plan(recipe: Recipe, *, device: str = "auto", distributed: bool = False) -> dict[str, Any]:
    """Returns what a run of `recipe` would do, as data, after every check that the run makes before its first step.

    It opens the images that the run opens, trains no teacher and writes nothing.

    `distributed`: as in distill; what several processes cannot share is refused as the run would be.
    """
    with group(wanted=distributed) as ranks:
        ranks.same("The recipe", dict(flattened(recipe_dict(recipe))))
        return _plan(recipe, own_device(device), ranks)


def _plan(recipe: Recipe, device: str, ranks: Ranks) -> dict[str, Any]:
    with deterministic(recipe.engine.deterministic), left_alone():
        made = run.make(recipe, Place(device, ranks, ()), Observers([]), plan=True)
        job = made.job
        cost = estimated(job)
    waits = job.teacher is not None and not job.teacher.path
    return {
        "schema": 1,
        "recipe": recipe_dict(made.recipe),
        "device": str(job.device),
        "processes": ranks.size,
        "classes": list(job.info.class_names),
        "image_shape": list(job.info.shape),
        "accessible_images": len(job.real.indices),
        "synthetic_images": job.info.classes * recipe.ipc,  # those that are stored
        "teacher": recipe.teacher.use if job.needs_teacher else None,
        "teacher_is_trained_first": waits,
        "teacher_accuracy": None if job.tested is None else msgspec.structs.asdict(job.tested),
        "estimate": cost,
        "plugins": job.plugins_used,
    }


def distill(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    losses: str | Sequence[str] | None = None,
    dataset: Any = None,
    ipc: int | None = None,
    pipc: int | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    teacher: str | None = None,
    model: str | None = None,
    init: str | None = None,
    augment: str | None = None,
    evaluators: str | None = None,
    protocol: str | None = None,
    data_dir: str | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    observers: Sequence[Any] = (),
    allow_code: bool = False,
    distributed: bool = False,
    force: bool = False,
) -> Run:
    """Makes a synthetic set and returns its run; the arguments are the flags of `ddkit distill`.

    `recipe` is a recipe's name, a file, or TOML data; `sets` maps recipe paths to values. `dataset` is a name, or an object: a map-style
    torch Dataset of (image, label), or (training, test) of these. `allow_code` lets Python code run that a recipe or teacher file names;
    what the arguments name runs anyway. `distributed`: the processes that torchrun started, all of which call this, share the run
    (elsewhere this process is alone). `force` replaces the run that is in `out`, once all checks of the new one have passed. Raises
    DdkitError.
    """
    losses = losses if losses is None or isinstance(losses, str) else ",".join(losses)
    named = {"model": model, "dataset": dataset, "init": init, "augment": augment, "evaluators": evaluators}
    place = None if out is None else Path(out)
    with passing(dataset) as data, trust.granting(named, sets, _table(recipe), everything=allow_code):
        built = recipe_for(
            recipe, losses=losses, evaluators=evaluators, protocol=protocol, model=model, sets=list((sets or {}).items()),
            ipc=ipc, pipc=pipc, steps=steps, seed=seed, teacher__use=teacher, initializer__use=init,
            augmenter__use=augment, data__dir=data_dir, **data,
        )  # fmt: skip
        return run_recipe(built, losses=losses, device=device, out=place, observers=observers, distributed=distributed, force=force)


def _table(recipe: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Returns a recipe that was given as data, which is the caller's own; None for one in a file."""
    return recipe if isinstance(recipe, Mapping) else None


def run_recipe(
    recipe: Recipe,
    *,
    losses: str | None = None,
    device: str = "auto",
    out: Path | None = None,
    observers: Sequence[Any] = (),
    distributed: bool = False,
    force: bool = False,
) -> Run:
    """Runs `recipe` into `out` (None: runs/<recipe or losses>-<dataset>-<n>); nothing stays of a run that took no step.

    `force`: as in distill.
    """
    with group(wanted=distributed) as ranks:
        return _run(recipe, Place(own_device(device), ranks, observers), out, losses or recipe.name, force=force)


def _run(recipe: Recipe, place: Place, out: Path | None, name: str, *, force: bool = False) -> Run:
    pick_device(place.device)
    place.ranks.same("The recipe", dict(flattened(recipe_dict(recipe))))
    watchers = place.watchers()
    stem = f"{name.replace(',', '+').replace(':', '-')}-{registry.split_name(recipe.data.use)[0]}"

    def claim() -> RunDirectory:
        return RunDirectory.numbered(stem) if out is None else RunDirectory.claim(out, force=force)

    with warnings.recording(), place.directory(claim) as directory:
        place = place._replace(whole=place.whole or directory.path)
        with watchers.interruptible(place.going_on), deterministic(recipe.engine.deterministic):
            try:
                made = run.make(recipe, place, watchers)
                run.begin(made, directory)
            except BaseException:
                directory.discard()
                raise
            try:
                return run.finish(made, directory, watchers, start=0)
            except (Interrupted, KeyboardInterrupt):  # it can be continued
                raise
            except BaseException:
                if not directory.has_stepped():
                    directory.discard()
                raise


def resume(
    path: str | Path,
    *,
    dataset: Any = None,
    teacher: str | None = None,
    steps: int | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
    allow_code: bool = False,
    distributed: bool = False,
) -> Run:
    """Continues the run at `path` from its newest checkpoint that reads whole; `steps` may prolong it.

    `dataset` is needed where the run's was an object: the same again, as for distill. Where the data or the teacher's file have been
    moved, `dataset` (of the same kind, "imagefolder:PATH") and `teacher` say where they are now; their content must be the same. A run
    that is finished is returned as it is.
    `allow_code` lets Python code run that its recipe names: whose run it is, a folder does not tell. `distributed`: as in distill; the
    run may have been begun by any number of processes. Raises DdkitError.
    """
    moved = {"--dataset": dataset if isinstance(dataset, str) else None, "--teacher": teacher}
    with trust.granting({"dataset": moved["--dataset"]}, everything=allow_code), passing(dataset), group(wanted=distributed) as ranks:
        return _resume(Path(path), steps, Place(own_device(device), ranks, observers), moved)


def _resume(path: Path, steps: int | None, place: Place, moved: Mapping[str, str | None] | None = None) -> Run:
    given = {flag: value for flag, value in (moved or {}).items() if value is not None}
    with warnings.recording(), place.directory(lambda: RunDirectory.existing(path).take()) as directory:
        table = directory.read_recipe()
        recipe = parse_recipe(table)
        watchers = place.watchers()
        finished = place.ranks.told(steps in (None, recipe.steps) and (path / MANIFEST).is_file())
        refuse_unused(given if finished else (), f"{path} is finished.")
        if finished:
            return _finished(directory, watchers)
        longer = _moved(table, given, path) | ({} if steps is None else {"steps": steps})
        place = place._replace(whole=place.whole or directory.path)
        with watchers.interruptible(place.going_on), deterministic(recipe.engine.deterministic):
            return _continue(longer, directory, place, watchers)


def _moved(table: dict[str, Any], given: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Returns the resolved recipe `table` with the places of data and teacher that are `given`; raises FlagError for other ones."""
    table = copy.deepcopy(table)
    if "--dataset" in given:
        name, argument = registry.split_name(given["--dataset"])
        own = table.get("data", {}).get("use", "digits")
        key = registry.load("dataset", own).argument
        if name != own or not argument or key is None:
            now = f"--dataset {own}:PATH says where the same data are now" if key else "leave it out"
            raise FlagError(
                f"--dataset {given['--dataset']}: {path} is continued on its own data, which are of the dataset '{own}': {now}."
            )
        table["data"][key] = argument
    if "--teacher" in given:
        if given["--teacher"] == "auto" or table.get("teacher", {}).get("use", "auto") == "auto":
            raise FlagError(f"--teacher {given['--teacher']}: only the file of a teacher can have been moved. Leave it out.")
        table["teacher"]["use"] = given["--teacher"]
    return table


def _continue(table: dict[str, Any], directory: RunDirectory, place: Place, watchers: Observers) -> Run:
    """Goes on with a run whose resolved recipe is `table`."""
    recipe = parse_recipe(table)
    newest = directory.newest_checkpoint()
    place.ranks.same("The newest checkpoint", None if newest is None else newest.step)
    if newest is not None:
        warnings.add(newest.warnings)
        check_unchanged(newest.plugin_files, directory.path)
        if newest.step > recipe.steps:
            raise RunFilesError(f"{directory.path} is at step {newest.step} already, past --steps {recipe.steps}.")
    try:
        made = run.make(recipe, place, watchers, begun=newest is not None)
    except InputError as error:
        places = {f"--dataset {recipe.data.use}:PATH": recipe.data.options.get("path"), "--teacher FILE": recipe.teacher.use}
        gone = [flag for flag, at in places.items() if at not in (None, "auto") and not Path(str(at)).exists()]
        if gone:
            error.args = (f"{error} If it was moved: ddkit distill --resume --out {directory.path} {' '.join(gone)}",)
        raise
    if newest is None:
        directory.reopen()
        run.begin(made, directory)
        return run.finish(made, directory, watchers, start=0)
    start = newest.step
    _check_inputs(newest.inputs, made.job, directory.path)
    made.job.plugin_files = newest.plugin_files | made.job.plugin_files
    try:
        made.engine.load_state(start, made.bank.own_part(newest.state))
    except (KeyError, ValueError) as error:
        raise RunFilesError(f"The checkpoint of step {start} in {directory.path} does not fit its recipe: {error}.") from None
    directory.reopen()
    directory.keep_checkpoints_until(start)
    places = {key: value for key, value in recipe_dict(made.recipe).items() if key in ("data", "teacher")}
    directory.write_recipe(table | places)
    directory.cut_metrics(start, recipe.steps, recipe.engine.log_every)
    return run.finish(made, directory, watchers, start=start, spent=newest.seconds)


def _check_inputs(began: Mapping[str, str], job: RunSetup, path: Path) -> None:
    """Raises RunFilesError where the run at `path` began with another teacher or other images; warns for an automatic teacher."""
    renamed = next((digest for name, digest in began.items() if name.startswith(TEACHER_FILE)), None)
    for name, digest in job.inputs.items():
        then = began.get(name, renamed if name.startswith(TEACHER_FILE) else None)
        if then in (None, digest):
            continue
        told = f"{name} is not what the run at {path} began with (sha256 {str(then)[:12]} then, {digest[:12]} now)"
        if name != AUTOMATIC_TEACHER:
            raise RunFilesError(f"{told}, so it cannot be continued exactly. Restore it, or start anew.")
        log.warning("%s: it was trained again. The run goes on with this one, and is not the one that it would have been.", told)


def _finished(directory: RunDirectory, watchers: Observers) -> Run:
    """Returns a run that has all that it will have, from its files."""
    facts = directory.read_manifest()
    for name in facts["files"]:
        check_listed(directory.path, name)
    rows = msgspec.convert(directory.read_evaluations(), list[Evaluation])
    log.warning("%s is finished: nothing was left to do.", directory.path)
    watchers.call("run_finished", path=directory.path, evaluations=rows)
    return Run(path=directory.path, steps=facts["steps"], seconds=facts["seconds"], evaluations=rows)


def train(
    out: str | Path,
    *,
    dataset: Any = None,
    model: str | None = None,
    data_dir: str | None = None,
    seed: int | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
    allow_code: bool = False,
) -> Teacher:
    """Trains a teacher on all of the training split, saves it to `out` (a file that must not exist) and returns it.

    Folders of `out` that are missing are made, and do not stay where the training fails. `dataset` is as for distill. `allow_code` lets
    Python code run that a recipe file names.
    """
    named = {"model": model, "dataset": dataset}
    path = Path(out)
    check_out(path)
    if path.exists():
        raise RunFilesError(f"--out {path} exists already; name a new file.")
    if path.suffix in PICKLED:
        raise FlagError(f"--out {path}: a teacher file is safetensors. Name it {path.with_suffix('.safetensors')}.")
    watchers = Observers((f"observer {i}", o) for i, o in enumerate(observers))
    kept = watchers.interruptible(lambda: "Nothing of it is kept: give the same command again.")
    granted = trust.granting(named, sets, _table(recipe), everything=allow_code)
    with passing(dataset) as data, granted, kept, folders_of(path):
        built = recipe_for(
            recipe, model=model, evaluators="none", sets=list((sets or {}).items()), data__dir=data_dir, seed=seed, **data
        )  # fmt: skip
        check_used((sets or {}).items(), TRAINING, NOT_TRAINING, "`ddkit train` trains a teacher on all training images.")
        where = pick_device(device)
        found = open_dataset(built.data)
        check_classes(found)
        check_writable(path)  # before an hour of training
        teacher = train_teacher(found, None, built.teacher, built.train, seed=built.seed, device=where, watchers=watchers)
        save_teacher(path, teacher)
    return teacher
