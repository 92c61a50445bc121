"""Code runs if the user gave exactly that value: what a file names does not, by any command, whatever names are on the command line."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit.api import resume
from ddkit.components import trust
from ddkit.files import write_tensors
from ddkit.studies.crew import Crew
from ddkit.studies.grid import Settings
from tests.conftest import SMALL, Result, set_flags

CLI = Callable[..., Result]
CODE = "python:evil.toml"  # evil.py, in which the function is called as the ending of the recipe beside it
QUICK = {key: value for key, value in SMALL.items() if "width" not in key}
SETS = set_flags(QUICK)
EVIL = """
from pathlib import Path
from torch import nn

Path({ran!r}).touch()


def toml(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))


safetensors = toml
"""
LOSSES = "pipc = 3\n[losses.dm]\n[losses.dkkt-primal]\n"
RECIPES = {
    "network": f'[network]\nmodel = "{CODE}"\n',
    "network's option": '[network]\nmodel = "python"\nfactory = "evil.toml"\n',
    "teacher": f'[teacher]\nmodel = "{CODE}"\n',
    "teacher's option": '[teacher]\nmodel = "python"\nfactory = "evil.toml"\n',
    "distribution": f'[network]\nmodel = "ddkit/{CODE}"\n',
    "evaluator": f'[evaluators.accuracy]\nmodel = "mlp,{CODE}"\n',
    "evaluator's option": '[evaluators.accuracy]\nmodel = "python"\nmodel_options = {factory = "evil.toml"}\n',
    "evaluator of another": f'[evaluators.other]\nuse = "ranking"\nmodel = "{CODE}"\nfull = 1.0\n',
    "rule": f'[[rules]]\nwhen = {{ipc_min = 1}}\nset = {{"network.model" = "{CODE}"}}\n',
}
INNOCENT = [  # words of a command line in which the name evil.toml, or a part of it, stands
    "--recipe", "files/evil.toml", "--out", "evil.toml", "--set", "name=evil.toml", "--set", "summary=evil",
]  # fmt: skip


class World:
    """A folder with evil.py, and commands in it: each says whether the module was imported."""

    def __init__(self, cli: CLI, folder: Path) -> None:
        self.cli, self.ran = cli, folder / "ran"
        Path("evil.py").write_text(EVIL.format(ran=str(self.ran)))
        Path("files").mkdir()

    def forget(self) -> None:
        sys.modules.pop("evil", None)
        self.ran.unlink(missing_ok=True)

    def refuses(self, *words: object) -> None:
        """Asserts that a command is refused with the flag that would allow it, and imports nothing."""
        self.forget()
        before = sorted(Path().rglob("*"))
        found = self.cli(*words)
        assert not self.ran.exists(), "the module was imported"
        assert (found.code, found.out) == (4, ""), found.err
        assert "--allow-code" in found.err
        assert sorted(Path().rglob("*")) == before

    def runs(self, *words: object) -> Result:
        """Asserts that a command works, and imports the module."""
        self.forget()
        found = self.cli(*words)
        assert found.code == 0, found.err
        assert self.ran.exists(), "the check could not fail"
        return found


@pytest.fixture
def world(cli: CLI, tmp_path: Path) -> Iterator[World]:
    made = World(cli, tmp_path)
    yield made
    made.forget()


@pytest.fixture
def files(world: World) -> World:
    """Makes files that name the code, with leave: a teacher evil.safetensors and a run evil.run that has another checkpoint to go to."""
    fixed = ["--dataset", "digits", "--set", "train.epochs=1"]
    world.runs("train", "--model", CODE, "--out", "evil.safetensors", *fixed)
    world.runs("distill", "--losses", "dm", "--model", CODE, "--pipc", 3, "--evaluate", "none", "--out", "evil.run", *SETS)
    return world


@pytest.mark.parametrize("place", RECIPES)
def test_a_recipe_file_runs_no_code_in_distill(world: World, place: str) -> None:
    Path("files/evil.toml").write_text(LOSSES + RECIPES[place])
    words = ["distill", *INNOCENT, *SETS]
    world.refuses(*words)
    world.runs(*words, "--plan", "--allow-code")
    world.refuses(*words, "--plan")  # leave is given for one command


@pytest.mark.parametrize(
    "named",
    [
        ["--model", CODE],
        ["--set", f"network.model={CODE}"],
        ["--set", "network.model=python", "--set", "network.factory=evil.toml"],
        ["--set", 'network={model="python", factory="evil.toml"}'],
        ["--set", f"evaluators.accuracy.model=mlp,{CODE}"],
        ["--set", "evaluators.accuracy.model=python", "--set", "evaluators.accuracy.model_options.factory=evil.toml"],
    ],
    ids=" ".join,
)
def test_what_a_flag_names_runs(world: World, named: list[str]) -> None:
    before = dict(os.environ)
    world.runs("distill", "--losses", "dm", "--pipc", 3, *SETS, *named, "--plan")
    assert {name for name in os.environ if name.startswith("DDKIT")} == {name for name in before if name.startswith("DDKIT")}


@pytest.mark.parametrize(
    "named",
    [
        ["--set", f"name={CODE}.x"],
        ["--set", "teacher.model=python", "--set", "teacher.factory=evil.toml"],  # it is named for the teacher, not for the network
        ["--set", "evaluators.accuracy.model_options.factory=evil.toml"],
        ["--losses", "dm,dkkt-primal", "--teacher", "auto", "--init", "noise"],
    ],
    ids=" ".join,
)
def test_another_value_or_another_place_is_no_leave(world: World, named: list[str]) -> None:
    Path("files/evil.toml").write_text(LOSSES + RECIPES["network's option"])
    world.refuses("distill", *INNOCENT, *SETS, *named)


def test_a_recipe_file_runs_no_code_in_train(world: World) -> None:
    Path("evil.toml").write_text('[teacher]\nmodel = "python:evil.safetensors"\n[train]\nepochs = 1\n')
    for out in ("evil.toml.safetensors", "evil.safetensors"):
        world.refuses("train", "--recipe", "./evil.toml", "--out", out)
    world.runs("train", "--recipe", "./evil.toml", "--out", "t.safetensors", "--allow-code")
    world.runs("train", "--recipe", "./evil.toml", "--out", "u.safetensors", "--model", "python:evil.safetensors")


def test_a_teachers_record_runs_no_code(files: World) -> None:
    flags = ["--losses", "dkkt-primal", "--pipc", 3, "--teacher", "evil.safetensors", "--evaluate", "none", *SETS]
    for plan in ([], ["--plan"]):
        files.refuses("distill", *flags, *plan)
    files.refuses("evaluate", "evil.run", "--teacher", "evil.safetensors", "--set", "evaluators.accuracy.labels=soft", *SETS[2:])
    files.runs("distill", *flags, "--plan", "--model", CODE)
    files.runs("distill", *flags, "--plan", "--set", f"teacher.model={CODE}")


def test_a_run_folder_runs_no_code(files: World) -> None:
    files.forget()
    for words in (["report"], ["export", "--to", "npz"], ["export", "--to", "card"], ["blend", "evil.run"]):
        assert files.cli(words[0], "evil.run", *words[1:], "--out", f"{'-'.join(words).replace('.', '-')}.html").code == 0
    assert not files.ran.exists()
    files.refuses("distill", "--resume", "--out", "evil.run", "--steps", 4)
    files.refuses("distill", "--recipe", "evil.run/recipe.toml", "--out", "evil.toml")
    files.runs("distill", "--resume", "--out", "evil.run", "--steps", 4, "--allow-code")
    files.refuses("distill", "--resume", "--out", "evil.run", "--steps", 6)


def test_the_evaluators_of_a_run_folder_run_no_code(world: World) -> None:
    quick = [*SETS, "--set", "evaluators.accuracy.random_real=false"]
    world.runs("distill", "--losses", "image-norm", "--out", "evil.run", *quick, "--set", f"evaluators.accuracy.model={CODE}")
    world.refuses("evaluate", "evil.run")
    world.runs("evaluate", "evil.run", "--model", CODE)
    world.runs("evaluate", "evil.run", "--allow-code")
    world.refuses("evaluate", "evil.run")


def test_nothing_of_a_sets_metadata_runs(world: World) -> None:
    names = {"model": CODE, "recipe": "evil.toml", "network": {"model": CODE}, "evaluators": {"accuracy": {"model": CODE}}, "seed": 0}
    units = {"class_names": [str(label) for label in range(10)], "mean": [0.5], "std": [0.25], "pipc": 3}
    write_tensors(Path("evil.safetensors"), {"images": torch.rand(10, 1, 8, 8), "labels": torch.arange(10)}, units | names)
    world.forget()
    quick = ["--dataset", "digits", *(part for part in SETS if "=" in part and "evaluators" in part for part in ("--set", part))]
    assert world.cli("evaluate", "evil.safetensors", *quick).code == 0
    assert world.cli("blend", "evil.safetensors", "evil.safetensors", "--out", "blended").code == 0
    assert world.cli("export", "evil.safetensors", "--to", "npz", "--out", "exported").code == 0
    assert not world.ran.exists()
    world.runs("evaluate", "evil.safetensors", *quick, "--model", CODE)


def test_an_imported_file_runs_no_code_and_a_flag_does(world: World) -> None:
    write_tensors(Path("evil.safetensors"), {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, {"model": CODE})
    flags = ["--classes", 10, "--size", 8, "--mean", 0.5, "--std", 0.25]
    world.forget()
    assert world.cli("import", "evil.safetensors", "--out", "evil.toml.safetensors", *flags).code == 4  # it does not fit a convnet
    assert not world.ran.exists()
    world.runs("import", "evil.safetensors", "--out", "one.safetensors", *flags, "--model", CODE)
    world.runs("import", "evil.safetensors", "--out", "two.safetensors", *flags, "--set", f"teacher.model={CODE}")


STUDY = """
protocol = "short"
networks = 1
{top}
[systems.dm]
recipe = "{recipe}"
{system}
[[cells]]
ipc = 1
pipc = 3
"""


@pytest.mark.parametrize(
    ("recipe", "top", "system"),
    [
        ("./evil.toml", "", ""),
        ("dm", f"[set]\n'network.model' = '{CODE}'", ""),
        ("dm", "[set.network]\nmodel = 'python'\nfactory = 'evil.toml'", ""),
        ("dm", "", f"[systems.dm.set]\nnetwork.model = '{CODE}'"),
    ],
    ids=["recipe", "set", "set's option", "system"],
)
def test_a_study_file_runs_no_code(world: World, recipe: str, top: str, system: str) -> None:
    Path("evil.toml").write_text("[losses.dm]\n" + RECIPES["network"])
    Path("study.toml").write_text(STUDY.format(recipe=recipe, top=top, system=system))
    for words in (["study.toml"], ["./study.toml", "--show"]):
        world.refuses("reproduce", *words, "--out", "evil.toml.store", "--set", "summary=evil.toml")


def test_what_the_user_named_runs_in_the_processes_of_a_study_and_nothing_else_does(
    world: World, monkeypatch: pytest.MonkeyPatch, forks: Any
) -> None:
    monkeypatch.setattr("ddkit.run.children.subprocess", forks)
    Path("files/evil.toml").write_text(LOSSES + RECIPES["network"])
    crew = Crew(Settings())

    def made() -> None:
        crew.run(crew.command, [["distill", "--recipe", "files/evil.toml", "--plan", "--json"]])

    for given, everything in (({"model": CODE}, False), ({}, True)):
        world.forget()
        with trust.granting(given, everything=everything):
            made()
        assert world.ran.exists()
    world.forget()
    with trust.granting({"name": "evil.toml"}), pytest.raises(ddkit.DdkitError, match="--allow-code") as error:
        made()
    assert (error.value.exit_code, world.ran.exists()) == (4, False)


def test_bench_runs_what_set_names(world: World, monkeypatch: pytest.MonkeyPatch, forks: Any) -> None:
    monkeypatch.setattr("ddkit.run.children.subprocess", forks)
    monkeypatch.setattr("ddkit.bench._limit", lambda device, settings: {"device": device, "rates": {"float32": 1e9}})
    small = ["--ipc", 1, "--pipc", 1, "--classes", 2, "--size", 8, "--runs", 1, "--steps", 1, "--no-plain", "--quiet", "--json"]
    world.runs("bench", "steps", *small, "--device", "cpu", "--set", f"network.model={CODE}", "--set", "engine.compile=false")


@pytest.mark.usefixtures("forked_children")
def test_processes_that_train_networks_may_run_what_was_named(world: World, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--losses", "dm", "--pipc", 3, *SETS, "--set", "evaluators.accuracy.workers=2"]
    by_option = ["--set", "evaluators.accuracy.model=python", "--set", "evaluators.accuracy.model_options.factory=evil.toml"]
    for named in (["--model", CODE], by_option):
        world.runs("distill", *flags, *named, "--out", f"run{len(named)}")
    assert "trained in this process instead" not in caplog.text


# in Python


def refused(call: Callable[[], Any], world: World) -> None:
    world.forget()
    with pytest.raises(ddkit.InputError, match="--allow-code"):
        call()
    assert not world.ran.exists()


def test_an_argument_is_leave_for_its_own_call_alone(world: World, tmp_path: Path) -> None:
    numbers = iter(range(100))
    plain: dict[str, Any] = {"losses": "dm", "pipc": 3, "evaluators": "none"}

    def distill(**arguments: Any) -> Any:
        return ddkit.distill(**plain | arguments, out=tmp_path / f"run{next(numbers)}")

    Path("evil.toml").write_text(LOSSES + RECIPES["network"])
    table = {"network": {"model": "python", "factory": "evil.toml"}, "losses": {"dm": {}}}
    calls: list[dict[str, Any]] = [
        {"model": CODE, "sets": QUICK},
        {"sets": QUICK | {"network.model": CODE}},
        {"sets": QUICK | {"network": {"model": "python", "factory": "evil.toml"}}},
        {"recipe": table, "losses": None, "sets": QUICK},
        {"recipe": "./evil.toml", "sets": QUICK, "allow_code": True},
    ]
    for arguments in calls:
        world.forget()
        distill(**arguments)
        assert world.ran.exists()
        refused(lambda: distill(recipe="./evil.toml", sets=QUICK), world)
    refused(lambda: resume(tmp_path / "run0", steps=4), world)
    resume(tmp_path / "run0", steps=4, allow_code=True)
    with pytest.raises(ddkit.InputError):
        distill(model=CODE, sets={"steps": "many"})
    refused(lambda: distill(recipe="./evil.toml", sets=QUICK), world)  # also after a call that failed


def test_every_function_takes_an_argument_for_leave(world: World, tmp_path: Path) -> None:
    quick = {path: value for path, value in QUICK.items() if path.startswith(("evaluators", "train"))}
    teacher, tensors = Path("evil.safetensors"), Path("state.safetensors")
    write_tensors(tensors, {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, {})
    ddkit.distill(losses="image-norm", sets=QUICK, evaluators="none", out="run")
    shape: dict[str, Any] = {"classes": 10, "size": (8, 8), "mean": [0.5], "std": [0.25]}
    calls: list[Callable[[], Any]] = [
        lambda: ddkit.train(teacher, model=CODE, sets={"train.epochs": 1}),
        lambda: ddkit.evaluate("run", model=CODE, sets=quick),
        lambda: ddkit.evaluate("run", evaluators="accuracy", sets=quick | {"evaluators.accuracy.model": f"mlp,{CODE}"}),
        lambda: ddkit.import_file(tensors, "imported.safetensors", model=CODE, **shape),
    ]
    for call in calls:
        world.forget()
        call()
        assert world.ran.exists()
    refused(lambda: ddkit.evaluate("run", teacher=str(teacher), sets=quick | {"evaluators.accuracy.labels": "soft"}), world)
    refused(lambda: ddkit.create("model", CODE), world)  # no call of a command is at work, so nothing was given


def test_leave_is_not_seen_in_another_thread() -> None:
    seen: list[trust.Granted] = []
    with trust.granting({"model": CODE}, everything=True):
        assert trust.granted().everything
        thread = threading.Thread(target=lambda: seen.append(trust.granted()))
        thread.start()
        thread.join()
    assert seen == [trust.Granted()] == [trust.granted()]
