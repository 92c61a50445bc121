"""Sets and teachers of other projects: what is read, what is asked for, what is refused."""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddkit_parametrizations import enlarged_parts
from safetensors.torch import save_file
from torch import Tensor

import ddkit
from ddkit.components import registry
from ddkit.components.base import DataInfo
from ddkit.files import write_tensors
from ddkit.nn.networks import build_network
from ddkit.nn.teacher import load_teacher, read_teacher
from ddkit.recipes.tables import TeacherTable
from ddkit.run.artifact import Artifact
from ddkit.run.manifest import read_manifest
from tests.conftest import Result, said

Cli = Callable[..., Result]
NORM: dict[str, Any] = {"mean": [0.25], "std": [0.5]}


def _pair(labels: tuple[int, ...] = (0, 0, 1, 1), channels: int = 1, size: int = 4) -> tuple[Tensor, Tensor]:
    images = torch.rand(len(labels), channels, size, size, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor(labels)


def _saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


IMAGES, LABELS = _pair()
FORMS: dict[str, Any] = {
    "dict of images and labels": {"images": IMAGES, "labels": LABELS},
    "dict of data and targets": {"data": IMAGES, "targets": LABELS, "note": "mine"},
    "dict of x and y": {"x": IMAGES, "y": LABELS.float()},
    "list": [IMAGES, LABELS],
    "tuple": (IMAGES, LABELS),
    "result of the DC and DM code": {"data": [[IMAGES, LABELS]], "accs_all_exps": {"ConvNet": [0.5]}},
    "unsigned labels": {"images": IMAGES.numpy(), "labels": LABELS.numpy().astype("u2")},
    "double precision": {"images": IMAGES.double(), "labels": LABELS.int()},
    "parameter": {"images": torch.nn.Parameter(IMAGES), "labels": LABELS},
    "other names": {"distilled": IMAGES, "classes_of_them": LABELS, "history": [0.5, 0.6]},
    "dict in a dict": {"result": {"image_syn": IMAGES, "label_syn": LABELS}, "args": {"ipc": 2}},
    "arrays of NumPy": {"images": IMAGES.numpy(), "labels": np.asfortranarray(LABELS.numpy().astype(">i4")), "acc": np.float32(0.5)},
    "list of labels": {"images": IMAGES, "labels": LABELS.tolist()},
    "list of scalars": [IMAGES, list(LABELS)],
    "texts": {"images": IMAGES, "labels": [str(label) for label in LABELS.tolist()]},
    "texts in a list": [IMAGES, [str(label) for label in LABELS.tolist()]],
    "images of each class": [IMAGES[:2], IMAGES[2:]],
    "images of each class in a dict": {"data": [IMAGES[:2], IMAGES[2:]]},
    "a list of images": {"images": list(IMAGES), "labels": LABELS},
    "one-hot": {"images": IMAGES, "labels": torch.eye(2)[LABELS]},
    "labels (n, 1)": [IMAGES, LABELS[:, None]],
    "channels last": [IMAGES[:, 0, :, :, None], LABELS],
    "grey without a channel": [IMAGES[:, 0], LABELS],
    "floats to 255": [IMAGES * 255, LABELS],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_set_is_read(form: str, tmp_path: Path) -> None:
    found = ddkit.import_file(_saved(FORMS[form], tmp_path / "x.pt"), tmp_path / "out", pixels="unit", **NORM)
    assert isinstance(found, Artifact)
    read = ddkit.load(tmp_path / "out")
    torch.testing.assert_close(read.images, IMAGES, atol=0, rtol=1e-6 if "255" in form else 0)
    assert torch.equal(read.labels, LABELS)
    assert read.soft_labels is None
    assert (read.class_names, read.mean, read.std) == (["0", "1"], [0.25], [0.5])
    assert read.metadata["ipc"] == 2


def test_labels_that_are_texts_become_the_class_names_in_natural_order(tmp_path: Path, cli: Cli) -> None:
    texts = np.array(["dog 10", "dog 2", "dog 10", "dog 2"])
    np.savez(tmp_path / "x.npz", images=IMAGES.numpy(), labels=texts)
    np.savez(tmp_path / "bare.npz", images=IMAGES.numpy())
    np.save(tmp_path / "y.npy", texts)
    one = ddkit.import_file(tmp_path / "x.npz", tmp_path / "one", pixels="unit", **NORM)
    two = ddkit.import_file(tmp_path / "bare.npz", tmp_path / "two", pixels="unit", labels=tmp_path / "y.npy", **NORM)
    for found in (one, two):
        assert isinstance(found, Artifact)
        assert (found.class_names, found.labels.tolist()) == (["dog 2", "dog 10"], [0, 0, 1, 1])
        assert torch.equal(found.images, IMAGES[[1, 3, 0, 2]])
    refused = cli("import", tmp_path / "x.npz", "--mean", "0.5", "--std", "0.5", "--pixels", "unit", "--classes", "a,b", "--out", "three")
    assert (refused.code, refused.out) == (2, "")
    assert "the labels are texts and give the class names: dog 2, dog 10" in " ".join(refused.err.split())


def test_the_old_format_of_torch_npz_and_safetensors_are_read(tmp_path: Path) -> None:
    torch.save([IMAGES, LABELS], tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "x.npz", images=IMAGES.numpy(), labels=LABELS.numpy(), names=np.array(["a", "b"]))
    save_file({"images": IMAGES, "labels": LABELS}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.npz", "x.safetensors"):
        ddkit.import_file(tmp_path / name, tmp_path / f"{name}-out", pixels="unit", **NORM)
        assert torch.equal(ddkit.load(tmp_path / f"{name}-out").images, IMAGES)


def test_an_exported_npz_comes_back_bit_for_bit_without_a_flag(tmp_path: Path) -> None:
    images, labels = _pair()
    record = {"class_names": ["ü b", "a"], "mean": [0.4], "std": [0.3], "ipc": 2}
    Artifact(images * 1.5 - 0.25, labels, record).save(tmp_path / "s.safetensors")
    file = ddkit.export(tmp_path / "s.safetensors", "npz", tmp_path / "out") / "synthetic.npz"
    found = ddkit.import_file(file, tmp_path / "in")
    assert isinstance(found, Artifact)
    assert torch.equal(found.images, images * 1.5 - 0.25)
    assert found.class_names == ["ü b", "a"]
    assert (found.mean, found.std) == (pytest.approx([0.4]), pytest.approx([0.3]))
    other = ddkit.import_file(file, tmp_path / "other", mean=[0.1], std=[0.2], classes=["x", "y"])
    assert isinstance(other, Artifact)
    assert (other.mean, other.class_names) == ([0.1], ["x", "y"])


def test_normalised_images_become_pixels_recorded_statistics_are_taken_and_bytes_need_no_word(tmp_path: Path) -> None:
    normalised = (IMAGES - 0.25) / 0.5
    _saved([normalised, LABELS], tmp_path / "n.pt")
    _saved({"images": normalised, "labels": LABELS, "mean": torch.tensor([0.25]), "std": torch.tensor([0.5])}, tmp_path / "r.pt")
    _saved([(IMAGES * 255).round().to(torch.uint8), LABELS], tmp_path / "b.pt")
    given: dict[str, dict[str, Any]] = {"n": {"pixels": "normalised", **NORM}, "r": {"pixels": "normalised"}, "b": NORM}
    for name, flags in given.items():
        ddkit.import_file(tmp_path / f"{name}.pt", tmp_path / name, **flags)
        torch.testing.assert_close(ddkit.load(tmp_path / name).images, IMAGES, atol=0.003 if name == "b" else 1e-5, rtol=0)


def test_rows_are_put_in_order_of_class_unequal_classes_are_taken_and_both_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = _pair((1, 0, 1))
    ddkit.import_file(_saved([images, labels], tmp_path / "x.pt"), tmp_path / "out", pixels="unit", classes=["cat", "dog"], **NORM)
    found = ddkit.load(tmp_path / "out")
    assert found.labels.tolist() == [0, 1, 1]
    assert torch.equal(found.images, images[[1, 0, 2]])
    assert "ipc" not in found.metadata
    assert "(cat 1, dog 2)" in caplog.text
    assert found.class_names == ["cat", "dog"]
    assert "not sorted by class" in caplog.text


def test_one_of_several_sets_is_taken_by_its_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = _saved({"data": [[IMAGES, LABELS], [IMAGES / 2, LABELS]]}, tmp_path / "x.pt")
    ddkit.import_file(file, tmp_path / "first", pixels="unit", **NORM)
    assert "contains 2 sets. Number 0 is imported" in caplog.text
    ddkit.import_file(file, tmp_path / "second", pixels="unit", index=1, **NORM)
    assert torch.equal(ddkit.load(tmp_path / "second").images, IMAGES / 2)
    with pytest.raises(ddkit.InputError, match="--run must be from 0 to 1, not 2"):
        ddkit.import_file(file, tmp_path / "third", pixels="unit", index=2, **NORM)


def test_a_grid_of_images_is_decoded_as_declared_and_keeps_that_when_it_is_imported_again(tmp_path: Path) -> None:
    file = _saved([IMAGES, LABELS], tmp_path / "x.pt")
    found = ddkit.import_file(file, tmp_path / "out", pixels="unit", sets={"parametrization.factor": 2}, classes=["cat", "dog"], **NORM)
    assert isinstance(found, Artifact)
    again = ddkit.import_file(tmp_path / "out" / "synthetic.safetensors", tmp_path / "again")
    for each in (found, ddkit.load(tmp_path / "out"), again):
        assert torch.equal(each.images, enlarged_parts(IMAGES, 2))
        assert torch.equal(each.stored_images, IMAGES)
        assert (each.metadata["parametrization"], each.metadata["ipc"]) == ({"use": "grid", "factor": 2}, 2)
        assert each.class_names == ["cat", "dog"]


def _smooth(count: int, size: int = 32) -> Tensor:
    """Returns images (count, 1, size, size) like photographs: neighbouring pixels differ little."""
    coarse = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_what_looks_like_a_grid_and_was_not_declared_so_is_said(factor: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.stack([ddkit.data.grid(each, factor) for each in _smooth(4 * factor**2).split(factor**2)])
    file = _saved([images, LABELS], tmp_path / "x.pt")
    ddkit.import_file(file, tmp_path / "out", pixels="unit", **NORM)
    assert (f"looks like a grid of {factor} x {factor} images" in caplog.text) == (factor > 1)
    caplog.clear()
    for declared in {1, factor}:
        found = ddkit.import_file(file, tmp_path / f"{declared}", pixels="unit", grid=declared, **NORM)
        assert isinstance(found, Artifact)
        assert (len(found.images), caplog.text) == (4 * declared**2, "")


def test_labels_that_lie_apart_or_go_by_count_are_joined_with_the_images_of_several_files(cli: Cli) -> None:
    _saved(IMAGES[:2], Path("a.pt"))
    np.save("b.npy", IMAGES[2:].numpy())
    _saved({"labels": np.array([1, 0])}, Path("la.pt"))
    np.save("lb.npy", np.array([0, 1]))
    _saved(0.02, Path("lr_best.pt"))
    flags = ("--mean", 0.25, "--std", 0.5, "--pixels", "unit")
    result = cli(
        "import", "a.pt", "b.npy", "--labels", "la.pt", "--labels", "lb.npy", "--step-size", "lr_best.pt", *flags, "--out", "apart"
    )
    assert result.code == 0, result.err
    apart = ddkit.load("apart")
    assert torch.equal(apart.images, IMAGES[[1, 2, 0, 3]])
    assert (apart.labels.tolist(), float(apart.parameters["step_size"])) == ([0, 0, 1, 1], pytest.approx(0.02))
    assert [Path(each["path"]).name for each in read_manifest(Path("apart"))["imported"]["joined"]] == ["b.npy"]
    assert cli("import", "a.pt", "b.npy", "--ipc", 2, *flags, "--out", "counted").code == 0
    assert torch.equal(ddkit.load("counted").images, IMAGES)
    assert ddkit.load("counted").labels.tolist() == [0, 0, 1, 1]


def test_rows_of_labels_are_kept_or_become_the_likeliest_class(tmp_path: Path) -> None:
    rows = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.3, 0.7, 0]])
    file = _saved({"images": IMAGES, "labels": rows}, tmp_path / "x.pt")
    kept = ddkit.import_file(file, tmp_path / "kept", pixels="unit", **NORM)
    hard = ddkit.import_file(file, tmp_path / "hard", pixels="unit", labels="argmax", **NORM)
    assert isinstance(kept, Artifact)
    assert isinstance(hard, Artifact)
    assert torch.equal(kept.targets, rows)
    assert hard.soft_labels is None
    assert (hard.labels.tolist(), hard.class_names) == ([0, 0, 1, 1], ["0", "1", "2"])


def test_a_step_size_that_a_file_records_is_kept_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = _saved({"images": IMAGES, "labels": LABELS, "syn_lr": torch.tensor([0.03])}, tmp_path / "x.pt")
    found = ddkit.import_file(file, tmp_path / "out", pixels="unit", **NORM)
    assert isinstance(found, Artifact)
    assert float(ddkit.load(tmp_path / "out").parameters["step_size"]) == pytest.approx(0.03)
    assert "records the step size 0.03. It is kept" in caplog.text
    _saved({"images": IMAGES, "labels": LABELS, "lr": torch.ones(3)}, tmp_path / "several.pt")
    ddkit.import_file(tmp_path / "several.pt", tmp_path / "without", pixels="unit", **NORM)
    assert "'lr' in the file is not a single number, so it is ignored" in caplog.text


def test_more_class_names_than_images_and_tensors_can_need_are_refused_when_a_file_is_read(tmp_path: Path) -> None:
    record = {"class_names": [str(number) for number in range(1001)], "mean": [0.5], "std": [0.5]}
    Artifact(IMAGES, LABELS, record).save(tmp_path / "set.safetensors")
    with pytest.raises(ddkit.RunFilesError, match=r"1,001 classes for 4 images, but the limit is 1,000"):
        ddkit.load(tmp_path / "set.safetensors")
    Artifact(IMAGES, LABELS, record | {"class_names": record["class_names"][:1000]}).save(tmp_path / "most.safetensors")
    assert len(ddkit.load(tmp_path / "most.safetensors").class_names) == 1000
    write_tensors(tmp_path / "teacher.safetensors", {"weight": torch.zeros(3, 4)}, record)
    with pytest.raises(ddkit.InputError, match=r"1,001 class names, but its tensors have at most 1,000"):
        read_teacher(tmp_path / "teacher.safetensors")


def test_values_that_are_no_pixels_are_said_and_the_manifest_tells_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = _saved([IMAGES * 9 - 4, LABELS], tmp_path / "x.pt")
    ddkit.import_file(file, tmp_path / "out", pixels="unit", **NORM)
    assert "Do --pixels, --mean and --std fit this file?" in caplog.text
    manifest = read_manifest(tmp_path / "out")
    assert manifest["imported"]["path"] == str(file)
    assert set(manifest["files"]) == {"synthetic.safetensors", "preview.png"}


def test_an_imported_set_is_evaluated_and_blended(cli: Cli, tmp_path: Path) -> None:
    images, labels = _pair(tuple(range(10)), size=8)
    _saved([images, labels], tmp_path / "x.pt")
    flags = ["--mean", "0.3", "--std", 0.4, "--pixels", "unit", "--classes", 10]
    for name in ("a", "b"):
        result = cli("import", tmp_path / "x.pt", "--out", name, *flags, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out) == {
            "schema": 1, "out": name, "kind": "set", "images": [10, 1, 8, 8], "classes": [str(number) for number in range(10)],
        }  # fmt: skip
    small = ["--repeats", 1, "--set", "evaluators.accuracy.epochs=1", "--json"]
    for target in ("a", "a/synthetic.safetensors"):
        result = cli("evaluate", target, "--dataset", "digits", "--pipc", 2, *small)
        assert result.code == 0, result.err
    assert cli("blend", "a", "b", "--out", "c").code == 0
    assert cli("evaluate", "c", "--dataset", "digits", "--pipc", 2, *small).code == 0
    assert torch.allclose(ddkit.load("c").images, images)


# Teachers

INFO = DataInfo(class_names=tuple(map(str, range(10))), channels=1, size=(8, 8))


def _network(**options: Any) -> torch.nn.Module:
    return build_network(registry.create("model", "convnet", options, data=INFO, where="teacher"), INFO, 3, "test")


WRAPS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda state: state,
    "ordered": collections.OrderedDict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "net": lambda state: {"net": state, "acc": 0.9},
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {"state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}},
    "wrapped twice": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    "prefix of a framework": lambda state: {
        "state_dict": {f"model.{name}": value for name, value in state.items()} | {"a": state["classifier.bias"]}
    },
    "behind a normalising layer": lambda state: {f"backbone.{name}": value for name, value in state.items()} | {"0.mean": torch.zeros(3)},
    "params": lambda state: {"params": state, "optimizer": {"state": {0: {"momentum_buffer": torch.rand(3, 3)}}, "lr": np.float64(0.1)}},
    "ema alone": lambda state: {"ema": {"shadow": state}, "step": 3},
    "numbers beside": lambda state: {**state, "epoch": 3, "accuracy": np.float32(0.9)},
    "without counters": lambda state: {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    "half precision": lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_form_of_a_state_dict_becomes_a_teacher(wrap: str, tmp_path: Path) -> None:
    network = _network(width=8, norm="batch")
    file = _saved(WRAPS[wrap](network.state_dict()), tmp_path / "x.pth")
    ddkit.import_file(file, tmp_path / "t.safetensors", classes=10, size=(8, 8), sets={"teacher.norm": "batch", "teacher.width": 8}, **NORM)
    teacher = load_teacher(TeacherTable(use=str(tmp_path / "t.safetensors")), INFO, torch.device("cpu"))
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(teacher.logits(x), network.eval()(x), atol=0.01 if wrap == "half precision" else 0, rtol=0)
    assert (teacher.mean, teacher.std) == ((0.25,), (0.5,))
    assert teacher.info["model"] == "convnet"
    assert (teacher.info["options"]["norm"], teacher.info["input_shape"]) == ("batch", [1, 8, 8])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_torchvision_becomes_a_teacher(cli: Cli, prefix: str) -> None:
    from torchvision.models import squeezenet1_1

    theirs = {f"{prefix}{name}": value for name, value in squeezenet1_1(num_classes=3).state_dict().items()}
    torch.save({"state_dict": theirs, "epoch": 3}, "theirs.pth")
    words = ("--size", 32, "--classes", "a,b,c", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2")
    told = cli("import", "theirs.pth", "--out", "t.safetensors", "--model", "torchvision:squeezenet1_1", *words)
    assert told.code == 0, told.err
    info = DataInfo(class_names=("a", "b", "c"), channels=3, size=(32, 32))
    teacher = load_teacher(TeacherTable(use="t.safetensors", model="convnet"), info, torch.device("cpu"))
    assert teacher.info["options"]["architecture"] == "squeezenet1_1"
    images = torch.rand(2, 3, 32, 32)
    plain = squeezenet1_1(num_classes=3)
    plain.load_state_dict({name.removeprefix("module."): value for name, value in theirs.items()})
    assert torch.allclose(teacher.module.eval()(images), plain.eval()(images), atol=1e-5)
    wrong = cli("import", "theirs.pth", "--out", "w.safetensors", "--model", "torchvision:resnet18", *words)
    assert (wrong.code, wrong.out) == (4, "")
    assert "(`ddkit info model torchvision`)" in " ".join(wrong.err.split())


def test_a_checkpoint_of_ones_own_network_becomes_a_teacher(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\ndef small(channels, size, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    Path("own_import.py").write_text(code)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).state_dict(), "own.pt")
    words = ("own.pt", "--model", "python:own_import.small", "--size", 8, "--classes", 10, "--mean", 0.3, "--std", 0.4)
    told = cli("import", *words, "--out", "t.safetensors")
    assert told.code == 0, told.err
    run = ("distill", "--losses", "dkkt-primal", "--pipc", 0, "--init", "noise", "--teacher", "t.safetensors", "--evaluate", "none")
    asked = cli(*run, "--steps", 1, "--out", "no")
    assert asked.code == 4
    assert "--allow-code" in asked.err  # the file names the code, not the user
    assert cli(*run, "--steps", 1, "--out", "yes", "--model", "python:own_import.small").code == 0
    sys.modules.pop("own_import", None)


def test_of_a_bare_teacher_without_images_the_test_set_tells_the_shape(cli: Cli, tmp_path: Path) -> None:
    save_file(_network(width=8).state_dict(), str(tmp_path / "bare.safetensors"))
    options = ("--set", "teacher.width=8", "--set", "teacher.norm=instance", "--set", "teacher.mean=[0.3]", "--set", "teacher.std=[0.4]")
    run = ("distill", "--losses", "dkkt", "--init", "noise", "--teacher", tmp_path / "bare.safetensors", *options, "--steps", 1)
    made = cli(*run, "--pipc", 0, "--evaluate", "none", "--out", "run")
    assert made.code == 0, made.err
    assert ddkit.load("run").images.shape[1:] == (1, 8, 8)


# What is refused: nothing is written


class _Stranger:
    pass


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    _saved([IMAGES, LABELS], root / "set.pt")
    _saved(IMAGES, root / "bare.pt")
    _saved([IMAGES, torch.tensor([[1, 1], [0, 1], [1, 0], [0, 1]])], root / "several.pt")
    _saved({"images": IMAGES, "labels": LABELS, "names": np.array(["a", None])}, root / "objects.pt")
    _saved({"images": IMAGES, "labels": LABELS, "more": _Stranger()}, root / "stranger.pt")
    _saved(_network(width=8), root / "network.pt")
    _saved(_network(width=8).state_dict(), root / "state.pt")
    _saved({"a": 1}, root / "numbers.pt")
    _saved([], root / "empty.pt")
    _saved({"images": IMAGES.flatten(1), "labels": LABELS}, root / "flat.pt")
    _saved([IMAGES, LABELS[:3]], root / "short.pt")
    _saved([IMAGES, LABELS - 1], root / "negative.pt")
    _saved([IMAGES, torch.rand(4)], root / "soft.pt")
    _saved([IMAGES * torch.nan, LABELS], root / "nan.pt")
    _saved([torch.zeros(1).expand(10**6, 1, 1000, 1000), torch.zeros(1).expand(10**6)], root / "bomb.pt")
    _saved({"mine": IMAGES, "theirs": torch.zeros(1).expand(10**15)}, root / "names_bomb.pt")
    _saved([IMAGES.to(torch.complex64), LABELS], root / "complex.pt")
    _saved([IMAGES, LABELS * 0], root / "one.pt")
    _saved([(IMAGES * 255).to(torch.uint8), LABELS], root / "bytes.pt")
    _saved({"images": IMAGES, "labels": torch.tensor([0, 0, 1, 5]), "soft_labels": torch.eye(2)[LABELS]}, root / "beyond.pt")
    _saved({"images": IMAGES, "labels": [2**70, 0, 1, 1]}, root / "huge.pt")
    _saved({"images": IMAGES.to(torch.float8_e4m3fn), "labels": LABELS}, root / "float8.pt")
    _saved({"images": IMAGES, "labels": ["cat"] * 4}, root / "one_text.pt")
    _saved({"images": IMAGES, "labels": ["cat", "dog", "\ud800", "owl"]}, root / "surrogate.pt")
    _saved([IMAGES, torch.tensor([[0.5, torch.nan]] * 4)], root / "nan_soft.pt")
    _saved([IMAGES[:0], LABELS[:0]], root / "none.pt")
    (root / "text.pt").write_text("hello")
    whole = (root / "set.pt").read_bytes()
    (root / "torn.pt").write_bytes(whole[: len(whole) // 2])
    return root


SET = "--mean 0.25 --std 0.5 --pixels unit"
TEACHER = "--mean 0.25 --std 0.5 --classes 10 --size 8"
REFUSED = [
    (f"gone.pt {SET}", 4, "gone.pt does not exist"),
    ("set.pt --pixels unit", 4, "set.pt does not record how images are normalised. Add the mean and std of each channel"),
    ("set.pt --mean 0.25 --std 0.5", 4, "set.pt does not record the unit of its images. Add --pixels normalised, or --pixels unit"),
    ("set.pt --mean 0.25,0.3 --std 0.5", 2, "--mean has 2 values, but --std has 1"),
    ("set.pt --mean 0.25 --std 0 --pixels unit", 2, "each std must be positive"),
    ("set.pt --mean nan --std 1 --pixels unit", 2, "--mean and --std must be finite"),
    ("set.pt --mean much --std 1", 2, "'much' is not a list of numbers separated by commas"),
    (f"set.pt {SET} --classes cat,cat", 2, "each class needs its own name, but the names are cat, cat"),
    (f"set.pt {SET} --classes cat", 4, "set.pt has the label 1, but --classes has 1"),
    (f"set.pt {SET} --as teacher", 4, "set.pt contains a list of 2 items. This is not a teacher (a state dict of tensors by name)"),
    (f"set.pt {SET} --run 1", 4, "set.pt contains one set, so --run must be 0, not 1"),
    ("set.pt --mean 0.1,0.2,0.3 --std 1,1,1 --pixels unit", 4, "with this --mean it must be (n, 3, H, W)"),
    (f"flat.pt {SET}", 4, "flat.pt: images have the shape (4, 16)"),
    (f"short.pt {SET}", 4, "short.pt: labels are torch.int64 (3,)"),
    (f"soft.pt {SET}", 4, "soft.pt: labels are torch.float32 (4,), but must be whole numbers"),
    (f"negative.pt {SET}", 4, "negative.pt: labels go from -1 to 0"),
    (f"nan.pt {SET}", 4, "nan.pt: an image value is not finite"),
    (f"one.pt {SET}", 4, "one.pt only has the label 0, but a set needs at least two classes"),
    (f"one_text.pt {SET}", 4, "one_text.pt: all images have the label 'cat', but a set needs at least two classes"),
    (f"surrogate.pt {SET}", 4, "surrogate.pt: the name of a class is not UTF-8 text ('\\ud800')"),
    (f"beyond.pt {SET}", 4, "beyond.pt: a label is 5, but its soft labels are of 2 classes"),
    (f"huge.pt {SET}", 4, "huge.pt contains "),
    (f"float8.pt {SET}", 4, "float8.pt: images is not a plain tensor (torch.float8_e4m3fn"),
    (f"nan_soft.pt {SET}", 4, "nan_soft.pt: a soft label is not finite"),
    (f"none.pt {SET}", 4, "none.pt: the set has no image"),
    (f"bomb.pt {SET}", 4, "bomb.pt: labels is not a plain tensor"),
    (f"names_bomb.pt {SET}", 4, "names_bomb.pt contains a dict of mine (4, 1, 4, 4), theirs (1000000000000000,). This is not a set"),
    (f"complex.pt {SET}", 4, "complex.pt: images is not a plain tensor (torch.complex64"),
    (f"numbers.pt {SET}", 4, "numbers.pt contains a dict of a int. This is not a set"),
    (f"empty.pt {SET} --as set", 4, "empty.pt contains a list of 0 items. This is not a set"),
    ("state.pt --mean 0.25 --std 0.5", 4, "state.pt is a state dict, which records neither classes nor image size. Add --classes 10"),
    (f"state.pt {TEACHER}", 4, "does not fit the model 'convnet'; of another shape: classifier.weight is (10, 32)"),
    (f"state.pt {TEACHER} --set train.epochs=3", 2, "--set train.epochs has no effect"),
    (f"state.pt {TEACHER} --pixels unit --index 0 --set teacher.use=x", 2, "--pixels, --run, --set teacher.use have no effect"),
    (
        f"state.pt {TEACHER} --labels argmax --ipc 1 --grid 2 --step-size 1",
        2,
        "--labels, --ipc, --grid, --step-size have no effect",
    ),
    (f"bare.pt {SET}", 4, "bare.pt contains images (4, 1, 4, 4), but no labels. Add their file with --labels FILE"),
    (f"bare.pt {SET} --ipc 3", 4, "--ipc 3: "),
    (f"bare.pt {SET} --ipc 2 --labels FILES/set.pt", 2, "Leave one of them out"),
    (f"bare.pt {SET} --labels FILES/gone.pt", 4, "gone.pt does not exist"),
    (f"bare.pt {SET} --labels FILES/numbers.pt", 4, "numbers.pt: the file contains no labels"),
    (f"bare.pt FILES/bytes.pt {SET} --ipc 2", 4, "Files can only be joined if their images have the same shape and type"),
    (f"set.pt FILES/state.pt {SET}", 4, "state.pt contains no set"),
    (f"set.pt {SET} --labels FILES/set.pt", 2, "set.pt has no effect: "),
    (f"set.pt {SET} --ipc 2", 2, "--ipc 2 has no effect: "),
    (f"set.pt {SET} --labels argmax", 2, "the labels of "),
    (f"set.pt {SET} --grid 2 --set parametrization.factor=2", 2, "--grid 2 and --set parametrization.* set the same. Leave one"),
    (f"set.pt {SET} --step-size nan", 2, "--step-size nan: a learning rate must be finite and above 0"),
    (f"set.pt {SET} --step-size FILES/set.pt", 4, "the step size of a set must be one finite number above 0, but is None"),
    (f"several.pt {SET}", 4, "give an image several classes, or none"),
    (f"objects.pt {SET}", 4, "it contains a NumPy array of the type 'O8', which is not a number"),
    (f"set.pt {SET} --size 64 --model nosuch --set nonsense=1", 2, "--size, --model, --set nonsense have no effect"),
    (f"bytes.pt {SET}", 2, "--pixels has no effect: the images of"),
    (f"set.pt {SET} --set parametrization.factor=3", 4, "parametrization.factor = 3 cuts an image into 3 x 3 equal parts"),
    (f"set.pt {SET} --set decode.factor=2", 4, "--set parametrization.use=grid --set parametrization.factor=2"),
    (f"set.pt {SET} --set parametrization.use=fourier", 4, "the parametrization 'fourier' stores no images"),
    (f"set.pt {SET} --set parametrization.factor=9", 4, "parametrization.factor = 9 is not possible"),
    (f"set.pt {SET} --classes 1001", 2, "--classes has 1,001 classes for 4 images, but the limit is 1,000"),
    (f"state.pt {TEACHER} --model convnett", 3, "Did you mean 'convnet'?"),
    ("state.pt --mean 0.25 --std 0.5 --classes 10 --size 8,8,8", 2, "--size must be height and width in pixels"),
    ("state.pt --mean 0.25 --std 0.5 --classes 1 --size 8", 2, "1 is not a number of classes from 2 to 100,000"),
    (f"stranger.pt {SET}", 4, "contains tests.run.test_importing._Stranger"),
    (f"network.pt {SET}", 4, "If you trust the file, save its tensors in Python: found = torch.load("),
    (f"text.pt {SET}", 4, "text.pt is not a file of torch.save, .npz, .npy or .safetensors: "),
    (f"torn.pt {SET}", 4, "torn.pt is an incomplete archive of torch.save or .npz"),
]


@pytest.mark.parametrize(("command", "code", "message"), REFUSED, ids=[command for command, _, _ in REFUSED])
def test_what_cannot_be_imported_is_told_and_nothing_is_written(files: Path, cli: Cli, command: str, code: int, message: str) -> None:
    result = cli("import", *f"{files}/{command} --out new".replace("FILES", str(files)).split())
    assert message in said(result.err)
    assert (result.code, result.out) == (code, "")
    assert list(Path.cwd().iterdir()) == []


def test_evaluate_of_a_file_of_another_project_names_the_command_that_reads_it(files: Path, cli: Cli) -> None:
    np.savez("x.npz", images=IMAGES.numpy(), labels=LABELS.numpy())
    for file in (files / "set.pt", Path("x.npz")):
        result = cli("evaluate", file, "--dataset", "digits")
        assert (result.code, result.out) == (5, "")
        assert f"To import a file of another project: `ddkit import {file} --out NAME`" in said(result.err)


def test_an_output_that_is_there_is_kept(files: Path, cli: Cli) -> None:
    Path("old").mkdir()
    Path("old/mine").write_text("mine")
    assert cli("import", files / "set.pt", *SET.split(), "--out", "old").code == 5
    assert cli("import", files / "state.pt", *TEACHER.split(), "--set", "teacher.width=8", "--out", "old/mine").code == 5
    assert Path("old/mine").read_text() == "mine"
