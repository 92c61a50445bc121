"""The commands that read and write files for others: import, export and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import (
    Kind,
    Names,
    Place,
    as_json,
    converted,
    echo_json,
    names_of,
    plugin_files,
    quiet,
    set_option,
    set_verbosity,
    show,
)

SHOWN = 12  # exported files that are listed by name; --json lists all


def _sides(text: str) -> tuple[int, ...]:
    """Returns height and width; one number stands for both."""
    sides = converted(text.split(","), int, f"{text!r} is not a list of whole numbers separated by commas.")
    return sides * 2 if len(sides) == 1 else sides


def _classes(text: str) -> int | list[str]:
    """Returns a number of classes, or their names: separated by commas, or those of a file with a name on each line."""
    if text.isdecimal() and text.isascii():
        if not 2 <= int(text[:9]) <= 100_000:
            raise ValueError(f"{text[:20]} is not a number of classes from 2 to 100,000.")
        return int(text)
    return names_of(text)


def _step_size(text: str) -> float | str:
    """Returns a number, or the name of a file."""
    try:
        return float(text)
    except ValueError:
        return text


VALUES = Kind("x,x,...", lambda text: converted(text.split(","), float, f"{text!r} is not a list of numbers separated by commas."))


@click.command(name="import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=Place())
@click.option("--out", required=True, metavar="PATH", type=Place(), help="New folder for a set, or new file for a teacher.")
@click.option("--as", "kind", type=click.Choice(["auto", "set", "teacher"]), default="auto", show_default=True, help="Content of the file.")
@click.option("--mean", type=VALUES, help="Mean of each channel, for pixels in 0..1.")
@click.option("--std", type=VALUES, help="Standard deviation of each channel, for pixels in 0..1.")
@click.option(
    "--classes",
    type=Kind("n|names|file", _classes),
    help="Class names in label order, a file with a name on each line, or the number of classes.",
)
@click.option(
    "--pixels",
    type=click.Choice(["normalised", "unit"]),
    help="Unit of a set's floats: normalised (by --mean and --std), or unit (0 is black, 1 is white).",
)
@click.option(
    "--labels",
    multiple=True,
    metavar="FILE|argmax",
    help="File with the labels, if they are not in FILE. argmax stores the likeliest class of labels (n, K).",
)
@click.option("--ipc", type=click.IntRange(min=1), help="Images per class, if the images have no labels and are sorted by class.")
@click.option(
    "--run",
    "--index",
    "index",
    type=click.IntRange(min=0),
    help="Number of the set, if the file holds the sets of several runs (default: 0, the first).",
)
@click.option("--grid", type=click.IntRange(1, 8), help="Each image is a grid of N x N images. 1 means that it is not a grid.")
@click.option(
    "--whitened/--not-whitened",
    default=None,
    help="Whether the images are whitened, by ZCA of all training images of --dataset.",
)
@click.option(
    "--dataset", type=Names("dataset"), metavar="NAME[:ARG]", help="Real data whose training images define the whitening of --whitened."
)
@click.option("--step-size", type=Kind("x|file", _step_size), help="Learning rate that was learned with the set, or a file that holds it.")
@click.option("--size", type=Kind("x,x,...", _sides), help="Image size of a teacher: height,width, or one number for both.")
@click.option("--model", type=Names("model"), metavar="NAME", help="Architecture of a teacher (default: convnet).")
@set_option("Option of a teacher's model (teacher.norm=batch), of a set's parametrization, or of --whitened (data.whiten_eps=0.1).")
@plugin_files
@as_json
@quiet
def import_(files: tuple[Path, ...], out: Path, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Import a set or a teacher of another project. FILE is a file of torch.save, or a .npz, .npy or .safetensors file.

    Only tensors and numbers are read, so that no code in the file can run. --mean and --std give the normalisation of the images. Several
    files are joined into one set.

    \b
    ddkit import images_best.pt --labels labels_best.pt --out mtt-set --pixels normalised --mean 0.49,0.48,0.45 --std 0.2,0.2,0.2
    ddkit import res_DM_CIFAR10_ConvNet_10ipc.pt --out dm-set --pixels normalised --mean 0.49,0.48,0.45 --std 0.2,0.2,0.2
    ddkit import convnet.pt --out teacher.safetensors --classes 10 --size 32 --mean 0.49,0.48,0.45 --std 0.2,0.2,0.2
    """
    set_verbosity(quiet)
    from ddkit import api

    found = api.import_file(files, out, **flags)
    if isinstance(found, api.Artifact):
        facts = {"kind": "set", "images": list(found.images.shape), "classes": found.class_names}
        told = f"{len(found.images)} images of {len(found.class_names)} classes"
    else:
        facts = {"kind": "teacher", "model": found.info["model"], "classes": found.info["class_names"]}
        told = f"{found.info['model']} for {len(found.info['class_names'])} classes"
    if as_json:
        echo_json({"out": str(out), **facts})
    else:
        show(f"{facts['kind']:8} {out}\n{told}")


@click.command()
@click.argument("target", metavar="RUN|FILE", type=click.Path())
@click.option("--to", required=True, metavar="NAME[:ARG]", help="Exporter: imagefolder, npz, png, card, ...")
@click.option("--out", required=True, metavar="DIR", type=Place(), help="New or empty folder to write.")
@set_option("Option of the exporter, e.g. columns=10.", "OPTION=VALUE")
@plugin_files
@as_json
def export(target: str, to: str, out: Path, sets: dict[str, Any], as_json: bool) -> None:
    """Write a synthetic set in a format that other programs read, with a card that describes it.

    `ddkit list exporters` shows the formats, and `ddkit info exporter NAME` shows the options of one.
    """
    from ddkit import api
    from ddkit.run.manifest import file_entry

    folder = api.export(target, to, out, options=sets)
    found = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (len(path.parts), path))
    files = [{"name": path.relative_to(folder).as_posix(), **file_entry(path)} for path in found]
    if as_json:
        echo_json({"exporter": to.partition(":")[0], "out": str(out), "files": files})
        return
    for entry in files[:SHOWN]:
        show(f"{entry['bytes']:>12,}  {out / entry['name']}")
    if len(files) > SHOWN:
        show(f"{sum(entry['bytes'] for entry in files[SHOWN:]):>12,}  in {len(files) - SHOWN} more files")


@click.command()
@click.argument("target", metavar="RUN", type=click.Path())
@click.option("--out", metavar="FILE", type=Place(), help="New file to write (default: report.html in the run directory).")
@click.option("--figures", metavar="DIR", type=Place(), help="Also write each chart as a PDF and a PNG file into a new folder.")
@as_json
def report(target: str, out: Path | None, figures: Path | None, as_json: bool) -> None:
    """Write the report of a finished run again. It is one HTML page with images, curves and figures.

    Each run writes its report at its end, and `ddkit evaluate` updates it. The page needs no network and no other file.
    """
    from ddkit import api

    file = api.report(target, out=out, figures=figures)
    charts = [] if figures is None else [str(chart) for chart in sorted(figures.iterdir())]
    if as_json:
        echo_json({"run": target, "report": str(file)} | ({} if figures is None else {"figures": charts}))
    else:
        show("\n".join([f"report   {file}", *(f"figure   {chart}" for chart in charts)]))
