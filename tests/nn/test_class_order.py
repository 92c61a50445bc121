"""A teacher whose outputs are in another order than the data's classes is brought into theirs, by name or by a flag, or is found out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import ddkit
from ddkit.files import read_tensors, write_tensors
from ddkit.nn.class_order import fitting
from ddkit.nn.teacher import at_chance, load_teacher
from ddkit.recipes.resolve import resolve
from ddkit.recipes.tables import TeacherTable
from ddkit.run.setup import RunSetup
from tests.conftest import SMALL_FLAGS, Result, write_image_folder

Cli = Callable[..., Result]
TURNED = [2, 0, 1]  # output k of the turned files is output TURNED[k] of the good one
NAMES = ["cat", "dog", "owl"]
FIT = "teacher.classes=" + json.dumps([NAMES[k] for k in TURNED], separators=(",", ":"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with data `pets`, a good teacher, and files that are it with turned outputs under several names."""
    root = tmp_path_factory.mktemp("order")
    write_image_folder(root / "pets", train=20)
    options = {"train.epochs": 15, "teacher.width": 8, "train.augmenter": "none", "train.batch": 16}
    ddkit.train(root / "good.safetensors", dataset=f"imagefolder:{root / 'pets'}", sets=options, device="cpu")
    tensors, record = read_tensors(root / "good.safetensors")
    last = [name for name in tensors if name.startswith("classifier")]
    turned = {**tensors, **{name: tensors[name][TURNED] for name in last}}
    record = {key: value for key, value in record.items() if key not in ("schema", "sealed", "digest")}
    numbers = {"class_names": ["0", "1", "2"]}
    write_tensors(root / "turned.safetensors", turned, record | {"class_names": [NAMES[k] for k in TURNED]})
    write_tensors(root / "claimed.safetensors", turned, record)
    write_tensors(root / "numbers.safetensors", turned, record | numbers)
    write_tensors(root / "good-numbers.safetensors", tensors, record | numbers)
    blind = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    write_tensors(root / "weak.safetensors", blind, record | numbers)
    write_tensors(root / "blind.safetensors", blind, {key: value for key, value in (record | numbers).items() if key != "training"})
    for split in ("train", "test"):
        for number, name in enumerate(NAMES):
            shutil.copytree(root / "pets" / split / name, root / "numbered" / split / str(number))
    return root


def distil(cli: Cli, files: Path, teacher: str, *flags: object) -> Result:
    data = ("--dataset", f"imagefolder:{files / 'pets'}", "--pipc", 15, "--ipc", 2)
    return cli("distill", *data, "--teacher", files / f"{teacher}.safetensors", "--losses", "dm", *SMALL_FLAGS, *flags)


def load(files: Path, teacher: str, sets: Mapping[str, Any] | None = None, *, pipc: int = 15, data: str = "pets") -> None:
    """Does what a run does before anything else: loads its teacher and tries it."""
    data, file = f"imagefolder:{files / data}", str(files / f"{teacher}.safetensors")
    RunSetup(resolve(losses="dm", dataset=data, teacher=file, pipc=pipc, evaluators="none", sets=sets or {}), device="cpu").load_teacher()


def teacher_of(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "manifest.json").read_text())["teacher"]
    return found


def test_all_that_uses_a_teacher_sees_the_order_of_the_data(cli: Cli, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--losses", "dkkt,feature-regression", "--set", "labels.kind=teacher", "--init", "multiplier")
    flags = (
        *flags,
        "--set",
        "evaluators.accuracy.labels=teacher",
        "--set",
        "evaluators.accuracy.repeats=1",
        "--set",
        "losses.feature-regression.targets=teacher",
    )
    for name in ("good", "turned"):
        caplog.clear()
        result = distil(cli, files, name, *flags, "--out", name)
        assert result.code == 0, result.err
        assert ("sorted into the order of the data (cat, dog, owl)" in caplog.text) == (name == "turned")
    good, turned = ddkit.load("good"), ddkit.load("turned")
    assert not torch.equal(good.targets, good.targets.roll(1, 1))
    torch.testing.assert_close(turned.images, good.images)
    torch.testing.assert_close(turned.targets, good.targets)
    first = [json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[0])["losses"] for run in ("good", "turned")]
    for label in ("dkkt-primal", "dkkt-stationarity", "feature-regression"):
        assert first[1][label]["raw"] == pytest.approx(first[0][label]["raw"], rel=1e-3)
    rows = [json.loads((Path(run) / "evaluation.json").read_text())["evaluations"][0] for run in ("good", "turned")]
    assert rows[0]["accuracy_mean"] == rows[1]["accuracy_mean"]
    assert teacher_of("turned")["accessible_accuracy"] == teacher_of("good")["accessible_accuracy"] > 0.8
    assert teacher_of("turned")["outputs"] == [NAMES[k] for k in TURNED]
    assert "outputs" not in teacher_of("good")


def test_names_that_prove_nothing_are_tried_and_the_order_that_fits_works_as_printed(
    cli: Cli, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = distil(cli, files, "numbers", "--out", "no")
    assert (refused.code, refused.out, Path("no").exists()) == (4, "", False)
    flag = re.search(r"--set 'teacher\.classes=[^']+'", " ".join(refused.err.split()))
    assert flag, refused.err
    assert shlex.split(flag[0])[1] == FIT
    load(files, "numbers", {"teacher.classes": json.loads(FIT.partition("=")[2])})
    load(files, "numbers", {"teacher.check": False})
    assert distil(cli, files, "numbers", "--plan").code == 4
    with pytest.raises(ddkit.InputError, match=r"(?s)no better than guessing(?!.*teacher.classes=.).*teacher.check=false"):
        load(files, "blind")
    caplog.clear()
    load(files, "good-numbers")  # the negative control
    assert "if output k is used for class k" in caplog.text
    assert "too few" not in caplog.text
    load(files, "numbers", pipc=1)
    assert "too few images to test this order" in caplog.text
    assert FIT not in caplog.text
    load(files, "claimed")
    assert FIT in caplog.text, "names that are those of the data are believed, with a warning"


def test_numbers_are_no_proof_and_a_weak_teacher_of_such_data_is_only_warned_of(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ddkit.InputError, match=r"it is correct on 100.0 %: --set 'teacher.classes=\["):
        load(files, "numbers", data="numbered")
    with pytest.raises(ddkit.InputError, match="no better than guessing"):
        load(files, "blind", data="numbered")
    load(files, "good-numbers", data="numbered")
    assert not caplog.messages
    load(files, "weak", data="numbered")
    assert "no better than guessing" in caplog.text


def test_a_flag_that_an_error_would_cut_is_printed_whole_before(
    files: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddkit.nn.teacher.LONGEST", 60)
    with pytest.raises(ddkit.InputError, match="the flag in the line above"):
        load(files, "numbers")
    assert caplog.messages == [f"The order of the outputs that fits: --set {shlex.quote(FIT)}"]


def test_of_a_teacher_of_more_classes_the_outputs_of_the_data_are_used(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    cpu, images = torch.device("cpu"), torch.randn((5, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    info = ddkit.DataInfo(class_names=tuple(NAMES), channels=3, size=(12, 12))
    good = load_teacher(TeacherTable(use=str(files / "good.safetensors")), info, cpu)
    assert not caplog.messages
    two = msgspec.structs.replace(info, class_names=("owl", "cat"))
    own = load_teacher(TeacherTable(use=str(files / "turned.safetensors")), two, cpu)
    assert "has more classes than the data" in caplog.text
    torch.testing.assert_close(own.logits(images), good.logits(images)[:, [2, 0]])
    torch.testing.assert_close(
        own.exact_logits(images.double(), {k: v.double() for k, v in own.parameters.items()}).float(), own.logits(images)
    )
    other = msgspec.structs.replace(info, class_names=("yak", "cat"))
    with pytest.raises(ddkit.InputError, match="has 3 classes, but the data has 2"):
        load_teacher(TeacherTable(use=str(files / "turned.safetensors")), other, cpu)


@pytest.mark.parametrize(
    ("classes", "said"),
    [('["cat","dog"]', "only the data has 'owl'"), ('["cat","dog","yak"]', "'yak'"), ('["cat","cat","dog"]', "only the data has 'owl'")],
)
def test_classes_of_a_teacher_are_each_of_the_data_once(cli: Cli, files: Path, classes: str, said: str) -> None:
    result = distil(cli, files, "numbers", "--set", f"teacher.classes={classes}", "--out", "no")
    assert (result.code, result.out) == (4, "")
    assert said in " ".join(result.err.split())
    assert """--set 'teacher.classes=["cat","dog","owl"]'""" in " ".join(result.err.split())


def test_an_order_fits_where_both_halves_of_the_images_say_so() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(10)
    order = torch.tensor([1, 0, *range(2, 10)])
    noisy = torch.where(torch.rand(100, generator=draws) < 0.3, torch.randint(10, (100,), generator=draws), order[labels])
    found = fitting(labels, noisy, 10)
    assert found is not None
    assert found.tolist() == order.tolist()
    for _ in range(50):  # nothing fits a guess, and nothing fits better than the truth
        assert fitting(labels, torch.randint(10, (100,), generator=draws), 10) is None
    weak = torch.where(torch.rand(100, generator=draws) < 0.6, torch.randint(10, (100,), generator=draws), labels)
    assert fitting(labels, weak, 10) is None
    assert fitting(torch.arange(10), order, 10) is None, "one image of a class tells nothing"


def test_a_few_images_that_are_all_wrong_are_below_chance() -> None:
    seen = torch.tensor([5, 5, 5])
    assert at_chance(torch.tensor([0, 0, 0]), seen)
    assert not at_chance(torch.tensor([2, 2, 2]), seen)
