"""Processes of ddkit's own. They end with the process that started them, and what they answer is JSON: nothing is pickled between them.

What they have to know of it is handed over on their command line: the code that the user named, and the plugin files.

A child's stdin is a pipe whose other end its parent alone holds. The system closes it however the parent ends, also by SIGKILL,
and the child then sends itself SIGTERM: a run writes a checkpoint, anything else just ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from subprocess import Popen as Process
from typing import Any

from ddkit import output
from ddkit.components import plugin_file, trust
from ddkit.errors import RunFailed


class ChildEnded(RunFailed):
    """A child process ended without an answer. The message has its exit code and the last line of its output."""


_BEGIN = "import sys\nfrom ddkit.run import children\nchildren.begin(sys.argv.pop(1))\n"


def of_module(name: str) -> str:
    """Returns the code that runs a module as `python -m NAME` does."""
    return f"import runpy\nrunpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


def _started(code: str, arguments: Sequence[str], environment: Mapping[str, str] | None, stdout: Any, stderr: Any) -> Process[str]:
    words = [sys.executable, "-P", "-c", _BEGIN + code, handed_over(), *arguments]
    env = dict(os.environ if environment is None else environment)
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, text=True, env=env)


def run(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, begun: Callable[[Process[str]], object] = lambda process: None
) -> CompletedProcess[str]:
    """Runs Python `code` as a child until it ends; there sys.argv[1:] are `arguments`, and what it gives to reply() is its stdout.

    `begun` is called with the process.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = _started(code, arguments, environment, out, err)
        assert process.stdin is not None
        with process.stdin:  # closed if this process is interrupted, which ends the child
            begun(process)
            ended = process.wait()
        out.seek(0)
        err.seek(0)
        return CompletedProcess(process.args, ended, out.read(), err.read())


class Child:
    """A process `python -m MODULE ARGUMENT` that calls ddkit.reply with a JSON object when it is ready, and for each line on its stdin.

    Its output goes to the file `errors`, and `environment` replaces that of this process. It ends when stop() is called, or
    with this process.

    Examples:
        >>> begin, answer = "ddkit.reply({'begun with': sys.argv[1]})", "ddkit.reply({'twice': 2 * json.loads(line)})"
        >>> _ = Path("worker.py").write_text(f"import json, sys, ddkit; {begin}{chr(10)}for line in sys.stdin: {answer}")
        >>> environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path])}
        >>> child = ddkit.Child("worker", "hello", errors=Path("worker.log"), environment=environment)
        >>> child.answer(), child.ask(21)
        ({'begun with': 'hello'}, {'twice': 42})
        >>> child.stop()
    """

    def __init__(self, module: str, argument: str, *, errors: Path, environment: Mapping[str, str] | None = None) -> None:
        self._errors = errors
        with errors.open("w") as stream:
            self._process = _started(of_module(module), [argument], environment, subprocess.PIPE, stream)

    def ask(self, question: Any) -> dict[str, Any]:
        """Returns the answer to `question`; raises ChildEnded if there is none."""
        with suppress(OSError, ValueError):  # the answer, or its absence, tells why it is gone
            print(json.dumps(question), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Returns its next reply; raises ChildEnded if it ends first."""
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed by another thread's stop()
            if line := self._process.stdout.readline():
                return dict(json.loads(line))
        ended, words = self._process.wait(), ["its output is lost"]
        with suppress(OSError):
            words = self._errors.read_text(encoding="utf-8").strip().splitlines() or ["it has no output"]
        raise ChildEnded(f"ended with exit code {ended}: {words[-1]}")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends it at once, if it still runs."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):  # a process that is gone leaves an unsent line
                stream.close()


# What the two hand each other


def handed_over() -> str:
    """Returns what take_over() in a process that this one starts makes known there: grants, and plugin files with their sha256."""
    values, everything = trust.granted()
    return json.dumps({"values": sorted(values), "everything": everything, "plugin_files": plugin_file.known()})


def take_over(text: str) -> None:
    """Makes known in this process what the one that started it handed over; from now on its stdout is for reply() alone."""
    output.answers()
    found = json.loads(text)
    plugin_file.remember(found["plugin_files"])
    trust.grant_process(trust.Granted(frozenset((path, value) for path, value in found["values"]), found["everything"]))


def reply(value: Mapping[str, Any]) -> None:
    """Sends `answer` to the process that started this one.

    Examples:
        >>> ddkit.reply({"done": 3})  # in a module that ddkit.Child runs  # doctest: +SKIP
    """
    print(json.dumps(value), file=output.answers(), flush=True)


def begin(text: str) -> None:
    """Makes this process a child: it ends with its parent, and knows what its parent handed over in `text`."""
    source = os.dup(0)
    read, write = os.pipe()
    os.dup2(read, 0)
    os.close(read)

    def pass_on() -> None:
        """Passes on what the parent writes to stdin; at its end SIGTERM ends this process."""
        while data := os.read(source, 65536):
            os.write(write, data)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=pass_on, daemon=True).start()
    take_over(text)
