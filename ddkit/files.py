"""Files that are whole or absent, and names that fit any disk: all that ddkit writes goes through here.

A file is written to a temporary one, synchronised and renamed. Tensors are safetensors with ddkit's metadata and a sha256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddkit.errors import FlagError, InputError, RunFilesError
from ddkit.text import is_text, printable, shown

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
TEMPORARY = ".part"  # how the names of files end that are being written
MOST_BYTES = 2**30  # of a file that is read whole: the manifest of a run on a million files has a tenth of it
MOST_TOML = 2**22  # reading as much takes seconds
LONGEST_NAME = 100
WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for itself
KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}  # fmt: skip


# Names


def path_part(name: str) -> str:
    """Returns `name` as one part of a path, for every file system and shell; "run" if nothing of it is left.

    Letters, digits and ``._+-`` of ASCII stay, and a name of more than 100 letters is cut and ends in a digest.

    >>> path_part("../a b:c"), path_part("/"), path_part("con")
    ('a-b-c', 'run', 'run-con')
    """
    part = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "run"
    part = f"run-{part}" if WINDOWS.fullmatch(part) else part
    if len(part) <= LONGEST_NAME:
        return part
    return f"{part[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def without_folders(value: Any) -> Any:
    """Returns data of a recipe with only the last part of absolute paths: the folders are private and mean nothing on other machines.

    Examples:
        >>> ddkit.data.without_folders({"path": "/home/someone/photos", "holdout": 0.2})
        {'path': 'photos', 'holdout': 0.2}
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def with_home(text: str) -> str:
    """Returns a path, or NAME:PATH, with the user's home folder in the place of a leading `~/`; any other text as it is.

    A shell does that for a word of its own, and not within `imagefolder:~/photos` or a recipe.
    """
    found = re.match(r"(?:[\w/-]+:)?(?=~(?:/|$))", text)
    if found is None:
        return text
    home = os.path.expanduser("~")
    if home == "~":
        raise InputError(f"{text}: ~ cannot be replaced, as you have no home folder. Write the full path.")
    return f"{found[0]}{home}{text[found.end() + 1 :]}"


def check_out(path: Path) -> None:
    """Raises FlagError if the name given with --out is no UTF-8 text: files of a run, which are text, could not hold it."""
    if not is_text(str(path)) or "\0" in str(path):
        raise FlagError(f"--out {printable(str(path))} is not UTF-8 text. Use another name.")


# Reading


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file for reading; raises OSError at once for a pipe, a device, a socket or a folder.

    Examples:
        >>> with ddkit.data.open_regular("my-run/recipe.toml") as file:
        ...     content = file.read()
    """
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    mode = os.fstat(stream.fileno()).st_mode
    if not stat.S_ISREG(mode):
        stream.close()
        raise OSError(f"{path} is {kind_of(mode)}, not a regular file")
    return stream


def kind_of(mode: int) -> str:
    """Returns what a file of mode `mode` is, in words."""
    return KINDS.get(stat.S_IFMT(mode), "a regular file")


def not_permitted(path: str | Path, error: PermissionError) -> str:
    """Returns the message for a file that may not be read.

    Examples:
        >>> print(ddkit.data.not_permitted("images", PermissionError(13, "Permission denied")))
        images cannot be opened: Permission denied. Its owner can run `chmod a+r` on it, and `chmod a+x` on the folders above.
    """
    return f"{path} cannot be opened: {error.strerror}. Its owner can run `chmod a+r` on it, and `chmod a+x` on the folders above."


def read_bytes(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """Returns the content of a regular file; raises OSError if it cannot be read, is another thing, or has more than `most` bytes."""
    with open_regular(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path} is larger than {most / 2**20:,.0f} MiB, the limit for such a file")
    return content


def read_text(path: str | Path, *, most: int = MOST_BYTES) -> str:
    """Returns the content of a regular file of UTF-8 text; raises OSError as read_bytes does, or ValueError."""
    return read_bytes(path, most=most).decode()


def natural(name: str) -> tuple[list[Any], str]:
    """Returns a key by which names sort with the numbers in them as numbers: 2 before 10, "class 2" before "class 10".

    Examples:
        >>> sorted(["class 10", "class 2"], key=ddkit.data.natural)
        ['class 2', 'class 10']
    """
    parts = re.split(r"(\d+)", name)
    parts[1::2] = [(len(digits), digits) for part in parts[1::2] for digits in [part.lstrip("0")]]  # as numbers of any length
    return parts, name


def sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Writing


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` so that `path` is either as before or whole; raises RunFilesError if it cannot be written."""
    replace_whole(path, lambda temporary: Path(temporary).write_bytes(content))


def replace_whole(path: Path, write: Callable[[str], object]) -> None:
    """Puts what `write(NAME)` writes in the place of `path`, or leaves all as it was and raises RunFilesError."""
    temporary: str | None = None
    try:
        temporary, mode = _beside(path)
        write(temporary)
        with os.fdopen(os.open(temporary, os.O_RDWR), "rb+") as stream:
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
        sync(path.parent)
    except OSError as error:
        raise RunFilesError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _beside(path: Path) -> tuple[str, int]:
    """Makes an empty file beside `path`; returns its name, and the permissions that a new file has there."""
    name = path.parent / f".{path.name}.{os.urandom(4).hex()}{TEMPORARY}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    return str(name), mode


def check_writable(path: Path) -> None:
    """Raises RunFilesError if a file cannot be written at `path`; whatever is there stays."""
    try:
        Path(_beside(path)[0]).unlink()
    except OSError as error:
        raise RunFilesError(f"{path} cannot be written: {error.strerror or error}.") from None


@contextmanager
def folders_of(path: Path) -> Iterator[None]:
    """Makes the folders that `path` lacks; where the work inside fails, those that it left empty are removed again."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        obstacle = next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None)
        why = f"{obstacle} is not a folder" if obstacle else error.strerror or error
        raise RunFilesError(f"{path} cannot be written: {why}.") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file, which is no link; raises RunFilesError if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as stream:
            stream.write(text)
    except OSError as error:
        raise RunFilesError(f"{path} cannot be written: {error.strerror or error}.") from error


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of writes that were killed; only for those who know that nobody is writing in `folder`."""
    for file in folder.glob(".*"):
        if is_leftover(file) and not file.is_dir():
            file.unlink(missing_ok=True)


def is_leftover(file: Path) -> bool:
    """Whether a file has the name of one that was being written: `.NAME.XXXXXXXX.part`, or `.tmpXXXXXX` of the library safetensors."""
    own = rf"\..+\.(toml|json|jsonl|safetensors|png|html)\.\w{{8}}{re.escape(TEMPORARY)}"
    return re.fullmatch(rf"{own}|\.tmp[0-9A-Za-z]{{6}}", file.name) is not None


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# JSON


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented, with a final newline; NaN is refused."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Returns what a JSON file holds, indented, with a final newline; raises ValueError for NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; raises RunFilesError naming it."""
    try:
        return parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise RunFilesError(f"{path} cannot be read: {error}.") from None


def parse_json(content: str | bytes) -> Any:
    """Returns JSON data, in which numbers are finite and of 64 bits at most, and text can be written as UTF-8; raises ValueError."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{shown(text)} is not a finite number")
        return float(text)

    def whole(text: str) -> int:
        if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
            raise ValueError(f"{shown(text)} is a number of more than 64 bits")
        return int(text)

    try:
        found = json.loads(content, parse_constant=no_constant, parse_float=finite, parse_int=whole)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def json_digest(value: Any) -> str:
    """Returns the sha256 of JSON data, whatever the order of its keys and its layout."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def with_digest(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON data with the sha256 of all of it under "digest"."""
    return {**table, "digest": json_digest(table)}


def read_with_digest(path: Path) -> dict[str, Any]:
    """Returns what `with_digest` was given, from a JSON file; raises RunFilesError where it was changed since.

    A file without a digest passes. Version 0.1 also wrote "sealed": true.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise RunFilesError(f"{path} does not contain a JSON object.")
    digest = found.pop("digest", None)
    if digest != json_digest(found) and (digest is not None or "sealed" in found):
        raise RunFilesError(f"{path} is damaged or was edited. Its content does not match the sha256 that is recorded in it.")
    found.pop("sealed", None)
    return found


# Tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file whose metadata key "ddkit" holds `metadata` and the schema number as JSON.

    The JSON also has the sha256 of tensors and metadata, so that reading finds damage. The file is whole or as before; raises
    RunFilesError where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous, header = _as_written(tensors, metadata)

    def write(temporary: str) -> None:
        try:
            save_file(contiguous, temporary, {"ddkit": header})  # `save` would hold the tensors three times
        except SafetensorError as error:
            raise OSError(str(error)) from error

    replace_whole(path, write)


def tensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Returns what write_tensors writes."""
    from safetensors.torch import save

    contiguous, header = _as_written(tensors, metadata)
    return save(contiguous, {"ddkit": header})


def _as_written(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    record = {"schema": SCHEMA, **metadata, "sealed": True}  # that there is a digest: a turned bit may be in the word "digest" too
    record["digest"] = tensors_digest(contiguous, record)
    return contiguous, json.dumps(record, sort_keys=True, allow_nan=False)


def tensors_digest(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """Returns the sha256 of `record` as JSON, then of name, dtype, shape and bytes of every tensor in order of name."""
    digest = hashlib.sha256(json_digest(dict(record)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """Returns the bytes of a tensor on the CPU, as hashlib takes them."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def machine_bytes() -> int:
    """Returns the memory of this machine in bytes; where the system does not tell, more than any has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 2**63


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (tensors, ddkit metadata or {}) of a safetensors file; raises ValueError saying what is wrong with it.

    The tensors and the metadata must match the sha256 that the file records; a file without one passes.
    """
    from safetensors import safe_open

    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size > machine_bytes():
            raise ValueError(f"it needs {size / 2**30:,.0f} GiB, and this machine has {machine_bytes() / 2**30:,.0f} GiB of memory")
        with safe_open(str(path), framework="pt") as stream:
            header = (stream.metadata() or {}).get("ddkit", "{}")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        record = parse_json(header)
    except Exception as error:  # the parser has errors of its own, and torch raises for a dtype that it does not know
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"the ddkit metadata of {path} is not a JSON object")
    if record and record.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {shown(record.get('schema'))}, but this version of ddkit reads schema {SCHEMA}")
    digest = record.pop("digest", None)
    if (digest is not None or "sealed" in record) and digest != tensors_digest(tensors, record):
        raise ValueError(f"{path} is damaged: its content does not match the sha256 that is recorded in it")
    record.pop("sealed", None)
    return tensors, record
