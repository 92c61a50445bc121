"""Where a teacher comes from: a file, or trained once on all of the training set and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from ddkit.components import registry
from ddkit.components.base import DataInfo, Dataset
from ddkit.components.observers import Observers, Report
from ddkit.components.options import written_options
from ddkit.data.images import Normalisation, NormalisedRows, channel_statistics, rows_of, spread
from ddkit.data.loading import fingerprint, load_images
from ddkit.data.real import RealData, data_info
from ddkit.distributed import ALONE, Ranks
from ddkit.errors import InputError, RunFailed, RunFilesError
from ddkit.files import (
    SCHEMA,
    cache_folder,
    make_folder,
    not_permitted,
    open_regular,
    path_part,
    read_tensors,
    sha256,
    tensors_bytes,
    vouch,
    vouched,
    write_tensors,
)
from ddkit.nn.compute import compiled, decide_arithmetic, products
from ddkit.nn.networks import build_network, training_flops
from ddkit.nn.teacher import Teacher
from ddkit.nn.training import Schedule, accuracy, fit, predicted
from ddkit.recipes.tables import TeacherTable, TrainTable
from ddkit.seeding import generator

log = logging.getLogger("ddkit")
JUDGED_IMAGES = 1000  # accessible ones that a teacher is tested on, at most: evenly over the classes


def load_teacher(table: TeacherTable, info: DataInfo, device: torch.device) -> Teacher:
    """Returns the teacher of a file; raises InputError with the difference where it does not fit the data."""
    path = Path(table.use)
    tensors, record = read_teacher(path)
    _check_record(path, record, info)
    mean, std = _statistics(table, record, info.channels, path)
    model = record.get("model", table.model)
    options = record.get("options", table.options)
    factory = registry.create("model", model, options, data=info, where="teacher")
    module = build_network(factory, info, 0, "teacher shape")
    load_state(module, tensors, path, model, recorded=bool(record))
    return Teacher(module.to(device), mean=mean, std=std, info=record, sha256=sha256(path), path=str(path.absolute()))


class Tested(msgspec.Struct, frozen=True):
    """What fraction of how many accessible images a teacher classifies correctly."""

    accuracy: float
    images: int


def tested(teacher: Teacher, real: RealData, device: torch.device) -> Tested | None:
    """Returns how good a teacher is on the accessible images, 1,000 at most, None where there are none; warns of one that knows nothing.

    Several processes test their own classes each, and all get the whole.
    """
    rows = spread(torch.arange(len(real.labels)), JUDGED_IMAGES)
    if not len(rows):
        return None
    own = rows[(rows >= real.own.start) & (rows < real.own.stop)]
    images = NormalisedRows(rows_of(real.images, own - real.own.start), Normalisation(teacher.mean, teacher.std), device)
    labels, classes = real.labels[own], real.info.classes
    found = predicted(teacher.module, images, batch=100).cpu() if len(own) else labels
    counts = [labels[found == labels].bincount(minlength=classes), labels.bincount(minlength=classes)]
    right, seen = real.ranks.sums([each.double() for each in counts], "control")
    result = Tested(float(right.sum() / seen.sum()), int(seen.sum()))
    if at_chance(right, seen):
        log.warning(
            "The teacher is right on %.1f %% of %d accessible images, no better than guessing among %d classes. %s",
            100 * result.accuracy, result.images, classes, _remedy(teacher),
        )  # fmt: skip
    return result


def at_chance(right: Tensor, seen: Tensor) -> bool:
    """Whether a classifier that is `right` (K,) on `seen` (K,) images of each class does no better than guessing, as far as that shows.

    The mean of the classes' accuracies, which a constant guess brings to 1/K, is at most two standard errors above it, and the images
    are so many that a classifier half-way to perfection would be three of its own above that.

    >>> from torch import tensor
    >>> at_chance(tensor([50, 0]), tensor([50, 50])), at_chance(tensor([45, 25]), tensor([50, 50]))
    (True, False)
    >>> at_chance(tensor([1, 0]), tensor([1, 1]))
    False
    """
    guess, known = 1 / len(seen), seen > 0
    rate = float((right[known] / seen[known]).mean())
    scatter = math.sqrt(float((1 / seen[known]).sum())) / int(known.sum())
    bound, half_way = guess + 2 * scatter * math.sqrt(guess * (1 - guess)), (1 + guess) / 2
    return rate <= bound < half_way - 3 * scatter * math.sqrt(half_way * (1 - half_way))


def _remedy(teacher: Teacher) -> str:
    """Returns what may be wrong with a teacher that knows nothing, and how to mend it."""
    epochs = teacher.info.get("training", {}).get("epochs")
    trained = f"If it was trained too short, train it longer: --set train.epochs={10 * epochs}. " if isinstance(epochs, int) else ""
    return (
        f"{trained}Check how its inputs were normalised (--set teacher.mean and teacher.std), the order of its classes, its architecture "
        "(--model), and whether it was trained at all."
    )


Side = Annotated[int, msgspec.Meta(ge=1)]


class _Record(msgspec.Struct):
    """What ddkit reads of a teacher's record; a bare state dict has none of it."""

    model: str | msgspec.UnsetType = msgspec.UNSET
    options: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    mean: list[float] | msgspec.UnsetType = msgspec.UNSET
    std: list[float] | msgspec.UnsetType = msgspec.UNSET
    class_names: list[str] | msgspec.UnsetType = msgspec.UNSET
    input_shape: tuple[Side, Side, Side] | msgspec.UnsetType = msgspec.UNSET


def read_teacher(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (state dict, record) of a teacher file, {} for a bare state dict; raises InputError naming a file that is unusable."""
    if path.is_dir() or not path.exists():
        what = f"The teacher {path} is a folder, not a file." if path.is_dir() else f"The teacher file {path} does not exist."
        raise InputError(f"{what} `--teacher auto` trains one.", "teacher.use")
    try:
        open_regular(path).close()
        tensors, record = read_tensors(path)
        known = msgspec.convert(record, _Record)
    except msgspec.ValidationError as error:
        raise InputError(f"The teacher {path} has a record that is none: {error}.", "teacher.use") from None
    except PermissionError as error:
        raise InputError(f"The teacher {not_permitted(path, error)}", "teacher.use") from None
    except (ValueError, OSError) as error:
        hint = "ddkit reads safetensors state dicts only; `ddkit import` makes one of a file written by torch.save."
        raise InputError(f"The teacher: {error}. {hint}", "teacher.use") from None
    check_outputs(path, known.class_names or (), tensors)
    return tensors, record


def check_outputs(path: Path, class_names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError where there are more class names than a network of these tensors can have outputs."""
    most = max([1000, *(side for tensor in tensors.values() for side in tensor.shape)])
    if len(class_names) > most:
        raise InputError(f"The teacher {path} has {len(class_names):,} class names, and no tensor for more than {most:,}.", "teacher.use")


def _check_record(path: Path, record: dict[str, Any], info: DataInfo) -> None:
    names, shape = record.get("class_names"), record.get("input_shape")
    if names is not None and len(names) != info.classes:
        raise InputError(
            f"The teacher {path} knows {len(names)} classes, the data has {info.classes}: {_difference(names, info.class_names)}. "
            "Distil the classes that it knows, or train one on this data with `ddkit train`."
        )
    if names is not None and list(names) != list(info.class_names):
        if sorted(names) == sorted(info.class_names):
            raise InputError(f"The teacher {path} has the data's classes in another order: {names}.")
        log.warning("The teacher's class names differ from the data's: %s.", _difference(names, info.class_names))
    if shape is not None and tuple(shape) != info.shape:
        raise InputError(f"The teacher {path} takes images of shape {tuple(shape)} (C, H, W), the data has {info.shape}.")


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Returns in words which names one side alone has, the first five of each."""
    sides = {"the teacher": [name for name in theirs if name not in ours], "the data": [name for name in ours if name not in theirs]}
    return ", ".join(f"only {who} has {shortened(names)}" for who, names in sides.items() if names)


def shortened(names: Sequence[str]) -> str:
    """Returns the first five names in quotes, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


def _statistics(table: TeacherTable, record: dict[str, Any], channels: int, path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = table.mean or record.get("mean"), table.std or record.get("std")
    if mean is None or std is None:
        raise InputError(
            f"The teacher {path} is a bare state dict: say how its inputs were normalised, "
            "for example --set 'teacher.mean=[0.49,0.48,0.45]' --set 'teacher.std=[0.2,0.2,0.2]'.",
            "teacher.mean",
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise InputError(f"teacher.{name} has {len(values)} values for {channels} channels.", f"teacher.{name}")
    if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
        raise InputError("teacher.std must be positive in every channel, and teacher.mean finite.", "teacher.std")
    if max(mean) > 1:
        raise InputError(
            "teacher.mean is that of pixels in 0..1, so at most 1. Divide mean and std of pixels in 0..255 by 255.", "teacher.mean"
        )
    return tuple(mean), tuple(std)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, model: str, *, recorded: bool = False) -> None:
    """Loads the state dict of the file `path` into a `model`; raises InputError with the difference where it does not fit.

    `recorded`: whether the file itself says which model it is.
    """
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}{' complex' * tensors[key].is_complex()}, the model's {tuple(own[key].shape)}"
        for key in sorted(own.keys() & tensors.keys())
        if own[key].shape != tensors[key].shape or own[key].is_complex() != tensors[key].is_complex()
    ]
    lists = (("missing", missing), ("not in the model", surplus), ("of another shape", shapes))
    problems = [f"{what}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}" for what, keys in lists if keys]
    if problems:
        unlike = [(tensors[key].shape, own[key].shape) for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
        heads = {(theirs[:1], ours[:1]) if theirs[1:] == ours[1:] else None for theirs, ours in unlike}
        hint = ""
        if not (recorded or missing or surplus) and len(heads) == 1 and None not in heads:
            hint = f" Only the number of outputs differs: it has {unlike[0][0][0]} classes, and {unlike[0][1][0]} are asked for."
        elif not recorded:
            options = f"`ddkit info model {registry.split_name(model)[0]}`"
            hint = f" Name its architecture with --model and its options with --set teacher.OPTION=VALUE ({options})."
        raise InputError(f"The teacher {path} does not fit the model '{model}'; {'; '.join(problems)}.{hint}")
    if not _all_finite(tensors):
        raise InputError(f"The teacher {path} holds values that are not finite.")
    module.load_state_dict(tensors)


def _all_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())


def save_teacher(path: Path, teacher: Teacher) -> None:
    """Writes a teacher file: its state dict, and its record as metadata."""
    record = {key: value for key, value in teacher.info.items() if key != "schema"}
    write_tensors(path, teacher.module.state_dict(), record)


def train_teacher(
    dataset: Dataset,
    shape: tuple[int, int, int] | None,
    table: TeacherTable,
    train: TrainTable,
    *,
    seed: int,
    device: torch.device,
    watchers: Observers | None = None,
) -> Teacher:
    """Returns a teacher trained on all of the training split; its test accuracy, if there is a test split, is recorded.

    Raises RunFailed where the training diverges.
    """
    labels, watchers = dataset.labels("train"), watchers or Observers()
    count = f"{len(labels):,} images"
    reading = watchers.begin("reading", f"Reading all {count} of the training split, for the teacher", total=len(labels))
    images = load_images(dataset, "train", range(len(labels)), shape, reading)
    mean, std = channel_statistics(images)
    info = data_info(dataset, images.shape[1:])
    model = registry.create("model", table.model, table.options, data=info, where="teacher")
    module = build_network(model, info, seed, "teacher").to(device)
    name = registry.split_name(table.model)[0]
    report = watchers.begin("teacher", f"Training a teacher ({name}, {train.epochs} epochs on {count})", total=train.epochs)
    _fit_teacher(module, Normalisation(mean, std).lazily(images).to(device), labels.to(device), train, info, seed, report)
    if not _all_finite(module.state_dict()):
        raise RunFailed(
            f"The training of the teacher diverged: its weights are not finite after {train.epochs} epochs. Nothing is kept of it. "
            f"Use a smaller rate (--set train.lr={min(train.lr / 10, TrainTable().lr):g}), or another schedule or optimizer."
        )
    record = {
        "model": name,
        "options": {
            key: value for key, value in written_options(model.options).items() if not key.startswith("weights")
        },  # these are newer
        "mean": list(mean),
        "std": list(std),
        "class_names": list(info.class_names),
        "input_shape": list(info.shape),
        "test_accuracy": _test_accuracy(module, dataset, info, Normalisation(mean, std), device),
        "training": {**msgspec.structs.asdict(train), "seed": seed},
    }
    return Teacher(module, mean=mean, std=std, info=record)


def _fit_teacher(
    module: nn.Module,
    images: Tensor | NormalisedRows,
    labels: Tensor,
    train: TrainTable,
    info: DataInfo,
    seed: int,
    report: Report,
) -> None:
    chosen = {key: getattr(train, key) for key in ("epochs", "batch", "optimizer", "lr", "weight_decay", "schedule")}
    augmenter = registry.create("augmenter", train.augmenter, train.options, data=info, where="train")
    right, seen = torch.zeros((), dtype=torch.int64, device=images.device), 0

    def count(logits: Tensor, labels: Tensor) -> None:
        nonlocal seen
        right.add_((logits.argmax(1) == labels).sum())
        seen += len(labels)

    def tell(epoch: int, epochs: int) -> None:
        nonlocal seen
        report(epoch, epochs, **{"training accuracy": int(right) / seen})
        right.zero_()
        seen = 0

    made = decide_arithmetic("auto", "auto", images.device, work=training_flops(module, info, images=len(images), epochs=train.epochs))
    with products(images.device, made.precision):
        fit(
            module,
            images,
            labels,
            Schedule(**chosen),
            augmenter=augmenter,
            generator=generator(seed, "teacher training"),
            forward=compiled(module, wanted=made.compile),
            precision=made.dtype,
            channels_last=made.compile,
            report=tell,
            on_batch=count,
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


def _make_folder(folder: Path) -> None:
    """Makes the cache's folder, before an hour of training whose result could not be kept."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFilesError(
            f"The cache folder {folder} cannot be written ({error.strerror or error}), so a teacher cannot be kept there. "
            "Name another with the environment variable DDKIT_CACHE, or give --teacher FILE."
        ) from None


def _is_whole(path: Path, known: str | None) -> bool:
    """Returns whether a teacher is kept at `path`, and is the one with the sha256 `known`; warns of another, which is as good as none."""
    if not path.is_file():
        return False
    try:
        read_tensors(path)
        if sha256(path) == known:
            return True
        log.warning("The teacher in the cache is not used: %s is not the file that you trained there.", path)
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
            "The teacher could not be kept for the next time: %s The run goes on with it. `ddkit train --out FILE` makes one for --teacher "
            "FILE, and the environment variable DDKIT_CACHE names another cache.", error, extra={"news": True},
        )  # fmt: skip
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return False
    return True


def _as_if_kept(made: Teacher) -> Teacher:
    """Returns a teacher that was trained just now as it would be read from its file."""
    module = made.module.to(memory_format=torch.contiguous_format)
    digest = hashlib.sha256(tensors_bytes(module.state_dict(), made.info)).hexdigest()
    info = json.loads(json.dumps({"schema": SCHEMA, **made.info}))
    return Teacher(module, mean=made.mean, std=made.std, info=info, sha256=digest)


def automatic_teacher(
    dataset: Dataset,
    shape: tuple[int, int, int],
    table: TeacherTable,
    train: TrainTable,
    device: torch.device,
    watchers: Observers | None = None,
    *,
    ranks: Ranks = ALONE,
    train_it: bool = True,
) -> Teacher | None:
    """Returns the cached teacher for this dataset content, model and training; trains it on first use and says so.

    Where it is not to be trained (`train_it`), None is returned if it is not in the cache.

    Of several processes the first trains it, and the others raise RunFilesError where they do not find it in the cache afterwards.
    """
    info = data_info(dataset, shape)
    name = table.model
    if not ranks.first:
        told = ranks.told(None)
        if told is None:
            return None
        file, known = told
        path = cache_folder() / "teachers" / file
        if not _is_whole(path, known):
            raise RunFilesError(
                f"The first process of the run has trained a teacher, which is not in the cache of this one ({path.parent}). Give all "
                "machines one cache with the environment variable DDKIT_CACHE, or give --teacher FILE."
            )
        return load_teacher(TeacherTable(use=str(path), model=name), info, device)
    table, train = resolved_training(table, train, info)
    key = {
        "dataset": fingerprint(dataset),
        "classes": list(dataset.class_names),
        "shape": shape,
        "model": table.model,
        "options": table.options,
        "train": msgspec.structs.asdict(train),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "teachers" / f"{path_part(table.model)}-{digest}.safetensors"
    whole = _is_whole(path, vouched(path))
    if not whole and not train_it:
        ranks.told(None)
        return None
    if not whole:
        log.warning("No teacher was given. One is trained on all training images, and kept for the next time.", extra={"news": True})
        _make_folder(path.parent)
        made = train_teacher(dataset, shape, table, train, seed=0, device=device, watchers=watchers)
        if not _kept(path, made):
            if ranks.size > 1:
                raise RunFilesError(f"The other processes of the run read the teacher from the cache, {path.parent}. Give --teacher FILE.")
            return _as_if_kept(made)
    ranks.told([path.name, sha256(path)])  # the others wait for this
    return load_teacher(TeacherTable(use=str(path), model=table.model), info, device)
