"""What is where in an image folder: its class folders, its test split, the image files of a class, and what is passed over."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ddkit

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNREAD = (  # endings of images that are not read: whether Pillow can depends on how it was built
    ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpx", ".jxl",
    ".jxr", ".nef", ".nii", ".orf", ".pbm", ".pnm", ".psd", ".qoi", ".raf", ".raw", ".rw2", ".svg", ".tga",
)  # fmt: skip
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # the first that has class folders is the test split
SYSTEM = (  # what systems and programs leave behind, in lower case; hidden folders are passed over anyway
    "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "recycler", "system volume information", "lost+found", "__pycache__",
)  # fmt: skip


class Layout(NamedTuple):
    """The folder of the training classes, their names in order, the folder of the test split, and a line that tells what is not obvious."""

    train: Path
    names: list[str]
    test: Path | None
    said: str


class Walked(NamedTuple):
    """The image files of a class folder, relative to it; how many were left out, by ending; whether a run of ddkit's is inside."""

    names: list[str]
    unread: Counter[str]
    run: bool


def layout_of(root: Path) -> Layout:
    """Returns what `root` holds; raises InputError if it holds no classes, or could be read in two ways."""
    inside = subfolders(root)
    train = [name for name in inside if name.casefold() in TRAIN]
    tests = sorted((name for name in inside if name.casefold() in TEST), key=lambda name: (TEST.index(name.casefold()), name))
    others = [name for name in inside if name not in train and name not in tests]
    splits = [name for name in train if subfolders(root / name)]
    if len(splits) > 1:
        raise ddkit.InputError(f"{root} has two training splits, {_quoted(splits)}. Name one: --dataset imagefolder:{root / splits[0]}")
    base = root / splits[0] if splits else root
    names = subfolders(base) if splits else sorted([*train, *others])
    if not set(names) - set(train) and not splits:
        _raise_without_classes(root, train, tests)
    test, unlabelled = _test_split(root, tests, names)
    if splits:
        unused = [name for name in [*others, *train] if name not in splits and any_image(root / name)]
        if unused and test is None:
            raise ddkit.InputError(
                f"{root} has the folder '{splits[0]}' with class folders, and beside it {_quoted(unused)} with images: is "
                f"'{splits[0]}' the training split, or a class? If it is the training split: --dataset imagefolder:{base}. If it is a "
                "class, rename it."
            )
    else:
        unused = []
        flat = [name for name in [*train, *unlabelled] if any_image(root / name)]
        if train and len(flat) > len(train):
            raise ddkit.InputError(
                f"{root} has the class folders {_quoted(others)}, and images without class folders in {_quoted(flat)}: are these classes, "
                "or splits? Rename those that are classes, and move away those that are none."
            )
    return Layout(base, names, test, _said(test, unlabelled, unused))


def _raise_without_classes(root: Path, train: Sequence[str], tests: Sequence[str]) -> None:
    labelled = [name for name in tests if subfolders(root / name)]
    if labelled and not train:
        raise ddkit.InputError(
            f"{root} has the folder '{labelled[0]}' and no training split, which is called train. To train on a part of '{labelled[0]}' "
            f"and test on the rest: --dataset imagefolder:{root / labelled[0]}"
        )
    base = root / train[0] if train else root
    if any_image(base):
        raise ddkit.InputError(
            f"{base} holds images, and no class folders. If it is one class of several, name the folder above it: "
            f"--dataset imagefolder:{base.parent}. Else sort the images into {base}/CLASS/."
        )
    raise ddkit.InputError(f"{base} holds no class folders; the layout is {base}/CLASS/IMAGE.")


def _test_split(root: Path, tests: Iterable[str], names: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Returns the first of the folders `tests` that has class folders, and the names of the others."""
    found, rest = None, []
    for name in tests:
        inside = subfolders(root / name)
        labelled = len(inside) > 1 or bool(set(inside) & set(names))  # one that is no class holds images without labels
        if labelled and found is None:
            found = root / name
        else:
            rest.append(name)
    return found, rest


def _said(test: Path | None, unlabelled: Sequence[str], unused: Sequence[str]) -> str:
    """Returns a line about what the names alone do not tell, "" where there is nothing to tell."""
    parts = [f"the test split is '{test.name}'"] if test is not None and (test.name != "test" or unlabelled) else []
    if unlabelled and test is None:
        parts.append(f"not used, without class folders: {_quoted(unlabelled)}")
    elif unlabelled or unused:
        parts.append(f"not used: {_quoted([*unlabelled, *unused])}")
    return "; ".join(parts)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:8]) + (" ..." if len(names) > 8 else "")


def check_case(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError for class folders that are one folder on other systems, and most likely one class."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ddkit.InputError(
                f"{folder} has the class folders '{other}' and '{name}', which differ in case or accents' spelling alone. "
                "Put their images into one, or rename one."
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
            if _is_shown(name) and _is_folder(entry):
                inner = _identity(entry.path)
                if inner not in seen:
                    seen.add(inner)
                    waiting.append(f"{below}/{entry.name}" if below else entry.name)
            elif name.endswith(SUFFIXES) and not name.startswith("."):  # a pipe or a link to nothing too: refused when it is read
                images.append(entry.name)
            elif name.endswith(UNREAD) and not name.startswith("."):
                unread[os.path.splitext(name)[1]] += 1
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
    except PermissionError as error:
        raise ddkit.InputError(
            f"The folder {folder} cannot be listed: {error.strerror}. Its owner can allow it with `chmod a+rx`."
        ) from None
    except OSError as error:
        raise ddkit.InputError(f"The folder {folder} cannot be listed: {error.strerror or error}.") from None


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in SYSTEM


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        raise ddkit.InputError(
            f"The folder {os.path.dirname(entry.path)} cannot be listed: {error.strerror or error} ({entry.name}). Remove it."
        ) from None
