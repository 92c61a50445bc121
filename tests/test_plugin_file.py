"""`--plugin FILE`: the components of one Python file, by name, in one command and in the processes that it starts."""

from __future__ import annotations

import doctest
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddkit import pluginfile, plugins
from tests.conftest import SMALL_FLAGS

LOSS = '''"""Mine."""

from typing import Annotated

import ddkit


class ClassSpread(ddkit.Loss):
    """Spread of the pixels."""

    class Options(ddkit.Options):
        power: Annotated[float, ddkit.Option("exponent", ge=1)] = 2.0

    def __call__(self, step):
        return step.images.abs().pow(self.options.power).mean()


class _Hidden(ddkit.Loss):
    """Not for users."""
'''
MODEL = '''"""A network."""

import ddkit
from torch import nn


class TinyNet(ddkit.Model):
    """A linear classifier."""

    def __call__(self, channels, size, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))
'''


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins and ends without plugin files."""
    monkeypatch.setenv(pluginfile.VARIABLE, "")
    plugins.plugins.cache_clear()
    yield
    plugins.plugins.cache_clear()


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_class_is_called_by_its_name_with_hyphens() -> None:
    assert doctest.testmod(pluginfile).attempted > 0
    assert doctest.testmod(pluginfile).failed == 0


def test_a_run_uses_the_loss_of_a_file_and_its_manifest_tells_path_and_hash(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    result = cli(
        "distill", "--plugin", file, "--losses", "image-norm,class-spread:0.5", "--set", "losses.class-spread.power=3",
        "--evaluate", "none", "--steps", 2, "--out", "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    manifest = json.loads(Path("run/manifest.json").read_text())
    (entry,) = [each for each in manifest["plugins"] if each["name"] == "class-spread"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert entry == {
        "kind": "loss", "name": "class-spread", "distribution": "mine.py", "version": digest[:12], "file": str(file), "sha256": digest,
    }  # fmt: skip
    assert all("file" not in each for each in manifest["plugins"] if each["name"] != "class-spread")
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert line["losses"]["class-spread"]["weighted"] == pytest.approx(0.5 * line["losses"]["class-spread"]["raw"])


def test_without_the_flag_the_loss_is_not_there(cli: Callable[..., Any]) -> None:
    result = cli("distill", "--losses", "class-spread", "--out", "run")
    assert result.code == 3
    assert "class-spread" in result.err


def test_list_and_info_show_what_a_file_holds(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    found = json.loads(cli("list", "--plugin", file, "--json").out)["components"]
    (row,) = [each for each in found if each["distribution"] == "mine.py"]
    assert (row["kind"], row["name"], row["status"], row["summary"]) == ("loss", "class-spread", "ok", "Spread of the pixels.")
    assert "exponent" in cli("info", "--plugin", file, "class-spread").out


def test_a_run_resumes_with_the_file_and_names_the_missing_loss_without_it(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    made = cli("distill", "--plugin", file, "--losses", "class-spread", "--evaluate", "none", "--steps", 2, "--out", "run")
    assert made.code == 0, made.err
    monkeypatch.setenv(pluginfile.VARIABLE, "")
    plugins.plugins.cache_clear()
    without = cli("distill", "--resume", "--out", "run", "--steps", 4)
    assert without.code == 3
    assert "class-spread" in without.err
    again = cli("distill", "--resume", "--plugin", file, "--out", "run", "--steps", 4)
    assert again.code == 0, again.err


def test_processes_of_a_run_know_the_file_too(tmp_path: Path) -> None:
    """Evaluation trains networks in processes of its own; the model is that of the file."""
    file = written(tmp_path, "net.py", MODEL)
    width = SMALL_FLAGS.index("evaluators.accuracy.model_options.width=8") - 1
    flags = SMALL_FLAGS[:width] + SMALL_FLAGS[width + 2 :]
    command = [
        sys.executable, "-m", "ddkit", "distill", "--plugin", str(file), "--losses", "image-norm", "--out", str(tmp_path / "run"), *flags,
        "--set", "evaluators.accuracy.workers=2", "--set", "evaluators.accuracy.model=tiny-net",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained here instead" not in done.stderr
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluations"]
    assert [row["model"] for row in rows] == ["tiny-net"]
    assert rows[0]["details"]["workers"] == 2


def test_an_edited_file_is_read_anew_and_its_hash_is_that_of_the_code_that_runs(tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    plugins.add_plugin_file(str(file))
    before = plugins.load("loss", "class-spread")
    plugins.add_plugin_file(file)
    assert plugins.load("loss", "class-spread") is before, "given twice"
    written(tmp_path, "mine.py", LOSS.replace("Spread of the pixels.", "Another one."))
    plugins.add_plugin_file(tmp_path / "." / "mine.py")
    after = plugins.load("loss", "class-spread")
    assert (before.__doc__, after.__doc__) == ("Spread of the pixels.", "Another one.")
    assert plugins.find("loss", "class-spread").sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(pluginfile.paths()) == 1


def test_a_path_may_hold_any_character(cli: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "a:b; c, d"
    folder.mkdir()
    (tmp_path / "link.py").symlink_to(written(folder, "mine.py", LOSS))
    for file in (folder / "mine.py", tmp_path / "link.py"):
        assert cli("info", "--plugin", file, "class-spread").code == 0
    assert len(pluginfile.paths()) == 1


def test_a_file_that_is_gone_is_a_warning_for_those_who_do_not_need_it(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(pluginfile.VARIABLE, json.dumps([str(tmp_path / "gone.py")]))
    plugins.plugins.cache_clear()
    assert cli("list").code == 0
    assert "gone.py could not be read" in caplog.text
    monkeypatch.setenv(pluginfile.VARIABLE, "/no/json.py")
    plugins.plugins.cache_clear()
    result = cli("list")
    assert (result.code, result.out) == (2, "")
    assert "is no JSON list" in " ".join(result.err.split())


def test_what_a_file_prints_is_no_data_of_the_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path, "loud.py", "print('hello')\n" + LOSS)
    result = cli("list", "--plugin", file, "--json")
    assert json.loads(result.out)["schema"] == 1


BAD = {
    "missing": ("nowhere.py", None, 2, "no such Python file"),
    "not Python": ("notes.txt", "hello", 2, "no such Python file"),
    "nothing in it": ("empty.py", "x = 1\n", 3, "defines no component"),
    "only a base class": ("base.py", "from ddkit import Loss\n", 3, "defines no component"),
    "a syntax error": ("bad.py", "def f(:\n", 3, "SyntaxError"),
    "an import error": ("bad.py", "import ddkit\nimport no_such_module_at_all\n", 3, "line 2"),
    "an exit": ("bad.py", "raise SystemExit(0)\n", 3, "SystemExit"),
    "a name that is taken": ("bad.py", "import ddkit\n\n\nclass Dm(ddkit.Loss):\n    pass\n", 3, "has already"),
    "the name of a group": ("bad.py", "import ddkit\n\n\nclass Dkkt(ddkit.Loss):\n    pass\n", 3, "has already"),
    "one name twice": ("bad.py", LOSS + "\n\nclass Class_Spread(ddkit.Loss):\n    pass\n", 3, "another of its classes has already"),
    "an option of ddkit's name": ("bad.py", LOSS.replace("power:", "weight:").replace("ClassSpread", "Odd"), 3, "has an option 'weight'"),
    "another API": ("bad.py", "import ddkit\n\n\nclass Odd(ddkit.Loss):\n    api = 99\n", 3, "plugin API 99"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_no_use_is_told_in_one_paragraph(cli: Callable[..., Any], tmp_path: Path, case: str) -> None:
    name, text, code, message = BAD[case]
    file = tmp_path / name
    if text is not None:
        written(tmp_path, name, text)
    result = cli(
        "distill", "--plugin", file, "--losses", "odd" if case in ("another API", "an option of ddkit's name") else "dm", "--out", "run"
    )
    assert result.code == code, result.err
    assert message in " ".join(result.err.split())
    assert name in result.err
    assert "Traceback" not in result.err
    assert not Path("run").exists()


def test_a_file_that_failed_leaves_other_commands_alone(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert cli("list", "--plugin", written(tmp_path, "bad.py", "raise ValueError\n")).code == 3
    assert not pluginfile.paths()
    assert cli("list").code == 0
