"""Runs whose result is the average of two sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddkit.files import sha256
from ddkit.recipes.tables import parse_recipe, recipe_dict
from ddkit.run import warnings
from ddkit.run.artifact import Artifact, load
from ddkit.run.averaging import blended, partners
from ddkit.run.directory import Run, RunDirectory, save_set
from ddkit.run.manifest import MANIFEST, RECIPE, SET
from ddkit.run.report import close_run
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
    first, second = parts
    result = blended(first, second, alpha)
    known = [RunDirectory.existing(place).read_recipe() for place in places if (place / RECIPE).is_file()]
    copied = ("data", "teacher", "train", "seed", "pipc")
    table: dict[str, Any] = {key: known[0][key] for key in copied if key in known[0]} if known else {}
    ipc = int(result.metadata.get("ipc") or result.stored_labels.bincount().max())
    recipe = parse_recipe({**table, "name": "blend", "ipc": ipc})
    if known:
        directory.write_recipe(recipe_dict(recipe))
    save_set(result, directory)
    write_parts(directory.path, first.stored_images, second.stored_images[partners(first, second)], first.stored_labels)
    facts = _facts([place.absolute() for place in places], alpha)
    close_run(directory, {"seed": recipe.seed, "steps": 0, "seconds": 0.0, **facts})
    return Run(path=directory.path, steps=0, seconds=0.0, evaluations=[])


def _facts(paths: Sequence[Path], alpha: float) -> dict[str, Any]:
    """Returns what the manifest tells of a blend: its parts with their sha256, and what their own manifests tell of both."""
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
        "blend": {"alpha": alpha, "parts": [{"path": str(file), "sha256": sha256(file)} for file in files]},
    }
