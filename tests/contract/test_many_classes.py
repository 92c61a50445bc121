"""A thousand classes of three images: everything that a run writes, in a few seconds, and of a size to look at."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddkit
from tests.conftest import SMALL

CLASSES, EACH = 1000, 3


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an .npz file of 1,000 classes of 3 training images and 1 test image, 8 x 8 grey."""
    file, random = tmp_path_factory.mktemp("many") / "many.npz", np.random.default_rng(0)
    images, labels = random.integers(0, 256, (CLASSES * EACH, 8, 8), dtype=np.uint8), np.repeat(np.arange(CLASSES), EACH)
    order = random.permutation(len(labels))
    names = np.array([f"вид {label} of many" for label in range(CLASSES)])
    np.savez(file, x_train=images[order], y_train=labels[order], x_test=images[::EACH], y_test=labels[::EACH], class_names=names)
    return file


def test_a_thousand_classes_go_through_a_whole_run(arrays: Path, tmp_path: Path) -> None:
    began = time.process_time()
    run = ddkit.distill(losses="dm,dkkt", dataset=f"npz:{arrays}", ipc=1, pipc=2, sets=SMALL, out=tmp_path / "run")
    ddkit.export(run.path, to="card", out=tmp_path / "card")
    spent = time.process_time() - began
    found = ddkit.load(run.path)
    assert torch.equal(found.labels, torch.arange(CLASSES))
    assert found.class_names[999] == "вид 999 of many"
    assert len(run.evaluations) == 1
    report = (run.path / "report.html").read_text(encoding="utf-8")
    assert "The first 50 of 1000 classes." in report
    assert len(report) < 2**20
    with Image.open(run.path / "preview.png") as preview:
        assert preview.width * preview.height < 10_000_000
        assert max(preview.size) < 5000
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "1000 images in 1000 classes" in card
    assert "| 999 | вид 999 of many | 1 |" in card
    assert "<details>" in card, "the table of classes is folded"
    assert sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file()) < 8 * 2**20
    assert spent < 60, "seconds; measured: 4"
