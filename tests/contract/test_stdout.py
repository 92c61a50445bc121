"""The standard output of a command is its answer alone, whatever plugins print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOISE = """
import atexit
import os
import sys

import ddkit


def noise(place):
    print('{"schema": "printed", "place": "%s"}' % place)
    os.write(1, b'{"schema": "written"}\\n')
    os.system("echo '{}'")
    print("more", file=sys.__stdout__, flush=True)


noise("import")
atexit.register(noise, "exit")


class Noisy(ddkit.Loss):
    "A loss that prints."

    def __call__(self, step):
        noise("call")
        return step.images.square().mean()


class NoisyExporter(ddkit.Exporter):
    "An exporter that prints."

    def __call__(self, artifact, folder):
        noise("export")
        open(os.path.join(folder, "file"), "w").close()
"""
DISTILL = ["distill", "--losses", "noisy", "--steps", "1", "--evaluate", "none", "--out", "run"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "noise.py").write_text(NOISE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(forks: Any, *words: str) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = forks.run([sys.executable, "-m", "ddkit", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.usefixtures("folder")
def test_json_is_one_object_whatever_a_plugin_prints(forks: Any) -> None:
    check = ["list", "losses", "--check"]
    commands = [DISTILL, ["export", "run", "--to", "noisy-exporter", "--out", "exported"], ["info", "loss", "noisy"], check]
    for words in commands:
        done = run(forks, *words, "--plugin", "noise.py", "--json")
        found = json.loads(done.stdout)
        assert (found["schema"], '"place": "import"' in done.stderr, '"place": "exit"' in done.stderr) == (1, True, True), words
    assert [row["status"] for row in found["components"] if row["distribution"] == "noise.py"] == ["ok"]


@pytest.mark.usefixtures("folder")
def test_text_for_people_and_help_are_on_stdout_and_noise_is_not(forks: Any) -> None:
    shown = run(forks, *DISTILL, "--plugin", "noise.py", "--quiet")
    assert shown.stdout.startswith("1 steps in")
    assert "printed" not in shown.stdout
    assert all(f'"place": "{place}"' in shown.stderr for place in ("import", "call", "exit"))
    for words in (["--help"], ["list", "--plugin", "noise.py", "--help"], ["--version"]):
        assert "ddkit" in run(forks, *words).stdout


@pytest.mark.parametrize("reader", ["none", "gone", "full"])
@pytest.mark.usefixtures("folder")
def test_a_stdout_that_nobody_reads_ends_no_command_in_a_traceback(forks: Any, reader: str) -> None:
    ends = os.pipe()
    os.close(ends[0])
    stream = {"none": os.open(os.devnull, os.O_WRONLY), "gone": ends[1], "full": os.open("/dev/full", os.O_WRONLY)}[reader]
    with open("errors", "w") as errors:
        started = forks.Popen([sys.executable, "-m", "ddkit", "list"], stdin=subprocess.DEVNULL, stdout=stream, stderr=errors, text=True)
        code = started.wait()
    said = Path("errors").read_text()
    assert code == (5 if reader == "full" else 0), said
    assert ("Standard output cannot be written: No space left" in said) == (reader == "full")
    assert "Traceback" not in said
    assert "Exception ignored" not in said
