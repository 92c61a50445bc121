"""Real images: which of them a run may use, reading and resizing them, keeping them decoded, normalisation, pictures, spectra.

The datasets themselves are plugins. The synthetic images are in ddkit.engine while they are optimised, and in ddkit.run as files.

The way of a real image: `Dataset.images` of a plugin decodes it; `loading.load_images` makes one tensor of many, from the cache, in memory
or in a file; `real.RealData` asks for the accessible ones; `ddkit.engine.draws` draws rows of them for a step, which offers them as
`step.real.images`.

The names of `__all__` are for plugins; they are loaded on first use, so that importing this package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddkit.cache import CachedResult, cache_folder
    from ddkit.components.base import EvaluationData
    from ddkit.data.arrays import read_arrays
    from ddkit.data.images import Normalisation, NormalisedRows, blocks, conform, on_disk, spread, to_unit
    from ddkit.data.passed import passed_dataset
    from ddkit.data.pictures import grid, high_frequency_share, radial_spectrum, sheet_png
    from ddkit.files import natural, not_permitted, open_regular, without_folders
    from ddkit.text import few

_HOMES = {
    "ddkit.components.base": "EvaluationData",
    "ddkit.data.arrays": "read_arrays",
    "ddkit.data.images": "Normalisation NormalisedRows blocks conform on_disk spread to_unit",
    "ddkit.data.pictures": "grid high_frequency_share radial_spectrum sheet_png",
    "ddkit.data.passed": "passed_dataset",
    "ddkit.cache": "CachedResult cache_folder",
    "ddkit.files": "natural not_permitted open_regular without_folders",
    "ddkit.text": "few",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = [
    "CachedResult", "EvaluationData", "Normalisation", "NormalisedRows", "blocks", "cache_folder", "conform", "few", "grid",
    "high_frequency_share", "natural", "not_permitted", "on_disk", "open_regular", "passed_dataset", "radial_spectrum", "read_arrays",
    "sheet_png", "spread", "to_unit", "without_folders",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
