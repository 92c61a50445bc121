"""A run that overflows, a machine without enough memory, a torch that is broken: each ends with one paragraph that says what to do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL_FLAGS, Result

Cli = Callable[..., Result]
FLAGS = ("distill", "--losses", "dm", "--evaluate", "none", "--out", "run", *SMALL_FLAGS)
ALLOCATE = """
import torch
import ddkit


class {name}(ddkit.Loss):
    \"\"\"Takes more memory than there is.\"\"\"

    def __call__(self, step):
        return step.images.sum() * {code}
"""


def in_one_paragraph(result: Result) -> str:
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    return " ".join(result.err.split())


@pytest.mark.parametrize(("kind", "rate"), [("adam", "1e30"), ("adam", "1e300"), ("sgd", "1e38"), ("sgd", "3e38")])
def test_a_rate_that_overflows_ends_with_a_rate_that_works(cli: Cli, rate: str, kind: str) -> None:
    """Torch raises, instead of taking it, a step that is larger than float32 holds."""
    path = "optimizer.images"
    told = in_one_paragraph(cli(*FLAGS, "--set", f"{path}.lr={rate}", "--set", f"{path}.kind={kind}", "--set", "initializer.use=noise"))
    assert "Try a smaller learning rate" in told
    advice = re.search(r"--set optimizer\.images\.lr=[^\s),]+", told)
    assert advice, told
    assert not advice[0].endswith(".")
    again = cli(*FLAGS[: -len(SMALL_FLAGS) - 1], "again", *SMALL_FLAGS, "--set", f"{path}.kind={kind}", *shlex.split(advice[0]))
    assert again.code == 0


def run_with(cli: Cli, folder: Path, name: str, code: str) -> str:
    """Returns how a run with the loss `name`, which computes `code`, ends."""
    (folder / "own.py").write_text(ALLOCATE.format(name=name.title(), code=code))
    return in_one_paragraph(cli("distill", "--plugin", folder / "own.py", "--losses", name, *FLAGS[3:]))


@pytest.mark.parametrize(
    ("library", "code"),
    [("torches", "torch.empty(2**50).sum()"), ("pythons", "bytearray(2**60)[0]"), ("numpys", "__import__('numpy').empty(2**50).sum()")],
)
def test_too_little_memory_is_told_with_the_flags_that_need_less(cli: Cli, tmp_path: Path, library: str, code: str) -> None:
    told = run_with(cli, tmp_path, library, code)
    assert "not enough memory" in told
    assert "--set data.batch=64" in told


def test_another_error_of_a_loss_is_no_want_of_memory(cli: Cli, tmp_path: Path) -> None:
    told = run_with(cli, tmp_path, "unshaped", "torch.ones(2).view(3).sum()")
    assert "The loss 'unshaped'" in told
    assert "raised RuntimeError" in told
    assert "memory" not in told


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", FLAGS),
        ("from torch._C import nothing", ["distill", "--protocol", "short", "--plan"]),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", ["info", "dm"]),
    ],
)
def test_a_torch_that_cannot_be_imported_is_told(tmp_path: Path, fault: str, words: list[str]) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(fault)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    found = subprocess.run(
        [sys.executable, "-m", "ddkit", *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "torch cannot be imported" in in_one_paragraph(Result(found.returncode, found.stdout, found.stderr))
