"""Trains several networks at the same time, each in a process of few threads.

A small batch does not keep two cores busy: between its many short operations one waits for the other. Two processes of
one thread each do. What a process needs it reads from a folder: tensors as safetensors, the rest as JSON.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import ddkit
from ddkit_evaluators.trainer import Task, Trainer, trained_in_turn

log = logging.getLogger("ddkit")
TENSORS, SETTINGS = "tensors.safetensors", "settings.json"


def trained_apart(trainer: Trainer, tasks: Sequence[Task], workers: int) -> list[float]:
    """Returns the accuracy of every task, from `workers` processes; what they could not do is done here, and said."""
    found: dict[Task, float] = {}
    with tempfile.TemporaryDirectory(prefix="ddkit-") as folder:
        crew = _Crew(Path(folder), tasks)
        try:
            _write(trainer, Path(folder), tasks, threads=max(1, torch.get_num_threads() // workers))
            crew.start(workers)
            for task, accuracy in crew.results():
                found[task] = accuracy
                trainer.data.report(len(found), len(tasks))
        except (OSError, SafetensorError) as error:  # the temporary folder is full, or cannot be written
            crew.problem = f"could not be started ({' '.join(str(error).split())})"
        finally:
            crew.stop()
    if not crew.compiled:
        log.warning("torch.compile did not work in a process that trains networks; it went on without.")
        trainer.gave_up_compiling = True
    left = [task for task in tasks if task not in found]
    if left:
        log.warning("A process that trained networks %s; %d networks are trained here instead.", crew.problem, len(left))
        found |= dict(zip(left, trained_in_turn(trainer, left, done=len(found)), strict=True))
    return [found[task] for task in tasks]


class _Crew:
    """Processes that take tasks from one queue. The others start when the first has compiled: they find the code in the cache."""

    def __init__(self, folder: Path, tasks: Sequence[Task]) -> None:
        self.folder, self.problem, self.compiled = folder, "", True
        self._waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            self._waiting.put(task)
        self._done: queue.SimpleQueue[tuple[Task, float] | None] = queue.SimpleQueue()
        self.children: list[ddkit.Child] = []
        self._first_ready, self._lock, self._running, self._stopped = threading.Event(), threading.Lock(), 0, False

    def start(self, workers: int) -> None:
        self._running = workers
        for number in range(workers):
            # With the context of the call, as its children may run what it may.
            threading.Thread(target=copy_context().run, args=(self._work, number), daemon=True).start()

    def results(self) -> Iterator[tuple[Task, float]]:
        """Yields (task, accuracy) as they come, until every thread is done."""
        while self._running:
            item = self._done.get()
            if item is None:
                self._running -= 1
            else:
                yield item

    def stop(self) -> None:
        self._first_ready.set()
        with self._lock:
            self._stopped = True
            for child in self.children:
                child.stop()

    def _work(self, number: int) -> None:
        try:
            if number > 0:
                self._first_ready.wait()
            child = self._child(number)
            if child is None:
                return
            self.compiled &= bool(child.answer()["compiled"])
            self._first_ready.set()
            while True:
                task = self._waiting.get_nowait()
                self._done.put((task, float(child.ask(task)["accuracy"])))
        except queue.Empty:
            pass
        except (ddkit.ChildEnded, OSError) as error:
            self.problem = str(error)
        finally:
            self._first_ready.set()
            self._done.put(None)

    def _child(self, number: int) -> ddkit.Child | None:
        with self._lock:
            if self._stopped:
                return None
            self.children.append(ddkit.Child(__name__, str(self.folder), errors=self.folder / f"errors-{number}.txt"))
            return self.children[-1]


def _write(trainer: Trainer, folder: Path, tasks: Sequence[Task], *, threads: int) -> None:
    data, artifact = trainer.data, trainer.artifact
    wanted = slice(None) if any(kind != "synthetic" for kind, _ in tasks) else slice(0)
    tensors = {
        "images": artifact.stored_images, "labels": artifact.stored_labels,
        "test_images": data.test_images, "test_labels": data.test_labels,
        "real_images": data.real_images[wanted], "real_labels": data.real_labels[wanted],
    }  # fmt: skip
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / TENSORS)  # it refuses shared memory
    settings = {
        "name": trainer.name, "model_options": msgspec.to_builtins(trainer.model.options), "where": trainer.model.recipe_path,
        "schedule": msgspec.to_builtins(trainer.schedule),
        "augmenter": trainer.augmenter_name, "arithmetic": msgspec.to_builtins(trainer.arithmetic), "info": msgspec.to_builtins(data.info),
        "seed": data.seed, "threads": threads, "threads_of_a_network": trainer.threads,
        "artifact": {key: value for key, value in artifact.metadata.items() if key in ("class_names", "mean", "std", "decode")},
    }  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def _read(folder: Path) -> Trainer:
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    tensors = load_file(folder / TENSORS)
    info = msgspec.convert(settings["info"], ddkit.DataInfo)
    data = ddkit.EvaluationData(
        info=info, test_images=tensors["test_images"], test_labels=tensors["test_labels"], real_images=tensors["real_images"],
        real_labels=tensors["real_labels"], seed=settings["seed"], device=torch.device("cpu"), report=lambda done, total: None,
    )  # fmt: skip
    artifact = ddkit.Artifact(tensors["images"], tensors["labels"], settings["artifact"])
    schedule, arithmetic = msgspec.convert(settings["schedule"], ddkit.Schedule), msgspec.convert(settings["arithmetic"], ddkit.Arithmetic)
    model = ddkit.create("model", settings["name"], settings["model_options"], data=info, where=settings["where"])
    threads = settings["threads_of_a_network"]
    return Trainer(settings["name"], model, artifact, data, schedule, settings["augmenter"], arithmetic, threads=threads)


def main() -> None:
    """Reads the folder on the command line, says when it is ready, then trains the network of every line on stdin."""
    ddkit.tune_process()
    trainer = _read(Path(sys.argv[1]))
    if trainer.arithmetic.compile:
        trainer.warm_up()
    ddkit.reply({"compiled": trainer.compiled or not trainer.arithmetic.compile})
    for line in sys.stdin:
        kind, repeat = json.loads(line)
        ddkit.reply({"accuracy": trainer.accuracy(kind, repeat)})


if __name__ == "__main__":
    try:
        main()
    except ddkit.DdkitError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
