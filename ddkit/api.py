"""The public functions: distill, evaluate, train. The command line is a thin layer over them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ddkit import plugins
from ddkit.artifact import FILE, Artifact, load
from ddkit.bank import Bank
from ddkit.blend import blended, seeds_of
from ddkit.components import DataInfo, Evaluation, EvaluationData, Evaluator
from ddkit.compute import pick_device, products
from ddkit.data import RealData, check_classes, check_held_out, open_dataset
from ddkit.engine import deterministic
from ddkit.errors import DdkitError, FlagError, InputError, PluginError, RunFailed, RunFilesError
from ddkit.files import read_json, sha256, write_atomic, write_json
from ddkit.hookspecs import Observers
from ddkit.images import sheet_png
from ddkit.jobs import Job, evaluators_of
from ddkit.recipe import Recipe, parse_recipe, recipe_dict
from ddkit.recipes import recipe_for, with_options
from ddkit.rundir import EVALUATION, MANIFEST, PREVIEW, RECIPE, RunDirectory, is_logged
from ddkit.teacher import Teacher
from ddkit.teachers import automatic_teacher, load_teacher, save_teacher, train_teacher

log = logging.getLogger("ddkit")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run: its directory, steps, seconds of distillation (without training a teacher), and evaluations."""

    path: Path
    steps: int
    seconds: float
    evaluations: list[Evaluation]


def plan(recipe: Recipe, *, device: str = "auto") -> dict[str, Any]:
    """Returns what a run of `recipe` would do, as data; opens the accessible images, trains and writes nothing."""
    if recipe.blend is not None:
        return _plan_of_blend(recipe, device)
    job = Job(recipe, device=device)
    return {
        "schema": 1,
        "recipe": recipe_dict(job.resolved()),
        "device": str(job.device),
        "classes": list(job.info.class_names),
        "image_shape": list(job.info.shape),
        "accessible_images": len(job.real.indices),
        "synthetic_images": job.info.classes * recipe.ipc,
        "teacher": recipe.teacher.use if job.needs_teacher else None,
        "plugins": job.plugins_used(),
    }


def _plan_of_blend(recipe: Recipe, device: str) -> dict[str, Any]:
    plans = [plan(part, device=device) for part in _check_blend(recipe, device).values()]
    finished = _finished_parts(recipe)
    facts = plans[0] if plans else {
        "schema": 1, "device": str(pick_device(device)), "classes": finished[0].class_names, "accessible_images": 0,
        "image_shape": list(_image_shape(finished[0])), "synthetic_images": len(finished[0].labels), "teacher": None, "plugins": [],
    }  # fmt: skip
    return facts | {"recipe": recipe_dict(recipe), "parts": plans}


def distill(
    recipe: str | Mapping[str, Any] | None = None,
    *,
    losses: str | Sequence[str] | None = None,
    dataset: str | None = None,
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
) -> Run:
    """Makes a synthetic set and returns its run; the arguments are the flags of `ddkit distill`.

    `recipe` is a recipe's name, a file, or TOML data; `sets` maps recipe paths to values. Raises DdkitError.
    """
    losses = losses if losses is None or isinstance(losses, str) else ",".join(losses)
    built = recipe_for(
        recipe, losses=losses, evaluators=evaluators, protocol=protocol, model=model, sets=list((sets or {}).items()),
        data__use=dataset, ipc=ipc, pipc=pipc, steps=steps, seed=seed, teacher__use=teacher, initializer__use=init,
        augmenter__use=augment, data__dir=data_dir,
    )  # fmt: skip
    return run_recipe(built, losses=losses, device=device, out=None if out is None else Path(out), observers=observers)


def run_recipe(
    recipe: Recipe,
    *,
    losses: str | None = None,
    device: str = "auto",
    out: Path | None = None,
    observers: Sequence[Any] = (),
) -> Run:
    """Runs `recipe` into `out` (None: runs/<recipe or losses>-<dataset>-<n>); nothing stays of a run that never began."""
    pick_device(device)
    stem = f"{(losses or recipe.name).replace(',', '+').replace(':', '-')}-{plugins.split_name(recipe.data.use)[0]}"
    directory = RunDirectory.numbered(stem) if out is None else RunDirectory.claim(out)
    if recipe.blend is not None:
        return _run_blend(recipe, directory, device, observers)
    watchers = _watchers(observers)
    try:
        job = _prepared(recipe, device, watchers)
        bank = job.bank()
        engine = job.engine(bank)
        resolved = job.resolved()
        with products(job.device, job.products):
            engine.start()
        if job.evaluators:
            _ = job.real.test_set  # a test image that cannot be read is told before the run, not after it
        directory.write_recipe(recipe_dict(resolved))
        directory.write_checkpoint(0, engine.state(0))
    except BaseException:
        directory.discard()
        raise
    return _finish(job, bank, engine, resolved, directory, watchers, start=0)


def resume(path: Path, *, steps: int | None = None, device: str = "auto", observers: Sequence[Any] = ()) -> Run:
    """Continues the run at `path` from its newest checkpoint that reads whole; `steps` may prolong it."""
    directory = RunDirectory.existing(path)
    recipe = parse_recipe(directory.read_recipe())
    if recipe.blend is not None and steps is not None:
        raise FlagError("--steps: this run is a blend, whose parts are made once. Leave it out, or start anew.")
    if steps is not None:
        recipe = msgspec.structs.replace(recipe, steps=steps)
    if recipe.blend is not None:
        return _run_blend(recipe, directory, device, observers)
    newest = directory.newest_checkpoint()
    if newest is None:
        raise RunFilesError(f"{path} has no readable checkpoint. Start anew: ddkit distill --recipe {path / 'recipe.toml'}")
    start, state = newest
    if start > recipe.steps:
        raise RunFilesError(f"{path} is at step {start} already, past --steps {recipe.steps}.")
    watchers = _watchers(observers)
    job = _prepared(recipe, device, watchers)
    bank = job.bank()
    engine = job.engine(bank)
    try:
        engine.load_state(start, state)
    except (KeyError, ValueError) as error:
        raise RunFilesError(f"The checkpoint of step {start} in {path} does not fit its recipe: {error}.") from None
    directory.cut_metrics(start, recipe.steps, recipe.engine.log_every)
    resolved = job.resolved()
    directory.write_recipe(recipe_dict(resolved))
    return _finish(job, bank, engine, resolved, directory, watchers, start=start)


def _prepared(recipe: Recipe, device: str, watchers: Observers) -> Job:
    job = Job(recipe, device=device)
    job.load_teacher(lambda done, total: watchers.call("stage_progress", stage="teacher", done=done, total=total))
    return job


def _finish(job: Job, bank: Bank, engine: Any, recipe: Recipe, directory: RunDirectory, watchers: Observers, *, start: int) -> Run:
    watchers.call("run_started", recipe=recipe, path=directory.path, start=start)
    began = time.perf_counter()
    with deterministic(recipe.engine.deterministic), products(job.device, job.products):
        _iterate(engine, recipe, directory, watchers, start)
    seconds = time.perf_counter() - began
    _write_set(job, bank, recipe, directory)
    evaluations = _evaluate_run(job, load(directory.path), directory, watchers)
    facts = _facts(job, recipe) | {"steps": recipe.steps, "seconds": round(seconds, 3)}
    directory.write_manifest(facts)
    run = Run(path=directory.path, steps=recipe.steps, seconds=seconds, evaluations=evaluations)
    watchers.call("run_finished", path=run.path, evaluations=run.evaluations)
    return run


def _iterate(engine: Any, recipe: Recipe, directory: RunDirectory, watchers: Observers, start: int) -> None:
    began, every = time.perf_counter(), recipe.engine

    def observe(index: int, record: Callable[[], dict[str, Any]]) -> None:
        line = None
        if is_logged(index, recipe.steps, every.log_every):
            line = record() | {"seconds": round(time.perf_counter() - began, 3)}
            directory.append_metrics(line)
        watchers.call("step_finished", index=index, steps=recipe.steps, record=line)
        if (index + 1) % every.checkpoint_every == 0:
            directory.write_checkpoint(index + 1, engine.state(index + 1))

    def is_read(index: int) -> bool:
        return is_logged(index, recipe.steps, every.log_every) or (index + 1) % every.checkpoint_every == 0

    engine.run(
        start, recipe.steps, observe=observe, save=lambda step: directory.write_checkpoint(step, engine.state(step)), is_read=is_read
    )
    directory.write_checkpoint(recipe.steps, engine.state(recipe.steps))


def _write_set(job: Job, bank: Bank, recipe: Recipe, directory: RunDirectory) -> None:
    images = job.normalisation.to_pixels(bank.images.detach()).cpu()
    metadata_ = {
        "class_names": list(job.info.class_names),
        "mean": list(job.normalisation.mean),
        "std": list(job.normalisation.std),
        "ipc": recipe.ipc,
        "pipc": recipe.pipc,
        "seed": recipe.seed,
        "recipe": recipe.name,
    }
    extra = {name: tensor.detach().cpu() for name, tensor in bank.parameters.items()}
    _save(Artifact(images, bank.labels.cpu(), metadata_, extra), directory)


def _save(artifact: Artifact, directory: RunDirectory) -> None:
    """Writes the set and its picture."""
    artifact.save(directory.path / FILE)
    write_atomic(directory.path / PREVIEW, sheet_png(artifact.images, artifact.labels, artifact.class_names))


def _evaluate_run(job: Job, artifact: Artifact, directory: RunDirectory, watchers: Observers) -> list[Evaluation]:
    if not job.evaluators:
        return []
    rows = run_evaluators(job.evaluators, artifact, job.real, job.teacher, job.recipe.seed, job.device, watchers)
    write_json(directory.path / EVALUATION, {"schema": 1, "evaluations": msgspec.to_builtins(rows)})
    return rows


def run_evaluators(
    evaluators: Mapping[str, Evaluator],
    artifact: Artifact,
    real: RealData,
    teacher: Teacher | None,
    seed: int,
    device: torch.device,
    watchers: Observers,
) -> list[Evaluation]:
    """Returns the rows of every evaluator, in order of label."""
    images, labels = real.test_set
    data = EvaluationData(
        info=real.info, test_images=images, test_labels=labels, real_images=real.images, real_labels=real.labels,
        seed=seed, device=device,
        report=lambda done, total: watchers.call("stage_progress", stage="evaluation", done=done, total=total),
    )  # fmt: skip
    rows: list[Evaluation] = []
    for label, evaluator in sorted(evaluators.items()):
        try:
            rows += [msgspec.structs.replace(row, split=real.split) for row in evaluator(artifact, data, teacher)]
        except DdkitError:
            raise
        except Exception as error:  # a stranger's evaluator can raise anything
            raise RunFailed(f"The evaluator '{label}' raised {type(error).__name__}: {error}.") from error
    return rows


def _facts(job: Job, recipe: Recipe) -> dict[str, Any]:
    teacher = job.teacher
    return {
        "seed": recipe.seed,
        "device": str(job.device),
        "threads": torch.get_num_threads(),
        "plugins": job.plugins_used(),
        "teacher": None if teacher is None else {"path": teacher.path, "sha256": teacher.sha256},
        "real_files": job.real.sources,
    }


def _watchers(observers: Sequence[Any]) -> Observers:
    return Observers([*_installed_observers(), *((f"observer {i}", o) for i, o in enumerate(observers))])


def _installed_observers() -> list[tuple[str, Any]]:
    found = []
    for plugin in plugins.plugins():
        if plugin.kind == "observer":
            try:
                found.append((plugin.name, plugins.load_plugin(plugin)))
            except PluginError as error:
                log.warning("%s", error)
    return found


def evaluate(
    target: Artifact | str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    evaluators: str | None = None,
    protocol: str | None = None,
    model: str | None = None,
    repeats: int | None = None,
    teacher: str | None = None,
    seed: int | None = None,
    pipc: int | str | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
) -> list[Evaluation]:
    """Returns the evaluations of a synthetic set: an artifact, a file, or a run directory.

    Those of a run are added to its files, unless the real data, `seed` or `pipc` are not the run's own. Without
    `dataset` a run's is used. `model` may name several, separated by commas. Raises DdkitError.
    """
    if evaluators == "none":
        raise FlagError("--evaluate none leaves nothing to do here; name an evaluator, or leave it out.")
    artifact = target if isinstance(target, Artifact) else load(target)
    directory = None if isinstance(target, Artifact) else _run_at(Path(target))
    recipe = _evaluation_recipe(
        artifact, directory, list((sets or {}).items()), evaluators=evaluators, protocol=protocol, data__use=dataset,
        data__dir=data_dir, teacher__use=teacher, seed=seed, pipc=pipc,
    )  # fmt: skip
    recipe = msgspec.structs.replace(recipe, evaluators=with_options(recipe.evaluators, model=model, repeats=repeats))
    watchers = Observers([(f"observer {i}", o) for i, o in enumerate(observers)])
    rows = _judged(recipe, artifact, device, watchers, with_teacher=teacher is not None)
    if directory is not None and _same_data(recipe, parse_recipe(directory.read_recipe())):
        _record_evaluation(directory, rows)  # rows on other data than the run's are returned, not recorded
    return rows


def _run_at(path: Path) -> RunDirectory | None:
    """Returns the run at `path`; None for a file, and for a blend of two files, which knows no data."""
    if not path.is_dir():
        return None
    if not (path / RECIPE).is_file() and (path / MANIFEST).is_file() and "blend" in RunDirectory(path).read_manifest():
        return None
    return RunDirectory.existing(path)


def _judged(recipe: Recipe, artifact: Artifact, device: str, watchers: Observers, *, with_teacher: bool = False) -> list[Evaluation]:
    """Returns what the recipe's evaluators say of a set, on the recipe's data; `with_teacher`: whether or not they ask for one."""
    where = pick_device(device)
    real = RealData.of(recipe, open_dataset(recipe.data), _image_shape(artifact))
    _check_fit(artifact, real.info)
    _check_held_out(artifact, real)
    made = evaluators_of(recipe, real.info)
    real.check_test_set()
    required = any(evaluator.requires.teacher for evaluator in made.values())
    guide = _guide(recipe, real, where, watchers) if required or (with_teacher and recipe.teacher.use != "auto") else None
    return run_evaluators(made, artifact, real, guide, recipe.seed, where, watchers)


def _evaluation_recipe(
    artifact: Artifact, directory: RunDirectory | None, sets: list[tuple[str, Any]], *, evaluators: str | None, **flags: Any
) -> Recipe:
    """Returns the run's recipe, or for a file the default one with the seed and pipc that the file records."""
    base = None if directory is None else directory.read_recipe()
    if base is None:
        if flags["data__use"] is None and not any(path == "data" or path.startswith("data.") for path, _ in sets):
            raise InputError("A file does not say which real data to test on: name it with --dataset NAME[:PATH].")
        sets = [(key, artifact.metadata[key]) for key in ("seed", "pipc") if key in artifact.metadata] + sets
    elif evaluators is None and not base.get("evaluators"):
        evaluators = "accuracy"
    return recipe_for(base, evaluators=evaluators, sets=sets, **flags)


def _guide(recipe: Recipe, real: RealData, device: torch.device, watchers: Observers) -> Teacher:
    """Returns the recipe's teacher; an automatic one is read from the cache, or trained."""
    if recipe.teacher.use != "auto":
        return load_teacher(recipe.teacher, real.info, device)
    return automatic_teacher(
        real.dataset, real.info.shape, recipe.teacher, recipe.train, device,
        lambda done, total: watchers.call("stage_progress", stage="teacher", done=done, total=total),
    )  # fmt: skip


def _image_shape(artifact: Artifact) -> tuple[int, int, int]:
    channels, height, width = artifact.images.shape[1:]
    return channels, height, width


def _check_fit(artifact: Artifact, info: DataInfo) -> None:
    if list(artifact.class_names) != list(info.class_names):
        raise InputError(
            f"The synthetic set has the classes {artifact.class_names[:12]}, the data set {list(info.class_names)[:12]}: "
            "it can only be tested on data of the same classes in the same order."
        )


def _check_held_out(artifact: Artifact, real: RealData) -> None:
    """Raises InputError where a held-out image may have been accessible when the set was made."""
    if real.held_out is None:
        return
    seeds = seeds_of(artifact)
    if any(seed != real.seed for seed in seeds):
        made_with = " and ".join(str(seed) for seed in seeds)
        fix = f"Use --seed {made_with}, or --set data.test=test." if len(seeds) == 1 else "Use --set data.test=test."
        raise InputError(
            f"With data.test = held-out the seed tells held-out images from accessible ones, and the set was made with seed "
            f"{made_with}. {fix}",
            "data.test",
        )
    check_held_out(real.dataset, artifact.metadata.get("pipc", real.pipc), real.held_out)


def _record_evaluation(directory: RunDirectory, rows: list[Evaluation]) -> None:
    """Adds rows to evaluation.json, a new row replacing an older one of the same _identity."""
    manifest = directory.read_manifest()
    file = directory.path / EVALUATION
    older = read_json(file)["evaluations"] if file.is_file() else []
    fresh = msgspec.to_builtins(rows)
    keys = [_identity(row) for row in fresh]
    write_json(file, {"schema": 1, "evaluations": [row for row in older if _identity(row) not in keys] + fresh})
    directory.write_manifest({key: value for key, value in manifest.items() if key not in ("schema", "versions", "files")})


def _same_data(one: Recipe, other: Recipe) -> bool:
    """Whether both have the same real data; on which split of it they test is told by the rows."""
    first, second = (msgspec.structs.replace(recipe.data, test="test") for recipe in (one, other))
    return (first, one.pipc, one.seed) == (second, other.pipc, other.seed)


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what two rows have in common of which the newer replaces the older."""
    named = (row.get(key) for key in ("evaluator", "model", "protocol", "labels", "repeats"))
    settings = (row.get("details", {}).get(key) for key in ("epochs", "temperature"))
    return (*named, row.get("images", "synthetic"), row.get("split", "test"), *settings)


def train(
    out: str | Path,
    *,
    dataset: str | None = None,
    model: str | None = None,
    data_dir: str | None = None,
    seed: int | None = None,
    recipe: str | Mapping[str, Any] | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    report: Callable[[int, int], None] | None = None,
) -> Teacher:
    """Trains a teacher on all of the training split, saves it to `out` (a file that must not exist) and returns it."""
    path = Path(out)
    if path.exists():
        raise RunFilesError(f"--out {path} exists already; name a new file.")
    built = recipe_for(
        recipe,
        model=model,
        evaluators="none",
        sets=list((sets or {}).items()),
        data__use=dataset,
        data__dir=data_dir,
        seed=seed,
    )
    where = pick_device(device)
    found = open_dataset(built.data)
    check_classes(found)
    write_atomic(path, b"")  # shows that it can be written before an hour of training
    path.unlink()
    teacher = train_teacher(found, None, built.teacher, built.train, seed=built.seed, device=where, report=report)
    save_teacher(path, teacher)
    return teacher


def blend(first: str | Path, second: str | Path, *, alpha: float = 0.5, out: str | Path) -> Run:
    """Writes the set (1 - alpha) * first + alpha * second into the run directory `out`, and returns that run.

    `first` and `second` are run directories or files of the same classes, images a class and shape; images are matched by
    class name, and within a class by their order. Where one of them is a run, `ddkit evaluate` finds its real data.
    Raises DdkitError.
    """
    result = blended(load(first), load(second), alpha)
    known = [RunDirectory.existing(Path(part)).read_recipe() for part in (first, second) if (Path(part) / RECIPE).is_file()]
    copied = ("data", "teacher", "train", "seed", "pipc")
    table: dict[str, Any] = {key: known[0][key] for key in copied if key in known[0]} if known else {}
    paths = [Path(part).absolute() for part in (first, second)]
    blend_ = {"first": str(paths[0]), "second": str(paths[1]), "alpha": alpha}
    recipe = parse_recipe({**table, "name": "blend", "ipc": _images_a_class(result), "blend": blend_})
    directory = RunDirectory.claim(Path(out))
    try:
        if known:
            directory.write_recipe(recipe_dict(recipe))
        _save(result, directory)
        directory.write_manifest({"seed": recipe.seed, "steps": 0, "seconds": 0.0, **_blend_facts(recipe, paths)})
    except BaseException:
        directory.discard()
        raise
    return Run(path=directory.path, steps=0, seconds=0.0, evaluations=[])


def _images_a_class(artifact: Artifact) -> int:
    return int(artifact.metadata.get("ipc") or artifact.labels.bincount().max())


def _blend_facts(recipe: Recipe, paths: Sequence[Path]) -> dict[str, Any]:
    """Returns what the manifest tells of a blend: its parts with their sha256, and what their own manifests tell of both."""
    assert recipe.blend is not None
    files = [path / FILE if path.is_dir() else path for path in paths]
    manifests = [RunDirectory(path).read_manifest() for path in paths if (path / MANIFEST).is_file()]
    plugins_ = [plugin for manifest in manifests for plugin in manifest.get("plugins", [])]
    real = [source for manifest in manifests for source in manifest.get("real_files", [])]
    return {
        "threads": torch.get_num_threads(),
        "plugins": [plugin for number, plugin in enumerate(plugins_) if plugin not in plugins_[:number]],
        "real_files": sorted(set(real), key=str),
        "blend": {"alpha": recipe.blend.alpha, "parts": [{"path": str(file), "sha256": sha256(file)} for file in files]},
    }


def _recipes_of_parts(recipe: Recipe) -> dict[str, Recipe]:
    """Returns the recipes that a blend makes first, by the name of their folder; a part that is a run or file has none.

    ipc, pipc, steps and seed, and what else the blend's recipe sets (`blend.set`), hold for both.
    """
    assert recipe.blend is not None
    found = {}
    for part, name in (("first", recipe.blend.first), ("second", recipe.blend.second)):
        if not _is_set(name):
            found[part] = recipe_for(
                name, evaluators="none", sets=list(recipe.blend.set.items()), ipc=recipe.ipc, pipc=recipe.pipc, seed=recipe.seed,
                steps=recipe.steps,
            )  # fmt: skip
            if found[part].blend is not None:
                raise InputError(f"blend.{part} = {name!r} is a blend itself; make it first and name its run.", f"blend.{part}")
    return found


def _is_set(name: str) -> bool:
    """Whether a part of a blend is a run directory or file, not a recipe: it is given by a path that is no TOML file."""
    return "/" in name and not name.endswith(".toml")


def _finished_parts(recipe: Recipe) -> list[Artifact]:
    """Returns the parts that are sets already; raises InputError where one has not the ipc that is asked for."""
    assert recipe.blend is not None
    found = [load(name) for name in (recipe.blend.first, recipe.blend.second) if _is_set(name)]
    for artifact in found:
        if _images_a_class(artifact) != recipe.ipc:
            raise InputError(
                f"A part of the blend has {_images_a_class(artifact)} images a class, and ipc is {recipe.ipc}. Give --ipc as the part has.",
                "ipc",
            )
    return found


def _check_blend(recipe: Recipe, device: str) -> dict[str, Recipe]:
    """Returns the recipes of the parts to be made; raises a DdkitError for all that would fail after they are made."""
    assert recipe.blend is not None
    made = _recipes_of_parts(recipe)
    jobs = [Job(part, device=device) for part in made.values()]
    finished = _finished_parts(recipe)
    if len(finished) == 2:
        blended(finished[0], finished[1], recipe.blend.alpha)
    elif finished and jobs:
        names, shape = list(jobs[0].info.class_names), jobs[0].info.shape
        if finished[0].class_names != names or finished[0].images.shape[1:] != shape:
            raise InputError("The finished part of the blend has other classes or another image shape than the data of the other part.")
    if recipe.evaluators:
        real = RealData.of(recipe, open_dataset(recipe.data), jobs[0].info.shape if jobs else _image_shape(finished[0]))
        real.check_test_set()
        for evaluator in evaluators_of(recipe, real.info).values():
            evaluator.check(real.info)
    return made


def _run_blend(recipe: Recipe, directory: RunDirectory, device: str, observers: Sequence[Any]) -> Run:
    """Makes both parts in `parts/` of the directory, or goes on with what is there, and blends and evaluates them."""
    assert recipe.blend is not None
    watchers = _watchers(observers)
    try:
        made = _check_blend(recipe, device)
        directory.write_recipe(recipe_dict(recipe))
    except BaseException:
        directory.discard()
        raise
    steps, seconds, paths = 0, 0.0, []
    for name, source in (("first", recipe.blend.first), ("second", recipe.blend.second)):
        path = Path(source)
        if name in made:
            path = directory.path / "parts" / name
            _make_part(made[name], path, device, observers)
            facts = RunDirectory(path).read_manifest()
            steps, seconds = steps + facts["steps"], seconds + facts["seconds"]
        paths.append(path)
    result = blended(load(paths[0]), load(paths[1]), recipe.blend.alpha)
    result.metadata |= {"recipe": recipe.name}
    _save(result, directory)
    rows = _judged(recipe, result, device, watchers) if recipe.evaluators else []
    if rows:
        write_json(directory.path / EVALUATION, {"schema": 1, "evaluations": msgspec.to_builtins(rows)})
    facts = {"seed": recipe.seed, "device": str(pick_device(device)), "steps": steps, "seconds": round(seconds, 3)}
    directory.write_manifest(facts | _blend_facts(recipe, paths))
    watchers.call("run_finished", path=directory.path, evaluations=rows)
    return Run(path=directory.path, steps=steps, seconds=seconds, evaluations=rows)


def _make_part(recipe: Recipe, path: Path, device: str, observers: Sequence[Any]) -> None:
    """Makes a part of a blend, or goes on with it."""
    if (path / MANIFEST).is_file():
        return
    if any((path / "checkpoints").glob("*.safetensors")):
        resume(path, device=device, observers=observers)
        return
    if path.is_dir():
        shutil.rmtree(path)  # it never began
    run_recipe(recipe, device=device, out=path, observers=observers)
