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


def test_two_fresh_processes_with_the_losses_in_another_order_give_the_same_bytes_as_a_rerun_and_another_seed_does_not(
    tmp_path: Path,
) -> None:
    first = in_a_process(tmp_path, "dm,dkkt-primal:0.5,dkkt-stationarity:0.1,gm,total-variation:0.01")
    second = in_a_process(tmp_path, "total-variation:0.01,gm,dkkt-stationarity:0.1,dm,dkkt-primal:0.5", hash_seed="1")
    recipe = str(tmp_path / "0" / "recipe.toml")
    for name, seed in (("again", None), ("other", 1)):
        ddkit.distill(recipe, seed=seed, out=tmp_path / name, device="cpu")
    assert first == second == digest(tmp_path / "again")
    assert first != digest(tmp_path / "other")


@pytest.mark.slow
def test_a_compiled_bfloat16_run_gives_the_same_bytes_in_two_fresh_processes(tmp_path: Path) -> None:
    flags = ("--set", "engine.compile=true", "--set", "engine.precision=bfloat16")
    assert in_a_process(tmp_path, "dm", *flags) == in_a_process(tmp_path, "dm", *flags, hash_seed="1")
