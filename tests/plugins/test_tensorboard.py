"""The observer `tensorboard`: what it writes, and that it does nothing unasked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddkit_tensorboard import MOST_ROWS, TensorBoard, grid

import ddkit
from ddkit.components.observers import Observers
from tests.conftest import SMALL, SMALL_FLAGS

READ = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1], size_guidance={"images": 0})
found.Reload()
tags = found.Tags()
print(json.dumps({
    "scalars": {tag: [[each.step, each.value] for each in found.Scalars(tag)] for tag in tags["scalars"]},
    "images": {tag: [[each.step, each.width, each.height] for each in found.Images(tag)] for tag in tags["images"]},
}))
"""


def test_a_run_writes_its_losses_diagnostics_accuracies_and_pictures(forks: Any, tmp_path: Path) -> None:
    words = "distill --losses dm,dkkt --ipc 2 --pipc 4 --out run --set engine.checkpoint_every=2 --set engine.log_every=1"
    command = [sys.executable, "-m", "ddkit", *words.split(), *SMALL_FLAGS, "--steps", "4"]
    done = forks.run(command, capture_output=True, cwd=tmp_path, env=os.environ | {"DDKIT_TENSORBOARD": "1"})
    assert done.returncode == 0, done.stderr
    read = forks.run([sys.executable, "-c", READ, str(tmp_path / "run" / "tensorboard")], capture_output=True, check=True)
    found = json.loads(read.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["scalars"]["dm/raw"] == [[line["step"], pytest.approx(line["losses"]["dm"]["raw"], rel=1e-6)] for line in lines]
    assert [step for step, _ in found["scalars"]["total"]] == [0, 1, 2, 3]
    assert "dkkt-stationarity/multiplier mean" in found["scalars"]
    (row,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluations"]
    (written,) = found["scalars"]["accuracy/convnet, short, hard labels, synthetic"]
    assert written[1] == pytest.approx(row["accuracy_mean"], rel=1e-6)
    assert [step for step, *_ in found["images"]["synthetic set"]] == [0, 2, 4]
    assert found["images"]["synthetic set"][0][1:] == [2 * 10 + 2, 10 * 10 + 2]  # 2 columns and 10 rows of 8 x 8, edges of 2


def test_a_path_gets_a_folder_of_the_runs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDKIT_TENSORBOARD", str(tmp_path / "all"))
    observers = Observers([("tensorboard", TensorBoard())], strict=True)
    observers.call("run_started", recipe=None, path=tmp_path / "run", start=0)
    observers.call("run_finished", path=tmp_path / "run", evaluations=[])
    assert list((tmp_path / "all" / "run").glob("events.*"))
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("value", ["", "0"])
def test_unasked_it_writes_nothing_and_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DDKIT_TENSORBOARD", value)
    before = "torch.utils.tensorboard" in sys.modules
    observers = Observers([("tensorboard", TensorBoard())], strict=True)
    observers.call("run_started", recipe=None, path=tmp_path, start=0)
    observers.call("checkpoint_written", index=0, images=torch.rand(2, 1, 4, 4), labels=torch.arange(2), class_names=["a", "b"])
    observers.call("step_finished", index=0, steps=1, record={"total": 1.0, "losses": {}})
    observers.call("run_finished", path=tmp_path, evaluations=[])
    assert list(tmp_path.iterdir()) == []
    assert ("torch.utils.tensorboard" in sys.modules) == before


def test_asked_for_and_not_installed_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDKIT_TENSORBOARD", "1")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Observers([("tensorboard", TensorBoard())], strict=True).call("run_started", recipe=None, path=tmp_path, start=0)
    assert "pip install 'ddkit[tensorboard]'" in caplog.text


def test_a_picture_has_a_row_a_class_and_white_where_one_has_fewer() -> None:
    images = torch.zeros(3, 1, 4, 4)
    found = grid(images, torch.tensor([0, 0, 1]))
    assert tuple(found.shape) == (3, 2 * 6 + 2, 2 * 6 + 2)
    assert float(found[:, 2:6, 2:6].max()) == 0
    assert float(found[:, 8:12, 8:12].min()) == 1
    many = grid(torch.zeros(50, 1, 4, 4), torch.arange(50))
    assert many.shape[1] == MOST_ROWS * 6 + 2


# The hook with the images


def test_observers_get_copies_of_the_images_at_every_checkpoint(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    class Spoils:
        @ddkit.hookimpl
        def checkpoint_written(self, index: int, images: torch.Tensor, labels: torch.Tensor, class_names: list[str]) -> None:
            seen.append((index, float(images.mean())))
            assert (len(images), len(labels), len(class_names)) == (20, 20, 10)
            images.fill_(7)
            labels.fill_(7)

    sets = SMALL | {"steps": 5, "engine.checkpoint_every": 2, "seed": 3}
    spoiled = ddkit.distill(losses="image-norm", ipc=2, evaluators="none", sets=sets, out=tmp_path / "a", observers=[Spoils()])
    assert [index for index, _ in seen] == [0, 2, 4, 5]
    assert len({mean for _, mean in seen}) == 4
    plain = ddkit.distill(losses="image-norm", ipc=2, evaluators="none", sets=sets, out=tmp_path / "b")
    assert torch.equal(ddkit.load(spoiled.path).images, ddkit.load(plain.path).images)
    assert ddkit.load(plain.path).labels.tolist() == sorted([*range(10), *range(10)])
