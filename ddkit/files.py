"""Files that are whole or absent: temporary file, fsync, rename; and safetensors with ddkit's metadata."""

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

from ddkit.errors import InputError, RunFilesError, shown

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
TEMPORARY = ".part"  # how the names of files end that are being written
MOST_BYTES = 2**30  # of a file that is read whole: the manifest of a run on a million files has a tenth of it
MOST_TOML = 2**22  # reading as much takes seconds
KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}  # fmt: skip


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file to be read; raises OSError, at once, if a pipe, a device, a socket or a folder is in its place."""
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    mode = os.fstat(stream.fileno()).st_mode
    if not stat.S_ISREG(mode):
        stream.close()
        raise OSError(f"{path} is {kind_of(mode)}, not a regular file")
    return stream


def not_permitted(path: str | Path, error: PermissionError) -> str:
    """Returns what to say of a file that may not be read."""
    return f"{path} cannot be opened: {error.strerror}. Its owner can allow it with `chmod a+r`; the folders above it need x."


def kind_of(mode: int) -> str:
    """Returns what a file of mode `mode` is, in words."""
    return KINDS.get(stat.S_IFMT(mode), "a regular file")


def read_bytes(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """Returns the content of a regular file; raises OSError if it cannot be read, is another thing, or has more than `most` bytes."""
    with open_regular(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path} has more than {most / 2**20:,.0f} MiB, the most that is read of such a file")
    return content


def read_text(path: str | Path, *, most: int = MOST_BYTES) -> str:
    """Returns the content of a regular file of UTF-8 text; raises OSError as read_bytes does, or ValueError."""
    return read_bytes(path, most=most).decode()


def with_home(text: str) -> str:
    """Returns a path, or NAME:PATH, with the user's home folder in the place of a leading `~/`; any other text as it is.

    A shell does that for a word of its own, and not within `imagefolder:~/photos` or a recipe.
    """
    found = re.match(r"(?:[\w/-]+:)?(?=~(?:/|$))", text)
    if found is None:
        return text
    home = os.path.expanduser("~")
    if home == "~":
        raise InputError(f"{text}: you have no home folder that ~ could stand for. Write the path in full.")
    return f"{found[0]}{home}{text[found.end() + 1 :]}"


def machine_bytes() -> int:
    """Returns the memory of this machine in bytes; where the system does not tell, more than any has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` so that `path` is either as before or whole; raises RunFilesError where it cannot be written."""
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
        why = f"{obstacle} is no folder" if obstacle else error.strerror or error
        raise RunFilesError(f"{path} cannot be written: {why}.") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def _beside(path: Path) -> tuple[str, int]:
    """Makes an empty file beside `path`; returns its name, and the permissions that a new file has there."""
    name = path.parent / f".{path.name}.{os.urandom(4).hex()}{TEMPORARY}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    return str(name), mode


def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file, which is no link; raises RunFilesError if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | NOFOLLOW, 0o666)) as stream:
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
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    try:
        found = json.loads(content, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return found


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{shown(text)} is no finite number")
    return found


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"{shown(text)} is a number of more than 64 bits")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def sealed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON data with the sha256 of all of it under "digest", and under "sealed" that there is one."""
    marked = {**table, "sealed": True}
    return marked | {"digest": json_digest(marked)}


def unsealed(table: Any, path: Path) -> dict[str, Any]:
    """Returns what `sealed` was given; raises RunFilesError where `table`, read from `path`, was changed since.

    A table without a seal passes.
    """
    if not isinstance(table, dict):
        raise RunFilesError(f"{path} holds no JSON object.")
    found = {key: value for key, value in table.items() if key != "digest"}
    if _is_broken(table, lambda: json_digest(found)):
        raise RunFilesError(f"{path} is damaged, or was edited: its content does not match the sha256 that it records.")
    found.pop("sealed", None)
    return found


def _is_broken(record: Mapping[str, Any], digest: Callable[[], str]) -> bool:
    """Whether the content of a record is not that of its digest, or its digest is gone: a turned bit may be in the word "digest" too."""
    recorded = record.get("digest")
    return "sealed" in record if recorded is None else recorded != digest()


def json_digest(value: Any) -> str:
    """Returns the sha256 of JSON data, whatever the order of its keys and its layout."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, digest: bool = True) -> None:
    """Writes a safetensors file whose metadata key "ddkit" holds `metadata` and the schema number as JSON.

    With `digest` the JSON also has the sha256 of tensors and metadata, so that reading finds damage. The file is whole or as
    before; raises RunFilesError where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous, header = _as_written(tensors, metadata, digest=digest)

    def write(temporary: str) -> None:
        try:
            save_file(contiguous, temporary, {"ddkit": header})  # `save` would hold the tensors three times
        except SafetensorError as error:
            raise OSError(str(error)) from error

    replace_whole(path, write)


def tensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Returns what write_tensors writes, with a digest."""
    from safetensors.torch import save

    contiguous, header = _as_written(tensors, metadata, digest=True)
    return save(contiguous, {"ddkit": header})


def _as_written(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, digest: bool) -> tuple[dict[str, Tensor], str]:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    record = {"schema": SCHEMA, **metadata}
    record |= {"sealed": True} if digest else {}
    record |= {"digest": tensors_digest(contiguous, record)} if digest else {}
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


def read_tensors(path: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (tensors, ddkit metadata or {}) of a safetensors file; raises ValueError saying what is wrong with it.

    With `verify` the tensors and the metadata must match the sha256 that the file records; a file without one passes.
    """
    tensors, metadata = _read_safetensors(path)
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} carries ddkit metadata that is not an object")
    if metadata and metadata.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {shown(metadata.get('schema'))}; this ddkit reads {SCHEMA}")
    record = {key: value for key, value in metadata.items() if key != "digest"}
    if verify and _is_broken(metadata, lambda: tensors_digest(tensors, record)):
        raise ValueError(f"{path} is damaged: its content does not match the sha256 that it records")
    record.pop("sealed", None)
    return tensors, record


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import safe_open

    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size > machine_bytes():
            raise ValueError(f"it has {size / 2**30:,.0f} GiB, and this machine has {machine_bytes() / 2**30:,.0f} GiB of memory")
        with safe_open(str(path), framework="pt") as stream:
            header = (stream.metadata() or {}).get("ddkit", "{}")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        return tensors, parse_json(header)
    except Exception as error:  # the parser has errors of its own, and torch raises for a dtype that it does not know
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None
