"""What several commands share: kinds of flags, the flags themselves, and how answers are printed."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ddkit import output
from ddkit.distributed import follows
from ddkit.errors import FlagError, RunFilesError, refuse_unused
from ddkit.files import MOST_TOML, SCHEMA, read_text, with_home
from ddkit.run.warnings import show_from
from ddkit.text import doubles, printable

F = TypeVar("F", bound=Callable[..., Any])
NARROWEST = 20  # characters that the last column of a table has in a narrow terminal


class Names(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.3 on
    """Text that names components of `kinds`; with `many` several, separated by commas, of which a shell completes the last one.

    It takes any text unchanged. The code that uses the names reports an unknown one.
    """

    name = "text"

    def __init__(self, *kinds: str, many: bool = False, files: str = "") -> None:
        """`files` is the ending of files that may be given too, "" if none may."""
        self.kinds = kinds
        self.many = many
        self.files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns the names that begin as what was typed, with their summaries, and files; imports none of the components."""
        from ddkit.components import registry

        before, comma, last = incomplete.rpartition(",") if self.many else ("", "", incomplete)
        known = sorted({(plugin.name, registry.status(plugin)[1]) for plugin in registry.plugins() if plugin.kind in self.kinds})
        items = [CompletionItem(f"{before}{comma}{name}", help=summary) for name, summary in known if name.startswith(last)]
        folder = Path(incomplete).parent if "/" in incomplete else Path(".")
        files = sorted(folder.glob(f"*{self.files}")) if self.files else []
        return items + [CompletionItem(str(path)) for path in files if str(path).startswith(incomplete.removeprefix("./"))]


class Kind(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.3 on
    """Text that `parse` turns into a value. The ValueError that it raises becomes the error message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def converted(texts: Sequence[str], kind: Callable[[str], Any], wrong: str) -> tuple[Any, ...]:
    """Returns every text as a `kind`; if one cannot be converted, raises a ValueError with the message `wrong`."""
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        raise ValueError(wrong) from None


def _pipc(text: str) -> int | str:
    if text == "all":
        return text
    (number,) = converted([text], int, f"{text!r} is neither a number nor 'all'.")
    if number < 0:
        raise ValueError(f"{number} is negative.")
    return int(number)


def _ipc(text: str) -> int | dict[str, int]:
    """Returns the number of "10", or of "10,tail=3" {"default": 10, "tail": 3}."""
    wrong = f"{text!r} is not a number of images, such as 10, or one with the numbers of some classes, such as 10,tail=3."
    pairs = [part.rpartition("=") for part in text.split(",")]
    names = [name.strip() if equals else "default" for name, equals, _ in pairs]
    numbers = converted([number for _, _, number in pairs], int, wrong)
    for name in doubles(names):
        raise ValueError(f"{text!r} has two numbers for {name}. Give one.")
    found = dict(zip(names, numbers, strict=True))
    if min(found.values()) < 1:
        raise ValueError(f"{text!r}: each class needs at least 1 image.")
    return found["default"] if list(found) == ["default"] else found


def _cells(text: str, *, whole: bool) -> tuple[tuple[int, int | str], ...]:
    """Returns pairs IPC:PIPC; with `whole` PIPC may also be 0 or "all"."""
    wrong = f"{text!r} is not a list of cells such as 1:10,10:50{',1:all' if whole else ''}."
    pairs = [part.strip().split(":") for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(wrong)
    cells = tuple(
        (converted([ipc], int, wrong)[0], pipc if whole and pipc == "all" else converted([pipc], int, wrong)[0]) for ipc, pipc in pairs
    )
    if any(int(number) < 1 for ipc, pipc in cells for number in ((ipc,) if whole else (ipc, pipc))):
        raise ValueError("ipc must be at least 1." if whole else "ipc and pipc must be at least 1.")
    for ipc, pipc in doubles(cells):
        raise ValueError(f"{text!r} has the cell {ipc}:{pipc} twice. Write it once.")
    return cells


IPC = Kind("n|n,class=n,...", _ipc)


def _pairs(text: str) -> dict[str, str]:
    """Returns the pairs of cat=tabby,dog=beagle, or of a TOML table, for names that have such marks: {"cat, small"="tabby"}."""
    if text.startswith("{"):
        pairs = list(tomllib.loads(f"pairs = {text}")["pairs"].items())
    else:
        pairs = [(one.strip(), other.strip()) for one, _, other in (part.partition("=") for part in text.split(","))]
    if not all(isinstance(name, str) and name for pair in pairs for name in pair) or len(dict(pairs)) < len(pairs) or not pairs:
        raise ValueError(f"{text!r} is not a list of pairs such as cat=tabby,dog=beagle, each class once.")
    return dict(pairs)


def names_of(text: str) -> list[str]:
    """Returns the names of classes in a text, separated by commas, or those of a file with a name on each line."""
    if os.path.exists(text) and not os.path.isdir(text):  # Path.exists fails on a long list; a folder may be called as a class is
        try:
            return [line.strip() for line in read_text(text, most=MOST_TOML).splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ValueError(f"the file {text} cannot be read: {error}.") from None
    return [name.strip() for name in text.split(",")]


PIPC = Kind("n|all", _pipc)
CELLS = Kind("ipc:pipc,...", functools.partial(_cells, whole=False))
PAIRS = Kind("name=name,...", _pairs)
ROWS = Kind("ipc:pipc,...", functools.partial(_cells, whole=True))


class Place(click.Path):
    """A pathlib path. A leading `~/` means the home folder; a shell does not replace it in --out=~/x."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("the path is empty.", param, ctx)  # a shell's variable that is not set, and not the current folder
        return Path(os.fsdecode(super().convert(with_home(str(value)), param, ctx)))


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Returns one decorator that applies several options, first one first in the help."""
    return lambda function: functools.reduce(lambda made, decorator: decorator(made), reversed(decorators), function)


def prepared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `command` with two things done first: stdout is kept for its answer alone, and its plugin files are read."""

    @functools.wraps(command)
    def run(*, plugin_files: Sequence[str] = (), **flags: Any) -> Any:
        output.answers()
        for file in plugin_files:
            from ddkit.components.registry import add_plugin_file

            add_plugin_file(Path(file))
        return command(**flags)

    return run


def _as_table(context: click.Context, option: click.Parameter, texts: Sequence[str]) -> dict[str, Any]:
    """Returns the paths and values of --set PATH=VALUE; if a path is given twice, the last value counts."""
    from ddkit.recipes.settings import parse_set

    table: dict[str, Any] = {}
    for path, value in map(parse_set, texts):
        table.pop(path, None)
        table[path] = value
    return table


def set_option(help_: str, metavar: str = "PATH=VALUE") -> Callable[[F], F]:
    """Returns the flag --set, whose parameter `sets` is a table."""
    return click.option("--set", "sets", multiple=True, metavar=metavar, callback=_as_table, help=help_)


plugin_files = click.option(
    "--plugin", "plugin_files", multiple=True, metavar="FILE",
    help="Python file with components for this command. The class MyLoss is available by the name my-loss.",
)  # fmt: skip
allow_code = click.option(
    "--allow-code", is_flag=True,
    help="Allow Python code that a recipe, run or teacher file names (python:module.factory). Code named in a flag is always allowed.",
)  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
shared = options(
    click.option(
        "--dataset", type=Names("dataset"), metavar="NAME[:PATH]", help="Real data: digits, cifar10, imagefolder:PATH, npz:PATH, ..."
    ),
    click.option("--data-dir", metavar="DIR", help="Folder for downloaded datasets."),
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]|mps", help="Device to compute on."),
    click.option("--seed", type=click.IntRange(min=0, max=2**53), help="Seed of every random draw."),
    set_option("Set any recipe value, e.g. losses.dm.weight=0.01."),
    plugin_files,
    allow_code,
    as_json,
)
protocol = click.option(
    "--protocol", type=Names("protocol", files=".toml"), metavar="NAME|FILE",
    help="Evaluation protocol: short, dm-official, dc-official, practical-sam, idc, ncfm, mtt, rded, dd, or a file: ./mine.toml.",
)  # fmt: skip
quiet = click.option("--quiet", is_flag=True, help="Show errors only: no progress, and no warnings, which the manifest keeps.")
verbose = click.option(
    "--verbose", is_flag=True, help="Show lines instead of a progress bar: each stage, and the losses of every logged step."
)


def set_verbosity(quiet: bool, verbose: bool = False) -> None:
    """Sets how much of ddkit's log reaches stderr; raises FlagError where both are asked for."""
    if quiet and verbose:
        raise FlagError("--quiet and --verbose cannot be used together. Leave one of them out.")
    logging.getLogger("ddkit").setLevel(logging.INFO if verbose else logging.WARNING)
    show_from(logging.ERROR if quiet or follows() else logging.NOTSET)


def refuse_given(names: Iterable[str], why: str) -> None:
    """Raises FlagError if one of the parameters `names` is on the command line, where it has no effect; `why` says why."""
    context = click.get_current_context()
    wanted = set(names)
    given = [p for p in context.command.params if p.name in wanted and context.get_parameter_source(p.name) == ParameterSource.COMMANDLINE]
    refuse_unused([param.opts[0] for param in given], why)


def echo_json(facts: Mapping[str, Any]) -> None:
    """Prints one JSON object on stdout, whose first key is its schema. Characters that control a terminal are escaped, as in JSON."""
    show(json.dumps({"schema": SCHEMA, **facts}, ensure_ascii=False, allow_nan=False))


def show(text: str, end: str = "\n") -> None:
    """Prints text on stdout. Characters that control a terminal are escaped, as names of classes and files may hold any.

    If torchrun started several processes, only the first one prints.
    """
    if follows():
        return
    try:
        click.echo(printable(text + end), file=output.answers(), nl=False)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        output.discard()
        sys.exit(0)
    except OSError as error:
        output.discard()
        raise RunFilesError(
            f"Standard output cannot be written: {error.strerror}. The files that the command has written are complete."
        ) from None


def show_table(columns: Mapping[str, Sequence[Any]], spare: Sequence[str] = ()) -> None:
    """Prints a table. On a terminal the last column is cut at its edge; if that leaves too little of it, the `spare` columns go one by one.

    Whatever reads a pipe gets all columns whole.
    """
    from tabulate import tabulate

    texts = {
        key: ["-" if value in (None, "") else printable(str(value)).replace("\n", r"\n") for value in values]
        for key, values in columns.items()
    }
    if output.answers().isatty():
        sizes = {key: max([len(key) + 2, *map(len, values)]) for key, values in texts.items()}  # tabulate pads a head
        width = shutil.get_terminal_size().columns
        for gone in ("", *spare):
            sizes.pop(gone, None)
            *_, last = sizes
            room = width - sum(size + 2 for key, size in sizes.items() if key != last)
            if room >= min(NARROWEST, sizes[last]):
                break
        texts = {key: texts[key] for key in sizes}
        texts[last] = [text if len(text) <= room else f"{text[: max(0, room - 1)].rstrip()}…" for text in texts[last]]
    show(tabulate(texts, headers="keys", tablefmt="simple", disable_numparse=True))


class LogFormat(logging.Formatter):
    """A log line as it is, without what acts on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
