"""Files that are whole or absent: temporary file, fsync, rename; and safetensors with ddkit's metadata."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddkit.errors import RunFilesError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
TEMPORARY = ".part"  # how the names of files end that are being written


def cache_folder() -> Path:
    """Returns $DDKIT_CACHE, else ddkit's folder in the XDG cache; raises RunFilesError for a user without a home folder."""
    own = os.environ.get("DDKIT_CACHE")
    try:
        return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddkit"
    except RuntimeError:
        raise RunFilesError(
            "You have no home folder to keep a cache in. Name a folder with the environment variable DDKIT_CACHE."
        ) from None


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` so that `path` is either as before or whole; raises RunFilesError where it cannot be written."""
    _replace_whole(path, lambda temporary: Path(temporary).write_bytes(content))


def _replace_whole(path: Path, write: Callable[[str], object]) -> None:
    """Puts what `write(NAME)` writes in the place of `path`, or leaves all as it was and raises RunFilesError."""
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
        os.close(descriptor)
        write(temporary)
        with os.fdopen(os.open(temporary, os.O_RDWR), "rb+") as stream:
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
        sync(path.parent)
    except OSError as error:
        raise RunFilesError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of writes that were killed; only for those who know that nobody is writing in `folder`."""
    for file in folder.glob(f".*.????????{TEMPORARY}"):
        file.unlink(missing_ok=True)


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
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; raises RunFilesError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFilesError(f"{path} cannot be read: {error}.") from None


def sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file whose metadata key "ddkit" holds `metadata` and the schema number as JSON.

    The file is whole or as before; raises RunFilesError where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = json.dumps({"schema": SCHEMA, **metadata}, sort_keys=True, allow_nan=False)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}

    def write(temporary: str) -> None:
        try:
            save_file(contiguous, temporary, {"ddkit": header})  # `save` would hold the tensors three times
        except SafetensorError as error:
            raise OSError(str(error)) from error

    _replace_whole(path, write)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (tensors, ddkit metadata or {}) of a safetensors file; raises ValueError saying what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            header = (stream.metadata() or {}).get("ddkit", "{}")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        metadata = json.loads(header)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} carries ddkit metadata that is not an object")
    if metadata and metadata.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {metadata.get('schema')!r}; this ddkit reads {SCHEMA}")
    return tensors, metadata
