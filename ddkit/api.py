"""The public functions: distill, evaluate, train, blend, join and others. The command line calls one of them for each command.

Names and keys are checked before torch is imported, so that an error in them is reported at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddkit.components import registry, trust
from ddkit.components.observers import Observers
from ddkit.distributed import group, own_device
from ddkit.errors import FlagError, RunFilesError
from ddkit.files import check_out, check_writable, folders_of
from ddkit.recipes.resolve import Part, check_effect, names, resolve
from ddkit.recipes.settings import flattened
from ddkit.recipes.tables import NetworkTable, Recipe, own_keys, recipe_dict

if TYPE_CHECKING:
    from ddkit.nn.experts import Experts
    from ddkit.nn.teacher import Teacher
    from ddkit.recipes.citations import Citation
    from ddkit.run.artifact import Artifact
    from ddkit.run.blend import blend
    from ddkit.run.comparison import compare
    from ddkit.run.directory import Run
    from ddkit.run.evaluation import evaluate
    from ddkit.run.exporting import export
    from ddkit.run.importing import import_file
    from ddkit.run.join import join, split
    from ddkit.run.listing import list_runs
    from ddkit.run.report import report

_ELSEWHERE = {  # public functions that stand beside what they do, and the types that these give
    "Artifact": "artifact", "Run": "directory", "blend": "blend", "compare": "comparison", "evaluate": "evaluation", "export": "exporting",
    "import_file": "importing", "join": "join", "list_runs": "listing", "report": "report", "split": "join",
}  # fmt: skip
TRAINING = Part(  # what of a recipe `train` uses
    ("data", "teacher", "train", "seed"),
    ("data.batch", "data.test", "data.held_out", "teacher.use", "teacher.mean", "teacher.std", "teacher.classes", "teacher.check"),
    "`ddkit train` trains a teacher on all training images.",
)
TRAINING_EXPERTS = Part(  # what of a recipe `train --experts` uses
    ("data", "network", "experts", "train", "seed", "pipc"),
    ("data.batch", "data.test", "data.held_out", *(f"network.{key}" for key in own_keys(NetworkTable) - {"model"}), "experts.use",
     "train.epochs"),
    "`ddkit train --experts` trains networks on real images.",
)  # fmt: skip
PICKLED = (".pt", ".pth", ".pkl", ".bin", ".ckpt")  # how files end that others would unpickle

__all__ = [
    "Artifact", "Run", "blend", "cite", "compare", "distill", "evaluate", "export", "import_file", "join", "list_runs", "plan", "report",
    "resume", "split", "train", "train_experts",
]  # fmt: skip


def plan(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    allow_code: bool = False,
    distributed: bool = False,
    **flags: Any,
) -> dict[str, Any]:
    """Returns what distill with the same arguments would do, as data, after every check that it makes before its first step.

    It opens the images that the run opens, trains no teacher and writes nothing.
    """
    with _resolved(recipe, sets, flags, allow_code=allow_code) as built, group(wanted=distributed) as ranks:
        from ddkit.run import run
        from ddkit.run.directory import check_claimable

        if out is not None:
            check_claimable(Path(out), force=False)
        return run.planned(built, run.Place(own_device(device), ranks, ()))


def distill(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    losses: str | Sequence[str] | None = None,
    dataset: Any = None,
    ipc: int | Mapping[str, int] | None = None,
    pipc: int | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    teacher: str | None = None,
    model: str | None = None,
    init: str | None = None,
    augment: str | None = None,
    evaluators: str | Sequence[str] | None = None,
    protocol: str | None = None,
    data_dir: str | None = None,
    deterministic: bool | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    observers: Sequence[Any] = (),
    allow_code: bool = False,
    distributed: bool = False,
    force: bool = False,
) -> Run:
    """Makes a synthetic set and returns its run; the arguments are the flags of `ddkit distill`.

    `recipe` is a recipe's name, a file, or TOML data; `sets` maps recipe paths to values. `dataset` is a name, or an object: a map-style
    torch Dataset of (image, label), or (training, test) of these. `out` is the run directory (None: runs/<recipe or losses>-<dataset>-<n>).
    `allow_code` allows Python code that a recipe or teacher file names; code named in the arguments is always allowed. With `distributed`
    the processes that torchrun started, all of which call this, share the run. `force` replaces the run that is in
    `out`, after all checks of the new one have passed. A run that took no step leaves no files. Raises DdkitError.

    Examples:
        >>> run = ddkit.distill(losses="dm", ipc=1, pipc=5, steps=2, evaluators="none", sets={"optimizer.images.lr": 0.5}, out="new-run")
        >>> run.path.name, run.steps
        ('new-run', 2)
    """
    flags = {
        "losses": losses, "dataset": dataset, "ipc": ipc, "pipc": pipc, "steps": steps, "seed": seed, "teacher": teacher, "model": model,
        "init": init, "augment": augment, "evaluators": evaluators, "protocol": protocol, "data_dir": data_dir,
        "deterministic": deterministic,
    }  # fmt: skip
    with _resolved(recipe, sets, flags, allow_code=allow_code) as built, group(wanted=distributed) as ranks:
        from ddkit.nn.device import pick_device
        from ddkit.run import run
        from ddkit.run.directory import RunDirectory

        place = run.Place(own_device(device), ranks, observers)
        pick_device(place.device)
        ranks.check_same("The recipe", dict(flattened(recipe_dict(built))))
        name = names("losses", losses) or built.name
        stem = f"{name.replace(',', '+').replace(':', '-')}-{registry.split_name(built.data.use)[0]}"
        with place.directory(
            lambda: RunDirectory.numbered(stem) if out is None else RunDirectory.claim(Path(out), force=force)
        ) as directory:
            return run.run(built, directory, place)


@contextmanager
def _resolved(
    recipe: str | Path | Mapping[str, Any] | None,
    sets: Mapping[str, Any] | None,
    flags: Mapping[str, Any],
    *,
    allow_code: bool,
    part: Part | None = None,
) -> Iterator[Recipe]:
    """Inside, the code runs and the dataset is passed that the caller named; yields the recipe that `flags` describe."""
    named = {flag: flags.get(flag) for flag in ("model", "dataset", "init", "augment", "evaluators")}
    table = recipe if isinstance(recipe, Mapping) else None  # data that the caller wrote, unlike a file
    others = {key: value for key, value in flags.items() if key not in ("dataset", "protocol")}
    dataset = flags.get("dataset")
    with trust.granting(named, sets, table, everything=allow_code), ExitStack() as stack:
        data = {"dataset": dataset}
        if dataset is not None and not isinstance(dataset, str):
            from ddkit.data.passed import passing

            data = stack.enter_context(passing(dataset))
        built = resolve(
            recipe, evaluation={"protocol": flags.get("protocol")}, sets=sets or {}, part=part, **others, **data,
        )  # fmt: skip
        if part is None:
            check_effect(built, [path for path, _ in flattened(sets or {})])
        yield built


def resume(
    path: str | Path,
    *,
    dataset: Any = None,
    teacher: str | None = None,
    steps: int | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
    allow_code: bool = False,
    distributed: bool = False,
) -> Run:
    """Continues the run at `path` from its newest readable checkpoint; a larger `steps` prolongs it.

    `dataset` is needed if the run's dataset was an object: pass the same again, as for distill. If the data or the teacher's file were
    moved, `dataset` (of the same kind, "imagefolder:PATH") and `teacher` are the new paths; their content must be the same. A run
    that is finished is returned as it is.
    `allow_code` allows Python code that the recipe of the run names. `distributed` is as in distill; the
    run may have been started by any number of processes. Raises DdkitError.

    Examples:
        >>> ddkit.resume("other-run", steps=3).steps
        3
    """
    from ddkit.data.passed import passing
    from ddkit.run import resuming, run
    from ddkit.run.directory import RunDirectory

    moved = {"--dataset": dataset if isinstance(dataset, str) else None, "--teacher": teacher}
    given = {flag: value for flag, value in moved.items() if value is not None}
    granted = trust.granting({"dataset": given.get("--dataset")}, everything=allow_code)
    with granted, passing(dataset), group(wanted=distributed) as ranks:
        place = run.Place(own_device(device), ranks, observers)
        with place.directory(lambda: RunDirectory.existing(Path(path)).take()) as directory:
            return resuming.go_on(directory, place, steps=steps, moved=given)


def train(
    out: str | Path,
    *,
    dataset: Any = None,
    model: str | None = None,
    data_dir: str | None = None,
    seed: int | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
    allow_code: bool = False,
) -> Teacher:
    """Trains a teacher on all of the training split, saves it to `out` (a file that must not exist) and returns it.

    Missing folders of `out` are made, and removed if the training fails. `dataset` is as for distill. `allow_code` allows
    Python code that a recipe file names. Raises DdkitError.

    Examples:
        >>> teacher = ddkit.train("teacher.safetensors", model="mlp", sets={"train.epochs": 1})
        >>> teacher.info["class_names"][:3]
        ['0', '1', '2']
    """
    path = Path(out)
    check_out(path)
    if path.exists():
        raise RunFilesError(f"--out {path} exists already. Name a new file.")
    if path.suffix in PICKLED:
        raise FlagError(f"--out {path}: a teacher is saved as safetensors. Name the file {path.with_suffix('.safetensors')}.")
    watchers = Observers((f"observer {i}", o) for i, o in enumerate(observers))
    kept = watchers.interruptible(lambda: "The half-trained teacher is not kept. Run the same command again.")
    flags = {"dataset": dataset, "model": model, "data_dir": data_dir, "seed": seed, "evaluators": "none"}
    with _resolved(recipe, sets, flags, allow_code=allow_code, part=TRAINING) as built, kept, folders_of(path):
        from ddkit.data.real import check_classes, open_dataset
        from ddkit.nn.automatic_teacher import train_teacher
        from ddkit.nn.device import pick_device
        from ddkit.nn.teacher import save_teacher

        where = pick_device(device)
        found = open_dataset(built.data)
        check_classes(found)
        check_writable(path)  # before an hour of training
        teacher = train_teacher(found, None, built.teacher, built.train, data=built.data, seed=built.seed, device=where, watchers=watchers)
        save_teacher(path, teacher)
    return teacher


def train_experts(
    out: str | Path,
    *,
    experts: int | None = None,
    epochs: int | None = None,
    save_every: int | None = None,
    dataset: Any = None,
    model: str | None = None,
    pipc: int | str | None = None,
    data_dir: str | None = None,
    seed: int | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    observers: Sequence[Any] = (),
    allow_code: bool = False,
) -> Experts:
    """Trains `experts` networks on real images into the folder `out`, with their weights after every `save_every` epochs; returns them.

    They have the architecture of the recipe's [network], and are trained on the accessible images (`pipc` per class) as in [train] and
    [experts]. A folder with some experts of the same settings is completed. The other arguments are as for train. Raises DdkitError.

    Examples:
        >>> experts = ddkit.train_experts("experts", experts=1, epochs=2, model="mlp", pipc=5)
        >>> list(experts.epochs)
        [0, 1, 2]
    """
    path = Path(out)
    check_out(path)
    watchers = Observers((f"observer {i}", o) for i, o in enumerate(observers))
    kept = watchers.interruptible(lambda: "The finished experts are kept. Run the same command again to continue.")
    flags = {"dataset": dataset, "model": model, "pipc": pipc, "data_dir": data_dir, "seed": seed, "evaluators": "none"}
    numbers = {"experts.count": experts, "experts.epochs": epochs, "experts.save_every": save_every}
    sets = {**(sets or {}), **{key: value for key, value in numbers.items() if value is not None}}
    with _resolved(recipe, sets, flags, allow_code=allow_code, part=TRAINING_EXPERTS) as built, kept, folders_of(path / "experts.json"):
        from ddkit.data.real import RealData, check_classes, open_dataset
        from ddkit.nn.device import pick_device
        from ddkit.nn.expert_files import check_folder, open_experts, settings_of
        from ddkit.nn.expert_training import train_experts as train_into
        from ddkit.nn.experts import COUNT

        where = pick_device(device)
        found = open_dataset(built.data)
        check_classes(found)
        real = RealData(found, built.pipc or 1, built.seed, watchers=watchers)  # with pipc 0 one shows the shape of all
        network = registry.create("model", built.network.model, built.network.options, data=real.info, where="network")
        settings = settings_of(built, real, network, seed=built.seed)
        check_folder(path, settings)
        check_writable(path / "experts.json")
        train_into(path, settings, built.experts.count or COUNT, real, network, where, watchers, built.data)
        return open_experts(path, built.experts, settings, network)


def cite(target: str | Path) -> list[Citation]:
    """Returns the BibTeX entries of a recipe's paper and of the papers of its parts. `target` is a name, a recipe file or a run directory.

    `print(*ddkit.cite("m3d"), sep="\\n\\n")` prints the output of `ddkit cite m3d`. Raises DdkitError.

    Examples:
        >>> len(ddkit.cite("dm"))
        3
    """
    from ddkit.recipes.citations import citations

    recipes = {plugin.name for plugin in registry.plugins() if plugin.kind == "recipe"}
    if str(target) not in {"", *recipes} and Path(target).is_dir():
        from ddkit.run.directory import RunDirectory

        return citations(resolve(RunDirectory.existing(Path(target)).read_recipe()))
    return citations(resolve(target))


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ddkit.run.{_ELSEWHERE[name]}"), name)
