"""A run from its recipe to its finished files: its objects, its loop, what it writes."""

from __future__ import annotations

import functools
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from ddkit.components.base import Evaluation
from ddkit.components.observers import Observers
from ddkit.components.registry import watchers_of
from ddkit.data.loading import left_alone
from ddkit.data.passed import passed_dataset
from ddkit.distributed import Ranks
from ddkit.engine.guards import deterministic
from ddkit.engine.labels import SOFT_LABELS, targets_of
from ddkit.engine.loop import Hooks, distill
from ddkit.errors import Interrupted, RunFilesError
from ddkit.files import write_json
from ddkit.nn.device import products
from ddkit.recipes.settings import flattened
from ddkit.recipes.tables import Recipe, recipe_dict
from ddkit.run import warnings
from ddkit.run.artifact import Artifact, load, made_with
from ddkit.run.checkpoints import is_due
from ddkit.run.directory import Run, RunDirectory, save_set
from ddkit.run.doubts import constant_losses, for_a_better_set, outside, silent, without
from ddkit.run.estimate import estimated
from ddkit.run.evaluation import run_evaluators
from ddkit.run.manifest import EVALUATION, LOCK, RECIPE, SET, evaluations_json
from ddkit.run.metrics import append_metrics, cut_metrics, is_logged, read_metrics
from ddkit.run.report import close_run, known_spectrum
from ddkit.run.setup import RunSetup
from ddkit.run.snapshots import add_frame, is_frame

log = logging.getLogger("ddkit")


class Place(NamedTuple):
    """Where a run is made: on which device, by which processes, seen by whom."""

    device: str
    ranks: Ranks
    observers: Sequence[Any]

    def directory(self, claim: Callable[[], RunDirectory]) -> RunDirectory:
        """Returns what `claim` does in the main process, and in the others the same folder, to read."""
        found = claim() if self.ranks.is_main else None
        path = self.ranks.broadcast(None if found is None else str(found.path.absolute()))
        try:
            if found is None and not Path(path, LOCK).exists():
                raise RunFilesError(
                    f"The main process has made {path}, but this process cannot see it. With --out, name a folder that all machines share."
                )
            self.ranks.barrier()  # all have seen it, before the main one may remove it
        except BaseException:
            if found is not None:
                found.discard()
                found.release()
            raise
        return found or RunDirectory(Path(path))

    @contextmanager
    def watching(self, directory: RunDirectory) -> Iterator[Observers]:
        """Inside, warnings are kept for the manifest, and an interruption says how to go on; yields the observers, of the first process."""
        watchers = watchers_of(self.observers) if self.ranks.is_main else Observers([])
        with warnings.recording(), watchers.interruptible(lambda: _going_on(directory.path)):
            yield watchers


def _going_on(path: Path) -> str:
    """Returns what an interrupted run says: what is kept, and the command that continues it."""
    if not (path / RECIPE).is_file():
        return "The run had not begun, so no file is kept. Run the same command again."
    if passed_dataset() is not None:
        return f"The finished steps are kept. To continue: ddkit.resume({str(path)!r}, dataset=...), with the same dataset."
    return f"The finished steps are kept. To continue: ddkit distill --out {shlex.quote(str(path))} --resume"


def planned(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Returns what a run of `recipe` would do, as data, after all checks before its first step; trains no teacher and writes nothing."""
    place.ranks.check_same("The recipe", dict(flattened(recipe_dict(recipe))))
    with deterministic(recipe.engine.deterministic), left_alone():
        setup = RunSetup(recipe, device=place.device, ranks=place.ranks, watchers=Observers([]))
        setup.prepare(train_it=False)
        return {
            "recipe": recipe_dict(setup.resolved_recipe),
            "device": str(setup.device),
            "processes": place.ranks.world_size,
            "classes": list(setup.info.class_names),
            "image_shape": list(setup.info.shape),
            "accessible_images": len(setup.real.indices),
            "synthetic_images": sum(setup.ipc),  # those that are stored
            "parametrization": {
                "use": setup.parametrization.name,
                "images_per_class": _by_class(setup, setup.images_per_class),
                "encoding_error": setup.initial.encoding_error,
                "stored_numbers": setup.bank.stored_numbers / setup.info.classes,
                "stored_as_images": setup.bank.stored_numbers / setup.info.classes / math.prod(setup.info.shape),
            },
            "whitening": None if setup.normalisation.whitening is None else setup.normalisation.whitening.facts,
            "teacher": recipe.teacher.use if setup.needs_teacher else None,
            "teacher_is_trained_first": setup.teacher is not None and not setup.teacher.path,
            "teacher_accuracy": None if setup.tested is None else msgspec.structs.asdict(setup.tested),
            "experts": recipe.experts.use if setup.needs_experts else None,
            "experts_are_trained_first": setup.experts is not None and not setup.experts.path,
            "training": recipe.network.sentence if setup.decided.needs_network else "",
            "estimate": estimated(setup),
            "plugins": setup.plugins_used,
        }


def _by_class(setup: RunSetup, counts: Sequence[int]) -> int | dict[str, int]:
    """Returns the count of every class, or counts by class name where they differ."""
    return counts[0] if len(set(counts)) == 1 else dict(zip(setup.info.class_names, counts, strict=True))


def run(recipe: Recipe, directory: RunDirectory, place: Place) -> Run:
    """Makes a set of `recipe` in `directory`, evaluates it and returns the run; nothing stays of a run that took no step."""
    with place.watching(directory) as watchers, deterministic(recipe.engine.deterministic):
        try:
            setup = RunSetup(recipe, device=place.device, ranks=place.ranks, watchers=watchers)
            setup.prepare()
            begin(setup, directory)
        except BaseException:
            if place.ranks.is_main:
                directory.discard()
            raise
        try:
            return finish(setup, directory, start=0)
        except (Interrupted, KeyboardInterrupt):  # it can be continued
            raise
        except BaseException:
            if place.ranks.is_main and not directory.has_stepped():
                directory.discard()
            raise


def begin(setup: RunSetup, directory: RunDirectory) -> None:
    """Writes what a run that is cut off continues from."""
    if setup.ranks.is_main:
        directory.replace()
        directory.write_recipe(recipe_dict(setup.resolved_recipe))
        cut_metrics(directory.path, 0, setup.resolved_recipe.steps, setup.resolved_recipe.engine.log_every)
    images = _pixels(setup)
    if images is not None:
        add_frame(directory.path, 0, images, setup.shown_labels)
    _keep(0, setup, directory, 0.0)


def _keep(index: int, setup: RunSetup, directory: RunDirectory, seconds: float) -> None:
    """Writes the checkpoint of step `index`, which was reached after `seconds`: the main process that of the whole set."""
    state = setup.engine.state(index)
    whole, inputs = {}, setup.inputs
    for key, value in sorted(state.items()):
        rows = _whole(setup, value) if setup.bank.is_rowwise(key) else value
        if setup.ranks.is_main:
            whole[key] = rows
    if setup.ranks.is_main:
        directory.write_checkpoint(index, whole, setup.plugin_files, inputs, seconds)


def _whole(setup: RunSetup, rows: Tensor) -> Tensor:
    """Returns the rows (n, ...) of all processes, on the CPU where there are several."""
    return rows if setup.ranks.world_size == 1 else setup.ranks.all_gather(rows.cpu(), "gathering")


def finish(setup: RunSetup, directory: RunDirectory, *, start: int, spent: float = 0.0) -> Run:
    """Takes the steps from `start` on, evaluates, and writes all files of the run; returns it. `spent`: seconds of the steps before."""
    recipe, watchers = setup.resolved_recipe, setup.watchers
    watchers.call("run_started", recipe=recipe, path=directory.path, start=start)
    began = time.perf_counter() - spent
    with products(setup.device, setup.decided.products):
        try:
            _iterate(setup, directory, start, began)
        except RunFilesError as error:  # as where the disk is full
            if directory.has_stepped():
                error.args = (f"{error} {_going_on(directory.path)}",)
            raise
    seconds = time.perf_counter() - began
    _write_set(setup, directory)
    setup.ranks.barrier()  # its file is there
    made_set = load(directory.path / SET)
    if setup.ranks.is_main:
        for sentence in _doubts(setup, made_set, read_metrics(directory.path)):
            log.warning("%s", sentence)
    evaluations: list[Evaluation] = []
    if setup.evaluators:
        evaluations = run_evaluators(
            setup.evaluators, made_set, setup.real, setup.teacher, recipe.seed, setup.device, watchers, setup.ranks,
            helps=for_a_better_set(recipe),
        )  # fmt: skip
        if setup.ranks.is_main:
            write_json(directory.path / EVALUATION, evaluations_json(evaluations))
    facts = _facts(setup) | {"steps": recipe.steps, "seconds": round(seconds, 3)}
    if setup.ranks.is_main:
        watchers.begin("writing", f"Writing the report of {directory.path}")
        close_run(directory, facts)
    setup.ranks.barrier()  # the run is finished for all of them, or for none
    run = Run(path=directory.path, steps=recipe.steps, seconds=seconds, evaluations=evaluations)
    watchers.call("run_finished", path=run.path, evaluations=run.evaluations)
    return run


def _doubts(setup: RunSetup, artifact: Artifact, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what cannot be right of the finished steps: losses that did nothing, images that are none."""
    recipe = setup.resolved_recipe
    weights = {label: loss.weight for label, loss in recipe.losses.items()}
    told, constant = silent(lines, weights), constant_losses(lines, weights)
    logged = f"at all {len(lines)} logged steps" if len(lines) > 1 else "at the only step"
    if constant and all(constant.get(label) == 0 for label, weight in weights.items() if weight > 0):
        helps = "Use another loss or --init noise."
        pairs = list(zip(setup.real.counts().values(), setup.images_per_class, strict=True))
        if any(0 < real <= each and setup.initializer.needed(each) for real, each in pairs):  # it is compared with these very images
            counts = f"(ipc {min(setup.ipc)}, {min(real for real, _ in pairs)} accessible)"
            helps = f"It began with all accessible images {counts}. Raise --pipc, lower --ipc, use another loss, or --init noise."
        told = [f"Every loss was 0 {logged}, so the set did not change and has the images of the initializer. {helps}"]
    else:
        others = [label for label in constant if not any(label in sentence.split() for sentence in told)]
        told += [
            f"The loss {label} was {constant[label]:.6g} {logged}, so it changed nothing. {without(label, weights)}" for label in others
        ]
    return told + (outside(artifact.stored_images, setup.bank.smaller_rate("images")) if recipe.steps else [])


def _iterate(setup: RunSetup, directory: RunDirectory, start: int, began: float) -> None:
    recipe, watchers = setup.resolved_recipe, setup.watchers
    every = recipe.engine
    if start < recipe.steps:
        losses = ", ".join(sorted(recipe.losses))
        on = f" from step {start}" if start else ""
        compiles = ", and the first step compiles the network, which takes a while" if every.compile else ""
        text = f"Distilling {sum(setup.ipc):,} images into {directory.path} ({recipe.steps:,} steps{on}, {losses}{compiles})"
        watchers.begin("distilling", text, done=start, total=recipe.steps)

    def show(index: int) -> None:
        images = _pixels(setup) if setup.ranks.broadcast(watchers.has("checkpoint_written")) else None
        if images is not None:
            watchers.call(
                "checkpoint_written", index=index, images=images, labels=setup.shown_labels, class_names=list(setup.info.class_names)
            )

    def keep(index: int) -> None:
        _keep(index, setup, directory, time.perf_counter() - began)
        show(index)

    def observe(index: int, record: Callable[[], dict[str, Any]]) -> None:
        line = None
        if is_logged(index, recipe.steps, every.log_every):
            line = record() | {"seconds": round(time.perf_counter() - began, 3)}
            if setup.ranks.is_main:
                append_metrics(directory.path, line)
        watchers.call("step_finished", index=index, steps=recipe.steps, record=line)
        images = _pixels(setup) if is_frame(index + 1) else None
        if images is not None:
            add_frame(directory.path, index + 1, images, setup.shown_labels)
        if is_due(index + 1, every.checkpoint_every):
            keep(index + 1)

    def is_read(index: int) -> bool:
        return is_logged(index, recipe.steps, every.log_every) or is_due(index + 1, every.checkpoint_every) or is_frame(index + 1)

    show(start)
    logs = functools.partial(is_logged, steps=recipe.steps, log_every=every.log_every)
    distill(setup.engine, start, recipe.steps, Hooks(observe=observe, save=keep, is_read=is_read, is_logged=logs))
    if recipe.steps > start and not is_due(recipe.steps, every.checkpoint_every):
        keep(recipe.steps)


def _pixels(setup: RunSetup) -> Tensor | None:
    """Returns the stored images (n, C, H, W) of the whole set in pixel units, on the CPU; None in every process but the main one.

    Of a set that stores no images those that are made.
    """
    bank = setup.bank
    images = bank.images if setup.stores_pixels else bank.decoded(bank.rows(None))
    images = _whole(setup, setup.normalisation.to_pixels(images.detach())).cpu()
    return images if setup.ranks.is_main else None


def _write_set(setup: RunSetup, directory: RunDirectory) -> None:
    recipe, bank = setup.resolved_recipe, setup.bank
    makes = setup.parametrization
    stored = _pixels(setup) if setup.stores_pixels else _whole(setup, bank.images.detach()).cpu()
    extra = {
        name: (_whole(setup, tensor.detach()) if bank.is_rowwise(f"bank.{name}") else tensor.detach()).cpu()
        for name, tensor in bank.parameters.items()
    }
    if recipe.own_labels.kind == "teacher":
        extra[SOFT_LABELS] = _whole(setup, targets_of(setup.engine.source, bank, recipe.steps, bank.rows(None))).cpu()
    if not setup.ranks.is_main or stored is None:
        return
    whitening = setup.normalisation.whitening
    extra |= {} if whitening is None else whitening.tensors
    metadata = {
        "class_names": list(setup.info.class_names),
        "mean": list(setup.normalisation.mean),
        "std": list(setup.normalisation.std),
        **({"ipc": setup.ipc[0]} if len(set(setup.ipc)) == 1 else {}),  # else the labels tell it
        "pipc": recipe.pipc,
        "seed": recipe.seed,
        "recipe": recipe.name,
        **made_with(makes, recipe.parametrization.use, setup.info.shape, whitened=whitening is not None),
        **({} if whitening is None else {"whitening": whitening.facts}),
        **({"labels": recipe.own_labels.kind} if SOFT_LABELS in extra else {}),
    }
    save_set(Artifact(stored, setup.stored_labels, metadata, extra), directory)


def _facts(setup: RunSetup) -> dict[str, Any]:
    teacher: dict[str, Any] | None = None
    if setup.teacher is not None:
        teacher = {"path": setup.teacher.path, "sha256": setup.teacher.sha256, "test_accuracy": setup.teacher.info.get("test_accuracy")}
        order = setup.teacher.order
        teacher |= {} if order is None else {"outputs": setup.recipe.teacher.classes or setup.teacher.info["class_names"]}
        tested = setup.tested
        teacher |= {} if tested is None else {"accessible_accuracy": tested.accuracy, "accessible_images": tested.images}
    experts = setup.experts
    processes = {"count": setup.ranks.world_size, "exchanged_bytes": dict(setup.ranks.exchanged)}
    return {
        "seed": setup.recipe.seed,
        "device": str(setup.device),
        "threads": torch.get_num_threads(),
        "plugins": setup.plugins_used,
        **({"plugin_files": setup.plugin_files} if setup.plugin_files else {}),
        "teacher": teacher,
        **({"experts": {"path": experts.path, "sha256": experts.digest, "count": experts.count}} if experts else {}),
        **({} if setup.normalisation.whitening is None else {"whitening": setup.normalisation.whitening.facts}),
        **known_spectrum(setup.real.sample()),
        "real_files": setup.real.sources,
        **({"processes": processes} if setup.ranks.world_size > 1 else {}),
    }
