"""`--plan` refuses what the run refuses before its first step, trains and writes nothing, and says roughly what the run costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkit.components.base import DataInfo
from ddkit.components.registry import create
from ddkit.files import write_tensors
from ddkit.nn.networks import build_network
from tests.conftest import SMALL_FLAGS, Result

Cli = Callable[..., Result]


def plan_of(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


MEAN_AND_STD = ("--set", "teacher.mean=[0.5,0.5,0.5]", "--set", "teacher.std=[0.2,0.2,0.2]", "--set", "teacher.width=8")
UNFIT: dict[str, tuple[object, ...]] = {
    "a teacher of ten classes": (*MEAN_AND_STD, "--teacher", "bare.safetensors"),
    "no parameter": ("--set", "losses.dkkt-stationarity.parameters=nope*"),
    "no test images that can be read": (),
    "no such parameter": ("--set", "optimizer.multiplier.lr=0.1"),
    "labels that no loss teaches": ("--set", "labels.kind=learned"),
    "a step size that the set does not have": ("--protocol", "mtt"),
    "an initializer of a file that is none": ("--init", "file:bare.safetensors"),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_a_plan_refuses_what_the_run_refuses(cli: Cli, image_folder: Path, monkeypatch: pytest.MonkeyPatch, unfit: str) -> None:
    info = DataInfo(class_names=tuple("0123456789"), channels=3, size=(12, 12))
    module = build_network(create("model", "convnet", {"width": 8, "norm": "batch"}, data=info), info, 0, "bare")
    write_tensors(Path("bare.safetensors"), module.state_dict(), {})
    if unfit == "no test images that can be read":
        (image_folder / "test" / "cat" / "000.png").write_bytes(b"garbage")
        monkeypatch.setattr("ddkit.nn.automatic_teacher._test_accuracy", lambda *arguments: None)  # the teacher is not what reads them
    flags = ("distill", "--losses", "dm,dkkt", "--dataset", f"imagefolder:{image_folder}", *SMALL_FLAGS, *UNFIT[unfit])
    planned = cli(*flags, "--plan")
    assert (planned.code in (4, 5), planned.out) == (True, ""), planned.out
    made = cli(*flags, "--out", "run")
    assert (made.code, made.err.partition("ddkit: ")[2]) == (planned.code, planned.err.partition("ddkit: ")[2])
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["bare.safetensors"]


def test_a_plan_refuses_a_place_that_the_run_refuses(cli: Cli) -> None:
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full", "photo.jpg").write_text("mine")
    flags = ("distill", "--losses", "dm", "--evaluate", "none", *SMALL_FLAGS)
    for place in ("file", "file/run", "full"):
        planned = cli(*flags, "--out", place, "--plan")
        assert (planned.code, planned.out, planned.err) == (5, "", cli(*flags, "--out", place).err)
    for place in ("new/run", "."):  # negative control, of which nothing stays
        Path("full", "photo.jpg").unlink(missing_ok=True)
        assert cli(*flags, "--out", "full" if place == "." else place, "--plan").code == 0
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["file", "full"]


def test_a_plan_trains_and_writes_nothing(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DDKIT_CACHE", str(cache))
    for count, name in (("FEW_IMAGES", "ddkit.data.loading.FEW_IMAGES"), ("SETTLED_NS", "ddkit.data.loading.SETTLED_NS")):
        monkeypatch.setattr(name, 0 if count == "FEW_IMAGES" else -(10**18))  # so that a run does keep its images
    flags = ("distill", "--losses", "dm,dkkt", "--dataset", f"imagefolder:{image_folder}", *SMALL_FLAGS)
    with monkeypatch.context() as patch:
        patch.setattr("ddkit.nn.automatic_teacher.fit", lambda *arguments, **named: pytest.fail("a teacher is trained"))
        plan = plan_of(cli(*flags, "--plan", "--json"))
    assert plan["teacher_is_trained_first"]
    assert plan["teacher_accuracy"] is None
    assert plan["estimate"]["operations"]["teacher"] > 0
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert not list(Path.cwd().iterdir())
    assert cli(*flags, "--out", "run").code == 0
    assert [path for path in cache.rglob("*") if path.is_file()]  # the negative control: a run keeps its teacher and images
    again = plan_of(cli(*flags, "--plan", "--json"))
    assert not again["teacher_is_trained_first"]
    assert again["teacher_accuracy"]["images"] == 18
    assert again["estimate"]["operations"]["teacher"] == 0
    assert "% of 18 accessible images" in cli(*flags, "--plan").out


def test_a_plan_says_roughly_what_the_run_costs(cli: Cli) -> None:
    def cost(*flags: object) -> dict[str, Any]:
        found: dict[str, Any] = plan_of(cli("distill", "--losses", "dm", *SMALL_FLAGS, *flags, "--plan", "--json"))["estimate"]
        return found

    few, many = cost(), cost("--steps", 200)
    assert many["operations"]["steps"] == pytest.approx(100 * few["operations"]["steps"])
    assert few["operations"]["evaluation"] == many["operations"]["evaluation"] > 0
    assert few["operations_per_second"] > 1e8
    assert few["seconds"] >= 0
    assert cost("--evaluate", "none")["operations"]["evaluation"] == 0
    assert cost("--ipc", 40)["memory_mib"] > few["memory_mib"] > 100
    lines = cli("distill", "--losses", "dm", *SMALL_FLAGS, "--plan").out.splitlines()
    assert lines[-1].startswith("It takes a minute or less and 0.")
    assert cli("distill", "--losses", "dm", "--steps", 10**7, "--plan").out.splitlines()[-1].count("hours") == 1
