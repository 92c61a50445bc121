"""Options of a list of models: each goes to the models that have it, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddkit_evaluators import split_options

import ddkit
from tests.conftest import SMALL_FLAGS, Result

CLI = Callable[..., Result]
WHERE = "evaluators.accuracy.model_options"


def split(names: str, **options: Any) -> dict[str, dict[str, Any]]:
    return split_options(names.split(","), options, WHERE)


def test_an_option_goes_to_the_models_that_have_it() -> None:
    assert split("convnet,mlp,lenet", width=8, norm="batch") == {"convnet": {"width": 8, "norm": "batch"}, "mlp": {"width": 8}, "lenet": {}}


def test_a_table_of_a_models_name_is_for_that_model_alone_and_wins() -> None:
    assert split("convnet,mlp", width=8, mlp={"width": 4}) == {"convnet": {"width": 8}, "mlp": {"width": 4}}
    assert split("mlp", mlp={"width": 4}) == {"mlp": {"width": 4}}


def test_an_option_that_none_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ddkit.InputError, match=r"model_options\.widht: none of the models convnet, mlp.*mlp has depth, width"):
        split("convnet,mlp", widht=8)


def test_a_table_of_a_model_that_is_not_evaluated_is_refused() -> None:
    with pytest.raises(ddkit.InputError, match=r"model_options\.lenet: the models of this evaluation are convnet, mlp"):
        split("convnet,mlp", lenet={})


def test_options_of_one_model_are_checked_by_that_model() -> None:
    evaluator = ddkit.create("evaluator", "accuracy", {"model": "mlp", "model_options": {"norm": "batch"}})
    with pytest.raises(ddkit.InputError, match=r"mlp: .*has no key 'norm'"):
        evaluator.check(ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(8, 8)))


def test_a_model_that_the_images_are_too_small_for_is_told_before_the_run() -> None:
    evaluator = ddkit.create("evaluator", "accuracy", {"model": "mlp,lenet"})
    evaluator.check(ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(8, 8)))
    with pytest.raises(ddkit.InputError, match="lenet: images of 3 x 3 pixels are too small"):
        evaluator.check(ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(3, 3)))


def test_the_cross_architecture_table_has_a_row_for_each_model(cli: CLI) -> None:
    assert cli("distill", "--losses", "dm", "--pipc", 3, "--out", "run", "--evaluate", "none", *SMALL_FLAGS).code == 0
    models = "convnet,mlp,lenet,resnet18,vgg11"
    short = [f"evaluators.accuracy.{part}" for part in ("epochs=1", "repeats=1", "model_options.width=4", "model_options.convnet.depth=1")]
    flags = [part for each in short for part in ("--set", each)]
    table = cli("evaluate", "run", "--evaluate", "accuracy", "--model", models, *flags)
    assert table.code == 0, table.err
    assert [line.split()[1] for line in table.out.splitlines()[2:]] == models.split(",")
    rows = json.loads(Path("run/evaluation.json").read_text())["evaluations"]
    assert [row["model"] for row in rows] == models.split(",")
