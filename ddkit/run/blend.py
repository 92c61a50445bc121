"""Runs whose result is the average of two sets: those that are there, or that recipes make first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ddkit.components.observers import Observers
from ddkit.data.real import RealData, open_dataset
from ddkit.distributed import ALONE, Ranks
from ddkit.errors import InputError
from ddkit.files import sha256, write_json
from ddkit.names import SET
from ddkit.nn.compute import pick_device
from ddkit.recipes.resolve import recipe_for
from ddkit.recipes.tables import Recipe, parse_recipe, recipe_dict
from ddkit.run import warnings
from ddkit.run.artifact import Artifact, load
from ddkit.run.averaging import blended, partners
from ddkit.run.directory import EVALUATION, MANIFEST, RECIPE, Run, RunDirectory, save_set
from ddkit.run.evaluation import image_shape, judged
from ddkit.run.report import close_run
from ddkit.run.setup import RunSetup, evaluators_of
from ddkit.run.snapshots import write_parts


def blend(first: str | Path, second: str | Path, *, alpha: float = 0.5, out: str | Path) -> Run:
    """Writes the set (1 - alpha) * first + alpha * second into the run directory `out`, and returns that run.

    `first` and `second` are run directories or files of the same classes, images a class and shape; images are matched by
    class name, and within a class by their order. Where one of them is a run, `ddkit evaluate` finds its real data.
    Raises DdkitError.
    """
    parts = load(first), load(second)
    with warnings.recording(), RunDirectory.claim(Path(out)) as directory:
        try:
            return _write_blend((Path(first), Path(second)), parts, alpha, directory)
        except BaseException:
            directory.discard()
            raise


def _write_blend(places: tuple[Path, Path], parts: tuple[Artifact, Artifact], alpha: float, directory: RunDirectory) -> Run:
    """Writes the blend of both `parts`, read from `places`, as a finished run."""
    result = blended(*parts, alpha)
    known = [RunDirectory.existing(place).read_recipe() for place in places if (place / RECIPE).is_file()]
    copied = ("data", "teacher", "train", "seed", "pipc")
    table: dict[str, Any] = {key: known[0][key] for key in copied if key in known[0]} if known else {}
    paths = [place.absolute() for place in places]
    blend_ = {"first": str(paths[0]), "second": str(paths[1]), "alpha": alpha}
    recipe = parse_recipe({**table, "name": "blend", "ipc": _images_a_class(result), "blend": blend_})
    if known:
        directory.write_recipe(recipe_dict(recipe))
    save_set(result, directory)
    _keep(parts, directory)
    close_run(directory, {"seed": recipe.seed, "steps": 0, "seconds": 0.0, **_blend_facts(recipe, paths)})
    return Run(path=directory.path, steps=0, seconds=0.0, evaluations=[])


def plan_of_blend(recipe: Recipe, device: str, plan: Callable[[Recipe], dict[str, Any]], ranks: Ranks = ALONE) -> dict[str, Any]:
    """Returns what a blend would do, with the `plan` of each part that it makes first."""
    plans = [plan(part) for part in _check_blend(recipe, device, ranks).values()]
    finished = _finished_parts(recipe)
    facts = plans[0] if plans else {
        "schema": 1, "device": str(pick_device(device)), "processes": ranks.size, "classes": finished[0].class_names,
        "image_shape": list(image_shape(finished[0])), "accessible_images": 0, "synthetic_images": len(finished[0].labels),
        "teacher": None, "plugins": [],
    }  # fmt: skip
    whole = {key: value for key, value in facts.items() if key != "estimate"}  # each part has its own
    return whole | {"recipe": recipe_dict(recipe), "parts": plans}


def run_blend(
    recipe: Recipe,
    directory: RunDirectory,
    device: str,
    watchers: Observers,
    *,
    make: Callable[[Recipe, Path], None],
    ranks: Ranks = ALONE,
) -> Run:
    """Makes both parts in `parts/` of the directory by `make(recipe, path)`, and blends and evaluates them.

    `make` goes on with a part that is there, and returns at once where it is finished.
    """
    assert recipe.blend is not None
    try:
        made = _check_blend(recipe, device, ranks, watchers)
        directory.replace()
        directory.reopen()
        directory.write_recipe(recipe_dict(recipe))
    except BaseException:
        directory.discard()
        raise
    steps, seconds, paths = 0, 0.0, []
    for name, source in (("first", recipe.blend.first), ("second", recipe.blend.second)):
        path = Path(source)
        if name in made:
            path = directory.path / "parts" / name
            make(made[name], path)
            facts = RunDirectory(path).read_manifest()
            steps, seconds = steps + facts["steps"], seconds + facts["seconds"]
        paths.append(path)
    parts = load(paths[0]), load(paths[1])
    result = blended(*parts, recipe.blend.alpha)
    result.metadata |= {"recipe": recipe.name}
    if ranks.first:
        save_set(result, directory)
        _keep(parts, directory)
    rows = judged(recipe, result, device, watchers, ranks=ranks) if recipe.evaluators else []
    if rows and ranks.first:
        write_json(directory.path / EVALUATION, {"schema": 1, "evaluations": msgspec.to_builtins(rows)})
    facts = {"seed": recipe.seed, "device": str(pick_device(device)), "steps": steps, "seconds": round(seconds, 3)}
    if ranks.first:
        close_run(directory, facts | _blend_facts(recipe, paths))
    ranks.wait()
    watchers.call("run_finished", path=directory.path, evaluations=rows)
    return Run(path=directory.path, steps=steps, seconds=seconds, evaluations=rows)


def _keep(parts: tuple[Artifact, Artifact], directory: RunDirectory) -> None:
    """Keeps some images of both sets of a blend for its report."""
    first, second = parts
    write_parts(directory.path, first.stored_images, second.stored_images[partners(first, second)], first.stored_labels)


def _check_blend(recipe: Recipe, device: str, ranks: Ranks = ALONE, watchers: Observers | None = None) -> dict[str, Recipe]:
    """Returns the recipes of the parts to be made; raises a DdkitError for all that would fail after they are made."""
    assert recipe.blend is not None
    made = _recipes_of_parts(recipe)
    jobs = [RunSetup(part, device=device, ranks=ranks, watchers=watchers) for part in made.values()]
    finished = _finished_parts(recipe)
    if len(finished) == 2:
        blended(finished[0], finished[1], recipe.blend.alpha)
    elif finished and jobs:
        names, shape = list(jobs[0].info.class_names), jobs[0].info.shape
        if finished[0].class_names != names or finished[0].images.shape[1:] != shape:
            raise InputError("The finished part of the blend has other classes or another image shape than the data of the other part.")
    if recipe.evaluators:
        real = RealData.of(recipe, open_dataset(recipe.data), jobs[0].info.shape if jobs else image_shape(finished[0]))
        real.check_test_set()
        evaluators_of(recipe, real.info)  # for its checks
    return made


def _recipes_of_parts(recipe: Recipe) -> dict[str, Recipe]:
    """Returns the recipes that a blend makes first, by the name of their folder; a part that is a run or file has none.

    ipc, pipc, steps and seed, and what else the blend's recipe sets (`blend.set`), hold for both.
    """
    assert recipe.blend is not None
    found = {}
    for part, name in (("first", recipe.blend.first), ("second", recipe.blend.second)):
        if not _is_set(name):
            found[part] = recipe_for(
                name, evaluators="none", sets=list(recipe.blend.set.items()), ipc=recipe.ipc, pipc=recipe.pipc, seed=recipe.seed,
                steps=recipe.steps,
            )  # fmt: skip
            if found[part].blend is not None:
                raise InputError(f"blend.{part} = {name!r} is a blend itself; make it first and name its run.", f"blend.{part}")
    return found


def _is_set(name: str) -> bool:
    """Whether a part of a blend is a run directory or file, not a recipe: it is given by a path that is no TOML file."""
    return "/" in name and not name.endswith(".toml")


def _finished_parts(recipe: Recipe) -> list[Artifact]:
    """Returns the parts that are sets already; raises InputError where one has not the ipc that is asked for."""
    assert recipe.blend is not None
    found = [load(name) for name in (recipe.blend.first, recipe.blend.second) if _is_set(name)]
    for artifact in found:
        if _images_a_class(artifact) != recipe.ipc:
            raise InputError(
                f"A part of the blend has {_images_a_class(artifact)} images a class, and ipc is {recipe.ipc}. Give --ipc as the part has.",
                "ipc",
            )
    return found


def _images_a_class(artifact: Artifact) -> int:
    return int(artifact.metadata.get("ipc") or artifact.stored_labels.bincount().max())


def _blend_facts(recipe: Recipe, paths: Sequence[Path]) -> dict[str, Any]:
    """Returns what the manifest tells of a blend: its parts with their sha256, and what their own manifests tell of both."""
    assert recipe.blend is not None
    files = [path / SET if path.is_dir() else path for path in paths]
    manifests = [RunDirectory(path).read_manifest() for path in paths if (path / MANIFEST).is_file()]
    plugins_ = [plugin for manifest in manifests for plugin in manifest.get("plugins", [])]
    files_of_plugins = {file: digest for manifest in manifests for file, digest in manifest.get("plugin_files", {}).items()}
    real = [source for manifest in manifests for source in manifest.get("real_files", [])]
    return {
        "threads": torch.get_num_threads(),
        **({"plugin_files": files_of_plugins} if files_of_plugins else {}),
        "plugins": [plugin for number, plugin in enumerate(plugins_) if plugin not in plugins_[:number]],
        "real_files": sorted(set(real), key=str),
        "blend": {"alpha": recipe.blend.alpha, "parts": [{"path": str(file), "sha256": sha256(file)} for file in files]},
    }
