"""Every component of ddkit's own passes the suite of its kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddkit import testing
from ddkit.components import registry
from ddkit.components.kinds import CHECKED, DATA_KINDS, KINDS
from ddkit.data.passed import passing
from tests.forks import forking

# Kind and name, where FOLDER stands for a place that the test fills, with the options of a case: {} alone where one case is enough.
CASES: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("loss", "dm"): [{}, {"normalise": "mean"}],
    ("loss", "dkkt-primal"): [{}, {"masked": True, "views": {"raw": 1.0, "augmented": 5.0}}],
    ("loss", "dkkt-stationarity"): [
        {},
        {"distance": "l1", "init": "least-squares", "constraint": "softplus"},
        {"distance": "layer-cosine", "parameters": "weights"},
        {"distance": "l2", "objective": "margin"},
    ],
    ("loss", "gm"): [{}],
    ("loss", "mmd"): [{}],
    ("loss", "attention-matching"): [{}],
    ("loss", "classification"): [{}],
    ("loss", "class-logit"): [{}, {"others": 0.0}],
    ("loss", "trajectory"): [{"steps": 2}],
    ("loss", "unrolled"): [{"epochs": 2}],
    ("loss", "characteristic-function"): [{"frequencies": 64}],
    ("loss", "covariance-matching"): [{}],
    ("loss", "total-variation"): [{}],
    ("loss", "image-norm"): [{}],
    ("loss", "layer-means"): [{"shallow": 0.5}],
    ("loss", "class-centres"): [{}],
    ("loss", "batch-norm-statistics"): [{"first": 10.0}],
    ("loss", "feature-regression"): [{}, {"targets": "teacher", "mixup": 0.5}, {"mirror": True, "margin": 2.0}],
    ("initializer", "real"): [{}],
    ("initializer", "noise"): [{}],
    ("initializer", "kmeans"): [{}],
    ("initializer", "herding"): [{}, {"features": "teacher"}],
    ("initializer", "k-center"): [{}],
    ("initializer", "typical-crops"): [{}, {"crops": 2, "candidates": 1}],
    ("initializer", "mix"): [{"factor": 1}],
    ("initializer", "multiplier"): [{}],
    ("initializer", "file:FOLDER"): [{}],
    ("parametrization", "pixels"): [{}],
    ("parametrization", "grid"): [{}, {"factor": 3}, {"factor": 1}],
    ("parametrization", "fourier"): [{}, {"images": 1}, {"images": 7}],
    ("parametrization", "bases"): [{}, {"images": 5, "bases": 3, "pooled": 2, "decoder": True}],
    ("augmenter", "none"): [{}],
    ("augmenter", "dsa"): [{}, {"compose": 6}],
    ("augmenter", "dsv"): [{}],
    ("evaluator", "accuracy"): [
        {"epochs": 2, "repeats": 2, "workers": 1, "model_options": {"width": 4}},
        {"epochs": 2, "repeats": 1, "labels": "both", "baselines": ["class-mean"], "model_options": {"width": 4}},
    ],
    ("evaluator", "transfer"): [{"epochs": 1, "repeats": 1, "model": "convnet,mlp"}],
    ("evaluator", "ranking"): [{"epochs": 1, "repeats": 1, "model_options": {"width": 4}}],
    ("evaluator", "spectrum"): [{}],
    ("evaluator", "memorisation"): [{}],
    ("model", "convnet"): [
        {},
        {"norm": "batch", "pooling": "max", "width": 8},
        {"norm": "group", "width": 8},
        {"norm": "layer", "width": 8},
    ],
    ("model", "mlp"): [{}],
    ("model", "lenet"): [{}],
    ("model", "alexnet"): [{}],
    ("model", "vgg11"): [{"width": 8}, {"width": 8, "norm": "batch"}],
    ("model", "resnet18"): [{"width": 8}],
    ("model", "torchvision:mobilenet_v3_small"): [{}],
    ("model", "torchvision:resnet18"): [{}],
    ("model", "timm:resnet18"): [{}],
    ("model", "python:tests.factories.small"): [{}],
    ("dataset", "digits"): [{}],
    ("dataset", "npz:FOLDER/arrays.npz"): [{}],
    ("dataset", "imagefolder:FOLDER"): [{}],
    ("dataset", "python"): [{}],
    ("exporter", "card"): [{}],
    ("exporter", "imagefolder"): [{}],
    ("exporter", "npz"): [{}],
    ("exporter", "png"): [{}],
    ("observer", "tensorboard"): [{}],
}
ELSEWHERE = {  # images are downloaded first, or another library, which need not be there, reads them
    ("dataset", name) for name in ("mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "huggingface", "webdataset")
}


@pytest.fixture(autouse=True, scope="module")
def _forks() -> Iterator[None]:
    """Imports each module in a fork of one process that has what an import is timed beside; tests of the testing kit start one anew."""
    with forking("torch", "numpy", "ddkit") as forks, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddkit.run.children.subprocess", forks)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of three classes of four images, and arrays in a file beside them."""
    root, draw = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for label in range(3):
        (root / f"class {label}").mkdir()
        for number in range(4):
            Image.fromarray(draw.integers(0, 255, (8, 7, 3), dtype=np.uint8)).save(root / f"class {label}" / f"{number}.png")
    train, test = draw.random((8, 6, 6)).astype(np.float32), draw.random((4, 6, 6)).astype(np.float32)
    np.savez(root / "arrays.npz", x_train=train, y_train=np.arange(8) % 2, x_test=test, y_test=np.arange(4) % 2)
    return root


def cases() -> Iterator[Any]:
    """Yields kind, name and options of each case; those of a loss, a model or an evaluator that has one already are slow tests."""
    seen = set()
    for (kind, name), several in CASES.items():
        for options in several:
            again = kind in ("loss", "model", "evaluator") and (kind, name.partition(":")[0]) in seen
            seen.add((kind, name.partition(":")[0]))
            yield pytest.param(kind, name, options, marks=[pytest.mark.slow] * again)


@pytest.mark.parametrize(("kind", "name", "options"), list(cases()))
def test_it_passes_every_check(kind: str, name: str, options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="an extra")
    monkeypatch.setenv("DDKIT_TENSORBOARD", str(folder / "events"))  # unasked it does nothing
    draw = np.random.default_rng(0)
    whole = [(draw.integers(0, 255, (6, 7, 3), dtype=np.uint8), label % 2) for label in range(12)]
    with passing((whole, whole[:4])):
        outcomes = testing.check(kind, name.replace("FOLDER", str(folder)), options)
    assert {each.check: f"{each.problem} {each.place}" for each in outcomes if each.problem} == {}
    assert outcomes


def test_every_component_of_ddkit_and_every_kind_of_code_is_tested() -> None:
    own = {(p.kind, p.name) for p in registry.plugins() if p.first_party and p.kind in testing.SUITES}
    assert own - ELSEWHERE == {(kind, name.partition(":")[0]) for kind, name in CASES}
    assert set(CHECKED) == set(testing.SUITES) == set(KINDS) - set(DATA_KINDS)
