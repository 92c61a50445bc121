"""Spectra of images: how their power is spread over spatial frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from ddkit.data.images import to_unit
from ddkit.data.memmap import blocks, rows_of
from ddkit.errors import InputError

HIGH = 0.25  # cycles per pixel: half of the highest frequency that an axis can hold
MOST_VALUES = 1000 * 3 * 32 * 32  # transformed at once, in float64
MOST_IMAGES = 1000  # whose spectrum stands for that of all


def spread(images: Tensor, most: int = MOST_IMAGES) -> Tensor:
    """Returns at most `most` of images (n, ...), evenly spread over them: of all classes, where they are grouped by class."""
    if len(images) <= most:
        return images
    return rows_of(images, torch.linspace(0, len(images) - 1, most).round().long())


def power(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (frequency, power) of every Fourier coefficient of images (n, C, H, W), floats or uint8: two tensors (H, W // 2 + 1).

    Frequencies are radial, in cycles per pixel, 0 to 0.71. The power is averaged over images and channels, after each
    channel's mean was taken off; coefficients that stand for a mirrored one too count twice.
    """
    height, width = images.shape[-2:]
    rows = max(1, MOST_VALUES // max(1, images[:1].numel()))
    parts = [len(part) / len(images) * _power(part) for part in blocks(images, rows)] if len(images) > rows else [_power(images)]
    found = torch.stack(parts).sum(0)
    across = torch.fft.rfftfreq(width, dtype=torch.float64)
    twice = 2.0 - ((across == 0) | (across == 0.5)).double()
    frequency = (torch.fft.fftfreq(height, dtype=torch.float64)[:, None].square() + across.square()).sqrt()
    return frequency, found * twice


def _power(images: Tensor) -> Tensor:
    """Returns the mean over images and channels of the squared size of their coefficients."""
    x = to_unit(images).double()
    x = x - x.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(x).abs().square().flatten(0, 1).mean(0)


def radial_spectrum(images: Tensor, bins: int = 16) -> tuple[list[float], list[float]]:
    """Returns (frequencies, shares): the middle of `bins` equal bands from 0 to 0.5 cycles per pixel, and each band's share.

    Shares are of all power but the mean's; what lies beyond 0.5 (diagonals) counts to the last band. Shares are 0 for
    images without contrast. Raises InputError for images of one pixel.
    """
    frequency, found = power(images)
    if frequency.numel() < 2:
        raise InputError("A spectrum needs images of more than one pixel.")
    band = (frequency * 2 * bins).long().clamp_max(bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, band.flatten(), found.flatten())
    total = float(sums.sum())
    shares = [float(value) / total if total > 0 else 0.0 for value in sums]
    return [(index + 0.5) / (2 * bins) for index in range(bins)], shares


def high_frequency_share(images: Tensor) -> float:
    """Returns the share of the power, without the mean's, at more than 0.25 cycles per pixel: 0 to 1."""
    frequency, found = power(images)
    total = float(found.sum())
    return float(found[frequency > HIGH].sum()) / total if total > 0 else 0.0
