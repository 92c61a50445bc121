"""Models of other libraries and of the user's own: fitted to the data, and no code runs because a file names it."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ddkit
from ddkit.components.trust import granting
from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network
from ddkit.testing.suite import info_of, noise
from tests.conftest import SMALL, Result, set_flags

CLI = Callable[..., Result]
QUICK = {key: value for key, value in SMALL.items() if "width" not in key}
QUICK_FLAGS = set_flags(QUICK)


def network(name: str, shape: tuple[int, int, int] = (3, 32, 32), **options: Any) -> nn.Module:
    info = info_of(shape, 10)
    with granting({"model": name}):
        return build_network(ddkit.create("model", name, options, data=info), info, 0, "test")


# torchvision


def test_small_images_get_a_small_stem_and_it_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddkit_models.zoo._TOLD", set())
    small = network("torchvision:resnet18")
    assert (small.conv1.kernel_size, small.conv1.stride, small.conv1.padding) == ((3, 3), (1, 1), (1, 1))  # type: ignore[union-attr]
    assert isinstance(small.maxpool, nn.Identity)
    assert "torchvision:resnet18: for 32 x 32 pixels its first convolution is 3x3 with stride 1 instead of 7x7" in caplog.text
    network("torchvision:resnet18")
    assert len(caplog.records) == 1  # once in a process


def test_larger_images_and_stem_original_keep_it_which_is_decided_once_and_recorded() -> None:
    for size, options in (((64, 64), {}), ((32, 32), {"stem": "original"})):
        kept = network("torchvision:resnet18", (3, *size), **options)
        assert kept.conv1.kernel_size == (7, 7)  # type: ignore[union-attr]
        assert isinstance(kept.maxpool, nn.MaxPool2d)
    for size, stem in (((32, 32), "small"), ((32, 64), "small"), ((64, 64), "original")):
        assert ddkit.create("model", "torchvision:resnet18", {}, data=info_of((3, *size))).options.stem == stem


NETWORKS = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf"]


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_classes_and_features_fit_and_nothing_draws(name: str) -> None:
    module, x = network(f"torchvision:{name}", (1, 32, 32)), noise((3, 1, 32, 32), "x")
    before = torch.get_rng_state()
    assert module.training
    assert module(x).shape == (3, 10)
    features = embed(module, x)
    assert features.ndim == 2
    assert len(features) == 3
    assert torch.equal(torch.get_rng_state(), before)
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if last:
        torch.testing.assert_close(last[-1](embed(module.eval(), x)), module(x))


def test_dropout_would_have_moved_the_global_generator() -> None:
    import torchvision.models

    before = torch.get_rng_state()
    torchvision.models.squeezenet1_1(num_classes=3)(noise((1, 3, 32, 32), "x"))
    assert not torch.equal(torch.get_rng_state(), before)


def test_weights_come_from_a_local_file_only_and_what_does_not_fit_stays_fresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "w.safetensors"
    trained = network("torchvision:mobilenet_v3_small", (3, 32, 32))
    save_file({key: value.clone() for key, value in trained.state_dict().items() if not key.startswith("classifier")}, file)
    model = ddkit.create("model", "torchvision:mobilenet_v3_small", {"weights": str(file)}, data=info_of((3, 32, 32), 10))
    one, two = (build_network(model, info_of((3, 32, 32), 10), seed, "test") for seed in (1, 2))
    assert torch.equal(one.features[0][0].weight, trained.features[0][0].weight)  # type: ignore[index, union-attr]
    assert torch.equal(one.features[0][0].weight, two.features[0][0].weight)  # type: ignore[index, union-attr]
    assert not torch.equal(one.classifier[3].weight, two.classifier[3].weight)  # type: ignore[index, union-attr]
    assert "4 of 244 tensors are not in the weights file" in caplog.text
    assert len(model.options.weights_sha256) == 64


@pytest.mark.slow
def test_a_run_uses_torchvision_for_teacher_network_and_evaluation_and_repeats(tmp_path: Path) -> None:
    name = "torchvision:shufflenet_v2_x0_5"
    runs = [
        ddkit.distill(losses="dm,dkkt", model=name, pipc=3, sets=QUICK, out=tmp_path / "one"),
        ddkit.distill(recipe=str(tmp_path / "one" / "recipe.toml"), out=tmp_path / "two"),
    ]
    assert [row.model for run in runs for row in run.evaluations] == [name, name]
    one, two = (ddkit.load(run.path).images for run in runs)
    assert torch.equal(one, two)
    assert runs[0].evaluations == runs[1].evaluations


@pytest.mark.slow
def test_a_teacher_without_second_derivatives_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ddkit.InputError, match=r"dkkt-stationarity.*second derivative.*hardsigmoid"):
        ddkit.distill(losses="dkkt", model="torchvision:mobilenet_v3_small", pipc=3, sets=QUICK, evaluators="none", out=tmp_path / "run")


# timm, which need not be there


class FakeTimm(nn.Module):
    """The part of timm's interface that is used."""

    def __init__(self, channels: int, classes: int, size: Any) -> None:
        super().__init__()
        self.size = size
        self.conv1, self.maxpool = nn.Conv2d(channels, 6, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        self.fc, self.dropout = nn.Linear(6, classes), nn.Dropout(0.3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.maxpool(self.conv1(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, *, pretrained: bool, num_classes: int, in_chans: int, img_size: Any = None, depth: int = 1) -> nn.Module:
        assert not pretrained
        assert depth == 1 or name == "vit"
        return FakeTimm(in_chans, num_classes, img_size)

    library, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    models.get_pretrained_cfg = lambda name, allow_unregistered: types.SimpleNamespace(fixed_input_size=name == "vit")  # type: ignore[attr-defined]
    library.list_models, library.create_model, library.models = lambda: ["resnet", "vit"], create_model, models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", library)
    monkeypatch.setitem(sys.modules, "timm.models", models)


@pytest.mark.usefixtures("fake_timm")
def test_timm_gets_channels_classes_the_size_where_it_is_fixed_and_the_small_stem() -> None:
    module, x = network("timm:resnet", (1, 32, 32)), noise((2, 1, 32, 32), "x")
    assert module.size is None
    assert module.conv1.kernel_size == (3, 3)  # type: ignore[union-attr]
    assert isinstance(module.maxpool, nn.Identity)
    assert module.dropout.p == 0  # type: ignore[union-attr]
    torch.testing.assert_close(module.fc(embed(module, x)), module(x))  # type: ignore[operator]
    assert network("timm:vit", (1, 32, 32)).size == (32, 32)
    with pytest.raises(ddkit.InputError, match=r"timm has no classifier 'resnot'. Did you mean timm:resnet"):
        ddkit.create("model", "timm:resnot")


@pytest.mark.usefixtures("fake_timm")
def test_arguments_of_the_library_pass_through_but_those_that_load_weights() -> None:
    def made(**kwargs: Any) -> nn.Module:
        return ddkit.create("model", "timm:vit", {"kwargs": kwargs})(1, (32, 32), 3)  # type: ignore[no-any-return]

    assert made(img_size=(16, 16), depth=2).size == (16, 16)
    for kwargs, said in (
        ({"nonsense": 1}, "cannot be made with kwargs nonsense = 1"),
        ({"pretrained": True}, "pretrained cannot be set, because ddkit sets it"),
        ({"checkpoint_path": "theirs.pth"}, "checkpoint_path cannot be set, because ddkit sets it"),
        ({"depth": {"a": 1}}, "kwargs.depth is a table"),
    ):
        with pytest.raises(ddkit.InputError, match=said):
            made(**kwargs)


def test_without_timm_one_paragraph_says_how_to_install_it(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    found = cli("distill", "--losses", "dm", "--model", "timm:resnet18")
    assert (found.code, found.out) == (3, "")
    assert "pip install 'ddkit[timm]'" in found.err
    assert not Path("runs").exists()


# the user's own


def test_a_function_in_the_current_folder_is_a_model(cli: CLI) -> None:
    Path("my_own_models.py").write_text(Path(__file__).parents[1].joinpath("factories.py").read_text())
    arguments = ("distill", "--losses", "dm,dkkt", "--pipc", 3, "--out", "run", *QUICK_FLAGS)
    found = cli(*arguments, "--model", "python:my_own_models.small", "--json")
    assert found.code == 0, found.err
    assert [row["model"] for row in json.loads(found.out)["evaluations"]] == ["python:my_own_models.small"]
    assert os.getcwd() not in sys.path


def test_a_network_made_for_another_size_is_refused_with_the_size_to_set(cli: CLI) -> None:
    body = "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 256, classes))\n"
    Path("of_one_size.py").write_text(f"from torch import nn\n\n\ndef fixed(channels, size, classes):\n{body}", encoding="utf-8")
    found = cli("distill", "--losses", "dm", "--pipc", 2, "--out", "run", *QUICK_FLAGS, "--model", "python:of_one_size.fixed")
    assert (found.code, found.out, Path("run").exists()) == (4, "", False)
    assert "does not take the images" in found.err
    assert "--set 'data.size=[HEIGHT,WIDTH]'" in " ".join(found.err.split())


def test_dropout_of_a_users_model_is_told(caplog: pytest.LogCaptureFixture) -> None:
    network("python:tests.factories.small", (1, 8, 8))
    assert caplog.text == ""
    network("python:tests.factories.with_dropout", (1, 8, 8))
    assert "dropout (1) draws from torch's global generator" in caplog.text


def test_a_module_that_was_edited_is_told_and_gets_another_automatic_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "edited_models.py"
    file.write_text(Path(__file__).parents[1].joinpath("factories.py").read_text())
    with granting({"model": "python:edited_models.small"}):
        first = ddkit.create("model", "python:edited_models.small", {}, data=info_of())
        file.write_text(file.read_text() + "\n# edited\n")
        again = ddkit.create("model", "python", {"factory": first.options.factory, "sha256": first.options.sha256}, data=info_of())
    assert "has changed since this was recorded" in caplog.text
    assert again.options.sha256 != first.options.sha256
