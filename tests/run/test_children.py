"""Child processes: what they answer, and how their end is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ddkit
from ddkit.run.lock import FolderLock

ECHO = """
import json, os, sys
import ddkit
print('{"argument": "not for us"}', flush=True)
ddkit.reply({"argument": sys.argv[1]})
for line in sys.stdin:
    os.write(1, b'{"heard": "not for us either"}\\n')
    if json.loads(line) == "die":
        sys.exit("of its own accord")
    ddkit.reply({"heard": json.loads(line)})
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ddkit.Child:
    (tmp_path / "echoing.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return ddkit.Child("echoing", "hello", errors=tmp_path / "errors.txt")


def test_a_child_says_when_it_is_ready_and_answers_each_question(child: ddkit.Child) -> None:
    assert child.answer() == {"argument": "hello"}
    assert child.ask(["a", 1]) == {"heard": ["a", 1]}
    assert child.running
    child.stop()
    assert not child.running


def test_the_end_of_a_child_is_told_with_code_and_last_words(child: ddkit.Child) -> None:
    child.answer()
    for question in ("die", "again"):
        with pytest.raises(ddkit.ChildEnded, match="ended with exit code 1: of its own accord"):
            child.ask(question)
    for _ in range(2):
        child.stop()
        with pytest.raises(ddkit.ChildEnded):
            child.ask("anything")


def killed(parent: Any, ready: Path) -> None:
    """Kills `parent` once the file `ready` is there, so that it can end none of its children."""
    until = time.monotonic() + 60
    while not ready.exists():
        assert parent.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.kill()
    assert parent.wait() == -signal.SIGKILL


BUSY = """
import pathlib, sys, time
from ddkit.run.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""
PARENTS = {
    "a Child": "import pathlib, ddkit\nddkit.Child('busy', sys.argv[1], errors=pathlib.Path(sys.argv[1], 'errors')).answer()",
    "run()": "import pathlib\nfrom ddkit.run import children\nchildren.run(pathlib.Path(sys.argv[1], 'busy.py').read_text(), sys.argv[1])",
}


@pytest.mark.parametrize("parent", PARENTS)
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path, parent: str) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", f"import sys\n{PARENTS[parent]}", str(tmp_path)], env=environment)
    killed(process, tmp_path / "ready")
    FolderLock(tmp_path, wait=10).release()


def test_a_set_of_a_study_that_is_killed_ends_after_a_checkpoint(tmp_path: Path, forks: Any) -> None:
    words = f"distill --losses dm --steps 1000000 --evaluate none --out {tmp_path / 'run'} --set engine.compile=false".split()
    study = f"from ddkit.studies.crew import Crew, Settings\nCrew(Settings()).command({words!r})"
    killed(forks.Popen([sys.executable, "-c", study], cwd=tmp_path), tmp_path / "run" / "metrics.jsonl")
    FolderLock(tmp_path / "run", wait=20).release()
    assert max(file.name for file in (tmp_path / "run" / "checkpoints").iterdir()) > "step-00000000.safetensors"
