"""NumPy archives of strangers: plain arrays alone, and only after what the archive declares was looked at."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

from ddkit.errors import InputError
from ddkit.files import not_permitted, open_regular

# A deflated archive of real images is some 1 to 30 times as large when unpacked; a bomb a thousand times and more. So a small result is
# always allowed, a large one if the file is not much smaller, and what lies between in between.
SMALL_BYTES, LARGE_BYTES = 2**30, 2**32
SMALL_RATIO, LARGE_RATIO = 100, 10


def read_arrays(path: Path) -> dict[str, Any]:
    """Returns the arrays of an .npz file by name; raises InputError naming a file that cannot be used.

    Nothing is unpickled. Before anything is unpacked the declared sizes are checked, as check_declared does, and that the header of every
    array matches its size.
    """
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            check_declared(archive, path)
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in archive.infolist() if not info.is_dir()}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"The data file {path} does not exist.") from None
    except PermissionError as error:
        raise InputError(f"The data file {not_permitted(path, error)}") from None
    except Exception as error:  # a damaged or hostile archive can raise anything
        raise InputError(f"{path} cannot be read as a NumPy .npz archive of plain arrays: {error or type(error).__name__}.") from None


def check_declared(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises InputError where `archive`, the file `path`, declares to hold far more than its size can honestly stand for.

    Allowed are 1,024 MiB, or 100 times the file's size up to 4,096 MiB, or 10 times its size.
    """
    declared, size = sum(info.file_size for info in archive.infolist()), path.stat().st_size
    allowed = max(SMALL_BYTES, min(SMALL_RATIO * size, LARGE_BYTES), LARGE_RATIO * size)
    if declared > allowed:
        raise InputError(
            f"{path} has {size / 2**20:,.1f} MiB and declares {declared / 2**20:,.0f} MiB when unpacked; of a file of its size "
            f"{allowed / 2**20:,.0f} MiB are unpacked at most. If it is yours, save it uncompressed, with np.savez."
        )


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """Returns the array of an .npy member; raises ValueError where its header is not that of a plain array of the member's size."""
    from numpy.lib import format as npy

    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{info.filename} is of the .npy version {version}")
        shape, _, dtype = read(stream)
        needed = stream.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects, which would have to be unpickled")
    if min(shape, default=0) < 0 or needed != info.file_size:
        raise ValueError(f"{info.filename} declares an array of shape {shape}, {needed} bytes, and has {info.file_size}")
    with archive.open(info) as stream:
        return npy.read_array(stream, allow_pickle=False)
