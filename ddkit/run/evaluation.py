"""Evaluates a synthetic set: a run's, or that of a file, with the evaluators of a recipe.

A row is made in `run_evaluators`, at the end of a run and for `ddkit evaluate` alike: each evaluator is called with the set as it was read
back from its file, the real data and the teacher, and returns rows, to which ddkit adds the split that was tested on. `judged` makes these
from a recipe; `evaluate` makes the recipe, and adds the rows to the files of a run, where a newer row replaces the one of the same
`_identity`.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli_w
import torch

from ddkit.components import trust
from ddkit.components.base import Evaluation, EvaluationData, Evaluator
from ddkit.components.guard import blamed
from ddkit.components.observers import Observers
from ddkit.data.held_out import check_held_out
from ddkit.data.passed import passing
from ddkit.data.real import RealData, SomeClasses, check_classes, open_dataset
from ddkit.distributed import ALONE, Ranks, group, own_device
from ddkit.errors import FlagError, InputError, RunFilesError
from ddkit.files import json_bytes
from ddkit.nn.automatic_teacher import automatic_teacher
from ddkit.nn.device import pick_device
from ddkit.nn.teacher import Teacher, load_teacher, tested
from ddkit.recipes.resolve import Part, resolve
from ddkit.recipes.settings import flattened
from ddkit.recipes.tables import Recipe, parse_recipe, recipe_dict
from ddkit.run import warnings
from ddkit.run.artifact import Artifact, load
from ddkit.run.classes import matched
from ddkit.run.directory import RunDirectory
from ddkit.run.doubts import below_random_real, for_a_better_set
from ddkit.run.lock import LOCK_SECONDS
from ddkit.run.manifest import DERIVED, EVALUATION, MANIFEST, RECIPE, SET, evaluations_json, read_evaluations, read_manifest, write_manifest
from ddkit.run.report import renew_report
from ddkit.run.setup import evaluators_of

log = logging.getLogger("ddkit")
EVALUATING = Part(
    ("data", "teacher", "train", "evaluators", "protocols", "seed", "pipc"),
    ("data.batch", "data.whiten", "data.whiten_eps", "data.whiten_absolute"),
    "the set is evaluated as it is, whitened if it was made so.",
)


def evaluate(
    target: Artifact | str | Path,
    *,
    dataset: Any = None,
    data_dir: str | None = None,
    evaluators: str | Sequence[str] | None = None,
    protocol: str | None = None,
    model: str | None = None,
    repeats: int | None = None,
    teacher: str | None = None,
    seed: int | None = None,
    pipc: int | str | None = None,
    match_classes: Mapping[str, str] | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
    allow_code: bool = False,
    distributed: bool = False,
) -> list[Evaluation]:
    """Returns the evaluations of a synthetic set: an artifact, a file, or a run directory.

    Those of a run are added to its files, unless the real data, `seed` or `pipc` differ from those of the run. Without `dataset`, which is
    as for distill, the data of the run are used. The set may have only some classes of the data, in any order; `match_classes`, {"cat":
    "tabby"}, maps classes of the set to classes of the data with other names. `model` may have several names, separated by commas.
    `allow_code` allows Python code that the run's recipe or a teacher file names. With `distributed` the processes that torchrun started,
    all of which call this, share the networks to train. Raises DdkitError.

    Examples:
        >>> short = {"evaluators.accuracy.epochs": 1, "evaluators.accuracy.repeats": 1}
        >>> [row.model for row in ddkit.evaluate("my-run", model="mlp,lenet", sets=short)]
        ['mlp', 'lenet']
    """
    named = {"model": model, "dataset": dataset, "evaluators": evaluators}
    if evaluators == "none":
        raise FlagError("--evaluate none leaves nothing to do. Name an evaluator, or leave --evaluate out.")
    artifact = target if isinstance(target, Artifact) else load(target)
    directory = None if isinstance(target, Artifact) else _run_at(Path(target))
    judged_file = None if directory is None else read_manifest(directory.path)["files"].get(SET)
    if directory is not None:
        read_evaluations(directory.path)  # an error in its rows is reported before networks are trained, not after
    watchers = Observers([(f"observer {i}", o) for i, o in enumerate(observers)])
    with passing(dataset) as data, trust.granting(named, sets, everything=allow_code), group(wanted=distributed) as ranks:
        base, own = (None if directory is None else directory.read_recipe()), dict(sets or {})
        if base is None:
            if data["dataset"] is None and not any(path == "data" or path.startswith("data.") for path in own):
                raise InputError("The file of a set does not name the real data to test on. Add --dataset NAME[:PATH].")
            own = {key: artifact.metadata[key] for key in ("seed", "pipc") if key in artifact.metadata} | own
        elif evaluators is None and not base.get("evaluators"):
            evaluators = "accuracy"
        asked = {"protocol": protocol, "model": model, "repeats": repeats}
        recipe = resolve(
            base, evaluators=evaluators, evaluation=asked, sets=own, part=EVALUATING, data_dir=data_dir, teacher=teacher, seed=seed,
            pipc=pipc, **data,
        )  # fmt: skip
        ranks.check_same("The recipe of the evaluation", dict(flattened(recipe_dict(recipe))))
        kept = "" if directory is None else f" {directory.path} is unchanged."
        again = watchers.interruptible(lambda: f"No figure of this evaluation is kept.{kept} Run the same command again.")
        with again, warnings.recording():
            try:
                rows = judged(
                    recipe, artifact, own_device(device), watchers, match_classes=match_classes, with_teacher=teacher is not None,
                    ranks=ranks,
                )  # fmt: skip
            except InputError as error:
                path = recipe.data.options.get("path")
                if dataset is None and isinstance(path, str) and not Path(path).exists():
                    error.args = (f"{error} If it was moved: ddkit evaluate {shlex.quote(str(target))} --dataset {recipe.data.use}:PATH",)
                raise
            said = warnings.warnings()
    if not ranks.is_main:
        return rows
    if directory is not None:
        own_recipe = parse_recipe(directory.read_recipe())  # whichever split was tested on, and in whatever memory
        data_of = [msgspec.structs.replace(each.data, test="test", memory=1) for each in (recipe, own_recipe)]
        fewer = any("classes" in row.details for row in rows) and not set(DERIVED) & set(read_manifest(directory.path))
        same_data = data_of[0] == data_of[1] and not fewer
        if same_data and (recipe.pipc, recipe.seed) == (own_recipe.pipc, own_recipe.seed):
            _record_evaluation(directory, rows, judged_file, recipe, said)  # rows on other data than the run's are returned, not recorded
    return rows


def run_evaluators(
    evaluators: Mapping[str, Evaluator],
    artifact: Artifact,
    real: RealData,
    teacher: Teacher | None,
    seed: int,
    device: torch.device,
    watchers: Observers,
    ranks: Ranks = ALONE,
    *,
    helps: str,
) -> list[Evaluation]:
    """Returns the rows of every evaluator, in order of label, in every process; those that do not share their work run in the first.

    `helps` is a sentence on what to try if the set is worse than random real images.
    """

    def spread(tasks: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
        own = tasks[ranks.rank :: ranks.world_size]
        parts = ranks.all_gather_object(list(work(own)) if own else [])
        return [parts[number % ranks.world_size][number // ranks.world_size] for number in range(len(tasks))]

    images, labels = real.test_set
    data = EvaluationData(
        info=real.info, test_images=images, test_labels=labels, real_images=real.all_images(), real_labels=real.labels,
        seed=seed, device=device, split=real.split, spread=spread if ranks.world_size > 1 else None, report=lambda done, total: None,
    )  # fmt: skip
    rows: list[Evaluation] = []
    for label, evaluator in sorted(evaluators.items()):
        if not (ranks.is_main or evaluator.shares):
            continue
        by_class = artifact.stored_by_class
        with blamed("evaluator", evaluator, may_draw=True):
            work = evaluator.work(data)
            report = watchers.begin("evaluation", f"Evaluating: {label}{work and f' ({work})'}")
            seen = msgspec.structs.replace(data, spread=data.spread if evaluator.shares else None, report=report, report_part=report)
            for row in evaluator(artifact, seen, teacher):
                own = row.images == "synthetic"
                budget = {"stored_numbers": artifact.stored_numbers, "stored_as_images": artifact.stored_as_images} if own else {}
                uneven = {"stored_by_class": by_class} if own and len(set(by_class.values())) > 1 else {}
                rows.append(msgspec.structs.replace(row, split=real.split, details=row.details | uneven, **budget))
    rows = rows if ranks.world_size == 1 else msgspec.convert(ranks.broadcast(msgspec.to_builtins(rows)), list[Evaluation])
    for sentence in (sentence for row in rows for sentence in below_random_real(row, len(labels), helps)):
        log.warning("%s", sentence)
    return rows


def judged(
    recipe: Recipe,
    artifact: Artifact,
    device: str,
    watchers: Observers,
    *,
    match_classes: Mapping[str, str] | None = None,
    with_teacher: bool = False,
    ranks: Ranks = ALONE,
) -> list[Evaluation]:
    """Returns what the recipe's evaluators say of a set, on the recipe's data, of which it may have some classes.

    `match_classes` are names of the same class in the set and in the data; `with_teacher`: whether or not evaluators ask for one.
    """
    where = pick_device(device)
    channels, height, width = artifact.images.shape[1:]
    own, dataset = matched(artifact, open_dataset(recipe.data), match_classes or {})
    check_classes(dataset)
    real = RealData.of(recipe, dataset, (channels, height, width), watchers=watchers)
    _check_held_out(artifact, real)
    made = evaluators_of(recipe, real.info, artifact.parameters)
    real.check_test_set()
    required = any(evaluator.requires.teacher for evaluator in made.values())
    teacher: Teacher | None = None
    if recipe.teacher.use == "auto":
        if required:
            teacher = automatic_teacher(
                real.dataset, real.info.shape, recipe.teacher, recipe.train, where, watchers, data=recipe.data, ranks=ranks
            )
    elif required or with_teacher:
        teacher = load_teacher(recipe.teacher, real.info, where)
    if teacher is not None:
        tested(teacher, real, where, recipe.teacher)  # warns
    rows = run_evaluators(made, own, real, teacher, recipe.seed, where, watchers, ranks, helps=for_a_better_set(recipe))
    if isinstance(dataset, SomeClasses):
        rows = [msgspec.structs.replace(row, details={**row.details, "classes": own.class_names}) for row in rows]
    return rows


def _run_at(path: Path) -> RunDirectory | None:
    """Returns the run at `path`; None for a file, and for an imported set or one made of others, which know no data."""
    if not path.is_dir():
        return None
    if not (path / RECIPE).is_file() and (path / MANIFEST).is_file() and {*DERIVED, "imported"} & set(read_manifest(path)):
        return None
    return RunDirectory.existing(path)


def _check_held_out(artifact: Artifact, real: RealData) -> None:
    """Raises InputError where a held-out image may have been accessible when the set was made."""
    if real.held_out is None:
        return
    seeds = artifact.seeds
    if any(seed != real.seed for seed in seeds):
        made_with = " and ".join(str(seed) for seed in seeds)
        fix = f"Use --seed {made_with}, or --set data.test=test." if len(seeds) == 1 else "Use --set data.test=test."
        raise InputError(
            f"With data.test = held-out the seed decides which images are held out, and the set was made with seed {made_with}. {fix}",
            "data.test",
        )
    if seeds and artifact.class_names != list(real.info.class_names):
        raise InputError(
            "With data.test = held-out the seed and the order of the classes decide which images are held out, but the set does not have "
            "all classes of the data in the same order. Use --set data.test=test.",
            "data.test",
        )
    check_held_out(real.dataset, artifact.metadata.get("pipc", real.pipc), real.held_out)


def _record_evaluation(
    directory: RunDirectory, rows: list[Evaluation], judged_file: Mapping[str, Any] | None, recipe: Recipe, said: Sequence[str]
) -> None:
    """Adds rows to evaluation.json, a new row replacing an older one of the same _identity, and their protocols to the run's recipe.

    What was `said` is added to the manifest's warnings.

    A protocol of a name that the run has already stays as it is: a row says what was other with it.

    Where a run is being written there just now, its set is not that of `judged_file` any more, or the disk is full, a warning says that
    they were not added.
    """
    try:
        with directory.take(wait=LOCK_SECONDS):
            if not (directory.path / MANIFEST).is_file() or read_manifest(directory.path)["files"].get(SET) != judged_file:
                log.warning("The figures were not added to the files of the run, because its set has changed in the meantime.")
                return
            keys = [_identity(row) for row in msgspec.to_builtins(rows)]
            older = [row for row in read_evaluations(directory.path) if _identity(row) not in keys]
            table = directory.read_recipe()
            known = table.get("protocols", {})
            if added := {name: each for name, each in recipe_dict(recipe).get("protocols", {}).items() if name not in known}:
                directory.rewrite(RECIPE, tomli_w.dumps(table | {"protocols": known | added}).encode())
            directory.rewrite(EVALUATION, json_bytes(evaluations_json([*older, *rows])))
            manifest = read_manifest(directory.path)
            if new := [sentence for sentence in said if sentence not in manifest.get("warnings", [])]:
                write_manifest(directory.path, manifest | {"warnings": [*manifest.get("warnings", []), *new]})
            renew_report(directory)
    except RunFilesError as error:  # the networks are trained: their figures are not lost
        log.warning("The figures were not added to the files of the run. %s", error)


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what two rows have in common of which the newer replaces the older."""
    named = (row.get(key) for key in ("evaluator", "model", "protocol", "labels", "repeats"))
    settings = (row["details"].get(key) for key in ("epochs", "temperature", "variant"))
    return (*named, row["images"], row["split"], *settings)
