"""Files of other projects: read as tensors, numbers and text alone, and searched for a set or a state dict."""

from __future__ import annotations

import logging
import re
import shlex
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from ddkit.data.arrays import check_declared, read_arrays
from ddkit.data.whitening import Whitening
from ddkit.errors import DdkitError, InputError
from ddkit.files import natural, open_regular, read_tensors
from ddkit.run.artifact import Record

log = logging.getLogger("ddkit")

IMAGES = ("images", "image", "data", "x", "x_train", "image_syn", "images_syn", "syn_images", "syn_data", "imgs")
LABELS = ("labels", "label", "targets", "target", "y", "y_train", "label_syn", "labels_syn", "syn_labels", "syn_label")
STEP_SIZES = ("step_size", "syn_lr", "lr_syn", "learned_lr", "lr")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights", "ema")  # of several the first
OF_NETWORKS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # how the names in a state dict end


DTYPES = {  # of tensors that are used; torch computes with no other real numbers on every device
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip


class Found(NamedTuple):
    """A set in a file: images, labels (None: there are none beside), rows of soft labels, the step size that it records, and the class
    names if the labels are texts."""

    images: Tensor
    labels: Tensor | None = None
    soft: Tensor | None = None
    step_size: float | None = None
    names: list[str] | None = None


# Reading


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the tensors of a file in their dicts and lists, and what it records of a set; raises InputError for a file of other things.

    `path` was written by torch.save, or is a .npz, .npy or .safetensors file. Arrays of NumPy are returned as tensors, its scalars as
    numbers. A set may record "mean" and "std", and one of ddkit's own "classes", "pixels" and "parametrization".
    """
    try:
        with open_regular(path) as stream:
            start = stream.read(9)
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist.") from None
    except IsADirectoryError:
        begin = f"ddkit distill --init {shlex.quote(f'file:{path}')} --losses dm --steps 0"
        raise InputError(
            f"{path} is a folder, and an import reads files. If it contains class folders of images, a run of 0 steps makes a set of them: "
            f"`{begin}`, with the --dataset, --ipc and --out of the set."
        ) from None
    except OSError as error:
        raise InputError(f"The file {path} cannot be read: {error.strerror or error}.") from None
    is_archive = zipfile.is_zipfile(path)
    of_torch = start.startswith(b"\x80")  # how a pickle begins, which torch.save wrote before archives
    if start[8:] == b"{" and not is_archive:
        return _read_safetensors(path)
    if is_archive:
        try:
            with zipfile.ZipFile(path) as archive:
                check_declared(archive, path)
                of_torch = any(name.endswith("data.pkl") for name in archive.namelist())
        except DdkitError:
            raise
        except Exception as error:  # a third-party archive can raise anything
            raise InputError(f"{path} cannot be read: {error}.") from None
    if start.startswith(b"\x93NUMPY"):
        return _as_value(read_arrays(path)[path.stem], path), {}
    if is_archive and not of_torch:
        return _read_npz(path)
    if not of_torch and start.startswith(b"PK\x03\x04"):
        raise InputError(f"{path} is an incomplete archive of torch.save or .npz: its end is missing. Copy the whole file again.")
    if not of_torch:
        raise InputError(f"{path} is not a file of torch.save, .npz, .npy or .safetensors: its first bytes fit none of them.")
    try:
        with safe_globals(NUMPY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch; tensors that cannot be used are refused below
            loaded = _plain_values(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a third-party file can raise anything
        raise InputError(_refusal(path, str(error))) from None
    return loaded, _statistics_in(loaded)


def _read_npz(path: Path) -> tuple[Any, dict[str, Any]]:
    arrays = read_arrays(path)
    found = {name: _as_value(each, path) for name, each in arrays.items() if each.dtype.kind in "fiub" or name.lower() in LABELS}
    recorded = _statistics_in(found)
    names = arrays.get("class_names")
    if "x_train" in found:
        recorded |= {"pixels": "unit"} if "unclipped" in arrays else {}
        recorded |= _whitening_in(found, found["x_train"], path)
        recorded |= {"classes": names.tolist()} if names is not None and names.dtype.kind == "U" and names.ndim == 1 else {}
    return found, recorded


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise InputError(f"{error}.") from None
    with suppress(msgspec.ValidationError):  # the metadata of somebody else's
        own = msgspec.convert(metadata, Record)
        if "stored" in tensors:
            raise InputError(
                f"{path} is already a set of ddkit. Use it without an import, e.g. `ddkit evaluate {shlex.quote(str(path))} --dataset "
                "NAME`."
            )
        if "images" in tensors:
            table = own.parametrization or ({"use": "grid", **own.decode} if own.decode else {})
            return tensors, {
                "pixels": "unit", "classes": own.class_names, "mean": own.mean, "std": own.std, "parametrization": table,
                **_whitening_in(tensors, tensors["images"], path),
            }  # fmt: skip
    return tensors, _statistics_in(tensors)


def _whitening_in(tensors: dict[str, Any], images: Tensor, path: Path) -> dict[str, Any]:
    """Returns the "whitening" of one of ddkit's own sets, {} if it has none."""
    try:
        found = Whitening.taken(tensors, tuple(images.shape[1:]))
    except ValueError as error:
        raise InputError(f"{path} cannot be used: {error}.") from None
    return {} if found is None else {"whitening": found}


def _statistics_in(found: Any) -> dict[str, Any]:
    """Returns "mean" and "std" of a set that records both as vectors."""
    if not isinstance(found, Mapping) or not any(name in found for name in IMAGES):
        return {}
    values = {name: found[name] for name in ("mean", "std") if isinstance(found.get(name), Tensor) and found[name].ndim == 1}
    return {name: value.double().tolist() for name, value in values.items() if len(values) == 2}


def _refusal(path: Path, text: str) -> str:
    named = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", text)
    if named is None and "WeightsUnpickler" not in text and "weights_only" not in text:
        return f"{path} is not a readable file of torch.save, .npz, .npy or .safetensors ({' '.join(text.split())[:200]})."
    what = f"contains {named.group(1)}" if named else "contains other objects than tensors"
    return (
        f"{path} {what}. Loading it could run code from the file, so ddkit reads only tensors and numbers. If you trust the file, "
        f"save its tensors in Python: found = torch.load({str(path)!r}, weights_only=False), then of a network "
        'torch.save(found.state_dict(), "teacher.pt"), of a set torch.save({"images": ..., "labels": ...}, "set.pt").'
    )


# NumPy in files of torch.save: these stand in for NumPy's own functions, so that none of them is called by a file


class _Type:
    """Stands in for numpy.dtype: of numbers and text alone."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d{1,9}", code):
            raise ValueError(f"it contains a NumPy array of the type {code!r}, which is not a number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, content = state
        flat = np.frombuffer(content, kind.dtype)
        self.value = flat.reshape(shape[::-1]).T if by_columns else flat.reshape(shape)


def _scalar(kind: _Type, content: bytes) -> Any:
    return np.frombuffer(content, kind.dtype)[0].item()


def _array(*_: Any) -> _Array:
    return _Array()


NUMPY: list[Any] = [
    (made, f"numpy.{name}")
    for made, names in (
        (_Type, ("dtype",)),
        (_Array, ("ndarray",)),
        (_scalar, ("core.multiarray.scalar", "_core.multiarray.scalar")),
        (_array, ("core.multiarray._reconstruct", "_core.multiarray._reconstruct")),
    )
    for name in names
]


def _plain_values(found: Any, depth: int = 0) -> Any:
    """Returns what was loaded with arrays of numbers as tensors; raises ValueError if it is nested too deep."""
    if depth > 100:
        raise ValueError("it is nested too deeply")
    if isinstance(found, _Array):
        return _as_tensor(found.value) if found.value.dtype.kind in "biuf" else found.value.tolist()
    if isinstance(found, Mapping):
        return {key: _plain_values(value, depth + 1) for key, value in found.items()}
    return [_plain_values(value, depth + 1) for value in found] if isinstance(found, list | tuple) else found


def _as_value(array: Any, path: Path) -> Any:
    """Returns an array of numbers as a tensor, and one of texts as a list."""
    if array.dtype.kind in "US":
        return [each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in array.flatten()]
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path} contains an array of {array.dtype}, which is neither numbers nor text.")
    return _as_tensor(array)


def _as_tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


# What is in it


def sets_in(found: Any, *, outermost: bool = True) -> list[Found]:
    """Returns every set in what was read: images (n, C, H, W) with labels beside, or at the top of the file without.

    A set is a dict of both, under common names or as its only two tensors that fit, or a list that begins with both, or a list of the
    images of each class.
    """
    if outermost and isinstance(found, Tensor):
        return [Found(found)] if found.ndim >= 3 else []
    if isinstance(found, Mapping):
        return _set_of(found, outermost) or [each for value in found.values() for each in sets_in(value, outermost=False)]
    if not isinstance(found, list):
        return []
    if len(found) > 1 and _is_pair(found[0], found[1]):
        labels, texts = numbered(found[1])
        return [Found(found[0], labels, None, number_of(found[2]) if len(found) > 2 else None, texts)]
    if outermost and (together := _of_list(found)):
        return [together]
    return [each for value in found for each in sets_in(value, outermost=False)]


def _set_of(found: Mapping[Any, Any], outermost: bool) -> list[Found]:
    names = [name for name in found if isinstance(name, str)]
    if any(name.rpartition(".")[2] in OF_NETWORKS for name in names):
        return []
    own = {name.lower(): found[name] for name in names}
    rate = next((name for name in STEP_SIZES if name in own), None)
    step_size = None if rate is None else number_of(own[rate])
    soft = tensor_of(own.get("soft_labels"))
    listed = next((together for name in IMAGES if (together := _of_list(own.get(name)))), None)
    images = next((own[name] for name in IMAGES if isinstance(own.get(name), Tensor) and own[name].ndim > 1), listed and listed.images)
    by_place = listed.labels if listed is not None and images is listed.images else None
    labels, texts = next((each for name in LABELS if (each := numbered(own.get(name)))[0] is not None), (soft, None))
    labels = by_place if labels is None else labels
    if images is not None and (labels is not None or outermost):
        if rate is not None and step_size is None:
            log.warning("'%s' in the file is not a single number, so it is ignored. Use --step-size for a step size of the set.", rate)
        return [Found(images, labels, soft, step_size, texts)]
    named = [(a, tensor_of(b)) for a in found.values() for b in found.values() if a is not b and _is_pair(a, b)]
    pairs = [(a, b) for a, b in named if b is not None and len(a) == len(b) and is_plain(b) and (b.ndim == 2 or not bool((b % 1).any()))]
    return [Found(*pairs[0], None, step_size)] if len(pairs) == 1 else []


def _is_pair(images: Any, labels: Any) -> bool:
    """Whether two values look like images and their labels, by their dimensions."""
    other = numbered(labels)[0]
    return isinstance(images, Tensor) and images.ndim > 2 and other is not None and other.ndim < 3


def _of_list(value: Any) -> Found | None:
    """Returns the set of a list of tensors: the images (n, C, H, W) of each class, or single images (C, H, W); None of another value."""
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, Tensor) and is_plain(each) for each in value):
        return None
    if value[0].ndim not in (3, 4) or len({(each.ndim, each.shape[-3:], each.dtype) for each in value}) > 1:
        return None
    if value[0].ndim == 3:
        return Found(torch.stack(value))
    log.warning("The images are a list of %d tensors. Each tensor is used as the images of one class.", len(value))
    return Found(torch.cat(value), torch.arange(len(value)).repeat_interleave(torch.tensor([len(each) for each in value])))


def numbered(value: Any) -> tuple[Tensor | None, list[str] | None]:
    """Returns labels as a tensor, None if they are none, and the class names, in natural order, if the labels are texts."""
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        return tensor_of(value), None
    names = sorted(set(value), key=natural)
    number = {name: place for place, name in enumerate(names)}
    return torch.tensor([number[each] for each in value]), names


def tensor_of(value: Any) -> Tensor | None:
    """Returns a tensor, or a list of numbers as one; None for anything else."""
    if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
        with suppress(RuntimeError, ValueError):  # of more than 64 bits
            return torch.tensor(value)
    if isinstance(value, list) and value and all(isinstance(each, Tensor) and each.ndim < 2 for each in value):
        with suppress(RuntimeError):  # of several lengths
            return torch.stack(value)
    return value if isinstance(value, Tensor) and value.ndim > 0 else None


def number_of(value: Any) -> float | None:
    """Returns a number, also of a tensor of one, or of a dict that records a step size; None for anything else."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in STEP_SIZES if name in value), None)
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() else value
    return float(value) if isinstance(value, int | float) else None


def labels_in(found: Any) -> tuple[Tensor | None, list[str] | None]:
    """Returns the labels of a file that holds labels alone, or beside other things under a common name; see `numbered`."""
    if isinstance(found, Mapping):
        own = {str(name).lower(): value for name, value in found.items()}
        named = next((own[name] for name in ("soft_labels", *LABELS) if name in own), None)
        return numbered(named if named is not None else next(iter(own.values()), None) if len(own) == 1 else None)
    return numbered(found)


def state_in(found: Any, *, any_names: bool) -> dict[str, Tensor] | None:
    """Returns the state dict in what was read, of several that under the most common name, with a warning; None where there is none.

    It is a dict with names of weights, or with `any_names` any dict of tensors. Other things beside its tensors are left out.
    """
    states = dict(_states_in(found, ""))
    if not states and any_names:
        inner = next((found[name] for name in WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(name), Mapping)), found)
        whole = isinstance(inner, Mapping) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in inner.items())
        return dict(inner) if whole and inner else None
    order = sorted(states, key=lambda name: WRAPPERS.index(name) if name in WRAPPERS else len(WRAPPERS))
    if len(order) > 1:
        log.warning("The file contains several state dicts (%s). '%s' is imported.", ", ".join(states), order[0])
    return states[order[0]] if order else None


def _states_in(found: Any, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(found, Mapping):
        return
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if any(key.rpartition(".")[2] in OF_NETWORKS for key in tensors):
        yield name, tensors
        return
    for key, value in found.items():
        yield from _states_in(value, str(key))


def fitted(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Returns a state dict under the names `own` of a network: without the prefix that wrappers such as DataParallel put before them.

    Tensors that are not under the prefix are left out, with a warning. If no prefix makes it fit, common ones are taken off.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # of torch.compile, also within a name
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    if needed <= state.keys():
        return state
    prefixes = {name[: place + 1] for name in state for place, letter in enumerate(name) if letter == "."}
    fitting = [prefix for prefix in sorted(prefixes) if needed <= {name.removeprefix(prefix) for name in state if name.startswith(prefix)}]
    if not fitting:
        first = re.match(r"((module|model|net|network|backbone)\.)+", next(iter(state)))
        common = first[0] if first and all(name.startswith(first[0]) for name in state) else ""
        return {name.removeprefix(common): value for name, value in state.items()}
    others = [name for name in state if not name.startswith(fitting[0])]
    if others:
        log.warning("The tensors of the network begin with '%s'. Other tensors are ignored: %s.", fitting[0], ", ".join(others[:6]))
    return {name.removeprefix(fitting[0]): value for name, value in state.items() if name.startswith(fitting[0])}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one, no larger than what its file holds of it."""
    strange = tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.dtype not in DTYPES
    return not strange and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def plain(tensor: Tensor, what: str, path: Path) -> Tensor:
    """Returns an ordinary tensor, detached and contiguous; raises InputError for another."""
    if not is_plain(tensor):
        raise InputError(f"{path}: {what} is not a plain tensor ({tensor.dtype}, {tensor.layout}, shape {tuple(tensor.shape)}).")
    return tensor.detach().contiguous()
