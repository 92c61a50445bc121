"""The measuring process of `ddkit bench`: one thing to measure, its runs on command, one JSON line for each.

A process of its own for each measurement gives each its own peak memory and lets the plain loops run as they run
elsewhere: with torch's defaults, without what ddkit's command does to its process (as ddkit's Python functions do).
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddkit.errors import DdkitError
from ddkit.nn.compiling import native_bfloat16
from ddkit.nn.device import pick_device, product_rate, products, tune_process
from ddkit.run.children import reply

Spec = dict[str, Any]
Measuring = Iterator[dict[str, Any]]  # first what setting up cost, then a measurement each time
PROTOCOL_EPOCHS, PROTOCOL_TESTS = 1000, 10_000  # of dm-official on CIFAR-10
MEASURED_NETWORKS = 8


def main() -> None:
    """Reads a specification from the command line, prints what setting up cost, then measures at every line of stdin."""
    spec = json.loads(sys.argv[1])
    if spec["tuned"]:
        tune_process()
    logging.getLogger("ddkit").setLevel(logging.ERROR)
    try:
        measuring = KINDS[spec["kind"]](spec)
        facts = next(measuring)
        reply(facts)
        for _ in sys.stdin:
            reply(next(measuring) | {"peak_mib": _peak_mib(children=facts.get("workers", 1))})
    except DdkitError as error:
        reply({"error": str(error), "exit_code": error.exit_code})


def _peak_mib(children: int = 1) -> float:
    """Returns in MiB the most that tensors took on CUDA, else the largest resident size of this process.

    Where `children` processes at once worked for it, each of them counts as much as the largest of them.
    """
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, child = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + child * (children if children > 1 else 0)


def _synchronised() -> float:
    """Returns the clock once the device has done all that it was given."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _timed(call: Callable[[], Any], count: int) -> float:
    """Returns the seconds of one of `count` calls in a row."""
    began = _synchronised()
    for _ in range(count):
        call()
    return (_synchronised() - began) / count


def _info(spec: Spec) -> Any:
    from ddkit.components.base import DataInfo

    names = tuple(str(label) for label in range(spec["classes"]))
    return DataInfo(class_names=names, channels=spec["channels"], size=(spec["size"], spec["size"]))


def _limit(spec: Spec) -> Measuring:
    """Square matrix products, 2,048 a side on a CPU and 8,192 on a GPU: what the machine can do.

    bfloat16 is measured where the hardware has it: elsewhere it is some 20 times slower than float32, and ddkit leaves it alone.
    """
    import torch

    device = pick_device(spec["device"])
    side, count = (8192, 20) if device.type == "cuda" else (2048, 5)
    names = ["float32", *(["tf32"] if device.type == "cuda" else []), *(["bfloat16"] if native_bfloat16(device) else [])]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type != "cuda":
        with suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    yield {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    while True:
        yield {"flops_per_second": {name: product_rate(device, name, side=side, count=count) for name in names}}


def _steps(spec: Spec) -> Measuring:
    """Steps of a run: the engine as `ddkit distill` builds it, on random images."""
    from ddkit.engine.loop import Hooks, distill
    from ddkit.run.setup import RunSetup

    start_mib = _peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, Path(folder))
        began = time.perf_counter()
        setup = RunSetup(recipe, device=spec["device"])
        setup.prepare()
    setup_seconds = time.perf_counter() - began
    engine, decided = setup.engine, setup.decided
    index = 0

    def advance(count: int) -> None:
        nonlocal index
        with products(setup.device, decided.products):
            distill(engine, index, index + count, Hooks(is_read=lambda number: number % 10 == 0))
        index += count

    flops = None
    if spec["count"]:  # of the products and convolutions of one step; the sums of chunks are a pass that a whole set does not need
        flops = _flops(lambda: engine.evaluate(0)) - _flops(lambda: engine.record_sums(0))
    began = _synchronised()
    advance(1)
    first = _synchronised() - began
    advance(2)
    made: list[Any] = [engine.source.networks.at(index)] if decided.needs_embedder else []
    made += [each for each in (engine.source.twice, engine.source.networks.gradients) if each]
    yield {
        "setup_seconds": setup_seconds,
        "first_step_seconds": first, "flops": flops, "work": decided.step_work, "precision": decided.arithmetic.precision,
        "compiled": any(each.compiled for each in made), "chunk": decided.chunk, "block": decided.block, "start_mib": start_mib,
    }  # fmt: skip
    while True:
        began = _synchronised()
        advance(spec["steps"])
        yield {"seconds": (_synchronised() - began) / spec["steps"]}


def _flops(call: Callable[[], Any]) -> float:
    """Returns the floating-point operations of the products and convolutions of a call, all derivatives included, counted while it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _recipe(spec: Spec, folder: Path) -> Any:
    import numpy as np

    from ddkit.nn.teacher import save_teacher
    from ddkit.recipes.resolve import resolve

    random = np.random.default_rng(0)
    info, rows = _info(spec), spec["classes"] * spec["pipc"]
    pixels = random.integers(0, 256, (rows, *info.shape), dtype=np.uint8)
    labels = np.repeat(np.arange(info.classes), spec["pipc"])
    np.savez(folder / "random.npz", x_train=pixels, y_train=labels, x_test=pixels[:1], y_test=labels[:1])
    start = {} if "recipe" in spec else {"initializer.use": "noise"}
    sets = {"data.use": f"npz:{folder / 'random.npz'}"} | start | dict(spec["sets"])
    asked = {"ipc": spec["ipc"], "pipc": spec["pipc"], "losses": spec["losses"] or None}
    asked |= {"evaluators": "none", "steps": spec["run_steps"]}
    name = spec.get("recipe", "practical")
    recipe = resolve(name, sets=sets, **asked)
    if spec["losses"] == "dm" or "teacher.use" in sets or recipe.data.whiten:  # networks of whitened images take no plain teacher
        return recipe
    save_teacher(folder / "teacher.safetensors", _teacher(info, recipe.teacher))
    return resolve(name, sets=sets | {"teacher.use": str(folder / "teacher.safetensors"), "teacher.check": False}, **asked)


def _teacher(info: Any, table: Any) -> Any:
    """Returns a teacher of the model that a recipe's [teacher] names. It is not trained: its speed is that of a trained one."""
    from ddkit.components import registry
    from ddkit.nn.networks import build_network
    from ddkit.nn.teacher import Teacher

    record = {
        "model": table.model, "options": table.options, "mean": [0.5] * info.channels, "std": [0.25] * info.channels,
        "class_names": list(info.class_names), "input_shape": list(info.shape),
    }  # fmt: skip
    network = build_network(registry.create("model", table.model, table.options, data=info), info, 0, "teacher")
    return Teacher(network, mean=(0.5,), std=(0.25,), info=record)


def _reference(spec: Spec) -> Measuring:
    """The plain loop of the same losses, weighted as the recipe weights them."""
    import torch

    from ddkit.bench.reference import ReferenceStep, field_components

    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, Path(folder))
    losses = {label: table.weight for label, table in recipe.losses.items()}
    info, device = _info(spec), pick_device(spec["device"])
    real = torch.randn((info.classes, spec["pipc"], *info.shape), generator=torch.Generator().manual_seed(0)).to(device)
    model, augmenter = field_components(info)
    teacher = _teacher(info, recipe.teacher).module.to(device)
    step = ReferenceStep(losses, model, info, augmenter, teacher, real, ipc=spec["ipc"], batch=256)
    first = _timed(step, 1)
    step()
    yield {"first_step_seconds": first}
    while True:
        yield {"seconds": _timed(step, spec["steps"])}


def _labelled(spec: Spec) -> tuple[Any, Any, Any]:
    import torch

    info = _info(spec)
    draw = torch.Generator().manual_seed(0)
    images = torch.rand((info.classes * spec["ipc"], *info.shape), generator=draw)
    return info, images, torch.arange(info.classes).repeat_interleave(spec["ipc"])


def _evaluation(spec: Spec) -> Measuring:
    """Networks of the evaluator `accuracy` under dm-official, computed as it plans for the whole protocol."""
    import torch

    from ddkit.components import registry
    from ddkit.components.base import EvaluationData
    from ddkit.run.artifact import Artifact

    info, images, labels = _labelled(spec)
    device, options = pick_device(spec["device"]), {"protocol": "dm-official", "random_real": False} | spec.get("options", {})
    evaluator = registry.create("evaluator", "accuracy", options, data=info, where="evaluators.accuracy")
    plan = evaluator.plan(info, device, rows=len(labels), tests=PROTOCOL_TESTS, networks=spec["networks"])
    options |= {"compile": "always" if plan.arithmetic.compile else "never", "precision": plan.arithmetic.precision}
    options["repeats"] = max(MEASURED_NETWORKS, 4 * plan.workers)
    units = {"mean": [0.5] * info.channels, "std": [0.25] * info.channels}
    artifact = Artifact(images, labels, {"class_names": list(info.class_names), **units})
    pixels = (torch.rand((spec["tests"], *info.shape), generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    times: list[float] = []
    data = EvaluationData(
        info=info, test_images=pixels, test_labels=torch.arange(len(pixels)) % info.classes, real_images=pixels[:0],
        real_labels=labels[:0], seed=0, device=device, report=lambda done, total: times.append(_synchronised()),
    )  # fmt: skip
    facts = {"precision": plan.arithmetic.precision, "workers": plan.workers}

    def train(epochs: int, workers: int) -> float:
        """Returns the seconds of a network once all workers are at it; their start does not count."""
        own = options | {"epochs": epochs, "workers": workers}
        times[:] = [_synchronised()]
        (row,) = registry.create("evaluator", "accuracy", own, data=info, where="evaluators.accuracy")(artifact, data, None)
        facts["compiled"] = bool(row.details["compiled"])
        first = 2 * workers  # by then the last of them has begun its second network
        return (times[-1] - times[first]) / (len(times) - 1 - first)

    train(1, plan.workers)
    yield facts | {"first_network_seconds": times[1] - times[0]}
    while True:  # testing, which fills all cores in one process, is timed there; training as the evaluator does it
        yield _protocol_seconds(train(1, 1), train(1 + spec["epochs"], plan.workers), spec)


def _reference_evaluation(spec: Spec) -> Measuring:
    """Networks of the plain evaluation loop."""
    import torch
    from torch.utils.data import TensorDataset

    from ddkit.bench.reference import ReferenceEvaluation, field_components

    info, images, labels = _labelled(spec)
    device = pick_device(spec["device"])
    model, augmenter = field_components(info)
    tests = torch.randn((spec["tests"], *info.shape), generator=torch.Generator().manual_seed(1))
    test = TensorDataset(tests.to(device), (torch.arange(len(tests)) % info.classes).to(device))
    loop = ReferenceEvaluation(model, info, augmenter, images.to(device), labels.to(device), test)
    yield {"first_network_seconds": _timed(lambda: loop(0, 1), 1)}
    while True:
        short, long = (_timed(lambda epochs=epochs: loop(0, epochs), 1) for epochs in (1, 1 + spec["epochs"]))  # type: ignore[misc]
        yield _protocol_seconds(short, long, spec)


def _protocol_seconds(short: float, long: float, spec: Spec) -> dict[str, Any]:
    """Returns the seconds of a network under the whole protocol from those of one epoch and a test, and of more epochs and a test."""
    epoch = (long - short) / spec["epochs"]
    test = max(0.0, short - epoch) / spec["tests"] * PROTOCOL_TESTS
    return {"epoch_seconds": epoch, "test_seconds": test, "seconds": PROTOCOL_EPOCHS * epoch + test}


def _loading(spec: Spec) -> Measuring:
    """The accessible images of an image folder, first without and then with ddkit's image cache."""
    from ddkit.data.real import RealData, open_dataset
    from ddkit.recipes.tables import DataTable

    yield {}
    while True:
        yield {"seconds": _timed(lambda: RealData(open_dataset(DataTable(use=f"imagefolder:{spec['folder']}")), spec["pipc"], 0), 1)}


KINDS: dict[str, Callable[[Spec], Measuring]] = {
    "limit": _limit,
    "steps": _steps,
    "reference": _reference,
    "evaluation": _evaluation,
    "reference-evaluation": _reference_evaluation,
    "loading": _loading,
}

if __name__ == "__main__":
    main()
