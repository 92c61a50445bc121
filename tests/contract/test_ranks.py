"""Several processes under torchrun: the same result as one, whatever their number; faults; who prints and who writes.

Real processes over gloo on the loopback interface: those of torchrun, or forks that are given what it gives its processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as distributed
from torch import Tensor

import ddkit
from ddkit import distributed as ddkit_distributed
from ddkit.components import registry
from ddkit.errors import FlagError, InputError
from ddkit.files import read_tensors
from ddkit.recipes.resolve import resolve
from ddkit.run.resolved import resolved
from ddkit.run.run import Place, planned
from ddkit.run.setup import RunSetup
from ddkit.testing import world as testing_world
from ddkit.testing.world import Setting, in_parts, part_of
from tests.conftest import Result, write_image_folder
from tests.ranked import work

Cli = Callable[..., Result]
ROOT = Path(__file__).parents[2]
CLASSES, STEPS = 5, 5  # neither 2 nor 3 divides the classes
SIZES = (2, 3)
IMAGES, LOSSES = 1e-4, 1e-4  # how far images (pixel units) and losses (relative) may be from those of one process
TINY = {"network.width": 8, "network.depth": 1, "engine.checkpoint_every": 25}
LOSSES_OF_DDKIT = [
    plugin.name for plugin in registry.plugins()
    if plugin.kind == "loss" and plugin.first_party and registry.create("loss", plugin.name).requires.reduce is not None
]  # fmt: skip
POOL = {"norm": "batch", "pool": 2, "renew_every": 3, "train_on": "real", "inner_steps": 2, "batch": 8, "inner_mix": "mixup"}
EACH_LOSS: dict[str, tuple[str, dict[str, Any]]] = {
    "every loss": (
        ",".join(LOSSES_OF_DDKIT),
        {"losses.feature-regression.mixup": 0.3, "losses.dkkt-primal.masked": True, "network.depth": 2},
    ),
    "stationarity, l1": (
        "dkkt-stationarity",
        {"losses.dkkt-stationarity.distance": "l1", "losses.dkkt-stationarity.init": "least-squares"},
    ),
    "stationarity, l2": (
        "dkkt-stationarity",
        {"losses.dkkt-stationarity.distance": "l2", "losses.dkkt-stationarity.constraint": "softplus"},
    ),
    "stationarity, layer-cosine, noise": ("dkkt", {"losses.dkkt-stationarity.distance": "layer-cosine", "views.default.noise": 0.2}),
    "chunks": ("dm,dkkt", {"engine.chunk": 2}),
    "networks of experts": ("dm", {"network.source": "experts", "experts.count": 2, "experts.epochs": 1}),
    "learned labels": ("dm,feature-regression", {"labels.kind": "learned", "network.renew_every": 2, "network.inner_epochs": 1}),
    "the teacher's labels": ("feature-regression", {"labels.kind": "teacher", "labels.temperature": 2.0, "engine.chunk": 2}),
    "classes of their own numbers": ("dm,dkkt,feature-regression", {"ipc": {"default": 2, "1": 8, "4": 1}, "initializer.reuse": True}),
    "a pool trained on real images, batch norm": ("dm", {f"network.{key}": value for key, value in POOL.items()}),
    "some of the real images": ("dm,feature-regression", {"data.batch": 3, "network.renew_every": 3}),
}
EACH_RECIPE = (
    "default",
    "m3d",
    "datadam",
    "inversion",
    "cafe",
    "dm",
    "dkkt",
    "practical",
    "practical-plus",
    "dm-star",
    "dsv-noise",
    "dsv-real",
    "dc",
)
HEAVY = "practical-plus, heavy"  # its regression outweighs the rest: less steep
SLOW = ("stationarity, l1", "stationarity, l2", "chunks", "fourier", HEAVY, *(name for name in EACH_RECIPE if name != "dm"))
IN_TWO = (*(name for name in EACH_LOSS if name not in SLOW), "dm", "bases", "whitened")
IN_THREE = ("every loss", "stationarity, layer-cosine, noise", "some of the real images")
SLOW_IN_THREE = tuple(name for name in (*EACH_LOSS, *EACH_RECIPE, HEAVY, "fourier", "bases", "whitened") if name not in IN_THREE)
EACH_START = ("real", "noise", "kmeans", "herding", "k-center", "mix", "multiplier", "typical-crops")
STARTS = [(2, name) for name in EACH_START] + [(3, "real")]
REFUSED = {
    "a loss of the whole set": "needs the whole synthetic set at once",
}


class World(NamedTuple):
    """A data set, a teacher for it, and the folder of all results."""

    data: Path
    teacher: Path
    folder: Path


def forked(forks: Any, size: int, *command: object, cwd: Path) -> list[Any]:
    """Starts SIZE forks of `python -m COMMAND...` with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, "-m", *map(str, command)]
    return [
        forks.Popen(words, stdout=forks.PIPE, stderr=forks.PIPE, text=True, cwd=cwd, env=common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(size))
    ]


def started(size: int, *command: object, cwd: Path) -> subprocess.Popen[str]:
    """Starts `torchrun --nproc-per-node=SIZE -m COMMAND...`, which a test waits for."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m", *map(str, command)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Returns 5 classes x 12 images of 8 x 8, whose brightness tells the class a little, and a teacher of one epoch."""
    folder = tmp_path_factory.mktemp("ranks")
    random, labels = np.random.default_rng(0), np.repeat(np.arange(CLASSES), 12)
    images = ((random.random((len(labels), 8, 8, 1)) + 0.2 * labels[:, None, None, None]) * 128).astype(np.uint8)
    data = folder / "data.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images[::4], y_test=labels[::4])
    teacher = folder / "teacher.safetensors"
    ddkit.train(teacher, dataset=f"npz:{data}", sets={"teacher.width": 8, "teacher.depth": 1, "teacher.norm": "batch", "train.epochs": 1})
    return World(data, teacher, folder)


def cases_of(world: World) -> dict[str, dict[str, Any]]:
    common = {"dataset": f"npz:{world.data}", "teacher": str(world.teacher), "ipc": 2, "pipc": 6}
    steps = common | {"steps": STEPS}
    found = {
        name: steps | {"losses": losses, "sets": TINY | sets} | {key: sets[key] for key in ("ipc",) if key in sets}
        for name, (losses, sets) in EACH_LOSS.items()
    }
    found |= {name: steps | {"recipe": name, "sets": TINY} for name in EACH_RECIPE}
    heavy = {"losses.feature-regression.weight": 10.0}
    found[HEAVY] = steps | {"recipe": "practical-plus", "sets": TINY | heavy}
    found["practical-plus"]["steps"] = 2  # a steep one: sums in another order make a difference of 2e-4 after 5
    found["dc"]["sets"] = TINY | {"network.inner_epochs": 1}  # 50 take a minute
    found["datadam"]["sets"] = TINY | {"network.depth": 2}  # attention is of all layers but the last
    found |= {f"start {name}": common | {"steps": 0, "losses": "dm", "init": name, "sets": TINY} for name in EACH_START}
    judge = {"dataset": f"npz:{world.data}", "pipc": 6, "evaluators": "accuracy,spectrum", "repeats": 3}
    judge["sets"] = {f"evaluators.accuracy.{key}": value for key, value in {"epochs": 2, "model_options.width": 8, "cache": False}.items()}
    found["start real"]["evaluate"] = judge
    pictures = world.folder / "pictures"
    if not pictures.is_dir():
        write_image_folder(pictures)
    found["files"] = {"dataset": f"imagefolder:{pictures}", "losses": "dm", "ipc": 1, "pipc": 4, "steps": 2, "sets": TINY}
    whole = world.folder / "whole.py"
    whole.write_text(
        "import ddkit\nclass Whole(ddkit.Loss):\n    requires = ddkit.Requires()\n"
        "    def __call__(self, step):\n        return step.images.std()\n"
    )
    found["a loss of the whole set"] = steps | {"losses": "whole", "sets": TINY, "plugin": str(whole)}
    found["fourier"] = steps | {"losses": "dm,dkkt", "ipc": 1, "sets": TINY | {"parametrization": "fourier"}}
    bases = {"parametrization": "bases", "parametrization.decoder": True, "initializer.reuse": True}
    found["bases"] = steps | {"losses": "dm", "ipc": 1, "sets": TINY | bases}
    found["whitened"] = {**steps, "teacher": None, "losses": "dm", "sets": TINY | {"data.whiten": True}}  # the teacher saw plain images
    return found


@pytest.fixture(scope="module")
def results(world: World, forks: Any) -> Path:
    """Returns the folder in which 1, 2 and 3 processes, the latter two at the same time, worked off every case that is no slow test."""
    cases = {name: case for name, case in cases_of(world).items() if name not in SLOW}
    (world.folder / "cases.json").write_text(json.dumps(cases))
    left_out = json.dumps([*SLOW_IN_THREE, *(f"start {name}" for name in EACH_START if (3, name) not in STARTS)])
    group = forked(forks, 2, "tests.ranked", world.folder, cwd=ROOT) + forked(forks, 3, "tests.ranked", world.folder, left_out, cwd=ROOT)
    try:
        work(world.folder, {name: case for name, case in cases.items() if "plugin" not in case}, distributed=False)
        for process in group:
            _, said = process.communicate()
            assert process.returncode == 0, said
    finally:
        for process in group:
            process.kill()
    return world.folder


def tensors_of(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "synthetic.safetensors")[0]


def losses_of(run: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value["raw"] for line in lines for name, value in line["losses"].items()}


def check_same(one: Path, several: Path) -> None:
    """Fails where two runs differ by more than sums in another order do."""
    wanted, found = tensors_of(one), tensors_of(several)
    assert wanted.keys() == found.keys()
    gaps = {key: float((wanted[key].double() - found[key].double()).abs().max()) for key in wanted}
    assert max(gaps.values()) < IMAGES, gaps
    assert losses_of(several) == pytest.approx(losses_of(one), rel=LOSSES, abs=1e-6)


@pytest.mark.parametrize("name", IN_TWO)
def test_the_result_of_two_processes_is_that_of_one(results: Path, name: str) -> None:
    check_same(results / "1" / name, results / "2" / name)


@pytest.mark.parametrize("name", IN_THREE)
def test_the_result_of_three_processes_is_that_of_one(results: Path, name: str) -> None:
    check_same(results / "1" / name, results / "3" / name)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_in_several_processes(world: World, results: Path, size: int) -> None:
    cases, names = cases_of(world), SLOW if size == 2 else SLOW_IN_THREE
    work(world.folder, {name: cases[name] for name in names if not (results / "1" / name).is_dir()}, distributed=False)
    (world.folder / "cases.json").write_text(json.dumps({name: cases[name] for name in names}))
    group = started(size, "tests.ranked", world.folder, cwd=ROOT)
    _, said = group.communicate(timeout=600)
    assert group.returncode == 0, said
    for name in names:
        check_same(results / "1" / name, results / str(size) / name)


def test_other_networks_would_be_told_apart(results: Path) -> None:
    wanted, other = tensors_of(results / "1" / "dm"), tensors_of(results / "1" / "networks of experts")
    assert float((wanted["images"] - other["images"]).abs().max()) > 100 * IMAGES


@pytest.mark.parametrize(("size", "name"), STARTS)
def test_the_set_begins_bit_for_bit_the_same(results: Path, size: int, name: str) -> None:
    wanted, found = (tensors_of(results / number / f"start {name}")["images"] for number in ("1", str(size)))
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("size", SIZES)
def test_a_process_opens_the_images_of_its_own_classes_alone(results: Path, size: int) -> None:
    opened = [json.loads((results / str(size) / f"files.opened-{rank}").read_text()) for rank in range(size)]
    manifest = json.loads((results / str(size) / "files" / "manifest.json").read_text())
    accessible = {str(results / "pictures" / name) for name in manifest["real_files"]}
    assert {file for files in opened for file in files} == accessible
    classes = [{Path(file).parent.name for file in files} for files in opened]
    assert all(not one & other for number, one in enumerate(classes) for other in classes[:number])
    assert json.loads((results / "1" / "files.opened-1").read_text()) == sorted(accessible)


@pytest.mark.parametrize("size", SIZES)
def test_networks_are_trained_in_shares_and_every_process_knows_all_rows(results: Path, size: int) -> None:
    wanted = json.loads((results / "1" / "start real.rows-1").read_text())
    assert [row["evaluator"] for row in wanted] == ["accuracy", "spectrum"]
    trained = [len(json.loads((results / str(size) / f"start real.trained-{rank}").read_text())) for rank in range(size)]
    assert sum(trained) == 6, "three on the set, three on random real images"
    assert max(trained) - min(trained) <= 1
    for rank in range(size):
        assert json.loads((results / str(size) / f"start real.rows-{rank}").read_text()) == wanted


@pytest.mark.parametrize("size", SIZES)
def test_what_cannot_be_shared_is_refused_in_every_process(results: Path, size: int) -> None:
    for name, told in REFUSED.items():
        for rank in range(size):
            code, _, message = (results / str(size) / f"{name}.error-{rank}").read_text().partition(" ")
            assert code == "4"
            assert told in message
        assert not (results / str(size) / name).exists(), "nothing half-written is left"


def test_a_plan_refuses_what_the_run_would(world: World) -> None:
    loss = resolve("dm", dataset=f"npz:{world.data}", ipc=2, pipc=6)
    plans = in_parts(2, lambda part: planned(loss, Place("cpu", part, ())))
    rates = [plan["estimate"].pop("operations_per_second") * plan["estimate"].pop("seconds") for plan in plans]  # each measures its own
    assert rates[0] == pytest.approx(rates[1], rel=0.01)
    assert plans[0] == plans[1]
    assert (plans[0]["processes"], plans[0]["accessible_images"], len(plans[0]["classes"])) == (2, 30, 5), "of the whole, not of a part"
    with pytest.raises(InputError, match=r"6 processes were started for 5 classes"):
        in_parts(6, lambda part: planned(loss, Place("cpu", part, ())))


def test_what_is_exchanged_is_what_the_losses_need(results: Path) -> None:
    exchanged = json.loads((results / "2" / "every loss" / "manifest.json").read_text())["processes"]["exchanged_bytes"]
    asking = {"dkkt-stationarity", "feature-regression", "batch-norm-statistics", "class-centres", "classification"}
    assert asking | {"real images", "values", "gathering", "control"} == set(exchanged)
    only = json.loads((results / "2" / "dm" / "manifest.json").read_text())["processes"]["exchanged_bytes"]
    assert {"values", "gathering", "control"} == set(only)
    logged = len((results / "2" / "dm" / "metrics.jsonl").read_text().splitlines())
    assert only["values"] == STEPS * 8 + logged * 4, "distribution matching needs its value alone, and what is logged"


# Faults, through the command


def flags_of(world: World, *, steps: int) -> list[str]:
    sets = TINY | {"engine.checkpoint_every": 10, "engine.log_every": 10}
    flags = ["--losses", "dm,dkkt", "--dataset", f"npz:{world.data}", "--teacher", world.teacher, "--ipc", 2, "--pipc", 6, "--steps", steps]
    return [
        str(flag) for flag in [*flags, "--evaluate", "none", *(part for key, value in sets.items() for part in ("--set", f"{key}={value}"))]
    ]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def complete_after(run: Path, step: int) -> bool:
    return any(int(file.name[5:13]) >= step for file in (run / "checkpoints").glob("step-*.safetensors"))


def test_a_killed_process_ends_the_others_and_any_number_of_processes_go_on(world: World, cli: Cli, forks: Any, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", 100_000
    first, second = forked(forks, 2, "ddkit", "distill", *flags_of(world, steps=steps), "--out", out, cwd=tmp_path)
    wait_for(lambda: complete_after(out, 20))
    second.kill()
    second.communicate()
    began = time.monotonic()
    printed, said = first.communicate()
    assert time.monotonic() - began < 20, "within seconds, on a busy machine too"
    assert first.returncode == 1
    assert printed == "", "data is only printed where there is some"
    assert said.count("ddkit: ") == 1, said
    assert "Another process of this run has ended" in " ".join(said.split())
    assert not (out / "manifest.json").exists()
    newest = max(int(file.name[5:13]) for file in (out / "checkpoints").glob("step-*.safetensors"))
    assert newest >= 20
    ends = newest + 20
    going_on = cli("distill", "--resume", "--out", out, "--steps", ends, "--device", "cpu")
    assert going_on.code == 0, going_on.err
    undisturbed = cli("distill", *flags_of(world, steps=ends), "--out", tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed.err
    check_same(tmp_path / "whole", out)


def test_a_run_of_one_process_is_continued_by_two_and_only_the_first_prints(world: World, cli: Cli, forks: Any, tmp_path: Path) -> None:
    for name, steps in (("whole", 30), ("run", 10)):
        assert cli("distill", *flags_of(world, steps=steps), "--out", tmp_path / name).code == 0
    group = forked(forks, 2, "ddkit", "distill", "--resume", "--out", tmp_path / "run", "--steps", 30, "--json", cwd=tmp_path)
    (printed, said), (second, also_said) = (process.communicate() for process in group)
    assert [process.returncode for process in group] == [0, 0], said + also_said
    assert json.loads(printed)["steps"] == 30
    assert second == ""
    check_same(tmp_path / "whole", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["processes"]["count"] == 2
    assert sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000020.safetensors", "step-00000030.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for the processes in /proc")
def test_under_torchrun_too_a_killed_process_ends_the_others_with_one_message(world: World, tmp_path: Path) -> None:
    group = started(2, "ddkit", "distill", *flags_of(world, steps=100_000), "--out", tmp_path / "run", cwd=tmp_path)
    wait_for(lambda: complete_after(tmp_path / "run", 20))
    children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    (second,) = [child for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    printed, said = group.communicate(timeout=60)
    assert (group.returncode, printed, said.count("ddkit: ")) == (1, "", 1), said


@pytest.mark.slow
def test_a_request_to_end_is_heard_by_all_at_one_step(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    group = started(2, "ddkit", "distill", *flags_of(world, steps=100_000), "--out", out, cwd=tmp_path)
    wait_for(lambda: complete_after(out, 10))
    group.send_signal(signal.SIGTERM)
    _, said = group.communicate(timeout=60)
    told = " ".join(said.split())
    assert told.count("ddkit: Interrupted after step") == 1, said
    step = int(told.split("Interrupted after step ")[1].split(" ")[0])
    assert (out / "checkpoints" / f"step-{step:08d}.safetensors").is_file()


@pytest.mark.slow
def test_without_torchrun_too_the_process_that_knows_the_cause_tells_it(forks: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "import os, ddkit\nclass Bad(ddkit.Loss):\n    requires = ddkit.Requires(reduce='mean')\n"
        "    def __call__(self, step):\n        if step.index == 2 and os.environ['RANK'] == '1':\n"
        "            raise ValueError('only here')\n        return step.images.square().mean()\n"
    )
    flags = ["--plugin", "bad.py", "--losses", "bad", "--ipc", "1", "--pipc", "2", "--steps", "5", "--evaluate", "none", "--out", "run"]
    first, second = (process.communicate()[1] for process in forked(forks, 2, "ddkit", "distill", *flags, cwd=tmp_path))
    assert first.count("ddkit: ") == 0, first
    assert "raised ValueError: only here" in second


@pytest.mark.slow
def test_bad_input_is_told_once(tmp_path: Path, world: World) -> None:
    group = started(2, "ddkit", "distill", *flags_of(world, steps=1), "--losses", "nothing", cwd=tmp_path)
    printed, said = group.communicate(timeout=60)
    assert group.returncode == 1, "torchrun's own code; it tells those of the processes"
    assert "exitcode  : 3" in said
    assert printed == ""
    assert said.count("ddkit: ") == 1
    assert not (tmp_path / "runs").exists()


# Who owns what


def test_classes_are_dealt_out_in_ranges_that_differ_by_one_at_most() -> None:
    for size in range(1, 8):
        for classes in range(size, 30):
            parts = in_parts(size, lambda part: part.classes(classes))  # noqa: B023 (called at once)
            assert [label for part in parts for label in part] == list(range(classes))
            assert {len(part) for part in parts} <= {classes // size, -(-classes // size)}


def test_what_differs_between_processes_is_named() -> None:
    in_parts(3, lambda part: part.check_same("The recipe", {"seed": 0}))
    with pytest.raises(InputError, match=r"The recipe of process 1 and of process 0 differ: seed is 1 in process 1 and 0 in process 0\."):
        in_parts(2, lambda part: part.check_same("The recipe", {"ipc": 1, "seed": part.rank}))
    with pytest.raises(InputError, match=r"process 2 and of process 0 differ: 'c' in process 2 and 'a' in process 0\."):
        in_parts(3, lambda part: part.check_same("The teacher", "aac"[part.rank]))


def test_initial_values_of_the_whole_set_have_to_agree() -> None:
    def initial(self: Any, step: ddkit.Step) -> dict[str, Tensor]:
        return {"gain": step.images.mean()}

    members = {"requires": ddkit.Requires(reduce="sum", parameters={"gain": ddkit.Parameter(per="set")}), "initial": initial}
    loss = type("Gain", (ddkit.Loss,), members | {"__call__": lambda self, step: (step.parameters["gain"] * step.images).sum()})
    world = testing_world.World(loss(), Setting())
    in_parts(1, lambda part: part_of(world, part).engine().start())
    with pytest.raises(InputError, match="The initial value of 'gain'"):
        in_parts(2, lambda part: part_of(world, part).engine().start())


def test_a_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [ddkit_distributed.own_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(FlagError, match="--device cuda:0: under torchrun"):
        ddkit_distributed.own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FlagError, match="--nproc-per-node=1"):
        ddkit_distributed.own_device("cuda")


def test_the_chunks_of_a_run_do_not_depend_on_its_processes() -> None:
    """A run that was begun by many, each with few classes, may go on in one, which has them all to fit into engine.memory."""
    recipe = resolve(None, losses="dm", ipc=10, pipc=10, evaluators="none", sets=[("engine.memory", 8)])
    alone = RunSetup(recipe, device="cpu")
    assert 5 <= alone.decided.chunk < 10, "half of the classes would fit"
    half = RunSetup(recipe, device="cpu", ranks=Half())
    assert half.own_classes == range(5)
    assert resolved(half) == resolved(alone)


class Half(ddkit_distributed.Ranks):
    """The first of two processes, as far as a job needs the other."""

    world_size = 2

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, value]


def test_a_group_of_the_program_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that distils many times would else run out of connections."""
    for name, value in zip(ddkit_distributed.LAUNCHED, ("0", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for _ in range(3):
            with ddkit_distributed.group() as made:
                made.barrier()
            assert distributed.is_initialized()
            assert distributed.distributed_c10d._world.pg_map.keys() == {distributed.group.WORLD}
    finally:
        distributed.destroy_process_group()
