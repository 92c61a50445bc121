"""The automatic teacher: trained once on all of the training set, and kept in the cache. `ddkit train` trains one in the same way."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from ddkit.cache import cache_folder, make_folder, vouch, vouched
from ddkit.components import registry
from ddkit.components.base import DataInfo, Dataset
from ddkit.components.observers import Observers, Report
from ddkit.components.options import written_options
from ddkit.data.images import Normalisation, NormalisedRows
from ddkit.data.loading import fingerprint, load_images
from ddkit.data.real import data_info
from ddkit.data.whitening import normalisation_of, whitening_key
from ddkit.distributed import ALONE, Ranks
from ddkit.errors import NEWS, InputError, RunFailed, RunFilesError
from ddkit.files import SCHEMA, path_part, read_tensors, sha256, tensors_bytes
from ddkit.nn.compiling import compiled, decide_arithmetic
from ddkit.nn.device import products
from ddkit.nn.networks import build_network, training_flops
from ddkit.nn.teacher import Teacher, all_finite, load_teacher, save_teacher
from ddkit.nn.training import BatchAccuracy, accuracy, fit
from ddkit.recipes.protocols import Schedule
from ddkit.recipes.tables import DataTable, TeacherTable, TrainTable
from ddkit.seeding import generator
from ddkit.text import counted

log = logging.getLogger("ddkit")


def train_teacher(
    dataset: Dataset,
    shape: tuple[int, int, int] | None,
    table: TeacherTable,
    train: TrainTable,
    *,
    data: DataTable,
    seed: int,
    device: torch.device,
    watchers: Observers | None = None,
) -> Teacher:
    """Returns a teacher trained on all of the training split, whitened if `data` says so; its test accuracy, if it can be, is recorded.

    Raises RunFailed where the training diverges.
    """
    labels, watchers = dataset.labels("train"), watchers or Observers()
    count = f"{len(labels):,} images"
    reading = watchers.begin("reading", f"Reading all {count} of the training split, for the teacher", total=len(labels))
    images = load_images(dataset, "train", range(len(labels)), shape, reading)
    norm = normalisation_of(images, data)
    info = data_info(dataset, images.shape[1:])
    model = registry.create("model", table.model, table.options, data=info, where="teacher")
    module = build_network(model, info, seed, "teacher").to(device)
    name = registry.split_name(table.model)[0]
    report = watchers.begin("teacher", f"Training a teacher ({name}, {counted(train.epochs, 'epoch')} on {count})", total=train.epochs)
    _fit(module, norm.lazily(images).to(device), labels.to(device), train, info, seed, report)
    if not all_finite(module.state_dict()):
        raise RunFailed(
            f"The training of the teacher diverged: its weights are not finite after {train.epochs} epochs. They are not saved. "
            f"Use a smaller learning rate (--set train.lr={min(train.lr / 10, TrainTable().lr):g}), or another schedule or optimizer."
        )
    options = written_options(model.options)
    record = {
        "model": name,
        "options": {key: value for key, value in options.items() if not key.startswith("weights")},  # those of the file are newer
        "mean": list(norm.mean),
        "std": list(norm.std),
        "class_names": list(info.class_names),
        "input_shape": list(info.shape),
        "test_accuracy": _test_accuracy(module, dataset, info, norm, device),
        "training": {**train.recorded, "seed": seed},
    }
    return Teacher(module, mean=norm.mean, std=norm.std, whitening=norm.whitening, info=record)


def _fit(
    module: nn.Module, images: Tensor | NormalisedRows, labels: Tensor, train: TrainTable, info: DataInfo, seed: int, report: Report
) -> None:
    """Trains `module` as `train` says, compiled if that pays back, and reports the accuracy of each epoch on its own batches."""
    own = BatchAccuracy(images.device)
    made = decide_arithmetic("auto", "auto", images.device, work=training_flops(module, info, images=len(images), epochs=train.epochs))
    with products(images.device, made.precision):
        fit(
            module,
            images,
            labels,
            Schedule.of(msgspec.structs.asdict(train)),
            augmenter=registry.create("augmenter", train.augmenter, train.options, data=info, where="train"),
            generator=generator(seed, "teacher training"),
            forward=compiled(module, wanted=made.compile),
            precision=made.dtype,
            channels_last=made.compile,
            report=lambda epoch, epochs: report(epoch, epochs, **{"training accuracy": own.taken()}),
            on_batch=own,
        )


def _test_accuracy(module: nn.Module, dataset: Dataset, info: DataInfo, norm: Normalisation, device: torch.device) -> float | None:
    labels = dataset.labels("test")
    if len(labels) == 0:
        return None
    images = norm.lazily(load_images(dataset, "test", range(len(labels)), info.shape)).to(device)
    return accuracy(module, images, labels.to(device))


def resolved_training(table: TeacherTable, train: TrainTable, info: DataInfo) -> tuple[TeacherTable, TrainTable]:
    """Returns both tables with every option of the model and of the training augmenter written out."""
    model = registry.options_of("model", table.model, table.options, "teacher", info)
    augmenter = registry.options_of("augmenter", train.augmenter, train.options, "train", info)
    return (
        msgspec.structs.replace(table, model=registry.split_name(table.model)[0], options=written_options(model)),
        msgspec.structs.replace(train, options=written_options(augmenter)),
    )


def automatic_teacher(
    dataset: Dataset,
    shape: tuple[int, int, int],
    table: TeacherTable,
    train: TrainTable,
    device: torch.device,
    watchers: Observers | None = None,
    *,
    data: DataTable,
    ranks: Ranks = ALONE,
    train_it: bool = True,
) -> Teacher | None:
    """Returns the cached teacher for this dataset content, model and training; trains it on first use and says so.

    If it is not in the cache, and not to be trained (`train_it`), returns None.

    Of several processes the first trains it, and the others raise RunFilesError where they do not find it in the cache afterwards.
    """
    if table.classes is not None:
        raise InputError(
            "teacher.classes is only for a teacher file. An automatic teacher has the classes of the data. Leave it out, or add "
            "--teacher FILE.",
            "teacher.classes",
        )
    info, folder = data_info(dataset, shape), cache_folder() / "teachers"
    if not ranks.is_main:
        told = ranks.broadcast(None)
        if told is None:
            return None
        file, known = told
        if not _is_whole(folder / file, known):
            raise RunFilesError(
                f"The teacher that the first process has trained is not in the cache of this process ({folder}). Let all machines use "
                "the same cache, named by the environment variable DDKIT_CACHE, or use --teacher FILE."
            )
        return load_teacher(TeacherTable(use=str(folder / file), model=table.model), info, device)
    table, train = resolved_training(table, train, info)
    key = {
        "dataset": fingerprint(dataset),
        "classes": list(dataset.class_names),
        "shape": shape,
        "model": table.model,
        "options": table.options,
        "train": train.recorded,
        **whitening_key(data),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{path_part(table.model)}-{digest}.safetensors"
    if not _is_whole(path, vouched(path)):
        if not train_it:
            ranks.broadcast(None)
            return None
        log.warning("No teacher was given. One is trained on all training images, and kept for later runs.", extra=NEWS)
        try:  # before an hour of training whose result could not be kept
            make_folder(folder)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise RunFilesError(
                f"The cache folder {folder} cannot be written ({error.strerror or error}), so a teacher cannot be saved there. "
                "Name another folder with the environment variable DDKIT_CACHE, or use --teacher FILE."
            ) from None
        made = train_teacher(dataset, shape, table, train, data=data, seed=0, device=device, watchers=watchers)
        if not _kept(path, made):
            if ranks.world_size > 1:
                raise RunFilesError(f"The other processes of the run cannot read the teacher from the cache {folder}. Use --teacher FILE.")
            module = made.module.to(memory_format=torch.contiguous_format)  # and the rest is as if it were read from its file
            digest = hashlib.sha256(tensors_bytes(made.tensors, made.info)).hexdigest()
            record = json.loads(json.dumps({"schema": SCHEMA, **made.info}))
            return Teacher(module, mean=made.mean, std=made.std, whitening=made.whitening, info=record, sha256=digest)
    ranks.broadcast([path.name, sha256(path)])  # the others wait for this
    return load_teacher(TeacherTable(use=str(path), model=table.model), info, device)


def _is_whole(path: Path, known: str | None) -> bool:
    """Returns whether a teacher is kept at `path`, and is the one with the sha256 `known`; warns of another, which is as good as none."""
    if not path.is_file():
        return False
    try:
        read_tensors(path)
        if sha256(path) == known:
            return True
        log.warning("The teacher in the cache is not used: %s is not the file that ddkit has saved there.", path)
    except (ValueError, OSError) as error:
        log.warning("The teacher in the cache is not used: %s.", error)
    return False


def _kept(path: Path, made: Teacher) -> bool:
    """Puts a teacher into the cache; returns whether that could be done, and says what is in the way."""
    try:
        save_teacher(path, made)
        vouch(path, sha256(path))
    except (OSError, RunFilesError) as error:
        log.warning(
            "The teacher could not be saved for later runs: %s The run continues with it. To have a file for --teacher, run `ddkit train "
            "--out FILE`. To use another cache, set the environment variable DDKIT_CACHE.", error, extra=NEWS,
        )  # fmt: skip
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return False
    return True
