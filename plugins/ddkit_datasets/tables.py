"""Labels that stand in a table beside the images: metadata.csv and metadata.jsonl, any CSV or JSONL, Tiny-ImageNet's annotations."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import ddkit
from ddkit_datasets.splits import TEST, TRAIN

TABLES = (".csv", ".tsv", ".jsonl")
NAMES = ("metadata.csv", "metadata.jsonl")  # as Hugging Face calls the table of an image folder
FILE = ("file_name", "filename", "file", "path", "file_path", "filepath", "image", "image_path", "image_file")
LABEL = ("label", "class", "category", "target", "class_name", "label_name")
SPLIT = ("split", "subset", "partition")


class Row(NamedTuple):
    """An image of a table: its file, its label, and the name of its split, "" where the table does not tell one."""

    file: str
    label: str
    split: str


def table_in(folder: Path) -> Path | None:
    """Returns the table that lies in a folder: metadata.csv, metadata.jsonl, or FOLDER_annotations.txt, as in Tiny-ImageNet's val."""
    return next((folder / name for name in (*NAMES, f"{folder.name}_annotations.txt") if (folder / name).is_file()), None)


def read_table(table: Path, root: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Returns the images of a table, [] if it has no column of labels; their files are relative to `root`, a folder that holds the table.

    `columns` are those of file and label. Raises InputError naming the line of a row that cannot be used.
    """
    records = list(_records(table))
    if not records:
        raise ddkit.InputError(f"{table} lists no image.")
    file, label, split = _columns(table, list(records[0][1]), columns)
    if not label:
        return []
    below = "images" if table.suffix == ".txt" else ""
    found: dict[str, Row] = {}
    for number, record in records:
        where = f"{table}, line {number}"
        name, value = (label_text(record.get(column), where, column) for column in (file, label))
        path = os.path.relpath(os.path.join(table.parent, below, name), root)
        if path.startswith("..") or "\0" in path:
            raise ddkit.InputError(f"{where}: '{name}' is not inside {root}. Move the file there.")
        if path in found:
            raise ddkit.InputError(f"{where}: '{name}' is listed twice, but each image needs exactly one label.")
        if not (root / path).exists():
            raise ddkit.InputError(f"{where}: there is no file {root / path}. File names must be relative to the folder of the table.")
        named = str(record.get(split) or "").strip() if split else ""
        if named and named.casefold() not in (*TRAIN, *TEST):
            raise ddkit.InputError(f"{where}: the split is '{named}', but must be one of {', '.join((*TRAIN, *TEST))}.")
        top = PurePath(path).parts[0]
        found[path] = Row(PurePath(path).as_posix(), value, named or (top if top.casefold() in (*TRAIN, *TEST) else ""))
    return sorted(found.values())


def _records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields line number and values by column of each row; Tiny-ImageNet's annotations have no header: file, class, box."""
    try:
        with ddkit.data.open_regular(table) as stream:
            text = stream.read().decode("utf-8-sig")
        if table.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), start=1):
                try:
                    record = json.loads(line) if line.strip() else None
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from None
                if record is not None and not isinstance(record, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                if record is not None:
                    yield number, record
            return
        lines = text.splitlines()
        header = ["file", "class"] if table.suffix == ".txt" else None
        first = lines[0] if lines else ""
        reader = csv.DictReader(lines, header, delimiter=max(("\t", ",", ";"), key=first.count))
        for record in reader:
            yield reader.line_num, {key: value for key, value in record.items() if key is not None}
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ddkit.InputError(f"The table {table} cannot be read: {error}.") from None


def _columns(table: Path, known: Sequence[str], given: Sequence[str]) -> tuple[str, str, str]:
    """Returns the columns of file, label and split; "" for one that is not there. Raises InputError where that of the file is not."""

    def first(names: Sequence[str]) -> str:
        return next((column for name in names for column in known if column.strip().casefold() == name), "")

    lacking = [name for name in given if name not in known]
    file, label = given if given and not lacking else (first(FILE), first(LABEL))
    if lacking or not file or (not label and table.name not in NAMES):
        what = f"no column '{lacking[0]}'" if lacking else "no column with a known name for files or labels"
        raise ddkit.InputError(
            f"{table} has {what}. Its columns are {', '.join(known)}. Name the columns of file and label: --set "
            '\'data.columns=["FILE","LABEL"]\'',
            "data.columns",
        )
    return file, label, first(SPLIT)


def label_text(value: Any, where: str, column: str) -> str:
    """Returns a file's name or a label as text; whole floats, which other programs make of integers, lose their .0."""
    if isinstance(value, list | dict):
        raise ddkit.InputError(f"{where}: {column} has several values ({str(value)[:60]}), but each image needs exactly one label.")
    text = "" if value is None else str(value).strip()
    if not text:
        raise ddkit.InputError(f"{where}: {column} is empty.")
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text
