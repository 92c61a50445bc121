"""Pictures and spectra of a set: known images have known ones."""

from __future__ import annotations

import io
import math

import pytest
import torch
from PIL import Image

from ddkit.data.pictures import _fonts, _written, high_frequency_share, power, radial_spectrum, sheet_png
from ddkit.errors import InputError


def _wave(cycles_per_pixel: float, size: int = 32) -> torch.Tensor:
    """Returns one image (1, 1, size, size) of a horizontal wave."""
    x = torch.arange(size, dtype=torch.float64)
    return (2 * math.pi * cycles_per_pixel * x).sin().expand(1, 1, size, size)


@pytest.mark.parametrize(("cycles", "share"), [(1 / 16, 0.0), (1 / 8, 0.0), (3 / 8, 1.0)])
def test_a_wave_lies_above_or_below_the_bound(cycles: float, share: float) -> None:
    assert high_frequency_share(_wave(cycles)) == pytest.approx(share, abs=1e-12)


def test_brightness_and_a_constant_image_count_nothing() -> None:
    assert high_frequency_share(_wave(3 / 8) + 5) == pytest.approx(1)
    assert high_frequency_share(torch.ones(2, 3, 8, 8)) == 0
    assert radial_spectrum(torch.ones(2, 3, 8, 8))[1] == [0] * 16


def test_power_is_that_of_the_whole_transform() -> None:
    images = torch.randn(3, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = images - images.mean((-2, -1), keepdim=True)
    assert float(power(images)[1].sum()) == pytest.approx(float(torch.fft.fft2(centred).abs().square().sum() / 6))


def test_one_pixel_has_no_spectrum() -> None:
    with pytest.raises(InputError, match="larger than one pixel"):
        radial_spectrum(torch.ones(1, 1, 1, 1))


def test_a_picture_has_images_enlarged_by_whole_pixels_and_takes_any_name() -> None:
    labels = torch.tensor([0, 0, 1])
    png = sheet_png(torch.rand(3, 1, 8, 8), labels, ["猫 Katze", "b"])
    sheet = Image.open(io.BytesIO(png))
    assert sheet.width >= 640
    assert (sheet.height - 4) % 8 == 0  # the two classes stand beside each other


def test_names_are_drawn_in_a_font_that_has_their_letters_or_told_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _written("cat 1", 3) == ("cat 1", _fonts()[0])
    monkeypatch.setattr("ddkit.data.pictures._fonts", lambda: (_fonts()[0],))
    assert _written("два слова", 3) == ("class 3", _fonts()[0])


@pytest.mark.skipif(len(_fonts()) < 2, reason="no font of the system")
def test_a_font_of_the_system_has_what_pillows_own_lacks() -> None:
    name, font = _written("Größe, два слова", 3)
    assert name == "Größe, два слова"
    assert font is not _fonts()[0]


def test_a_picture_is_wide_enough_to_look_at_and_of_very_many_classes_has_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(classes: int) -> tuple[int, int]:
        names = [f"number {label}" for label in range(classes)]
        return Image.open(io.BytesIO(sheet_png(torch.rand(classes, 1, 8, 8), torch.arange(classes), names))).size

    assert all(640 <= size(classes)[0] < 900 for classes in (1, 4, 10, 100))
    width, height = size(1000)
    assert width * height < 1000 * 36 * 200
    assert 0.5 < width / height < 2
    monkeypatch.setattr("ddkit.data.pictures.MOST_PIXELS", 100 * 100 * 36)
    assert size(1000)[0] * size(1000)[1] < 150 * 100 * 36
