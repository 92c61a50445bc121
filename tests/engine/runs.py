"""What tests of the engine share: small data, a run without files, comparisons to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddkit.engine.bank import Bank
from ddkit.engine.loop import Engine
from ddkit.recipes.tables import parse_recipe
from ddkit.run.initial_set import initial_set
from ddkit.run.setup import RunSetup


def write_npz(file: Path, counts: Sequence[int]) -> Path:
    """Writes a data set of `counts` grey images of 8 x 8 per class, whose brightness tells the class a little."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    images = (draw.random((len(labels), 8, 8)) * 0.5 + labels[:, None, None] / 10).astype(np.float32)
    np.savez(file, x_train=images, y_train=labels, x_test=images[::3], y_test=labels[::3])
    return file


def made(table: Mapping[str, Any]) -> tuple[RunSetup, Bank, Engine]:
    """Returns job, bank and engine of a recipe, as a run makes them, with nothing written."""
    job = RunSetup(parse_recipe(table), device="cpu")
    job.load_teacher()
    job.load_experts()
    bank = initial_set(job).bank
    return job, bank, job.engine_over(bank)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Returns whether two sets of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
