"""On a terminal and in a notebook: completion of names, the progress bar, the picture of a run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import ddkit
from ddkit.cli import cli
from ddkit.progress import in_notebook
from tests.conftest import SMALL


def completed(*words: str) -> list[str]:
    """Returns what a shell is offered for the last of the words after `ddkit`."""
    from click.shell_completion import ShellComplete

    *arguments, incomplete = words
    return [item.value for item in ShellComplete(cli, {}, "ddkit", "_DDKIT_COMPLETE").get_completions(list(arguments), incomplete)]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("distill", "--recipe", "practical"), {"practical", "practical-plus"}),
        (("distill", "--losses", "dm,dkkt-"), {"dm,dkkt-primal", "dm,dkkt-stationarity"}),
        (("distill", "--init", "r"), {"real"}),
        (("distill", "--augment", "ds"), {"dsa", "dsv"}),
        (("distill", "--dataset", "dig"), {"digits"}),
        (("evaluate", "run", "--evaluate", "accuracy,sp"), {"accuracy,spectrum"}),
        (("train", "--model", "conv"), {"convnet"}),
        (("info", "total"), {"total-variation"}),
        (("distill", "--losses", "nothing-like-it"), set()),
    ],
)
def test_a_shell_completes_names_of_components_and_recipes(words: tuple[str, ...], offered: set[str]) -> None:
    assert set(completed(*words)) == offered


def test_recipes_in_files_are_offered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "practise.toml").write_text("[losses.dm]\n")
    (tmp_path / "practise.txt").write_text("no recipe\n")
    assert set(completed("distill", "--recipe", "pract")) == {"practical", "practical-plus", "practise.toml"}


def test_the_command_itself_completes_in_bash_without_importing_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "_DDKIT_COMPLETE": "bash_complete", "COMP_WORDS": "ddkit distill --losses image", "COMP_CWORD": "3"}
    code = "import sys; sys.argv = ['ddkit']\nimport ddkit.cli\ntry:\n ddkit.cli.main()\nfinally:\n print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.split() == ["plain,image-norm", "False"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_loss_terms_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    sets = SMALL | {"steps": 30, "engine.log_every": 1}
    ddkit.distill(losses="dm", pipc=2, sets=sets, out=tmp_path / "run", device="cpu", observers=[ddkit.ProgressBar()])
    assert "distilling: " in shown.getvalue()
    assert "evaluation: " in shown.getvalue()


def test_the_terms_of_a_step_stand_behind_the_bar() -> None:
    bar = ddkit.ProgressBar()
    bar.step_finished(0, 10, {"losses": {"dm": {"raw": 1.23456}}})
    assert bar._bar.postfix == "dm=1.235"
    assert bar._bar.total == 10
    bar.close()


def test_in_a_notebook_the_bar_is_a_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not in_notebook()
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    made: list[dict[str, Any]] = []
    auto = ModuleType("tqdm.auto")
    auto.tqdm = lambda **given: made.append(given) or SimpleNamespace(n=0, update=lambda count: None, close=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", auto)
    ddkit.ProgressBar().stage_progress("teacher", 1, 4)
    assert made == [{"total": 4, "desc": "teacher", "leave": False}]


def test_a_run_shows_its_picture_in_a_notebook(tmp_path: Path) -> None:
    run = ddkit.distill(losses="dm", pipc=2, sets=SMALL, evaluators="none", out=tmp_path / "run", device="cpu")
    assert run._repr_png_() == (tmp_path / "run" / "preview.png").read_bytes()
    (tmp_path / "run" / "preview.png").unlink()
    assert run._repr_png_() is None
