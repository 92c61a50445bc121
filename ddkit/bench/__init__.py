"""`ddkit bench`: how fast the steps, the evaluation and the loading are here, beside plain loops and the machine's limit."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ddkit.errors import FlagError, InputError, PluginError, RunFailed, RunFilesError
from ddkit.run.children import Child, ChildEnded

PARTS = ("steps", "evaluation", "loading", "startup")
Row = dict[str, Any]
Report = Callable[[str], None]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured: the products of losses, cells (ipc, pipc), classes, sizes and devices; `runs` runs of `steps` steps."""

    parts: tuple[str, ...] = ("steps", "evaluation")
    losses: tuple[str, ...] = ("dm",)
    cells: tuple[tuple[int, int], ...] = ((1, 10), (10, 50))
    classes: tuple[int, ...] = (10,)
    sizes: tuple[int, ...] = (32,)
    channels: int = 3
    devices: tuple[str, ...] = ("auto",)
    files: tuple[int, ...] = (1000, 5000, 50_000)
    runs: int = 3
    steps: int = 10
    run_steps: int = 5000
    networks: int = 10
    images_trained: int = 3000
    tests: int = 2000
    plain: bool = True
    sets: tuple[tuple[str, Any], ...] = ()


class Case(NamedTuple):
    """One row of the table of steps."""

    losses: str
    ipc: int
    pipc: int
    classes: int
    size: int
    device: str


def bench(settings: Settings, report: Report = lambda text: None) -> Row:
    """Returns every measurement as data (schema 1); raises DdkitError for what cannot be measured. `report` tells progress."""
    result: Row = {"schema": 1, "cores": os.cpu_count(), "runs": settings.runs}
    with _Workers() as workers:
        if {"steps", "evaluation"} & set(settings.parts):
            result |= {"limits": [_limit(workers, device, settings) for device in settings.devices]}
        if "steps" in settings.parts:
            result["steps"] = _with_exponents([_step_row(workers, case, settings, result, report) for case in cases(settings)])
        if "evaluation" in settings.parts:
            result["evaluation"] = [
                _evaluation_row(workers, case, settings, report)
                for case in dict.fromkeys(case._replace(losses="", pipc=0) for case in cases(settings))
            ]
        if "loading" in settings.parts:
            result["loading"] = _loading_rows(workers, settings, report)
        if "startup" in settings.parts:
            result["startup"] = _startup_rows(settings, report)
    return result


def cases(settings: Settings) -> list[Case]:
    """Returns the rows of the table of steps, in order."""
    return [
        Case(losses, ipc, pipc, classes, size, device)
        for device in settings.devices
        for losses in settings.losses
        for classes in settings.classes
        for size in settings.sizes
        for ipc, pipc in settings.cells
    ]


def _limit(workers: _Workers, device: str, settings: Settings) -> Row:
    worker = workers.start({"kind": "limit", "device": device, "tuned": True})
    found = [worker.measure()["flops_per_second"] for _ in range(settings.runs)]
    worker.stop()
    rates = {name: statistics.median(run[name] for run in found) for name in found[0]}
    return {"device": device, "name": worker.facts["device"], **{key: worker.facts[key] for key in ("threads", "torch")}, "rates": rates}


def _rate(result: Row, device: str, precision: str) -> float:
    rates: dict[str, float] = next(limit["rates"] for limit in result["limits"] if limit["device"] == device)
    return rates.get(precision, rates["float32"])


def _step_row(workers: _Workers, case: Case, settings: Settings, result: Row, report: Report) -> Row:
    report(f"steps: {case.losses}, ipc {case.ipc}, pipc {case.pipc}, {case.classes} classes, {case.size} pixels, {case.device}")
    spec = {
        "kind": "steps", **case._asdict(), "channels": settings.channels, "sets": list(settings.sets), "steps": settings.steps,
        "run_steps": settings.run_steps, "tuned": True, "count": False,
    }  # fmt: skip
    ours = workers.start(spec)
    beside: dict[str, _Worker] = {}
    if settings.plain:
        plain = [["engine.compile", False], ["engine.precision", "float32"], ["engine.block", 0]]
        beside["plain"] = workers.start(spec | {"tuned": False, "count": True, "sets": [*settings.sets, *plain]})
        if case.losses == "dm" and not any(path.split(".")[0] in ("network", "augmenter", "data") for path, _ in settings.sets):
            beside["reference"] = workers.start(spec | {"kind": "reference", "tuned": False})
    rounds = _rounds({"ours": ours, **beside}, settings.runs)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in rounds.items()}
    row = {
        **case._asdict(), "seconds_per_step": statistics.median(seconds["ours"]), "runs": seconds["ours"],
        "steps_per_second": 1 / statistics.median(seconds["ours"]), "peak_mib": rounds["ours"][-1]["peak_mib"],
        **{key: ours.facts[key] for key in ("first_step_seconds", "precision", "compiled", "chunk", "block", "start_mib", "work")},
    }  # fmt: skip
    for name in beside:
        row[f"{name}_seconds_per_step"] = statistics.median(seconds[name])
        row[f"{name}_peak_mib"] = rounds[name][-1]["peak_mib"]
        row[f"ratio_to_{name}"] = _ratio(seconds[name], seconds["ours"])
    if "plain" in beside:
        row["flops"] = beside["plain"].facts["flops"]
        row["limit_fraction"] = row["flops"] / row["seconds_per_step"] / _rate(result, case.device, row["precision"])
    return row


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Returns the median over the runs of their seconds over ours, measured one after the other."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _rounds(workers: dict[str, _Worker], runs: int) -> dict[str, list[Row]]:
    """Returns `runs` measurements of each worker, taken in turn, and ends the workers."""
    found: dict[str, list[Row]] = {name: [] for name in workers}
    for _ in range(runs):
        for name, worker in workers.items():
            found[name].append(worker.measure())
    for worker in workers.values():
        worker.stop()
    return found


AXES = ("ipc", "pipc", "classes", "size")


def _with_exponents(rows: list[Row]) -> list[Row]:
    """Adds to each row whose predecessor differs in one number only the exponents, in that number, of time and of memory.

    `work` is the exponent of the embedder's floating-point operations, which time should follow; memory is what the
    process took beyond its start.
    """
    for before, row in itertools.pairwise(rows):
        differing = [key for key in (*AXES, "losses", "device") if before[key] != row[key]]
        if len(differing) == 1 and differing[0] in AXES:
            span = math.log(row[differing[0]] / before[differing[0]])
            sizes = {key: (before[key], row[key]) for key in ("seconds_per_step", "work")}
            sizes["memory"] = tuple(max(1.0, each["peak_mib"] - each["start_mib"]) for each in (before, row))
            row["exponent"] = {"axis": differing[0]} | {
                key: math.log(new / old) / span if old and new else None for key, (old, new) in sizes.items()
            }
    return rows


def _evaluation_row(workers: _Workers, case: Case, settings: Settings, report: Report) -> Row:
    where = {"ipc": case.ipc, "classes": case.classes, "size": case.size, "device": case.device}
    report(f"evaluation: ipc {case.ipc}, {case.classes} classes, {case.size} pixels, {case.device}")
    spec = {
        "kind": "evaluation", **where, "channels": settings.channels, "networks": settings.networks, "tests": settings.tests,
        "epochs": max(10, settings.images_trained // (case.classes * case.ipc)), "tuned": True,
    }  # fmt: skip
    ours = workers.start(spec)
    beside = {"reference": workers.start(spec | {"kind": "reference-evaluation", "tuned": False})} if settings.plain else {}
    rounds = _rounds({"ours": ours, **beside}, settings.runs)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in rounds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    row: Row = {
        **where, "protocol": "dm-official",
        "networks_per_minute": 60 / median["ours"], "seconds_per_network": median["ours"], "runs": seconds["ours"],
        "epoch_seconds": statistics.median(run["epoch_seconds"] for run in rounds["ours"]),
        "test_seconds": statistics.median(run["test_seconds"] for run in rounds["ours"]),
        "peak_mib": rounds["ours"][-1]["peak_mib"],
        **{key: ours.facts[key] for key in ("first_network_seconds", "precision", "compiled", "workers")},
    }  # fmt: skip
    for name in beside:
        row[f"{name}_seconds_per_network"] = median[name]
        for part in ("epoch_seconds", "test_seconds"):
            row[f"{name}_{part}"] = statistics.median(run[part] for run in rounds[name])
        row[f"ratio_to_{name}"] = _ratio(seconds[name], seconds["ours"])
    return row


def _loading_rows(workers: _Workers, settings: Settings, report: Report) -> list[Row]:
    rows = []
    for files in settings.files:
        for pipc in dict.fromkeys(pipc for _, pipc in settings.cells):
            report(f"loading: {files} files, pipc {pipc}")
            with _image_folder(files, settings.classes[0], settings.sizes[0]) as (folder, cache):
                found = []
                for _ in range(settings.runs):
                    shutil.rmtree(cache, ignore_errors=True)
                    first, second = (_loaded(workers, folder, cache, pipc) for _ in range(2))
                    found.append((first["seconds"], second["seconds"], second["peak_mib"]))
            middle = [statistics.median(column) for column in zip(*found, strict=True)]
            names = ("first_seconds", "second_seconds", "peak_mib")
            rows.append({"files": files, "pipc": pipc, **dict(zip(names, middle, strict=True)), "runs": found})
    return rows


def _loaded(workers: _Workers, folder: Path, cache: Path, pipc: int) -> Row:
    """Returns one loading in a new process."""
    worker = workers.start({"kind": "loading", "folder": str(folder), "pipc": pipc, "tuned": True}, {"DDKIT_CACHE": str(cache)})
    found = worker.measure()
    worker.stop()
    return found


@contextmanager
def _image_folder(files: int, classes: int, size: int) -> Iterator[tuple[Path, Path]]:
    """Yields a folder of `files` images in `classes` folders (links to a hundred different ones), and one for a cache."""
    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="ddkit-bench-") as made:
        root, random = Path(made), np.random.default_rng(0)
        (root / "originals").mkdir()
        originals = [root / "originals" / f"{number}.jpg" for number in range(100)]
        for path in originals:
            Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path, quality=75)
            os.utime(path, (0, 0))  # what was written a moment ago is not cached yet
        for label in range(classes):
            folder = root / "images" / "train" / f"class{label:04d}"
            folder.mkdir(parents=True)
            for number in range(files // classes):
                os.link(originals[number % len(originals)], folder / f"{number:05d}.jpg")
        yield root / "images", root / "cache"


STARTS = {
    "--help": ["--help"],
    "list": ["list"],
    "one step": ["distill", "--losses", "dm", "--steps", "1", "--evaluate", "none", "--quiet"],
}


def _startup_rows(settings: Settings, report: Report) -> list[Row]:
    rows = []
    for name, arguments in STARTS.items():
        report(f"start-up: {name}")
        found = [_whole_command(arguments) for _ in range(settings.runs + 1)][1:]  # the first finds cold files
        rows.append({"command": f"ddkit {' '.join(arguments)}", "seconds": statistics.median(found), "runs": found})
    return rows


def _whole_command(arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory(prefix="ddkit-bench-") as folder:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ddkit", *arguments], capture_output=True, text=True, cwd=folder, check=False)
        seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RunFailed(f"`ddkit {' '.join(arguments)}` ended with exit code {done.returncode}: {_last_line(done.stderr)}")
    return seconds


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


TUNING = ("THP_MEM_ALLOC_ENABLE", "TORCHINDUCTOR_CACHE_DIR")  # what ddkit's command sets in its own process
_ERRORS = {kind.exit_code: kind for kind in (FlagError, PluginError, InputError, RunFilesError)}


class _Worker:
    """One measuring process: `facts` is what setting up told, measure() takes one more run."""

    def __init__(self, spec: Row, environment: dict[str, str], errors: Path) -> None:
        self.kind = spec["kind"]
        inherited = {key: value for key, value in os.environ.items() if spec["tuned"] or key not in TUNING}
        self._child = Child("ddkit.bench.worker", json.dumps(spec), errors=errors, environment=inherited | environment)
        self.stop = self._child.stop
        self.facts: Row = {}

    def begin(self) -> None:
        """Waits until setting up is done."""
        self.facts = self._checked(self._child.answer)

    def measure(self) -> Row:
        return self._checked(lambda: self._child.ask("run"))

    def _checked(self, call: Callable[[], Row]) -> Row:
        try:
            found = call()
        except ChildEnded as ended:
            raise RunFailed(f"Measuring {self.kind} {ended}") from None
        if "error" in found:
            raise _ERRORS.get(found["exit_code"], RunFailed)(found["error"])
        return found


class _Workers(ExitStack):
    """Ends every measuring process at the end, whatever happens."""

    def __enter__(self) -> _Workers:
        super().__enter__()
        self._folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="ddkit-bench-")))
        self._count = 0
        return self

    def start(self, spec: Row, environment: dict[str, str] | None = None) -> _Worker:
        self._count += 1
        worker = _Worker(spec, environment or {}, self._folder / f"{self._count}.txt")
        self.callback(worker.stop)
        worker.begin()
        return worker
