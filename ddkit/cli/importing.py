"""The command that takes over files of other projects: import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import Names, Place, as_json, echo_json, plugin_files, quiet, set_option, set_verbosity, show
from ddkit.files import MOST_TOML, read_text


class Values(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.3 on
    """Numbers separated by commas; with `sides` whole ones, of which one alone stands for two."""

    name = "x,x,..."

    def __init__(self, *, sides: bool = False) -> None:
        self.sides = sides

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            values = tuple((int if self.sides else float)(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of {'whole ' if self.sides else ''}numbers separated by commas.", param, ctx)
        return values * 2 if self.sides and len(values) == 1 else values


class Classes(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.3 on
    """A number of classes, their names separated by commas, or a file with a name on each line."""

    name = "n|names|file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | list[str]:
        text = str(value)
        if text.isdecimal() and text.isascii():
            if not 2 <= int(text[:9]) <= 100_000:
                self.fail(f"{text[:20]} is no number of classes from 2 to 100,000.", param, ctx)
            return int(text)
        if Path(text).exists():
            try:
                return [line.strip() for line in read_text(text, most=MOST_TOML).splitlines() if line.strip()]
            except (OSError, ValueError) as error:
                self.fail(f"the file {text} cannot be read: {error}.", param, ctx)
        return [name.strip() for name in text.split(",")]


@click.command(name="import")
@click.argument("file", type=Place())
@click.option("--out", required=True, metavar="PATH", type=Place(), help="New folder of the set, or file of the teacher.")
@click.option("--as", "kind", type=click.Choice(["auto", "set", "teacher"]), default="auto", show_default=True, help="What the file is.")
@click.option("--mean", type=Values(), help="Mean of each channel, of pixels in 0..1.")
@click.option("--std", type=Values(), help="Standard deviation of each channel.")
@click.option("--classes", type=Classes(), help="Class names by label, a file of them, or their number.")
@click.option("--pixels", type=click.Choice(["normalised", "unit"]), help="What floats of a set are: normalised, or 0 black and 1 white.")
@click.option("--index", type=click.IntRange(min=0), help="Which set, if the file holds several (default: 0, the first).")
@click.option("--size", type=Values(sides=True), help="Image size of a teacher: height,width, or one number.")
@click.option("--model", type=Names("model"), metavar="NAME", help="Architecture of a teacher (default: convnet).")
@set_option("Option of a teacher's model, e.g. teacher.norm=batch; decode.factor=2 if a set's images are grids of 2 x 2.")
@plugin_files
@as_json
@quiet
def import_(file: Path, out: Path, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Take over a set or a teacher of another project. FILE was written by torch.save, or is a .npz or .safetensors file.

    Only tensors are read, so that no code in the file can run. How images were normalised has to be told.

    \b
    ddkit import res_DM_CIFAR10_ConvNet_10ipc.pt --out dm-set --pixels normalised --mean 0.49,0.48,0.45 --std 0.2,0.2,0.2
    ddkit import convnet.pt --out teacher.safetensors --classes 10 --size 32 --mean 0.49,0.48,0.45 --std 0.2,0.2,0.2
    """
    set_verbosity(quiet)
    from ddkit import api

    found = api.import_file(file, out, **flags)
    if isinstance(found, api.Artifact):
        facts = {"kind": "set", "images": list(found.images.shape), "classes": found.class_names}
        told = f"{len(found.images)} images of {len(found.class_names)} classes"
    else:
        facts = {"kind": "teacher", "model": found.info["model"], "classes": found.info["class_names"]}
        told = f"{found.info['model']} for {len(found.info['class_names'])} classes"
    if as_json:
        echo_json({"schema": 1, "out": str(out), **facts})
    else:
        show(f"{facts['kind']:8} {out}\n{told}")
