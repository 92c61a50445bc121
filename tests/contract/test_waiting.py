"""While one waits: a line a stage, time left, what an interruption says, and the seconds of a run that was resumed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ddkit
from ddkit.files import read_tensors, write_tensors
from ddkit.run.progress import ProgressLines
from ddkit.studies.crew import Told
from tests.conftest import SMALL, SMALL_FLAGS, Result

Cli = Callable[..., Result]
RUN = ("distill", "--losses", "dkkt", "--pipc", 2, *SMALL_FLAGS, "--set", "train.epochs=3")
TRAIN = ("train", "--set", "train.epochs=2", "--set", "teacher.width=8")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(**raw: float) -> dict[str, Any]:
    return {"losses": {label: {"raw": value} for label, value in raw.items()}}


# Lines and bars


def test_lines_tell_how_far_a_stage_is_and_what_is_left_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(clock=clock)
    lines.stage_started("distilling", "Distilling 10 images")
    clock.now = 50  # what is compiled in the first step is no pace
    lines.step_finished(0, 101, record(dm=3.25))
    for index in range(1, 100):
        clock.now += 1
        lines.step_finished(index, 101, None)
    begun, first, *later = capsys.readouterr().err.splitlines()
    assert begun == "Distilling 10 images"
    assert first == "distilling: step 1 of 101, 1 %, dm 3.25"
    assert later[0] == "distilling: step 31 of 101, 31 %, about 70 s left, dm 3.25"
    assert [line.split()[2] for line in later] == ["31", "61", "91"]


def test_steps_before_a_resume_count_for_no_pace(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(clock=clock)
    lines.stage_started("distilling", "Distilling")
    for index in (900, 910):
        clock.now += 40
        lines.step_finished(index, 1000, None)
    assert "step 911 of 1,000, 91 %, about 6 min left" in capsys.readouterr().err
    bar = ddkit.ProgressBar()
    bar.stage_started("distilling", "Distilling", 900, 1000)
    bar.step_finished(900, 1000, None)
    assert (bar._bar.initial, bar._bar.n, bar._bar.total) == (900, 901, 1000)
    bar.stage_progress("teacher", 1, 3)
    assert "1/3" in str(bar._bar)
    bar.close()


def test_networks_in_work_count_in_parts_and_a_teacher_shows_its_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(clock=clock)
    lines.stage_started("evaluation", "Evaluating")
    lines.stage_progress("evaluation", 0, 4, 0.25, {})
    clock.now = 60
    lines.stage_progress("evaluation", 0, 4, 0.5, {})
    lines.stage_started("teacher", "Training")
    lines.stage_progress("teacher", 1, 4, 0.0, {"training accuracy": 0.5})
    clock.now += 30
    lines.stage_progress("teacher", 2, 4, 0.0, {"training accuracy": 0.512})
    told = capsys.readouterr().err.splitlines()
    assert told[1] == "evaluation: network 1 of 4, 12 %, about 14 min left"
    assert told[3] == "teacher: epoch 2 of 4, 50 %, about 60 s left, training accuracy 51.2 %"


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_every_stage_is_told_at_its_start_where_stderr_is_no_terminal(cli: Cli, json_flag: tuple[str, ...]) -> None:
    done = cli(*RUN, "--seed", len(json_flag), "--set", "teacher.width=6", "--out", "run", *json_flag)
    told = [line for line in done.err.splitlines() if not line.startswith("No teacher")]
    patterns = [
        r"Reading the data \(digits: 20 of 1,\d+ training images, 10 classes\)",
        *([] if json_flag else [r"Reading all 1,\d+ images .*", r"Training a teacher \(convnet, 3 epochs on 1,\d+ images\)"]),  # then kept
        r"Making the first images \(real\)",
        r"Reading 3\d\d test images",
        r"Distilling 10 images into run \(2 steps, dkkt-primal, dkkt-stationarity\)",
        r"Evaluating: accuracy \(convnet: 2 on synthetic images and 2 on random real images, 2 epochs each\)",
        r"Writing the report of run",
    ]
    assert [re.fullmatch(*pair) is not None for pair in zip(patterns, told, strict=True)] == [True] * len(patterns), told
    assert not json_flag or json.loads(done.out)["run"] == "run"


def test_evaluate_and_train_tell_theirs_and_quiet_silences_all(cli: Cli) -> None:
    assert cli(*RUN, "--out", "run", "--quiet", "--json", "--set", "teacher.width=5").err == ""
    told = cli("evaluate", "run", "--model", "convnet,mlp", "--repeats", 1, "--evaluate", "accuracy").err
    assert "Evaluating: accuracy (convnet, mlp: 1 on synthetic images and 1 on random real images, 2 epochs each)\n" in told
    assert cli("evaluate", "run", "--quiet").err == ""
    assert "Training a teacher (convnet, 2 epochs on" in cli(*TRAIN, "--out", "t.safetensors").err
    assert cli(*TRAIN, "--out", "u.safetensors", "--quiet").err == ""


def test_progress_of_several_models_is_that_of_all_of_them(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr("ddkit.run.progress.ProgressLines._at", lambda self, stage, done, total, *rest: seen.append((stage, done, total)))
    assert cli(*RUN, "--out", "run").code == 0
    seen.clear()
    assert cli("evaluate", "run", "--model", "convnet,mlp", "--repeats", 1).code == 0
    assert sorted({(done, total) for stage, done, total in seen if stage == "evaluation"}) == [(number, 4) for number in range(5)]


def test_a_study_tells_which_sets_are_done_and_how_long_the_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(), list[str]()
    monkeypatch.setattr("ddkit.studies.crew.time", SimpleNamespace(monotonic=clock))
    watchers = SimpleNamespace(begin=lambda stage, line, *, done, total: lines.append(line))
    told, task = Told(3, watchers), SimpleNamespace(label="dm seed 0")  # type: ignore[arg-type]
    for how in ("20.0 %", "failed: no", "21.0 %"):
        told.begun(task)  # type: ignore[arg-type]
        clock.now += 600
        told.ended(task, how)  # type: ignore[arg-type]
    assert lines == [
        "Making and evaluating 3 sets",
        "0 of 3 done: dm seed 0 starts", "1 of 3: dm seed 0: 20.0 %, about 20 min left",
        "1 of 3 done: dm seed 0 starts", "2 of 3: dm seed 0: failed: no, about 10 min left",
        "2 of 3 done: dm seed 0 starts", "3 of 3: dm seed 0: 21.0 %",
    ]  # fmt: skip


def test_the_bar_of_a_study_goes_on_from_line_to_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ddkit.ProgressBar()
    bar.stage_started("sets", "Making and evaluating 3 sets", 0, 3)
    began = bar._bar.start_t
    bar.stage_started("sets", "1 of 3: DM seed 0: 20.0 %", 1, 3)
    assert (bar._bar.n, bar._bar.start_t) == (1, began)  # of which the time left is told
    told = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert {"Making and evaluating 3 sets", "1 of 3: DM seed 0: 20.0 %"} <= set(told)
    assert "1/3" in told[-1]
    bar.stage_started("sets", "Making and evaluating 4 sets", 0, 4)
    assert (bar._bar.n, bar._bar.total) == (0, 4)
    bar.close()


# Interruptions


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that has a signal sent when the line of a stage is told that begins with `words`."""

    def at(words: str, number: int = signal.SIGINT) -> None:
        monkeypatch.setattr("ddkit.run.progress._tell", lambda text: os.kill(os.getpid(), number) if text.startswith(words) else None)

    return at


def told(result: Result) -> str:
    """Returns the error, of which there is one."""
    assert result.out == ""
    assert result.err.count("ddkit: ") == 1
    return " ".join(result.err.split()).partition("ddkit: ")[2]


@pytest.mark.parametrize("stage", ["Reading the data", "Training a teacher", "Making the first images", "Reading 3"])
def test_interrupted_before_it_begins_a_run_leaves_nothing_and_says_so(cli: Cli, interrupted_at: Any, stage: str) -> None:
    interrupted_at(stage)
    result = cli(*RUN, "--set", f"train.lr=0.01{len(stage)}", "--out", "new/run")
    assert result.code == 130
    assert told(result).startswith(f"Interrupted while {stage[0].lower()}{stage[1:]}")
    assert told(result).endswith("so no file is kept. Run the same command again.")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [
        ("Distilling", signal.SIGINT, 130),
        ("Evaluating", signal.SIGTERM, 143),
        ("Evaluating", signal.SIGHUP, 129),
        ("Writing", signal.SIGINT, 130),
    ],
)
def test_interrupted_later_a_run_tells_the_command_that_goes_on(cli: Cli, interrupted_at: Any, stage: str, number: int, code: int) -> None:
    interrupted_at(stage, number)
    result = cli(*RUN, "--out", "my run")
    assert result.code == code
    words, _, command = told(result).partition(" The finished steps are kept. To continue: ddkit ")
    assert words.startswith(f"Interrupted while {stage.lower()}")
    assert command == "distill --out 'my run' --resume"
    interrupted_at("nothing")
    assert cli(*shlex.split(command)).code == 0


def test_an_interrupted_training_or_evaluation_leaves_all_as_it_was(cli: Cli, interrupted_at: Any) -> None:
    assert cli(*RUN, "--out", "run").code == 0
    before = {file.name: file.read_bytes() for file in Path("run").iterdir() if file.is_file()}
    interrupted_at("Evaluating")
    result = cli("evaluate", "run", "--repeats", 1)
    assert (result.code, told(result).partition(". ")[2]) == (
        130, "No figure of this evaluation is kept. run is unchanged. Run the same command again.",
    )  # fmt: skip
    assert before == {file.name: file.read_bytes() for file in Path("run").iterdir() if file.is_file()}
    interrupted_at("Training")
    result = cli(*TRAIN, "--out", "new/t.safetensors")
    assert (result.code, told(result).partition(". ")[2]) == (130, "The half-trained teacher is not kept. Run the same command again.")
    assert not Path("new").exists()


def test_a_hangup_that_is_ignored_as_under_nohup_ends_nothing(cli: Cli, interrupted_at: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupted_at("", signal.SIGHUP)
        assert cli(*RUN, "--out", "run").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


GONE = """
import os, pty, signal, sys
from ddkit import cli
ours, its = pty.openpty()
os.dup2(its, 2)
os.close(its)
os.close(ours)
def hang_up(*given, **named):
    os.kill(os.getpid(), signal.SIGHUP)
cli.cli.main = hang_up
cli.main()
"""


def test_a_terminal_that_is_gone_changes_no_exit_code() -> None:
    assert subprocess.run([sys.executable, "-c", GONE], check=False).returncode == 129


# Seconds


def test_seconds_are_those_of_all_parts_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("ddkit.run.run.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))

    class Stops:
        @ddkit.hookimpl
        def step_finished(self, index: int) -> None:
            if index == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    sets = SMALL | {"steps": 8, "engine.log_every": 1}
    with pytest.raises(ddkit.Interrupted, match=r"after step 5 of 8\. .* --resume$"):
        ddkit.distill(losses="dm", pipc=2, sets=sets, evaluators="none", out=tmp_path / "run", device="cpu", observers=[Stops()])
    newest = tmp_path / "run" / "checkpoints" / "step-00000005.safetensors"
    tensors, facts = read_tensors(newest)
    assert facts["seconds"] == 6  # a tick for each line of metrics, and one for the checkpoint
    old = shutil.copytree(tmp_path / "run", tmp_path / "old")
    write_tensors(old / newest.relative_to(tmp_path / "run"), tensors, {k: v for k, v in facts.items() if k not in ("seconds", "schema")})
    run = ddkit.resume(tmp_path / "run", device="cpu")
    lines = [json.loads(line)["seconds"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 7, 8, 9]
    assert json.loads((run.path / "manifest.json").read_text())["seconds"] == run.seconds == 11
    assert ddkit.resume(old, device="cpu").seconds == 5  # a checkpoint of an earlier version does not tell
