"""Sets and teachers that other projects published: read as tensors alone, written as ddkit's own files."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from ddkit.components import registry, trust
from ddkit.components.base import DataInfo
from ddkit.components.options import written_options
from ddkit.data.arrays import check_declared, read_arrays
from ddkit.data.images import Normalisation, most_classes, to_unit
from ddkit.errors import DdkitError, FlagError, InputError, RunFilesError, refuse_unused
from ddkit.files import check_out, open_regular, read_tensors, sha256
from ddkit.nn.networks import build_network
from ddkit.nn.teacher import Teacher, check_outputs, load_state, save_teacher
from ddkit.recipes.resolve import flattened, resolve
from ddkit.recipes.tables import instead_of_decode
from ddkit.run.artifact import Artifact, Record, are_probabilities, made_with, parametrization_of
from ddkit.run.directory import RunDirectory, save_set

log = logging.getLogger("ddkit")

IMAGES = ("images", "image", "data", "x", "x_train", "image_syn", "images_syn")
LABELS = ("labels", "label", "targets", "target", "y", "y_train", "label_syn", "labels_syn")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
PREFIXES = ("module.", "_orig_mod.")  # of torch's DataParallel, and of torch.compile

Pair = tuple[Tensor, Tensor]
Classes = Sequence[str] | int | None


def import_file(
    path: str | Path,
    out: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    kind: Literal["auto", "set", "teacher"] = "auto",
    classes: Sequence[str] | int | None = None,
    pixels: Literal["normalised", "unit"] | None = None,
    index: int | None = None,
    size: Sequence[int] | None = None,
    model: str | None = None,
    sets: Mapping[str, Any] | None = None,
) -> Artifact | Teacher:
    """Writes a synthetic set or a teacher of another project as ddkit's own file, and returns it.

    `path` is a file of torch.save, .npz or .safetensors; it is read as tensors alone, so that none of its code runs. A set
    is images (n, C, H, W) and labels, (n,) or rows (n, K) of probabilities or logits, and becomes the folder `out`; `pixels` says
    whether floats are normalised with `mean` and `std` or in 0..1, and `index` which of several sets is taken. If each image is a grid
    of 2 x 2, `sets` says so: {"parametrization.factor": 2}. A teacher is a state dict of `model` (with the options that `sets` gives:
    {"teacher.norm": "batch"}) for images of `size` (height, width), and becomes the file `out`. `classes` are the class names, or their
    number. What the file itself records is taken if it is not given: `mean` and `std`, and of ddkit's own files the class names, the
    grid and that pixels are in 0..1. What is given and has no effect on the file is refused. Raises DdkitError.
    """
    source, target = Path(path), Path(out)
    found, recorded = _read(source)
    if mean is None or std is None:
        mean, std = mean or recorded.get("mean"), std or recorded.get("std")
    settings = dict(flattened(dict(sets or {})))
    pair = _set_in(found, index or 0) if kind in ("auto", "set") else None
    if pair is not None:
        unused = [flag for flag, value in (("--size", size), ("--model", model)) if value is not None]
        if "decode.factor" in settings:
            raise InputError(f"--set decode.factor: {instead_of_decode(settings['decode.factor'])}.", "decode.factor")
        unused += [f"--set {path}" for path in settings if not path.startswith("parametrization.")]
        refuse_unused(
            unused, f"{source} is a synthetic set, of which --set takes parametrization.* alone, for example parametrization.factor=2."
        )
        makes = {path.partition(".")[2]: value for path, value in settings.items()}
        makes = {"use": "grid", **makes} if makes else recorded.get("parametrization", {})
        norm, names = _statistics(source, mean, std), classes or recorded.get("classes")
        apart = found.get("soft_labels") if isinstance(found, Mapping) else None
        soft = pair[1] if pair[1].ndim == 2 and pair[1].is_floating_point() else apart
        return _import_set(source, target, pair, soft, norm, names, pixels or recorded.get("pixels"), makes)
    state = _state_in(found) if kind in ("auto", "teacher") else None
    if state is None:
        no_set = "no set (tensors images (n, C, H, W) and labels (n,), in a dict, a list, or a list of such pairs under `data`)"
        no_teacher = "no teacher (a state dict of tensors by name)"
        wanted = {"set": no_set, "teacher": no_teacher}.get(kind, f"{no_set}, and {no_teacher}")
        content = f"a {type(found).__name__}" + (f" of {len(found)} items" if isinstance(found, list | tuple) else "")
        if isinstance(found, Mapping):
            content = f"a dict of {', '.join(str(key) for key in list(found)[:8])}" if found else "an empty dict"
        raise InputError(f"{source} holds {content}: that is {wanted}.")
    own = ("teacher.use", "teacher.mean", "teacher.std")
    unused = [flag for flag, value in (("--pixels", pixels), ("--index", index)) if value is not None]
    unused += [f"--set {path}" for path in settings if not path.startswith("teacher.") or path in own]
    refuse_unused(unused, f"{source} is a teacher, of which --set takes options of the model, for example teacher.norm=batch.")
    return _import_teacher(source, target, state, _statistics(source, mean, std), classes, size, model, settings)


# Reading


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the tensors of a file in their dicts and lists, and what it records of a set; raises InputError for a file of other things.

    A set may record "mean" and "std", and one of ddkit's own "classes", "pixels" and "parametrization".
    """
    try:
        with open_regular(path) as stream:
            start = stream.read(9)
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist.") from None
    except OSError as error:
        raise InputError(f"The file {path} cannot be read: {error}.") from None
    is_archive = zipfile.is_zipfile(path)
    of_torch = start.startswith(b"\x80")  # how a pickle begins, which torch.save wrote before archives
    if start[8:] == b"{" and not is_archive:
        return _read_safetensors(path)
    if is_archive:
        try:
            with zipfile.ZipFile(path) as archive:
                check_declared(archive, path)
                of_torch = any(name.endswith("data.pkl") for name in archive.namelist())
        except DdkitError:
            raise
        except Exception as error:  # a third-party archive can raise anything
            raise InputError(f"{path} cannot be read: {error}.") from None
    if is_archive and not of_torch:
        arrays = read_arrays(path)
        found = {name: torch.from_numpy(each) for name, each in arrays.items() if each.dtype.kind in "fiu" and each.dtype.isnative}
        recorded = _statistics_in(found)
        names = arrays.get("class_names")
        if "x_train" in found:
            recorded |= {"pixels": "unit"} if "unclipped" in arrays else {}
            recorded |= {"classes": names.tolist()} if names is not None and names.dtype.kind == "U" and names.ndim == 1 else {}
        return found, recorded
    if not of_torch:
        raise InputError(f"{path} is no file of torch.save, .npz or .safetensors that can be read (it begins as none of them does).")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a third-party file can raise anything
        raise InputError(_refusal(path, str(error))) from None
    return loaded, _statistics_in(loaded)


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise InputError(f"{error}.") from None
    with suppress(msgspec.ValidationError):  # the metadata of somebody else's
        own = msgspec.convert(metadata, Record)
        if "stored" in tensors:
            raise InputError(f"{path} is a set of ddkit's own, which every command takes as it is.")
        if "images" in tensors:
            table = own.parametrization or ({"use": "grid", **own.decode} if own.decode else {})
            return tensors, {
                "pixels": "unit", "classes": own.class_names, "mean": own.mean, "std": own.std, "parametrization": table,
            }  # fmt: skip
    return tensors, _statistics_in(tensors)


def _statistics_in(found: Any) -> dict[str, Any]:
    """Returns "mean" and "std" of a set that records both as vectors."""
    if not isinstance(found, Mapping) or not any(name in found for name in IMAGES):
        return {}
    values = {name: found[name] for name in ("mean", "std") if isinstance(found.get(name), Tensor) and found[name].ndim == 1}
    return {name: value.double().tolist() for name, value in values.items() if len(values) == 2}


def _refusal(path: Path, text: str) -> str:
    named = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", text)
    if named is None and "WeightsUnpickler" not in text and "weights_only" not in text:
        return f"{path} is no file of torch.save, .npz or .safetensors that can be read ({' '.join(text.split())[:200]})."
    what = f"holds {named.group(1)} beside tensors" if named else "holds more than tensors"
    return (
        f"{path} {what}. To build that is to run what the file says, so ddkit reads tensors alone. Where you trust the file, keep the "
        f"tensors of it in Python: found = torch.load({str(path)!r}, weights_only=False), look at what it is, and "
        'torch.save({"images": ..., "labels": ...}, "set.pt"), or torch.save(state_dict, "teacher.pt").'
    )


# What is in it


def _set_in(found: Any, index: int) -> Pair | None:
    """Returns (images, labels), number `index` of several; None where there is no set."""
    pairs: list[Pair] | None = None
    if isinstance(found, Mapping):
        images, labels = (next((found[name] for name in names if name in found), None) for names in (IMAGES, LABELS))
        if isinstance(images, Tensor) and isinstance(labels, Tensor):
            pairs = [(images, labels)]
        found = found.get("data")
    if pairs is None and isinstance(found, list | tuple):
        pairs = [(found[0], found[1])] if _is_pair(found) else [(item[0], item[1]) for item in found if _is_pair(item)]
        if not _is_pair(found) and len(pairs) < len(found):
            return None
    if not pairs:
        return None
    if len(pairs) == 1 and index:
        raise InputError(f"The file holds one set, so --index is 0; got {index}.")
    if not 0 <= index < len(pairs):
        raise InputError(f"The file holds {len(pairs)} sets, so --index is a number from 0 to {len(pairs) - 1}; got {index}.")
    if len(pairs) > 1:
        log.warning("The file holds %d sets; number %d is taken (--index).", len(pairs), index)
    return pairs[index]


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, Tensor) for part in item)


def _state_in(found: Any) -> dict[str, Tensor] | None:
    """Returns the state dict in what was read, its names without prefixes of wrappers; None where there is none."""
    for name in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not found:
        return None
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        return None
    state = dict(found)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _plain(tensor: Tensor, what: str, path: Path) -> Tensor:
    """Returns a tensor as an ordinary one; raises InputError where it is of another kind, or larger than what the file holds of it."""
    strange = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta
    if strange or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{path}: {what} is no plain tensor ({tensor.dtype}, {tensor.layout}, shape {tuple(tensor.shape)}).")
    return tensor.detach().contiguous()


def _statistics(path: Path, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation:
    """Returns what images are normalised with, which files of others do not record."""
    if mean is None or std is None:
        raise InputError(
            f"{path} does not record how images are normalised: give the mean and std of each channel, of pixels in 0..1, for example "
            "--mean 0.4914,0.4822,0.4465 --std 0.2023,0.1994,0.2010"
        )
    if len(mean) != len(std) or not mean:
        raise FlagError(f"--mean has {len(mean)} values and --std {len(std)}: both have one for each channel.")
    if not all(torch.tensor([*mean, *std]).isfinite()) or min(std) <= 0:
        raise FlagError("--mean and --std are finite numbers, and every std is positive.")
    if max(mean) > 1:
        of_unit = [",".join(f"{value / 255:.4g}" for value in values) for values in (mean, std)]
        raise FlagError(f"--mean is that of pixels in 0..1, so at most 1. If yours is of 0..255: --mean {of_unit[0]} --std {of_unit[1]}")
    return Normalisation(mean, std)


def _names(classes: Classes, least: int, path: Path) -> list[str]:
    """Returns the class names: as given, or numbers."""
    names = [str(number) for number in range(classes)] if isinstance(classes, int) else list(classes or map(str, range(least)))
    if len(set(names)) < len(names) or not all(names):
        raise FlagError(f"--classes: every class has a name of its own; got {', '.join(names[:20])}.")
    if len(names) < max(least, 2):
        raise InputError(f"{path} has the label {least - 1}, and there are {len(names)} classes. Two is the least; give all --classes.")
    return names


# Sets


def _import_set(
    path: Path, out: Path, pair: Pair, soft: Any, norm: Normalisation, classes: Classes, pixels: str | None, makes: Mapping[str, Any]
) -> Artifact:
    images = _images(path, pair[0], norm, pixels)
    labels = _plain(pair[1], "labels", path)
    found = parametrization_of({"parametrization": makes})
    if soft is not None:
        soft = _probabilities(path, soft, len(images), 1 if found is None else found.per_row)
        labels = soft[:: len(soft) // len(images)].argmax(1) if labels.ndim == 2 else labels
    fits = labels.ndim == 1 and len(labels) == len(images) and labels.dtype != torch.bool
    if not fits or not bool((labels == labels.long()).all()):
        raise InputError(f"{path}: labels are {labels.dtype} {tuple(labels.shape)}; they must be whole numbers, one for each image.")
    labels = labels.long()
    if int(labels.min()) < 0 or int(labels.max()) >= most_classes(len(labels)):
        raise InputError(f"{path}: labels go from {int(labels.min())} to {int(labels.max())}; they count from 0.")
    names = _names(classes, int(labels.max()) + 1 if soft is None else soft.shape[1], path)
    if soft is not None and len(names) != soft.shape[1]:
        raise FlagError(f"--classes: {len(names)} of them, and {path} has labels of {soft.shape[1]} classes.")
    if len(names) > most_classes(len(images)):
        raise FlagError(f"--classes: {len(names):,} for {len(images):,} images; at most {most_classes(len(images)):,} are taken.")
    order = labels.argsort(stable=True)
    if not torch.equal(order, torch.arange(len(labels))):
        log.warning("The images were not in order of class; they are now, in each class in the order of the file.")
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    record: dict[str, Any] = {"class_names": names, "mean": list(norm.mean), "std": list(norm.std), "recipe": "imported"}
    if found is not None:
        if not found.stores_images:
            raise InputError(f"parametrization.use: a set of images cannot be of the parametrization '{found.name}', which stores none.")
        found.check((images.shape[1], images.shape[2], images.shape[3]))
        record |= made_with(found, makes["use"], images.shape[1:])
    if len(set(counts)) == 1:
        record["ipc"] = counts[0]
    else:
        told = ", ".join(f"{name} {count}" for name, count in zip(names[:20], counts, strict=False))
        log.warning("The classes have different numbers of images (%s): evaluate takes them as they are, blend needs the same.", told)
    own = {}
    if soft is not None:
        record["labels"] = "imported"
        own["soft_labels"] = soft.unflatten(0, (len(order), -1))[order].flatten(0, 1)
    result = Artifact(images[order], labels[order], record, own)
    with RunDirectory.whole_or_absent(out) as directory:
        save_set(result, directory)
        directory.write_manifest({"steps": 0, "seconds": 0.0, "imported": {"path": str(path.absolute()), "sha256": sha256(path)}})
    return result


def _probabilities(path: Path, soft: Any, images: int, per_row: int) -> Tensor:
    """Returns labels (n, K) as probabilities, a row for each decoded image: as they are, or softmax of other numbers, with a warning."""
    values = _plain(soft, "soft labels", path).float() if isinstance(soft, Tensor) else torch.empty(0)
    if values.ndim != 2 or values.shape[1] < 2 or len(values) not in (images, images * per_row) or not bool(values.isfinite().all()):
        raise InputError(f"{path}: labels (n, K) are finite numbers, a row for each of {images} images; got {tuple(values.shape)}.")
    if not are_probabilities(values, (len(values), values.shape[1])):
        log.warning(
            "The labels are no probabilities (at least 0, a row adding up to 1): they are taken as logits, whose softmax is stored."
        )
        values = values.softmax(1)
    return values.repeat_interleave(images * per_row // len(values), 0)


def _images(path: Path, images: Tensor, norm: Normalisation, pixels: str | None) -> Tensor:
    """Returns the images in pixel units, float32."""
    if images.ndim != 4 or images.numel() == 0 or images.shape[1] != len(norm.mean):
        raise InputError(f"{path}: images have the shape {tuple(images.shape)}; with this --mean it must be (n, {len(norm.mean)}, H, W).")
    plain = _plain(images, "images", path)
    if plain.dtype == torch.uint8:
        refuse_unused(["--pixels"] if pixels else [], f"the images of {path} are bytes.")
        return to_unit(plain)
    if not plain.is_floating_point():
        raise InputError(f"{path}: images are {plain.dtype}; they must be uint8 or floats.")
    if pixels is None:
        raise InputError(f"{path} does not tell what its images are: give --pixels normalised, or --pixels unit for 0 black and 1 white.")
    found = norm.to_pixels(plain.float()) if pixels == "normalised" else plain.float()
    if not bool(found.isfinite().all()):
        raise InputError(f"{path}: an image value is not finite.")
    low, high = float(found.min()), float(found.max())
    if low < -1 or high > 2:
        log.warning("Pixels go from %.2f to %.2f, where 0 is black and 1 is white: do --pixels, --mean and --std fit this file?", low, high)
    return found


# Teachers


def _import_teacher(
    path: Path,
    out: Path,
    state: Mapping[str, Tensor],
    norm: Normalisation,
    classes: Classes,
    size: Sequence[int] | None,
    model: str | None,
    sets: Mapping[str, Any],
) -> Teacher:
    check_out(out)
    if out.exists():
        raise RunFilesError(f"--out {out} exists already; name a new file.")
    if classes is None or size is None:
        raise InputError(
            f"{path} is a state dict, which does not record classes and image size: give --classes 10, or their names, and --size 32 "
            "(or height,width)."
        )
    if len(size) != 2 or min(size) < 1:
        raise FlagError(f"--size is height and width in pixels, both at least 1; got {list(size)}.")
    names = _names(classes, 2, path)
    check_outputs(path, names, state)
    info = DataInfo(class_names=tuple(names), channels=len(norm.mean), size=(int(size[0]), int(size[1])))
    table = resolve({"name": "import"}, model=model, sets=sets).teacher
    with trust.granting({"model": model}, sets):
        factory = registry.create("model", table.model, table.options, data=info, where="teacher")
    module = build_network(factory, info, 0, "teacher")
    own = module.state_dict()
    tensors = {name: _plain(value, name, path) for name, value in state.items()}
    load_state(module, {name: value.to(own[name].dtype) if name in own else value for name, value in tensors.items()}, path, table.model)
    kept = {key: value for key, value in written_options(factory.options).items() if not key.startswith("weights")}  # these are newer
    record = {
        "model": registry.split_name(table.model)[0], "options": kept,
        "mean": list(norm.mean), "std": list(norm.std),
        "class_names": list(info.class_names), "input_shape": list(info.shape), "test_accuracy": None,
        "imported": {"path": str(path.absolute()), "sha256": sha256(path)},
    }  # fmt: skip
    teacher = Teacher(module, mean=norm.mean, std=norm.std, info=record, path=str(out))
    save_teacher(out, teacher)
    return teacher
