"""Images as tensors: one shape for all, pixel units to normalised and back, and the picture of a set."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ddkit.errors import printable

LONGEST_NAME = 60  # characters of a class name in a picture
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts


def common_shape(images: Sequence[Tensor]) -> tuple[int, int, int]:
    """Returns (C, H, W): 1 channel if all have one, else 3; the most frequent size (of equals, the larger)."""
    return shape_of(Counter((image.shape[0], image.shape[1], image.shape[2]) for image in images))


def shape_of(shapes: Mapping[tuple[int, int, int], int]) -> tuple[int, int, int]:
    """Returns what common_shape does of images of which so many have each of `shapes` (C, H, W)."""
    sizes: Counter[tuple[int, int]] = Counter()
    for (_, height, width), count in shapes.items():
        sizes[height, width] += count
    height, width = max(sizes, key=lambda size: (sizes[size], size))
    return (1 if all(channels == 1 for channels, _, _ in shapes) else 3), height, width


def other_sizes(images: Sequence[Tensor], shape: tuple[int, int, int]) -> int:
    """Returns how many of the images (C, H, W) have another height or width than `shape`."""
    return sum(tuple(image.shape[1:]) != shape[1:] for image in images)


def conform(images: list[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """Returns the images (C, H, W) as one tensor (n, *shape): uint8 where all are, else float32 in 0..1.

    Other sizes are resized (bilinear, antialiased), other channel counts repeated or reduced to luminance. Empties the
    list as it goes, so that a large set is not held twice.
    """
    whole_bytes = all(image.dtype == torch.uint8 for image in images)
    found = torch.empty((len(images), *shape), dtype=torch.uint8 if whole_bytes else torch.float32)
    while images:
        fitted = _fitted(images.pop(), shape)
        found[len(images)] = fitted if whole_bytes else to_unit(fitted)
    return found


def _fitted(image: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if tuple(image.shape) == shape:
        return image
    x = to_unit(image)
    if x.shape[0] == 1 and shape[0] == 3:
        x = x.expand(3, -1, -1)
    elif x.shape[0] == 3 and shape[0] == 1:
        x = (x * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)
    if tuple(x.shape[1:]) != shape[1:]:
        x = torch.nn.functional.interpolate(x[None], shape[1:], mode="bilinear", antialias=True)[0]
    return (x * 255).round().to(torch.uint8) if image.dtype == torch.uint8 else x


def to_unit(images: Tensor) -> Tensor:
    """Returns images as float32 in pixel units (0..1); float64 stays, for checks."""
    if images.dtype == torch.float64:
        return images
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def channel_statistics(
    images: Tensor, *, rows: int | None = None, total: Callable[[Tensor], Tensor] = lambda own: own
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, std) of each channel of images (n, C, H, W) in pixel units, computed in float64.

    Where these are a part of `rows` images, `total` returns a sum over all parts.
    """
    count = (images.shape[0] if rows is None else rows) * images.shape[2] * images.shape[3]
    mean, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(1000):
        mean = mean + to_unit(part).double().sum((0, 2, 3)) / count
    mean = total(mean)
    for part in images.split(1000):
        squares = squares + (to_unit(part).double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
    std = (total(squares) / count).sqrt().clamp_min(1e-6)
    return tuple(mean.tolist()), tuple(std.tolist())


class Normalisation:
    """Maps images in pixel units to normalised ones, (x - mean) / std a channel, and back."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and std as tensors, made once for each device: making them there makes a GPU wait."""
        key = like.device, like.dtype
        if key not in self._kept:
            self._kept[key] = like.new_tensor(self.mean).view(-1, 1, 1), like.new_tensor(self.std).view(-1, 1, 1)
        return self._kept[key]

    def normalise(self, images: Tensor) -> Tensor:
        """Returns float32 normalised images (n, C, H, W) from uint8 or pixel units."""
        x = to_unit(images)
        mean, std = self._constants(x)
        return (x - mean) / std

    def to_pixels(self, images: Tensor) -> Tensor:
        """Returns images in pixel units from normalised ones; not clipped."""
        mean, std = self._constants(images)
        return images * std + mean


def sheet_png(images: Tensor, labels: Tensor, class_names: Sequence[str], *, columns: int = 20) -> bytes:
    """Returns a PNG with a row per class (at most `columns` images of each), names at the left, enlarged by whole pixels."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = images.shape[2:]
    scale = max(1, round(64 / max(height, width)))
    font = ImageFont.load_default(size=14)
    rows = sorted(set(labels.tolist()))
    names = {label: " ".join(printable(class_names[label]).split())[:LONGEST_NAME] for label in rows}
    margin = 12 + max(int(font.getlength(name)) for name in names.values())
    most = min(columns, max(int((labels == label).sum()) for label in rows))
    cell_h, cell_w = height * scale + 4, width * scale + 4
    sheet = Image.new("RGB", (margin + most * cell_w, len(rows) * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    for y, label in enumerate(rows):
        draw.text((6, y * cell_h + cell_h // 2), names[label], fill="black", font=font, anchor="lm")
        for x, image in enumerate(pixels[labels == label][:most]):
            array = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
            tile = Image.fromarray(array).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + x * cell_w, y * cell_h + 2))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
