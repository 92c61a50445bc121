"""A run directory: its files, what they promise, continuing a run exactly, evaluating it again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit.files import read_tensors
from ddkit.run.directory import RunDirectory
from tests.conftest import SMALL, SMALL_FLAGS, Result, timeless

Cli = Callable[..., Result]
FILES = {
    "recipe.toml", "manifest.json", "metrics.jsonl", "evaluation.json", "preview.png", "report.html", "film.safetensors",
    "synthetic.safetensors", "checkpoints",
}  # fmt: skip
FIGURES = ["accuracy_mean", "accuracy_std", "random_real_mean", "random_real_std"]
ROW = ["evaluator", "model", "protocol", "labels", "repeats", *FIGURES, "images", "split", "stored_numbers", "stored_as_images"]
BOTH = ["--losses", "dm:0.01,dkkt:0.5", "--ipc", 1, "--pipc", 4, *SMALL_FLAGS, "--set", "engine.log_every=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of 8 steps, logged every third, checkpointed every second, evaluated."""
    sets = SMALL | {"steps": 8, "engine.log_every": 3, "engine.checkpoint_every": 2}
    path = tmp_path_factory.mktemp("finished") / "run"
    ddkit.distill(losses="dm:0.01,dkkt:0.5", ipc=2, pipc=3, seed=5, sets=sets, out=path, device="cpu")
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Returns a copy of that run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(one: Path, other: Path) -> bool:
    """Returns whether two runs agree bit for bit: images, labels, extra parameters, every logged value."""
    (a, _), (b, _) = (read_tensors(path / "synthetic.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and metrics(one) == metrics(other)


# The files


def test_a_finished_run_holds_its_files_and_nothing_else(finished: Path) -> None:
    assert {entry.name for entry in finished.iterdir()} == FILES
    assert (finished / "preview.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(file.name for file in (finished / "checkpoints").iterdir())
    assert kept == ["step-00000006.safetensors", "step-00000008.safetensors"], "the last two"


def test_the_manifest_tells_what_made_the_run_and_its_hashes_match(finished: Path) -> None:
    manifest = read(finished / "manifest.json")
    assert manifest["schema"] == 1
    assert (manifest["seed"], manifest["steps"], manifest["device"]) == (5, 8, "cpu")
    assert {"python", "ddkit", "torch", "numpy"} <= set(manifest["versions"])
    assert len(manifest["real_files"]) == len(set(manifest["real_files"])) == 30
    assert len(manifest["teacher"]["sha256"]) == 64
    assert set(manifest["files"]) == FILES - {"manifest.json", "checkpoints"}
    for name, entry in manifest["files"].items():
        content = (finished / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    used = {(row["kind"], row["name"]) for row in manifest["plugins"]}
    assert {("loss", "dm"), ("loss", "dkkt-primal"), ("loss", "dkkt-stationarity"), ("dataset", "digits")} <= used
    assert all(set(row) == {"kind", "name", "distribution", "version"} for row in manifest["plugins"])


def test_the_set_records_what_reading_it_needs_and_gives_a_torch_dataset(finished: Path) -> None:
    tensors, record = read_tensors(finished / "synthetic.safetensors")
    assert (tensors["images"].dtype, tensors["images"].shape, tensors["multipliers"].shape) == (torch.float32, (20, 1, 8, 8), (20,))
    assert tensors["labels"].tolist() == [label for label in range(10) for _ in range(2)]
    assert {"schema", "class_names", "mean", "std", "ipc", "pipc", "recipe", "seed"} <= set(record)
    assert (record["ipc"], record["pipc"], record["seed"]) == (2, 3, 5)
    artifact = ddkit.load(finished)
    pixels, normalised = artifact.as_dataset(normalised=False), artifact.as_dataset()
    assert len(pixels) == len(normalised) == 20
    assert torch.equal(pixels[3][0], tensors["images"][3])
    assert torch.equal(pixels[3][1], artifact.labels[3])
    torch.testing.assert_close(normalised[3][0], (artifact.images[3] - artifact.mean[0]) / artifact.std[0])
    assert torch.equal(ddkit.load(finished / "synthetic.safetensors").images, artifact.images)


def test_metrics_hold_first_last_and_every_log_every_th_step_raw_and_weighted(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6, 7]
    weights = {"dm": 0.01, "dkkt-primal": 0.5, "dkkt-stationarity": 2.0}
    for line in lines:
        assert set(line["losses"]) == set(weights)
        for label, term in line["losses"].items():
            assert term["weighted"] == pytest.approx(weights[label] * term["raw"])
        assert line["total"] == pytest.approx(sum(term["weighted"] for term in line["losses"].values()))
        assert line["seconds"] >= 0


# What the commands print


def _check_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert [key for key in row if key != "details"] == ROW
        assert row["labels"] in ("hard", "teacher")
        assert (row["images"], row["split"]) == ("synthetic", "test")
        for key in FIGURES:
            assert 0 <= row[key] <= 1


def test_distill_and_evaluate_print_one_json_object_of_the_documented_keys(cli: Cli) -> None:
    for arguments in (["distill", *BOTH, "--out", "run", "--json"], ["evaluate", "run", "--json"]):
        result = cli(*arguments)
        assert result.code == 0, result.err
        assert result.out.count("\n") == 1
        found = json.loads(result.out)
        shares = ["shares"] if arguments[0] == "distill" else []
        assert list(found) == ["schema", "run", "steps", "seconds", *shares, "evaluations"]
        assert (found["schema"], found["run"], found["steps"]) == (1, "run", 2)
        assert found["seconds"] > 0
        assert len(found["evaluations"]) == 1
        _check_rows(found["evaluations"])
        assert found["evaluations"] == read(Path("run/evaluation.json"))["evaluations"]
    result = cli("evaluate", "run/synthetic.safetensors", "--dataset", "digits", *SMALL_FLAGS[-8:], "--json")
    assert (result.code, json.loads(result.out)["steps"], json.loads(result.out)["seconds"]) == (0, None, None), "of a file"


# Continuing


def test_a_run_in_two_parts_equals_the_run_in_one(cli: Cli) -> None:
    assert cli("distill", *BOTH, "--steps", 5, "--out", "whole").code == 0
    assert cli("distill", *BOTH, "--steps", 2, "--out", "parts").code == 0
    assert not same(Path("whole"), Path("parts"))
    result = cli("distill", "--resume", "--out", "parts", "--steps", 5)
    assert result.code == 0, result.err
    assert same(Path("whole"), Path("parts"))
    assert Path("whole/recipe.toml").read_bytes() == Path("parts/recipe.toml").read_bytes()
    assert read(Path("whole/evaluation.json")) == read(Path("parts/evaluation.json"))
    assert read(Path("parts/manifest.json"))["steps"] == 5


class Signals:
    """An observer that sends this process a signal after step 2."""

    def __init__(self, number: int) -> None:
        self.number = number

    @ddkit.hookimpl
    def step_finished(self, index: int) -> None:
        if index == 2:
            os.kill(os.getpid(), self.number)


ENDING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), ENDING)
def test_a_signal_ends_the_run_after_a_checkpoint_from_which_it_continues_exactly(
    finished: Path, tmp_path: Path, number: int, code: int
) -> None:
    with pytest.raises(ddkit.Interrupted) as caught:
        ddkit.distill(str(finished / "recipe.toml"), out=tmp_path / "cut", device="cpu", observers=[Signals(number)])
    assert caught.value.exit_code == code
    assert "step-00000003.safetensors" in {file.name for file in (tmp_path / "cut" / "checkpoints").iterdir()}
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert not (tmp_path / "cut" / "synthetic.safetensors").exists()
    from ddkit.api import resume

    resume(tmp_path / "cut", device="cpu")
    assert same(finished, tmp_path / "cut")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_cuts_what_was_logged_after_it(
    cli: Cli, finished: Path, run: Path
) -> None:
    (run / "manifest.json").unlink()
    newest = run / "checkpoints" / "step-00000008.safetensors"
    kept = timeless(newest)
    newest.write_bytes(newest.read_bytes()[:-9])
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "tot')
    assert cli("distill", "--resume", "--out", run).code == 0
    assert same(finished, run)
    assert timeless(newest) == kept


def test_resume_refuses_to_go_back(cli: Cli, run: Path) -> None:
    result = cli("distill", "--resume", "--out", run, "--steps", 3)
    assert (result.code, result.out) == (5, "")
    assert "already at step 8" in " ".join(result.err.split())
    assert ddkit.load(run).images.shape == (20, 1, 8, 8)


# Where a run goes


def test_default_folders_are_numbered_and_never_clash(cli: Cli) -> None:
    Path("runs/dm-digits-1").mkdir(parents=True)
    Path("runs/dm-digits-3").write_text("a file\n")
    found = []
    for _ in range(3):
        result = cli("distill", "--losses", "dm", "--pipc", 1, "--evaluate", "none", "--json", *SMALL_FLAGS)
        found.append(json.loads(result.out)["run"])
    assert found == ["runs/dm-digits-2", "runs/dm-digits-4", "runs/dm-digits-5"]
    assert list(Path("runs/dm-digits-1").iterdir()) == []


def test_default_folders_of_runs_that_start_together_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda _: RunDirectory.numbered("../../a b"), range(64)))
    assert len({directory.path for directory in claimed}) == 64
    assert {directory.path.resolve().parent for directory in claimed} == {tmp_path / "runs"}
    for directory in claimed[1:]:
        directory.discard()
    assert list(Path("runs").iterdir()) == [claimed[0].path]


# Evaluating again


def test_evaluating_a_run_rewrites_its_evaluation_and_manifest(cli: Cli, run: Path) -> None:
    before, manifest = read(run / "evaluation.json")["evaluations"], read(run / "manifest.json")
    result = cli("evaluate", run)
    assert result.code == 0, result.err
    assert read(run / "evaluation.json")["evaluations"] == before  # same seed, same protocol, same images: same figures
    (run / "preview.png").write_bytes(b"damaged")  # which it does not vouch for
    assert cli("evaluate", run, "--model", "mlp", "--set", "evaluators.accuracy.model_options={}").code == 0
    after, rewritten = read(run / "evaluation.json")["evaluations"], read(run / "manifest.json")
    assert [(row["model"]) for row in after] == ["convnet", "mlp"]
    assert "mlp, short, 2 epochs" in (run / "report.html").read_text()
    assert after[0] == before[0]
    content = (run / "evaluation.json").read_bytes()
    assert rewritten["files"]["evaluation.json"]["sha256"] == hashlib.sha256(content).hexdigest()
    changed = {key for key in manifest if manifest[key] != rewritten[key]}
    assert changed == {"files", "digest"}
    assert {key for key in manifest["files"] if manifest["files"][key] != rewritten["files"][key]} == {"evaluation.json", "report.html"}


def test_its_random_real_images_come_from_the_same_accessible_ones(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddkit_evaluators

    seen: list[torch.Tensor] = []
    original = ddkit_evaluators.Accuracy.__call__

    def spy(self: Any, artifact: Any, data: Any, teacher: Any) -> Any:
        seen.append(data.real_images)
        return original(self, artifact, data, teacher)

    monkeypatch.setattr(ddkit_evaluators.Accuracy, "__call__", spy)
    assert cli("distill", "--recipe", run / "recipe.toml", "--out", "anew").code == 0
    for flags in ([], ["--pipc", "all"], ["--seed", 6]):
        assert cli("evaluate", run, *flags).code == 0
    in_the_run, same_access, all_of_them, other_seed = seen
    assert in_the_run.shape[0] == 30
    assert torch.equal(in_the_run, same_access)
    assert all_of_them.shape[0] > 1000
    assert not torch.equal(in_the_run, other_seed)


@pytest.fixture
def placed(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a run of images and a teacher that were moved, with a checkpoint at step 2 of 3, and its finished twin beside."""
    monkeypatch.chdir(tmp_path)
    sets = {"network.width": 4, "train.epochs": 1, "teacher.width": 4, "engine.checkpoint_every": 2}
    data = f"imagefolder:{image_folder}"
    ddkit.train("t.safetensors", dataset=data, sets={"train.epochs": 1, "teacher.width": 4}, device="cpu")
    ddkit.distill(
        losses="dkkt", dataset=data, teacher="t.safetensors", pipc=2, steps=3, evaluators="none", sets=sets, out="whole", device="cpu"
    )
    shutil.copytree("whole", "run")
    for name in ("manifest.json", "checkpoints/step-00000003.safetensors"):
        (tmp_path / "run" / name).unlink()
    image_folder.rename(tmp_path / "moved")
    Path("t.safetensors").rename("renamed.safetensors")
    return tmp_path / "run"


def test_a_run_goes_on_with_data_and_teacher_that_were_moved(cli: Cli, placed: Path) -> None:
    run, moved = placed, placed.parent / "moved"
    lost = cli("distill", "--resume", "--out", run)
    assert (lost.code, lost.out) == (4, "")
    assert f"ddkit distill --resume --out {run} --dataset imagefolder:PATH" in " ".join(lost.err.split())
    teacher = ["--teacher", moved.parent / "renamed.safetensors"]
    for words, code, message in (
        (["--dataset", "digits", *teacher], 2, "If the data were moved: --dataset imagefolder:PATH"),
        (["--dataset", "imagefolder", *teacher], 2, "If the data were moved: --dataset imagefolder:PATH"),
        (["--dataset", f"imagefolder:{moved}", "--teacher", "auto"], 2, "only takes the new path of a teacher file"),
        (["--dataset", f"imagefolder:{moved}", "--losses", "dm"], 2, "which --losses cannot change"),
    ):
        refused = cli("distill", "--resume", "--out", run, *words)
        assert (refused.code, refused.out) == (code, "")
        assert message in " ".join(refused.err.split())
    found = cli("distill", "--resume", "--out", run, "--dataset", f"imagefolder:{moved}", *teacher)
    assert found.code == 0, found.err
    assert (run / "synthetic.safetensors").read_bytes() == (moved.parent / "whole" / "synthetic.safetensors").read_bytes()
    assert cli("distill", "--resume", "--out", run, "--steps", 4).code == 0, "the new places are kept"
    assert "is finished" in " ".join(cli("distill", "--resume", "--out", run, "--dataset", f"imagefolder:{moved}").err.split())
