"""Whatever ends a run, and wherever: what is on the disk is whole, and --resume ends with the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddkit
from ddkit.api import resume
from ddkit.files import write_tensors
from ddkit.run.directory import RunDirectory
from ddkit.run.lock import FolderLock
from ddkit.run.manifest import CHECKPOINTS
from tests.conftest import Result, content, said, timeless

Cli = Callable[..., Result]
SMALLEST = {
    "losses.dm.weight": 0.01,
    "steps": 3,
    "network.width": 4,
    "engine.checkpoint_every": 2,
    "evaluators.accuracy.epochs": 1,
    "evaluators.accuracy.repeats": 1,
    "evaluators.accuracy.random_real": False,
    "evaluators.accuracy.model_options.width": 4,
}


@pytest.fixture(autouse=True, scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tells this process, and those that it starts, where a data set of two classes is."""
    file = tmp_path_factory.mktemp("data") / "two.npz"
    labels = np.arange(8) % 2
    images = np.random.default_rng(0).integers(0, 200, (8, 8, 8), dtype=np.uint8) + (labels * 50).astype(np.uint8)[:, None, None]
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWO_CLASSES", f"npz:{file}")
        yield


def begin(out: Path, **changes: Any) -> None:
    """Makes a run that takes a fraction of a second: 3 steps, checkpoints at 0, 2 and 3, one network."""
    sets = SMALLEST | {"engine.log_every": 1} | {key.replace("__", "."): value for key, value in changes.items()}
    ddkit.distill(losses="dm", dataset=os.environ["TWO_CLASSES"], ipc=1, pipc=2, sets=sets, out=out, device="cpu")


def continued(path: Path) -> None:
    """Continues the run at `path`, or begins it where it never began."""
    if (path / "recipe.toml").is_file():
        resume(path, device="cpu")
    else:
        assert not path.exists() or {entry.name for entry in path.iterdir()} <= {".lock"} | leftovers(path)
        begin(path)


def leftovers(path: Path) -> set[str]:
    return {file.name for file in path.rglob(".*") if file.suffix == ".part" or file.name.startswith(".tmp")}


def result(path: Path) -> dict[str, Any]:
    """Returns what two runs have to agree in: all files, the times in four of them apart."""
    found: dict[str, Any] = {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file() and file.suffix != ".json"
    }
    found |= {f"checkpoints/{file.name}": timeless(file) for file in (path / "checkpoints").iterdir()}
    lines = [json.loads(line) for line in found.pop("metrics.jsonl").splitlines()]
    found["metrics.jsonl"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    found["report.html"] = re.sub(rb'<span class="time">.*?</span>', b"", found["report.html"])
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("metrics.jsonl", "report.html"):
        manifest["files"].pop(name)
    manifest.pop("digest")
    return found | {"manifest.json": {**manifest, "seconds": 0}, "evaluation.json": (path / "evaluation.json").read_text()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    begin(path)
    return result(path)


# The k-th operation on a file fails


class Disk:
    """Counts what a run does to files, shows each to `before`, and lets number `fails` fail as a full disk would."""

    def __init__(self, patch: pytest.MonkeyPatch, *, fails: int | None = None, before: Callable[[], None] = lambda: None) -> None:
        import safetensors.torch

        self.count, self.fails, self.before = 0, fails, before
        self.names: list[str] = []
        operations: list[tuple[Any, str]] = [(os, name) for name in ("fsync", "replace", "open")]
        operations += [(Path, name) for name in ("write_bytes", "open", "mkdir", "unlink")]
        for module, name in operations:
            patch.setattr(module, name, self.wrapped(name, getattr(module, name)))
        patch.setattr(safetensors.torch, "save_file", self.wrapped("save_file", safetensors.torch.save_file, torn=True))

    def wrapped(self, name: str, original: Callable[..., Any], *, torn: bool = False) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if not self.is_counted(name, arguments):
                return original(*arguments, **named)
            self.before()
            number, self.count = self.count, self.count + 1
            self.names.append(name)
            if number == self.fails:
                if torn:
                    Path(arguments[1]).write_text("half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **named)

        return operation

    @staticmethod
    def is_counted(name: str, arguments: tuple[Any, ...]) -> bool:
        """Whether it writes: files that are opened to be read do not matter here."""
        if name == "open" and isinstance(arguments[0], Path):
            return len(arguments) > 1 and set("wax+").intersection(str(arguments[1])) != set()
        if name == "open":
            return len(arguments) > 1 and bool(int(arguments[1]) & (os.O_WRONLY | os.O_RDWR))
        return True


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_fails_the_newest_checkpoint_loads_and_the_run_continues_to_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, Any], every: int
) -> None:
    seen = []

    def look() -> None:
        if (tmp_path / "counted" / CHECKPOINTS).is_dir():
            seen.append(RunDirectory(tmp_path / "counted").newest_checkpoint())  # raises where there are some and none can be read

    with pytest.MonkeyPatch.context() as patch:
        counted = Disk(patch, before=look)
        begin(tmp_path / "counted")
    steps = [found[0] for found in seen if found is not None]
    assert steps == sorted(steps)
    assert set(steps) == {0, 2, 3}
    assert {"fsync", "replace", "open", "write_bytes", "save_file", "mkdir", "unlink"} <= set(counted.names)
    told = 0
    for fails in range(0, counted.count, every):
        path = tmp_path / f"run-{fails}"
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fails=fails)
            try:
                begin(path)
            except ddkit.RunFilesError as error:
                told += (error.exit_code, str(error).count("\n"), "No space left on device" in str(error)) == (5, 0, True)
        assert leftovers(path) == set() or counted.names[fails] == "unlink"
        if (path / CHECKPOINTS).is_dir() and any((path / CHECKPOINTS).iterdir()):
            assert RunDirectory(path).newest_checkpoint() is not None, fails
        continued(path)
        found = result(path)
        if counted.names[fails] == "unlink":
            found.pop(f"{CHECKPOINTS}/step-00000000.safetensors", None)  # one too many, which could not be removed
        assert found == undisturbed, f"operation {fails}, {counted.names[fails]}"
        shutil.rmtree(path)
    assert told > counted.count // every // 2, "an error in removing a file that is of no use any more may pass"


def test_that_comparison_would_see_another_run(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    begin(tmp_path / "run", seed=1)
    other = result(tmp_path / "run")
    assert other.keys() == undisturbed.keys()
    assert other["synthetic.safetensors"] != undisturbed["synthetic.safetensors"]
    assert other["metrics.jsonl"] != undisturbed["metrics.jsonl"]


# Killed at random moments

ONE = """
import sys
from pathlib import Path
import pytest
import torch
torch.set_num_threads(1)
from tests.conftest import plain_reports
plain_reports(pytest.MonkeyPatch())  # as in the tests' own process
from tests.contract.test_crash_safety import continued
continued(Path(sys.argv[1]))
"""
Ended = Callable[..., tuple[int, float]]


@pytest.fixture(scope="module")
def ended(forks: Any) -> Ended:
    """Returns a function that begins or continues the run at a path in a process: (exit code, which is -9 where it was killed, seconds)."""

    def run(path: Path, *, killed_after: float | None = None) -> tuple[int, float]:
        process, began = forks.Popen([sys.executable, "-c", ONE, str(path)], text=True), time.perf_counter()
        if killed_after is not None:
            time.sleep(killed_after)
            process.kill()
        return process.wait(), time.perf_counter() - began

    return run


def killed_often(ended: Ended, folder: Path, undisturbed: dict[str, Any], times: int) -> int:
    """Kills runs `times` times, twice each, and asserts that each ends as if it had not been; returns how many were really cut off."""
    code, seconds = ended(folder / "first")
    assert code == 0
    draw = random.Random(0)
    cut = 0
    for number in range(times // 2):
        path = folder / f"run-{number}"
        for _ in range(2):
            code, _ = ended(path, killed_after=draw.uniform(0.0, 0.9 * seconds))
            assert code in (0, -9)
            cut += code == -9
        assert ended(path)[0] == 0
        assert result(path) == undisturbed, number
        shutil.rmtree(path)
    return cut


def test_a_run_killed_at_random_moments_continues_to_the_same_bytes(ended: Ended, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    assert killed_often(ended, tmp_path, undisturbed, 4) >= 2


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_change_nothing(ended: Ended, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    assert killed_often(ended, tmp_path, undisturbed, 200) >= 100


def test_what_a_killed_write_left_is_removed_and_a_folder_that_only_holds_that_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / ".recipe.toml.abcd1234.part").write_text("half")
    (path / ".tmpIHBjf1").write_bytes(b"")  # as the library safetensors names its own
    (path / ".lock").write_bytes(b"")
    begin(path)
    assert leftovers(path) == set()
    assert not (path / ".lock").exists()
    (path / CHECKPOINTS / ".step-00000003.safetensors.abcd1234.part").write_text("half")
    (path / CHECKPOINTS / ".tmpu0paUB").write_text("half")
    (path / "manifest.json").unlink()
    resume(path, device="cpu")
    assert leftovers(path) == set()


def test_a_folder_with_somebodys_files_is_left_alone(tmp_path: Path) -> None:
    for name in (".mine", ".tmp-mine"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ddkit.RunFilesError, match="is not empty"):
        begin(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".mine", ".tmp-mine"}


# A limit on the size of files, a folder that cannot be written


LIMITED = """
import resource, sys
sys.dont_write_bytecode = True  # a file that was cut off would break every later process
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from ddkit.cli import main
main()
"""


def test_a_limit_on_the_size_of_files_is_told_and_what_was_there_stays(forks: Any, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    path = tmp_path / "run"
    begin(path)
    for name in ("manifest.json", "synthetic.safetensors"):  # the set has more bytes than the limit
        (path / name).unlink()
    before = content(path / CHECKPOINTS)
    command = [sys.executable, "-c", LIMITED, "distill", "--resume", "--out", str(path)]
    done = forks.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert re.search(rf"ddkit: {re.escape(str(path))}\S* cannot be written: ", said(done.stderr))
    assert content(path / CHECKPOINTS) == before
    assert leftovers(path) == set()
    assert not (path / "synthetic.safetensors").exists()
    resume(path, device="cpu")
    assert result(path) == undisturbed


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_done(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            RunDirectory.claim(tmp_path / "run")
        except BaseException as error:  # nothing may go on in this process, which is a copy of the one that runs the tests
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"cannot be written: Permission denied" in os.read(reading, 999)
    assert list(tmp_path.iterdir()) == []


# Two at once


HOLDER = """
import sys, time
from pathlib import Path
from ddkit.run.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path/run."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_into_one_folder_is_refused_until_the_first_process_is_dead(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(ddkit.RunFilesError, match=r"Another process is writing to .*run"):
        begin(tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {".lock"}
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    begin(tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_a_run_that_is_being_written_is_continued_by_nobody_else_and_its_figures_are_shown_and_not_recorded(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ddkit.run.evaluation.LOCK_SECONDS", 0.0)
    begin(tmp_path / "run")
    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    flags = ["--protocol", "short", "--set", "evaluators.accuracy.epochs=2"]
    with RunDirectory.existing(tmp_path / "run").take():
        shown = cli("evaluate", tmp_path / "run", *flags)
        refused = cli("distill", "--resume", "--out", tmp_path / "run", "--steps", 4)
    assert (refused.code, refused.out) == (5, "")
    assert "Another process is writing to" in refused.err
    assert shown.code == 0
    assert "%" in shown.out
    assert "were not added to the files of the run" in caplog.text
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before
    assert cli("evaluate", tmp_path / "run", *flags).code == 0
    assert (tmp_path / "run" / "evaluation.json").read_bytes() != before


def test_a_forked_process_does_not_hold_the_lock_of_the_one_that_it_outlives(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(0)
    assert os.read(reading, 1) == b"x"
    os.close(lock._descriptor)  # what the end of this process would do
    lock._descriptor = -1
    FolderLock(tmp_path).release()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


def test_a_lock_on_a_file_that_its_holder_has_just_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FolderLock(tmp_path)
    original, opened = os.open, []

    def late(*arguments: Any, **named: Any) -> int:
        descriptor = original(*arguments, **named)
        if not opened:
            first.release()  # between another's open and its lock
        opened.append(descriptor)
        return descriptor

    monkeypatch.setattr(os, "open", late)
    second = FolderLock(tmp_path, wait=1.0)
    assert len(opened) == 2
    assert (tmp_path / ".lock").exists()
    second.release()


# Interrupted

SLOW = '''
"""A loss that takes its time."""
import time, os
import ddkit

class Slow(ddkit.Loss):
    """Waits."""
    def __call__(self, step):
        if step.index == 2 and os.environ.get("SLOW"):
            print("waiting", flush=True)
            time.sleep(30)
        return step.images.square().mean()
'''


def test_a_second_interruption_stops_at_once_and_the_older_checkpoint_is_good(forks: Any, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = ["--plugin", "slow.py", "--losses", "slow", "--pipc", "1", "--evaluate", "none", "--steps", "4"]
    flags = [sys.executable, "-m", "ddkit", "distill", *arguments, "--set", "engine.checkpoint_every=1"]
    environment = os.environ | {"SLOW": "1"}
    process = forks.Popen([*flags, "--out", "run"], cwd=tmp_path, stdout=forks.PIPE, stderr=forks.PIPE, text=True, env=environment)
    assert "waiting\n" in process.stderr  # what a plugin prints goes there
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first waits for the step"
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)
    assert time.perf_counter() - began < 5
    _, said = process.communicate()
    assert process.returncode == 130
    told = " ".join(said.split()).partition("ddkit: ")[2]
    assert re.fullmatch(r"Interrupted while distilling .* The finished steps are kept. To continue: ddkit distill --out run --resume", told)
    newest = RunDirectory(tmp_path / "run").newest_checkpoint()
    assert newest is not None
    assert newest[0] == 2
    command = [sys.executable, "-m", "ddkit", "distill", "--resume", "--plugin", "slow.py", "--out", "run"]
    done = forks.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"] == 4


# What a run works with, and what it wrote, between its end and its going on


def cut_after(path: Path, step: int) -> None:
    """Makes a finished run one that was ended after `step` steps."""
    for name in ("manifest.json", "synthetic.safetensors"):
        (path / name).unlink()
    for file in (path / CHECKPOINTS).iterdir():
        if file.name > f"step-{step:08d}.safetensors":
            file.unlink()


def test_another_teacher_or_other_data_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    teacher, other, data = tmp_path / "teacher-0.safetensors", tmp_path / "teacher-1.safetensors", tmp_path / "data.npz"
    for seed, file in enumerate((teacher, other)):
        ddkit.train(file, dataset="digits", seed=seed, sets={"train.epochs": 1, "teacher.width": 4}, device="cpu")
    random_ = np.random.default_rng(0)
    images, labels = random_.integers(0, 255, (40, 8, 8), dtype=np.uint8), np.arange(40) % 10
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    sets = {"steps": 3, "network.width": 4, "engine.checkpoint_every": 1}
    names = {"dataset": f"npz:{data}", "teacher": str(teacher), "losses": "dm,dkkt", "pipc": 3, "evaluators": "none", "device": "cpu"}
    kept = teacher.read_bytes()
    ddkit.distill(out=tmp_path / "run", sets=sets, **names)  # type: ignore[arg-type]
    whole = (tmp_path / "run" / "synthetic.safetensors").read_bytes()
    cut_after(tmp_path / "run", 2)
    teacher.write_bytes(other.read_bytes())
    with pytest.raises(ddkit.RunFilesError, match=r"the teacher teacher-0\.safetensors has changed since the run .* began"):
        resume(tmp_path / "run", device="cpu")
    teacher.write_bytes(kept)
    np.savez(data, x_train=images[::-1], y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(ddkit.RunFilesError, match=r"the accessible data has changed since the run .* began"):
        resume(tmp_path / "run", device="cpu")
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    resume(tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "synthetic.safetensors").read_bytes() == whole


def test_figures_of_a_set_that_has_changed_since_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path / "run")
    original = ddkit.evaluate.__globals__["judged"]

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        rows = original(*arguments, **named)
        resume(tmp_path / "run", steps=5, device="cpu")
        return rows

    monkeypatch.setattr("ddkit.run.evaluation.judged", meanwhile)
    ddkit.evaluate(tmp_path / "run", evaluators="spectrum", device="cpu")
    assert "its set has changed in the meantime" in caplog.text
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluations"]
    assert [row["evaluator"] for row in rows] == ["accuracy"], "those of the longer run alone"


def test_a_run_that_a_full_disk_ends_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "whole", steps=4)

    def full(path: Path, tensors: Any, record: Any) -> None:
        if record["step"] > 0:
            raise ddkit.RunFilesError(f"{path} cannot be written: No space left on device.")
        write_tensors(path, tensors, record)

    monkeypatch.setattr("ddkit.run.checkpoints.write_tensors", full)
    with pytest.raises(ddkit.RunFilesError, match="No space left on device") as caught:
        begin(tmp_path / "run", steps=4)
    assert f"To continue: ddkit distill --out {tmp_path / 'run'} --resume" in str(caught.value)
    monkeypatch.undo()
    resume(tmp_path / "run", device="cpu")
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_figures_that_a_full_disk_has_no_room_for_are_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path / "run")
    before = (tmp_path / "run" / "evaluation.json").read_bytes()

    def full(path: Path, content: bytes) -> None:
        raise ddkit.RunFilesError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr("ddkit.run.directory.write_atomic", full)
    (row,) = ddkit.evaluate(tmp_path / "run", evaluators="spectrum", device="cpu")
    assert row.evaluator == "spectrum"
    assert "The figures were not added to the files of the run." in caplog.text
    assert "No space left on device" in caplog.text
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text.replace(b'"step": 0', b'"step": \xff'), "line 1 cannot be read"),
        (lambda text: b"garbage\n" + text, "line 1 cannot be read"),
        (lambda text: b"", "no line for step 0"),
    ],
)
def test_damaged_metrics_of_an_unfinished_run_are_told(tmp_path: Path, damage: Callable[[bytes], bytes], told: str) -> None:
    begin(tmp_path / "run")
    cut_after(tmp_path / "run", 2)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ddkit.RunFilesError, match=rf"metrics\.jsonl is damaged: .*{told}"):
        resume(tmp_path / "run", device="cpu")


def test_a_damaged_film_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(tmp_path / "run")
    cut_after(tmp_path / "run", 3)
    (tmp_path / "run" / "film.safetensors").write_bytes(b"xx")
    resume(tmp_path / "run", device="cpu")
    assert "no film of the run" in caplog.text
    assert "film.safetensors" not in json.loads((tmp_path / "run" / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("place", ["directory.RunDirectory.write_recipe", "resuming.cut_metrics"])
def test_a_prolongation_that_is_cut_off_has_no_manifest_and_goes_on_to_all_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    begin(tmp_path / "whole", steps=7, engine__log_every=3)
    begin(tmp_path / "run", steps=5, engine__log_every=3)

    def fail(*arguments: object, **named: object) -> None:
        assert not (tmp_path / "run" / "manifest.json").exists()
        raise ddkit.RunFilesError("stopped")

    monkeypatch.setattr(f"ddkit.run.{place}", fail)
    with pytest.raises(ddkit.RunFilesError, match="stopped"):
        resume(tmp_path / "run", steps=7, device="cpu")
    monkeypatch.undo()
    resume(tmp_path / "run", steps=None if place == "resuming.cut_metrics" else 7, device="cpu")
    assert result(tmp_path / "run")["metrics.jsonl"] == result(tmp_path / "whole")["metrics.jsonl"]
