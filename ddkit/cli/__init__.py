"""The command `ddkit`: each of its commands parses, makes one call and prints what comes back.

The call is one of ddkit.api, or, for commands about more than one run or about plugins, of studies, bench, testing or the registry.
Importing this package costs neither torch nor numpy.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from ddkit.cli.common import LogFormat, prepared
from ddkit.distributed import LastWords, ending_signals, follows, launched
from ddkit.errors import DdkitError, out_of_memory
from ddkit.nn.device import tune_process
from ddkit.text import printable

ENDED_BY_TORCHRUN = (
    " torchrun ended this process. Either torchrun itself was stopped, or another process failed; its output below names it. A run that "
    "has a checkpoint is continued by `ddkit distill --out DIR --resume`."
)
INTERRUPTED = "Interrupted. No half-written file is left. Run the same command again."
SHARED = ("distill", "evaluate", "reproduce")  # commands whose work the processes that torchrun starts share
COMMANDS = {  # name: module, and the function there
    "blend": ("sets", "blend"), "bench": ("bench", "bench"), "check": ("components", "check"),
    "cite": ("components", "cite"), "compare": ("sets", "compare"), "distill": ("distill", "distill"),
    "evaluate": ("distill", "evaluate"), "export": ("files", "export"), "import": ("files", "import_"), "info": ("components", "info"),
    "join": ("sets", "join"), "list": ("components", "list_components"), "new": ("components", "new"), "report": ("files", "report"),
    "reproduce": ("reproduce", "reproduce"), "schema": ("components", "schema"), "split": ("sets", "split"), "train": ("distill", "train"),
}  # fmt: skip


class Commands(Mapping[str, click.Command]):
    """The commands by name. One is imported when it is asked for: `ddkit list` waits for no code of the others."""

    def __init__(self) -> None:
        self._imported: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._imported:
            module, function = COMMANDS[name]
            command: click.Command = getattr(import_module(f"ddkit.cli.{module}"), function)
            assert command.callback is not None
            command.short_help = command.get_short_help_str(limit=1000)  # `ddkit --help` shows it whole, on several lines if need be
            command.callback = prepared(command.callback)
            self._imported[name] = command
        return self._imported[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@click.group(commands=Commands(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ddkit", message="%(prog)s %(version)s")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show the Python traceback of an error.")
def cli(show_traceback: bool) -> None:
    """Dataset distillation: a tiny synthetic training set from a few real images and a trained model.

    \b
    ddkit distill --losses dm,dkkt --ipc 10    # offline, on the digits that are included
    ddkit list                                 # every installed component
    ddkit info practical                       # the page of a recipe or component
    ddkit reproduce practical-table1 --show    # the paper's table, published and measured
    """


def main() -> NoReturn:
    """Runs the command line; a DdkitError becomes one paragraph on stderr and its exit code."""
    _open_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormat())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    tune_process()
    arguments = sys.argv[1:]
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if follows() and (command not in SHARED or {"-h", "--help"} & set(arguments)):
        sys.exit(0)  # the first of several processes does it
    show = "--traceback" in arguments
    before = {number: signal.signal(number, _end) for number in ending_signals()}
    try:
        cli.main([a for a in arguments if a != "--traceback"], prog_name="ddkit", standalone_mode=False)
        sys.exit(0)
    except DdkitError as error:
        _fail(str(error), error.exit_code, show)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        help_ = f" (`{context.command_path} --help` shows its arguments and flags.)" if context else ""
        _fail(error.format_message().replace("a valid integer range", "a whole number") + help_, error.exit_code, show)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ or error
        number = cause.number if isinstance(cause, _Ended) else signal.SIGINT
        told = str(cause) if isinstance(cause, KeyboardInterrupt) and cause.args else INTERRUPTED
        _fail(f"{told}{ENDED_BY_TORCHRUN if isinstance(cause, _Ended) and launched() else ''}", 128 + number, show)
    except Exception as error:
        message, code = _explained(error, arguments)
        if not message:
            raise
        _fail(message, code, show)
    finally:
        if not launched():  # torchrun's request to end must not cut off the last words
            for each, previous in before.items():
                signal.signal(each, previous)


def _open_streams() -> None:
    """Opens /dev/null in place of standard streams that the caller has closed, so that no other file takes their numbers."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # for as long as the process lasts


MEMORY_ADVICE = {
    "distill": "use a smaller --ipc, --set data.batch=64 (real images per class and step) or --set engine.memory=512 (MiB for chunks of "
    "classes)",
    "evaluate": "use --set evaluators.accuracy.workers=1 (one network at a time) or --set data.memory=512 (MiB of decoded images)",
    "train": "use --set train.batch=64 (images per batch) or --set data.memory=512 (MiB of decoded images)",
}


def _explained(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """Returns message and exit code of an error that comes from the machine or its files, ("", 1) for one that is ddkit's own fault."""
    first = " ".join(str(error).split())[:200].rstrip(".")
    if out_of_memory(error):
        command = next((argument for argument in arguments if argument in MEMORY_ADVICE), "")
        told = f"There is not enough memory{f' ({first})' if first else ''}. Smaller images or a smaller network need less memory"
        return f"{told}{f'; with ddkit {command}, {MEMORY_ADVICE[command]}' if command else ''}.", 1
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)} | {getattr(error, "name", None)}
    if isinstance(error, ImportError | OSError) and "torch" in modules - set(sys.modules):  # its import ended so, or it is not there
        return f"torch cannot be imported ({first}). Install it again with the command that https://pytorch.org shows for this machine.", 1
    if isinstance(error, OSError):  # a path that is too long, or in a folder that may not be read
        return f"{error.filename or 'A file'}: {error.strerror or error}. Name a path that can be read and written.", 5
    return "", 1


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP outside the loop of a run, which handles them itself: ends like Ctrl-C, so that nothing is left behind."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _end(number: int, frame: FrameType | None) -> NoReturn:
    _leave_terminal()
    raise _Ended(number)


def _leave_terminal() -> None:
    """Sends to nowhere what would be written to a terminal that is gone, of which SIGHUP tells: writing to it is an error."""
    try:
        import termios
    except ImportError:  # a system without them
        return
    for file in (1, 2):
        try:
            termios.tcgetattr(file)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), file)


def _fail(message: str, code: int, show: bool) -> NoReturn:
    """Ends the process with `code`; where torchrun started several, one of them tells `message`."""
    if show:
        traceback.print_exc()
    _leave_terminal()
    if launched() and not LastWords().mine(sys.exc_info()[1]):
        sys.exit(code)
    text = printable(" ".join(message.split()))
    print(textwrap.fill(f"ddkit: {text}", width=110, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    sys.exit(code)
