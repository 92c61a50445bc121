"""On a terminal and in a notebook: completion of names, lists, the progress bar."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import ddkit
from ddkit.cli import cli
from ddkit.run.progress import in_notebook
from tests.conftest import SMALL, SMALL_FLAGS, Result


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


def test_a_list_fits_the_terminal_and_is_whole_in_a_pipe(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    piped = cli("list", "protocols").out.splitlines()
    assert max(map(len, piped)) > 90
    assert not any("…" in line for line in piped)
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli("list", "protocols").code == 0
    lines = shown.getvalue().splitlines()
    assert len(lines) == len(piped)
    assert max(map(len, lines)) <= 90
    assert all(whole.startswith(line.rstrip("…")) for line, whole in zip(lines[2:], piped[2:], strict=True))


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_list_fits_a_narrow_terminal_without_the_columns_that_do_not(
    width: int, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli("list").code == 0
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["kind", "name", *{40: [], 60: ["status"], 80: ["from", "status", "summary"]}[width]]


def test_help_shows_the_summary_of_every_command_whole() -> None:
    told = " ".join(cli.get_help(click.Context(cli, terminal_width=60)).partition("Commands:")[2].split())
    assert "Write a synthetic set in a format that other programs read, with a card that describes it." in told
    assert "..." not in told


def test_verbose_tells_what_is_done_and_every_logged_step_in_lines(cli: Callable[..., Result], caplog: pytest.LogCaptureFixture) -> None:
    sets = ("--set", "engine.log_every=2", "--set", "steps=5")
    assert cli("distill", "--losses", "dm:0.5,image-norm", "--pipc", 2, *SMALL_FLAGS, *sets, "--out", "run", "--verbose").code == 0
    first, *steps, last = caplog.messages
    assert first == "run: steps 0 to 5, losses dm x 0.5, image-norm x 1, initializer real, network convnet, compiled: no, float32."
    assert [line.partition(":")[0] for line in steps] == ["step 1 of 5", "step 3 of 5", "step 5 of 5"]
    assert re.fullmatch(r"step 1 of 5: total [\d.]+ \(dm [\d.]+, image-norm [\d.]+\), gradient: dm [\d.]+ %, image-norm [\d.]+ %", steps[0])
    assert last == "evaluation: 4 of 4"
    caplog.clear()
    assert cli("evaluate", "run", "--verbose").code == 0
    assert caplog.messages == ["evaluation: 4 of 4"]
    caplog.clear()
    assert cli("train", "--out", "t.safetensors", "--set", "train.epochs=1", "--set", "teacher.width=8", "--verbose").code == 0
    assert caplog.messages == ["teacher: 1 of 1"]


LIBRARY = """
import logging
import threading
from ddkit import errors
from ddkit.run import warnings

log = logging.getLogger("ddkit")
with warnings.recording():
    log.warning("number %d", 1)
    log.warning("number %d", 1)
    log.warning("news", extra=errors.NEWS)
    print(warnings.warnings())
print(warnings.warnings())
kept = []

def apart():
    with warnings.recording():
        log.warning("apart")
        kept.extend(warnings.warnings())

with warnings.recording():
    other = threading.Thread(target=apart)
    other.start()
    other.join()
    print(warnings.warnings(), kept)
"""


def test_what_a_run_warns_of_is_kept_and_still_shown_to_a_program_that_handles_no_log() -> None:
    result = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["['number 1']", "[]", "[] ['apart']"]
    assert result.stderr.splitlines() == ["number 1", "number 1", "news", "apart"]


def test_quiet_leaves_errors_alone_and_a_run_ends_with_a_table(cli: Callable[..., Result], caplog: pytest.LogCaptureFixture) -> None:
    usual = cli("distill", "--losses", "dm", "--pipc", 2, *SMALL_FLAGS, "--out", "run")
    assert (usual.code, "\r" in usual.err, caplog.messages) == (0, False, [])  # stderr is no terminal: no bar
    lines = usual.out.splitlines()
    columns = ["evaluator", "model", "protocol", "labels", "accuracy", "random real", "networks", "stored per class"]
    assert lines[0].split() == " ".join(columns).split()
    assert lines[3] == ""
    assert [line.split()[0] for line in lines[4:]] == ["2", "run", "picture", "report"]
    words = ("distill", "--losses", "dkkt", "--pipc", 2, *SMALL_FLAGS, "--set", "train.epochs=2", "--evaluate", "none")
    quiet = cli(*words, "--seed", 1, "--out", "quiet", "--quiet")
    assert (quiet.code, quiet.err, caplog.messages) == (0, "", [])  # no word of the teacher that is trained
    assert quiet.out.splitlines()[0].startswith("2 steps in ")
    assert cli(*words, "--seed", 2, "--set", "teacher.width=4", "--out", "usual").code == 0
    assert "No teacher was given" in caplog.text
    assert "There is no loss 'd'" in cli("distill", "--losses", "d", "--quiet").err


@pytest.mark.parametrize(("shell", "asked", "begins"), [
    ("bash", {"COMP_WORDS": "ddkit distill --recipe practical-", "COMP_CWORD": "3"}, "plain,practical-plus\n"),
    ("zsh", {"COMP_WORDS": "ddkit distill --recipe practical-", "COMP_CWORD": "3"}, "plain\npractical-plus\nThis project's"),
    ("fish", {"COMP_WORDS": "ddkit distill --recipe practical-", "COMP_CWORD": "practical-"}, "plain,practical-plus\tThis project's"),
])  # fmt: skip
def test_every_shell_gets_names_and_its_script(shell: str, asked: dict[str, str], begins: str, tmp_path: Path) -> None:
    tells = "import atexit, sys; sys.argv = ['ddkit']; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    code = f"{tells}; import ddkit.cli"
    command = [sys.executable, "-c", f"{code}; ddkit.cli.main()"]
    for variables, wanted in (({**asked, "_DDKIT_COMPLETE": f"{shell}_complete"}, begins), ({"_DDKIT_COMPLETE": f"{shell}_source"}, "")):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables}, cwd=tmp_path)
        if wanted or done.returncode == 0:  # the script for bash asks for the bash that is installed
            assert done.stdout.startswith(wanted)
            assert not done.stderr.endswith("True\n"), "completing imports torch"
            assert wanted or "_DDKIT_COMPLETE" in done.stdout


def test_in_a_notebook_the_bar_is_in_the_output_of_the_cell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not in_notebook()
    kernel = type("Shell", (type("ZMQInteractiveShell", (), {}),), {})()  # Colab's is derived from that of IPython
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    bar = ddkit.ProgressBar()
    bar.stage_started("teacher", "Training a teacher", 1, 4)
    bar.close()
    shown = capsys.readouterr()
    assert shown.err == ""  # which a notebook shows on red ground
    assert shown.out.startswith("Training a teacher\n")
    assert "\rteacher:  25%" in shown.out
    assert "tqdm.auto" not in sys.modules  # whose bar needs ipywidgets, and warns if they are missing


def test_a_run_does_its_work_where_all_standard_streams_are_closed(tmp_path: Path) -> None:
    flags = "--losses dm --steps 1 --evaluate none --out run --set network.width=4 --device cpu"
    done = subprocess.run(["/bin/sh", "-c", f"exec {sys.executable} -m ddkit distill {flags} <&- >&- 2>&-"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "run" / "manifest.json").is_file()
