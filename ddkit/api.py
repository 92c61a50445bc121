"""The public functions: distill, evaluate, train, blend. The command line is a thin layer over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from ddkit import permission, plugins, said
from ddkit.artifact import Artifact, load
from ddkit.bank import Bank
from ddkit.blends import blend, plan_of_blend, run_blend
from ddkit.components import Evaluation
from ddkit.compute import pick_device, products
from ddkit.data import check_classes, open_dataset
from ddkit.engine import Engine, deterministic
from ddkit.errors import FlagError, RunFilesError
from ddkit.evaluating import evaluate, recorded, run_evaluators
from ddkit.files import folders_of, write_atomic, write_json
from ddkit.film import add_frame, begin_film, is_frame
from ddkit.hookspecs import Observers
from ddkit.jobs import AUTOMATIC_TEACHER, Job
from ddkit.manifest import MANIFEST, check_listed
from ddkit.passed import passing
from ddkit.pluginfile import check_unchanged
from ddkit.plugins import watchers_of
from ddkit.ranks import Ranks, group, own_device
from ddkit.recipe import Recipe, parse_recipe, recipe_dict
from ddkit.recipes import flattened, recipe_for
from ddkit.reporting import close_run, known_spectrum
from ddkit.rundir import EVALUATION, RECIPE, Follower, Run, RunDirectory, is_logged, save_set
from ddkit.teacher import Teacher
from ddkit.teachers import save_teacher, train_teacher

log = logging.getLogger("ddkit")
PICKLED = (".pt", ".pth", ".pkl", ".bin", ".ckpt")  # how files end that others would unpickle

__all__ = ["Run", "blend", "distill", "evaluate", "plan", "resume", "run_recipe", "train"]


def plan(recipe: Recipe, *, device: str = "auto", distributed: bool = False) -> dict[str, Any]:
    """Returns what a run of `recipe` would do, as data; opens the accessible images, trains and writes nothing.

    `distributed`: as in distill; what several processes cannot share is refused as the run would be.
    """
    with group(wanted=distributed) as ranks:
        ranks.same("The recipe", dict(flattened(recipe_dict(recipe))))
        return _plan(recipe, own_device(device), ranks)


def _plan(recipe: Recipe, device: str, ranks: Ranks) -> dict[str, Any]:
    if recipe.blend is not None:
        return plan_of_blend(recipe, device, lambda part: _plan(part, device, ranks), ranks)
    job = Job(recipe, device=device, ranks=ranks)
    return {
        "schema": 1,
        "recipe": recipe_dict(job.resolved()),
        "device": str(job.device),
        "processes": ranks.size,
        "classes": list(job.info.class_names),
        "image_shape": list(job.info.shape),
        "accessible_images": len(job.real.indices),
        "synthetic_images": job.info.classes * recipe.ipc,  # those that are stored
        "teacher": recipe.teacher.use if job.needs_teacher else None,
        "plugins": job.plugins_used,
    }


def distill(
    recipe: str | Mapping[str, Any] | None = None,
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
) -> Run:
    """Makes a synthetic set and returns its run; the arguments are the flags of `ddkit distill`.

    `recipe` is a recipe's name, a file, or TOML data; `sets` maps recipe paths to values. `dataset` is a name, or an object: a map-style
    torch Dataset of (image, label), or (training, test) of these. `allow_code` lets Python code run that a recipe or teacher file names;
    what the arguments name runs anyway. `distributed`: the processes that torchrun started, all of which call this, share the run
    (elsewhere this process is alone). Raises DdkitError.
    """
    losses = losses if losses is None or isinstance(losses, str) else ",".join(losses)
    permission.named_by_user({} if isinstance(recipe, str) else recipe, model, sets)
    place = None if out is None else Path(out)
    with passing(dataset) as data, permission.allowing(allow_code):
        built = recipe_for(
            recipe, losses=losses, evaluators=evaluators, protocol=protocol, model=model, sets=list((sets or {}).items()),
            ipc=ipc, pipc=pipc, steps=steps, seed=seed, teacher__use=teacher, initializer__use=init,
            augmenter__use=augment, data__dir=data_dir, **data,
        )  # fmt: skip
        return run_recipe(built, losses=losses, device=device, out=place, observers=observers, distributed=distributed)


def run_recipe(
    recipe: Recipe,
    *,
    losses: str | None = None,
    device: str = "auto",
    out: Path | None = None,
    observers: Sequence[Any] = (),
    distributed: bool = False,
) -> Run:
    """Runs `recipe` into `out` (None: runs/<recipe or losses>-<dataset>-<n>); nothing stays of a run that never began."""
    with group(wanted=distributed) as ranks:
        return _run(recipe, _Place(own_device(device), ranks, observers), out, losses or recipe.name)


class _Place(NamedTuple):
    """Where a run is made: on which device, by which processes, seen by whom."""

    device: str
    ranks: Ranks
    observers: Sequence[Any]

    def watchers(self) -> Observers:
        """Returns the observers, which only the first process has."""
        return watchers_of(self.observers) if self.ranks.first else Observers([])

    def directory(self, claim: Callable[[], RunDirectory]) -> RunDirectory:
        """Returns what `claim` does in the first process, and in the others the same folder to follow."""
        if self.ranks.first:
            found = claim()
            self.ranks.told(str(found.path.absolute()) if self.ranks.size > 1 else None)
        else:
            found = Follower(Path(self.ranks.told(None)))
        try:
            self.ranks.wait()  # all have seen it, before one may remove it
        except BaseException:
            found.discard()
            found.release()
            raise
        return found


def _run(recipe: Recipe, place: _Place, out: Path | None, name: str) -> Run:
    pick_device(place.device)
    place.ranks.same("The recipe", dict(flattened(recipe_dict(recipe))))
    watchers = place.watchers()
    stem = f"{name.replace(',', '+').replace(':', '-')}-{plugins.split_name(recipe.data.use)[0]}"
    with said.recording(), place.directory(lambda: RunDirectory.numbered(stem) if out is None else RunDirectory.claim(out)) as directory:
        if recipe.blend is not None:
            return run_blend(recipe, directory, place.device, watchers, make=_maker(place), ranks=place.ranks)
        with deterministic(recipe.engine.deterministic):
            try:
                made = _made(recipe, place, watchers)
                _begin(made, directory)
            except BaseException:
                directory.discard()
                raise
            return _finish(made, directory, watchers, start=0)


def resume(
    path: str | Path,
    *,
    dataset: Any = None,
    steps: int | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
    allow_code: bool = False,
    distributed: bool = False,
) -> Run:
    """Continues the run at `path` from its newest checkpoint that reads whole; `steps` may prolong it.

    `dataset` is needed where the run's was an object: the same again, as for distill. A run that is finished is returned as it is.
    `allow_code` lets Python code run that its recipe names: whose run it is, a folder does not tell. `distributed`: as in distill; the
    run may have been begun by any number of processes. Raises DdkitError.
    """
    if isinstance(dataset, str):
        raise FlagError("dataset: a run is continued on its own data. Pass the object that it was begun with, or leave it out.")
    with permission.allowing(allow_code), passing(dataset), group(wanted=distributed) as ranks:
        return _resume(Path(path), steps, _Place(own_device(device), ranks, observers))


def _resume(path: Path, steps: int | None, place: _Place) -> Run:
    with said.recording(), place.directory(lambda: RunDirectory.existing(path).take()) as directory:
        table = directory.read_recipe()
        recipe = parse_recipe(table)
        if recipe.blend is not None and steps is not None:
            raise FlagError("--steps: this run is a blend, whose parts are made once. Leave it out, or start anew.")
        watchers = place.watchers()
        if place.ranks.told(steps in (None, recipe.steps) and (path / MANIFEST).is_file()):
            return _finished(directory, watchers)
        if recipe.blend is not None:
            return run_blend(recipe, directory, place.device, watchers, make=_maker(place), ranks=place.ranks)
        longer = table if steps is None else table | {"steps": steps}
        with deterministic(recipe.engine.deterministic):
            return _continue(longer, directory, place, watchers)


def _continue(table: dict[str, Any], directory: RunDirectory, place: _Place, watchers: Observers) -> Run:
    """Goes on with a run whose resolved recipe is `table`."""
    recipe = parse_recipe(table)
    newest = directory.newest_checkpoint()
    place.ranks.same("The newest checkpoint", None if newest is None else newest.step)
    if newest is not None:
        said.add(newest.warnings)
        check_unchanged(newest.plugin_files, directory.path)
        if newest.step > recipe.steps:
            raise RunFilesError(f"{directory.path} is at step {newest.step} already, past --steps {recipe.steps}.")
    made = _made(recipe, place, watchers, begun=newest is not None)
    if newest is None:
        directory.reopen()
        _begin(made, directory)
        return _finish(made, directory, watchers, start=0)
    start = newest.step
    _check_inputs(newest.inputs, made.job, directory.path)
    made.job.plugin_files = newest.plugin_files | made.job.plugin_files
    try:
        made.engine.load_state(start, made.bank.own_part(newest.state))
    except (KeyError, ValueError) as error:
        raise RunFilesError(f"The checkpoint of step {start} in {directory.path} does not fit its recipe: {error}.") from None
    directory.reopen()
    directory.keep_checkpoints_until(start)
    directory.write_recipe(table)
    directory.cut_metrics(start, recipe.steps, recipe.engine.log_every)
    return _finish(made, directory, watchers, start=start)


def _check_inputs(began: Mapping[str, str], job: Job, path: Path) -> None:
    """Raises RunFilesError where the run at `path` began with another teacher or other images; warns for an automatic teacher."""
    for name, digest in job.inputs.items():
        if began.get(name, digest) == digest:
            continue
        told = f"{name} is not what the run at {path} began with (sha256 {began[name][:12]} then, {digest[:12]} now)"
        if name != AUTOMATIC_TEACHER:
            raise RunFilesError(f"{told}, so it cannot be continued exactly. Restore it, or start anew.")
        log.warning("%s: it was trained again. The run goes on with this one, and is not the one that it would have been.", told)


def _finished(directory: RunDirectory, watchers: Observers) -> Run:
    """Returns a run that has all that it will have, from its files."""
    facts = directory.read_manifest()
    for name in facts["files"]:
        check_listed(directory.path, name)
    rows = msgspec.convert(recorded(directory), list[Evaluation])
    log.warning("%s is finished: nothing was left to do.", directory.path)
    watchers.call("run_finished", path=directory.path, evaluations=rows)
    return Run(path=directory.path, steps=facts["steps"], seconds=facts["seconds"], evaluations=rows)


class _Made(NamedTuple):
    """What a run works with: `recipe` is the resolved one."""

    job: Job
    bank: Bank
    engine: Engine
    recipe: Recipe


def _made(recipe: Recipe, place: _Place, watchers: Observers, *, begun: bool = False) -> _Made:
    """Returns the objects of a run; `begun`: its set is to be read from a checkpoint."""
    job = Job(recipe, device=place.device, begun=begun, ranks=place.ranks)
    job.load_teacher(lambda done, total: watchers.call("stage_progress", stage="teacher", done=done, total=total))
    bank = job.bank()
    resolved = job.resolved()
    place.ranks.same("The resolved recipe", dict(flattened(recipe_dict(resolved))))
    return _Made(job, bank, job.engine(bank), resolved)


def _begin(made: _Made, directory: RunDirectory) -> None:
    """Writes what a run that is cut off continues from."""
    with products(made.job.device, made.job.decided.products):
        made.engine.start()
    if made.job.evaluators and made.job.ranks.first:
        _ = made.job.real.test_set  # a test image that cannot be read is told before the run, not after it
    directory.write_recipe(recipe_dict(made.recipe))
    directory.cut_metrics(0, made.recipe.steps, made.recipe.engine.log_every)
    images = _pixels(made.job, made.bank)
    if images is not None:
        begin_film(directory.path, images, made.job.stored_labels)
    _keep(0, made.job, made.bank, made.engine, directory)


def _keep(index: int, job: Job, bank: Bank, engine: Engine, directory: RunDirectory) -> None:
    """Writes the checkpoint of step `index`."""
    state = engine.state(index)
    rowwise = {key for key in state if bank.is_rowwise(key)}
    directory.write_checkpoint(index, state, job.plugin_files, job.inputs, rowwise=rowwise, ranks=job.ranks)


def _finish(made: _Made, directory: RunDirectory, watchers: Observers, *, start: int) -> Run:
    job, bank, engine, recipe = made
    watchers.call("run_started", recipe=recipe, path=directory.path, start=start)
    began = time.perf_counter()
    with products(job.device, job.decided.products):
        _iterate(job, bank, engine, recipe, directory, watchers, start)
    seconds = time.perf_counter() - began
    _write_set(job, bank, recipe, directory)
    job.ranks.wait()  # its file is there
    evaluations = _evaluate_run(job, load(directory.path), directory, watchers)
    facts = _facts(job, recipe) | {"steps": recipe.steps, "seconds": round(seconds, 3)}
    if job.ranks.first:
        close_run(directory, facts)
    job.ranks.wait()  # the run is finished for all of them, or for none
    run = Run(path=directory.path, steps=recipe.steps, seconds=seconds, evaluations=evaluations)
    watchers.call("run_finished", path=run.path, evaluations=run.evaluations)
    return run


def _iterate(job: Job, bank: Bank, engine: Engine, recipe: Recipe, directory: RunDirectory, watchers: Observers, start: int) -> None:
    began, every = time.perf_counter(), recipe.engine

    def show(index: int) -> None:
        images = _pixels(job, bank) if job.ranks.told(watchers.has("checkpoint_written")) else None
        if images is not None:
            watchers.call(
                "checkpoint_written", index=index, images=images, labels=job.stored_labels, class_names=list(job.info.class_names)
            )

    def keep(index: int) -> None:
        _keep(index, job, bank, engine, directory)
        show(index)

    def observe(index: int, record: Callable[[], dict[str, Any]]) -> None:
        line = None
        if is_logged(index, recipe.steps, every.log_every):
            line = record() | {"seconds": round(time.perf_counter() - began, 3)}
            directory.append_metrics(line)
        watchers.call("step_finished", index=index, steps=recipe.steps, record=line)
        images = _pixels(job, bank) if is_frame(index + 1) else None
        if images is not None:
            add_frame(directory.path, index + 1, images, job.stored_labels)
        if (index + 1) % every.checkpoint_every == 0:
            keep(index + 1)

    def is_read(index: int) -> bool:
        return is_logged(index, recipe.steps, every.log_every) or (index + 1) % every.checkpoint_every == 0 or is_frame(index + 1)

    show(start)
    engine.run(start, recipe.steps, observe=observe, save=keep, is_read=is_read)
    if recipe.steps > start and recipe.steps % every.checkpoint_every:
        keep(recipe.steps)


def _pixels(job: Job, bank: Bank) -> Tensor | None:
    """Returns the images (n, C, H, W) of the whole set in pixel units, on the CPU; None in every process but the first."""
    return job.ranks.gathered(job.normalisation.to_pixels(bank.images.detach()))


def _write_set(job: Job, bank: Bank, recipe: Recipe, directory: RunDirectory) -> None:
    images = _pixels(job, bank)
    extra = {
        name: job.ranks.gathered(tensor) if bank.is_rowwise(f"bank.{name}") else tensor.detach().cpu()
        for name, tensor in bank.parameters.items()
    }
    if images is None:
        return
    metadata_ = {
        "class_names": list(job.info.class_names),
        "mean": list(job.normalisation.mean),
        "std": list(job.normalisation.std),
        "ipc": recipe.ipc,
        "pipc": recipe.pipc,
        "seed": recipe.seed,
        "recipe": recipe.name,
        **({"decode": {"factor": recipe.factor}} if recipe.factor > 1 else {}),
    }
    whole = {name: tensor for name, tensor in extra.items() if tensor is not None}
    save_set(Artifact(images, job.stored_labels, metadata_, whole), directory)


def _evaluate_run(job: Job, artifact: Artifact, directory: RunDirectory, watchers: Observers) -> list[Evaluation]:
    if not job.evaluators:
        return []
    rows = run_evaluators(job.evaluators, artifact, job.real, job.teacher, job.recipe.seed, job.device, watchers, job.ranks)
    if job.ranks.first:
        write_json(directory.path / EVALUATION, {"schema": 1, "evaluations": msgspec.to_builtins(rows)})
    return rows


def _facts(job: Job, recipe: Recipe) -> dict[str, Any]:
    teacher = job.teacher
    return {
        "seed": recipe.seed,
        "device": str(job.device),
        "threads": torch.get_num_threads(),
        "plugins": job.plugins_used,
        **({"plugin_files": job.plugin_files} if job.plugin_files else {}),
        "teacher": None if teacher is None else {"path": teacher.path, "sha256": teacher.sha256},
        **known_spectrum(job.real.sample()),
        "real_files": job.real.sources,
        **({"processes": {"count": job.ranks.size, "exchanged_bytes": dict(job.ranks.exchanged)}} if job.ranks.size > 1 else {}),
    }


def train(
    out: str | Path,
    *,
    dataset: Any = None,
    model: str | None = None,
    data_dir: str | None = None,
    seed: int | None = None,
    recipe: str | Mapping[str, Any] | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    report: Callable[[int, int], None] | None = None,
    allow_code: bool = False,
) -> Teacher:
    """Trains a teacher on all of the training split, saves it to `out` (a file that must not exist) and returns it.

    Folders of `out` that are missing are made, and do not stay where the training fails. `dataset` is as for distill. `allow_code` lets
    Python code run that a recipe file names.
    """
    permission.named_by_user({} if isinstance(recipe, str) else recipe, model, sets)
    path = Path(out)
    if path.exists():
        raise RunFilesError(f"--out {path} exists already; name a new file.")
    if path.suffix in PICKLED:
        raise FlagError(f"--out {path}: a teacher file is safetensors. Name it {path.with_suffix('.safetensors')}.")
    with passing(dataset) as data, permission.allowing(allow_code), folders_of(path):
        built = recipe_for(
            recipe, model=model, evaluators="none", sets=list((sets or {}).items()), data__dir=data_dir, seed=seed, **data
        )  # fmt: skip
        where = pick_device(device)
        found = open_dataset(built.data)
        check_classes(found)
        write_atomic(path, b"")  # shows that it can be written before an hour of training
        path.unlink()
        teacher = train_teacher(found, None, built.teacher, built.train, seed=built.seed, device=where, report=report)
        save_teacher(path, teacher)
    return teacher


def _maker(place: _Place) -> Callable[[Recipe, Path], None]:
    """Returns what makes a part of a blend, or goes on with it."""

    def make(recipe: Recipe, path: Path) -> None:
        if place.ranks.told((path / MANIFEST).is_file()):
            check_unchanged(RunDirectory(path).read_manifest().get("plugin_files", {}), path)
            return
        if place.ranks.told((path / RECIPE).is_file()):
            _resume(path, None, place)
        else:
            _run(recipe, place, path, recipe.name)

    return make
