"""The teacher: one trained classifier that is never updated, its file, and how good it is on the accessible images."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from ddkit.components import registry
from ddkit.components.base import DataInfo
from ddkit.data.images import Normalisation, NormalisedRows, rows_of, spread
from ddkit.data.real import RealData
from ddkit.data.whitening import Whitening
from ddkit.errors import LONGEST, NEWS, InputError
from ddkit.files import not_permitted, open_regular, read_tensors, sha256, write_tensors
from ddkit.nn import class_order
from ddkit.nn.networks import build_network
from ddkit.nn.training import predicted
from ddkit.recipes.tables import TeacherTable
from ddkit.text import counted, few

log = logging.getLogger("ddkit")
JUDGED_IMAGES = 1000  # accessible ones that a teacher is tested on, at most: evenly over the classes


@dataclass(eq=False)
class Teacher:
    """A trained classifier in evaluation mode, with its record.

    `mean` and `std` are the channel statistics of its inputs (of pixels in 0..1), and `whitening` is the transform if they are whitened.
    `info` has the metadata of its file ({} for a bare state dict), `sha256` is that of the file. `order` has for each class its output
    in the file, if the order differs; the outputs of the module are in the order of the data's classes.

    Examples:
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> teacher = ddkit.nn.Teacher(module, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
        >>> tuple(teacher.logits(teacher.normalisation.normalise(torch.rand(5, 3, 2, 2))).shape)
        (5, 2)
    """

    module: nn.Module
    _: KW_ONLY
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whitening: Whitening | None = None
    info: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    path: str = ""
    order: list[int] | None = None

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)

    @property
    def normalisation(self) -> Normalisation:
        """The map from images in pixel units to its inputs."""
        return Normalisation(self.mean, self.std, self.whitening)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its file: the state dict, and those of its whitening."""
        return {**self.module.state_dict(), **({} if self.whitening is None else self.whitening.tensors)}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, without gradients."""
        return dict(self.module.named_parameters())

    def logits(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns (n, K) logits of normalised images x (n, C, H, W) under `parameters` (None: the teacher's own)."""
        if parameters is None:
            return self.module(x)
        return torch.func.functional_call(self.module, dict(parameters), (x,))

    def exact_logits(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns (n, K) logits computed on the CPU in the dtype of `parameters`: for checks in float64."""
        buffers = {
            name: value.cpu().to(x.dtype) if value.is_floating_point() else value.cpu() for name, value in self.module.named_buffers()
        }
        return torch.func.functional_call(self.module, {**buffers, **parameters}, (x,))


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
        raise InputError(f"{what} To train a teacher automatically, use --teacher auto.", "teacher.use")
    try:
        open_regular(path).close()
        tensors, record = read_tensors(path)
        known = msgspec.convert(record, _Record)
    except msgspec.ValidationError as error:
        raise InputError(f"The teacher {path} has damaged metadata: {error}.", "teacher.use") from None
    except PermissionError as error:
        raise InputError(f"The teacher {not_permitted(path, error)}", "teacher.use") from None
    except (ValueError, OSError) as error:
        hint = "A teacher must be a safetensors file. Convert a file of torch.save with `ddkit import`."
        raise InputError(f"The teacher: {error}. {hint}", "teacher.use") from None
    check_outputs(path, known.class_names or (), tensors)
    return tensors, record


def check_outputs(path: Path, class_names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError where there are more class names than a network of these tensors can have outputs."""
    most = max([1000, *(side for tensor in tensors.values() for side in tensor.shape)])
    if len(class_names) > most:
        raise InputError(
            f"The teacher {path} has {len(class_names):,} class names, but its tensors have at most {most:,} outputs.", "teacher.use"
        )


def load_teacher(table: TeacherTable, info: DataInfo, device: torch.device) -> Teacher:
    """Returns the teacher of a file; raises InputError with the difference where it does not fit the data."""
    path = Path(table.use)
    tensors, record = read_teacher(path)
    names, shape = table.classes or record.get("class_names"), record.get("input_shape")
    order = None if names is None else class_order.by_name(names, info.class_names)
    if table.classes is not None and order is None:
        raise InputError(
            f"teacher.classes must name each class of the data once, in the order of the teacher's outputs, but "
            f"{_difference(table.classes, info.class_names) or 'one name is there twice'}. In the order of the data: "
            f"{class_order.as_flag(info.class_names)}",
            "teacher.classes",
        )
    if names is not None and order is None and len(names) != info.classes:
        raise InputError(
            f"The teacher {path} has {len(names)} classes, but the data has {info.classes}: {_difference(names, info.class_names)}. "
            "Use data with the classes of the teacher, or train a teacher on this data with `ddkit train`."
        )
    if shape is not None and tuple(shape) != info.shape:
        raise InputError(f"The teacher {path} needs images of shape {tuple(shape)} (C, H, W), but the data has {info.shape}.")
    mean, std = _statistics(table, record, info.channels, path)
    try:
        whitening = Whitening.taken(tensors, info.shape)
    except ValueError as error:
        raise InputError(f"The teacher {path} cannot be used: {error}.", "teacher.use") from None
    model, options = record.get("model", table.model), record.get("options", table.options)
    own = info if names is None or order is None else msgspec.structs.replace(info, class_names=tuple(names))
    module = build_network(registry.create("model", model, options, data=own, where="teacher"), own, 0, "teacher shape")
    load_state(module, tensors, path, model, recorded=bool(record))
    teacher = Teacher(
        module.to(device), mean=mean, std=std, whitening=whitening, info=record, sha256=sha256(path), path=str(path.absolute())
    )
    if order is not None and order != list(range(own.classes)):
        teacher.order = order
        class_order.bring_into_order(teacher.module, order)
        others = "has more classes than the data" if own.classes > info.classes else "has its classes in another order than the data"
        log.warning(
            "The teacher %s %s (%s): its outputs are sorted into the order of the data (%s).",
            path, others, few(own.class_names, 12), few(info.class_names, 12), extra=NEWS,
        )  # fmt: skip
    return teacher


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Returns in words which names one side alone has, the first five of each."""
    said = []
    for who, names, others in (("the teacher", theirs, ours), ("the data", ours, theirs)):
        own = [f"'{name}'" for name in names if name not in others]
        if own:
            said.append(f"only {who} has {few(own)}")
    return ", ".join(said)


def _statistics(table: TeacherTable, record: dict[str, Any], channels: int, path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = table.mean or record.get("mean"), table.std or record.get("std")
    if mean is None or std is None:
        raise InputError(
            f"The teacher {path} does not record how its inputs were normalised. Add the mean and std, "
            "for example --set 'teacher.mean=[0.49,0.48,0.45]' --set 'teacher.std=[0.2,0.2,0.2]'.",
            "teacher.mean",
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise InputError(
                f"teacher.{name} has {counted(len(values), 'value')}, but the images of the data have {counted(channels, 'channel')}. Use "
                f"data with as many channels as the teacher {path} was trained on, or another teacher.",
                f"teacher.{name}",
            )
    if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
        raise InputError("teacher.std must be finite and positive in every channel, and teacher.mean must be finite.", "teacher.std")
    if max(mean) > 1:
        raise InputError(
            "teacher.mean is for pixels in 0..1, so it is at most 1. If yours is for pixels in 0..255, divide mean and std by 255.",
            "teacher.mean",
        )
    return tuple(mean), tuple(std)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, model: str, *, recorded: bool = False) -> None:
    """Loads the state dict of the file `path` into a `model`; raises InputError with the difference where it does not fit.

    `recorded`: whether the file itself says which model it is.
    """
    own = module.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}  # which are not used in evaluation mode
    tensors = {**counters, **tensors}
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}{' complex' * tensors[key].is_complex()} in the file and {tuple(own[key].shape)} in the model"
        for key in sorted(own.keys() & tensors.keys())
        if own[key].shape != tensors[key].shape or own[key].is_complex() != tensors[key].is_complex()
    ]
    lists = (("missing in the file", missing), ("not in the model", surplus), ("of another shape", shapes))
    problems = [f"{what}: {few(keys, 6)}" for what, keys in lists if keys]
    if problems:
        unlike = [(tensors[key].shape, own[key].shape) for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
        heads = {(theirs[:1], ours[:1]) if theirs[1:] == ours[1:] else None for theirs, ours in unlike}
        hint = ""
        if not (recorded or missing or surplus) and len(heads) == 1 and None not in heads:
            hint = f" Only the number of outputs differs: the file has {unlike[0][0][0]} classes, but {unlike[0][1][0]} are needed."
        elif not recorded:
            options = f"`ddkit info model {registry.split_name(model)[0]}`"
            hint = f" Name its architecture with --model and its options with --set teacher.OPTION=VALUE ({options})."
        raise InputError(f"The teacher {path} does not fit the model '{model}'; {'; '.join(problems)}.{hint}")
    if not all_finite(tensors):
        raise InputError(f"The teacher {path} has values that are not finite.")
    module.load_state_dict(tensors)


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every floating-point value of a state dict is finite."""
    return all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())


def save_teacher(path: Path, teacher: Teacher) -> None:
    """Writes a teacher file: its state dict, and its record as metadata."""
    record = {key: value for key, value in teacher.info.items() if key != "schema"}
    write_tensors(path, teacher.tensors, record)


class Tested(msgspec.Struct, frozen=True):
    """What fraction of how many accessible images a teacher classifies correctly."""

    accuracy: float
    images: int


def tested(teacher: Teacher, real: RealData, device: torch.device, table: TeacherTable) -> Tested | None:
    """Returns how good a teacher is on the accessible images, 1,000 at most, None where there are none.

    Warns of one that knows nothing, or whose outputs are in another order. If nothing but this tells which output is which class, raises
    InputError instead, unless table.check is false. Several processes test their own classes each, and all get the whole.
    """
    info, names = real.info, table.classes or teacher.info.get("class_names")
    own_names = f"The teacher's class names differ from the data's: {_difference(names, info.class_names)}. " if names else ""
    own_names = "" if names and class_order.by_name(names, info.class_names) else own_names
    rows = spread(torch.arange(len(real.labels)), JUDGED_IMAGES)
    if not len(rows):
        if own_names:
            log.warning("%sWithout accessible images the order of its outputs cannot be tested. Output k is used for class k.", own_names)
        return None
    own = rows[(rows >= real.own.start) & (rows < real.own.stop)]
    images = NormalisedRows(rows_of(real.images, own - real.own.start), teacher.normalisation, device)
    found = predicted(teacher.module, images, batch=100).cpu() if len(own) else real.labels[own]
    labels, found = real.ranks.all_gather(torch.stack([real.labels[own], found], 1), "control").unbind(1)
    right, seen = (each.bincount(minlength=info.classes) for each in (labels[found == labels], labels))
    result = Tested(float((found == labels).double().mean()), len(labels))
    share = f"{own_names}The teacher is correct on {100 * result.accuracy:.1f} % of {result.images} accessible images"
    chance, fitting = at_chance(right, seen), class_order.fitting(labels, found, info.classes)
    share += f", no better than guessing among {info.classes} classes" * chance
    if not chance and fitting is None:
        if own_names:
            few = " There are too few images to test this order. Use a larger --pipc." * at_chance(100 * right, 100 * seen)
            log.warning("%s if output k is used for class k.%s", share, few)
        return result
    if fitting is not None:
        order = teacher.order or range(info.classes)
        outputs = list(names or info.class_names)
        for output, name in zip(fitting.tolist(), info.class_names, strict=True):
            outputs[order[output]] = name
        flag = class_order.as_flag(outputs)
        if len(flag) > LONGEST // 2:  # an error would cut it
            log.warning("The order of the outputs that fits: %s", flag, extra=NEWS)
            flag = "the flag in the line above"
        again = 100 * float((fitting[labels] == found).double().mean())
        helps = f"With its outputs in another order it is correct on {again:.1f} %: {flag}"
    else:
        epochs = teacher.info.get("training", {}).get("epochs")
        longer = f"If its training was too short, train longer: --set train.epochs={10 * epochs}. " if isinstance(epochs, int) else ""
        helps = (
            f"{longer}Check the normalisation of its inputs (--set teacher.mean and teacher.std), the order of its outputs (--set "
            "teacher.classes), its architecture (--model), and whether it is trained."
        )
    unproven = bool(table.classes) or not class_order.are_proof(names, info.class_names)
    weak = fitting is None and not own_names and "training" in teacher.info  # `ddkit train` took the names, if numbers, from real data
    if table.check and table.use != "auto" and unproven and not weak:
        raise InputError(
            f"{share}. {helps}{'.' * (not helps.endswith('.'))} To use it without this check: --set teacher.check=false", "teacher.check"
        )
    log.warning("%s. %s", share, helps)
    return result


def at_chance(right: Tensor, seen: Tensor) -> bool:
    """Whether a classifier that is `right` (K,) on `seen` (K,) images of each class does no better than guessing, as far as that shows.

    The mean of the classes' accuracies, which a constant guess brings to 1/K, is at most two standard errors above that, and more than
    three below the mean of a classifier half-way to perfection.

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
    return rate <= bound and rate < half_way - 3 * scatter * math.sqrt(half_way * (1 - half_way))
