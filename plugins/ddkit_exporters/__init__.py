"""Exporters: image folders, NumPy arrays, a picture of the whole set; each with a data set card beside."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ddkit
from ddkit_exporters.card import Layout, eight_bit, write_card

NPZ, SHEET, ZCA, CLASSES, METADATA, SOFT = (
    "synthetic.npz",
    "sheet.png",
    "whitening.npz",
    "classes.json",
    "metadata.jsonl",
    "soft_labels.csv",
)
LONGEST = 200  # bytes of a folder's name; file systems take 255
WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
SPLITS = re.compile(r"(?<![^-._ 0-9])(?=(?:train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?![^-._ 0-9]))")
LOAD_NPZ = [
    "import numpy as np",
    "",
    f'data = np.load("{NPZ}")',
    'images, labels, names = data["x_train"], data["y_train"], data["class_names"]  # pixel units, 0 to 1, not clipped',
    'inputs = (images - data["mean"].reshape(1, -1, 1, 1)) / data["std"].reshape(1, -1, 1, 1)',
]
WHITENED = [  # the last lines in their place, of a set whose networks see whitened images
    'rows = (images - data["whitening.centre"]).reshape(len(images), -1)',
    'vectors, gains = data["whitening.vectors"], data["whitening.gains"]',
    "inputs = gains[-1] * rows + (rows @ vectors.T * (gains[:-1] - gains[-1])) @ vectors",
    "inputs = inputs.reshape(images.shape)  # whitened; do the same to test images",
]


class Npz(ddkit.Exporter):
    """Exact NumPy arrays in one .npz file: x_train, y_train, class_names, mean and std, readable without pickle.

    `x_train` (n, C, H, W) is float32 in pixel units, `y_train` (n,) int64; `mean` and `std` (C,) are float32. `unclipped` says
    that values may be outside 0..1, which the dataset `npz:PATH` then accepts.
    Labels that are not hard are `soft_labels` (n, K). For a whitened set there are the three tensors of its whitening, and plain images.
    """

    def __call__(self, artifact: ddkit.Artifact, folder: str) -> None:
        arrays: dict[str, Any] = {
            "x_train": np.ascontiguousarray(artifact.images),
            "y_train": np.ascontiguousarray(artifact.labels),
            "class_names": np.array(artifact.class_names, dtype=np.str_),
            "mean": np.array(artifact.mean, dtype=np.float32),
            "std": np.array(artifact.std, dtype=np.float32),
            "unclipped": np.array(True),
        }
        if artifact.soft_labels is not None:
            arrays["soft_labels"] = np.ascontiguousarray(artifact.soft_labels)
        np.savez(Path(folder, NPZ), **arrays | _whitening(artifact))
        load = LOAD_NPZ if artifact.whitening is None else [*LOAD_NPZ[:-1], *WHITENED]
        write_card(artifact, folder, Layout(load, files=[Path(folder, NPZ)]))


class ImageFolder(ddkit.Exporter):
    """PNG files in class folders, train/CLASS/0001.png, for torchvision's ImageFolder and Hugging Face's imagefolder.

    PNG has 8 bits, so values are clipped to 0..1 and rounded to 256 levels, and the card has the largest error. A class name
    that cannot be a folder name is escaped, "a/b" as "a%2Fb"; `classes.json` and `train/metadata.jsonl` have the original names.
    Labels that are not hard are in `soft_labels.csv`, with a line for each file and the probability of each class.
    The whitening of a set is in `whitening.npz`, and the pictures are plain.
    """

    def __call__(self, artifact: ddkit.Artifact, folder: str) -> None:
        _check_channels("imagefolder", artifact)
        pixels, rounding = eight_bit(artifact.images)
        folders = folder_names(artifact.class_names)
        rows, order = [], []
        for label in sorted(set(artifact.labels.tolist())):
            Path(folder, "train", folders[label]).mkdir(parents=True)
            own = (artifact.labels == label).nonzero().flatten()
            mine = pixels[own]
            for number, image in enumerate(mine, 1):
                name = f"{folders[label]}/{number:0{max(4, len(str(len(mine))))}d}.png"
                grid = image[0] if len(image) == 1 else image.permute(1, 2, 0)
                Image.fromarray(np.ascontiguousarray(grid)).save(Path(folder, "train", name), format="PNG")
                rows.append({"file_name": name, "label": label, "class_name": artifact.class_names[label]})
            order += own.tolist()
        Path(folder, "train", METADATA).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        if artifact.soft_labels is not None:
            with Path(folder, SOFT).open("w", encoding="utf-8", newline="") as stream:
                lines = [[row["file_name"], *soft] for row, soft in zip(rows, artifact.soft_labels[order].tolist(), strict=True)]
                csv.writer(stream, lineterminator="\n").writerows([["file_name", *artifact.class_names], *lines])
        count = artifact.labels.bincount(minlength=len(folders)).tolist()
        classes = [
            {"label": label, "name": name, "folder": folders[label], "images": count[label]}
            for label, name in enumerate(artifact.class_names)
        ]  # fmt: skip
        Path(folder, CLASSES).write_text(json.dumps(classes, indent=2) + "\n", encoding="utf-8")
        mean, std = ([float(f"{value:.6g}") for value in values] for values in (artifact.mean, artifact.std))
        grey = "t.Grayscale(), " if artifact.images.shape[1] == 1 else ""
        made = f"t.Normalize({mean}, {std})"
        read = []
        if artifact.whitening is not None:
            np.savez(Path(folder, ZCA), **_whitening(artifact))
            made = 't.LinearTransformation(matrix, data["whitening.centre"].flatten())'
            read = [
                "import numpy as np",
                "import torch",
                f'data = {{name: torch.tensor(array) for name, array in np.load("{ZCA}").items()}}',
                'vectors, gains = data["whitening.vectors"], data["whitening.gains"]',
                "matrix = gains[-1] * torch.eye(vectors.shape[1]) + (vectors.T * (gains[:-1] - gains[-1])) @ vectors",
            ]
        load = [
            *read,
            "from torchvision import transforms as t",
            "from torchvision.datasets import ImageFolder",
            "",
            f"transform = t.Compose([{grey}t.ToTensor(), {made}])",
            'data = ImageFolder("train", transform)  # labels in alphabetical order of the folders: data.classes',
        ]
        write_card(artifact, folder, Layout(load, folders=folders, rounding=rounding))


class Sheet(ddkit.Exporter):
    """One PNG picture of the set: a row for each class with its name at the left, enlarged by whole pixels."""

    columns: int = ddkit.option(20, "largest number of images per class", ge=1)

    def __call__(self, artifact: ddkit.Artifact, folder: str) -> None:
        _check_channels("png", artifact)
        picture = ddkit.data.sheet_png(artifact.stored_images, artifact.stored_labels, artifact.class_names, columns=self.columns)
        Path(folder, SHEET).write_bytes(picture)
        write_card(artifact, folder, Layout((), files=[Path(folder, SHEET)], rounding=eight_bit(artifact.images)[1]))


def _whitening(artifact: ddkit.Artifact) -> dict[str, Any]:
    """Returns the arrays of a set's whitening, by the names of its tensors; {} if it has none."""
    return {} if artifact.whitening is None else {name: np.asarray(tensor) for name, tensor in artifact.whitening.tensors.items()}


def _check_channels(name: str, artifact: ddkit.Artifact) -> None:
    channels = artifact.images.shape[1]
    if channels not in (1, 3):
        raise ddkit.InputError(f"The exporter '{name}' writes images of 1 or 3 channels, but this set has {channels}. Use --to npz.")


def folder_names(names: Sequence[str]) -> list[str]:
    """Returns a folder name for each class name, all different, also on disks that take capitals for small letters.

    Letters, digits, "-", "_", "." and spaces stay; anything else is %XX, its bytes in UTF-8. So are a first or last dot or
    space, and the first letter of what Windows keeps for itself and of what Hugging Face takes for the name of a split.
    """
    found: list[str] = []
    taken: set[str] = set()
    for label, name in enumerate(names):
        text = "".join(char if char.isalnum() or char in "-_. " else _percent(char) for char in name)
        if text[:1] in (".", " ") or WINDOWS.fullmatch(text):
            text = _percent(text[0]) + text[1:]
        if text[-1:] in (".", " "):
            text = text[:-1] + _percent(text[-1])
        while match := SPLITS.search(text):
            text = text[: match.start()] + _percent(text[match.start()]) + text[match.start() + 1 :]
        if len(text.encode()) > LONGEST:
            cut = text.encode()[: LONGEST - 9].decode(errors="ignore")
            text = f"{cut}~{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
        text = text or "%"
        if text.casefold() in taken:
            text = f"{text}~{label}"
        taken.add(text.casefold())
        found.append(text)
    return found


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogatepass"))
