"""ddkit: dataset distillation from a few real images and a trained model, with every part a plugin.

Importing this package costs no torch: names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddkit.api import Run, blend, distill, evaluate, resume, train
    from ddkit.components.base import (
        API_VERSION,
        Augmenter,
        Component,
        DataInfo,
        Dataset,
        Evaluation,
        EvaluationData,
        Evaluator,
        Exporter,
        InitContext,
        Initializer,
        Loss,
        LossGroup,
        Model,
    )
    from ddkit.components.observers import hookimpl
    from ddkit.components.options import Parameter, Requires, option
    from ddkit.components.registry import add_plugin_file, create
    from ddkit.data.arrays import read_arrays
    from ddkit.data.images import Normalisation, NormalisedRows, blocks, conform, on_disk, spread, to_unit
    from ddkit.data.pictures import high_frequency_share, radial_spectrum, sheet_png
    from ddkit.data.real import passed_dataset
    from ddkit.engine.parametrization import grid
    from ddkit.engine.step import RealStep, Step, View
    from ddkit.errors import DdkitError, FlagError, InputError, Interrupted, PluginError, RunFailed, RunFilesError
    from ddkit.files import cache_folder, not_permitted, open_regular, without_folders
    from ddkit.nn.compiling import Arithmetic, compiled, decide_arithmetic, is_compiled
    from ddkit.nn.device import products, to_device, tune_process
    from ddkit.nn.networks import build_network, redraw, training_flops
    from ddkit.nn.teacher import Teacher
    from ddkit.nn.training import Schedule, accuracy, fit
    from ddkit.run.artifact import Artifact, Provenance, load
    from ddkit.run.children import Child, ChildEnded, reply
    from ddkit.run.exporting import export
    from ddkit.run.importing import import_file
    from ddkit.run.progress import ProgressBar, ProgressLines
    from ddkit.run.report import report
    from ddkit.seeding import generator

__version__ = "0.1.0"

_HOMES = {
    "ddkit.api": ("Run", "blend", "distill", "evaluate", "resume", "train"),
    "ddkit.data.arrays": ("read_arrays",),
    "ddkit.run.artifact": ("Artifact", "Provenance", "load"),
    "ddkit.run.children": ("Child", "ChildEnded", "reply"),
    "ddkit.components.base": (
        "API_VERSION", "Augmenter", "Component", "DataInfo", "Dataset", "Evaluation", "EvaluationData", "Evaluator",
        "Exporter", "Initializer", "Loss", "LossGroup", "Model", "InitContext",
    ),
    "ddkit.nn.compiling": ("Arithmetic", "compiled", "decide_arithmetic", "is_compiled"),
    "ddkit.nn.device": ("products", "to_device", "tune_process"),
    "ddkit.engine.parametrization": ("grid",),
    "ddkit.run.markdown": ("markdown",),
    "ddkit.errors": (
        "DdkitError", "FlagError", "InputError", "Interrupted", "PluginError", "RunFailed", "RunFilesError",
    ),
    "ddkit.run.exporting": ("export",),
    "ddkit.files": ("cache_folder", "not_permitted", "open_regular", "without_folders"),
    "ddkit.components.observers": ("hookimpl",),
    "ddkit.data.images": ("Normalisation", "NormalisedRows", "blocks", "conform", "on_disk", "spread", "to_unit"),
    "ddkit.run.importing": ("import_file",),
    "ddkit.nn.networks": ("build_network", "redraw", "training_flops"),
    "ddkit.components.options": ("Parameter", "Requires", "option"),
    "ddkit.data.pictures": ("high_frequency_share", "radial_spectrum", "sheet_png"),
    "ddkit.data.real": ("passed_dataset",),
    "ddkit.run.progress": ("ProgressBar", "ProgressLines"),
    "ddkit.components.registry": ("add_plugin_file", "create"),
    "ddkit.seeding": ("generator",),
    "ddkit.run.report": ("report",),
    "ddkit.engine.step": ("RealStep", "Step", "View"),
    "ddkit.nn.teacher": ("Teacher",),
    "ddkit.nn.training": ("Schedule", "accuracy", "fit"),
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
    "InitContext",
    "Initializer",
    "InputError",
    "Interrupted",
    "Loss",
    "LossGroup",
    "Model",
    "Normalisation",
    "NormalisedRows",
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
    "option",
    "passed_dataset",
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
