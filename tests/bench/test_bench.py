"""ddkit bench: what it measures, that its numbers hang together, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit import bench as benching
from ddkit.bench import Settings, bench, cases, worker
from ddkit.bench.reference import LOSSES, ReferenceEvaluation, ReferenceStep, field_components
from ddkit.engine.loop import Engine
from ddkit.engine.losses import WeightedLoss
from ddkit.nn.networks import build_network, forward_flops
from ddkit.nn.teacher import read_teacher
from tests.conftest import Result
from tests.engine.test_fast_path import INFO, bank, model, source

SMALL = {"cells": ((1, 2),), "classes": (2,), "sizes": (8,), "runs": 2, "steps": 1, "run_steps": 10, "images_trained": 8, "tests": 20}


@pytest.fixture(scope="module")
def measured(forks: Any) -> dict[str, Any]:
    """Returns a whole measurement of the smallest kind, in forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddkit.bench.subprocess", forks)
        patch.setattr("ddkit.run.children.subprocess", forks)
        return bench(Settings(**SMALL, parts=benching.PARTS[:4], recipes=("dm",), files=(20,)))  # type: ignore[arg-type]


def test_steps_are_measured_beside_the_reference_loop_and_the_plain_path(measured: dict[str, Any]) -> None:
    (row,) = measured["steps"]
    assert (row["losses"], row["ipc"], row["pipc"], row["classes"], row["size"]) == ("dm", 1, 2, 2, 8)
    assert len(row["runs"]) == 2
    assert row["steps_per_second"] == pytest.approx(1 / row["seconds_per_step"])
    for name in ("reference", "plain"):
        assert row[f"{name}_seconds_per_step"] > 0
        assert row[f"ratio_to_{name}"] > 0
    assert row["peak_mib"] > 50
    assert (row["precision"], row["compiled"]) == ("float32", False)


def test_flops_are_those_of_one_pass_per_real_and_two_per_synthetic_image(measured: dict[str, Any]) -> None:
    info = ddkit.DataInfo(class_names=("a", "b"), channels=3, size=(8, 8))
    module = ddkit.create("model", "convnet", data=info)(3, (8, 8), 2)
    (row,) = measured["steps"]
    assert row["flops"] == forward_flops(module, info, features=True) * (2 * 2 + 2 * 2)
    (limit,) = measured["limits"]
    assert row["limit_fraction"] == pytest.approx(row["flops"] / row["seconds_per_step"] / limit["rates"]["float32"])


def test_evaluation_is_of_the_whole_protocol(measured: dict[str, Any]) -> None:
    (row,) = measured["evaluation"]
    assert row["protocol"] == "dm-official"
    assert row["networks_per_minute"] == pytest.approx(60 / row["seconds_per_network"])
    assert row["ratio_to_reference"] > 0
    assert row["seconds_per_network"] > 500 * row["epoch_seconds"] > 0


def test_a_method_is_measured_with_its_set_up(measured: dict[str, Any]) -> None:
    (row,) = measured["methods"]
    assert (row["recipe"], row["ipc"], row["pipc"]) == ("dm", 1, 2)
    assert min(row["seconds_per_step"], row["setup_seconds"], row["peak_mib"]) > 0


def test_losses_of_a_teacher_are_measured_with_one_that_knows_nothing() -> None:
    sizes = {"ipc": 1, "pipc": 40, "classes": 2, "size": 8, "channels": 3, "steps": 1, "run_steps": 10}  # real images enough to test it
    facts = next(worker._steps({"losses": "dkkt", "device": "cpu", "count": False, "sets": [], **sizes}))
    assert facts["first_step_seconds"] > 0


@pytest.mark.parametrize(("name", "model"), [("kkt-reconstruction", "mlp"), ("inversion", "convnet"), ("datm", None)])
def test_a_recipe_is_measured_with_a_teacher_of_its_own_kind(name: str, model: str | None, tmp_path: Path) -> None:
    sizes = {"ipc": 1, "pipc": 2, "classes": 2, "size": 8, "channels": 3, "run_steps": 10}
    recipe = worker._recipe({"losses": "", "sets": [], "recipe": name, **sizes}, tmp_path)
    if model:
        assert read_teacher(Path(recipe.teacher.use))[1]["model"] == model
    else:  # its networks see whitened images
        assert recipe.teacher.use == "auto"


@pytest.mark.parametrize(("name", "words"), [("nosuch", "There is no recipe"), ("teacher", "no losses")])
def test_a_recipe_that_cannot_be_measured_is_refused_before_anything_is(cli: Callable[..., Result], name: str, words: str) -> None:
    result = cli("bench", "methods", "--recipe", name)
    assert (result.code > 0, result.out) == (True, "")
    assert words in " ".join(result.err.split())


def test_loading_is_measured_without_and_with_the_cache(measured: dict[str, Any]) -> None:
    assert json.dumps(measured, allow_nan=False)
    (row,) = measured["loading"]
    assert (row["files"], row["pipc"]) == (20, 2)
    assert row["first_seconds"] > 0
    assert row["second_seconds"] > 0


def test_cells_are_products_or_pairs() -> None:
    settings = Settings(losses=("dm", "dkkt"), cells=((1, 10), (10, 50)), classes=(10, 100), devices=("cpu",))
    assert [tuple(case)[:4] for case in cases(settings)] == [
        (losses, ipc, pipc, classes) for losses in ("dm", "dkkt") for classes in (10, 100) for ipc, pipc in ((1, 10), (10, 50))
    ]


def test_exponents_are_given_where_one_number_changes() -> None:
    base = {"losses": "dm", "ipc": 1, "pipc": 10, "classes": 10, "size": 32, "device": "cpu"}
    base |= {"seconds_per_step": 1.0, "peak_mib": 100.0, "start_mib": 50.0, "work": 2.0}
    rows = [base, base | {"ipc": 10, "seconds_per_step": 10.0, "peak_mib": 550.0, "work": 2.0}, base | {"ipc": 100, "pipc": 50}]
    found = benching._with_exponents([dict(row) for row in rows])
    assert found[1]["exponent"] == {"axis": "ipc", "seconds_per_step": pytest.approx(1.0), "work": 0.0, "memory": pytest.approx(1.0)}
    assert "exponent" not in found[0]
    assert "exponent" not in found[2]


OPTIONS = {"feature-regression": {"augmenter": "none", "real_augmenter": "none"}}


@pytest.mark.parametrize("names", [*LOSSES, "dm,dkkt-primal,dkkt-stationarity"])
def test_the_reference_loop_computes_the_losses(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of the engine on the same images, network and teacher, without augmentation."""
    monkeypatch.setattr(
        "ddkit.bench.reference.build_network", lambda model, info, seed, purpose, index: build_network(model, info, 0, "network", index)
    )
    none = ddkit.create("augmenter", "none", data=INFO)
    teacher = ddkit.nn.Teacher(build_network(model(norm="batch"), INFO, 0, "teacher"), mean=(0.5,) * 3, std=(0.25,) * 3)
    steps = source(teacher=teacher)
    steps.draws.augmenter = none
    steps.draws.views = {}
    weights = {name: 1.0 + place for place, name in enumerate(names.split(","))}
    real = steps.draws.normalisation.normalise(steps.draws.real_images).unflatten(0, (3, 6))
    loop = ReferenceStep(weights, model(), INFO, none, teacher.module, real, ipc=2, batch=256)
    loop.view = loop.real_augmenter = none
    loop.noise = 0.0
    losses = [WeightedLoss(name, ddkit.create("loss", name, OPTIONS.get(name, {})), weight) for name, weight in weights.items()]
    declared = {name: spec for each in losses for name, spec in each.loss.requires.parameters.items()}
    engine = Engine(bank(loop.images.detach().clone(), loop.labels, declared=declared), steps, losses)
    before = loop.images.detach().clone()
    found = engine.evaluate(0)
    assert loop() == pytest.approx(sum(weights[name] * float(value) for name, value in found.values.items()), rel=1e-4)
    for name, gradient in found.gradients.items():
        theirs = getattr(loop, name).grad
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(theirs, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert not torch.equal(loop.images, before)
    loop()  # a second step, too


def test_only_losses_as_the_recipe_has_them_have_a_reference() -> None:
    case = cases(Settings())[0]
    for losses, sets, known in (
        ("dm,dkkt", (("engine.compile", False),), True), ("dm:2,gm", (), True), ("dm,total-variation", (), False),
        ("dm", (("losses.dm.normalise", "mean"),), False), ("dkkt", (("views.default.noise", 0.0),), False),
    ):  # fmt: skip
        assert benching._has_reference(case._replace(losses=losses), Settings(sets=sets)) == known


@pytest.mark.parametrize("chunk", [0, 1])
def test_the_operations_of_second_derivatives_are_counted_once_whatever_the_chunks(chunk: int) -> None:
    """By hand for a network of two convolutions; torch computes a weight's gradient in the second derivative, which nothing uses."""
    from ddkit.bench import worker

    spec = {"losses": "dkkt", "ipc": 2, "pipc": 2, "classes": 2, "size": 16, "channels": 3, "run_steps": 10, "device": "cpu", "count": True}
    facts = next(worker._steps(spec | {"sets": [["engine.compile", False], ["engine.chunk", chunk]]}))
    assert facts["chunk"] == chunk
    first, second, linear = 2 * 27 * 128 * 16**2, 2 * 9 * 128 * 128 * 8**2, 2 * 128 * 4**2 * 2
    forward = first + second + linear
    outer = first + 2 * (second + linear)  # the gradient by the weights; the images' is no part of it
    double = 2 * first + 4 * second + 3 * linear + forward  # of outer by the images and what it depends on, then of the forward pass
    assert facts["flops"] == pytest.approx(4 * (forward + outer + double), rel=1e-3)


def test_the_published_evaluation_learns() -> None:
    info = ddkit.DataInfo(class_names=("a", "b"), channels=3, size=(8, 8))
    model, augmenter = field_components(info)
    labels = torch.arange(2).repeat(8)
    images = torch.randn((16, *info.shape), generator=torch.Generator().manual_seed(0)) + 2 * labels.view(-1, 1, 1, 1)
    loop = ReferenceEvaluation(model, info, augmenter, images, labels, torch.utils.data.TensorDataset(images, labels))
    assert loop(0, 30) > 0.9


def test_the_table_shows_what_was_measured(measured: dict[str, Any]) -> None:
    from ddkit.cli.bench import _tables

    limits, steps, methods, evaluation, loading = _tables(measured, benching.PARTS)
    assert "GFLOP/s" in limits
    assert "reference loop s/step" in steps
    assert f"{measured['steps'][0]['ratio_to_reference']:.2f}x" in steps
    assert "set-up s" in methods
    assert "| dm " in methods
    assert "networks/min" in evaluation
    assert "again s" in loading


def test_an_error_in_a_measuring_process_is_that_of_the_command(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, forks: Any
) -> None:
    monkeypatch.setattr("ddkit.bench.subprocess", forks)
    monkeypatch.setattr("ddkit.bench._limit", lambda device, settings: {"device": device, "rates": {"float32": 1e9}})
    result = cli("bench", "steps", "--size", "1", "--no-plain", "--runs", "1")
    assert (result.code, result.out) == (4, ""), result.err
    assert "too small" in result.err


def test_a_start_is_a_whole_command_and_one_that_fails_is_told() -> None:
    assert benching._whole_command(["--version"]) > 0
    with pytest.raises(ddkit.RunFailed, match=r"`ddkit info nothing` ended with exit code 3: .*ddkit list"):
        benching._whole_command(["info", "nothing"])


def test_a_measuring_process_that_dies_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch, forks: Any) -> None:
    monkeypatch.setattr("ddkit.bench.subprocess", forks)
    with pytest.raises(ddkit.RunFailed, match=r"Measuring loading ended with exit code 1: KeyError: 'folder'"):
        benching._measured({"": {"kind": "loading", "tuned": False}}, 1)


@pytest.mark.slow
def test_evaluation_is_measured_with_more_threads_than_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four workers the first networks of each are left out of the time, and some must remain."""
    from ddkit.bench import worker

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    spec = {"ipc": 1, "classes": 2, "size": 8, "channels": 1, "device": "cpu", "networks": 10, "epochs": 1, "tests": 4}
    options = {"compile": "never", "precision": "float32", "workers": 4, "model": "mlp"}
    measuring = worker._evaluation(spec | {"options": options})
    assert next(measuring)["workers"] == 4
    assert next(measuring)["seconds"] > 0
