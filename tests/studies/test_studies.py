"""Studies: every set made once and kept, figures beside the published ones, bad studies told before anything runs."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ddkit.cli import cli as command_line
from ddkit.components import registry
from ddkit.errors import DdkitError, InputError, Interrupted, RunFailed
from ddkit.recipes.tables import parse_recipe
from ddkit.run.manifest import write_manifest
from ddkit.studies import grid, runner
from ddkit.studies.crew import Crew, failure_of
from ddkit.studies.sharding import share
from ddkit.studies.study import Cell, chosen_cells, parse_study, published, read_study
from tests.conftest import SMALL as SETTINGS
from tests.conftest import SMALL_FLAGS, Result, said

CLI = Callable[..., Result]
INSTALLED = sorted(p.name for p in registry.plugins() if p.kind == "study")

STUDY = """
summary = "A small study"
source = "this test"
seeds = 2

[systems.dm]
title = "DM"
recipe = "dm"

[systems.shared]
recipe = "dm-star"
pipc = 3

[systems.means]
baseline = "class-mean"

[[cells]]
ipc = 1
pipc = 3
published = { dm = [50.0, 1.0] }

[[cells]]
ipc = 1
pipc = 4
"""
RUN_FLAGS = [part for path, value in SETTINGS.items() if not path.startswith("evaluators") for part in ("--set", f"{path}={value}")]
SMALL = [*RUN_FLAGS, "--dataset", "digits", "--repeats", 2, "--protocol", "short", "--quiet"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the commands of a study in this process, and returns them as they come."""
    seen: list[list[str]] = []

    def command(self: Any, arguments: Sequence[str]) -> str:
        seen.append(list(arguments))
        given = list(arguments)
        if given[0] == "evaluate":
            given += ["--set", "evaluators.accuracy.epochs=2", "--set", "evaluators.accuracy.model_options.width=8"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            command_line.main(given, prog_name="ddkit", standalone_mode=False)
        return printed.getvalue()

    monkeypatch.setattr(Crew, "command", command)
    return seen


def _study(text: str = STUDY) -> Path:
    Path("study.toml").write_text(text)
    return Path("study.toml")


def test_networks_of_a_baseline_are_trained_for_one_cell_and_found_for_the_others(
    cli: CLI, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    table = STUDY.partition("[systems")[0].replace("seeds = 2", "seeds = 1") + '[systems.whole]\nbaseline = "pipc-real"\n'
    text = table + "".join(f"[[cells]]\nipc = {ipc}\npipc = {pipc}\n" for ipc, pipc in ((1, 3), (2, 3), (1, 4)))
    told = cli("reproduce", f"./{_study(text)}", *SMALL)
    assert told.code == 0, told.err
    assert told.out.count("From the cache: ") == 1
    assert "From the cache: 2 networks of whole at ipc 2, pipc 3." in told.out
    figures = json.loads(Path("runs/study/report.json").read_text())["figures"]
    assert [figure["cached"] for figure in figures] == [0, 2, 0]
    assert figures[0]["mean"] == figures[1]["mean"]


def test_every_set_is_made_once_and_its_figure_stands_beside_the_published_one(cli: CLI, commands: list[list[str]]) -> None:
    first = cli("reproduce", f"./{_study()}", *SMALL, "--json")
    assert first.code == 0, first.err
    made = [c for c in commands if c[0] == "distill"]
    # per seed: dm at two cells, one set of `shared` for both, real images at two cells
    assert len(made) == 2 * (2 + 1 + 2)
    commands.clear()
    second = cli("reproduce", f"./{_study()}", *SMALL, "--json")
    assert commands == []
    found = json.loads(first.out)
    assert json.loads(second.out)["figures"] == found["figures"]
    figure = found["figures"][0]
    assert (figure["system"], figure["ipc"], figure["pipc"], figure["sets"], figure["networks"]) == ("dm", 1, 3, 2, 2)
    assert figure["published"] == 0.5
    assert figure["difference"] == pytest.approx(figure["mean"] - 0.5)
    assert [f["published"] for f in found["figures"][1:]] == [None] * 5
    rows = [
        json.loads((path / "evaluation.json").read_text())["evaluations"][0]["details"]["accuracies"]
        for path in sorted(Path("runs/study/sets").glob("dm-ipc1-pipc3-*/"))
    ]
    assert figure["mean"] == pytest.approx(sum(sum(row) for row in rows) / 4)
    assert json.loads(Path("runs/study/report.json").read_text())["figures"] == found["figures"]
    assert Path("runs/study/report.md").read_text().startswith("|")
    assert {file.name for file in Path("runs/study").glob("report.*")} == {
        f"report.{kind}" for kind in ("json", "md", "csv", "tex", "html")
    }
    shown = json.loads(cli("reproduce", f"./{_study()}", *SMALL, "--show", "--json", "--systems", "dm", "--figures", "charts").out)
    assert shown["charts"] == ["charts/pipc-ipc1.pdf", "charts/pipc-ipc1.png"]
    assert len(json.loads(cli("list", "runs", "runs/study", "--json").out)["runs"]) == len(made)
    pivoted = cli("reproduce", f"./{_study()}", *SMALL, "--show", "--pivot").out
    assert ["DM, published" in pivoted, "DM" in pivoted, "shared, published" in pivoted] == [True, True, False]
    for flags, code in ((("--figures", "charts"), 5), (("--pivot", "--json"), 2)):
        refused = cli("reproduce", f"./{_study()}", *SMALL, "--show", *flags)
        assert (refused.code, refused.out) == (code, "")


def test_settings_of_distilled_sets_change_no_baseline(cli: CLI, commands: list[list[str]]) -> None:
    def real_images(text: str, *flags: object) -> Any:
        result = cli("reproduce", f"./{_study(text)}", *SMALL, "--systems", "dm,means", "--cells", "1:3", "--seeds", 1, *flags)
        assert result.code == 0, result.err
        (folder,) = Path("runs/study/sets").glob("real-images-*/")
        rows = json.loads((folder / "evaluation.json").read_text())["evaluations"]
        assert [row["images"] for row in rows] == ["class-mean"], "a baseline is evaluated alone"
        return load_file(folder / "synthetic.safetensors")["images"]

    usual = real_images(STUDY)
    settings = STUDY + '\n[set]\n"optimizer.images.lr" = 0.5\n"losses.dm.weight" = 2.0\n'
    assert np.array_equal(real_images(settings, "--set", "initializer.use=noise"), usual)
    assert len(list(Path("runs/study/sets").glob("dm-*/"))) == 2  # the settings did reach the distilled set


ON = """
[published_on]
name = "Ones"
dataset = "digits"
classes = 10
shape = [1, 8, 8]

[[cells]]"""


def _digits(classes: int) -> str:
    """Returns digits of `classes` classes as a user's own file."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    kept = digits.target < classes
    np.savez("own.npz", x_train=(digits.images[kept] * 15).astype(np.uint8), y_train=digits.target[kept])
    return "npz:own.npz"


@pytest.mark.parametrize(
    ("dataset", "named", "comparable"),
    [("digits", "digits", True), ("digits", "cifar10", False), (10, "cifar10", True), (9, "cifar10", False), (-10, "cifar10", True)],
)
def test_no_difference_is_told_from_figures_of_other_data(
    cli: CLI, commands: list[list[str]], dataset: str | int, named: str, comparable: bool
) -> None:
    study = _study(STUDY.replace("[[cells]]", ON.replace('"digits"', f'"{named}"'), 1))
    use = dataset if isinstance(dataset, str) else _digits(abs(dataset))
    named_apart = isinstance(dataset, int) and dataset < 0
    place = ["--dataset", "npz", "--set", "data.path=own.npz"] if named_apart else ["--dataset", use]
    flags = ["reproduce", f"./{study}", *SMALL, *place, "--cells", "1:3", "--systems", "dm", "--seeds", 1]
    figure = json.loads(cli(*flags, "--json").out)["figures"][0]
    assert (figure["comparable"], figure["difference"] is not None, figure["dataset"]) == (comparable, comparable, use)
    table = " ".join(cli(*flags, "--show").out.split())
    assert f"Data: {use}. Published figures: Ones." in table
    assert ("Those are for other data (Ones has 10 classes of 1 x 8 x 8 values), so no difference is shown" in table) != comparable


def test_warnings_of_runs_are_told_once_under_the_table_and_kept_by_their_manifests(
    cli: CLI, commands: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    study = _study(STUDY.replace('recipe = "dm"', 'recipe = "dsv-noise"'))
    flags = ["reproduce", f"./{study}", *SMALL, "--cells", "1:3", "--systems", "dm", "--seeds", 2]
    told = "the teacher's layers features.0"
    result = cli(*flags, "--set", "teacher.norm=instance")
    assert (result.out.count(told), result.err, caplog.messages) == (1, "", [])
    kept = [json.loads(file.read_text())["warnings"] for file in Path("runs/study/sets").glob("*/manifest.json")]
    assert [sum(told in message for message in each) for each in kept] == [1, 1]
    assert not any("training one" in message for each in kept for message in each)  # a teacher was trained: no matter of the result
    reports = [file.read_text() for file in Path("runs/study/sets").glob("*/report.html")]
    assert ["<b>Warnings</b>" in report for report in reports] == [True, True]
    assert told not in cli(*flags).out  # a teacher with batch norm has no such layers


def test_a_set_that_cannot_be_read_any_more_costs_no_figure(cli: CLI, commands: list[list[str]]) -> None:
    study = _study(STUDY.replace("[[cells]]", ON.replace('"digits"', '"cifar10"'), 1) + BLENDS.format("shared", 0.5))
    flags = ["reproduce", f"./{study}", *SMALL, "--dataset", _digits(10), "--cells", "1:3", "--systems", "dm", "--seeds", 1]
    whole = json.loads(cli(*flags, "--json").out)["figures"][0]
    file = next(Path("runs/study/sets").glob("dm-*/synthetic.safetensors"))
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\x80\x3f" if content[-4:] != b"\x00\x00\x80\x3f" else b"\x00" * 4
    file.write_bytes(content)
    result = cli(*flags, "--show", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["figures"][0]
    assert len(found["warnings"]) == 1
    assert "synthetic.safetensors" in found["warnings"][0]
    assert found | {"warnings": []} == whole | {"high_frequency": None, "spectrum": []}
    kept = next(Path("runs/study/sets").glob("dm-*.json"))
    kept.write_text("{")
    result = cli(*flags, "--show")
    assert (result.code, result.out) == (5, "")
    assert f"{kept} cannot be read" in said(result.err)
    assert "After you remove this file, the same command evaluates the set again." in said(result.err)


WARNS_AT_START = """
import logging
import ddkit

class Warns(ddkit.Loss):
    requires = ddkit.Requires(reduce="mean")

    def initial(self, step):
        logging.getLogger("ddkit").warning("only at %s", "the start")
        logging.getLogger("ddkit").warning("does not %d fit", "it")
        return {}

    def __call__(self, step):
        return step.images.square().mean()
"""


def test_a_run_that_goes_on_still_tells_what_it_warned_of_before(cli: CLI) -> None:
    Path("warns.py").write_text(WARNS_AT_START)
    common = ["--plugin", "warns.py", "--out", "run", "--quiet"]
    assert cli("distill", *SMALL_FLAGS, "--losses", "warns", "--evaluate", "none", *common).code == 0
    told = ["only at the start", "does not %d fit"]
    manifest = Path("run/manifest.json")
    assert json.loads(manifest.read_text())["warnings"] == told
    manifest.unlink()  # as if it had been ended while it was evaluated
    assert cli("distill", "--resume", *common).code == 0
    assert json.loads(manifest.read_text())["warnings"] == told
    assert cli("distill", "--resume", "--steps", 3, *common).code == 0
    assert json.loads(manifest.read_text())["warnings"] == told


def test_what_is_not_run_is_named_as_in_the_table(cli: CLI, commands: list[list[str]]) -> None:
    blends = "\n[blends]\nfirst = 'dm'\nsecond = 'shared'\nalphas = [0.5, 1.0]\n"
    soft = "\n[systems.taught]\ntitle = 'DM'\nrecipe = 'dm'\nlabels = 'soft'\n"
    result = cli("reproduce", f"./{_study(STUDY + blends + soft)}", *SMALL, "--cells", "1:3", "--show")
    left = result.out.partition("Not finished: ")[2].strip().rstrip(".").split("; ")
    assert len(left) == len(set(left)) == 6
    fewer = cli("reproduce", f"./{_study(STUDY + blends + soft)}", *SMALL, "--cells", "1:3", "--show", "--alphas", "1.0")
    assert fewer.out.partition("Not finished")[2].count("alpha 1") == fewer.out.partition("Not finished")[2].count("alpha") == 1
    assert {"DM at ipc 1, pipc 3", "DM (soft) at ipc 1, pipc 3", "Blend of DM and shared at ipc 1, pipc 3, alpha 0.5"} <= set(left)


def test_an_interruption_tells_what_is_kept_and_writes_what_is_known(
    cli: CLI, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("reproduce", f"./{_study()}", *SMALL, "--cells", "1:3", "--seeds", 1)
    made = Crew.make

    def make(self: Any, task: grid.Task) -> float:
        if task.cell.system == "means":
            raise KeyboardInterrupt
        if task.cell.system == "shared":
            raise RunFailed("no room")
        return float(made(self, task))

    with monkeypatch.context() as patch:
        patch.setattr(Crew, "make", make)
        result = cli(*common)
    assert (result.code, result.out) == (130, "")
    assert "Interrupted. 1 of 3 evaluations are finished and kept in runs/study. The same command continues." in said(result.err)
    states = {f["system"]: f["state"] for f in json.loads(Path("runs/study/report.json").read_text())["figures"]}
    assert states == {"dm": "done", "shared": "failed", "means": "not run"}
    commands.clear()
    assert cli(*common).code == 0
    assert [command[0] for command in commands] == ["distill", "evaluate"] * 2


def test_other_steps_protocol_or_repeats_are_another_figure(cli: CLI, commands: list[list[str]]) -> None:
    common = ("reproduce", f"./{_study()}", *SMALL, "--cells", "1:4", "--systems", "dm", "--seeds", 1, "--json")
    networks = []
    for flags in ((), ("--steps", 1), ("--protocol", "dc-official"), ("--repeats", 3), ()):
        networks.append(json.loads(cli(*common, *flags).out)["figures"][0]["networks"])
    assert [c[0] for c in commands] == ["distill", "evaluate", "distill", "evaluate", "evaluate", "evaluate"]
    assert networks == [2, 2, 2, 3, 2]
    shown = cli("reproduce", f"./{_study()}", *SMALL, "--show")
    assert len(commands) == 6, "nothing is made"
    assert "Not finished: DM at ipc 1, pipc 3" in shown.out
    assert "1 of 2 x 2" in shown.out


def test_a_system_that_tries_a_number_of_steps_keeps_it() -> None:
    study = parse_study(tomllib.loads(STUDY.replace('"dm"\n', '"dm"\nset = { "steps" = 7 }\n')))

    def steps(**settings: Any) -> list[int]:
        return [grid.recipe_of(study, Cell(1, 3, name), 0, grid.Settings(**settings)).steps for name in ("dm", "shared", "means")]

    assert steps(steps=2) == [7, 2, 0]
    assert steps(sets=(("steps", 3),)) == [3, 3, 0]


def test_losses_that_a_recipe_lacks_are_those_of_the_fallback_with_its_rules() -> None:
    changed = 'recipe = "dm"\nlosses = "dm,dkkt:100"\nfallback = "practical"\n'
    study = parse_study(tomllib.loads(STUDY.replace('recipe = "dm"\n', changed) + '[[cells]]\nipc = 1\npipc = "all"\n'))

    def weights(pipc: int | str) -> dict[str, float]:
        return {label: table.weight for label, table in grid.recipe_of(study, Cell(1, pipc, "dm"), 0, grid.Settings()).losses.items()}

    assert weights(3) == {"dm": 1.0, "dkkt-primal": 100.0, "dkkt-stationarity": 10.0}
    assert weights("all") == {"dm": 1.0, "dkkt-primal": 100.0, "dkkt-stationarity": 0.1}


def test_a_system_like_another_has_its_keys_and_settings_but_for_its_own() -> None:
    base = '"dm"\nlabels = "hard"\nset = { "steps" = 7, "network" = { width = 8, depth = 2 } }\n'
    likes = """
[systems.wide]
like = "narrow"
set = { "network.width" = 32 }
[systems.narrow]
like = "dm"
set = { "network.width" = 4 }
"""
    study = parse_study(tomllib.loads(STUDY.replace('"dm"\n', base) + likes))
    systems = {name: study.systems[name] for name in ("dm", "narrow", "wide")}
    assert [each.title for each in systems.values()] == ["DM", "DM", "DM"]
    assert [each.labels for each in systems.values()] == ["hard", "hard", "hard"]
    found = {name: grid.recipe_of(study, Cell(1, 3, name), 0, grid.Settings()) for name in systems}
    options = [each.network.options for each in found.values()]
    assert [(each["width"], each["depth"]) for each in options] == [(8, 2), (4, 2), (32, 2)]
    assert [each.steps for each in found.values()] == [7, 7, 7]


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ('{ "parametrization.use" = "pixels" }', {"initializer.reuse": True, "parametrization.use": "pixels"}),
        ('{ "parametrization" = "pixels" }', {"initializer.reuse": True, "parametrization": "pixels"}),
        ('{ parametrization = { use = "grid", factor = 3 } }', {"parametrization.use": "grid", "parametrization.factor": 3}),
        ('{ "parametrization.images" = 5 }', {"parametrization.use": "fourier", "parametrization.images": 5}),
        ('{ "data" = {} }', {"data": {}, "parametrization.images": 20}),
    ],
)
def test_another_component_or_a_whole_table_ends_the_settings_of_the_system_that_it_is_like(own: str, left: dict[str, Any]) -> None:
    base = 'set = { parametrization = { use = "fourier", images = 20 }, "initializer.reuse" = true, "data.batch" = 9 }\n'
    heir = f'[systems.heir]\nlike = "dm"\nset = {own}\n'
    study = parse_study(tomllib.loads(STUDY.replace('"dm"\n', f'"dm"\n{base}') + heir))
    found = study.systems["heir"].set
    assert {path: found[path] for path in left} == left
    assert ("parametrization.images" in found) is ("parametrization.images" in left)
    assert ("data.batch" in found) is ("data" not in left)
    grid.recipe_of(study, Cell(1, 3, "heir"), 0, grid.Settings())


def test_a_cell_may_have_a_number_of_sets_of_its_own_and_all_of_seed_0_come_first() -> None:
    study = parse_study(tomllib.loads(STUDY + "seeds = 3\n"))

    def seeds(**settings: Any) -> list[tuple[int, int | str]]:
        tasks = grid.planned(study, chosen_cells(study, None, ["dm"]), Path("out"), grid.Settings(**settings))
        return [(task.seed, task.cell.pipc) for task in tasks]

    assert seeds() == [(0, 3), (0, 4), (1, 3), (1, 4), (2, 4)]
    assert seeds(seeds=1) == [(0, 3), (0, 4)]


@pytest.mark.parametrize("table", ["recipe = 'dm-star'", "recipe = 'dm'\nlabels = 'hard'"])
def test_systems_of_one_title_are_told_apart(table: str) -> None:
    study = parse_study(tomllib.loads(f"{STUDY}\n[systems.again]\ntitle = 'DM'\n{table}\n[systems.soft]\ntitle = 'DM'\nlabels = 'soft'\n"))
    tasks = grid.planned(study, chosen_cells(study, [(1, 3)], None), Path("out"), grid.Settings(seeds=1))
    assert [task.name for task in tasks] == ["DM [dm]", "shared", "means", "DM [again]", "DM (soft)"]


def test_a_call_that_is_interrupted_before_the_first_set_writes_nothing(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("reproduce", f"./{_study()}", *SMALL, "--cells", "1:3", "--systems", "dm", "--seeds", 1, "--out", "empty")
    Path("empty").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(runner, "check_data", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*flags).code == 130
    assert list(Path("empty").iterdir()) == []
    assert cli(*flags).code == 0


def test_an_interrupted_set_is_continued(cli: CLI, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("reproduce", f"./{_study()}", *SMALL, "--cells", "1:4", "--systems", "dm", "--seeds", 1, "--json")
    whole = json.loads(cli(*common).out)
    path = next(Path("runs/study/sets").glob("dm-*/"))
    for name in ("synthetic.safetensors", "manifest.json", "checkpoints/step-00000002.safetensors"):
        (path / name).unlink()
    commands.clear()
    again = json.loads(cli(*common).out)
    assert commands[0][:2] == ["distill", "--resume"]
    assert again["figures"] == whole["figures"]
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "checkpoints")  # it never took a step, so it begins again
    commands.clear()
    assert json.loads(cli(*common).out)["figures"] == whole["figures"]
    assert commands[0][:2] == ["distill", "--resume"]
    shutil.rmtree(path)
    commands.clear()
    assert json.loads(cli(*common).out)["figures"] == whole["figures"]
    assert commands[0][:2] == ["distill", "--recipe"]


@pytest.mark.slow
def test_a_study_that_is_killed_at_any_moment_goes_on_and_has_the_same_figures(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY)

    def begun(out: str) -> subprocess.Popen[str]:
        asked = ["--cells", "1:4", "--systems", "dm,shared", "--seeds", "1", "--out", str(tmp_path / out), "--json", *map(str, SMALL)]
        command = [sys.executable, "-m", "ddkit", "reproduce", str(file), *asked]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def figures(process: subprocess.Popen[str]) -> Any:
        printed = process.communicate()[0]
        assert process.returncode == 0
        return json.loads(printed)["figures"]

    whole = figures(begun("whole"))
    for pattern in ("dm-*.toml", "dm-*/metrics.jsonl", "dm-*/manifest.json", "dm-star-*/recipe.toml"):
        process = begun("killed")
        while not any((tmp_path / "killed" / "sets").glob(pattern)):
            assert process.poll() is None, pattern
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert figures(begun("killed")) == whole


def test_an_evaluation_by_hand_is_not_taken_for_the_studys(cli: CLI, commands: list[list[str]]) -> None:
    common = ("reproduce", f"./{_study()}", *SMALL, "--cells", "1:4", "--systems", "dm", "--seeds", 1, "--json")
    before = json.loads(cli(*common).out)["figures"]
    path = next(Path("runs/study/sets").glob("dm-*/"))
    small = ("--set", "evaluators.accuracy.epochs=1", "--set", "evaluators.accuracy.model_options.width=8")
    assert cli("evaluate", path, "--evaluate", "accuracy", "--protocol", "short", "--repeats", 2, *small).code == 0
    assert json.loads(cli(*common).out)["figures"] == before


def test_an_error_stops_the_sets_that_are_being_made(tmp_path: Path) -> None:
    crew = Crew(grid.Settings(jobs=2))
    began = time.monotonic()

    def work(number: int) -> None:
        if number == 0:
            while not crew.children:
                time.sleep(0.05)
            raise InputError("bad")
        flags = ["--losses", "dm", "--steps", "1000000", "--evaluate", "none", "--out", str(tmp_path / str(number)), "--quiet"]
        crew.command(["distill", *flags])

    with pytest.raises(InputError, match="bad"):
        crew.run(work, [0, 1, 2])
    assert time.monotonic() - began < 60
    assert crew.children == set()
    assert not (tmp_path / "2").exists()


@pytest.mark.usefixtures("forked_children")
def test_commands_keep_exit_codes_and_after_an_error_nothing_of_another_set_is_written(tmp_path: Path) -> None:
    (task,) = grid.planned(parse_study(tomllib.loads(STUDY)), [Cell(1, 3, "dm")], tmp_path, grid.Settings(seeds=1))
    task.path.parent.mkdir()
    crew = Crew(grid.Settings())
    with pytest.raises(DdkitError, match="Name a finished run") as error:
        crew.command(["evaluate", str(tmp_path / "nothing"), "--dataset", "digits"])
    assert error.value.exit_code == 5
    crew.stop()
    with pytest.raises(Interrupted):
        crew.make(task)
    assert list(task.path.parent.iterdir()) == []
    for code, kind in ((-11, RunFailed), (-9, RunFailed), (-2, Interrupted), (143, Interrupted)):
        assert isinstance(failure_of(code, "", ["distill"]), kind), "a crash is no interruption"


def test_a_set_that_fails_is_told_and_the_others_go_on(cli: CLI, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Crew.command

    def failing(self: Any, arguments: Sequence[str]) -> str:
        if arguments[0] == "distill" and "pipc3" in str(arguments):
            raise RunFailed("The loss 'dm' became nan at step 1.")
        if any("labels=soft" in argument for argument in arguments):
            raise RunFailed("The teacher's probabilities are nan.")
        return real(self, arguments)

    monkeypatch.setattr(Crew, "command", failing)
    taught = "\n[systems.taught]\nrecipe = 'dm'\nlabels = 'soft'\n"  # the same sets as those of dm
    result = cli("reproduce", f"./{_study(STUDY + taught)}", *SMALL, "--systems", "dm,taught", "--seeds", 1)
    assert result.code == 1
    assert "Failed: DM at ipc 1, pipc 3: The loss 'dm' became nan at step 1." in result.out
    assert "Failed: taught (soft) at ipc 1, pipc 4: The teacher's probabilities are nan." in result.out
    figures = json.loads(Path("runs/study/report.json").read_text())["figures"]
    assert [f["state"] for f in figures] == ["failed", "failed", "done", "failed"]


def test_blends_go_over_alpha_from_one_set_to_the_other_with_spectra(cli: CLI, commands: list[list[str]]) -> None:
    text = STUDY.replace("seeds = 2", "seeds = 1") + '\n[blends]\nfirst = "dm"\nsecond = "shared"\nalphas = [0.0, 0.5, 1.0]\n'
    result = cli("reproduce", f"./{_study(text)}", *SMALL, "--cells", "1:3", "--systems", "dm,shared", "--json")
    assert result.code == 0, result.err
    figures = {(f["system"], f["alpha"]): f for f in json.loads(result.out)["figures"]}
    assert figures["dm+shared", 0.0]["mean"] == figures["dm", None]["mean"]
    assert figures["dm+shared", 1.0]["mean"] == figures["shared", None]["mean"]
    assert figures["dm+shared", 0.5]["mean"] not in (figures["dm", None]["mean"], figures["shared", None]["mean"])
    assert sum(figures["dm+shared", 0.5]["spectrum"]) == pytest.approx(1)
    assert Path(json.loads(result.out)["pictures"][0]).read_bytes().startswith(b"\x89PNG")


def test_held_out_studies_never_see_the_test_set(cli: CLI, commands: list[list[str]]) -> None:
    text = "held_out = 5\n" + STUDY
    result = cli("reproduce", f"./{_study(text)}", *SMALL, "--cells", "1:3", "--systems", "dm", "--seeds", 1)
    assert result.code == 0, result.err
    assert "held-out training images" in result.out
    rows = json.loads(next(Path("runs/study/sets").glob("dm-*/evaluation.json")).read_text())["evaluations"]
    assert [row["split"] for row in rows] == ["held-out"]
    assert "Published figures are for the test split, and these are not, so no difference is shown" in " ".join(result.out.split())
    figure = json.loads(Path("runs/study/report.json").read_text())["figures"][0]
    assert (figure["published"], figure["comparable"], figure["difference"]) == (0.5, False, None)


def test_what_hinders_a_set_later_is_told_with_its_cell_and_no_other_set_starts(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(self: Any, arguments: Sequence[str]) -> str:
        raise InputError("The data has an image that is none.")

    monkeypatch.setattr(Crew, "command", command)
    result = cli("reproduce", f"./{_study()}", *SMALL[:-1], "--cells", "1:3")
    assert (result.code, result.out, result.err.count(" starts")) == (4, "", 1)
    assert "ddkit: DM ipc 1 pipc 3 seed 0: The data has an image that is none." in said(result.err)


def test_data_that_cannot_be_opened_is_reported_before_the_first_set(cli: CLI, commands: list[list[str]]) -> None:
    flags = ["reproduce", f"./{_study()}", *SMALL, "--dataset", "npz:nothing.npz"]
    result = cli(*flags)
    assert (result.code, result.out, commands, Path("runs").exists()) == (4, "", [], False)
    assert "nothing.npz does not exist" in said(result.err)
    assert cli(*flags, "--show").code == 0, "nothing is opened"


def test_classes_with_fewer_images_than_pipc_are_named_under_the_table(cli: CLI, commands: list[list[str]]) -> None:
    flags = [
        "reproduce",
        f"./{_study(STUDY.replace('pipc = 4', 'pipc = 400'))}",
        *SMALL,
        "--cells",
        "1:400",
        "--systems",
        "dm",
        "--seeds",
        1,
    ]
    notes = [line for line in cli(*flags).out.splitlines() if "fewer than" in line]
    assert [note.partition(", so")[0] for note in notes] == [
        "Warned: DM at ipc 1, pipc 400: The data has fewer than 400 training images of some classes"
    ]


def test_files_that_no_study_has_written_are_not_overwritten(cli: CLI, commands: list[list[str]]) -> None:
    Path("mine").mkdir()
    Path("mine/report.md").write_text("mine")
    result = cli("reproduce", f"./{_study()}", *SMALL, "--out", "mine")
    assert (result.code, commands, [file.read_text() for file in Path("mine").iterdir()]) == (5, [], ["mine"])
    assert "mine is not the folder of a study, and mine/report.md would be overwritten" in said(result.err)


def test_soft_labels_of_real_images_come_from_the_teacher_of_the_systems_beside_them() -> None:
    soft = (
        STUDY
        + """
[systems.soft]
recipe = "practical"
labels = "soft"
set = { "teacher.width" = 9 }

[systems.real]
baseline = "random-real"
labels = "soft"
"""
    )
    study = parse_study(tomllib.loads(soft))
    made = {
        task.cell.system: task.recipe for task in grid.planned(study, chosen_cells(study, None, None), Path("out"), grid.Settings(seeds=1))
    }
    assert (made["real"].teacher, made["real"].train) == (made["soft"].teacher, made["soft"].train)
    assert made["real"].teacher.options == {"norm": "batch", "width": 9}
    assert made["means"].teacher != made["soft"].teacher, "hard labels have no teacher"


def test_a_system_that_says_nothing_of_labels_has_those_of_the_protocol_or_else_those_that_its_set_has_learned() -> None:
    def labels(protocol: str, more: str = "") -> dict[str, str]:
        study = parse_study(tomllib.loads(f"{STUDY}\n{more}") | {"protocol": protocol})
        tasks = grid.planned(study, chosen_cells(study, None, None), Path("out"), grid.Settings(seeds=1))
        return {task.cell.system: task.evaluation.labels for task in tasks}

    assert set(labels("short").values()) == {"hard"}
    assert labels("rded", "[systems.own]\nrecipe = 'dm'\nlabels = 'hard'") == dict.fromkeys(labels("short"), "soft") | {"own": "hard"}
    learned = "[systems.learned]\nlosses = 'feature-regression'\nset = { 'labels.kind' = 'learned' }"
    assert labels("short", learned) == labels("short") | {"learned": "stored"}


DM, STAR, REAL, LAST = '"dm"\n', '"dm-star"\n', 'baseline = "class-mean"', "ipc = 1\npipc = 4"
BLENDS = "\n[blends]\nfirst = 'dm'\nsecond = '{}'\nalphas = [{}]\n"
BAD = [
    ('name = "a/b"\n' + STUDY, "lower-case letters"),
    ("held_out = 200\n" + STUDY, "Lower `held_out` or the `pipc` of the cells"),
    ('pictures = ["means"]\n' + STUDY, "pictures names the system 'means', but a baseline class-mean stores no images"),
    ('set = { "data.test" = "held-out" }\n' + STUDY, "set: data.test cannot be set here, as the study sets it itself. Use"),
    ("set = { data = { held_out = 5 } }\n" + STUDY, "set: data.held_out cannot be set here"),
    ('set = { teacher.use = "none.safetensors" }\n' + STUDY, "ddkit: set: The teacher file none.safetensors does not exist"),
    (STUDY + 'systems = ["dm", "dm"]\n', "cells[1].systems names the system 'dm' twice"),
    (STUDY + BLENDS.format("means", 0.5), "blends names the system 'means', but a baseline"),
    (STUDY + BLENDS.format("dm", 1.5), "alphas"),
    (STUDY + BLENDS.format("shared", "0.5, 0, 0.5"), "blends.alphas has 0.5 twice"),
    (STUDY.replace("[[cells]]", "[published_on]\nname = 'X'\n[[cells]]", 1), "published_on"),
    (STUDY.replace("{ dm =", "{ dn ="), "cells[0].published names the system 'dn', which the study lacks. Choose from: dm, means, shared."),
    (STUDY.replace("[50.0, 1.0]", "[150.0, 1.0]"), "cells[0].published.dm = [150.0, 1.0]: write an accuracy in percent"),
    (STUDY.replace("[50.0, 1.0]", "[50.0, -1.0]"), "cells[0].published.dm = [50.0, -1.0]: write an accuracy in percent"),
    (STUDY.replace("[50.0, 1.0]", "[50.0, 1.0, 3.0]"), "cells[0].published.dm = [50.0, 1.0, 3.0]: write an accuracy in percent"),
    (STUDY.replace("seeds = 2", "seeds = 0"), "seeds"),
    (
        "cells = 3\n" + STUDY.partition("[[cells]]")[0],
        "cells = 3 is not possible: expected array, got int. Write a list in brackets: cells = [...]",
    ),
    (
        STUDY.replace("pipc = 4", "pipc = 4\nsystems = 'dm'"),
        "cells[1].systems = 'dm' is not possible: expected array, got str. Write a list in brackets: cells[1].systems = [",
    ),
    (
        STUDY.replace(STAR, STAR + 'labels = "stored"\n'),
        'systems.shared: labels = "stored", of the system or its protocol, are those of a set',
    ),
    (STUDY.replace("seeds = 2", "sets = 2"), "sets"),
    (STUDY.replace("seeds = 2", "seeds = 1001"), "seeds = 1001 is not possible"),
    (
        STUDY.replace("pipc = 4", "pipc = 0\nsystems = ['means']"),
        "systems.means, cell 1:0: the baseline class-mean needs 1 real image per class",
    ),
    (STUDY.replace(LAST, "ipc = 5\npipc = 4"), "systems.dm, cell 5:4: the initializer real needs 5 real images per class"),
    (STUDY.replace("[systems.shared]", '[systems."x/y"]'), "lower-case letters"),
    (STUDY.replace(REAL, f'{REAL}\nlosses = "dm"'), "recipe and losses have no effect"),
    (STUDY.replace(REAL, 'baseline = "synthetic"'), "systems.means.baseline = 'synthetic' is not possible"),
    (STUDY.replace(DM, '"teacher"\n'), "systems.dm: The recipe 'teacher' has no loss"),
    (STUDY.replace(DM, '"dm"\nset = { "pipc" = 5 }\n'), "systems.dm.set: pipc cannot be set here"),
    (STUDY.replace(DM, '"dm"\nfallback = "practical"\n'), "systems.dm.fallback has no effect"),
    (STUDY.replace(DM, '"dm"\nlike = "shard"\n'), "systems.dm.like names the system 'shard', which the study lacks. Did you mean"),
    (STUDY.replace(DM, '"dm"\nlike = "dm"\n'), "systems.dm.like = 'dm' leads back to the system itself"),
    (STUDY.replace(DM, '"dm"\nlike = "shared"\n').replace(STAR, '"dm-star"\nlike = "dm"\n'), "leads back to the system itself"),
    (STUDY.replace(DM, '"dm"\nlike = 3\n'), "systems.dm.like = 3"),
    (STUDY.replace(DM, '"dm"\nlike = "means"\n'), "systems.dm: a baseline has real images, so recipe and losses have no effect"),
    (STUDY.replace(DM, '"dm"\nlosses = "dkkt"\nfallback = "practica"\n'), "systems.dm: There is no recipe 'practica'"),
    (STUDY + "seeds = 0\n", "cells[1].seeds = 0 is not possible"),
    (STUDY.replace(DM, '"dm"\nlosses = "dmm"\n'), "systems.dm: There is no loss 'dmm'"),
    (STUDY.replace(DM, '"dm"\nset = { "teacher.use" = "none.safetensors" }\n'), "systems.dm: The teacher file none.safetensors does not"),
    (STUDY.replace("pipc = 4", "pipc = 0").replace(DM, '"dm"\nset = { "initializer.use" = "noise" }\n'), "the loss dm needs 1 real image"),
    (STUDY.replace(STAR, '"dm-star"\nset = { "initializer.use" = "nose" }\n'), "systems.shared: There is no initializer 'nose'"),
    (STUDY.replace(STAR, '"dm-star"\nset = { network.norm = "batchh" }\n'), "systems.shared: convnet: network.norm = 'batchh'"),
    (STUDY.replace(STAR, '"dm-star"\nlosses = "dm:big"\n'), "systems.shared.losses = 'dm:big': the weight 'big' is not a number"),
]


@pytest.mark.parametrize(("text", "told"), BAD, ids=[told for _, told in BAD])
def test_a_bad_study_is_told_in_one_paragraph_before_anything_runs(cli: CLI, commands: list[list[str]], text: str, told: str) -> None:
    result = cli("reproduce", f"./{_study(text)}", *SMALL)
    code = 3 if "There is no loss" in told or "There is no initializer" in told else 4
    assert (result.code, commands, result.out) == (code, [], "")
    assert told in said(result.err)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('protocol = "shrt"\n' + STUDY, "ddkit: protocol: evaluators.accuracy.protocol = 'shrt'"),
        (STUDY.replace(STAR, STAR + 'protocol = "shrt"\n'), "systems.shared.protocol: evaluators.accuracy.protocol = 'shrt'"),
    ],
)
def test_a_protocol_that_is_none_is_told_with_the_system_that_names_it(cli: CLI, commands: list[list[str]], text: str, told: str) -> None:
    result = cli("reproduce", f"./{_study(text)}")
    assert (result.code, commands) == (4, [])
    assert told in said(result.err)


@pytest.mark.parametrize("name", INSTALLED)
def test_installed_studies_name_recipes_that_fit_their_cells(name: str) -> None:
    study = read_study(name)
    assert study.summary
    assert study.source
    for cell in chosen_cells(study, None, None):
        recipe = grid.recipe_of(study, cell, 0, grid.Settings(dataset="digits"))
        assert recipe.losses or not recipe.steps
        assert recipe.pipc in (cell.pipc, 0, 1, cell.ipc)


def test_the_papers_table_is_whole() -> None:
    study = read_study("practical-table1")
    assert len({(c.ipc, c.pipc) for c in study.cells}) == 11
    five = ("dm", "dm-star", "dsv-noise", "dsv-real", "practical")
    assert all(set(cell.published) == set(five) for cell in study.cells)
    assert published(study, Cell(10, 10, "dsv-real")) == (pytest.approx(0.3639), pytest.approx(0.0052))
    assert published(study, Cell(50, "all", "practical")) == (pytest.approx(0.5762), pytest.approx(0.0033))


def test_methods_alone_and_with_dkkt_differ_in_dkkt_alone() -> None:
    study = read_study("practical-zoo")
    methods = [name for name in study.systems if f"{name}-dkkt" in study.systems and not name.endswith("-hard")]
    assert len(methods) == 20
    for method, cell in itertools.product(methods, study.cells):
        alone, both = (grid.recipe_of(study, Cell(cell.ipc, cell.pipc, name), 0, grid.Settings()) for name in (method, f"{method}-dkkt"))
        assert {"dkkt-primal", "dkkt-stationarity"} <= both.losses.keys()
        assert set(both.losses) - set(alone.losses) <= {"dkkt-primal", "dkkt-stationarity"}
        assert both.losses != alone.losses
        if method != "rded":  # has no steps: with DKKT, its crops are where DKKT begins
            same = ("steps", "data", "parametrization", "initializer", "augmenter", "network", "experts", "labels", "optimizer")
            assert [getattr(both, key) for key in same] == [getattr(alone, key) for key in same], method


# Shares of a study, and stores put together


def _task(name: str, *parts: str) -> grid.Task:
    asked = grid.Evaluating(protocol="short", labels="hard", images="synthetic", networks=1, teacher="")
    return grid.Task(Cell(1, 1, name), 0, parse_recipe({}), Path(name), asked, name, tuple(map(Path, parts)))


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shares_are_a_partition_and_a_blend_goes_with_its_parts(of: int) -> None:
    made = [_task("a"), _task("b"), _task("c"), _task("a"), _task("d"), _task("a+c", "a", "c"), _task("d+c", "d", "c")]
    shares = [share(made, number, of) for number in range(of)]
    assert sorted(task.cell.system for some in shares for task in some) == sorted(task.cell.system for task in made)
    for some in shares:
        names = {task.path.name for task in some}
        assert names <= {"a", "c", "d", "a+c", "d+c"} or names <= {"b"} or of == 1
    assert shares[0] == [task for task in made if task in shares[0]], "in the study's order"


def test_shares_made_apart_are_the_whole_study_once_they_are_put_together(cli: CLI, commands: list[list[str]]) -> None:
    study, flags = f"./{_study()}", [*SMALL[:-1], "--seeds", 1, "--json"]
    for number in (1, 2):
        shard = cli("reproduce", study, *flags, "--shard", f"{number}/2", "--out", f"share-{number}")
        assert shard.code == 0, shard.err
        assert {"not run", "partly"} & {figure["state"] for figure in json.loads(shard.out)["figures"]}
    made = [c[c.index("--out") + 1].split("/")[-1] for c in commands if c[0] == "distill"]
    assert len(made) == len(set(made)) == 2 + 1 + 2, "each set in one share alone"
    commands.clear()
    together = cli("reproduce", study, *flags, "--merge", "share-1", "--merge", "share-2")
    assert together.code == 0, together.err
    assert commands == [], "nothing is left to do"
    whole = cli("reproduce", study, *flags, "--out", "whole")
    parts, one = ([figure | {"cached": 0} for figure in json.loads(each.out)["figures"]] for each in (together, whole))
    assert parts == one, "but for the networks that the second finds in the cache"
    again = cli("reproduce", study, *flags[:-1], "--merge", "share-1", "--show")
    assert "0 sets and evaluations were copied from share-1" in again.err


def test_an_evaluation_of_another_set_of_the_same_name_is_not_merged(cli: CLI, commands: list[list[str]]) -> None:
    study = f"./{_study()}"
    one = [*SMALL, "--cells", "1:3", "--systems", "dm", "--seeds", 1]
    for store in ("first", "second"):
        assert cli("reproduce", study, *one, "--out", store).code == 0
    shutil.copytree("second", "same")
    (manifest,) = Path("second/sets").glob("dm-*/manifest.json")
    facts = {key: value for key, value in json.loads(manifest.read_text()).items() if key not in ("schema", "digest")}
    facts["files"]["synthetic.safetensors"]["sha256"] = "0" * 64  # as if it were another one
    write_manifest(manifest.parent, facts)
    for store, copied in (("second", 0), ("same", 1)):
        for kept in Path(store).glob("sets/*.json"):
            kept.unlink()
        assert cli("reproduce", study, *one, "--merge", "first", "--out", store, "--show").code == 0
        assert len(list(Path(store).glob("sets/*.json"))) == copied


def test_a_damaged_store_is_not_merged_and_nothing_half_copied_stays(cli: CLI, commands: list[list[str]]) -> None:
    study = f"./{_study()}"
    one = [*SMALL, "--cells", "1:3", "--systems", "dm", "--seeds", 1]
    assert cli("reproduce", study, *one, "--out", "first").code == 0
    (run,) = (path for path in Path("first/sets").glob("dm-*") if path.is_dir())
    file = run / "synthetic.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = cli("reproduce", study, *one, "--merge", "first", "--out", "second", "--show")
    assert result.code == 5
    assert "synthetic.safetensors" in result.err
    assert list(Path("second/sets").iterdir()) == []


@pytest.mark.slow
def test_torchrun_makes_a_share_in_each_process(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    flags = [*map(str, SMALL), "--seeds", "1", "--systems", "dm", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "ddkit", "reproduce", "./study.toml", *flags],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {figure["state"] for figure in json.loads(done.stdout)["figures"]} == {"done"}
