"""Pictures and spectra of a set: known images have known ones."""

from __future__ import annotations

import math

import pytest
import torch

from ddkit.data.pictures import high_frequency_share, power, radial_spectrum
from ddkit.errors import InputError


def _wave(cycles_per_pixel: float, size: int = 32) -> torch.Tensor:
    """Returns one image (1, 1, size, size) of a horizontal wave."""
    x = torch.arange(size, dtype=torch.float64)
    return (2 * math.pi * cycles_per_pixel * x).sin().expand(1, 1, size, size)


@pytest.mark.parametrize(("cycles", "share"), [(1 / 16, 0.0), (1 / 8, 0.0), (3 / 8, 1.0)])
def test_a_wave_lies_above_or_below_the_bound(cycles: float, share: float) -> None:
    assert high_frequency_share(_wave(cycles)) == pytest.approx(share, abs=1e-12)


def test_a_wave_fills_the_one_band_that_holds_its_frequency() -> None:
    frequencies, shares = radial_spectrum(_wave(3 / 16), bins=16)
    assert shares[6] == pytest.approx(1)
    assert abs(frequencies[6] - 3 / 16) <= 1 / 64
    assert sum(shares) == pytest.approx(1)


def test_brightness_and_a_constant_image_count_nothing() -> None:
    assert high_frequency_share(_wave(3 / 8) + 5) == pytest.approx(1)
    assert high_frequency_share(torch.ones(2, 3, 8, 8)) == 0
    assert radial_spectrum(torch.ones(2, 3, 8, 8))[1] == [0] * 16


def test_power_is_that_of_the_whole_transform() -> None:
    images = torch.randn(3, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = images - images.mean((-2, -1), keepdim=True)
    assert float(power(images)[1].sum()) == pytest.approx(float(torch.fft.fft2(centred).abs().square().sum() / 6))


def test_white_noise_has_the_share_of_the_plane_beyond_the_bound() -> None:
    noise = torch.randn(200, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert high_frequency_share(noise) == pytest.approx(1 - math.pi / 16 / 1, abs=0.02)


def test_one_pixel_has_no_spectrum() -> None:
    with pytest.raises(InputError, match="more than one pixel"):
        radial_spectrum(torch.ones(1, 1, 1, 1))
