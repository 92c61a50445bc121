"""Networks: building and re-drawing them, features, training, teachers, and how they are computed (device, precision, compiled or not).

The architectures are plugins. What a step does with a network is in ddkit.engine.

The names of `__all__` are for plugins; they are loaded on first use, so that importing this package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddkit.nn.compiling import Arithmetic, compiled, decide_arithmetic, is_compiled
    from ddkit.nn.device import products, to_device, tune_process
    from ddkit.nn.embedder import layer_features
    from ddkit.nn.networks import build_network, redraw, training_flops
    from ddkit.nn.teacher import Teacher
    from ddkit.nn.training import accuracy, fit, predicted
    from ddkit.nn.unrolling import unrolled_sgd
    from ddkit.recipes.protocols import Protocol, Schedule
    from ddkit.recipes.resolve import read_protocol

_HOMES = {
    "ddkit.nn.compiling": "Arithmetic compiled decide_arithmetic is_compiled",
    "ddkit.nn.device": "products to_device tune_process",
    "ddkit.nn.embedder": "layer_features",
    "ddkit.nn.networks": "build_network redraw training_flops",
    "ddkit.nn.teacher": "Teacher",
    "ddkit.nn.training": "accuracy fit predicted",
    "ddkit.nn.unrolling": "unrolled_sgd",
    "ddkit.recipes.protocols": "Protocol Schedule",
    "ddkit.recipes.resolve": "read_protocol",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = [
    "Arithmetic", "Protocol", "Schedule", "Teacher", "accuracy", "build_network", "compiled", "decide_arithmetic", "fit", "is_compiled",
    "layer_features", "predicted", "products", "read_protocol", "redraw", "to_device", "training_flops", "tune_process", "unrolled_sgd",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
