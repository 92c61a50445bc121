"""The training of experts into a folder, and the experts of a run: those of the recipe's folder, or of the cache, trained on first use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ddkit.cache import make_folder, private_folder
from ddkit.components import registry
from ddkit.components.base import DataInfo, Model
from ddkit.components.observers import Observers, Report
from ddkit.data.images import Normalisation, NormalisedRows
from ddkit.data.loading import load_images
from ddkit.data.real import RealData
from ddkit.data.whitening import normalisation_of
from ddkit.distributed import ALONE, Ranks
from ddkit.errors import NEWS, InputError, RunFailed
from ddkit.files import path_part
from ddkit.nn.compiling import compiled, decide_arithmetic
from ddkit.nn.device import products
from ddkit.nn.expert_files import MANIFEST, Settings, file_of, open_experts, recorded_accuracy, settings_of, write_expert, write_manifest
from ddkit.nn.experts import COUNT, Experts, saved_epochs
from ddkit.nn.networks import build_network, network_tensors, redraw, training_flops
from ddkit.nn.teacher import all_finite
from ddkit.nn.training import BatchAccuracy, fit
from ddkit.recipes.protocols import Schedule
from ddkit.recipes.tables import DataTable, Recipe, TrainTable
from ddkit.seeding import drawn_from, generator
from ddkit.text import counted

log = logging.getLogger("ddkit")


def experts_of(
    recipe: Recipe,
    real: RealData,
    model: Model,
    device: torch.device,
    watchers: Observers,
    *,
    units: Normalisation | None = None,
    ranks: Ranks = ALONE,
    train_it: bool = True,
) -> Experts | None:
    """Returns the experts of the recipe's folder, or automatic ones: from the cache, where they are trained on first use.

    Returns None if they are not in the cache and not to be trained (`train_it`). `units`: as in settings_of. Of several processes the
    first trains them, and the others read them. Raises InputError where a folder does not fit the run.
    """
    wanted, table = settings_of(recipe, real, model, units=units), recipe.experts
    if table.use != "auto":
        return open_experts(Path(table.use), table, wanted, model)
    table = msgspec.structs.replace(table, count=table.count or COUNT)
    if not ranks.is_main:
        told = ranks.broadcast(None)
        return None if told is None else open_experts(Path(told), table, wanted, model)
    folder = private_folder("experts") / f"{path_part(wanted.model)}-{wanted.digest[:24]}"
    found = None
    try:
        found = open_experts(folder, table, wanted, model)
    except InputError as error:
        log.info("No experts in the cache can be used. %s", error)
    if found is None and train_it:
        log.warning("The run needs experts. %d are trained, and kept for later runs.", table.count, extra=NEWS)
        train_experts(make_folder(folder), wanted, table.count or COUNT, real, model, device, watchers, units or recipe.data)
        found = open_experts(folder, table, wanted, model)
    ranks.broadcast(None if found is None else str(folder))  # the others wait for this
    return found


def train_experts(
    folder: Path, settings: Settings, count: int, real: RealData, model: Model, device: torch.device, watchers: Observers,
    units: Normalisation | DataTable,
) -> None:  # fmt: skip
    """Trains `count` experts into a folder; those that are there already, whole and with the same settings, stay as they are.

    `units` is the normalisation of a teacher, or the table that says whether the images are whitened.

    On a CPU that need not compile, as many are trained side by side as there are threads, each by one: their bytes do not depend on it.
    Raises RunFailed where a training diverges.
    """
    info, seed = real.info, settings.seed
    there = [recorded_accuracy(folder / file_of(number), settings) for number in range(count)]
    left = [number for number, accuracy in enumerate(there) if accuracy is None]
    if settings.data.use == "all":
        labels = real.dataset.labels("train")
        reading = watchers.begin("reading", f"Reading all {len(labels):,} images of the training split, for experts", total=len(labels))
        pixels = load_images(real.dataset, "train", range(len(labels)), info.shape, reading)
    else:
        pixels, labels = real.all_images(), real.labels
    norm = normalisation_of(pixels, units) if isinstance(units, DataTable) else units
    images, labels = norm.lazily(pixels).to(device), labels.to(device)
    if left and not (folder / MANIFEST).exists():
        write_manifest(folder, settings, norm, [])  # so that it can go on after a kill
    module = build_network(model, info, seed, "expert", 0).to(device).eval()
    work = training_flops(module, info, images=len(images), epochs=settings.epochs) * len(left)
    made = decide_arithmetic("auto", "auto", device, work=work)
    threads = torch.get_num_threads()
    workers = 1 if made.compile or device.type != "cpu" or _draws(module, images) else min(threads, max(1, len(left)))
    forward = compiled(module, wanted=made.compile)
    building = threading.Lock()

    def train_one(number: int, tell: Callable[[int, float], None]) -> None:
        """Trains one expert and writes its file; all that is drawn is a function of seed and number."""
        own = module
        with building:  # torch draws fresh weights from its one global generator
            if workers > 1:
                own = build_network(model, info, seed, "expert", number)
            else:
                redraw(module, model, info, seed, "expert", number)
        with nullcontext() if workers > 1 else drawn_from(seed, "expert's own draws", number):
            weights, accuracy = _fit(own, images, labels, settings, info, number, tell, {
                "forward": forward if workers == 1 else None, "precision": made.dtype, "channels_last": made.compile,
            })  # fmt: skip
        write_expert(folder, settings, number, weights, accuracy)
        there[number] = accuracy

    epochs = counted(settings.epochs, "epoch")
    text = f"Training {count} experts ({settings.model}, {epochs} on {len(labels):,} images)"
    report = watchers.begin("experts", text, done=count - len(left), total=count)
    alone = made.compile or device.type != "cpu"
    try:
        torch.set_num_threads(threads if alone else 1)
        with products(device, made.precision):
            _side_by_side(left, train_one, workers, partial(_told, report, count - len(left), count))
    finally:
        torch.set_num_threads(threads)
    write_manifest(folder, settings, norm, there)


def _told(report: Report, before: int, count: int, reached: float) -> None:
    """Reports that `reached` of the experts that are trained now are done, parts counted, beside those `before`."""
    report(before + int(reached), count, part=reached - int(reached))


def _side_by_side(
    numbers: Sequence[int], train_one: Callable[[int, Callable[[int, float], None]], None], workers: int, tell: Callable[[float], None]
) -> None:
    """Calls `train_one` for each number, in `workers` threads; an error or an interruption ends all of them within a batch."""
    parts: dict[int, float] = {}
    stop = threading.Event()

    def reached(number: int, part: float) -> None:
        if stop.is_set():
            raise RunFailed("The training of another expert failed.")
        parts[number] = part
        if workers == 1:
            tell(sum(parts.values()))

    if workers == 1:
        for number in numbers:
            train_one(number, reached)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(train_one, number, reached) for number in numbers}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                for each in done:
                    each.result()
                tell(sum(parts.values()))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _draws(module: nn.Module, images: Tensor | NormalisedRows) -> bool:
    """Whether a forward pass in training mode draws from torch's global generator, as dropout does: then threads would share it."""
    with drawn_from(0, "probe"), torch.no_grad():
        before = torch.get_rng_state()
        module.train()(images[:2])
        return not torch.equal(before, torch.get_rng_state())


def _fit(
    module: nn.Module, images: Tensor | NormalisedRows, labels: Tensor, settings: Settings, info: DataInfo, number: int,
    tell: Callable[[int, float], None], how: Mapping[str, Any],
) -> tuple[dict[str, Tensor], list[float | None]]:  # fmt: skip
    """Returns the weights (saved epochs, ...) of `module` by name, and the accuracy on the batches of each of these epochs (None: at 0).

    The module is trained in place.
    """
    epochs, dtype = saved_epochs(settings.epochs, settings.save_every), getattr(torch, settings.precision)
    kept = {
        name: torch.empty((len(epochs), *value.shape), dtype=dtype if value.is_floating_point() else value.dtype)
        for name, value in network_tensors(module).items()
    }
    accuracy: list[float | None] = []
    own = BatchAccuracy(images.device)
    batches = settings.epochs * -(-len(labels) // settings.train["batch"])
    done = 0

    def save(epoch: int, _: int = 0) -> None:
        right = own.taken()
        if epoch in epochs:
            for name, value in network_tensors(module).items():
                kept[name][epochs.index(epoch)] = value.to(kept[name].dtype)
            accuracy.append(right)

    def count(logits: Tensor, labels: Tensor) -> None:
        nonlocal done
        own(logits, labels)
        done += 1
        tell(number, done / batches)

    save(0)
    schedule = Schedule.of({"epochs": settings.epochs, **settings.train})
    augmenter = registry.create("augmenter", settings.train["augmenter"], settings.train["options"], data=info, where="train")
    fit(
        module, images, labels, schedule, augmenter=augmenter,
        generator=generator(settings.seed, "expert training", number), report=save, on_batch=count, **how,
    )  # fmt: skip
    if not all_finite(kept):
        raise RunFailed(
            f"The training of expert {number} diverged: its weights are not finite. They are not saved. Use a smaller learning rate "
            f"(--set train.lr={min(schedule.lr / 10, TrainTable().lr):g}), or another schedule or optimizer."
        )
    return kept, accuracy
