"""A set of another project becomes a run directory of ddkit's: its labels, pixels and parametrization, and what is doubtful about them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.components.base import Parametrization
from ddkit.data.images import Normalisation, most_classes, to_unit
from ddkit.errors import FlagError, InputError, refuse_unused
from ddkit.files import sha256
from ddkit.recipes.tables import instead_of_decode
from ddkit.run.artifact import Artifact, are_probabilities, made_with, parametrization_of
from ddkit.run.declared import WHITENED, Classes, Declared, class_names_of, statistics_of, whitening_of
from ddkit.run.directory import RunDirectory, save_set
from ddkit.run.doubts import looks_like_grid, looks_whitened
from ddkit.run.foreign import Found, labels_in, number_of, plain, read
from ddkit.text import few

log = logging.getLogger("ddkit")


def import_set(
    paths: Sequence[Path],
    contents: Sequence[tuple[Any, Mapping[str, Any]]],
    parts: Sequence[Sequence[Found]],
    out: Path,
    declared: Declared,
) -> Artifact:
    """Writes the sets `parts` of the files as one. `contents` are what was read of each file: what it holds and what it records."""
    path, recorded, settings = paths[0], contents[0][1], declared.settings
    if "decode.factor" in settings:
        raise InputError(f"--set decode.factor: {instead_of_decode(settings['decode.factor'])}", "decode.factor")
    unused = declared.given("size", "model") + [f"--set {each}" for each in settings if not each.startswith("parametrization.")]
    refuse_unused(unused, f"{path} is a synthetic set, for which --set takes parametrization.* only, for example parametrization.factor=2.")
    if any(other != recorded for _, other in contents):
        raise InputError(f"{' and '.join(map(str, paths))} record different means, stds or class names. Import them one by one.")
    found = _joined(paths, [_chosen(each, declared.index, source) for each, source in zip(parts, paths, strict=True)])
    found = _labelled(path, found, declared.labels, declared.ipc)
    found = found._replace(step_size=_step_size(path, declared.step_size, found))
    if found.names is not None:
        refuse_unused(declared.given("classes"), f"the labels are texts and give the class names: {', '.join(found.names[:8])}.")
    names = declared.classes or found.names or recorded.get("classes")
    if declared.whitened:
        refuse_unused(["--whitened"] if "pixels" in recorded else [], f"{path} records that its images are in pixel units.")
        refuse_unused(declared.given("mean", "std", "pixels"), WHITENED)
        norm, named = whitening_of(declared)
        _check_shape(path, found.images, norm)
        names = names or named
    else:
        whitening = recorded.get("whitening")
        norm = statistics_of(path, declared.mean or recorded.get("mean"), declared.std or recorded.get("std"), whitening)
    pixels = "normalised" if declared.whitened else declared.pixels or recorded.get("pixels")
    return _save_set(paths, out, found, norm, names, pixels, _parametrization_table(settings, declared.grid, recorded), declared)


def _chosen(sets: Sequence[Found], index: int | None, path: Path) -> Found:
    """Returns set number `index` of those in a file; of several the first if it is not given, with a warning."""
    number = index or 0
    if len(sets) == 1 and number:
        raise InputError(f"{path} contains one set, so --run must be 0, not {number}.")
    if not 0 <= number < len(sets):
        raise InputError(f"{path} contains {len(sets)} sets, so --run must be from 0 to {len(sets) - 1}, not {number}.")
    if len(sets) > 1 and index is None:
        log.warning("%s contains %d sets. Number 0 is imported. Use --run N for another.", path, len(sets))
    return sets[number]


def _joined(paths: Sequence[Path], parts: Sequence[Found]) -> Found:
    """Returns several sets as one, their images in the order of the files."""
    if len(parts) == 1:
        return parts[0]
    columns: list[Tensor | None] = []
    for what in ("images", "labels", "soft"):
        tensors = [plain(each, what, path) for path, part in zip(paths, parts, strict=True) if (each := getattr(part, what)) is not None]
        kinds = {(tuple(each.shape[1:]), each.dtype) for each in tensors}
        if len(kinds) > 1 or 0 < len(tensors) < len(parts):
            told = ", ".join(f"{path.name} {None if each is None else (tuple(each.shape), each.dtype)}" for path, each in (
                (path, getattr(part, what)) for path, part in zip(paths, parts, strict=True)
            ))  # fmt: skip
            raise InputError(f"Files can only be joined if their {what} have the same shape and type, but these have: {told}.")
        columns.append(torch.cat(tensors) if tensors else None)
    sizes = {part.step_size for part in parts}
    if len(sizes) > 1:
        raise InputError(f"The files record different step sizes ({', '.join(map(str, sizes))}). Import them one by one.")
    if any(part.names != parts[0].names for part in parts):
        raise InputError("The files have labels with different class names. Import them one by one.")
    assert columns[0] is not None
    return Found(columns[0], columns[1], columns[2], parts[0].step_size, parts[0].names)


def _labelled(path: Path, found: Found, wanted: Sequence[str], ipc: int | None) -> Found:
    """Returns a set with its labels: its own, those of files apart, or by count; with "argmax" rows become the likeliest class."""
    apart = [Path(each) for each in wanted if each != "argmax"]
    given = [f"--labels {each}" for each in apart] + ([f"--ipc {ipc}"] if ipc is not None else [])
    if found.labels is not None:
        refuse_unused(given, f"{path} contains the labels of its images.")
    elif len(given) > len(apart) > 0:
        raise FlagError(f"--ipc and --labels {apart[0]} both give the labels. Leave one of them out.")
    elif apart:
        tensors, texts = zip(*[_labels_of(each) for each in apart], strict=True)
        if len({each.shape[1:] for each in tensors}) > 1:
            raise InputError(
                f"The labels in the files of --labels have different shapes: {', '.join(f'{tuple(each.shape)}' for each in tensors)}."
            )
        if any(names != texts[0] for names in texts):
            raise InputError("The files of --labels have different class names. Put all labels into one file.")
        found = found._replace(labels=torch.cat(tensors), names=texts[0])
    elif ipc is not None:
        if ipc < 1 or len(found.images) % ipc:
            raise InputError(f"--ipc {ipc}: {path} contains {len(found.images)} images, which is not a multiple of {ipc}.")
        found = found._replace(labels=torch.arange(len(found.images) // ipc).repeat_interleave(ipc))
    else:
        raise InputError(
            f"{path} contains images {tuple(found.images.shape)}, but no labels. Add their file with --labels FILE. If the images are "
            "sorted by class, with the same number for each, add that number with --ipc N"
        )
    assert found.labels is not None
    labels = plain(found.labels, "labels", path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    rows = labels.float() if labels.ndim == 2 else None
    if rows is not None and bool(((rows == 0) | (rows == 1)).all()):
        if not bool((rows.sum(1) == 1).all()):
            raise InputError(f"{path}: its labels (n, K) give an image several classes, or none. Each image of a set must have one class.")
        log.warning("The labels are one-hot. They are stored as class numbers.")
        return found._replace(labels=rows.argmax(1), soft=torch.empty(0, rows.shape[1]))
    soft = rows if rows is not None and labels.is_floating_point() else found.soft
    if "argmax" in wanted:
        refuse_unused([] if soft is not None else ["--labels argmax"], f"the labels of {path} are class numbers already.")
        assert soft is not None
        return found._replace(labels=labels if labels.ndim == 1 else labels.argmax(1), soft=torch.empty(0, soft.shape[-1]))
    return found._replace(labels=labels, soft=soft)


def _labels_of(path: Path) -> tuple[Tensor, list[str] | None]:
    found, names = labels_in(read(path)[0])
    if found is None:
        raise InputError(f"--labels {path}: the file contains no labels. Labels are whole numbers or texts (n,), or rows (n, K).")
    return plain(found, "labels", path), names


def _step_size(path: Path, given: float | str | Path | None, found: Found) -> float | None:
    """Returns the step size of a set: the number that was given, that of a file, or the one that the set records, with a warning."""
    if isinstance(given, int | float):
        if not 0 < given < math.inf:
            raise FlagError(f"--step-size {given}: a learning rate must be finite and above 0.")
        return given
    if given is None and found.step_size is None:
        return None
    value = found.step_size if given is None else number_of(read(Path(given))[0])
    if value is None or not 0 < value < math.inf:
        raise InputError(f"{given or path}: the step size of a set must be one finite number above 0, but is {value}.")
    if given is None:
        log.warning("%s records the step size %g. It is kept. To train with it: --set evaluators.accuracy.lr=stored", path, value)
    return value


def _parametrization_table(settings: Mapping[str, Any], grid: int | None, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the table [parametrization] of a set: as --grid or --set say, else as the file records it."""
    makes = {path.partition(".")[2]: value for path, value in settings.items()}
    if grid is None:
        return {"use": "grid", **makes} if makes else recorded.get("parametrization", {})
    if makes:
        raise FlagError(f"--grid {grid} and --set parametrization.* set the same. Leave one of them out.")
    if not 1 <= grid <= 8:
        raise FlagError(f"--grid {grid}: use 2 to 8 for a grid of 2 x 2 to 8 x 8 images, or 1 for images that are no grids.")
    return {"use": "grid", "factor": grid} if grid > 1 else {}


def _save_set(
    paths: Sequence[Path], out: Path, found: Found, norm: Normalisation, classes: Classes, pixels: str | None, makes: Mapping[str, Any],
    declared: Declared,
) -> Artifact:  # fmt: skip
    path = paths[0]
    images = _images(path, found.images, norm, pixels)
    made = _parametrization_of(makes, images)
    labels, soft, names = _classes(path, found, classes, len(images), 1 if made is None else made.per_row)
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    if not torch.equal(order, torch.arange(len(order))):
        log.warning("The images were not sorted by class. They are now, and within each class they are in the order of the file.")
    if len(set(counts)) > 1:
        told = few([f"{name} {count}" for name, count in zip(names, counts, strict=True)], 20)
        log.warning("The classes have different numbers of images (%s). `ddkit evaluate` accepts this, `ddkit blend` does not.", told)
    if made is None and declared.grid is None and (factor := looks_like_grid(images)):
        log.warning(
            "Each image looks like a grid of %d x %d images. If it is a grid, use --grid %d, and if not, --grid 1", factor, factor, factor
        )
    if norm.whitening is None and declared.whitened is None and looks_whitened(found.images):
        log.warning(
            "The images look whitened (ZCA): their mean is 0, neighbouring pixels differ, and some values are large. If they are, use "
            "--whitened --dataset NAME, and if not, --not-whitened"
        )
    record: dict[str, Any] = {"class_names": names, "mean": list(norm.mean), "std": list(norm.std), "recipe": "imported"}
    record |= {"ipc": counts[0]} if len(set(counts)) == 1 else {}
    own = {} if found.step_size is None else {"step_size": torch.tensor(found.step_size)}
    if norm.whitening is not None:
        record["whitening"] = norm.whitening.facts
        own |= norm.whitening.tensors
        images = images if made is None else norm.normalise(images)  # as such a set stores them
    if made is not None:
        record |= made_with(made, makes["use"], images.shape[1:], whitened=norm.whitening is not None)
    if soft is not None:
        record["labels"] = "imported"
        own["soft_labels"] = soft.unflatten(0, (len(order), -1))[order].flatten(0, 1)
    result = Artifact(images[order], labels[order], record, own)
    origins = [{"path": str(each.absolute()), "sha256": sha256(each)} for each in paths]
    with RunDirectory.whole_or_absent(out) as directory:
        save_set(result, directory)
        directory.write_manifest({"steps": 0, "seconds": 0.0, "imported": origins[0] | ({"joined": origins[1:]} if origins[1:] else {})})
    return result


def _parametrization_of(makes: Mapping[str, Any], images: Tensor) -> Parametrization | None:
    """Returns what makes images of the rows `images`, None if they are images; raises InputError where these cannot be its rows."""
    made = parametrization_of({"parametrization": makes})
    if made is not None and not made.stores_images:
        raise InputError(f"parametrization.use: the parametrization '{made.name}' stores no images, so images cannot be imported with it.")
    if made is not None:
        made.check((images.shape[1], images.shape[2], images.shape[3]))
    return made


def _classes(path: Path, found: Found, classes: Classes, images: int, per_row: int) -> tuple[Tensor, Tensor | None, list[str]]:
    """Returns the label of each image (n,), int64, the soft labels of the images that they make, if there are some, and the class names."""
    labels, soft = found.labels, None
    assert labels is not None
    width = None if found.soft is None else found.soft.shape[-1]  # of rows (n, K), also of those that became classes
    if found.soft is not None and len(found.soft):
        soft = _probabilities(path, found.soft, images, per_row)
        labels = soft[:: len(soft) // images].argmax(1) if labels.ndim == 2 else labels
    whole = not labels.is_floating_point() or bool((labels == labels.long()).all())
    if labels.ndim != 1 or len(labels) != images or labels.dtype == torch.bool or not whole:
        raise InputError(f"{path}: labels are {labels.dtype} {tuple(labels.shape)}, but must be whole numbers, one for each image.")
    labels, limit = labels.long(), most_classes(images)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= limit:
        raise InputError(
            f"{path}: labels go from {low} to {high}, but must count the classes from 0 (to {limit - 1} at most for {images} images)."
        )
    if width is not None and high >= width:
        raise InputError(f"{path}: a label is {high}, but its soft labels are of {width} classes. Both must count the same classes.")
    if found.names is not None and len(found.names) < 2:
        raise InputError(f"{path}: all images have the label '{found.names[0]}', but a set needs at least two classes.")
    names = class_names_of(classes, width or high + 1, path)
    if width is not None and len(names) != width:
        raise FlagError(f"--classes has {len(names)} classes, but {path} has labels of {width}.")
    if len(names) > limit:
        raise FlagError(f"--classes has {len(names):,} classes for {images:,} images, but the limit is {limit:,}.")
    return labels, soft, names


def _check_shape(path: Path, images: Tensor, norm: Normalisation) -> None:
    """Raises InputError where images have not the shape of those that the whitening is of."""
    shape = () if norm.whitening is None else tuple(norm.whitening.centre.shape)
    if tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise InputError(
            f"{path}: whitened images must be floats of shape {shape}, like the images of --dataset, but these are {images.dtype} of shape "
            f"{tuple(images.shape[1:])}. Name the dataset from which they were made. Its image size is set by --set "
            "data.size=[HEIGHT,WIDTH]."
        )


def _probabilities(path: Path, soft: Tensor, images: int, per_row: int) -> Tensor:
    """Returns labels (n, K) as probabilities, a row for each decoded image: as they are, or softmax of other numbers, with a warning."""
    values = plain(soft, "soft labels", path).float()
    if values.ndim != 2 or values.shape[1] < 2 or len(values) not in (images, images * per_row):
        raise InputError(
            f"{path}: labels (n, K) must have one row for each of the {images} images, but have the shape {tuple(values.shape)}."
        )
    if not bool(values.isfinite().all()):
        raise InputError(f"{path}: a soft label is not finite. Leave out such images, or repair their labels.")
    if not are_probabilities(values, (len(values), values.shape[1])):
        log.warning("The labels are not probabilities (at least 0, with sum 1), so they are used as logits, and their softmax is stored.")
        values = values.softmax(1)
    return values.repeat_interleave(images * per_row // len(values), 0)


def _images(path: Path, images: Tensor, norm: Normalisation, pixels: str | None) -> Tensor:
    """Returns the images (n, C, H, W) in pixel units, float32; those with channels last or none are turned, with a warning."""
    channels = len(norm.mean)
    if images.ndim == 3 and channels == 1:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] != channels and images.shape[3] == channels:
        log.warning("The images %s have their channels last. The channels are moved to the front.", tuple(images.shape))
        images = images.permute(0, 3, 1, 2)
    if images.numel() == 0:
        raise InputError(f"{path}: the set has no image (shape {tuple(images.shape)}).")
    if images.ndim != 4 or images.shape[1] != channels:
        raise InputError(f"{path}: images have the shape {tuple(images.shape)}, but with this --mean it must be (n, {channels}, H, W).")
    found = plain(images, "images", path)
    if found.dtype == torch.uint8:
        refuse_unused(["--pixels"] if pixels else [], f"the images of {path} are bytes.")
        return to_unit(found)
    if not found.is_floating_point():
        raise InputError(f"{path}: images are {found.dtype}, but must be uint8 or floats.")
    if pixels is None:
        raise InputError(
            f"{path} does not record the unit of its images. Add --pixels normalised, or --pixels unit if 0 is black and 1 is white."
        )
    found = norm.to_pixels(found.float()) if pixels == "normalised" else found.float()
    if not bool(found.isfinite().all()):
        raise InputError(f"{path}: an image value is not finite.")
    low, high = float(found.min()), float(found.max())
    if pixels == "unit" and low >= 0 and 2 < high <= 255:
        log.warning("Pixels go from %.2f to %.2f, so they are read as 0 (black) to 255 (white) and divided by 255.", low, high)
        return found / 255
    if low < -1 or high > 2:
        log.warning("Pixels go from %.2f to %.2f, but 0 is black and 1 is white. Do --pixels, --mean and --std fit this file?", low, high)
    return found
