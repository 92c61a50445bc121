"""Runs that earlier versions wrote stay readable: every run directory under tests/old_runs is one, never to be made anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ddkit
from ddkit.files import read_tensors, write_tensors
from tests.conftest import Result

Cli = Callable[..., Result]
OLD = sorted((Path(__file__).parents[1] / "old_runs").glob("run-*"))
SMALLEST = ("--set", "evaluators.accuracy.epochs=1", "--repeats", "1")


@pytest.fixture(params=OLD, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Returns a copy of an old run."""
    return shutil.copytree(request.param, tmp_path / "old")


def test_there_is_one() -> None:
    assert "run-schema-1" in {path.name for path in OLD}


def test_its_set_loads_and_is_what_its_last_checkpoint_holds(old: Path) -> None:
    found = ddkit.load(old)
    assert found.images.shape == (10, 1, 8, 8)
    assert found.labels.tolist() == list(range(10))
    assert found.parameters["multipliers"].shape == (10,)
    state, record = read_tensors(old / "checkpoints" / "step-00000002.safetensors")
    assert record["step"] == 2
    torch.testing.assert_close(found.normalised, state["bank.images"])


def test_it_is_evaluated_again_and_blended(cli: Cli, old: Path) -> None:
    before = json.loads((old / "evaluation.json").read_text())["evaluations"]
    shown = cli("evaluate", old, *SMALLEST, "--json")
    assert shown.code == 0, shown.err
    assert json.loads((old / "evaluation.json").read_text())["evaluations"][0]["protocol"] == before[0]["protocol"]
    assert cli("blend", old, old / "synthetic.safetensors", "--out", "blend").code == 0
    assert torch.equal(ddkit.load("blend").images, ddkit.load(old).images)


def test_it_is_finished_and_can_be_prolonged_or_run_anew_from_its_recipe(cli: Cli, old: Path) -> None:
    assert cli("distill", "--resume", "--out", old, "--json").code == 0
    longer = cli("distill", "--resume", "--out", old, "--steps", 3, "--json")
    assert longer.code == 0, longer.err
    assert json.loads(longer.out)["steps"] == 3
    anew = cli("distill", "--recipe", old / "recipe.toml", "--steps", 3, "--out", "anew")
    assert anew.code == 0, anew.err


def test_a_run_of_grids_under_their_old_name_is_read_and_prolonged_and_its_recipe_is_refused_with_the_lines_to_write(
    cli: Cli, tmp_path: Path
) -> None:
    old = shutil.copytree(Path(__file__).parents[1] / "old_runs" / "grid-schema-1", tmp_path / "old")
    found = ddkit.load(old)
    assert (found.images.shape, found.stored_images.shape, found.stored_numbers) == ((40, 1, 8, 8), (10, 1, 8, 8), 64)
    assert cli("blend", old, old / "synthetic.safetensors", "--out", "blend").code == 0
    assert torch.equal(ddkit.load("blend").images, found.images)
    longer = cli("distill", "--resume", "--out", old, "--steps", 3, "--json")
    assert longer.code == 0, longer.err
    (old / "manifest.json").unlink()  # as if it had been killed before the last line
    assert cli("distill", "--resume", "--out", old, "--json").code == 0
    shutil.copy(Path(__file__).parents[1] / "old_runs" / "grid-schema-1" / "recipe.toml", "old.toml")
    refused = cli("distill", "--recipe", "./old.toml")
    assert (refused.code, refused.out) == (4, "")
    assert 'the lines use = "grid" and factor = 2' in " ".join(refused.err.split())


def test_a_set_of_a_later_schema_is_refused_by_its_number(cli: Cli, old: Path) -> None:
    tensors, record = read_tensors(old / "synthetic.safetensors")
    (old / "manifest.json").unlink()
    write_tensors(old / "synthetic.safetensors", tensors, {**record, "schema": 2})
    refused = cli("evaluate", old / "synthetic.safetensors", *SMALLEST)
    assert (refused.code, refused.out) == (5, "")
    assert "has schema 2, but this version of ddkit reads schema 1" in " ".join(refused.err.split())
