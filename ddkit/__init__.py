"""ddkit: dataset distillation from a few real images and a trained model, with every part a plugin.

Importing this package costs no torch: names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddkit.api import Run, blend, distill, evaluate, resume, train
    from ddkit.arrays import read_arrays
    from ddkit.artifact import Artifact, Provenance, load
    from ddkit.cache import cache_folder
    from ddkit.children import Child, ChildEnded, reply
    from ddkit.components import (
        API_VERSION,
        Augmenter,
        Component,
        DataInfo,
        Dataset,
        Evaluation,
        EvaluationData,
        Evaluator,
        Exporter,
        Initializer,
        Loss,
        LossGroup,
        Model,
        Start,
    )
    from ddkit.compute import Arithmetic, compiled, decide_arithmetic, is_compiled, pick_precision, products, to_device, tune_process
    from ddkit.decode import grid
    from ddkit.errors import DdkitError, FlagError, InputError, Interrupted, PluginError, RunFailed, RunFilesError
    from ddkit.exporting import export
    from ddkit.files import not_permitted, open_regular
    from ddkit.hookspecs import hookimpl
    from ddkit.images import Normalisation, NormalisedRows, conform, sheet_png, to_unit
    from ddkit.importing import import_file
    from ddkit.mapped import blocks, on_disk
    from ddkit.names import without_folders
    from ddkit.networks import build_network, redraw, training_flops
    from ddkit.options import Option, Options, Parameter, Requires
    from ddkit.passed import passed_dataset
    from ddkit.plugins import add_plugin_file, create
    from ddkit.progress import ProgressBar, ProgressLines
    from ddkit.randomness import generator
    from ddkit.reporting import report
    from ddkit.spectra import high_frequency_share, radial_spectrum, spread
    from ddkit.step import RealStep, Step, View
    from ddkit.teacher import Teacher
    from ddkit.training import Schedule, accuracy, fit

__version__ = "0.1.0"

_HOMES = {
    "ddkit.api": ("Run", "blend", "distill", "evaluate", "resume", "train"),
    "ddkit.arrays": ("read_arrays",),
    "ddkit.artifact": ("Artifact", "Provenance", "load"),
    "ddkit.cache": ("cache_folder",),
    "ddkit.children": ("Child", "ChildEnded", "reply"),
    "ddkit.components": (
        "API_VERSION", "Augmenter", "Component", "DataInfo", "Dataset", "Evaluation", "EvaluationData", "Evaluator",
        "Exporter", "Initializer", "Loss", "LossGroup", "Model", "Start",
    ),
    "ddkit.compute": (
        "Arithmetic", "compiled", "decide_arithmetic", "is_compiled", "pick_precision", "products", "to_device", "tune_process",
    ),
    "ddkit.decode": ("grid",),
    "ddkit.escaping": ("markdown",),
    "ddkit.errors": (
        "DdkitError", "FlagError", "InputError", "Interrupted", "PluginError", "RunFailed", "RunFilesError",
    ),
    "ddkit.exporting": ("export",),
    "ddkit.files": ("not_permitted", "open_regular"),
    "ddkit.hookspecs": ("hookimpl",),
    "ddkit.images": ("Normalisation", "NormalisedRows", "conform", "sheet_png", "to_unit"),
    "ddkit.importing": ("import_file",),
    "ddkit.mapped": ("blocks", "on_disk"),
    "ddkit.names": ("without_folders",),
    "ddkit.networks": ("build_network", "redraw", "training_flops"),
    "ddkit.options": ("Option", "Options", "Parameter", "Requires"),
    "ddkit.passed": ("passed_dataset",),
    "ddkit.progress": ("ProgressBar", "ProgressLines"),
    "ddkit.plugins": ("add_plugin_file", "create"),
    "ddkit.randomness": ("generator",),
    "ddkit.reporting": ("report",),
    "ddkit.spectra": ("high_frequency_share", "radial_spectrum", "spread"),
    "ddkit.step": ("RealStep", "Step", "View"),
    "ddkit.teacher": ("Teacher",),
    "ddkit.training": ("Schedule", "accuracy", "fit"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "API_VERSION",
    "Arithmetic",
    "Artifact",
    "Augmenter",
    "Child",
    "ChildEnded",
    "Component",
    "DataInfo",
    "Dataset",
    "DdkitError",
    "Evaluation",
    "EvaluationData",
    "Evaluator",
    "Exporter",
    "FlagError",
    "Initializer",
    "InputError",
    "Interrupted",
    "Loss",
    "LossGroup",
    "Model",
    "Normalisation",
    "NormalisedRows",
    "Option",
    "Options",
    "Parameter",
    "PluginError",
    "ProgressBar",
    "ProgressLines",
    "Provenance",
    "RealStep",
    "Requires",
    "Run",
    "RunFailed",
    "RunFilesError",
    "Schedule",
    "Start",
    "Step",
    "Teacher",
    "View",
    "__version__",
    "accuracy",
    "add_plugin_file",
    "blend",
    "blocks",
    "build_network",
    "cache_folder",
    "compiled",
    "conform",
    "create",
    "decide_arithmetic",
    "distill",
    "evaluate",
    "export",
    "fit",
    "generator",
    "grid",
    "high_frequency_share",
    "hookimpl",
    "import_file",
    "is_compiled",
    "load",
    "markdown",
    "not_permitted",
    "on_disk",
    "open_regular",
    "passed_dataset",
    "pick_precision",
    "products",
    "radial_spectrum",
    "read_arrays",
    "redraw",
    "reply",
    "report",
    "resume",
    "sheet_png",
    "spread",
    "to_device",
    "to_unit",
    "train",
    "training_flops",
    "tune_process",
    "without_folders",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ddkit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
