"""A set that is made of others, by `ddkit blend`, `join` or `split`: the run that it is written as, with what the others' files tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.files import sha256
from ddkit.recipes.tables import parse_recipe, recipe_dict
from ddkit.run.artifact import Artifact
from ddkit.run.directory import Run, RunDirectory, save_set
from ddkit.run.manifest import MANIFEST, RECIPE, SET, read_manifest
from ddkit.run.report import close_run
from ddkit.run.snapshots import add_frame

COPIED = ("data", "teacher", "train", "seed", "pipc")  # tables and keys of a recipe that an evaluation of the set needs


def access(parts: Sequence[Artifact]) -> dict[str, Any]:
    """Returns what the sets together had access to, as metadata: the seeds that chose real images, and the largest pipc that is known."""
    known = [part.metadata["pipc"] for part in parts if part.metadata.get("pipc") is not None]
    seeds = sorted({seed for part in parts for seed in part.seeds})
    return {"seeds": seeds} | ({"pipc": "all" if "all" in known else max(known)} if known else {})


def write_derived(
    result: Artifact,
    parts: Sequence[tuple[Path, Artifact]],
    directory: RunDirectory,
    name: str,
    facts: Mapping[str, Any],
    frames: Iterable[Tensor] = (),
) -> Run:
    """Writes `result`, made of the sets `parts`, into `directory`; its manifest tells `facts` under `name`, and the file of each part.

    Its recipe has the real data of the first part that is a run and has all of the classes, or else of all parts, if these have the same.
    There is none otherwise. `frames` are images (n, C, H, W) that the report shows beside those of the set.
    """
    known = [(RunDirectory.existing(place).read_recipe(), part) for place, part in parts if (place / RECIPE).is_file()]
    recipes = [recipe for recipe, part in known if set(result.class_names) <= set(part.class_names)]
    if not recipes and len(known) == len(parts) and all(recipe.get("data") == known[0][0].get("data") for recipe, _ in known):
        recipes = [known[0][0]]
    table: dict[str, Any] = {key: recipes[0][key] for key in COPIED if key in recipes[0]} if recipes else {}
    counts = {label: count for label, count in zip(result.class_names, result.stored_counts.tolist(), strict=True) if count}
    ipc = result.metadata.get("ipc") or (counts if len(set(counts.values())) > 1 else max(counts.values()))
    recipe = parse_recipe({**table, "name": name, "ipc": ipc})
    if recipes:
        directory.write_recipe(recipe_dict(recipe))
    save_set(result, directory)
    for number, frame in enumerate(frames):
        add_frame(directory.path, number, frame, result.stored_labels)
    own = {name: {**facts, "parts": [_part(*part) for part in parts]}}
    close_run(directory, {"seed": recipe.seed, "steps": 0, "seconds": 0.0, **_of_manifests([place for place, _ in parts]), **own})
    return Run(path=directory.path, steps=0, seconds=0.0, evaluations=[])


def file_of(place: Path) -> Path:
    """Returns the file of the set of a run directory, or a file as it is."""
    return place / SET if place.is_dir() else place


def _part(place: Path, part: Artifact) -> dict[str, Any]:
    """Returns what the manifest tells of a set that another is made of: file, classes, images, budget and statistics."""
    file = file_of(place)
    kept: dict[str, Any] = {key: part.metadata[key] for key in ("recipe", "pipc") if key in part.metadata}
    return {
        "path": str(file.absolute()), "sha256": sha256(file), **kept, "seeds": part.seeds, "class_names": part.class_names,
        "images": len(part.images), "stored_numbers": part.stored_numbers, "mean": part.mean, "std": part.std,
    }  # fmt: skip


def _of_manifests(paths: Iterable[Path]) -> dict[str, Any]:
    """Returns what the parts' own manifests tell of all of them: plugins and accessible real images."""
    manifests = [read_manifest(path) for path in paths if (path / MANIFEST).is_file()]
    plugins_: Sequence[Any] = [plugin for manifest in manifests for plugin in manifest.get("plugins", [])]
    files_of_plugins = {file: digest for manifest in manifests for file, digest in manifest.get("plugin_files", {}).items()}
    real = [source for manifest in manifests for source in manifest.get("real_files", [])]
    return {
        "threads": torch.get_num_threads(),
        **({"plugin_files": files_of_plugins} if files_of_plugins else {}),
        "plugins": [plugin for number, plugin in enumerate(plugins_) if plugin not in plugins_[:number]],
        "real_files": sorted(set(real), key=str),
    }
