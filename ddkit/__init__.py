"""ddkit: dataset distillation from a few real images and a trained model, with every part a plugin.

Importing this package costs no torch: names are loaded on first use. More names for plugins are in ddkit.nn and ddkit.data.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddkit import data, nn
    from ddkit.api import blend, cite, compare, distill, evaluate, join, resume, split, train, train_experts
    from ddkit.components.base import (
        Augmenter,
        DataInfo,
        Dataset,
        Evaluation,
        Evaluator,
        Exporter,
        InitContext,
        Initializer,
        Loss,
        Model,
        Parametrization,
    )
    from ddkit.components.observers import hookimpl
    from ddkit.components.options import Parameter, Requires, option, overriding
    from ddkit.components.registry import add_plugin_file, create
    from ddkit.engine.step import Step
    from ddkit.errors import DdkitError, FlagError, InputError, Interrupted, PluginError, RunFailed, RunFilesError
    from ddkit.run.artifact import Artifact, load
    from ddkit.run.children import Child, ChildEnded, reply
    from ddkit.run.exporting import export
    from ddkit.run.importing import import_file
    from ddkit.run.markdown import markdown
    from ddkit.run.progress import ProgressBar
    from ddkit.run.report import report
    from ddkit.seeding import generator

__version__ = "0.2.0"
_HOMES = {
    "ddkit.api": "blend cite compare distill evaluate join resume split train train_experts",
    "ddkit.components.base": "Augmenter DataInfo Dataset Evaluation Evaluator Exporter InitContext Initializer Loss Model Parametrization",
    "ddkit.components.observers": "hookimpl",
    "ddkit.components.options": "Parameter Requires option overriding",
    "ddkit.components.registry": "add_plugin_file create",
    "ddkit.engine.step": "Step",
    "ddkit.errors": "DdkitError FlagError InputError Interrupted PluginError RunFailed RunFilesError",
    "ddkit.run.artifact": "Artifact load",
    "ddkit.run.children": "Child ChildEnded reply",
    "ddkit.run.exporting": "export",
    "ddkit.run.importing": "import_file",
    "ddkit.run.markdown": "markdown",
    "ddkit.run.progress": "ProgressBar",
    "ddkit.run.report": "report",
    "ddkit.seeding": "generator",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = [
    "Artifact", "Augmenter", "Child", "ChildEnded", "DataInfo", "Dataset", "DdkitError", "Evaluation", "Evaluator", "Exporter",
    "FlagError", "InitContext", "Initializer", "InputError", "Interrupted", "Loss", "Model", "Parameter",
    "Parametrization", "PluginError", "ProgressBar", "Requires", "RunFailed", "RunFilesError", "Step", "__version__", "add_plugin_file",
    "blend", "cite", "compare", "create", "data", "distill", "evaluate", "export", "generator", "hookimpl", "import_file", "join", "load",
    "markdown", "nn", "option", "overriding", "reply", "report", "resume", "split", "train", "train_experts",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("data", "nn"):
        return importlib.import_module(f"ddkit.{name}")
    if name not in _HOME_OF:
        new = "" if name.startswith("_") else importlib.import_module("ddkit.components.upgrade").instead(name)
        raise AttributeError(f"module 'ddkit' has no attribute '{name}'" + (f": write {new}" if new else ""))
    return getattr(importlib.import_module(_HOME_OF[name]), name)
