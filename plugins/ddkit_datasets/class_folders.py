"""Class folders: which folders below a root are splits and which are classes, which files in them are images, and what is passed over."""

from __future__ import annotations

import itertools
import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ddkit
from ddkit_datasets.splits import TEST, TRAIN
from ddkit_datasets.tables import table_in

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNREAD = (  # endings of images, arrays and films that are not read: whether Pillow can depends on how it was built
    ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpx", ".jxl",
    ".jxr", ".mat", ".mov", ".mp4", ".nef", ".nii", ".npy", ".npz", ".orf", ".pbm", ".pnm", ".psd", ".qoi", ".raf", ".raw", ".rw2", ".svg",
    ".tga",
)  # fmt: skip
SYSTEM = (  # what systems and programs leave behind, in lower case; hidden folders are passed over anyway
    "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "recycler", "system volume information", "lost+found", "__pycache__",
)  # fmt: skip


class Walked(NamedTuple):
    """The image files of a class folder, relative to it; how many were left out, by ending; whether a run of ddkit's is inside."""

    names: list[str]
    unread: Counter[str]
    run: bool


def layout_of(root: Path) -> tuple[Path, list[str], Path | None, str]:
    """Returns the folder of the training classes, their names, the folder of the test split, and a line that says what is not obvious.

    Raises InputError if `root` holds no classes, or could be read in two ways.
    """
    inside = subfolders(root)
    if len(inside) == 1 and any(name.casefold() in TRAIN for name in subfolders(root / inside[0])):
        found = layout_of(root / inside[0])
        return (*found[:3], "; ".join([f"the images are in '{inside[0]}'", *filter(None, found[3:])]))
    train = [name for name in inside if name.casefold() in TRAIN]
    tests = sorted((name for name in inside if name.casefold() in TEST), key=lambda name: (TEST.index(name.casefold()), name))
    others = [name for name in inside if name not in train and name not in tests]
    splits = [name for name in train if subfolders(root / name)]
    if len(splits) > 1:
        raise ddkit.InputError(
            f"{root} has two training splits, {quoted(splits)}. Name one of them: --dataset "
            f"{shlex.quote(f'imagefolder:{root / splits[0]}')}"
        )
    base = root / splits[0] if splits else root
    names = subfolders(base) if splits else sorted([*train, *others])
    if not names and len(tests) == 1 and len(subfolders(root / tests[0])) > 1:
        base = root / tests[0]
        return (
            base,
            subfolders(base),
            None,
            f"there is no training split, so '{tests[0]}' is used for training, except a part that is held out for testing",
        )
    if not set(names) - set(train) and not splits:
        raise ddkit.InputError(_without_classes(root, train, tests))
    test, unlabelled = None, []
    for name in tests:
        below = subfolders(root / name)
        labelled = len(below) > 1 or set(below) & set(names)  # one that is no class holds images without labels
        if test is None and (labelled or table_in(root / name)):
            test = root / name
        else:
            unlabelled.append(name)
    if splits:
        unused = [name for name in [*others, *train] if name not in splits and any_image(root / name)]
        if unused and test is None:
            raise ddkit.InputError(
                f"{root} has the folder '{splits[0]}' with class folders, and also {quoted(unused)} with images. If "
                f"'{splits[0]}' is the training split, use --dataset {shlex.quote(f'imagefolder:{base}')} instead. If it is a "
                "class, rename it."
            )
    else:
        unused = []
        flat = [name for name in [*train, *unlabelled] if any_image(root / name)]
        if train and len(flat) > len(train):
            raise ddkit.InputError(
                f"{root} has the class folders {quoted(others)}, and images without class folders in {quoted(flat)}. These can be "
                "classes or splits. Rename the folders that are classes, and move the others away."
            )
    said = [f"the test split is '{test.name}'"] if test is not None and (test.name != "test" or unlabelled) else []
    if unlabelled and test is None:
        said.append(f"not used, without class folders: {quoted(unlabelled)}")
    elif unlabelled or unused:
        said.append(f"not used: {quoted([*unlabelled, *unused])}")
    return base, names, test, "; ".join(said)


def innermost(root: Path, names: Iterable[str]) -> list[str]:
    """Returns the folders that hold images themselves among `names` in `root` and below; raises InputError if one lies in another."""
    found = sorted({str(Path(name, file).parent) for name in names for file in walk(root / name).names})
    for outer, inner in itertools.pairwise(found):
        if inner.startswith(f"{outer}/"):
            raise ddkit.InputError(
                f"data.nested: {root / outer} and '{inner}' inside it both contain images, but only one can be a class. Move the images "
                "of the other.",
                "data.nested",
            )
    return found


def _without_classes(root: Path, train: Sequence[str], tests: Sequence[str]) -> str:
    """Returns what is wrong with a folder that holds no class folders, and how to name the right one."""
    labelled = [name for name in tests if subfolders(root / name)]
    if labelled and not train:
        return (
            f"{root} has the folder '{labelled[0]}', but no training split named train. To train on a part of '{labelled[0]}' "
            f"and test on the rest: --dataset {shlex.quote(f'imagefolder:{root / labelled[0]}')}"
        )
    base = root / train[0] if train else root
    if packed := packed_in(root):
        return f"{root} contains no class folders. {packed}"
    if any_image(base):
        return (
            f"{base} contains images, but no class folders. If it is one of several classes, name the folder above it: "
            f"--dataset {shlex.quote(f'imagefolder:{base.parent}')}. If not, sort the images into {base}/CLASS/."
        )
    return f"{base} contains no class folders. The layout must be {base}/CLASS/IMAGE."


def packed_in(root: Path) -> str:
    """Returns what a folder, or a file, holds in the place of image files, and how to use that; "" if it holds none of it."""
    files = [root.name] if root.is_file() else [path.name for pattern in ("*", "*/*") for path in root.glob(pattern)]
    for endings, what, dataset, extra in (
        ((".arrow", ".parquet"), "files of the library datasets of Hugging Face", "huggingface", "datasets"),
        ((".tar", ".tar.gz", ".tgz"), "tar files, as of WebDataset", "webdataset", "webdataset"),
    ):
        if any(name.endswith(endings) for name in files):
            return f"It has {what}. Use --dataset {shlex.quote(f'{dataset}:{root}')} (which needs pip install 'ddkit[{extra}]')"
    return ""


def quoted(names: Sequence[str]) -> str:
    return ddkit.data.few([f"'{name}'" for name in names], 8)


def check_case(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError for class folders that are one folder on other systems, and most likely one class."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ddkit.InputError(
                f"{folder} has the class folders '{other}' and '{name}', which differ only in case or in the encoding of accents. "
                "Merge them, or rename one of them."
            )


def subfolders(folder: Path) -> list[str]:
    """Returns the names of the folders in `folder`, sorted, without hidden ones and those of systems."""
    return sorted(entry.name for entry in _entries(folder) if _is_shown(entry.name) and _is_folder(entry))


def any_image(folder: Path) -> bool:
    """Whether there is an image file in a folder, or in one below it; runs of ddkit's do not count."""
    return bool(walk(folder).names)


def walk(folder: Path) -> Walked:
    """Returns the image files below a folder, in the order in which torchvision lists them: by folder, then by name.

    Hidden files (macOS leaves ._NAME.png beside NAME.png), folders of systems and runs of ddkit's are passed over. Links are followed; a
    folder that is met twice is listed once, so that links in a circle end.
    """
    found: list[tuple[str, list[str]]] = []
    unread: Counter[str] = Counter()
    run, seen, waiting = False, {_identity(folder)}, [""]
    while waiting:
        below = waiting.pop()
        entries = _entries(folder / below)
        names = {entry.name for entry in entries}
        run |= ".lock" in names  # of a run that has nothing else yet
        if "synthetic.safetensors" in names or {"recipe.toml", "metrics.jsonl"} <= names:
            run = True
            continue
        images: list[str] = []
        for entry in entries:
            name = entry.name.lower()
            if not _is_shown(name):
                continue
            if _is_folder(entry):
                inner = _identity(entry.path)
                if inner not in seen:
                    seen.add(inner)
                    waiting.append(f"{below}/{entry.name}" if below else entry.name)
            elif name.endswith(SUFFIXES):  # a pipe or a link to nothing too: refused when it is read
                images.append(entry.name)
            elif name.endswith(UNREAD) or "." not in name:
                unread[os.path.splitext(name)[1] or "without a suffix"] += 1
        found.append((below, sorted(images)))
    return Walked([f"{below}/{name}" if below else name for below, names in sorted(found) for name in names], unread, run)


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Returns what is in a folder; whether an entry is a file is known from the listing, without looking at each."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        helps = " Its owner can run `chmod a+rx` on it." if isinstance(error, PermissionError) else ""
        raise ddkit.InputError(f"The folder {folder} cannot be listed: {error.strerror or error}.{helps}") from None


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in SYSTEM


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        raise ddkit.InputError(
            f"The folder {os.path.dirname(entry.path)} cannot be listed: {error.strerror or error} ({entry.name}). Remove it."
        ) from None
