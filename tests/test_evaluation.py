"""What an evaluation tests on and compares with: held-out images, baselines, soft labels, sharpness-aware training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ddkit
from ddkit.data import RealData, open_dataset
from ddkit.recipe import DataTable
from tests.conftest import SMALL_FLAGS, Result

CLI = Callable[..., Result]
HELD_OUT = ("--set", "data.test=held-out", "--set", "data.held_out=40")


def rows_of(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def real(pipc: int | str = 10, seed: int = 0, held_out: int | None = 40) -> RealData:
    return RealData(open_dataset(DataTable()), pipc, seed, (1, 8, 8), held_out=held_out)


# Held-out images


def test_held_out_images_are_training_images_that_are_neither_accessible_nor_tested_on() -> None:
    made = real(pipc=100)
    images, labels = made.test_set
    assert torch.bincount(labels).tolist() == [40] * 10
    all_images, tests = real("all", held_out=None).images, real(held_out=None).test_set[0]
    assert rows_of(images) <= rows_of(all_images)
    assert not rows_of(images) & rows_of(made.images)
    assert not rows_of(images) & rows_of(tests)
    assert rows_of(made.images) <= rows_of(all_images), "the control: what is compared can meet"


def test_held_out_images_depend_on_the_seed_and_not_on_pipc() -> None:
    first, more, other = real(pipc=0), real(pipc=90), real(seed=1)
    assert torch.equal(first.test_set[0], more.test_set[0])
    assert torch.equal(first.test_set[1], more.test_set[1])
    assert rows_of(first.test_set[0]) != rows_of(other.test_set[0])
    assert rows_of(real(held_out=20).test_set[0]) < rows_of(first.test_set[0])


def test_labels_are_those_of_the_held_out_images() -> None:
    images, labels = real().test_set
    everything = real("all", held_out=None)
    by_pixels = {image.numpy().tobytes(): int(label) for image, label in zip(everything.images, everything.labels, strict=True)}
    assert [by_pixels[image.numpy().tobytes()] for image in images] == labels.tolist()


@pytest.mark.parametrize(
    ("pipc", "held_out", "said"),
    [("all", 1, "--pipc with a number below 140"), (139, 200, "held_out=1 or less"), (100, 41, "held_out=40 or less"), (500, 1, "--pipc")],
)
def test_too_few_images_to_hold_out_are_told_before_the_run(pipc: int | str, held_out: int, said: str, cli: CLI) -> None:
    flags = ("--set", "data.test=held-out", "--set", f"data.held_out={held_out}", "--pipc", pipc)
    result = cli("distill", "--losses", "dm", "--plan", *flags)
    assert (result.code, result.out) == (4, "")
    assert "has 140 in all" in " ".join(result.err.split())
    assert said in " ".join(result.err.split())


def test_as_many_as_are_left_can_be_held_out(cli: CLI) -> None:
    assert cli("distill", "--losses", "dm", "--plan", *HELD_OUT, "--pipc", 100).code == 0


def test_a_run_is_tuned_on_held_out_images_and_tested_once(cli: CLI) -> None:
    assert cli("distill", "--losses", "dm", "--pipc", 3, *SMALL_FLAGS, "--out", "plain").code == 0
    result = cli("distill", "--losses", "dm", "--pipc", 3, *SMALL_FLAGS, *HELD_OUT, "--out", "run")
    assert result.code == 0, result.err
    assert "split" in result.out
    assert "held-out" in result.out
    assert torch.equal(ddkit.load("run").images, ddkit.load("plain").images)
    files = [json.loads(Path(name, "manifest.json").read_text())["real_files"] for name in ("run", "plain")]
    assert files[0] == files[1]
    tested = cli("evaluate", "run", "--set", "data.test=test")
    assert tested.code == 0, tested.err
    assert "split" not in tested.out
    rows = json.loads(Path("run/evaluation.json").read_text())["evaluations"]
    assert [row["split"] for row in rows] == ["held-out", "test"]
    assert rows[1] == json.loads(Path("plain/evaluation.json").read_text())["evaluations"][0]
    assert rows[0]["details"]["accuracies"] != rows[1]["details"]["accuracies"]


def test_another_seed_could_test_on_accessible_images_and_is_refused(cli: CLI) -> None:
    assert cli("distill", "--losses", "dm", "--pipc", 110, "--evaluate", "none", *SMALL_FLAGS, "--out", "run").code == 0
    result = cli("evaluate", "run", "--seed", 1, *HELD_OUT)
    assert (result.code, result.out) == (4, "")
    assert "Use --seed 0" in result.err
    result = cli("evaluate", "run", "--pipc", 5, *HELD_OUT)
    assert result.code == 4, "the set was made with more than pipc 5"
    assert "pipc 110" in " ".join(result.err.split())


def test_an_unknown_split_is_refused(cli: CLI) -> None:
    result = cli("distill", "--losses", "dm", "--plan", "--set", "data.test=heldout")
    assert result.code == 4
    assert "Did you mean 'held-out'?" in result.err
