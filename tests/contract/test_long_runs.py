"""Long runs: memory does not grow, numbers stay finite in bfloat16, what explodes is stopped by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import ddkit
from ddkit.components import registry

EVERY_LOSS = ",".join(sorted(p.name for p in registry.plugins() if p.kind == "loss" and p.first_party))
MIB = 2**20


class Resident:
    """An observer that notes the resident size of this process in MiB, every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every, self.sizes = every, {}  # type: ignore[var-annotated]

    @ddkit.hookimpl
    def step_finished(self, index: int) -> None:
        if index % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.sizes[index] = pages * os.sysconf("SC_PAGE_SIZE") / MIB


class Leaks:
    """An observer that keeps four MiB of every step, more than earlier tests can have left free."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    @ddkit.hookimpl
    def step_finished(self, index: int) -> None:
        self.kept.append(bytes([index % 256]) * 4 * MIB)


def growth(tmp_path: Path, steps: int, warm: int, *others: Any, width: int = 8) -> float:
    """Returns by how many MiB a run of every loss on the digits grows between step `warm` and the last."""
    seen = Resident(max(1, steps // 20))
    sets = {"train.epochs": 1, "teacher.width": width, "network.width": width, "engine.log_every": 10, "engine.checkpoint_every": 50}
    ddkit.distill(
        losses=EVERY_LOSS, pipc=10, steps=steps, evaluators="none", sets=sets, out=tmp_path / "run", device="cpu", observers=[*others, seen]
    )
    after = [size for index, size in seen.sizes.items() if index >= warm]
    return max(after) - after[0]


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")


@needs_proc
def test_memory_is_flat_after_the_first_steps(tmp_path: Path) -> None:
    assert growth(tmp_path, 100, 40) < 4


@needs_proc
def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    assert growth(tmp_path, 100, 40, Leaks()) > 10


@pytest.mark.slow
@needs_proc
def test_memory_is_flat_over_two_thousand_steps_of_every_loss(tmp_path: Path) -> None:
    assert growth(tmp_path, 2000, 200, width=32) < 8


@pytest.mark.parametrize("name", EVERY_LOSS.split(","))
def test_numbers_stay_finite_in_bfloat16(tmp_path: Path, name: str) -> None:
    sets = {"train.epochs": 1, "teacher.width": 8, "network.width": 8, "engine.precision": "bfloat16", "engine.log_every": 1}
    ddkit.distill(losses=name, pipc=5, steps=30, evaluators="none", sets=sets, out=tmp_path / "run", device="cpu")
    assert bool(ddkit.load(tmp_path / "run").images.isfinite().all())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 30


def test_a_run_that_explodes_names_the_step_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    sets = {"network.width": 8, "optimizer.images.lr": 1e30, "optimizer.images.kind": "sgd", "engine.checkpoint_every": 100}
    with pytest.raises(ddkit.RunFailed, match=r"step \d+") as caught:
        ddkit.distill(losses="dm", pipc=5, steps=50, evaluators="none", sets=sets, out=tmp_path / "run", device="cpu")
    step = int(str(caught.value).partition("step ")[2].split()[0].rstrip("."))
    from ddkit.run.directory import RunDirectory

    newest = RunDirectory(tmp_path / "run").newest_checkpoint()
    assert newest is not None
    assert newest[0] == step
    assert all(bool(tensor.isfinite().all()) for tensor in newest[1].values() if tensor.is_floating_point())
