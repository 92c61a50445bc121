"""N steps equal k steps, an end, --resume, and N - k steps: bit for bit, for every component and recipe, on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddkit
from ddkit.api import resume
from ddkit.components import registry
from ddkit.files import read_tensors
from ddkit.recipes.resolve import recipe_for

STEPS, CUTS = 5, (1, 2, 4)
TINY = {
    "teacher.width": 4,
    "network.width": 4,
    "train.epochs": 1,
    "engine.log_every": 1,
    "engine.checkpoint_every": 1,
}


def own(kind: str) -> list[str]:
    return sorted(p.name for p in registry.plugins() if p.kind == kind and p.first_party)


def recipes_that_distil() -> list[str]:
    """Returns the recipes with a loss: those of a teacher alone make no set."""
    built = {name: recipe_for(name) for name in own("recipe")}
    return [name for name, recipe in built.items() if recipe.losses]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns a data set of 3 classes of colour images, 10 x 8 pixels."""
    random = np.random.default_rng(0)
    labels = np.arange(24) % 3
    images = random.integers(0, 200, (24, 10, 8, 3), dtype=np.uint8) + (labels * 20)[:, None, None, None].astype(np.uint8)
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(file, x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])
    return f"npz:{file}"


def run(data: str, out: Path, steps: int = STEPS, seed: int = 0, **given: Any) -> Path:
    sets = TINY | given.pop("sets", {})
    ddkit.distill(dataset=data, ipc=2, pipc=4, steps=steps, seed=seed, evaluators="none", sets=sets, device="cpu", out=out, **given)
    return out


def state(path: Path) -> dict[str, Any]:
    """Returns all that a run leaves but times: set, newest checkpoint (bank, multipliers, optimizers, networks), metrics."""
    found: dict[str, Any] = {}
    for part in sorted(path.rglob("*.safetensors")):
        tensors, record = read_tensors(part)
        record = {key: value for key, value in record.items() if key != "seconds"}
        found |= {f"{part.relative_to(path)} {name}": tensor for name, tensor in tensors.items()} | {str(part.relative_to(path)): record}
    for part in sorted(path.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in part.read_text().splitlines()]
        found[str(part.relative_to(path))] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns where two states are not the same; tensors by torch.equal, without any tolerance."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [
        name for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]  # fmt: skip


Make = Callable[..., Path]


def cut_off(path: Path, step: int) -> None:
    """Makes a finished run one that was killed right after the checkpoint of `step`."""
    for name in ("manifest.json", "synthetic.safetensors", "preview.png"):
        (path / name).unlink()
    for file in (path / "checkpoints").iterdir():
        if file.name > f"step-{step:08d}.safetensors":
            file.unlink()


class Copies:
    """An observer that keeps a copy of the run's folder as it is after every checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path, self.copies = path, {}  # type: ignore[var-annotated]

    @ddkit.hookimpl
    def checkpoint_written(self, index: int) -> None:
        self.copies[index] = shutil.copytree(self.path, self.path.parent / f"{self.path.name}-{index}")


def check(data: str, tmp_path: Path, **given: Any) -> None:
    """Asserts that a run which is cut off after every k in CUTS and continued is the run that was not, and that a seed matters."""
    copies = Copies(tmp_path / "whole")
    whole = state(run(data, tmp_path / "whole", observers=[copies], **given))
    assert any(name.startswith("checkpoints/") for name in whole)
    for step in CUTS:
        cut = copies.copies[step]
        assert not (cut / "manifest.json").exists()
        assert differences(state(cut), whole) != []
        resume(cut, device="cpu")
        assert differences(state(cut), whole) == [], f"cut off after step {step}"
    other = state(run(data, tmp_path / "other", seed=1, **given))
    assert other.keys() == whole.keys()
    assert "synthetic.safetensors images" in differences(whole, other)


@pytest.mark.parametrize("name", own("loss"))
def test_every_loss(data: str, tmp_path: Path, name: str) -> None:
    check(data, tmp_path, losses=name)


@pytest.mark.parametrize("name", own("initializer"))
def test_every_initializer(data: str, tmp_path: Path, name: str) -> None:
    init = f"file:{run(data, tmp_path / 'earlier', steps=1, losses='dm')}" if name == "file" else name
    check(data, tmp_path, losses="dm,dkkt", init=init)


@pytest.mark.parametrize("name", ["kmeans", "herding", "k-center"])
def test_every_initializer_on_the_teachers_features(data: str, tmp_path: Path, name: str) -> None:
    check(data, tmp_path, losses="dm", init=name, sets={"initializer.features": "teacher"})


@pytest.mark.parametrize("name", own("augmenter"))
def test_every_augmenter(data: str, tmp_path: Path, name: str) -> None:
    check(data, tmp_path, losses="dm,dkkt", augment=name)


@pytest.mark.parametrize("name", recipes_that_distil())
def test_every_recipe(data: str, tmp_path: Path, name: str) -> None:
    network = {"network.renew_every": 2, "network.inner_epochs": 1} if recipe_for(name, ipc=2).network.inner_epochs else {}
    check(data, tmp_path, recipe=name, sets=network)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_every_optimizer(data: str, tmp_path: Path, kind: str) -> None:
    sets = {"optimizer.images.kind": kind, "optimizer.images.momentum": 0.9} if kind == "sgd" else {"optimizer.images.kind": kind}
    check(data, tmp_path, losses="dm,dkkt", sets=sets)


def test_all_losses_at_once(data: str, tmp_path: Path) -> None:
    check(data, tmp_path, losses=",".join(own("loss")))
