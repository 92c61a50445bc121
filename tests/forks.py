"""Processes without the seconds that importing torch takes: forks of one that has imported it, used as the module subprocess is.

A fork is a process as any other: with its own pid, exit code, streams, environment, folder and signals. It differs from a
fresh one in what is imported when it begins, so tests whose point is a fresh interpreter start one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO, Any

# torch imports _dynamo at its first optimizer
HEAVY = ("torch", "torch._dynamo", "numpy", "PIL.Image", "safetensors.torch", "matplotlib.figure", "jinja2")
OWN = ("ddkit.api", "ddkit.run.setup", "ddkit_dm", "ddkit_models", "ddkit_evaluators", "ddkit_datasets", "ddkit_initializers")
WORKS = sys.platform.startswith("linux")  # elsewhere what a library has started may not survive a fork

SERVER = """
import atexit, gc, importlib, json, os, select, socket, sys, threading, traceback, types, warnings

def serve(link):
    running = {}  # pid to the file that takes its exit code
    while True:
        ready = select.select([link], [], [], 0.005 if running else None)[0]
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                file = running.pop(pid)
                os.write(file, b"%d\\n" % os.waitstatus_to_exitcode(status))
                os.close(file)  # the end is there for who asks later
        if not ready:
            continue
        data, files, _, _ = socket.recv_fds(link, 1 << 20, 4)
        if not data:
            os._exit(0)
        with warnings.catch_warnings(action="ignore"):  # numpy's threads, which look after themselves
            pid = os.fork()
        if not pid:
            for file in (link.detach(), files.pop(), *running.values()):
                os.close(file)
            return json.loads(data), files
        running[pid] = files.pop()
        os.write(running[pid], b"%d\\n" % pid)
        for file in files:
            os.close(file)

link = socket.socket(fileno=int(sys.argv[1]))
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
gc.collect()
gc.freeze()
before = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
base = [each for each in sys.path if each not in before]
link.send(b"x")
job, files = serve(link)
for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
words = job["words"]
own = [] if words[0] == "-P" else [os.getcwd() if words[0] == "-m" else ""]
if not own:
    del words[0]
path = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
sys.path[:] = [*own, *path, *(each for each in base if each not in path)]
importlib.invalidate_caches()
sys.argv[:] = [words[0], *words[2:]]
code = 0
try:
    if words[0] == "-m":
        import runpy
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
except SystemExit as ended:
    code = ended.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
except BaseException:
    traceback.print_exc()
    code = 1
# The end of an interpreter, short of taking apart all that was imported, which takes a second.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


class Forked:
    """A process, used as subprocess.Popen is."""

    def __init__(self, link: socket.socket, words: Sequence[str], streams: list[Any], env: Mapping[str, str], cwd: str) -> None:
        self.args = words
        self.returncode: int | None = None
        ends: list[IO[str] | None] = [None, None, None]
        given: list[int] = []
        for number, stream in enumerate(streams):
            if stream == subprocess.PIPE:
                pipe = os.pipe()
                mine, its = pipe if number else pipe[::-1]
                ends[number] = os.fdopen(mine, "r" if number else "w")
                given.append(its)
            else:
                given.append(os.open(os.devnull, os.O_RDWR) if stream == subprocess.DEVNULL else os.dup(stream))
        self.stdin, self.stdout, self.stderr = ends
        ending, its = os.pipe()
        message = json.dumps({"words": list(words), "env": dict(env), "cwd": cwd}).encode()
        socket.send_fds(link, [message], [*given, its])
        for file in (*given, its):
            os.close(file)
        self._ending = os.fdopen(ending, "rb", buffering=0)  # select would not see what a buffer holds
        self._lock = threading.Lock()
        self.pid = int(self._ending.readline())

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._ending], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        with self._lock:  # two threads may wait
            if self.returncode is None:
                self.returncode = int(self._ending.readline())
            return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Returns what it prints to stdout and stderr, which are pipes, until it ends."""
        assert self.stdout is not None
        assert self.stderr is not None
        with ThreadPoolExecutor(2) as pool, self.stdout, self.stderr:
            out, err = pool.map(lambda stream: stream.read(), (self.stdout, self.stderr))
        self.wait()
        return out, err

    def __del__(self) -> None:
        self._ending.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """Stands in for the module subprocess where processes of `python` are started."""

    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self, link: socket.socket, python: str, env: Mapping[str, str]) -> None:
        self._link = link
        self._python = python
        self._own = {name: value for name, value in env.items() if name.startswith("PYTHON") and name != "PYTHONPATH"}

    def Popen(
        self, command: Sequence[str], *, stdin: Any = None, stdout: Any = None, stderr: Any = None, env: Mapping[str, str] | None = None,
        cwd: Any = None, text: bool = True,
    ) -> Forked:  # fmt: skip
        env = dict(os.environ if env is None else env)
        assert command[0] == self._python
        assert text
        own = {name: value for name, value in env.items() if name.startswith("PYTHON") and name != "PYTHONPATH"}
        assert own == self._own, "a fork is of the interpreter that began with other settings"
        streams = [number if each is None else each for number, each in enumerate((stdin, stdout, stderr))]
        streams = [each.fileno() if hasattr(each, "fileno") else each for each in streams]
        return Forked(self._link, command[1:], streams, env, str(cwd or os.getcwd()))

    def run(self, command: Sequence[str], *, capture_output: bool, check: bool = False, **named: Any) -> subprocess.CompletedProcess[str]:
        assert capture_output
        process = self.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **named)
        out, err = process.communicate()
        done = subprocess.CompletedProcess(list(command), process.wait(), out, err)
        if check:
            done.check_returncode()
        return done


@contextmanager
def forking(*modules: str, python: str = sys.executable, env: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Yields what stands in for the module subprocess: forks of a process with these modules, or itself where forks do not work."""
    if not WORKS:
        yield subprocess
        return
    link, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = dict(os.environ if env is None else env)
    server = subprocess.Popen([python, "-P", "-c", SERVER, str(its.fileno()), json.dumps(modules)], pass_fds=[its.fileno()], env=env)
    its.close()
    assert link.recv(1) == b"x", "the modules cannot be imported"
    yield Forks(link, python, env)
    link.close()
    server.wait()
