"""NumPy files of third parties: plain arrays alone, and only after what the archive declares was looked at."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from ddkit.errors import InputError
from ddkit.files import not_permitted, open_regular

# A deflated archive of real images is some 1 to 30 times as large when unpacked; a bomb a thousand times and more. So a small result is
# always allowed, a large one if the file is not much smaller, and what lies between in between.
SMALL_BYTES, LARGE_BYTES = 2**30, 2**32
SMALL_RATIO, LARGE_RATIO = 100, 10


def read_arrays(path: Path) -> dict[str, Any]:
    """Returns the arrays of an .npz file by name, or that of an .npy file by the file's; raises InputError for one that cannot be used.

    Nothing is unpickled. Before anything is unpacked, check_declared checks the declared sizes, and the header of every
    array must match its size.

    Examples:
        >>> import numpy as np
        >>> np.savez("arrays.npz", x=np.zeros((2, 8, 8)), y=np.array([0, 1]))
        >>> {name: array.shape for name, array in ddkit.data.read_arrays(Path("arrays.npz")).items()}
        {'x': (2, 8, 8), 'y': (2,)}
    """
    form = ".npz archive"
    try:
        with open_regular(path) as stream:
            if stream.peek(6).startswith(b"\x93NUMPY"):
                form = ".npy file"
                return {path.stem: _array(lambda: open_regular(path), path.name, path.stat().st_size)}
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            check_declared(archive, path)
            members = [info for info in archive.infolist() if not info.is_dir()]
            return {
                info.filename.removesuffix(".npy"): _array(partial(archive.open, info), info.filename, info.file_size) for info in members
            }
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"The data file {path} does not exist.") from None
    except PermissionError as error:
        raise InputError(f"The data file {not_permitted(path, error)}") from None
    except Exception as error:  # a damaged or hostile archive can raise anything
        raise InputError(f"{path} cannot be read as a NumPy {form} of plain arrays: {error or type(error).__name__}.") from None


def check_declared(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises InputError where `archive`, the file `path`, declares to hold far more than its size can honestly stand for.

    Allowed are 1,024 MiB, or 100 times the file's size up to 4,096 MiB, or 10 times its size.
    """
    declared, size = sum(info.file_size for info in archive.infolist()), path.stat().st_size
    allowed = max(SMALL_BYTES, min(SMALL_RATIO * size, LARGE_BYTES), LARGE_RATIO * size)
    if declared > allowed:
        raise InputError(
            f"{path} has {size / 2**20:,.1f} MiB but would have {declared / 2**20:,.0f} MiB after unpacking. For a file of its size the "
            f"limit is {allowed / 2**20:,.0f} MiB. If the file is your own, save it uncompressed, with np.savez."
        )


def _array(opened: Callable[[], IO[bytes]], name: str, size: int) -> Any:
    """Returns the array of an .npy file of `size` bytes; raises ValueError if its header is not that of a plain array of this size."""
    from numpy.lib import format as npy

    with opened() as stream:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name} has the .npy version {version}, which is not supported")
        shape, _, dtype = read(stream)
        needed = stream.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{name} contains Python objects, and ddkit unpickles nothing")
    if min(shape, default=0) < 0 or needed != size:
        raise ValueError(f"{name} declares an array of shape {shape}, which needs {needed} bytes, but has {size} bytes")
    with opened() as stream:
        return npy.read_array(stream, allow_pickle=False)
