"""Image files to tensors: threads where they help, one tensor where all images have one shape."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import ddkit

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
SMALL_PIXELS = 100 * 100  # below, Pillow holds the interpreter for most of the time: a second thread slowed 32 x 32 by 10 %

# EXIF's orientations that are not upright, and what turns such an image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height

Item = TypeVar("Item")
Result = TypeVar("Result")


class TooManyBits(ValueError):
    """A value of a file is larger than the bits allow that the user has named."""


class Decoding(NamedTuple):
    """How files become images.

    `size`: (height, width) to resize to, None for that of the file. `channels`: 1 or 3, None for 1 if the file is grey and 3 (RGB) if not.
    `bits`: how many bits of a 16-bit grey file hold its values.
    """

    size: tuple[int, ...] | None = None
    channels: int | None = None
    bits: int = 16


def decode_images(files: Sequence[str], how: Decoding, resized: list[str] | None = None) -> list[Tensor] | Tensor:
    """Returns the images (C, H, W) uint8 in order, upright, as one tensor (n, C, H, W) where all have one shape.

    The files of images that were resized are added to `resized`. Raises InputError naming a file that cannot be decoded.
    """
    if not files:
        return []
    told = [] if resized is None else resized
    with strict_pillow():
        first = _decode(files[0], how, told)
        workers = 1 if first[0].size < SMALL_PIXELS else min(8, os.cpu_count() or 1)
        images = [first, *_each(lambda file: _decode(file, how, told), files[1:], workers)]
    if any(image.shape != first.shape for image in images):
        return [torch.from_numpy(np.array(image, order="C")) for image in images]
    batch = torch.empty((len(images), *first.shape), dtype=torch.uint8)
    np.stack(images, out=batch.numpy())
    return batch


def image_shapes(files: Sequence[str], how: Decoding) -> list[tuple[int, int, int]]:
    """Returns the shapes (C, H, W) of what decode_images returns, from the files' headers alone."""

    def shape(file: str) -> tuple[int, int, int]:
        with _opened(file) as image:
            width, height = image.size[::-1] if orientation(image) in LYING else image.size
            channels = how.channels or (1 if _is_grey(image) else 3)
            return (channels, *(how.size or (height, width)))  # type: ignore[return-value]

    with strict_pillow():
        return _each(shape, files, 1)


def any_coloured(files: Iterable[str]) -> bool:
    """Whether one of the files is in colour, from the headers alone; those that cannot be read are passed over."""
    with strict_pillow():
        for file in files:
            with suppress(ddkit.InputError), _opened(file) as image:
                if not _is_grey(image):
                    return True
    return False


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Inside, an image that declares more pixels than Pillow's limit is an error before it is decoded, and nothing is a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _each(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Returns [function(item) for each item], done by `workers` threads; raises the first item's error."""

    def part(some: Iterable[Item]) -> list[Result]:
        return [function(item) for item in some]

    if workers == 1 or len(items) < 2:
        return part(items)
    length = min(64, max(1, len(items) // (4 * workers)))  # a future for each image would cost as much as a small image
    parts = [items[start : start + length] for start in range(0, len(items), length)]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return [result for results in pool.map(part, parts) for result in results]


def _decode(file: str, how: Decoding, resized: list[str]) -> Any:
    """Returns the image as an array (C, H, W) uint8, which may be read-only."""
    with _opened(file) as image:
        found = upright(image, how.bits)
        if how.channels is not None:
            found = found.convert("L" if how.channels == 1 else "RGB")
        if how.size is not None and found.size != (how.size[1], how.size[0]):
            resized.append(file)
            found = found.resize((how.size[1], how.size[0]), Image.Resampling.BILINEAR)
        return channels_first(found)


@contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    """Inside, the image of a file; what cannot be done with it is an InputError that names the file."""
    try:
        with ddkit.data.open_regular(file) as stream, Image.open(stream) as image:
            yield image
    except TooManyBits as error:
        raise ddkit.InputError(f"The image {file} cannot be used: {error}.", "data.bits") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = "".join(re.findall(r"\((\d+) pixels\)", str(error))[:1]) or "0"
        raise ddkit.InputError(
            f"The image {file} declares {int(pixels):,} pixels, but the limit is {Image.MAX_IMAGE_PIXELS:,}. Scale it down or remove it."
        ) from None
    except PermissionError as error:
        raise ddkit.InputError(f"The image {ddkit.data.not_permitted(file, error)}") from None
    except UnidentifiedImageError:
        raise ddkit.InputError(f"The image {file} cannot be decoded (its format is not known). Repair or remove it.") from None
    except OSError as error:  # of the system, with a number; a decoder's own has none
        what = f"cannot be read ({error.strerror})" if error.errno else f"cannot be decoded ({error})"
        raise ddkit.InputError(f"The image {file} {what}. Repair or remove it.") from None
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise ddkit.InputError(f"The image {file} cannot be decoded ({error}). Repair or remove it.") from None


def channels_first(image: Image.Image) -> Any:
    """Returns an image in mode L or RGB as an array (C, H, W) uint8, which may be read-only."""
    array = np.asarray(image)
    return array.transpose(2, 0, 1) if array.ndim == 3 else array[None]


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or _is_sixteen_bit(image)


def _is_sixteen_bit(image: Image.Image) -> bool:
    return image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM"))


def orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation of an image that was opened and not loaded, 1 for upright: 2 to 8 are turned or mirrored."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns TIFF itself; of a PNG it would decode the pixels to look for EXIF behind them
    with suppress(Exception):  # damaged EXIF is as good as none
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def upright(image: Image.Image, bits: int = 16) -> Image.Image:
    """Returns the image in mode L or RGB, turned as its EXIF orientation says; of 16-bit grey the values of `bits` bits are scaled to 8.

    Pillow's own conversion would clip them.
    """
    turned = orientation(image)
    if _is_sixteen_bit(image):
        values = np.asarray(image)
        most = 65535 if image.format == "PPM" else 2**bits - 1  # a PGM file tells its range, and Pillow has scaled its values
        if values.max(initial=0) > most:
            needed = int(values.max()).bit_length()
            raise TooManyBits(f"its value {values.max()} needs {needed} bits, more than data.bits = {bits}. Use --set data.bits={needed}")
        image = Image.fromarray((values.astype(np.float32) * (255 / most)).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers of unknown range (mode {image.mode}). Save it with 8 or 16 bits")
    else:
        mode = "L" if _is_grey(image) else "RGB"
        image = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        image.load()
        image = image if image.mode == mode else image.convert(mode)  # converting to its own mode copies
    return image.transpose(UPRIGHT[turned]) if turned in UPRIGHT else image
