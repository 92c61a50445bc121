"""Long runs: memory does not grow, and numbers stay finite in bfloat16."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ddkit
from ddkit.components import registry
from ddkit.run.directory import RunDirectory

EVERY_LOSS = ",".join(sorted(p.name for p in registry.plugins() if p.kind == "loss" and p.first_party))
MIB = 2**20
NARROW = {"train.epochs": 1, "teacher.width": 8, "network.width": 8}
SHORT = {"losses.trajectory.steps": 1, "losses.unrolled.epochs": 1, "experts.count": 1, "experts.epochs": 2}


class Steps:
    """An observer that calls a function with the number of each step."""

    def __init__(self, seen: Callable[[int], object]) -> None:
        self.seen = seen

    @ddkit.hookimpl
    def step_finished(self, index: int) -> None:
        self.seen(index)


def run(folder: Path, losses: str, sets: dict[str, Any], **given: Any) -> RunDirectory:
    """Returns the folder of a run on the digits, not evaluated."""
    ddkit.distill(losses=losses, evaluators="none", sets=sets, out=folder / "run", device="cpu", **given)
    return RunDirectory(folder / "run")


def growth(folder: Path, steps: int, warm: int, *others: Any, width: int = 8, losses: str = EVERY_LOSS) -> float:
    """Returns by how many MiB a run of `losses` grows between step `warm` and the last."""
    sizes: list[float] = []

    def look(index: int) -> None:
        if index >= warm and index % max(1, steps // 20) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / MIB)

    sets = (
        NARROW
        | (SHORT if losses == EVERY_LOSS else {})
        | {"teacher.width": width, "network.width": width, "engine.log_every": 10, "engine.checkpoint_every": 50}
    )
    run(folder, losses, sets, pipc=10, steps=steps, observers=[*others, Steps(look)])
    return max(sizes) - sizes[0]


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")


@needs_proc
@pytest.mark.parametrize(
    ("steps", "warm", "width", "most", "losses"),
    [(100, 40, 8, 4, "dm,dkkt,gm"), pytest.param(2000, 200, 32, 8, EVERY_LOSS, marks=pytest.mark.slow)],
    ids=["100", "2000"],
)
def test_memory_is_flat_after_the_first_steps(tmp_path: Path, steps: int, warm: int, width: int, most: float, losses: str) -> None:
    assert growth(tmp_path, steps, warm, width=width, losses=losses) < most


@needs_proc
def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    kept: list[bytes] = []  # four MiB of every step, more than earlier tests can have left free
    assert growth(tmp_path, 100, 40, Steps(lambda index: kept.append(bytes([index % 256]) * 4 * MIB)), losses="dm") > 10


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("dm", "dkkt-stationarity", "gm"))) for name in EVERY_LOSS.split(",")],
)
def test_numbers_stay_finite_in_bfloat16(tmp_path: Path, name: str) -> None:
    directory = run(tmp_path, name, NARROW | {"engine.precision": "bfloat16", "engine.log_every": 1}, pipc=5, steps=30)
    assert bool(ddkit.load(directory.path).images.isfinite().all())
    assert len((directory.path / "metrics.jsonl").read_text().splitlines()) == 30
