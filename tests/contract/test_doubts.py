"""What cannot be right of a run that ends well is said: on stderr, in the manifest and in the report."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit.components.base import Evaluation
from ddkit.nn.teacher import at_chance
from ddkit.run.doubts import below_random_real, constant_losses, outside
from tests.conftest import SMALL_FLAGS, Result, write_image_folder

Cli = Callable[..., Result]
Words = Callable[..., str]
CHANCE = "no better than guessing"


@pytest.fixture
def words(cli: Cli, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Returns a function that runs `ddkit ARGS...`, which has to end well, and returns what it warned of."""

    def run(*arguments: object) -> str:
        caplog.clear()
        result = cli(*arguments)
        assert result.code == 0, result.err
        return "\n".join(caplog.messages)

    return run


def manifest(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "manifest.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("many"), train=40)


@pytest.fixture
def teachers(cli: Cli, folder: Path) -> Mapping[str, Path]:
    """Returns teacher files: a good one, one that was never trained, one whose classes are turned."""
    from ddkit.files import read_tensors, write_tensors

    options = ("--set", "train.epochs=30", "--set", "teacher.width=8", "--set", "train.augmenter=none", "--set", "train.batch=16")
    result = cli("train", "--dataset", f"imagefolder:{folder}", "--out", "good.safetensors", *options)
    assert result.code == 0, result.err
    tensors, record = read_tensors(Path("good.safetensors"))
    torch.manual_seed(0)
    last = [name for name in tensors if tensors[name].shape[:1] == (3,)]
    changed = {
        "untrained": ({name: torch.randn_like(value) if value.ndim > 1 else value for name, value in tensors.items()}, record),
        "turned": (tensors | {name: tensors[name].roll(1, 0) for name in last}, record),
    }
    for name, content in changed.items():
        write_tensors(Path(f"{name}.safetensors"), *content)
    return {name: Path(f"{name}.safetensors") for name in ("good", *changed)}


def test_a_teacher_at_chance_is_told_and_a_good_one_is_the_ceiling(words: Words, folder: Path, teachers: Mapping[str, Path]) -> None:
    flags = ("distill", "--losses", "dkkt", "--dataset", f"imagefolder:{folder}", "--pipc", 40, "--ipc", 1, *SMALL_FLAGS)
    for name in ("good", "untrained"):
        told = words(*flags, "--teacher", teachers[name], "--evaluate", "none", "--out", name)
        facts = manifest(name)["teacher"]
        assert facts["accessible_images"] == 120
        assert (CHANCE in told) == (name != "good")
        assert any(CHANCE in message for message in manifest(name)["warnings"]) == (name != "good")
        assert facts["accessible_accuracy"] > 0.8 if name == "good" else facts["accessible_accuracy"] < 0.5
        report = (Path(name) / "report.html").read_text().replace("\xa0", " ")
        assert f"{100 * facts['accessible_accuracy']:.1f} % of 120 accessible images" in report
        assert f"{100 * facts['test_accuracy']:.1f} % of the test images" in report
    assert CHANCE in words("evaluate", "good", "--teacher", teachers["turned"], "--repeats", 1)
    untrained = (*flags, "--teacher", teachers["untrained"], "--evaluate", "none")
    assert CHANCE in words(*untrained, "--plan")
    assert CHANCE not in words(*untrained, "--out", "few", "--pipc", 3)


@pytest.mark.parametrize(
    ("right", "seen", "told"),
    [
        ([10, 10, 10], [30, 30, 30], True),
        ([0, 0, 0], [30, 30, 30], True),
        ([29, 2, 1], [30, 30, 30], True),  # it says the first class whatever it sees
        ([15, 15, 14], [30, 30, 30], False),
        ([89, 4], [90, 10], False),  # a rare class that is hard, told apart from...
        ([900, 0], [900, 100], True),  # ...one that is never found, with 90 % of all images right
        ([0, 1, 0], [1, 1, 1], False),
        ([5] * 1000, [50] * 1000, False),  # 10 % of 1,000 classes is far from guessing
    ],
)
def test_chance_is_told_where_the_images_are_enough(right: list[int], seen: list[int], told: bool) -> None:
    assert at_chance(torch.tensor(right), torch.tensor(seen)) is told


def test_a_parametrization_that_cannot_hold_the_real_images_is_told_with_the_one_that_can(words: Words) -> None:
    flags = ("distill", "--recipe", "practical-plus", "--losses", "dm", "--ipc", 1, "--pipc", 10, "--evaluate", "none", *SMALL_FLAGS)
    told = words(*flags, "--steps", 0, "--out", "ten-in-one")
    advice = re.search(r"--set parametrization\.use=\S+$", told, re.M)
    assert "has too few numbers for these images" in told
    assert advice
    for name, enough in (("one", shlex.split(advice[0])), ("two", ["--set", "parametrization.images=2"]), ("noise", ["--init", "noise"])):
        assert "too few numbers" not in words(*flags, "--steps", 0, *enough, "--out", name)


def test_a_set_worse_than_random_real_images_is_told_in_distill_and_evaluate(words: Words) -> None:
    noise = ("--init", "noise", "--set", "optimizer.images.lr=1e-9", "--set", "evaluators.accuracy.epochs=60", "--ipc", 5)
    told = words("distill", "--losses", "dm", *SMALL_FLAGS, *noise, "--out", "noise")
    assert told.count("worse than random real images") == 1
    assert any("worse than random real images" in message for message in manifest("noise")["warnings"])
    assert "worse than random real images" in words("evaluate", "noise")
    assert "worse than random real images: " in words("evaluate", "noise", "--model", "mlp")
    kept = [message for message in manifest("noise")["warnings"] if "worse than random real images" in message]
    assert [name for message in kept for name in ("(convnet,", "(mlp,") if name in message] == ["(convnet,", "(mlp,"]
    assert kept[1] in html.unescape((Path("noise") / "report.html").read_text())
    advice = re.search(r"--steps \d+ --set optimizer\.images\.lr=\S+ --init real", told)
    assert advice, told
    assert words("distill", "--losses", "dm", *SMALL_FLAGS, *noise, "--plan", *shlex.split(advice[0])) == ""
    real = ("--set", "optimizer.images.lr=1e-9", "--set", "evaluators.accuracy.epochs=60", "--ipc", 5)
    assert "worse than random" not in words("distill", "--losses", "dm", *SMALL_FLAGS, *real, "--out", "real")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, True),
        ({"accuracy_mean": 0.79}, False),  # within the spread
        ({"random_real_std": 0.8}, False),
        ({"images": "pipc-real"}, False),
        ({"random_real_mean": None}, False),
        ({"accuracy_mean": None}, False),
        ({"accuracy_std": None, "random_real_std": None}, True),  # one network: what the test images scatter counts
        ({"accuracy_mean": 0.77, "accuracy_std": None, "random_real_std": None}, False),
    ],
)
def test_below_random_real_means_beyond_the_spread(change: dict[str, Any], told: bool) -> None:
    usual = {"accuracy_mean": 0.115, "accuracy_std": 0.02, "random_real_mean": 0.814, "random_real_std": 0.03}
    row = Evaluation(evaluator="accuracy", model="m", protocol="p", labels="hard", repeats=3, **usual | change)  # type: ignore[arg-type]
    assert bool(below_random_real(row, 200)) is told


def test_images_that_have_left_every_range_are_told_with_a_rate_that_works(words: Words) -> None:
    flags = ("distill", "--losses", "dm", "--evaluate", "none", *SMALL_FLAGS)
    told = words(*flags, "--out", "far", "--set", "optimizer.images.lr=1e4")
    advice = re.search(r"--set optimizer\.images\.lr=[\d.]+\d", told)
    assert advice, told
    assert any("are outside -1 to 2" in message for message in manifest("far")["warnings"])
    assert "are outside" not in words(*flags, "--out", "near", *shlex.split(advice[0]))


def test_a_few_values_may_leave_the_range() -> None:
    images = torch.zeros(1, 1, 10, 10)
    images.view(-1)[:5] = 3.0
    assert not outside(images, "")
    images.view(-1)[5] = -2.0
    assert outside(images, "")
    far = torch.zeros(1, 1, 100, 100)
    far[0, 0, 0, 0] = 11.0
    assert outside(far, ""), "no image has one such value"
    assert not outside(far / 2, "")


def test_real_images_that_are_matched_with_themselves_learn_nothing_and_it_is_said(words: Words) -> None:
    flags = ("distill", "--losses", "dm", "--evaluate", "none", *SMALL_FLAGS)
    told = words(*flags, "--ipc", 3, "--pipc", 3, "--out", "idle")
    assert "so the set did not change" in told
    assert "Raise --pipc, lower --ipc" in told
    assert any("so the set did not change" in message for message in manifest("idle")["warnings"])
    for changed in (("--ipc", 3, "--pipc", 4), ("--ipc", 2, "--pipc", 3), ("--ipc", 3, "--pipc", 3, "--init", "noise")):
        assert "so the set did not change" not in words(*flags, *changed, "--out", "-".join(map(str, changed)))


def test_a_constant_loss_is_one_of_weight_that_never_moves() -> None:
    lines = [{"losses": {"a": {"raw": 2.0 + 1e-7 * step}, "b": {"raw": 2.0 + 0.01 * step}, "c": {"raw": 1.0}}} for step in range(3)]
    assert list(constant_losses(lines, {"a": 1.0, "b": 1.0, "c": 0.0})) == ["a"]
    assert constant_losses(lines[:1], {"a": 1.0}) == {}
    assert constant_losses([{"losses": {"a": {"raw": 0.0}}}], {"a": 1.0}) == {"a": 0.0}


def test_a_constant_loss_beside_another_is_named(words: Words, tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(
        'import ddkit\n\n\nclass Flat(ddkit.Loss):\n    """Is 3."""\n\n    def __call__(self, step):\n'
        "        return 0 * step.images.sum() + 3\n"
    )
    flags = ("distill", "--plugin", tmp_path / "flat.py", "--evaluate", "none", *SMALL_FLAGS)
    told = words(*flags, "--losses", "flat", "--out", "alone")
    assert "The loss flat was 3 at all 2 logged steps" in told
    assert "--losses dm" in told
    told = words(*flags, "--losses", "dm,flat", "--out", "beside")
    assert "flat" in told
    assert "--set losses.flat.weight=0" in told
    assert words(*flags, "--losses", "dm,flat", "--set", "losses.flat.weight=0", "--out", "without") == ""
    assert ddkit.load("beside").images.isfinite().all()
