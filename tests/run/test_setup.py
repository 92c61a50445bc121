"""The main command, end to end on the digits, as small as it goes; what would fail late is told early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ddkit
from tests.conftest import SMALL_FLAGS, Result

Cli = Callable[..., Result]


def test_distill_writes_every_file_of_a_run_and_prints_the_picture(cli: Cli) -> None:
    result = cli("distill", "--losses", "dm,dkkt", "--ipc", 2, "--pipc", 5, "--out", "run", *SMALL_FLAGS)
    assert result.code == 0, result.err
    assert "run/preview.png" in result.out
    artifact = ddkit.load("run")
    assert artifact.images.shape == (20, 1, 8, 8)
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert len(manifest["real_files"]) == 50


def test_an_evaluator_is_called_by_its_label_in_the_recipe(cli: Cli) -> None:
    second = ("--set", "evaluators.second.use=accuracy", "--set", "evaluators.second.synthetic=false")
    result = cli("distill", "--losses", "dm", *SMALL_FLAGS, *second)
    assert result.code == 4
    assert "evaluators.second.synthetic is false" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("value", "said"), [("pipc-real", 'Write a list: ["pipc-real"].'), ("class-meen", "Did you mean 'class-mean'? Write a list.")]
)
def test_a_word_where_a_list_belongs_is_told_as_that(cli: Cli, value: str, said: str) -> None:
    result = cli("distill", "--losses", "dm", *SMALL_FLAGS, "--set", f"evaluators.accuracy.baselines={value}")
    assert result.code == 4
    assert said in " ".join(result.err.split())


def test_a_teacher_and_no_data_are_enough_without_evaluation(cli: Cli, image_folder: Path) -> None:
    small = ("--set", "train.epochs=1", "--set", "teacher.width=8")
    assert cli("train", "--dataset", f"imagefolder:{image_folder}", "--out", "teacher.safetensors", *small).code == 0
    shutil.rmtree(image_folder)
    flags = ("--pipc", 0, "--init", "noise", "--evaluate", "none", "--teacher", "teacher.safetensors", "--out", "run")
    result = cli("distill", "--losses", "dkkt", *flags, *SMALL_FLAGS)
    assert result.code == 0, result.err
    artifact = ddkit.load("run")
    assert artifact.class_names == ["cat", "dog", "owl"]
    assert artifact.images.shape == (3, 3, 12, 12)


def test_evaluating_needs_no_teacher_file_that_no_evaluator_uses(cli: Cli) -> None:
    small = ("--set", "train.epochs=1", "--set", "teacher.width=8")
    assert cli("train", "--out", "teacher.safetensors", *small).code == 0
    assert cli("distill", "--losses", "dkkt", "--teacher", "teacher.safetensors", "--out", "run", *SMALL_FLAGS).code == 0
    Path("teacher.safetensors").unlink()
    assert cli("evaluate", "run", "--repeats", 1).code == 0
    assert cli("evaluate", "run", "--evaluate", "none").code == 2


@pytest.mark.slow
def test_the_readme_command_beats_random_real_images_by_more_than_both_deviations(cli: Cli) -> None:
    import time

    began = time.monotonic()
    run = ddkit.distill(losses="dm,dkkt", ipc=10)
    assert time.monotonic() - began < 240  # two minutes on two free cores; tests run on one thread
    (row,) = run.evaluations
    assert row.random_real_mean is not None
    assert row.accuracy_std is not None
    assert row.random_real_std is not None
    assert row.accuracy_mean - row.random_real_mean > max(row.accuracy_std, row.random_real_std)
