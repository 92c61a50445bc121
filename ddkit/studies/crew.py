"""The crew that makes and evaluates the sets of a study, each by commands in processes of their own: one that fails spoils no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any

import msgspec
import tomli_w

from ddkit.components.observers import Observers
from ddkit.distributed import plain_environment
from ddkit.errors import DdkitError, Interrupted, RunFailed
from ddkit.files import SCHEMA, with_digest, write_atomic, write_json
from ddkit.recipes.tables import recipe_dict
from ddkit.run import children
from ddkit.run.directory import RunDirectory
from ddkit.run.lock import LOCK_SECONDS
from ddkit.run.manifest import MANIFEST, RECIPE
from ddkit.run.progress import duration
from ddkit.studies.grid import Settings, Task, kept_file
from ddkit.text import counted


class Told:
    """Reports which of `count` sets are begun and ended, and how long the others will take if they take as long."""

    def __init__(self, count: int, watchers: Observers) -> None:
        self._count = count
        self._watchers = watchers
        self._done = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()
        if count:
            self._tell(f"Making and evaluating {counted(count, 'set')}")

    def begun(self, task: Task) -> None:
        with self._lock:
            self._tell(f"{self._done} of {self._count} done: {task.label} starts")

    def ended(self, task: Task, how: str) -> None:
        with self._lock:
            self._done += 1
            left = (time.monotonic() - self._began) / self._done * (self._count - self._done)
            told = f", about {duration(left)} left" if self._done < self._count else ""
            self._tell(f"{self._done} of {self._count}: {task.label}: {how}{told}")

    def _tell(self, line: str) -> None:
        self._watchers.begin("sets", line, done=self._done, total=self._count)


class Crew:
    """Runs commands, `jobs` at a time; after an error or an interruption it ends those that run and starts no other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.children: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[Any], object], items: Sequence[Any]) -> None:
        """Calls `work` for each of the items; raises the cause of the first failure, when all that ran has ended."""

        def guarded(item: Any) -> None:
            self._check_going_on()
            try:
                work(item)
            except BaseException:
                self.stop()
                raise

        with ThreadPoolExecutor(self.settings.jobs) as pool:
            waiting = [pool.submit(copy_context().run, guarded, item) for item in items]  # what the user named may run in those too
            try:
                wait(waiting)
            except BaseException:
                self.stop()
                raise
        errors = [error for future in waiting if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):  # the cause first, then what it ended
            raise error

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for child in self.children:
                child.terminate()  # a run writes a checkpoint then

    def _begun(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self.children.add(child)
            if self.stopped:
                child.terminate()

    def make(self, task: Task) -> float:
        """Makes the set of `task` where it is not there, evaluates it, and keeps its row; returns the accuracy."""
        if not (task.path / MANIFEST).is_file():
            self._check_going_on()  # before anything of the set is written
            if task.parts:
                if task.path.is_dir():
                    shutil.rmtree(task.path)  # what a blend that was cut off left
                making = ["blend", *map(str, task.parts), "--alpha", str(task.alpha), "--out", str(task.path)]
            else:
                making = ["distill", "--resume"]
                if (task.path / RECIPE).is_file():
                    with RunDirectory(task.path).take(wait=LOCK_SECONDS):  # the run of a killed call may still write its checkpoint
                        pass
                else:
                    file = task.path.parent / f"{task.path.name}.toml"
                    write_atomic(file, tomli_w.dumps(recipe_dict(task.recipe)).encode())
                    making = ["distill", "--recipe", str(file)]
                making += ["--out", str(task.path), "--device", self.settings.device, "--quiet", "--json"]
            self.command(making)
        asked, name = task.evaluation, "evaluators.accuracy"
        flags = ["--evaluate", "accuracy", "--protocol", asked.protocol, "--device", self.settings.device, "--quiet", "--json"]
        flags += ["--repeats", str(asked.networks)] if asked.networks else []
        flags += ["--teacher", str(self.settings.teacher)] if asked.teacher else []
        flags += ["--set", f"{name}.random_real=false", "--set", f"{name}.labels={asked.labels}"]
        if asked.images != "synthetic":
            flags += ["--set", f"{name}.synthetic=false", "--set", f"{name}.baselines={json.dumps([asked.images])}"]
        rows = json.loads(self.command(["evaluate", str(task.path), *flags]))["evaluations"]
        row = next((row for row in rows if row["images"] == asked.images), None)
        if row is None:
            raise RunFailed(f"The evaluation gave no row of '{asked.images}' images.")
        write_json(kept_file(task), with_digest({"schema": SCHEMA, "asked": msgspec.to_builtins(asked), "row": row}))
        return float(row["accuracy_mean"])

    def _check_going_on(self) -> None:
        if self.stopped:
            raise Interrupted("Stopped, because another set was stopped.", 130)

    def command(self, arguments: Sequence[str]) -> str:
        """Returns what `ddkit ARGUMENTS...` prints; raises RunFailed with its message, or an error of its exit code."""
        self._check_going_on()
        environment = plain_environment()  # a set is made by one process, whoever started this one
        if self.settings.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.settings.jobs))
        done = children.run(children.of_module("ddkit"), *arguments, environment=environment, begun=self._begun)
        with self._lock:
            self.children = {child for child in self.children if child.poll() is None}
        if done.returncode:
            raise failure_of(done.returncode, done.stderr, arguments)
        return done.stdout


def failure_of(code: int, said: str, arguments: Sequence[str]) -> DdkitError:
    message = " ".join(said.split()).rpartition("ddkit: ")[2] or f"`ddkit {arguments[0]}` ended with exit code {code}"
    if code in (129, 130, 143, -1, -2, -15):
        return Interrupted(message, code if code > 0 else 128 - code)
    if code == 1 or code < 0:  # the run itself failed, crashed, or was killed (for its memory); the others may do
        return RunFailed(message)
    error = DdkitError(message)  # bad input, which the next set would meet too
    error.exit_code = code
    return error
