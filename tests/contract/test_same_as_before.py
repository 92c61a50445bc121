"""The same commands give the same images and figures as before the packages were rebuilt.

The code of the commit BEFORE is installed into a folder of its own, and every command runs with it and with the working tree, each with
a cache of its own. Kept until the rebuilding ends; it runs before every larger commit: `python -m pytest -m slow -k same_as_before`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import write_image_folder

ROOT = Path(__file__).parents[2]
BEFORE = "63eff848cbc2d2c4a65cc5819f9081a8f6bdf7ca"
FEW = "--pipc 5 --set train.epochs=1 --set engine.log_every=1 --seed 3"
NONE = f"{FEW} --evaluate none"
COMMANDS = {  # name of the run: its command; a later one may use an earlier run
    "dm": f"distill --losses dm --ipc 2 --steps 4 {NONE}",
    "dkkt": f"distill --losses dm,dkkt --ipc 1 --steps 4 {NONE}",
    "priors": f"distill --losses dm,total-variation,image-norm --ipc 1 --steps 3 --init noise --augment none {NONE}",
    "gm": f"distill --recipe dc --dataset digits --ipc 2 --steps 4 {NONE}",
    "regression": f"distill --losses dm,feature-regression --ipc 1 --steps 3 --augment dsv {NONE}",
    "practical": f"distill --recipe practical --dataset digits --ipc 1 --steps 3 {NONE}",
    "practical-plus": f"distill --recipe practical-plus --dataset digits --ipc 1 --steps 3 {NONE}",
    "kmeans": f"distill --losses dm --ipc 2 --steps 0 --init kmeans {NONE}",
    "herding": f"distill --losses dm --ipc 2 --steps 0 --init herding {NONE}",
    "k-center": f"distill --losses dm --ipc 2 --steps 0 --init k-center {NONE}",
    "mix": f"distill --losses dm --ipc 1 --steps 2 --init mix {NONE}",
    "multiplier": f"distill --losses dm --ipc 1 --steps 2 --init multiplier {NONE}",
    "folder": f"distill --losses dm,dkkt --dataset imagefolder:photos --ipc 1 --steps 3 --set train.batch=4 {NONE}",
    "chunks": f"distill --losses dm,dkkt --ipc 1 --steps 3 --set engine.chunk=4 {NONE}",
    "evaluated": f"distill --losses dm --ipc 2 --steps 2 {FEW} --set evaluators.accuracy.epochs=3",
    "longer": f"distill --losses dm,dkkt --ipc 1 --steps 2 {NONE}",
    "blend": "blend dm kmeans --alpha 0.25",
}
AFTERWARDS = {  # what they print is compared
    "resumed": "distill --resume --out longer --steps 5 --json",
    "judged": "evaluate dm --evaluate accuracy --model convnet,mlp --repeats 2 --set evaluators.accuracy.epochs=3 --json",
    "exported": "export dm --to npz --out exported --json",
}


def _run(path: list[Path], folder: Path, command: str, *, processes: int = 1) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "DDKIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"}
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "ddkit", *shlex.split(command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def _results(path: list[Path], folder: Path) -> dict[str, Any]:
    """Returns the tensors of every run as bytes, and what the commands after them tell."""
    folder.mkdir()
    write_image_folder(folder / "photos", size=(12, 10))
    for name, command in COMMANDS.items():
        _run(path, folder, f"{command} --out {name}")
    _run(path, folder, f"distill --losses dm,dkkt --ipc 1 --steps 3 {NONE} --out two", processes=2)
    told = {name: json.loads(_run(path, folder, command)) for name, command in AFTERWARDS.items()}
    found: dict[str, Any] = {"resumed": "longer", "judged": _figures(told["judged"]["evaluations"])}
    found["exported"] = [entry["sha256"] for entry in told["exported"]["files"] if entry["name"].endswith(".npz")]
    found["evaluated"] = _figures(json.loads((folder / "evaluated" / "evaluation.json").read_text())["evaluations"])
    for name in [*COMMANDS, "two"]:
        tensors = load_file(folder / name / "synthetic.safetensors")
        found[f"{name} tensors"] = {key: (tuple(value.shape), value.numpy().tobytes()) for key, value in sorted(tensors.items())}
    return found


def _figures(rows: list[dict[str, Any]]) -> list[Any]:
    return [[row["model"], row["protocol"], row["images"], row["details"]["accuracies"], row["random_real_mean"]] for row in rows]


@pytest.mark.slow
def test_every_command_gives_the_bytes_that_it_gave_before(tmp_path: Path) -> None:
    if subprocess.run(["git", "cat-file", "-e", BEFORE], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("the history of the project is not here")
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(installed), str(source)]
    subprocess.run(pip, check=True)
    before = _results([installed], tmp_path / "before")
    now = _results([ROOT, ROOT / "plugins"], tmp_path / "now")
    different = [name for name in before if before[name] != now[name]]
    assert different == []
    assert before["dm tensors"] != before["kmeans tensors"], "the comparison can fail"
