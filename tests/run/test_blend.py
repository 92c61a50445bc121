"""Blends: matched by class name and place, in pixel units; anything that does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ddkit
from ddkit.errors import InputError
from ddkit.run.artifact import Artifact
from ddkit.run.blend import blended
from ddkit.run.manifest import file_entry
from tests.conftest import SMALL, Result

CLI = Callable[..., Result]


def _set(names: str = "ab", labels: tuple[int, ...] = (0, 0, 1, 1), *, size: int = 4, seed: int = 0, mean: float = 0.5) -> Artifact:
    images = torch.rand(len(labels), 1, size, size, generator=torch.Generator().manual_seed(seed))
    metadata = {"class_names": list(names), "mean": [mean], "std": [0.2], "ipc": 2, "pipc": 3 + seed, "seed": seed}
    return Artifact(images, torch.tensor(labels), metadata, {"multipliers": torch.ones(len(labels))})


def test_a_blend_is_the_weighted_mean_of_both() -> None:
    first, second = _set(), _set(seed=1)
    assert torch.equal(blended(first, second, 0).images, first.images)
    assert torch.equal(blended(first, second, 1).images, second.images)
    assert torch.allclose(blended(first, second, 0.25).images, 0.75 * first.images + 0.25 * second.images)
    found = blended(first, second, 0.25)
    assert (found.metadata["pipc"], found.metadata["recipe"], found.metadata["alpha"]) == (4, "blend", 0.25)
    assert found.parameters == {}


def test_images_are_matched_by_class_name_and_place() -> None:
    first, second = _set("ab"), _set("ba", (0, 1, 0, 1), seed=1)  # in the second, label 0 is b
    found = blended(first, second, 1)
    assert found.class_names == ["a", "b"]
    assert torch.equal(found.images, second.images[[1, 3, 0, 2]])
    assert not torch.equal(found.images, second.images)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (_set("ac"), "Only the first has b, only the second has c"),
        (_set("ab", (0, 1, 1, 1)), "has 2 images of the class 'a', but the second has 1"),
        (_set("ab", (0, 0, 0, 1, 1, 1)), "Only sets with the same ipc"),
        (_set("ab", size=5), "(1, 4, 4) (C, H, W), but the second of (1, 5, 5)"),
    ],
)
def test_what_does_not_fit_is_refused(second: Artifact, said: str) -> None:
    with pytest.raises(InputError) as error:
        blended(_set(), second, 0.5)
    assert said in str(error.value)


def test_different_normalisation_is_told(caplog: pytest.LogCaptureFixture) -> None:
    found = blended(_set(), _set(mean=0.4), 0.5)
    assert found.mean == [0.5]
    assert "different normalisation" in caplog.text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two runs, one and two, whose seeds differ; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("two", 1)):
        ddkit.distill(losses="dm", evaluators="none", pipc=4, seed=seed, sets=SMALL, out=folder / name, device="cpu")
    return folder


@pytest.fixture
def runs(cli: CLI, made: Path) -> CLI:
    """Returns the command line in a folder with copies of them."""
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    return cli


def test_a_blend_of_runs_is_a_run_that_can_be_evaluated(runs: CLI) -> None:
    result = runs("blend", "one", "two", "--alpha", 0.3, "--out", "both", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["alpha"] == 0.3
    one, two, both = (ddkit.load(name) for name in ("one", "two", "both"))
    assert torch.equal(both.images, torch.lerp(one.images, two.images, 0.3))
    assert Path("both/preview.png").is_file()
    parts = json.loads(Path("both/manifest.json").read_text())["blend"]["parts"]
    assert [Path(part["path"]).parent.name for part in parts] == ["one", "two"]
    small = ("--set", "evaluators.accuracy.epochs=1", "--set", "evaluators.accuracy.repeats=1")
    assert runs("evaluate", "both", *small).code == 0
    assert json.loads(Path("both/evaluation.json").read_text())["evaluations"]


def test_files_can_be_blended_and_then_need_a_dataset(runs: CLI) -> None:
    result = runs("blend", "one/synthetic.safetensors", "two/synthetic.safetensors", "--out", "both")
    assert result.code == 0, result.err
    assert not Path("both/recipe.toml").exists()
    told = runs("evaluate", "both")
    assert told.code == 4
    assert "--dataset" in told.err
    small = ("--set", "evaluators.accuracy.epochs=1", "--set", "evaluators.accuracy.repeats=1")
    assert runs("evaluate", "both", "--dataset", "digits", *small).code == 0


TABLE = "\nipc = 1\nsteps = 2\n[blend]\nfirst = 'dsv-noise'\nsecond = './two'\nalpha = 0.25\n"
INSTEAD = (
    "ddkit distill --recipe dsv-noise --ipc 1 --steps 2 --evaluate none --out first && ddkit blend first ./two --alpha 0.25 --out both"
)


def test_a_recipe_or_unfinished_run_with_a_table_blend_is_refused_with_the_commands_to_give_instead(cli: CLI) -> None:
    Path("old.toml").write_text(TABLE)
    Path("run").mkdir()
    Path("run/recipe.toml").write_text(TABLE)
    for command, code in ((("--recipe", "./old.toml"), 4), (("--resume", "--out", "run"), 5)):
        result = cli("distill", *command)
        assert (result.code, result.out) == (code, "")
        assert INSTEAD in " ".join(result.err.split())


def test_a_finished_blend_of_version_0_1_is_evaluated(runs: CLI) -> None:
    assert runs("blend", "one", "two", "--out", "both").code == 0
    recipe, manifest = Path("both/recipe.toml"), Path("both/manifest.json")
    recipe.write_text(recipe.read_text() + TABLE.partition("steps = 2\n")[2])
    facts = json.loads(manifest.read_text())
    facts["files"]["recipe.toml"] = file_entry(recipe)
    manifest.write_text(json.dumps({key: value for key, value in facts.items() if key != "digest"}))
    small = ("--set", "evaluators.accuracy.epochs=1", "--set", "evaluators.accuracy.repeats=1")
    done = runs("evaluate", "both", *small)
    assert done.code == 0, done.err


def test_held_out_images_of_a_blend_were_accessible_to_neither(runs: CLI) -> None:
    assert runs("blend", "one", "two", "--out", "both").code == 0
    told = runs("evaluate", "both", "--set", "data.test=held-out", "--set", "data.held_out=5")
    assert told.code == 4
    assert "seed 0 and 1" in " ".join(told.err.split())


def test_a_blends_manifest_tells_of_both_parts(runs: CLI) -> None:
    assert runs("blend", "one", "two", "--out", "both").code == 0
    one, two, both = (json.loads(Path(name, "manifest.json").read_text()) for name in ("one", "two", "both"))
    assert set(both["real_files"]) == {*one["real_files"], *two["real_files"]}
    assert both["plugins"] == one["plugins"]
