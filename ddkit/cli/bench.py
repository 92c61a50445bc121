"""The command that measures speed: bench."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.core import ParameterSource

from ddkit.cli.common import CELLS, Kind, as_json, converted, echo_json, quiet, refuse_given, set_option, show
from ddkit.components import registry, trust
from ddkit.errors import FlagError


def _numbers(text: str, least: int = 1) -> tuple[int, ...]:
    found = converted(text.split(","), int, f"{text!r} is not a list of whole numbers such as 1,10,50.")
    if min(found) < least:
        raise ValueError(f"{min(found)} is smaller than {least}.")
    return found


NUMBERS = Kind("n,n,...", _numbers)
USED_BY = {  # flag: the parts that it changes; a flag that is not here changes all parts
    "losses": ("steps",), "recipes": ("methods",), "networks": ("evaluation",), "files": ("loading",), "plain": ("steps", "evaluation"),
    **dict.fromkeys(("steps", "run_steps", "sets"), ("steps", "methods")), "pipc": ("steps", "methods", "loading"),
    **dict.fromkeys(("ipc", "channels", "devices"), ("steps", "methods", "evaluation")),
    **dict.fromkeys(("cells", "classes", "size"), ("steps", "methods", "evaluation", "loading")),
}  # fmt: skip


@click.command()
@click.argument("parts", nargs=-1, metavar="[steps|methods|evaluation|loading|startup]...")
@click.option(
    "--losses",
    multiple=True,
    default=("dm",),
    show_default=True,
    metavar="NAMES",
    help="Losses of a run. Repeat the flag to measure several runs.",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME",
    help="Recipe to measure. Repeat the flag for several. Default: all installed recipes.",
)
@click.option("--ipc", type=NUMBERS, default="1,10", show_default=True, help="Synthetic images per class.")
@click.option("--pipc", type=NUMBERS, default="10,50", show_default=True, help="Real images per class. A step uses at most 256 per class.")
@click.option("--cells", type=CELLS, help="Pairs of ipc and pipc, e.g. 1:10,10:50, instead of all combinations.")
@click.option(
    "--classes", type=Kind("n,n,...", functools.partial(_numbers, least=2)), default="10", show_default=True, help="Number of classes."
)
@click.option("--size", type=NUMBERS, default="32", show_default=True, help="Height and width of the images in pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True, help="Number of image channels.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("auto",),
    show_default=True,
    metavar="NAME",
    help="Device to compute on. Repeat the flag for several.",
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=3, show_default=True, help="Repetitions of each measurement. The table shows the median."
)
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Number of measured steps.")
@click.option(
    "--run-steps",
    type=click.IntRange(min=1),
    default=5000,
    show_default=True,
    help="Length of the run, in steps, for which automatic settings are chosen.",
)
@click.option(
    "--networks",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Number of networks for which the evaluation chooses automatic settings.",
)
@click.option(
    "--files", type=NUMBERS, default="1000,5000,50000", show_default=True, help="Number of files in the image folders that are loaded."
)
@click.option("--plain/--no-plain", default=True, help="Whether to run the plain loops too, which the ratios need.")
@set_option("Set any recipe value of the measured steps, e.g. engine.compile=false.")
@as_json
@quiet
def bench(parts: tuple[str, ...], as_json: bool, quiet: bool, **flags: Any) -> None:
    """Measure speed and memory on this machine, with random images. Without arguments, steps and evaluation are measured.

    \b
    steps       time and memory of a step, the ratio to the reference loop (a plain implementation of the same losses)
                and to ddkit's own plain path, and the share of this machine's matrix-product rate that the step reaches
    methods     time, memory and set-up (initial images, experts) of a step of each recipe, by default at --cells 1:10,10:50
    evaluation  networks per minute under dm-official, and the ratio to the loop of the published code
    loading     seconds to load the accessible images of an image folder, the first and the second time
    startup     seconds of ddkit --help, of ddkit list, and of a run of one step
    """
    from ddkit import bench as benching
    from ddkit.nn.device import pick_device
    from ddkit.recipes.resolve import resolve

    unknown = [part for part in parts if part not in benching.PARTS]
    if unknown:
        raise FlagError(f"'{unknown[0]}' is not a part that can be measured. Choose from: {', '.join(benching.PARTS)}.")
    parts = parts or benching.Settings().parts
    unused = [name for name, users in USED_BY.items() if not set(users) & set(parts)]
    refuse_given(unused, f"only {' and '.join(dict.fromkeys(parts))} {'are' if len(set(parts)) > 1 else 'is'} measured.")
    sets, cells, channels = flags.pop("sets"), flags.pop("cells"), int(flags.pop("channels"))
    if cells:
        refuse_given(("ipc", "pipc"), "--cells gives the pairs of ipc and pipc.")
    for losses in flags["losses"]:
        resolve("practical", losses=losses, evaluators="none", sets=sets)
    installed = [plugin.name for plugin in registry.plugins() if plugin.kind == "recipe"]
    found = {name: resolve(name, evaluators="none", sets=sets) for name in flags["recipes"] or installed if "methods" in parts}
    without = [name for name, recipe in found.items() if not recipe.losses]
    if flags["recipes"] and without:
        raise FlagError(f"--recipe {without[0]}: this recipe has no losses, so there are no steps to measure.")
    flags["recipes"] = tuple(name for name in found if name not in without)
    for device in flags["devices"]:
        if device not in ("auto", "cpu"):
            pick_device(device)
    if min(flags["files"]) < flags["classes"][0]:
        raise FlagError(f"--files {min(flags['files'])}: a folder of {flags['classes'][0]} classes needs at least one image per class.")
    source = click.get_current_context().get_parameter_source
    if "methods" in parts and not cells and ParameterSource.COMMANDLINE not in (source("ipc"), source("pipc")):
        cells = benching.Settings().cells
    ipcs, pipcs = flags.pop("ipc"), flags.pop("pipc")
    pairs = tuple((ipc, pipc) for ipc in ipcs for pipc in pipcs)
    settings = benching.Settings(
        parts=parts, cells=cells or pairs, sizes=flags.pop("size"), channels=channels, sets=tuple(sets.items()), **flags
    )
    with trust.granting(sets):
        result = benching.bench(settings, (lambda text: None) if quiet else lambda text: click.echo(text, err=True))
    if as_json:
        echo_json(result)
    else:
        show("\n\n".join(_tables(result, benching.PARTS)))


def _number(digits: int, factor: float = 1.0, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value * factor:.{digits}f}{unit}"


def _exponent(value: dict[str, Any]) -> str:
    parts = [("time", "seconds_per_step"), ("work", "work"), ("memory", "memory")]
    return ", ".join(f"{name} {value[key]:.2f}" for name, key in parts if value[key] is not None)


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # key of a row: (title of its column, value to text)
    "recipe": ("recipe", str),
    "losses": ("losses", str), "files": ("files", str), "ipc": ("ipc", str), "pipc": ("pipc", str), "classes": ("classes", str),
    "size": ("size", str), "device": ("device", str), "command": ("command", str),
    "seconds_per_step": ("s/step", _number(4)), "steps_per_second": ("steps/s", _number(2)),
    "networks_per_minute": ("networks/min", _number(2)), "seconds_per_network": ("s/network", _number(1)),
    "epoch_seconds": ("ms/epoch", _number(1, 1000)), "test_seconds": ("s/test", _number(2)),
    "first_seconds": ("first s", _number(4)), "second_seconds": ("again s", _number(4)), "seconds": ("s", _number(2)),
    "reference_seconds_per_step": ("reference loop s/step", _number(4)),
    "reference_seconds_per_network": ("published loop s/network", _number(1)),
    "reference_epoch_seconds": ("ms/epoch", _number(1, 1000)), "reference_test_seconds": ("s/test", _number(2)),
    "ratio_to_reference": ("times as fast", _number(2, unit="x")), "plain_seconds_per_step": ("plain path s/step", _number(4)),
    "ratio_to_plain": ("times as fast", _number(2, unit="x")), "first_network_seconds": ("first network s", _number(1)),
    "peak_mib": ("peak MiB", _number(0)), "plain_peak_mib": ("plain path MiB", _number(0)),
    "setup_seconds": ("set-up s", _number(1)),
    "limit_fraction": ("of the limit", _number(0, 100, " %")), "first_step_seconds": ("first step s", _number(1)),
    "workers": ("workers", str), "precision": ("precision", str), "compiled": ("compiled", lambda value: "yes" if value else "no"),
    "exponent": ("exponent of", _exponent),
}  # fmt: skip
CONSTANT = {  # values that stand once above the table if every row has the same one
    "losses": "losses {}", "classes": "{} classes", "size": "{} pixels", "device": "{}", "precision": "{}",
    "workers": "workers: {}", "compiled": "compiled: {}",
}  # fmt: skip


def _tables(result: dict[str, Any], parts: Iterable[str]) -> list[str]:
    """Returns the limits of the devices, then a table of each part that was measured."""
    from tabulate import tabulate

    limits = []
    for limit in result.get("limits", ()):
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {name}" for name, rate in limit["rates"].items())
        limits.append(f"{limit['device']}: {limit['name']}, {limit['threads']} threads, torch {limit['torch']}, matrix products at {rates}")
    texts = ["\n".join(limits)] if limits else []
    for part in (part for part in parts if result.get(part)):
        rows = result[part]
        said = [key for key in CONSTANT if key in rows[0] and len({row.get(key) for row in rows}) == 1]
        title = ", ".join(
            [f"{part}: median of {result['runs']} runs", *(CONSTANT[key].format(COLUMNS[key][1](rows[0][key])) for key in said)]
        )
        used = [key for key in COLUMNS if key not in said and any(row.get(key) is not None for row in rows)]
        lines = [["-" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in used] for row in rows]
        texts.append(f"{title}\n\n{tabulate(lines, [COLUMNS[key][0] for key in used], tablefmt='github', disable_numparse=True)}")
    return texts
