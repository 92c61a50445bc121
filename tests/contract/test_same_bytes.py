"""The same recipe, seed, device, threads and versions give the same bytes: in fresh processes, and in whatever order losses are named."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddkit

SETS = {"steps": 4, "train.epochs": 1, "teacher.width": 8, "network.width": 8}


def digest(path: Path) -> str:
    return hashlib.sha256((path / "synthetic.safetensors").read_bytes()).hexdigest()


def in_a_process(folder: Path, losses: str, *flags: str, hash_seed: str = "0") -> str:
    """Returns the sha256 of the set that a fresh process makes; `hash_seed` changes the order of Python's sets and hashes."""
    sets = [part for path, value in SETS.items() for part in ("--set", f"{path}={value}")]
    command = [
        sys.executable,
        "-m",
        "ddkit",
        *f"distill --losses {losses} --pipc 3 --evaluate none --out {hash_seed}".split(),
        *sets,
        *flags,
    ]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return digest(folder / hash_seed)


def test_a_fresh_process_gives_the_bytes_of_this_one_with_losses_in_another_order_and_of_a_rerun_and_another_seed_does_not(
    tmp_path: Path,
) -> None:
    losses = "dm,dkkt-primal:0.5,dkkt-stationarity:0.1,gm,total-variation:0.01"
    first, recipe = in_a_process(tmp_path, losses), str(tmp_path / "0" / "recipe.toml")
    turned = ",".join(losses.split(",")[::-1])
    ddkit.distill(losses=turned, pipc=3, evaluators="none", sets=SETS, out=tmp_path / "turned", device="cpu")
    for name, seed in (("again", None), ("other", 1)):
        ddkit.distill(recipe, seed=seed, out=tmp_path / name, device="cpu")
    assert first == digest(tmp_path / "turned") == digest(tmp_path / "again")
    assert first != digest(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize(("losses", "sets"), [("dm,dkkt,gm", ()), ("dm", ("engine.compile=true", "engine.precision=bfloat16"))])
def test_two_fresh_processes_give_the_same_bytes(tmp_path: Path, losses: str, sets: tuple[str, ...]) -> None:
    flags = [part for each in sets for part in ("--set", each)]
    assert in_a_process(tmp_path, losses, *flags) == in_a_process(tmp_path, losses, *flags, hash_seed="1")
