"""`ddkit bench`: how fast steps, methods, evaluation and loading are here, beside plain loops and the machine's limit."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ddkit.errors import FlagError, InputError, PluginError, RunFailed, RunFilesError
from ddkit.recipes.resolve import select_losses
from ddkit.run.children import Child, ChildEnded

PARTS = ("steps", "methods", "evaluation", "loading", "startup")
Row = dict[str, Any]
Report = Callable[[str], None]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured: the products of losses or recipes, cells (ipc, pipc), classes, sizes and devices; `runs` runs of `steps` steps."""

    parts: tuple[str, ...] = ("steps", "evaluation")
    losses: tuple[str, ...] = ("dm",)
    recipes: tuple[str, ...] = ()
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
    """Returns every measurement as data; raises DdkitError for what cannot be measured. `report` gets the progress."""
    result: Row = {"cores": os.cpu_count(), "runs": settings.runs}
    if {"steps", "evaluation"} & set(settings.parts):
        result["limits"] = [_limit(device, settings) for device in settings.devices]
    if "steps" in settings.parts:
        result["steps"] = _with_exponents([_step_row(case, settings, result, report) for case in cases(settings)])
    if "methods" in settings.parts:
        alike = dict.fromkeys(case._replace(losses="") for case in cases(settings))
        result["methods"] = [_method_row(recipe, case, settings, report) for recipe in settings.recipes for case in alike]
    if "evaluation" in settings.parts:
        wanted = dict.fromkeys(case._replace(losses="", pipc=0) for case in cases(settings))
        result["evaluation"] = [_evaluation_row(case, settings, report) for case in wanted]
    if "loading" in settings.parts:
        result["loading"] = _loading_rows(settings, report)
    if "startup" in settings.parts:
        result["startup"] = _startup_rows(settings, report)
    return result


def cases(settings: Settings) -> list[Case]:
    """Returns the rows of the table of steps, in order."""
    kinds = itertools.product(settings.devices, settings.losses, settings.classes, settings.sizes, settings.cells)
    return [Case(losses, ipc, pipc, classes, size, device) for device, losses, classes, size, (ipc, pipc) in kinds]


def _measured(
    specs: dict[str, Row], runs: int, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Row], dict[str, list[Row]]]:
    """Returns, by name of a specification, what setting up cost, and `runs` measurements, taken in turn, each in a process of its own.

    Raises the error that a process reports, and RunFailed if a process ends.
    """
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_process(spec, environment or {})) for name, spec in specs.items()}
        facts = {name: ask(None) for name, ask in processes.items()}
        found: dict[str, list[Row]] = {name: [] for name in specs}
        for _ in range(runs):
            for name, ask in processes.items():
                found[name].append(ask("run"))
    return facts, found


TUNING = ("THP_MEM_ALLOC_ENABLE", "TORCHINDUCTOR_CACHE_DIR")  # what ddkit's command sets in its own process
_ERRORS = {kind.exit_code: kind for kind in (FlagError, PluginError, InputError, RunFilesError)}


@contextmanager
def _process(spec: Row, environment: Mapping[str, str]) -> Iterator[Callable[[str | None], Row]]:
    """Yields what asks a measuring process, which ends with this block or this process; None only waits until it is set up."""
    inherited = {key: value for key, value in os.environ.items() if spec["tuned"] or key not in TUNING}
    with tempfile.TemporaryDirectory() as folder:
        child = Child("ddkit.bench.worker", json.dumps(spec), errors=Path(folder) / "errors", environment={**inherited, **environment})

        def ask(question: str | None) -> Row:
            try:
                answer: Row = child.answer() if question is None else child.ask(question)
            except ChildEnded as error:
                raise RunFailed(f"Measuring {spec['kind']} {error}") from None
            if "error" in answer:
                raise _ERRORS.get(answer["exit_code"], RunFailed)(answer["error"])
            return answer

        try:
            yield ask
        finally:
            child.stop()


def _limit(device: str, settings: Settings) -> Row:
    facts, found = _measured({"": {"kind": "limit", "device": device, "tuned": True}}, settings.runs)
    rates = {name: statistics.median(run["flops_per_second"][name] for run in found[""]) for name in found[""][0]["flops_per_second"]}
    return {"device": device, "name": facts[""]["device"], **{key: facts[""][key] for key in ("threads", "torch")}, "rates": rates}


def _step_row(case: Case, settings: Settings, result: Row, report: Report) -> Row:
    report(f"steps: {case.losses}, ipc {case.ipc}, pipc {case.pipc}, {case.classes} classes, {case.size} pixels, {case.device}")
    spec = {
        "kind": "steps", **case._asdict(), "channels": settings.channels, "sets": list(settings.sets), "steps": settings.steps,
        "run_steps": settings.run_steps, "tuned": True, "count": False,
    }  # fmt: skip
    specs = {"ours": spec}
    if settings.plain:
        plain = [["engine.compile", False], ["engine.precision", "float32"], ["engine.block", 0]]
        specs["plain"] = spec | {"tuned": False, "count": True, "sets": [*settings.sets, *plain]}
        if _has_reference(case, settings):
            specs["reference"] = spec | {"kind": "reference", "tuned": False}
    facts, rounds = _measured(specs, settings.runs)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in rounds.items()}
    row = {
        **case._asdict(), "seconds_per_step": statistics.median(seconds["ours"]), "runs": seconds["ours"],
        "steps_per_second": 1 / statistics.median(seconds["ours"]), "peak_mib": rounds["ours"][-1]["peak_mib"],
        **{key: facts["ours"][key] for key in ("first_step_seconds", "precision", "compiled", "chunk", "block", "start_mib", "work")},
    }  # fmt: skip
    for name in list(specs)[1:]:
        row[f"{name}_seconds_per_step"] = statistics.median(seconds[name])
        row[f"{name}_peak_mib"] = rounds[name][-1]["peak_mib"]
        row[f"ratio_to_{name}"] = _ratio(seconds[name], seconds["ours"])
    if "plain" in specs:
        rates: dict[str, float] = next(limit["rates"] for limit in result["limits"] if limit["device"] == case.device)
        row["flops"] = facts["plain"]["flops"]
        row["limit_fraction"] = row["flops"] / row["seconds_per_step"] / rates.get(row["precision"], rates["float32"])
    return row


def _method_row(recipe: str, case: Case, settings: Settings, report: Report) -> Row:
    """Returns the cost of a recipe, with its own initializer, a teacher that is not trained, and experts that are trained anew."""
    report(f"methods: {recipe}, ipc {case.ipc}, pipc {case.pipc}, {case.classes} classes, {case.size} pixels, {case.device}")
    spec = {
        "kind": "steps", **case._asdict(), "recipe": recipe, "channels": settings.channels, "sets": list(settings.sets),
        "steps": settings.steps, "run_steps": settings.run_steps, "tuned": True, "count": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ddkit-bench-") as cache:
        facts, rounds = _measured({"": spec}, settings.runs, {"DDKIT_CACHE": cache})
    seconds = [run["seconds"] for run in rounds[""]]
    where = {key: value for key, value in case._asdict().items() if key != "losses"}
    return {
        "recipe": recipe, **where, "seconds_per_step": statistics.median(seconds), "runs": seconds, "peak_mib": rounds[""][-1]["peak_mib"],
        **{key: facts[""][key] for key in ("setup_seconds", "first_step_seconds", "precision", "compiled", "chunk", "block")},
    }  # fmt: skip


# Tables of a recipe that change what a step computes; the plain loops have the values of the recipe practical.
COMPUTED = ("network", "augmenter", "data", "losses", "teacher", "views")


def _has_reference(case: Case, settings: Settings) -> bool:
    from ddkit.bench.reference import LOSSES  # which imports torch

    changed = {path.split(".")[0] for path, _ in settings.sets}
    return not changed.intersection(COMPUTED) and select_losses(case.losses, {}, {}).keys() <= LOSSES.keys()


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Returns the median over the runs of their seconds over ours, measured one after the other."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


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


def _evaluation_row(case: Case, settings: Settings, report: Report) -> Row:
    where = {"ipc": case.ipc, "classes": case.classes, "size": case.size, "device": case.device}
    report(f"evaluation: ipc {case.ipc}, {case.classes} classes, {case.size} pixels, {case.device}")
    spec = {
        "kind": "evaluation", **where, "channels": settings.channels, "networks": settings.networks, "tests": settings.tests,
        "epochs": max(10, settings.images_trained // (case.classes * case.ipc)), "tuned": True,
    }  # fmt: skip
    specs = {"ours": spec} | ({"reference": spec | {"kind": "reference-evaluation", "tuned": False}} if settings.plain else {})
    facts, rounds = _measured(specs, settings.runs)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in rounds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    row: Row = {
        **where, "protocol": "dm-official",
        "networks_per_minute": 60 / median["ours"], "seconds_per_network": median["ours"], "runs": seconds["ours"],
        "epoch_seconds": statistics.median(run["epoch_seconds"] for run in rounds["ours"]),
        "test_seconds": statistics.median(run["test_seconds"] for run in rounds["ours"]),
        "peak_mib": rounds["ours"][-1]["peak_mib"],
        **{key: facts["ours"][key] for key in ("first_network_seconds", "precision", "compiled", "workers")},
    }  # fmt: skip
    for name in list(specs)[1:]:
        row[f"{name}_seconds_per_network"] = median[name]
        for part in ("epoch_seconds", "test_seconds"):
            row[f"{name}_{part}"] = statistics.median(run[part] for run in rounds[name])
        row[f"ratio_to_{name}"] = _ratio(seconds[name], seconds["ours"])
    return row


def _loading_rows(settings: Settings, report: Report) -> list[Row]:
    rows = []
    for files, pipc in itertools.product(settings.files, dict.fromkeys(pipc for _, pipc in settings.cells)):
        report(f"loading: {files} files, pipc {pipc}")
        with _image_folder(files, settings.classes[0], settings.sizes[0]) as (folder, cache):
            spec = {"kind": "loading", "folder": str(folder), "pipc": pipc, "tuned": True}
            found = []
            for _ in range(settings.runs):
                shutil.rmtree(cache, ignore_errors=True)
                first, second = (_measured({"": spec}, 1, {"DDKIT_CACHE": str(cache)})[1][""][0] for _ in range(2))
                found.append((first["seconds"], second["seconds"], second["peak_mib"]))
        middle = [statistics.median(column) for column in zip(*found, strict=True)]
        names = ("first_seconds", "second_seconds", "peak_mib")
        rows.append({"files": files, "pipc": pipc, **dict(zip(names, middle, strict=True)), "runs": found})
    return rows


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
