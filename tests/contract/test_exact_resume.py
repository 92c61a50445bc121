"""N steps equal k steps, an end, --resume, and N - k steps: bit for bit, for every component and recipe, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddkit
from ddkit.api import resume
from ddkit.components import registry
from ddkit.files import read_tensors
from ddkit.recipes.resolve import resolve

STEPS, CUTS = 5, (1, 2, 4)
TINY = {
    "teacher.width": 4,
    "teacher.norm": "batch",
    "network.width": 4,
    "train.epochs": 1,
    "engine.log_every": 1,
    "engine.checkpoint_every": 1,
}


def own(kind: str) -> list[str]:
    return sorted(p.name for p in registry.plugins() if p.kind == kind and p.first_party)


def cases() -> dict[str, dict[str, Any]]:
    """Returns what each run is given, by a name: every component that a run has one of, recipe and optimizer, and all losses at once."""
    both = {"losses": "dm,dkkt"}
    recipes = {name: resolve(name, ipc=2) for name in own("recipe")}
    renewed = {"network.renew_every": 2, "network.inner_epochs": 1}
    experts = {"network.source": "experts", "experts.count": 2, "experts.epochs": 2}
    trained = {"experts.count": 1, "experts.epochs": 22, "losses.trajectory.steps": 2}
    few = experts | {"experts.save_every": 1, "network.first": 0}
    shared = {"bases": {"parametrization.decoder": True}}  # by all classes
    pool = {"network.pool": 2, "network.renew_every": 3, "network.inner_steps": 2, "network.batch": 4}
    adam = {"network.train_on": "real", "network.inner_optimizer": "adam", "network.inner_mix": "cutmix", "network.norm": "batch"}
    momentum = {"optimizer.images.kind": "sgd", "optimizer.images.momentum": 0.9}
    return {
        **{f"loss {name}": {"losses": name} | ({"sets": trained} if name == "trajectory" else {}) for name in own("loss")},
        **{f"initializer {name}": both | {"init": name} for name in own("initializer")},
        "features of the teacher": {"losses": "dm", "init": "kmeans", "sets": {"initializer.features": "teacher"}},
        **{f"augmenter {name}": both | {"augment": name} for name in own("augmenter")},
        **{
            f"parametrization {name}": both | {"sets": {"parametrization": name, "initializer.reuse": True} | shared.get(name, {})}
            for name in own("parametrization") if name != "pixels"
        },
        **{
            f"recipe {name}": {
                "recipe": name,
                "sets": trained if "trajectory" in recipe.losses
                else renewed if recipe.network.inner_epochs
                else few if recipe.network.source == "experts"
                else {"teacher.norm": None} if recipe.teacher.model == "mlp"  # which has none
                else {},
            }
            for name, recipe in recipes.items() if recipe.losses
        },
        "networks of experts": both | {"sets": experts},
        "networks of experts, trained on the set": {"losses": "dm", "sets": experts | renewed},
        "classes of their own numbers": both | {"ipc": {"default": 2, "1": 5}, "sets": {"initializer.reuse": True}},
        "a pool trained on the set": {"losses": "dm", "sets": pool | {"network.inner_momentum": 0.9}},
        "a pool trained on real images": {"losses": "dm", "sets": pool | adam},
        "whitened": {"losses": "dm", "sets": {"data.whiten": True, "parametrization": "grid", "initializer.reuse": True}},
        "adam": both | {"sets": {"optimizer.images.kind": "adam"}},
        "sgd": both | {"sets": momentum},
        "all losses": {"losses": ",".join(own("loss")), "sets": trained},
        "learned labels": {"losses": "feature-regression", "sets": renewed | {"labels.kind": "learned", "labels.init": "teacher"}},
        "the teacher's labels": {"losses": "feature-regression", "sets": renewed | {"labels.kind": "teacher", "labels.temperature": 2.0}},
    }  # fmt: skip


CASES = cases()
# The run with all losses has what each keeps between steps; of the kinds without such a state some stand for all.
QUICK = {"initializer file", "augmenter dsa", "recipe practical-plus", "recipe dc", "recipe idm"}
SLOW = {name for name in CASES if name.partition(" ")[0] in ("loss", "initializer", "augmenter", "recipe")} - QUICK


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
    sets = {path: value for path, value in (TINY | given.pop("sets", {})).items() if value is not None}
    given = {"ipc": 2} | given
    ddkit.distill(dataset=data, pipc=4, steps=steps, seed=seed, evaluators="none", sets=sets, device="cpu", out=out, **given)
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


class Copies:
    """An observer that keeps a copy of the run's folder as it is after every checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.copies: dict[int, Path] = {}

    @ddkit.hookimpl
    def checkpoint_written(self, index: int) -> None:
        self.copies[index] = shutil.copytree(self.path, self.path.parent / f"{self.path.name}-{index}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_a_run_that_is_cut_off_and_continued_is_the_run_that_was_not(data: str, tmp_path: Path, name: str) -> None:
    given = CASES[name]
    if name == "initializer file":
        given = given | {"init": f"file:{run(data, tmp_path / 'earlier', steps=1, losses='dm')}"}
    copies = Copies(tmp_path / "whole")
    whole = state(run(data, tmp_path / "whole", observers=[copies], **given))
    assert any(name.startswith("checkpoints/") for name in whole)
    for step in CUTS:
        cut = copies.copies[step]
        assert not (cut / "manifest.json").exists()
        assert differences(state(cut), whole) != []
        resume(cut, device="cpu")
        assert differences(state(cut), whole) == [], f"cut off after step {step}"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "all losses")) for name in CASES])
def test_a_run_with_another_seed_is_another_run(data: str, tmp_path: Path, name: str) -> None:
    given = CASES[name]
    if name == "initializer file":
        given = given | {"init": f"file:{run(data, tmp_path / 'earlier', steps=1, losses='dm')}"}
    whole, other = (state(run(data, tmp_path / str(seed), seed=seed, **given)) for seed in (0, 1))
    for each in (other, whole):
        for key in [key for key in each if " network." in key]:
            del each[key]  # which networks of a pool are kept depends on the seed
    assert other.keys() == whole.keys()
    assert {"synthetic.safetensors images", "synthetic.safetensors stored"} & set(differences(whole, other))
