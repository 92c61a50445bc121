"""Where the time of a distillation step goes: torch's profiler over ten steps on random images.

python examples/profile_step.py --ipc 10 --pipc 50
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ddkit

ddkit.nn.tune_process()  # as the command does, before torch is imported

import numpy as np  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from ddkit.engine.loop import Engine, Hooks, distill  # noqa: E402
from ddkit.recipes.resolve import resolve  # noqa: E402
from ddkit.run.setup import RunSetup  # noqa: E402


def made(ipc: int, pipc: int, folder: Path) -> Engine:
    """Returns the engine of a long run of distribution matching on random images of CIFAR-10's size."""
    pixels = np.random.default_rng(0).integers(0, 256, (10 * pipc, 3, 32, 32), dtype=np.uint8)
    np.savez(folder / "random.npz", x_train=pixels, y_train=np.repeat(np.arange(10), pipc))
    recipe = resolve(
        "practical", losses="dm", evaluators="none", dataset=f"npz:{folder / 'random.npz'}", ipc=ipc, pipc=pipc, steps=5000,
        init="noise",
    )  # fmt: skip
    setup = RunSetup(recipe)
    setup.prepare()
    return setup.engine


def advance(engine: Engine, start: int, stop: int) -> None:
    distill(engine, start, stop, Hooks(is_read=lambda index: False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--pipc", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = made(arguments.ipc, arguments.pipc, Path(folder))
    advance(engine, 0, 3)  # compiles
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        advance(engine, 3, 13)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    groups = {"convolutions": 0.0, "between them (compiled)": 0.0}
    for event in events:
        if "convolution" in event.key:
            groups["convolutions"] += event.self_cpu_time_total
        elif "CompiledFxGraph" in event.key:
            groups["between them (compiled)"] += event.self_cpu_time_total
    groups["all the rest"] = total - sum(groups.values())
    for name, microseconds in groups.items():
        print(f"{name:24} {microseconds / 1e4:7.1f} ms a step  {microseconds / total:4.0%}")
    print(events.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))


if __name__ == "__main__":
    main()
