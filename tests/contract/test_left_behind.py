"""What commands leave when they fail or are killed: nothing, or what the same command given again removes; and --force."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddkit.api import resume
from ddkit.files import read_json
from ddkit.run.manifest import JOURNAL, is_left_behind
from tests.conftest import SMALL_FLAGS, Result, content, said

Cli = Callable[..., Result]
DM = ("--losses", "dm", "--pipc", 1, "--evaluate", "none", *SMALL_FLAGS)
FAILS = """
import ddkit

class Mine(ddkit.Loss):
    \"\"\"Fails at a step.\"\"\"

    def __call__(self, step):
        if step.index == {step}:
            raise ValueError("a mistake")
        return step.images.mean()
"""


# A run that never took a step


def test_a_run_that_fails_in_its_first_step_leaves_nothing_and_one_that_fails_later_stays(cli: Cli) -> None:
    command = ("distill", "--plugin", "mine.py", "--losses", "mine", *DM[2:], "--out", "new/run")
    for step in (0, 1):
        Path("mine.py").write_text(FAILS.format(step=step))
        assert cli(*command).code == 1
        assert Path("new/run/checkpoints/step-00000001.safetensors").is_file() == (step == 1)
        assert Path("new").exists() == (step == 1)


# --force


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


@pytest.mark.parametrize("state", ["finished", "cut off", "without its manifest and set"])
def test_force_replaces_a_run_and_removes_only_ddkits_own_files(cli: Cli, run: Path, state: str) -> None:
    for name in {"finished": (), "cut off": ("manifest.json",)}.get(state, ("manifest.json", "synthetic.safetensors", "film.safetensors")):
        (run / name).unlink()
    before = content(run)
    refused = cli("distill", *DM, "--seed", 1, "--out", run)
    assert refused.code == 5
    assert "--force" in refused.err
    assert content(run) == before
    assert cli("distill", *DM, "--seed", 1, "--out", run, "--force").code == 0
    assert read_json(run / "manifest.json")["seed"] == 1
    assert (run / "notes.txt").read_text() == "mine"
    assert cli("distill", *DM, "--seed", 1, "--out", "other").code == 0
    assert content(run)["synthetic.safetensors"] == content(Path("other"))["synthetic.safetensors"]


@pytest.mark.parametrize("fault", ["--teacher=gone.safetensors", "--init=file:gone", "--set=ipc=100000000", "--losses=mine"])
def test_what_force_would_replace_stays_until_the_new_run_begins(cli: Cli, run: Path, fault: str) -> None:
    before = content(run)
    code = "import ddkit\n\nclass Mine(ddkit.Loss):\n    'Fails.'\n    def initial(self, step):\n        raise ValueError\n"
    Path("mine.py").write_text(code)
    assert cli("distill", *DM, "--plugin", "mine.py", "--out", run, "--force", fault).code > 0
    assert content(run) == before


@pytest.mark.parametrize("name", ["recipe.toml", "manifest.json", "synthetic.safetensors", "photo.jpg"])
def test_force_replaces_nothing_of_somebody_elses(cli: Cli, name: str) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_text('name = "mine"\n[losses.dm]\n' if name.endswith("toml") else "{}")
    before = content(Path("mine"))
    for flags in ((), ("--force",)):
        refused = cli("distill", *DM, "--out", "mine", *flags)
        assert (refused.code, refused.out) == (5, "")
        assert content(Path("mine")) == before


# Killed

KILLED = """
import os, sys
sys.dont_write_bytecode = True
left = int(sys.argv.pop(1))
def counted(original):
    def operation(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return original(*arguments, **named)
    return operation
import ddkit.cli, safetensors.torch, torch
torch.set_num_threads(1)
for module, names in ((os, ("fsync", "replace", "unlink", "rmdir", "mkdir", "open")), (safetensors.torch, ("save_file",))):
    for name in names:
        original = getattr(module, name)
        if name == "open":  # of files that are written
            setattr(module, name, (lambda original, other: lambda path, flags, *more, **named:
                (other if flags & (os.O_WRONLY | os.O_RDWR) else original)(path, flags, *more, **named))(original, counted(original)))
        else:
            setattr(module, name, counted(original))
ddkit.cli.main()
"""


@pytest.fixture
def killed(forks: Any, tmp_path: Path) -> Callable[..., int]:
    """Returns a function that runs a command in a process that dies before operation number `after` on a file; returns its exit code."""

    def run(after: int, *arguments: object) -> int:
        command = [sys.executable, "-c", KILLED, str(after), *map(str, arguments)]
        return int(forks.run(command, capture_output=True, text=True, cwd=tmp_path).returncode)

    return run


COMMANDS = {
    "import": "import set.pt --mean 0.5 --std 0.5 --pixels unit --out new/out",
    "blend": "blend RUN/synthetic.safetensors RUN/synthetic.safetensors --out new/out",
    "blend of runs": "blend RUN RUN --out new/out",
    "export": "export RUN --to npz --out new/out",
    "export of folders": "export RUN --to imagefolder --out new/out",
}


@pytest.mark.parametrize("command", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("blend", "export"))) for name in COMMANDS])
def test_a_killed_command_can_be_given_again(
    cli: Cli, killed: Callable[..., int], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"images": torch.rand(4, 1, 8, 8), "labels": torch.arange(4) % 2}, "set.pt")
    words = COMMANDS[command].replace("RUN", str(finished)).split()
    assert cli(*words).code == 0
    whole = {name for name in content(Path("new"))}
    seen = set()
    for after in range(0, 200, 2 if command == "export" else 5):
        shutil.rmtree("new")
        code = killed(after, *words)
        if code == 0:
            break
        assert code == 9
        left = set(content(Path("new"))) if Path("new").exists() else set()
        seen.add(len(left))
        again = cli(*words)
        if again.code == 5:  # it was killed when all was done, but its lock not yet removed
            assert left == whole | {"out/.lock"}
            continue
        assert again.code == 0, again.err
        assert set(content(Path("new"))) == whole, after
    else:
        pytest.fail("it was never whole")
    assert len(seen) > 2


def test_a_set_that_somebody_put_into_a_folder_is_not_left_behind(cli: Cli, finished: Path) -> None:
    Path("mine").mkdir()
    shutil.copyfile(finished / "synthetic.safetensors", "mine/synthetic.safetensors")
    assert is_left_behind(Path("mine"))
    before = content(Path("mine"))
    for command in (("distill", *DM), ("export", finished, "--to", "npz"), ("blend", finished, finished)):
        assert cli(*command, "--out", "mine").code == 5
        assert content(Path("mine")) == before


def test_files_beside_what_a_killed_export_left_are_kept(cli: Cli, finished: Path) -> None:
    Path("out").mkdir()
    for name in ("synthetic.npz", "mine.txt", ".lock"):
        Path("out", name).write_text("half")
    Path("out", JOURNAL).write_text(json.dumps(["synthetic.npz", "README.md", "../outside"]))
    Path("outside").write_text("mine")
    assert cli("export", finished, "--to", "npz", "--out", "out").code == 5
    assert Path("out/mine.txt").read_text() == "half"
    Path("out/mine.txt").unlink()
    assert cli("export", finished, "--to", "npz", "--out", "out").code == 0
    assert set(content(Path("out"))) == {"synthetic.npz", "README.md"}
    assert Path("outside").exists()


# Names of --out


def test_a_name_that_is_no_text_is_refused_before_the_run(cli: Cli, finished: Path) -> None:
    name = os.fsdecode(b"a\xff")
    commands = (
        ("distill", *DM), ("train",), ("export", finished, "--to", "npz"), ("blend", finished, finished), ("report", finished),
    )  # fmt: skip
    for command in commands:
        refused = cli(*command, "--out", name)
        assert (refused.code, refused.out) == (2, ""), refused
        assert "is not UTF-8 text" in said(refused.err)
    assert list(Path.cwd().iterdir()) == []


def test_a_run_that_was_cut_off_before_its_first_checkpoint_can_be_given_again(cli: Cli, finished: Path) -> None:
    Path("run").mkdir()
    shutil.copyfile(finished / "recipe.toml", "run/recipe.toml")
    Path("run/.lock").touch()
    assert cli("distill", *DM, "--out", "run").code == 0
    resume("run", steps=3, device="cpu")
