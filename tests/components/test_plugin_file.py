"""`--plugin FILE`: the components of one Python file, by name, in one command and in the processes that it starts."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkit.components import plugin_file, registry
from ddkit.errors import PluginError
from ddkit.run import children
from tests.conftest import SMALL_FLAGS, Result, forget_plugin_files

LOSS = '''"""Mine."""

import ddkit


class ClassSpread(ddkit.Loss):
    """Spread of the pixels."""

    power: float = ddkit.option(2.0, "exponent", ge=1)

    def __call__(self, step):
        return step.images.abs().pow(self.power).mean()


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


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


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


def test_list_and_info_show_what_a_file_holds(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    found = json.loads(cli("list", "--plugin", file, "--json").out)["components"]
    (row,) = [each for each in found if each["distribution"] == "mine.py"]
    assert (row["kind"], row["name"], row["status"], row["summary"]) == ("loss", "class-spread", "ok", "Spread of the pixels.")
    assert "exponent" in cli("info", "--plugin", file, "class-spread").out


def test_a_wrong_option_names_the_command_that_shows_the_options_of_the_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    refused = cli("distill", "--plugin", file, "--losses", "class-spread", "--set", "losses.class-spread.powr=3", "--plan")
    told = " ".join(refused.err.split())
    assert (refused.code, refused.out) == (4, "")
    assert "Did you mean 'power'?" in told
    words = told.partition("`ddkit ")[2].partition("`")[0].split()
    assert "exponent" in cli(*words).out


def test_a_run_resumes_with_the_file_and_names_the_missing_loss_without_it(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    made = cli("distill", "--plugin", file, "--losses", "class-spread", "--evaluate", "none", "--steps", 2, "--out", "run")
    assert made.code == 0, made.err
    forget_plugin_files()
    without = cli("distill", "--resume", "--out", "run", "--steps", 4)
    assert without.code == 3
    assert "class-spread" in without.err
    assert f"The run began with --plugin {shlex.quote(str(file))}: add it" in " ".join(without.err.split())
    again = cli("distill", "--resume", "--plugin", file, "--out", "run", "--steps", 4)
    assert again.code == 0, again.err


@pytest.mark.usefixtures("forked_children")
def test_processes_of_a_run_know_the_file_too(cli: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Evaluation trains networks in processes of its own; the model is that of the file."""
    file = written(tmp_path, "net.py", MODEL)
    width = SMALL_FLAGS.index("evaluators.accuracy.model_options.width=8") - 1
    flags = SMALL_FLAGS[:width] + SMALL_FLAGS[width + 2 :]
    done = cli(
        "distill", "--plugin", file, "--losses", "image-norm", "--out", tmp_path / "run", *flags,
        "--set", "evaluators.accuracy.workers=2", "--set", "evaluators.accuracy.model=tiny-net",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "trained in this process instead" not in caplog.text
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluations"]
    assert [row["model"] for row in rows] == ["tiny-net"]
    assert rows[0]["details"]["workers"] == 2


def test_an_edited_file_is_read_anew_and_its_hash_is_that_of_the_code_that_runs(tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    registry.add_plugin_file(str(file))
    before = registry.load("loss", "class-spread")
    registry.add_plugin_file(file)
    assert registry.load("loss", "class-spread") is before, "given twice"
    written(tmp_path, "mine.py", LOSS.replace("Spread of the pixels.", "Another one."))
    registry.add_plugin_file(tmp_path / "." / "mine.py")
    after = registry.load("loss", "class-spread")
    assert (before.__doc__, after.__doc__) == ("Spread of the pixels.", "Another one.")
    assert registry.find("loss", "class-spread").sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert plugin_file.known() == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


def test_a_path_may_hold_any_character(cli: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "a:b; c, d"
    folder.mkdir()
    (tmp_path / "link.py").symlink_to(written(folder, "mine.py", LOSS))
    for file in (folder / "mine.py", tmp_path / "link.py"):
        assert cli("info", "--plugin", file, "class-spread").code == 0
    assert len(plugin_file.known()) == 1


def test_a_file_that_is_gone_is_a_warning_for_a_process_that_does_not_need_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin_file.remember({str(tmp_path / "gone.py"): "0" * 64})  # as in a process that another one started
    registry.plugins.cache_clear()
    assert registry.find("loss", "dm").first_party
    assert "gone.py could not be read" in caplog.text


BAD = {
    "missing": ("nowhere.py", None, 2, "no such Python file"),
    "not Python": ("notes.txt", "hello", 2, "no such Python file"),
    "nothing in it": ("empty.py", "x = 1\n", 3, "defines no component"),
    "only a base class": ("base.py", "from ddkit import Loss\n", 3, "defines no component"),
    "a syntax error": ("bad.py", "def f(:\n", 3, "SyntaxError"),
    "an import error": ("bad.py", "import ddkit\nimport no_such_module_at_all\n", 3, "line 2"),
    "an exit": ("bad.py", "raise SystemExit(0)\n", 3, "SystemExit"),
    "a name that is taken": ("bad.py", "import ddkit\n\n\nclass Dm(ddkit.Loss):\n    pass\n", 3, "has that name already"),
    "the name of a group": ("bad.py", "import ddkit\n\n\nclass Dkkt(ddkit.Loss):\n    pass\n", 3, "has that name already"),
    "one name twice": ("bad.py", LOSS + "\n\nclass Class_Spread(ddkit.Loss):\n    pass\n", 3, "another of its classes has that name "
    "already"),
    "a default out of bounds": ("bad.py", LOSS.replace("2.0", "0.5").replace("ClassSpread", "Odd"), 3, "Options(power=0.5): Expected"),
    "an option of ddkit's name": ("bad.py", LOSS.replace("power:", "weight:").replace("ClassSpread", "Odd"), 3, "has an option 'weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_no_use_is_told_in_one_paragraph(cli: Callable[..., Any], tmp_path: Path, case: str) -> None:
    name, text, code, message = BAD[case]
    file = tmp_path / name
    if text is not None:
        written(tmp_path, name, text)
    result = cli("distill", "--plugin", file, "--losses", "odd" if "class Odd" in (text or "") else "dm", "--out", "run")
    assert result.code == code, result.err
    assert message in " ".join(result.err.split())
    assert name in result.err
    assert ".." not in result.err.replace("...", "")
    assert "Traceback" not in result.err
    assert not Path("run").exists()
    assert plugin_file.known() == {} or "odd" in message or "option" in message.lower(), "other commands work"


# A file that is edited in mid-run

OTHER = LOSS.replace(".mean()", ".sum()")


def test_what_was_read_first_counts_whatever_the_file_holds_by_then(tmp_path: Path) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    registry.add_plugin_file(file)
    before = registry.load("loss", "class-spread")
    written(tmp_path, "mine.py", OTHER)
    registry.add_plugin_file(written(tmp_path, "net.py", MODEL))
    assert registry.load("loss", "class-spread") is before
    assert registry.find("loss", "class-spread").sha256 == hashlib.sha256(LOSS.encode()).hexdigest()


def test_a_file_that_is_refused_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    registry.add_plugin_file(written(tmp_path, "mine.py", LOSS))
    before = plugin_file.known()
    with pytest.raises(PluginError, match="has that name already"):
        registry.add_plugin_file(written(tmp_path, "again.py", LOSS))
    assert plugin_file.known() == before
    assert registry.find("loss", "class-spread").distribution == "mine.py"


CHILD = "import sys\nfrom ddkit import cli\nfrom ddkit.run import children\nchildren.take_over(sys.argv.pop(1))\ncli.main()"


@pytest.mark.parametrize("words", [["info", "loss", "class-spread"], ["list", "losses", "--check"]], ids=" ".join)
def test_a_child_process_that_finds_another_file_fails_and_runs_none_of_it(tmp_path: Path, forks: Any, words: list[str]) -> None:
    file = written(tmp_path, "mine.py", LOSS)
    registry.add_plugin_file(file)

    def child() -> Any:
        return forks.run([sys.executable, "-c", CHILD, children.handed_over(), *words], capture_output=True, text=True)

    same = child()
    assert (same.returncode, "class-spread" in same.stdout) == (0, True), same.stderr
    written(tmp_path, "mine.py", "raise SystemExit('it ran')\n" + LOSS)
    done = child()
    assert (done.returncode, done.stdout) == (3, "")
    said = " ".join(done.stderr.split())
    assert f"The plugin file {file} has changed" in said
    assert all(hashlib.sha256(text).hexdigest()[:12] in said for text in (LOSS.encode(), file.read_bytes()))
    assert "it ran" not in said


@pytest.mark.usefixtures("forked_children")
def test_a_file_that_changes_in_mid_run_changes_no_result_of_the_run(
    cli: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The processes of the evaluation refuse the new file, so this process, which has the old one, trains in their place."""
    net = written(tmp_path, "net.py", MODEL)
    editor = MODEL + EDITOR.format(file=str(net))
    flags = [
        "--losses", "image-norm", "--steps", 2, "--set", "evaluators.accuracy.model=tiny-net", "--set", "evaluators.accuracy.epochs=2",
        "--set", "evaluators.accuracy.repeats=2", "--set", "evaluators.accuracy.workers=2", "--json",
    ]  # fmt: skip
    rows = json.loads(cli("distill", "--plugin", net, *flags, "--out", "undisturbed").out)["evaluations"]
    assert "has changed" not in caplog.text
    net.write_text(editor)
    result = cli("distill", "--plugin", net, *flags, "--init", "editing", "--out", "run")
    assert result.code == 0, result.err
    assert f"ended with exit code 3: The plugin file {net} has changed" in caplog.text
    again = json.loads(result.out)["evaluations"]
    assert again[0]["accuracy_mean"] == rows[0]["accuracy_mean"]
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["plugin_files"] == {str(net): hashlib.sha256(editor.encode()).hexdigest()}


# An initializer of the same file, which edits it when the run has begun.
EDITOR = '''
import torch
from pathlib import Path


class Editing(ddkit.Initializer):
    """Real images; writes nonsense to its own file."""

    requires = ddkit.Requires(real=True)

    def __call__(self, start):
        Path({file!r}).write_text("raise SystemExit(1)")
        return ddkit.create("initializer", "real")(start)
'''


@pytest.fixture
def begun(cli: Callable[..., Any], tmp_path: Path) -> Path:
    """Returns the plugin file of a run in ./run, of two steps, whose process is gone."""
    file = written(tmp_path, "mine.py", LOSS)
    made = cli("distill", "--plugin", file, "--losses", "class-spread", "--evaluate", "none", "--steps", 2, "--out", "run")
    assert made.code == 0, made.err
    Path("run/manifest.json").unlink()  # as where it was killed
    forget_plugin_files()
    return file


def test_resume_refuses_a_file_that_changed_and_names_both(cli: Callable[..., Any], tmp_path: Path, begun: Path) -> None:
    written(tmp_path, "mine.py", OTHER)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("run").rglob("*"))
    result = cli("distill", "--resume", "--plugin", begun, "--out", "run", "--steps", 4)
    assert (result.code, result.out) == (5, "")
    said = " ".join(result.err.split())
    assert f"run was made with the plugin file {begun}, which has changed since" in said
    assert all(hashlib.sha256(text.encode()).hexdigest()[:12] in said for text in (LOSS, OTHER))
    assert sorted((path, path.stat().st_mtime_ns) for path in Path("run").rglob("*")) == before
    written(tmp_path, "mine.py", LOSS)
    forget_plugin_files()
    again = cli("distill", "--resume", "--plugin", begun, "--out", "run", "--steps", 4)
    assert again.code == 0, again.err


def test_resume_takes_the_file_from_another_place_but_not_another_file_there(cli: Callable[..., Any], tmp_path: Path, begun: Path) -> None:
    begun.unlink()
    (tmp_path / "new").mkdir()
    other = written(tmp_path / "new", "mine.py", OTHER)
    result = cli("distill", "--resume", "--plugin", other, "--out", "run", "--steps", 4)
    assert result.code == 5
    assert f"{begun}, which is not {other}" in " ".join(result.err.split())
    forget_plugin_files()
    written(tmp_path / "new", "mine.py", LOSS)
    extra = written(tmp_path, "net.py", MODEL)
    again = cli("distill", "--resume", "--plugin", extra, "--plugin", other, "--out", "run", "--steps", 4)
    assert again.code == 0, again.err


OLD = '''"""A loss of 0.1."""

from typing import Annotated, Literal

import ddkit


class Old(ddkit.Loss):
    """Old."""

    api = 1

    class Options(ddkit.Options):
        power: Annotated[float, ddkit.Option("exponent", ge=1)] = 1.0
        rows: Annotated[int, ddkit.Option("rows at once", ge=1)] | None = None
        norm: Literal["a", "b"] = "a"

    requires = ddkit.Requires(embedder=True, separable="total", teacher_gradients=True)

    def __init__(self, options=None, *, name=None):
        super().__init__(options, name=name)

    def __call__(self, step):
        return step.total(ddkit.to_device(step.images, "cpu").pow(self.options.power).sum())
'''


def test_a_class_of_the_first_version_is_refused_with_the_lines_to_change(cli: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text(OLD)
    for words in (["distill", "--losses", "old", "--plan"], ["check", "loss", "old"], ["info", "old"]):
        result = cli(words[0], "--plugin", str(file), *words[1:])
        assert (result.code, result.out) == (3, "")
        told = " ".join(result.err.split())
        for line in (
            "line 11: api = 1 -> no line",
            'power: float = ddkit.option(1.0, "exponent", ge=1)',
            'rows: int | None = ddkit.option(None, "rows at once", ge=1)',
            "norm: Literal['a', 'b'] = ddkit.option(\"a\")",
            "line 18: embedder=True -> network=True",
            'separable="total" -> reduce="global"',
            "teacher_gradients=True -> teacher=True, second_order=True",
            "-> def __init__(self, **options):",
            "super().__init__(options, name=name) -> super().__init__(**options)",
            "step.total -> step.all_reduce",
            "ddkit.to_device -> ddkit.nn.to_device",
            "self.options.power -> self.power",
        ):
            assert line in told
        assert "Traceback" not in told
