"""Sets and teachers that other projects published: read as tensors alone, written as ddkit's own files."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddkit.components import registry, trust
from ddkit.components.base import DataInfo
from ddkit.components.options import written_options
from ddkit.data.images import Normalisation, most_classes, to_unit
from ddkit.data.loading import load_images
from ddkit.data.passed import passing
from ddkit.data.real import open_dataset
from ddkit.data.whitening import EPS, Whitening, normalisation_of
from ddkit.errors import FlagError, InputError, RunFilesError, refuse_unused
from ddkit.files import check_out, sha256
from ddkit.nn.networks import build_network
from ddkit.nn.teacher import Teacher, check_outputs, load_state, save_teacher
from ddkit.recipes.resolve import Part, flattened, resolve
from ddkit.recipes.tables import instead_of_decode
from ddkit.run.artifact import Artifact, are_probabilities, made_with, parametrization_of
from ddkit.run.directory import RunDirectory, save_set
from ddkit.run.doubts import looks_like_grid, looks_whitened
from ddkit.run.foreign import Found, fitted, labels_in, number_of, plain, read, sets_in, state_in
from ddkit.text import counted, is_text, shown

log = logging.getLogger("ddkit")

Classes = Sequence[str] | int | None
FLAGS = {"index": "--run"}  # whose name is not that of the argument
WHITENED = "with --whitened the training images of the dataset give the normalisation."
OF_WHITENING = Part(
    ("data",),
    ("data.batch", "data.test", "data.held_out", "data.whiten"),
    "--whitened uses only data.whiten_eps, data.whiten_absolute and the options of the dataset.",
)


@dataclass(frozen=True)
class Declared:
    """What `import_file` gets beside the files: each as there, `whitening` the options of `dataset`, `settings` the other ones."""

    mean: Sequence[float] | None
    std: Sequence[float] | None
    classes: Classes
    pixels: str | None
    labels: Sequence[str]
    ipc: int | None
    index: int | None
    grid: int | None
    whitened: bool | None
    dataset: Any
    whitening: Mapping[str, Any]
    step_size: float | str | Path | None
    size: Sequence[int] | None
    model: str | None
    settings: Mapping[str, Any]

    def given(self, *names: str) -> list[str]:
        """Returns the flags of those arguments that are given."""
        return [FLAGS.get(name, f"--{name}").replace("_", "-") for name in names if getattr(self, name) not in (None, [])]


def import_file(
    path: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    kind: Literal["auto", "set", "teacher"] = "auto",
    classes: Sequence[str] | int | None = None,
    pixels: Literal["normalised", "unit"] | None = None,
    labels: str | Path | Sequence[str | Path] = (),
    ipc: int | None = None,
    index: int | None = None,
    grid: int | None = None,
    whitened: bool | None = None,
    dataset: Any = None,
    step_size: float | str | Path | None = None,
    size: Sequence[int] | None = None,
    model: str | None = None,
    sets: Mapping[str, Any] | None = None,
) -> Artifact | Teacher:
    """Writes a synthetic set or a teacher of another project as ddkit's own file, and returns it.

    `path` is a file of torch.save, .npz, .npy or .safetensors, or several that are joined into one set. Only tensors and numbers are read,
    so that no code in them runs. A set is images (n, C, H, W) and labels, (n,) or rows (n, K) of probabilities or logits, and becomes the
    folder `out`. `labels` are further files with the labels; with "argmax" among them rows become the likeliest class. With `ipc` the
    images are sorted by class, `ipc` of each. `pixels` declares whether floats are normalised with `mean` and `std` or in 0..1, `index` is
    the number of the set in a file with several, and `grid` declares that each image is a grid of grid x grid images (1 for no grid).
    `whitened` declares that networks, or the teacher, see images whitened by ZCA of all training images of `dataset`, regularised as in
    `sets`: {"data.whiten_eps": 0.1}. `step_size` is the learning rate that was learned with the set, or a file with it. A teacher is a
    state dict of `model` (with the options in `sets`: {"teacher.norm": "batch"}) for images of `size` (height, width), and becomes the file
    `out`. `classes` are the class names, or their number. Values that a file records are used if they are not given: `mean`, `std` and
    `step_size`, and from ddkit's own files the class names, the grid and the unit of the pixels. Arguments without an effect on the file
    are refused. Raises DdkitError.

    Examples:
        >>> torch.save((torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 1])), "theirs.pt")
        >>> imported = ddkit.import_file("theirs.pt", "imported", pixels="unit", mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
        >>> tuple(imported.images.shape)
        (4, 3, 8, 8)
    """
    sources = [Path(each) for each in ([path] if isinstance(path, str | Path) else path)]
    settings = dict(flattened(dict(sets or {})))
    contents = [read(source) for source in sources]
    refuse_unused(["--dataset"] if dataset is not None and not whitened else [], "only --whitened uses it.")
    declared = Declared(
        mean=mean,
        std=std,
        classes=classes,
        pixels=pixels,
        labels=[str(each) for each in ([labels] if isinstance(labels, str | Path) else labels)],
        ipc=ipc,
        index=index,
        grid=grid,
        whitened=whitened,
        dataset=dataset,
        whitening={path: settings.pop(path) for path in list(settings) if whitened and path.startswith("data.")},
        step_size=step_size,
        size=size,
        model=model,
        settings=settings,
    )
    parts = [sets_in(content) if kind in ("auto", "set") else [] for content, _ in contents]
    if all(parts):
        return _import_set(sources, contents, parts, Path(out), declared)
    if len(sources) > 1:
        without = sources[[not part for part in parts].index(True)]
        raise InputError(
            f"Several files are joined into one set, but {without} contains no set. If it contains the labels: --labels "
            f"{shlex.quote(str(without))}"
        )
    state = state_in(contents[0][0], any_names=kind == "teacher") if kind in ("auto", "teacher") else None
    if state is None:
        raise InputError(f"{sources[0]} contains {_content(contents[0][0])}. This is {_missing(kind)}.")
    return _import_teacher(sources[0], state, Path(out), declared)


def _content(found: Any) -> str:
    """Returns what a file holds in words, with the shapes of its tensors."""

    def each(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__

    if isinstance(found, torch.Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, Mapping):
        return f"a dict of {', '.join(f'{key} {each(value)}' for key, value in list(found.items())[:8])}" if found else "an empty dict"
    return f"a {type(found).__name__}" + (f" of {len(found)} items" if isinstance(found, list) else "")


def _missing(kind: str) -> str:
    no_set = "not a set (tensors images (n, C, H, W) and labels (n,) in a dict or list, or a list of such pairs under `data`)"
    no_teacher = "not a teacher (a state dict of tensors by name)"
    return {"set": no_set, "teacher": no_teacher}.get(kind, f"{no_set}, and {no_teacher}")


# What is given


def _whitening(declared: Declared) -> tuple[Normalisation, list[str]]:
    """Returns the normalisation of all training images of a dataset, which whitens, and the names of its classes."""
    dataset, settings = declared.dataset, declared.whitening
    if dataset is None:
        raise InputError("--whitened computes the whitening from the training images of a dataset. Add --dataset NAME[:PATH].")
    with passing(dataset) as named, trust.granting({"dataset": dataset}, settings):
        own = {key: value for key, value in named.items() if key != "dataset"}
        recipe = {"name": "import", "data": {"whiten": True, "whiten_eps": EPS}}
        table = resolve(recipe, dataset=named["dataset"], evaluators="none", sets={**own, **settings}, part=OF_WHITENING).data
        found = open_dataset(table)
        images = load_images(found, "train", range(len(found.labels("train"))), None)
    return normalisation_of(images, table), list(found.class_names)


def _check_shape(path: Path, images: Tensor, norm: Normalisation) -> None:
    """Raises InputError where images have not the shape of those that the whitening is of."""
    shape = () if norm.whitening is None else tuple(norm.whitening.centre.shape)
    if tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise InputError(
            f"{path}: whitened images must be floats of shape {shape}, like the images of --dataset, but these are {images.dtype} of shape "
            f"{tuple(images.shape[1:])}. Name the dataset from which they were made. Its image size is set by --set "
            "data.size=[HEIGHT,WIDTH]."
        )


def _statistics(path: Path, mean: Sequence[float] | None, std: Sequence[float] | None, whitening: Whitening | None = None) -> Normalisation:
    """Returns what images are normalised with, which files of others do not record."""
    if mean is None or std is None:
        raise InputError(
            f"{path} does not record how images are normalised. Add the mean and std of each channel, for pixels in 0..1, for example "
            "--mean 0.4914,0.4822,0.4465 --std 0.2023,0.1994,0.2010"
        )
    if len(mean) != len(std) or not mean:
        raise FlagError(f"--mean has {counted(len(mean), 'value')}, but --std has {len(std)}. Both need one value per channel.")
    if not all(torch.tensor([*mean, *std]).isfinite()) or min(std) <= 0:
        raise FlagError("--mean and --std must be finite, and each std must be positive.")
    if max(mean) > 1:
        of_unit = [",".join(f"{value / 255:.4g}" for value in values) for values in (mean, std)]
        raise FlagError(
            f"--mean is for pixels in 0..1, so it is at most 1. If yours is for pixels in 0..255: --mean {of_unit[0]} --std {of_unit[1]}"
        )
    return Normalisation(mean, std, whitening)


def _names(classes: Classes, least: int, path: Path) -> list[str]:
    """Returns the class names: as given, or numbers."""
    names = [str(number) for number in range(classes)] if isinstance(classes, int) else list(classes or map(str, range(least)))
    if unwritable := [name for name in names if not is_text(name)]:
        raise InputError(f"{path}: the name of a class is not UTF-8 text ({shown(unwritable[0])}). Give the names with --classes.")
    if len(set(names)) < len(names) or not all(names):
        raise FlagError(f"--classes: each class needs its own name, but the names are {', '.join(names[:20])}.")
    if len(names) < max(least, 2):
        if not classes:
            raise InputError(f"{path} only has the label 0, but a set needs at least two classes. Name all of them with --classes.")
        raise InputError(f"{path} has the label {least - 1}, but --classes has {len(names)}. Name all classes, at least two.")
    return names


# Sets


def _import_set(
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
        norm, named = _whitening(declared)
        _check_shape(path, found.images, norm)
        names = names or named
    else:
        whitening = recorded.get("whitening")
        norm = _statistics(path, declared.mean or recorded.get("mean"), declared.std or recorded.get("std"), whitening)
    pixels = "normalised" if declared.whitened else declared.pixels or recorded.get("pixels")
    return _save_set(paths, out, found, norm, names, pixels, _parametrization(settings, declared.grid, recorded), declared)


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
            "sorted by "
            "class, with the same number for each, add that number with --ipc N"
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


def _parametrization(settings: Mapping[str, Any], grid: int | None, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
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
    path, labels = paths[0], found.labels
    images = _images(path, found.images, norm, pixels)
    made = parametrization_of({"parametrization": makes})
    if norm.whitening is not None and made is not None:
        images = norm.normalise(images)  # as such a set stores them
    width = None if found.soft is None else found.soft.shape[-1]  # of rows (n, K), also of those that became classes
    soft = None
    assert labels is not None
    if found.soft is not None and len(found.soft):
        soft = _probabilities(path, found.soft, len(images), 1 if made is None else made.per_row)
        labels = soft[:: len(soft) // len(images)].argmax(1) if labels.ndim == 2 else labels
    whole = not labels.is_floating_point() or bool((labels == labels.long()).all())
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype == torch.bool or not whole:
        raise InputError(f"{path}: labels are {labels.dtype} {tuple(labels.shape)}, but must be whole numbers, one for each image.")
    labels = labels.long()
    if int(labels.min()) < 0 or int(labels.max()) >= most_classes(len(labels)):
        most = most_classes(len(labels)) - 1
        raise InputError(
            f"{path}: labels go from {int(labels.min())} to {int(labels.max())}, but must count the classes from 0 (to {most} at most for "
            f"{len(labels)} images)."
        )
    if width is not None and int(labels.max()) >= width:
        raise InputError(
            f"{path}: a label is {int(labels.max())}, but its soft labels are of {width} classes. Both must count the same classes."
        )
    if found.names is not None and len(found.names) < 2:
        raise InputError(f"{path}: all images have the label '{found.names[0]}', but a set needs at least two classes.")
    names = _names(classes, width or int(labels.max()) + 1, path)
    if width is not None and len(names) != width:
        raise FlagError(f"--classes has {len(names)} classes, but {path} has labels of {width}.")
    if len(names) > most_classes(len(images)):
        raise FlagError(f"--classes has {len(names):,} classes for {len(images):,} images, but the limit is {most_classes(len(images)):,}.")
    order = labels.argsort(stable=True)
    if not torch.equal(order, torch.arange(len(labels))):
        log.warning("The images were not sorted by class. They are now, and within each class they are in the order of the file.")
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    record: dict[str, Any] = {"class_names": names, "mean": list(norm.mean), "std": list(norm.std), "recipe": "imported"}
    if made is not None:
        if not made.stores_images:
            raise InputError(
                f"parametrization.use: the parametrization '{made.name}' stores no images, so images cannot be imported with it."
            )
        made.check((images.shape[1], images.shape[2], images.shape[3]))
        record |= made_with(made, makes["use"], images.shape[1:], whitened=norm.whitening is not None)
    elif declared.grid is None and (factor := looks_like_grid(images)):
        log.warning(
            "Each image looks like a grid of %d x %d images. If it is a grid, use --grid %d, and if not, --grid 1", factor, factor, factor
        )
    if len(set(counts)) == 1:
        record["ipc"] = counts[0]
    else:
        told = ", ".join(f"{name} {count}" for name, count in zip(names[:20], counts, strict=False))
        log.warning("The classes have different numbers of images (%s). `ddkit evaluate` accepts this, `ddkit blend` does not.", told)
    if norm.whitening is not None:
        record["whitening"] = norm.whitening.facts
    elif declared.whitened is not False and looks_whitened(found.images):
        log.warning(
            "The images look whitened (ZCA): their mean is 0, neighbouring pixels differ, and some values are large. If they are, use "
            "--whitened --dataset NAME, and if not, --not-whitened"
        )
    own = {} if norm.whitening is None else norm.whitening.tensors
    own |= {} if found.step_size is None else {"step_size": torch.tensor(found.step_size)}
    if soft is not None:
        record["labels"] = "imported"
        own["soft_labels"] = soft.unflatten(0, (len(order), -1))[order].flatten(0, 1)
    result = Artifact(images[order], labels[order], record, own)
    origins = [{"path": str(each.absolute()), "sha256": sha256(each)} for each in paths]
    with RunDirectory.whole_or_absent(out) as directory:
        save_set(result, directory)
        directory.write_manifest({"steps": 0, "seconds": 0.0, "imported": origins[0] | ({"joined": origins[1:]} if origins[1:] else {})})
    return result


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


# Teachers


def _import_teacher(path: Path, state: Mapping[str, Tensor], out: Path, declared: Declared) -> Teacher:
    settings, size = declared.settings, declared.size
    own = ("teacher.use", "teacher.mean", "teacher.std", "teacher.classes", "teacher.check")
    unused = declared.given("pixels", "labels", "ipc", "index", "grid", "step_size")
    unused += [f"--set {each}" for each in settings if not each.startswith("teacher.") or each in own]
    refuse_unused(unused, f"{path} is a teacher, for which --set takes options of the model only, for example teacher.norm=batch.")
    refuse_unused(["--not-whitened"] if declared.whitened is False else [], f"{path} is a teacher.")
    if declared.whitened:
        refuse_unused(declared.given("mean", "std"), WHITENED)
    norm = _whitening(declared)[0] if declared.whitened else _statistics(path, declared.mean, declared.std)
    check_out(out)
    if out.exists():
        raise RunFilesError(f"--out {out} exists already. Name a new file.")
    if declared.classes is None or size is None:
        raise InputError(
            f"{path} is a state dict, which records neither classes nor image size. Add --classes 10, or the class names, and --size 32 "
            "(or height,width)."
        )
    if len(size) != 2 or min(size) < 1:
        raise FlagError(f"--size must be height and width in pixels, both at least 1, not {list(size)}.")
    names = _names(declared.classes, 2, path)
    check_outputs(path, names, state)
    info = DataInfo(class_names=tuple(names), channels=len(norm.mean), size=(int(size[0]), int(size[1])))
    if norm.whitening is not None and tuple(norm.whitening.centre.shape) != info.shape:
        raise FlagError(f"--size: the images of --dataset have the shape {tuple(norm.whitening.centre.shape)} (C, H, W), not {info.shape}.")
    table = resolve({"name": "import"}, model=declared.model, sets=settings).teacher
    with trust.granting({"model": declared.model}, settings):
        factory = registry.create("model", table.model, table.options, data=info, where="teacher")
    module = build_network(factory, info, 0, "teacher")
    built = module.state_dict()
    tensors = {name: plain(value, name, path) for name, value in fitted(state, built).items()}
    load_state(
        module, {name: value.to(built[name].dtype) if name in built else value for name, value in tensors.items()}, path, table.model
    )
    kept = {key: value for key, value in written_options(factory.options).items() if not key.startswith("weights")}  # these are newer
    record = {
        "model": registry.split_name(table.model)[0], "options": kept,
        "mean": list(norm.mean), "std": list(norm.std),
        "class_names": list(info.class_names), "input_shape": list(info.shape), "test_accuracy": None,
        "imported": {"path": str(path.absolute()), "sha256": sha256(path)},
    }  # fmt: skip
    teacher = Teacher(module, mean=norm.mean, std=norm.std, whitening=norm.whitening, info=record, path=str(out))
    save_teacher(out, teacher)
    return teacher
