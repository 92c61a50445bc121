"""Runs beside each other: what `ddkit compare` and `ddkit list runs` show, what they refuse, and that the commands printed work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ddkit
from ddkit.run import comparison
from tests.conftest import SMALL, Result, said, write_image_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of two finished runs: `dm` with 1 image per class, and `m3d`, a grid of twice the budget."""
    folder = tmp_path_factory.mktemp("runs")
    ddkit.distill(losses="dm", pipc=2, sets=SMALL, out=folder / "dm", device="cpu")
    more = SMALL | {"parametrization.use": "grid", "evaluators.accuracy.model": "mlp,convnet"}
    ddkit.distill("m3d", ipc=2, pipc=3, protocol="short", sets=more, out=folder / "m3d", device="cpu")
    return folder


@pytest.fixture
def copied(runs: Path, cli: Callable[..., Result]) -> Callable[..., Result]:
    """Returns the command line in a folder with copies of the runs."""
    shutil.copytree(runs, ".", dirs_exist_ok=True)
    return cli


def test_runs_stand_beside_each_other_with_what_differs(copied: Callable[..., Result]) -> None:
    told = copied("compare", "dm", "m3d", "--json")
    assert (told.code, told.err) == (0, "")
    found = json.loads(told.out)
    assert [[one[key] for key in ("name", "method", "ipc", "pipc", "labels", "stored_numbers")] for one in found["sets"]] == [
        ["dm", "DM", 1, 2, "hard", 64.0], ["m3d", "m3d", 2, 3, "hard", 128.0],
    ]  # fmt: skip
    assert [one["seconds"] for one in found["sets"]] == [
        json.loads(Path(run, "manifest.json").read_text())["seconds"] for run in ("dm", "m3d")
    ]
    (evaluation,) = found["evaluations"]  # mlp is of one run alone
    assert (evaluation["model"], evaluation["protocol"]) == ("convnet", "short, 2 epochs, width 8")
    for run, row in zip(("dm", "m3d"), evaluation["rows"], strict=True):
        own = next(each for each in json.loads(Path(run, "evaluation.json").read_text())["evaluations"] if each["model"] == "convnet")
        own["random_real"] = own["details"].get("random_real", "")
        assert row == {"name": run} | {key: own[key] for key in row if key != "name"}
    assert [note.partition(":")[0] for note in found["notes"]] == ["Budgets differ", "Accessible real images differ", "m3d"]
    shown = copied("compare", "dm", "m3d").out
    assert shown.startswith("convnet, protocol short, 2 epochs, width 8, hard labels, tested on the test split\n")
    assert all(note in shown for note in found["notes"])


def test_a_folder_stands_for_its_finished_runs_and_equal_budgets_need_no_word(copied: Callable[..., Result]) -> None:
    shutil.copytree("dm", "set/again")
    shutil.copytree("dm", "set/one")
    for name in ("killed", "damaged", "edited", "without-its-set"):
        shutil.copytree("dm", f"set/{name}")
    Path("set/killed/manifest.json").unlink()
    Path("set/damaged/manifest.json").write_text("{")
    Path("set/edited/evaluation.json").write_text('{"evaluations": [{}]}')
    Path("set/without-its-set/synthetic.safetensors").unlink()
    Path("set/link").symlink_to("one")
    ddkit.distill(losses="dm", pipc=2, sets=SMALL, evaluators="none", out="set/untested", device="cpu")
    found = json.loads(copied("compare", "set", "--json").out)
    assert [one["name"] for one in found["sets"]] == ["set/again", "set/one"]
    left_out = [f"set/{name}" for name in ("damaged", "edited", "killed", "without-its-set", "untested")]
    assert [note.partition(" is left out")[0] for note in found["notes"]] == left_out
    shutil.rmtree("set/untested")
    Path("set/again").rename("again")
    alone = copied("compare", "set")
    assert (alone.code, alone.out) == (2, "")
    assert "no other run is named" in said(alone.err)
    assert "manifest.json cannot be read" in said(alone.err)
    for name in ("one", "link"):
        Path("set", name).rename(name)
    refused = copied("compare", "dm", "set")
    assert (refused.code, refused.out) == (5, "")
    assert "contains no finished run" in said(refused.err)
    assert "manifest.json cannot be read" in said(refused.err)


def test_the_images_are_one_picture_with_the_titles_that_are_given(copied: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = comparison.rows_of_images
    monkeypatch.setattr(comparison, "rows_of_images", lambda *words: drawn.extend(name for name, _ in words[2]) or draw(*words))
    named = copied("compare", "dm", "m3d", "--titles", "Ours (a), $M^3$", "--out", "deep/sets.png")
    assert (named.code, drawn) == (0, ["Ours (a)", "$M^3$"])
    assert "Ours (a)  DM" in named.out
    assert Path("deep/sets.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_figures_are_written_in_both_formats(copied: Callable[..., Result]) -> None:
    assert copied("compare", "dm", "m3d", "--figures", "figures").code == 0
    drawn = {file.name: file.read_bytes()[:4] for file in Path("figures").iterdir()}
    kinds = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert drawn == {
        f"{name}{ending}": begin for name in ("sets", "accuracy-convnet", "ipc-convnet", "pipc-convnet") for ending, begin in kinds.items()
    }


def test_sets_that_are_alike_are_one_point_over_ipc_as_if_their_networks_were_of_one(copied: Callable[..., Result]) -> None:
    values = [[0.5, 0.6, 0.7], [0.2, 0.3]]
    parts = [(len(each), statistics.fmean(each), statistics.stdev(each)) for each in values]
    assert comparison._pooled(parts) == (pytest.approx(46.0), pytest.approx(100 * statistics.stdev([*values[0], *values[1]])))
    assert comparison._pooled([(1, 0.5, None)]) == (50.0, None)
    shutil.copytree("dm", "again")
    found = ddkit.compare(["dm", "again", "m3d"])
    over_ipc, over_pipc = comparison._over(found.sets, found.evaluations)
    assert (over_ipc.ticks, over_pipc.ticks) == (["1", "2"], ["2", "3"])
    assert over_ipc.legend == ["DM, pipc 2", "m3d, pipc 3", "random real, pipc 2", "random real, pipc 3"]
    named = ddkit.compare(["dm", "again", "m3d"], titles=["ours", "ours", "theirs"])
    assert next(comparison._over(named.sets, named.evaluations)).legend[:2] == ["ours, pipc 2", "theirs, pipc 3"]
    alike = ddkit.compare(["dm", "again"])
    assert list(comparison._over(alike.sets, alike.evaluations)) == []


def changed(run: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the rows of a run, and its manifest as ddkit would."""
    from ddkit.files import json_bytes
    from ddkit.run.directory import RunDirectory

    rows = json.loads(Path(run, "evaluation.json").read_text())["evaluations"]
    for row in rows:
        change(row)
    RunDirectory(Path(run)).rewrite("evaluation.json", json_bytes({"schema": 1, "evaluations": rows}))


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "other epochs": lambda row: row["details"].update(epochs=3, variant="3 epochs"),
    "another split": lambda row: row.update(split="held-out"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_without_a_common_evaluation_the_command_that_adds_one_works_as_printed(
    copied: Callable[..., Result], change: Callable[[dict[str, Any]], None]
) -> None:
    changed("m3d", change)
    refused = copied("compare", "dm", "m3d", "--out", "x.png")
    assert (refused.code, refused.out, Path("x.png").exists()) == (5, "", False)
    assert "no evaluation in common" in said(refused.err)
    command = said(refused.err).partition("This command adds one: ddkit ")[2]
    assert copied(*shlex.split(command)).code == 0
    assert copied("compare", "dm", "m3d").code == 0


def test_a_file_has_no_figures_and_the_command_that_prints_some_is_said(copied: Callable[..., Result]) -> None:
    shutil.copyfile("m3d/synthetic.safetensors", "alone.safetensors")
    found = json.loads(copied("compare", "dm", "alone.safetensors", "--json").out)
    assert found["evaluations"][0]["rows"][1]["accuracy_mean"] is None
    (command,) = [match[1] for note in found["notes"] if (match := re.search(r"`ddkit (evaluate alone.*)`", note))]
    assert copied(*shlex.split(command), "--repeats", 1, "--set", "evaluators.accuracy.epochs=1").code == 0


def test_sets_of_other_data_are_refused(copied: Callable[..., Result], tmp_path: Path) -> None:
    small = {key: value for key, value in SMALL.items() if key != "steps"}
    for name in ("cats", "dogs"):
        folder = write_image_folder(tmp_path / name)
        ddkit.distill(losses="dm", pipc=2, steps=1, dataset=f"imagefolder:{folder}", evaluators="none", sets=small, out=name, device="cpu")
    for one, other, phrase in (
        ("dm", "cats", "their images differ"),
        ("dogs", "cats", "their data differ"),
        ("cats/synthetic.safetensors", "dm", "their images differ"),
    ):
        refused = copied("compare", one, other)
        assert (refused.code, refused.out) == (5, "")
        assert phrase in said(refused.err)


WRONG = {
    "an empty name": (("dm", ""), 2, "the path is empty"),
    "twice": (("dm", "./dm"), 2, "named twice"),
    "an empty folder": (("dm", "empty"), 5, "contains no finished run"),
    "no set": (("dm", "text.safetensors"), 5, "text.safetensors"),
    "not finished": (("dm", "killed"), 5, "--resume"),
    "a file that is there": (("dm", "m3d", "--out", "there.png"), 5, "exists already"),
    "too few titles, that of a folder": (("dm", "m3d", "--titles", "dm"), 2, "in this order: dm, m3d"),
    "no titles": (("dm", "m3d", "--titles", "nothing.txt"), 2, "each of the 2 sets a name"),
    "an empty title": (("dm", "m3d", "--titles", "Ours,"), 2, "each of the 2 sets a name"),
    "the baseline's title": (("dm", "m3d", "--titles", "Ours,random real"), 2, "Choose another name"),
    "many titles": (("dm", "m3d", "--titles", ",".join(["a name"] * 60)), 2, "each of the 2 sets a name"),
    "figures that are there": (("dm", "m3d", "--figures", "m3d"), 5, "exists already"),
}


@pytest.mark.parametrize(("words", "code", "phrase"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_said_and_nothing_is_written(
    copied: Callable[..., Result], words: tuple[str, ...], code: int, phrase: str
) -> None:
    Path("empty").mkdir()
    Path("text.safetensors").write_text("no set")
    Path("nothing.txt").touch()
    Path("there.png").write_text("mine")
    shutil.copytree("dm", "killed")
    Path("killed/manifest.json").unlink()
    refused = copied("compare", *words)
    assert (refused.code, refused.out) == (code, "")
    assert phrase in said(refused.err)
    assert Path("there.png").read_text() == "mine"


def test_the_runs_of_a_folder_are_listed_whatever_else_is_in_it(copied: Callable[..., Result]) -> None:
    for name in ("dm-10", "dm-9", "damaged", "edited", "empty-of-its-set"):
        shutil.copytree("dm", f"set/{name}")
    shutil.copytree("m3d", "set/killed")
    Path("set/killed/manifest.json").unlink()
    Path("set/damaged/manifest.json").write_text("{")
    Path("set/edited/evaluation.json").write_text('{"evaluations": [{}]}')
    Path("set/empty-of-its-set/synthetic.safetensors").unlink()
    Path("set/linked").symlink_to("dm-9")
    Path("set/other").mkdir()
    Path("set/other/manifest.json").write_text("{}")  # of a web page
    Path("set/a file").write_text("text")
    found = copied("list", "runs", "set", "--json")
    assert (found.code, found.err) == (0, "")
    rows = {Path(row["path"]).name: row for row in json.loads(found.out)["runs"]}
    damaged = dict.fromkeys(("damaged", "edited", "empty-of-its-set"), "damaged")
    assert {name: row["state"] for name, row in rows.items()} == {
        **damaged,
        "dm-9": "finished",
        "dm-10": "finished",
        "killed": "not finished",
    }
    assert list(rows)[1:3] == ["dm-9", "dm-10"]
    own = json.loads(Path("dm/evaluation.json").read_text())["evaluations"][0]
    assert rows["dm-9"] | {key: own[key] for key in ("model", "accuracy_mean", "random_real_std")} == rows["dm-9"]
    assert {rows["killed"][key] for key in ("steps", "all_steps")} == {2}
    assert [rows["killed"][key] for key in ("method", "ipc", "pipc", "dataset")] == ["m3d", 2, 3, "digits"]
    assert "manifest.json cannot be read" in rows["damaged"]["problem"]
    lines = copied("list", "runs", "set").out.splitlines()
    assert len(lines) == 2 + len(rows)
    assert copied("list", "runs", "dm").out.splitlines()[-1].split()[-1] == "finished"
    for words, code, phrase in (
        (("runs", "nowhere"), 5, "The folder nowhere does not exist"),
        (("runs",), 5, "The folder runs does not exist"),
        (("runs", "set/a file"), 5, "is a file"),
        (("runs", "set/other"), 5, "contains no run"),
        (("losses", "set"), 2, "ddkit list runs set"),
        (("runs", "set", "--check"), 2, "--check has no effect"),
    ):
        refused = copied("list", *words)
        assert (refused.code, refused.out) == (code, "")
        assert phrase in said(refused.err)


def test_networks_of_other_options_have_rows_of_their_own_and_are_not_compared(copied: Callable[..., Result]) -> None:
    def judged(option: str) -> list[str]:
        """Returns what is compared of dm, evaluated with an option of its networks, and m3d, whose mlp has width 8."""
        flags = ("--model", "mlp", "--set", f"evaluators.accuracy.model_options.{option}", "--set", "evaluators.accuracy.epochs=2")
        assert copied("evaluate", "dm", *flags).code == 0
        return [each["model"] for each in json.loads(copied("compare", "dm", "m3d", "--json").out)["evaluations"]]

    assert [judged(option) for option in ("width=16", "mlp.width=4", "width=8")] == [["convnet"], ["convnet"], ["convnet", "mlp"]]
    rows = [row["details"]["variant"] for row in json.loads(Path("dm/evaluation.json").read_text())["evaluations"] if row["model"] == "mlp"]
    assert rows == ["2 epochs, width 16", "2 epochs, width 4", "2 epochs, width 8"]
