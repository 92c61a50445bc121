"""Every component of ddkit's own passes the suite of its kind, one line each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from ddkit import testing
from ddkit.components import registry
from ddkit.data.real import passing
from ddkit.testing import (
    AugmenterConformance,
    DatasetConformance,
    EvaluatorConformance,
    ExporterConformance,
    InitializerConformance,
    LossConformance,
    ModelConformance,
    ObserverConformance,
)
from tests.forks import forking


@pytest.fixture(autouse=True, scope="module")
def _forks() -> Iterator[None]:
    """Imports each module in a fork of one process that has what an import is timed beside; tests of the testing kit start one anew."""
    with forking("torch", "numpy", "ddkit") as forks, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddkit.run.children.subprocess", forks)
        yield


class TestDistributionMatching(LossConformance):
    component = "dm"


class TestDistributionMatchingMean(LossConformance):
    component = "dm"
    options = {"normalise": "mean"}


class TestPrimal(LossConformance):
    component = "dkkt-primal"


class TestPrimalMasked(LossConformance):
    component = "dkkt-primal"
    options = {"masked": True, "views": {"raw": 1.0, "augmented": 5.0}}


class TestStationarity(LossConformance):
    component = "dkkt-stationarity"


class TestStationarityL1(LossConformance):
    component = "dkkt-stationarity"
    options = {"distance": "l1", "init": "least-squares", "constraint": "softplus"}


class TestStationarityByLayer(LossConformance):
    component = "dkkt-stationarity"
    options = {"distance": "layer-cosine", "parameters": "weights"}


class TestGradientMatching(LossConformance):
    component = "gm"


class TestTotalVariation(LossConformance):
    component = "total-variation"


class TestImageNorm(LossConformance):
    component = "image-norm"


class TestFeatureRegression(LossConformance):
    component = "feature-regression"


class TestFeatureRegressionTeacher(LossConformance):
    component = "feature-regression"
    options = {"targets": "teacher", "mixup": 0.5}


class TestReal(InitializerConformance):
    component = "real"


class TestNoise(InitializerConformance):
    component = "noise"


class TestKmeans(InitializerConformance):
    component = "kmeans"


class TestHerding(InitializerConformance):
    component = "herding"


class TestHerdingFeatures(InitializerConformance):
    component = "herding"
    options = {"features": "teacher"}


class TestKCenter(InitializerConformance):
    component = "k-center"


class TestMix(InitializerConformance):
    component = "mix"
    options = {"factor": 1}


class TestMultiplier(InitializerConformance):
    component = "multiplier"


class TestFile(InitializerConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        root = tmp_path_factory.mktemp("set")
        draw = np.random.default_rng(0)
        for label in range(3):
            (root / f"class {label}").mkdir()
            for number in range(4):
                Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(root / f"class {label}" / f"{number}.png")
        type(self).component = f"file:{root}"


class TestNone(AugmenterConformance):
    component = "none"


class TestDsa(AugmenterConformance):
    component = "dsa"


class TestDsaComposed(AugmenterConformance):
    component = "dsa"
    options = {"compose": 6}


class TestDsv(AugmenterConformance):
    component = "dsv"


class TestAccuracy(EvaluatorConformance):
    component = "accuracy"
    options = {"epochs": 2, "repeats": 2, "workers": 1, "model_options": {"width": 4}}


class TestAccuracySoft(EvaluatorConformance):
    component = "accuracy"
    options = {"epochs": 2, "repeats": 1, "labels": "both", "baselines": ["class-mean"], "model_options": {"width": 4}}


class TestTransfer(EvaluatorConformance):
    component = "transfer"
    options = {"epochs": 1, "repeats": 1, "model": "convnet,mlp"}


class TestRanking(EvaluatorConformance):
    component = "ranking"
    options = {"epochs": 1, "repeats": 1, "model_options": {"width": 4}}


class TestSpectrum(EvaluatorConformance):
    component = "spectrum"


class TestMemorisation(EvaluatorConformance):
    component = "memorisation"


class TestConvnet(ModelConformance):
    component = "convnet"


class TestConvnetBatchNorm(ModelConformance):
    component = "convnet"
    options = {"norm": "batch", "pooling": "max", "width": 8}


class TestConvnetGroupNorm(ModelConformance):
    component = "convnet"
    options = {"norm": "group", "width": 8}


class TestConvnetLayerNorm(ModelConformance):
    component = "convnet"
    options = {"norm": "layer", "width": 8}


class TestMlp(ModelConformance):
    component = "mlp"


class TestLenet(ModelConformance):
    component = "lenet"


class TestAlexnet(ModelConformance):
    component = "alexnet"


class TestVgg11(ModelConformance):
    component = "vgg11"
    options = {"width": 8}


class TestVgg11BatchNorm(ModelConformance):
    component = "vgg11"
    options = {"width": 8, "norm": "batch"}


class TestResnet18(ModelConformance):
    component = "resnet18"
    options = {"width": 8}


class TestTorchvision(ModelConformance):
    component = "torchvision:mobilenet_v3_small"


class TestTorchvisionSmallStem(ModelConformance):
    component = "torchvision:resnet18"


class TestTimm(ModelConformance):
    component = "timm:resnet18"

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("timm", reason="an extra")


class TestPython(ModelConformance):
    component = "python:tests.factories.small"


class TestDigits(DatasetConformance):
    component = "digits"


class TestNpz(DatasetConformance):
    @pytest.fixture(autouse=True)
    def file(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        file = tmp_path_factory.mktemp("npz") / "a.npz"
        draw = np.random.default_rng(0)
        np.savez(
            file, x_train=draw.random((8, 6, 6)).astype(np.float32), y_train=np.arange(8) % 2,
            x_test=draw.random((4, 6, 6)).astype(np.float32), y_test=np.arange(4) % 2,
        )  # fmt: skip
        type(self).component = f"npz:{file}"


class TestImagefolder(DatasetConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        root = tmp_path_factory.mktemp("folder")
        draw = np.random.default_rng(0)
        for name in ("a", "b"):
            (root / name).mkdir()
            for number in range(6):
                Image.fromarray(draw.integers(0, 255, (6, 7, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
        type(self).component = f"imagefolder:{root}"


class TestPassed(DatasetConformance):
    component = "python"

    @pytest.fixture(autouse=True)
    def passed(self) -> Iterator[None]:
        draw = np.random.default_rng(0)
        whole = [(draw.integers(0, 255, (6, 7, 3), dtype=np.uint8), label % 2) for label in range(12)]
        with passing((whole, whole[:4])):
            yield


class TestCard(ExporterConformance):
    component = "card"


class TestExportedFolder(ExporterConformance):
    component = "imagefolder"


class TestExportedNpz(ExporterConformance):
    component = "npz"


class TestSheet(ExporterConformance):
    component = "png"


class TestTensorBoard(ObserverConformance):
    component = "tensorboard"

    @pytest.fixture(autouse=True)
    def asked_for(self, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
        monkeypatch.setenv("DDKIT_TENSORBOARD", str(tmp_path_factory.mktemp("events")))  # unasked it does nothing


# Those whose images have to be downloaded first.
ELSEWHERE = {("dataset", "mnist"), ("dataset", "fashion-mnist"), ("dataset", "cifar10"), ("dataset", "cifar100"), ("dataset", "svhn")}


def _tested() -> set[tuple[str, str]]:
    suites = [each for each in globals().values() if isinstance(each, type) and issubclass(each, testing.Conformance)]
    named = [
        (each.kind, each.component)
        for each in suites
        if each not in testing.SUITES.values() and isinstance(vars(each).get("component"), str)
    ]
    return {(kind, str(component).partition(":")[0]) for kind, component in named} | {
        ("dataset", "npz"),
        ("dataset", "imagefolder"),
        ("initializer", "file"),
    }


def test_every_component_of_ddkit_has_a_conformance_test() -> None:
    own = {(p.kind, p.name) for p in registry.plugins() if p.first_party and p.kind in testing.SUITES}
    assert own - ELSEWHERE == _tested()


def test_every_kind_that_a_stranger_can_write_has_a_suite() -> None:
    assert set(testing.SUITES) == set(registry.GROUPS) - set(registry.DATA_KINDS)
