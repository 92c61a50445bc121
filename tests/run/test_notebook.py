"""What a run, a set and a row show of themselves in a notebook."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import ddkit
from tests.conftest import SMALL

MARKUP = "<script>alert('a & b')</script>\x1b[31m"


def picture(page: str) -> tuple[int, int]:
    """Returns width and height of the one picture of a page."""
    (found,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return Image.open(io.BytesIO(base64.b64decode(found, validate=True))).size


def row(**changed: object) -> ddkit.Evaluation:
    usual = {"evaluator": "accuracy", "model": "convnet", "protocol": "short", "labels": "hard", "repeats": 2, "accuracy_mean": 0.25}
    return ddkit.Evaluation(**{**usual, "accuracy_std": 0.01, "random_real_mean": 0.2, "random_real_std": 0.02, **changed})  # type: ignore[arg-type]


def artifact(count: int = 2, side: int = 8, classes: int = 2) -> ddkit.Artifact:
    names = [MARKUP, *(f"class {number}" for number in range(1, classes))]
    metadata = {"class_names": names, "mean": [0.5], "std": [0.5], "recipe": MARKUP}
    return ddkit.Artifact(torch.rand(count * classes, 1, side, side), torch.arange(classes).repeat_interleave(count), metadata)


def test_a_row_is_a_table_with_escaped_texts() -> None:
    page = row(model=MARKUP, details={"variant": "<b>"})._repr_html_()
    assert page.count("<table>") == 1
    assert "25.0 ± 1.0 %" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "short, &lt;b&gt;" in page
    assert "only a summary" in row(accuracy_mean=None, accuracy_std=None, details={"summary": "only a summary"})._repr_html_()


@pytest.mark.parametrize(("count", "side", "classes", "whole"), [(2, 8, 2, True), (30, 8, 2, False), (6, 200, 30, False), (1, 1, 1, True)])
def test_a_set_is_a_small_picture_and_a_table(count: int, side: int, classes: int, whole: bool) -> None:
    made = artifact(count, side, classes)
    page = made._repr_html_()
    width, height = picture(page)
    assert (width >= 640, height < 800) == (True, True)
    assert ("images.</p>" in page) != whole
    assert len(page) < 600_000
    assert "<script" not in page
    assert "\x1b" not in page
    assert repr(made) == f"<ddkit.Artifact of {count * classes} images (1, {side}, {side}), {classes} classes>"


def test_a_run_is_its_picture_and_its_rows_and_says_so_if_its_folder_is_gone(tmp_path: Path) -> None:
    made = ddkit.distill(losses="dm", pipc=2, sets=SMALL, out=tmp_path / "<b>run", device="cpu")
    page = made._repr_html_()
    assert page.count("<table>") == 1
    assert "&lt;b&gt;run" in page
    assert "<b>run" not in page
    assert picture(page) == Image.open(io.BytesIO((made.path / "preview.png").read_bytes())).size
    file = made.path / "preview.png"
    Image.effect_noise((1500, 900), 90).save(file)  # of many classes
    assert file.stat().st_size > 256 * 1024
    assert picture(made._repr_html_()) == (640, 640)
    for content in (b"no picture", b"", file.read_bytes()[:5000], file.read_bytes()[:300_000]):
        file.write_bytes(content)
        assert "preview.png cannot be shown" in made._repr_html_()
    file.unlink()
    os.mkfifo(file)
    assert "preview.png cannot be shown" in made._repr_html_()
    file.unlink()
    file.mkdir()
    assert "preview.png cannot be shown" in made._repr_html_()
    for gone in (lambda: shutil.rmtree(made.path), lambda: made.path.write_text("a file now")):
        gone()
        page = made._repr_html_()
        assert "is not there: it was moved or deleted" in page
        assert "<img" not in page
        assert page.count("<table>") == 1  # the rows are in memory
