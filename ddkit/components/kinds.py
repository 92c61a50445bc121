"""The kinds of components: what a package announces, of which class it is, where a recipe has its options, and which commands use it."""

from __future__ import annotations

from typing import NamedTuple

from ddkit.components import base


class Kind(NamedTuple):
    """A kind of component. `base` None: files of a package, which are not imported, or for an observer a module with hooks.

    `group` is the group of entry points, `paths` are the places of a component's options in a recipe, `uses` commands that use it, and
    `trial` is the first command for a new one, if it is not the first of these in few steps. NAME stands for the component's.
    """

    group: str
    base: type[base.Component] | None = None
    paths: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    trial: str = ""

    @property
    def table(self) -> str:
        """The table of a recipe that has the options, "" if there is none."""
        return self.paths[0].partition(".")[0] if self.paths else ""

    def tried(self, name: str) -> str:
        """Returns the first command for a new component called `name`."""
        return (self.trial or f"{self.uses[0]} --steps 20").replace("NAME", name)


KINDS: dict[str, Kind] = {
    "loss": Kind(
        "ddkit.losses", base.Loss,
        paths=("losses.NAME",),
        uses=("ddkit distill --losses NAME", "ddkit distill --losses NAME:0.5 --ipc 1 --pipc 10"),
        trial="ddkit distill --losses dm,NAME --steps 20",
    ),
    "loss-group": Kind("ddkit.recipes", uses=("ddkit distill --losses NAME", "ddkit distill --losses dm,NAME:0.5 --ipc 1 --pipc 10")),
    "initializer": Kind(
        "ddkit.initializers", base.Initializer,
        paths=("initializer",),
        uses=("ddkit distill --init NAME",),
    ),
    "parametrization": Kind(
        "ddkit.parametrizations", base.Parametrization,
        paths=("parametrization",),
        uses=("ddkit distill --set parametrization.use=NAME",),
    ),
    "augmenter": Kind(
        "ddkit.augmenters", base.Augmenter,
        paths=("augmenter", "views.VIEW", "train"),
        uses=("ddkit distill --augment NAME",),
    ),
    "evaluator": Kind(
        "ddkit.evaluators", base.Evaluator,
        paths=("evaluators.NAME",),
        uses=("ddkit distill --evaluate NAME", "ddkit evaluate my-run --evaluate NAME"),
    ),
    "model": Kind(
        "ddkit.models", base.Model,
        paths=("network", "teacher", "evaluators.accuracy.model_options"),
        uses=(
            "ddkit distill --model NAME",
            "ddkit train --model NAME --out teacher.safetensors",
            "ddkit evaluate my-run --model convnet,NAME",
        ),
    ),
    "dataset": Kind(
        "ddkit.datasets", base.Dataset,
        paths=("data",),
        uses=(
            "ddkit distill --dataset NAME",
            "ddkit train --dataset NAME --out teacher.safetensors",
            "ddkit evaluate set.safetensors --dataset NAME",
        ),
    ),
    "exporter": Kind(
        "ddkit.exporters", base.Exporter,
        uses=("ddkit export my-run --to NAME --out exported",),
        trial="ddkit check exporter NAME",
    ),
    "recipe": Kind("ddkit.recipes"),
    "protocol": Kind("ddkit.protocols", uses=("ddkit distill --protocol NAME", "ddkit evaluate my-run --protocol NAME")),
    "study": Kind("ddkit.studies", uses=("ddkit reproduce NAME --show", "ddkit reproduce NAME")),
    "observer": Kind("ddkit.hooks", trial="ddkit distill --steps 20 --verbose"),
}  # fmt: skip
BASES = {name: kind.base for name, kind in KINDS.items() if kind.base is not None}
CHECKED = (*BASES, "observer")  # kinds that have a conformance suite
DATA_KINDS = tuple(name for name in KINDS if name not in CHECKED)  # TOML files of a package, located without importing it
