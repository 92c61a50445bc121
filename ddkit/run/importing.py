"""Sets and teachers that other projects published: read as tensors alone, written as ddkit's own files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ddkit.errors import InputError, refuse_unused
from ddkit.nn.teacher import Teacher
from ddkit.recipes.settings import flattened
from ddkit.run.artifact import Artifact
from ddkit.run.declared import Declared
from ddkit.run.foreign import read, sets_in, state_in
from ddkit.run.import_set import import_set
from ddkit.run.import_teacher import import_teacher


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
        return import_set(sources, contents, parts, Path(out), declared)
    if len(sources) > 1:
        without = sources[[not part for part in parts].index(True)]
        raise InputError(
            f"Several files are joined into one set, but {without} contains no set. If it contains the labels: --labels "
            f"{shlex.quote(str(without))}"
        )
    state = state_in(contents[0][0], any_names=kind == "teacher") if kind in ("auto", "teacher") else None
    if state is None:
        raise InputError(f"{sources[0]} contains {_content(contents[0][0])}. This is {_missing(kind)}.")
    return import_teacher(sources[0], state, Path(out), declared)


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
