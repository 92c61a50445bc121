"""Trains several networks at the same time, each in a process of few threads.

A small batch does not keep two cores busy: between its many short operations one waits for the other. Two processes of
one thread each do. What a process needs it reads from a folder: tensors as safetensors, the rest as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import ddkit
from ddkit_evaluators.trainer import Keep, Result, Task, Trainer, fields_of, trained_in_turn

log = logging.getLogger("ddkit")
TENSORS, SETTINGS = "tensors.safetensors", "settings.json"
KEPT = ("class_names", "mean", "std", "decode", "parametrization", "image_shape")  # of a set's metadata


def threads_of(workers: int) -> int:
    """Returns the threads of each of so many processes."""
    return max(1, torch.get_num_threads() // workers)


def trained_apart(trainer: Trainer, tasks: Sequence[Task], workers: int, keep: Keep) -> list[Result]:
    """Returns the result of every task, from `workers` processes; what they could not do is done here, and said.

    The other processes start when the first has compiled: they find the code in the cache.
    """
    found: dict[Task, Result] = {}
    waiting, compiled, problem = iter(tasks), True, ""
    with tempfile.TemporaryDirectory(prefix="ddkit-") as place, ThreadPoolExecutor(workers) as pool, ExitStack() as children:
        folder = Path(place)
        running: dict[Future[dict[str, Any]], tuple[ddkit.Child, Task | None]] = {}  # a process that starts has no task

        def start(number: int) -> None:
            child = ddkit.Child(__name__, str(folder), errors=folder / f"errors-{number}.txt")
            children.callback(child.stop)
            running[pool.submit(child.answer)] = (child, None)

        try:
            _write(trainer, folder, tasks, threads=threads_of(workers))
            start(0)
            others = iter(range(1, min(workers, len(tasks))))
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    for number in others:
                        start(number)
                    child, task = running.pop(future)
                    try:
                        answer = future.result()
                    except ddkit.ChildEnded as error:
                        problem = str(error)
                        continue
                    compiled &= bool(answer["compiled"])
                    if task is not None:
                        found[task] = Result(*answer["result"])
                        if compiled:
                            keep(task, threads_of(workers), found[task])
                        trainer.data.report(len(found), len(tasks))
                    task = next(waiting, None)
                    if task is not None:
                        running[pool.submit(child.ask, task)] = (child, task)
        except (OSError, SafetensorError) as error:  # the temporary folder is full, or cannot be written
            problem = f"could not be started ({' '.join(str(error).split())})"
    if not compiled:
        log.warning("torch.compile failed in a process that trains networks. It continued without compiled code.")
        trainer.gave_up_compiling = True
    left = [task for task in tasks if task not in found]
    if left:
        log.warning("A process that trained networks %s. %d networks are trained in this process instead.", problem, len(left))
        found |= dict(zip(left, trained_in_turn(trainer, left, keep, done=len(found)), strict=True))
    return [found[task] for task in tasks]


def _write(trainer: Trainer, folder: Path, tasks: Sequence[Task], *, threads: int) -> None:
    data, artifact = trainer.data, trainer.artifact
    wanted = slice(None) if any(kind != "synthetic" for kind, _ in tasks) else slice(0)
    tensors = {
        "images": artifact.stored, "labels": artifact.row_labels,
        **{f"parameters.{name}": value for name, value in artifact.all_parameters.items()},
        "test_images": data.test_images, "test_labels": data.test_labels,
        "real_images": data.real_images[wanted], "real_labels": data.real_labels[wanted],
    }  # fmt: skip
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / TENSORS)  # it refuses shared memory
    settings = {
        "name": trainer.name, "model_options": fields_of(trainer.model.options), "where": trainer.model.recipe_path,
        "protocol": fields_of(trainer.protocol), "arithmetic": fields_of(trainer.arithmetic),
        "info": fields_of(data.info),
        "seed": data.seed, "threads": threads, "threads_of_a_network": trainer.threads, "stored": trainer.stored,
        "artifact": {key: value for key, value in artifact.metadata.items() if key in KEPT},
    }  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def _read(folder: Path) -> Trainer:
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    tensors = load_file(folder / TENSORS)
    of_data = settings["info"]
    info = ddkit.DataInfo(**of_data | {"class_names": tuple(of_data["class_names"]), "size": tuple(of_data["size"])})
    data = ddkit.data.EvaluationData(
        info=info, test_images=tensors["test_images"], test_labels=tensors["test_labels"], real_images=tensors["real_images"],
        real_labels=tensors["real_labels"], seed=settings["seed"], device=torch.device("cpu"), report=lambda done, total: None,
    )  # fmt: skip
    parameters = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("parameters.")}
    artifact = ddkit.Artifact(tensors["images"], tensors["labels"], settings["artifact"], parameters)
    protocol = ddkit.nn.Protocol(**settings["protocol"])
    arithmetic = ddkit.nn.Arithmetic(**settings["arithmetic"])
    model = ddkit.create("model", settings["name"], settings["model_options"], data=info, where=settings["where"])
    how = {"stored": settings["stored"], "threads": settings["threads_of_a_network"]}
    return Trainer(settings["name"], model, artifact, data, protocol, arithmetic, **how)


def main() -> None:
    """Reads the folder on the command line, says when it is ready, then trains the network of every line on stdin."""
    ddkit.nn.tune_process()
    trainer = _read(Path(sys.argv[1]))
    if trainer.arithmetic.compile:
        trainer.warm_up()
    ddkit.reply({"compiled": trainer.compiled or not trainer.arithmetic.compile})
    for line in sys.stdin:
        kind, repeat = json.loads(line)
        result = trainer.tested(kind, repeat)
        ddkit.reply({"result": result, "compiled": trainer.compiled or not trainer.arithmetic.compile})


if __name__ == "__main__":
    try:
        main()
    except ddkit.DdkitError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
