"""What a GPU has to show, in one table: it computes what the CPU does, the loop never waits for it, and how fast it is.

    python -m tests.check_gpu                 `make check-gpu`; without a GPU it says so and ends with 0
    python -m tests.check_gpu --device cpu    a dry run: the CPU equals itself, and there is nothing to wait for

Ends with 1 if a check failed, or if the time was up before all were done.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import cosine_similarity

import ddkit
from ddkit import bench
from ddkit.engine.loop import Engine, Finiteness
from ddkit.nn.compiling import Arithmetic
from ddkit.nn.device import products
from ddkit.nn.networks import build_network
from ddkit.nn.training import Schedule, fit
from ddkit.recipes.resolve import select_losses
from tests.engine.test_fast_path import INFO, LOOP_LOSSES, PLAIN, bank, draw, model, real, source, terms

SECONDS = 470  # of the eight minutes
SPEED = ("dm", "dkkt", "dm,dkkt", "gm", "feature-regression")  # whose speed is measured
OTHERS = ",".join(name for name in LOOP_LOSSES if name not in select_losses(",".join(("dm,dkkt", *SPEED[3:])), {}, {}))
COMPILED = Arithmetic(compile=True, precision="bfloat16")
GRAPHS = Arithmetic(compile=True, precision="bfloat16", graphs=True)
CPU = torch.device("cpu")


class TimeUpError(BaseException):
    """The time is up; no Exception, as code that tries to compile goes on after those."""


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Inside, whatever makes the host wait for a GPU is an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def engine_on(device: torch.device, losses: str, *, arithmetic: Arithmetic = PLAIN) -> Engine:
    """Returns an engine of two small images in each of three classes."""
    module = build_network(model(norm="batch"), INFO, 0, "teacher").to(device)
    teacher = ddkit.nn.Teacher(module, mean=(0.5,) * 3, std=(0.25,) * 3)
    made = terms(*select_losses(losses, {}, {}))
    declared = {name: spec for each in made for name, spec in each.loss.requires.parameters.items()}
    labels = torch.arange(3).repeat_interleave(2)
    images = bank(torch.randn((6, *INFO.shape), generator=draw()).to(device), labels.to(device), 0.1, declared)
    engine = Engine(images, source(teacher=teacher, device=device, batch=4, arithmetic=arithmetic), made)
    engine.start()
    return engine


def difference(found: Tensor, right: Tensor) -> float:
    """Returns the largest difference, as a part of the largest value."""
    return float((found.cpu() - right).abs().max() / right.abs().max().clamp_min(1e-12))


def step_error(losses: str, device: torch.device) -> float:
    """Returns the largest difference of values and gradients of one plain step from those of the CPU."""
    with products(device, "float32"):
        right, found = (engine_on(each, losses).evaluate(3) for each in (CPU, device))
    pairs = [(getattr(found, part)[name], value) for part in ("values", "gradients") for name, value in getattr(right, part).items()]
    return max(difference(*pair) for pair in pairs)


def compiled_cosine(losses: str, device: torch.device) -> float:
    """Returns the smallest cosine of the images' gradients, compiled and plain, over six steps: graphs are recorded in the first ones."""
    plain = engine_on(device, losses)
    engines = [engine_on(device, losses, arithmetic=each) for each in _fast(device)]
    cosines = []
    for index in range(6):
        right = plain.evaluate(index).gradients
        for engine in engines:
            found = engine.evaluate(index).gradients["images"]
            cosines.append(cosine_similarity(found.flatten(), right["images"].flatten(), 0))
            engine.bank.update(right)
        plain.bank.update(right)
    return float(torch.stack(cosines).min())


def step_waits(losses: str, device: torch.device) -> str:
    """Returns "none"; raises if a step waits for the device, plain or compiled. A CPU has no waits, "-"."""
    for arithmetic in (PLAIN, *_fast(device)):
        engine = engine_on(device, losses, arithmetic=arithmetic)
        guard = Finiteness(engine, 0, lambda index: None)
        for index in range(4):  # what is made once, compiled or recorded may wait
            engine.evaluate(index, measured=True)
        with refusing_to_wait(device):
            for index in range(4, 7):
                found = engine.evaluate(index, measured=True)
                engine.bank.update(found.gradients)
                guard.note(index, found)
        guard.check(7)
    return _no_waits(device)


def _no_waits(device: torch.device) -> str:
    return "none" if device.type == "cuda" else "-"


def _fast(device: torch.device) -> list[Arithmetic]:
    return [COMPILED, GRAPHS] if device.type == "cuda" else [COMPILED]


def trained(device: torch.device, *, epochs: int = 3) -> Tensor:
    """Returns the weights (n,) of a network that an evaluation trained on the device, without waiting for it."""
    module = build_network(model(), INFO, 0, "evaluated").to(device)
    images, labels = (each.to(device) for each in real())
    dsa = ddkit.create("augmenter", "dsa", data=INFO)
    images = images / 255 - 0.5
    with products(device, "float32"), refusing_to_wait(device):
        fit(module, images, labels, Schedule(epochs=epochs, batch=6), augmenter=dsa, generator=draw())
    return torch.cat([each.detach().flatten() for each in module.parameters()])


def evaluation_error(device: torch.device) -> float:
    """Returns the largest difference of the trained weights from those of the CPU."""
    return difference(trained(device), trained(CPU))


def waiting_is_noticed(device: torch.device) -> str:
    """Returns "yes"; raises if reading a value back is no error where it has to be."""
    try:
        with refusing_to_wait(device):
            float(torch.ones(1, device=device))
    except RuntimeError:
        return "yes"
    raise ddkit.RunFailed("Reading a value back was not noticed, so 'waits' says nothing.")


def tests_marked_gpu() -> str:
    """Returns the last line of pytest for the other tests that need a GPU; raises if one failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/contract/test_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        raise ddkit.RunFailed(done.stdout[-3000:])
    return last


class Checks:
    """The table, row by row, and what failed."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}
        self.failed: list[str] = []
        self.current = ""
        self.began = time.perf_counter()

    def run(self, row: str, column: str, measure: Callable[[], Any], form: str = "{}", holds: Callable[[Any], bool] = bool) -> Any:
        """Returns what `measure` gives, None if it raises; it fails unless it `holds`."""
        self.current = f"{row}, {column}"
        print(f"{time.perf_counter() - self.began:5.0f} s  {self.current}", file=sys.stderr)
        cells = self.rows.setdefault(row, {"checked": row})
        try:
            value = measure()
        except Exception as error:  # the other checks go on
            cells[column] = "FAILED"
            self.failed.append(f"{self.current}: {type(error).__name__}: {error}")
            return None
        cells[column] = form.format(value)
        if not holds(value):
            cells[column] += " FAILED"
            self.failed.append(f"{self.current}: {cells[column]}")
        return value


def check(checks: Checks, device: torch.device, settings: bench.Settings) -> None:
    """Runs all checks in order: what is computed, waits, speed."""
    if device.type == "cuda":
        checks.run("the check of waits", "waits", partial(waiting_is_noticed, device), "noticed: {}")
    for losses in (*SPEED, OTHERS):
        checks.run(losses, "error", partial(step_error, losses, device), "{:.1e}", lambda value: value < 1e-2)
        checks.run(losses, "cosine compiled", partial(compiled_cosine, losses, device), "{:.4f}", lambda value: value > 0.98)
        checks.run(losses, "waits", partial(step_waits, losses, device))
    if checks.run("evaluation", "error", partial(evaluation_error, device), "{:.1e}", lambda value: value < 1e-2) is not None:
        checks.rows["evaluation"]["waits"] = _no_waits(device)  # waiting is an error there
    if device.type == "cuda":
        checks.run("tests marked gpu", "waits", tests_marked_gpu)
    report = partial(print, file=sys.stderr)
    limit = checks.run("matrix products", "of the limit", partial(bench._limit, str(device), settings), "{[rates][float32]:.2e}/s float32")
    for case in bench.cases(settings) if limit else ():
        measure = partial(bench._step_row, case, settings, {"limits": [limit]}, report)
        row = checks.run(case.losses, "s/step", measure, "{[seconds_per_step]:.4f}")
        if row:
            checks.rows[case.losses] |= {
                "times as fast": f"{row['ratio_to_reference']:.2f}x", "of the limit": f"{row['limit_fraction']:.0%}",
                "peak MiB": f"{row['peak_mib']:.0f}",
            }  # fmt: skip
    measure = partial(bench._evaluation_row, bench.cases(settings)[0], settings, report)
    row = checks.run("evaluation", "s/step", measure, "{[seconds_per_network]:.1f} a network")
    if row:
        checks.rows["evaluation"] |= {"times as fast": f"{row['ratio_to_reference']:.2f}x", "peak MiB": f"{row['peak_mib']:.0f}"}


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table and what failed; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cell", default="10:256", help="ipc:pipc of the speed")
    parser.add_argument("--size", type=int, default=32, help="height and width of its images")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="after which nothing more is checked")
    arguments = parser.parse_args(words)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("check-gpu: no GPU here, so nothing was checked.")
        return 0
    ipc, pipc = map(int, arguments.cell.split(":"))
    device = torch.device(arguments.device)
    settings = bench.Settings(losses=SPEED, cells=((ipc, pipc),), sizes=(arguments.size,), devices=(arguments.device,), runs=1)

    def stop(number: int, frame: Any) -> None:
        raise TimeUpError

    checks = Checks()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(arguments.seconds)
    try:
        check(checks, device, settings)
    except TimeUpError:
        checks.failed.append(f"{checks.current}: {arguments.seconds} s were up; what comes after it was not checked.")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    columns = ("checked", "error", "cosine compiled", "waits", "s/step", "times as fast", "of the limit", "peak MiB")
    lines = [[cells.get(column, "-") for column in columns] for cells in checks.rows.values()]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a dry run"
    print(f"{name}, torch {torch.__version__}; speed at {ipc}:{pipc}, {arguments.size} pixels\n")
    print(tabulate(lines, columns, tablefmt="github", disable_numparse=True))
    print(*(f"FAILED {text}" for text in checks.failed), sep="\n")
    return int(bool(checks.failed))


if __name__ == "__main__":
    sys.exit(main())
