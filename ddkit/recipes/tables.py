"""The recipe: what a run consists of, as data. Validated before torch is imported."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ddkit.components.options import Option, fields, parse_struct
from ddkit.errors import InputError
from ddkit.recipes.protocols import Protocol
from ddkit.text import shown, suggestion

Positive = Annotated[int, Option(ge=1)]
Beta = Annotated[float, Option(ge=0, lt=1)]
Seed = Annotated[int, Option("seed of every random draw", ge=0, le=2**53)]


class Table(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A table whose keys are all ddkit's."""


class PluginTable(Table):
    """A table that also carries the options of the plugin it names, beside its own keys."""

    options: dict[str, Any] = {}


class DataTable(PluginTable):
    use: Annotated[str, Option("dataset, as NAME or NAME:ARGUMENT")] = "digits"
    dir: Annotated[str, Option("folder for downloaded datasets")] | None = None
    batch: Annotated[int, Option("largest number of real images per class in a step", ge=1)] = 256
    test: Annotated[
        Literal["test", "held-out"],
        Option("images that evaluations test on: the test split, or held-out training images, for choosing settings"),
    ] = "test"
    held_out: (
        Annotated[
            int,
            Option(
                "held-out images per class; if left out, a fifth of the smallest class, at most 200 and no accessible images",
                ge=1,
            ),
        ]
        | None
    ) = None
    memory: Annotated[int, Option("memory in MiB for decoded images, further images are read from the disk in each step", ge=1)] = 2048
    whiten: Annotated[
        bool, Option("whether networks see images whitened by ZCA, of the accessible images or as recorded by the teacher")
    ] = False
    whiten_eps: (
        Annotated[
            float,
            Option(
                "regularisation of the whitening, as a share of the mean variance of a pixel; if left out, 0.1, or more for few images",
                ge=1e-6,
                le=1e6,
            ),
        ]
        | None
    ) = None
    whiten_absolute: Annotated[
        bool, Option("whether whiten_eps is a variance of pixels in 0..1, instead of a share of the mean variance")
    ] = False


class TeacherTable(PluginTable):
    use: Annotated[str, Option("safetensors file, or auto to train a teacher on the whole training split and cache it")] = "auto"
    model: Annotated[str, Option("architecture of the teacher, if its file does not record it")] = "convnet"
    mean: Annotated[list[float], Option("channel means that the teacher was trained with, for pixels in 0..1")] | None = None
    std: Annotated[list[float], Option("channel standard deviations that the teacher was trained with, for pixels in 0..1")] | None = None
    classes: Annotated[list[str], Option("class names in the order of the teacher's outputs; if left out, those in its file")] | None = None
    check: Annotated[
        bool,
        Option(
            "whether a teacher file that is no better than guessing is refused, if its class names do not prove the order of its outputs"
        ),
    ] = True


class TrainTable(PluginTable):
    """How `ddkit train` and an automatic teacher are trained; `options` are those of the augmenter."""

    epochs: Annotated[int, Option("passes over the training set", ge=1)] = 20
    batch: Annotated[int, Option("images per batch", ge=1)] = 256
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Annotated[float, Option("highest learning rate", gt=0)] = 0.1
    momentum: Annotated[float, Option("momentum, for the optimizer sgd only", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Option(ge=0)] = 5e-4
    schedule: Literal["one-cycle", "constant", "step"] = "one-cycle"
    augmenter: str = "dsa"

    @property
    def recorded(self) -> dict[str, Any]:
        """The table as files record it, and caches know a training by; files of before `momentum` have none, where it was 0.9."""
        return {key: value for key, value in msgspec.structs.asdict(self).items() if (key, value) != ("momentum", 0.9)}


class NetworkTable(PluginTable):
    """The network that embeds or is matched.

    Each step has one of `pool` networks. One is drawn anew after `renew_every` steps, and trained after each of them but the last.
    """

    model: str = "convnet"
    source: Annotated[
        Literal["fresh", "experts"], Option("weights of a drawn network: fresh ones, or those of an expert at a saved epoch")
    ] = "fresh"
    first: Annotated[int, Option("first epoch of the experts that may be drawn, 0 for before training", ge=0)] = 0
    last: Annotated[int, Option("last epoch of the experts that may be drawn; if left out, their last epoch", ge=0)] | None = None
    interpolate: Annotated[
        bool, Option("whether an expert's weights are drawn from the line between its weights at the epochs first and last")
    ] = False
    renew_every: Annotated[int, Option("number of steps that use a network before a new one replaces it", ge=1)] = 1
    pool: Annotated[int, Option("number of networks that are kept and trained; each step uses a random one of them", ge=1)] = 1
    train_on: (
        Annotated[
            Literal["none", "synthetic", "real"],
            Option(
                "images that a network is trained on between its steps: the synthetic set or accessible real images; if left out, "
                "synthetic if inner_epochs or inner_steps is set"
            ),
        ]
        | None
    ) = None
    inner_epochs: Annotated[int, Option("epochs that a network is trained after each of its steps", ge=0)] = 0
    inner_steps: Annotated[int, Option("batches that a network is trained on after each of its steps, instead of inner_epochs", ge=0)] = 0
    inner_lr: Annotated[float, Option("learning rate of the training between steps", gt=0)] = 0.01
    batch: Annotated[int, Option("images per batch of the training between steps", ge=1)] = 256
    inner_optimizer: Annotated[
        Literal["sgd", "adam", "adamw"],
        Option("optimizer of the training between steps, which keeps its state as long as the network is used"),
    ] = "sgd"
    inner_momentum: Annotated[float, Option("momentum of inner_optimizer, for sgd only", ge=0, lt=1)] = 0.0
    inner_weight_decay: Annotated[float, Option("weight decay of the training between steps", ge=0)] = 0.0
    inner_augment: Annotated[
        bool, Option("whether the batches of the training between steps are augmented, with the augmenter of the run")
    ] = True
    inner_mix: Annotated[
        Literal["none", "cutmix", "mixup"], Option("mixing of the images and labels of a batch in the training between steps")
    ] = "none"
    inner_mix_share: Annotated[float, Option("share of the batches that inner_mix mixes", ge=0, le=1)] = 1.0

    @property
    def trained_on(self) -> Literal["none", "synthetic", "real"]:
        """What a network is trained on between its steps."""
        return self.train_on or ("synthetic" if self.inner_epochs or self.inner_steps else "none")

    @property
    def sentence(self) -> str:
        """How networks are trained, in a sentence; "" if they are not."""
        images = "real images" if self.trained_on == "real" else "the synthetic set"
        lasts = f"{self.inner_steps} batches" if self.inner_steps else f"{self.inner_epochs} epochs"
        mixed = "" if self.inner_mix == "none" else f", with {self.inner_mix},"
        which = "The network serves" if self.pool == 1 else f"Each of {self.pool} networks serves"
        sentence = f"{which} {self.renew_every} steps, and is trained on {images} for {lasts}{mixed} between them."
        return "" if self.trained_on == "none" or self.renew_every == 1 else sentence

    def check(self) -> None:
        """Raises InputError, with what helps, where settings of the training contradict one another or have no effect."""
        trained, lasts, usual = self.trained_on != "none", self.inner_epochs or self.inner_steps, NetworkTable()
        serves_once = self.renew_every == 1 and (self.pool > 1 or self.train_on == "real" or self.inner_steps)
        how = "Use --set network.train_on=real --set network.inner_steps=10 --set network.renew_every=10"
        many = ". The number of experts is experts.count" if self.source == "experts" else ""
        checks = [
            (
                "interpolate",
                self.interpolate and self.source != "experts",
                "only experts can be interpolated. Add --set network.source=experts",
            ),
            ("inner_steps", self.inner_epochs and self.inner_steps, "network.inner_epochs is set too. Use --set network.inner_epochs=0"),
            ("train_on", trained and not lasts, "the length of the training is not set. Add --set network.inner_steps=10"),
            ("train_on", lasts and not trained, "a length of the training is set. Set network.inner_epochs and network.inner_steps to 0"),
            (
                "pool",
                self.pool > 1 and not trained,
                f"a pool consists of networks that are trained between steps. {how}, or leave it out{many}",
            ),
            (
                "renew_every",
                trained and serves_once,
                "a network that is used in one step only is never trained. Use --set network.renew_every=10",
            ),
            *(
                (key, not trained and getattr(self, key) != getattr(usual, key), f"no network is trained between steps. {how}")
                for key in INNER
            ),
            ("inner_momentum", self.inner_momentum and self.inner_optimizer != "sgd", "only sgd has a momentum. Set it to 0"),
            (
                "inner_mix_share",
                self.inner_mix_share != 1 and self.inner_mix == "none",
                "nothing is mixed. Add --set network.inner_mix=cutmix",
            ),
        ]
        for key, wrong, reason in checks:
            if wrong:
                raise InputError(f"network.{key} = {shown(getattr(self, key))} is not possible: {reason}.", f"network.{key}")


INNER = ("inner_optimizer", "inner_momentum", "inner_weight_decay", "inner_augment", "inner_mix", "inner_mix_share", "batch")


class ExpertsTable(Table):
    """Networks of [network] trained on real images as [train] says, with their weights at the start and after epochs."""

    use: Annotated[str, Option("folder of `ddkit train --experts`, or auto to train experts on first use and cache them")] = "auto"
    count: Annotated[int, Option("number of experts; if left out, 20, or all in the folder", ge=1)] | None = None
    epochs: Annotated[int, Option("epochs that each expert is trained; if left out, 10, or as in the folder", ge=1)] | None = None
    save_every: (
        Annotated[int, Option("number of epochs after which an expert's weights are saved; if left out, 1, or as in the folder", ge=1)]
        | None
    ) = None
    data: Annotated[
        Literal["accessible", "all"], Option("images that experts are trained on: the accessible ones, or the whole training split")
    ] = "accessible"
    precision: Annotated[
        Literal["bfloat16", "float32"], Option("number format in which the weights of newly trained experts are saved")
    ] = "bfloat16"


class InitializerTable(PluginTable):
    use: str = "real"
    reuse: Annotated[bool, Option("whether images are used again, and mirrored every second time, if a class has too few real images")] = (
        False
    )


class ParametrizationTable(PluginTable):
    """How images are made of what is stored. `ipc` is the number of plain images with as many numbers as a class stores."""

    use: str = "pixels"


class AugmenterTable(PluginTable):
    use: str = "dsa"


class ViewTable(PluginTable):
    """A named view of the synthetic images: an augmenter (with its options) and input noise, in normalised units."""

    augmenter: str = "none"
    compose: Annotated[int, Option("number of composed operations, for augmenters with this option", ge=1)] | Literal["auto"] | None = None
    noise: Annotated[float, Option("standard deviation of the added Gaussian noise, in normalised units", ge=0)] = 0.0


class OptimizerTable(Table):
    kind: Literal["sgd", "adam"] = "adam"
    lr: Annotated[float, Option("learning rate in normalised units", gt=0)] = 0.1
    momentum: Annotated[float, Option("momentum, for the optimizer sgd only", ge=0, lt=1)] = 0.0
    betas: Annotated[tuple[Beta, Beta], Option("decay rates of the moment estimates, for the optimizer adam only")] = (0.9, 0.999)


class EngineTable(Table):
    compile: (
        Annotated[bool, Option("whether networks are compiled, or auto to compile only if the run is long enough")] | Literal["auto"]
    ) = "auto"
    precision: Annotated[
        Literal["auto", "float32", "tf32", "bfloat16"],
        Option("precision of compiled networks, or auto for bfloat16 if the hardware multiplies it, and else float32"),
    ] = "auto"
    memory: Annotated[
        int, Option("memory in MiB for images and activations; larger sets are computed in chunks of classes, if the losses allow it", ge=1)
    ] = 4096
    block: (
        Annotated[int, Option("number of images embedded at once, 0 for all, or auto to fit the processor's cache", ge=0)] | Literal["auto"]
    ) = "auto"
    chunk: Annotated[int, Option("classes per chunk, 0 for all at once, or auto to fit engine.memory", ge=0)] | Literal["auto"] = "auto"
    log_every: Positive = 10
    checkpoint_every: Positive = 500
    deterministic: bool = False


class LossTable(PluginTable):
    weight: Annotated[float, Option("factor of this loss in the total", ge=0)] = 1.0
    use: str | None = None


class EvaluatorTable(PluginTable):
    use: str | None = None


class LabelsTable(Table):
    """The labels of the synthetic images: their classes, the teacher's probabilities, or probabilities that are learned."""

    kind: Annotated[
        Literal["hard", "teacher", "learned"],
        Option("hard for the class, teacher for the teacher's probabilities of each image, learned for labels that are optimised too"),
    ] = "hard"
    temperature: Annotated[float, Option("temperature of the teacher's probabilities, softmax(logits / temperature)", gt=0)] = 1.0
    lr: Annotated[float, Option("learning rate of learned labels, in units of probability", gt=0)] = 0.01
    init: Annotated[
        Literal["auto", "hard", "teacher", "experts"],
        Option(
            "initial value of learned labels, or auto for the labels of the initial set (file:SET), if there is one, and else the class; "
            "experts takes the mean logits of the experts that are correct"
        ),
    ] = "auto"


class RuleTable(Table):
    when: dict[Literal["ipc_min", "ipc_max", "pipc_min", "pipc_max"], int]
    set: dict[str, Any]


class Recipe(Table):
    """One run as data; the fields and tables of ../docs/reference/recipes.md."""

    name: str = ""
    summary: str = ""
    source: str = ""
    ipc: (
        Annotated[
            int, Option("synthetic images per class, or a table of numbers by class name, with `default` for all other classes", ge=1)
        ]
        | dict[str, Positive]
    ) = 1
    pipc: Annotated[int, Option("real images per class that the run may use", ge=0)] | Literal["all"] = 50
    steps: Annotated[int, Option("number of updates of the synthetic set", ge=0)] = 300
    seed: Seed = 0
    data: DataTable = msgspec.field(default_factory=DataTable)
    teacher: TeacherTable = msgspec.field(default_factory=TeacherTable)
    train: TrainTable = msgspec.field(default_factory=TrainTable)
    network: NetworkTable = msgspec.field(default_factory=NetworkTable)
    experts: ExpertsTable = msgspec.field(default_factory=ExpertsTable)
    initializer: InitializerTable = msgspec.field(default_factory=InitializerTable)
    parametrization: ParametrizationTable = msgspec.field(default_factory=ParametrizationTable)
    augmenter: AugmenterTable = msgspec.field(default_factory=AugmenterTable)
    views: dict[str, ViewTable] = {}
    optimizer: dict[str, OptimizerTable] = {}
    engine: EngineTable = msgspec.field(default_factory=EngineTable)
    losses: dict[str, LossTable] = {}
    evaluators: dict[str, EvaluatorTable] = {}
    protocols: dict[str, Protocol] = {}
    labels: LabelsTable | None = None
    notes: Annotated[dict[str, str], Option("origin and reason of each setting, by its path, as `ddkit info` shows them")] = {}

    @property
    def own_labels(self) -> LabelsTable:
        """Returns how the set is labelled; a recipe that says nothing has hard labels."""
        return self.labels or LabelsTable()

    def ipc_of(self, class_names: Sequence[str]) -> list[int]:
        """Returns the synthetic images of each class; raises InputError for a name that is no class, and a class without a number."""
        if isinstance(self.ipc, int):
            return [self.ipc] * len(class_names)
        for name in self.ipc:
            if name not in class_names and name != "default":
                raise InputError(
                    f"ipc has a number for the class '{name}', but the data has no such class. {suggestion(name, class_names)}", "ipc"
                )
        counts = [self.ipc.get(name, self.ipc.get("default")) for name in class_names]
        if None in counts:
            raise InputError(
                f"ipc has no number for the class '{class_names[counts.index(None)]}'. Add one, or a number for all other classes: "
                "--ipc 10,CLASS=3, or in a recipe ipc = { default = 10, CLASS = 3 }.",
                "ipc",
            )
        return [count for count in counts if count is not None]

    def loss_name(self, label: str) -> str:
        """Returns the plugin name of the loss labelled `label`."""
        return self.losses[label].use or label


TABLES: dict[str, type[Table]] = {
    "data": DataTable,
    "teacher": TeacherTable,
    "train": TrainTable,
    "network": NetworkTable,
    "experts": ExpertsTable,
    "initializer": InitializerTable,
    "parametrization": ParametrizationTable,
    "augmenter": AugmenterTable,
    "engine": EngineTable,
    "labels": LabelsTable,
}
NAMED_TABLES: dict[str, type[Table] | type[Protocol]] = {
    "views": ViewTable,
    "optimizer": OptimizerTable,
    "losses": LossTable,
    "evaluators": EvaluatorTable,
    "protocols": Protocol,
}
CHOOSING = {  # tables that choose a component: the key that does, and the kind
    "data": ("use", "dataset"),
    "network": ("model", "model"),
    "teacher": ("model", "model"),
    "initializer": ("use", "initializer"),
    "parametrization": ("use", "parametrization"),
    "augmenter": ("use", "augmenter"),
    "train": ("augmenter", "augmenter"),
    "views": ("augmenter", "augmenter"),
    "losses": ("use", "loss"),
    "evaluators": ("use", "evaluator"),
}
NAMED_BY_LABEL = ("losses", "evaluators")  # whose entry is called as its component, unless it says `use`
SHORTHAND = {"data": "use", "teacher": "use", "experts": "use", "initializer": "use", "parametrization": "use", "augmenter": "use"}

T = TypeVar("T", bound=msgspec.Struct)
DEEPEST = 32  # levels of tables and arrays in a recipe


def own_keys(kind: type[msgspec.Struct]) -> set[str]:
    """Returns the keys of a table that are ddkit's own, not a plugin's options."""
    return fields(kind).keys() - {"options"}


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    """Returns a recipe from TOML data (rules already applied); raises InputError naming the path at fault."""
    if "blend" in table:
        raise InputError(f"The table [blend] is no longer supported. {_instead_of_blend(table)}", "blend")
    if "decode" in table:
        raise InputError(f"The table [decode] is no longer supported. {instead_of_decode(table['decode'])}", "decode")
    values: dict[str, Any] = {key: value for key, value in table.items() if key not in TABLES and key not in NAMED_TABLES}
    for key, kind in TABLES.items():
        if key in table:
            values[key] = _parse_table(kind, table[key], key)
    for key, named in NAMED_TABLES.items():
        if key in table:
            entries = _as_table(table[key], key)
            values[key] = {name: _parse_table(named, item, f"{key}.{name}") for name, item in entries.items()}
    recipe: Recipe = parse_struct(Recipe, values, "")
    recipe.network.check()
    if recipe.network.trained_on == "real" and recipe.pipc == 0:
        raise InputError("With pipc 0 there are no real images to train networks on. Set --pipc to at least 1.", "pipc")
    if not recipe.data.whiten and (recipe.data.whiten_eps is not None or recipe.data.whiten_absolute):
        raise InputError("data.whiten_eps and data.whiten_absolute have no effect without --set data.whiten=true.", "data.whiten_eps")
    return recipe


def _instead_of_blend(table: Mapping[str, Any]) -> str:
    """Returns the commands that do what the table [blend] of version 0.1 did."""
    blend: Mapping[str, Any] = table["blend"] if isinstance(table["blend"], Mapping) else {}
    numbers = "".join(f" --{key} {table[key]}" for key in ("ipc", "pipc", "steps", "seed") if key in table)
    commands, parts = [], []
    for key in ("first", "second"):
        name = str(blend.get(key, key.upper()))
        if "/" in name and not name.endswith(".toml"):  # a run or file that is there already
            parts.append(shlex.quote(name))
        else:
            commands.append(f"ddkit distill --recipe {shlex.quote(name)}{numbers} --evaluate none --out {key}")
            parts.append(key)
    commands += [f"ddkit blend {' '.join(parts)} --alpha {blend.get('alpha', 0.5)} --out both", "ddkit evaluate both"]
    return f"Make the two sets with the same flags, and average them: {' && '.join(commands)}"


def instead_of_decode(decode: Any) -> str:
    """Returns the lines that do what the table [decode] of version 0.1 did, for a recipe and for --set."""
    factor = decode.get("factor", 1) if isinstance(decode, Mapping) else decode
    return (
        f'Write a table [parametrization] with the lines use = "grid" and factor = {factor}, '
        f"or on the command line --set parametrization.use=grid --set parametrization.factor={factor}"
    )


def check_depth(table: Mapping[str, Any], what: str) -> None:
    """Raises InputError where tables and arrays are nested deeper than any recipe needs, and functions that call themselves can go."""
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        nested = [value.values() if isinstance(value, Mapping) else value for value in level if isinstance(value, Mapping | list | tuple)]
        level = [item for items in nested for item in items]
        if not level:
            return
    raise InputError(f"{what} is nested more than {DEEPEST} levels deep. Use fewer levels.")


def _as_table(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str) and where in SHORTHAND:
        return {SHORTHAND[where]: value}
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a table of the recipe, but is {shown(value)}.", where)
    return dict(value)


def _parse_table(kind: type[T], value: Any, where: str) -> T:
    table = _as_table(value, where)
    if not issubclass(kind, PluginTable):
        return parse_struct(kind, table, where)
    own = own_keys(kind)
    options = {key: item for key, item in table.items() if key not in own}
    parsed = parse_struct(kind, {key: item for key, item in table.items() if key in own}, where)
    return msgspec.structs.replace(parsed, options=options)


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as TOML data, the inverse of parse_recipe; None is left out."""
    return {key: value for key, value in _plain(recipe).items() if value not in ({}, "")}


def _plain(value: Any) -> Any:
    if isinstance(value, PluginTable):
        return _plain({key: getattr(value, key) for key in sorted(own_keys(type(value)))} | value.options)
    if isinstance(value, msgspec.Struct):
        return _plain(msgspec.structs.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
