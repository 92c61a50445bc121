"""The observer `tensorboard`: losses, diagnostics, accuracies and pictures of a run for TensorBoard."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import ddkit

log = logging.getLogger("ddkit")

VARIABLE = "DDKIT_TENSORBOARD"  # 1: write into the run's folder tensorboard/; a path: into a folder of the run's name there
MOST_ROWS = 20  # classes of a picture


class TensorBoard:
    """Writes the scalars of every logged step and a picture of the set at every checkpoint, where DDKIT_TENSORBOARD asks for it."""

    def __init__(self) -> None:
        self._writer: Any = None

    @ddkit.hookimpl
    def run_started(self, path: Path, start: int) -> None:
        self._close()
        wanted = os.environ.get(VARIABLE, "")
        if wanted in ("", "0"):
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.warning("%s is set, but TensorBoard is not installed. Install it: pip install 'ddkit[tensorboard]'", VARIABLE)
            return
        folder = path / "tensorboard" if wanted == "1" else Path(wanted) / path.name
        if folder.is_symlink():
            log.warning("%s is a symbolic link, which ddkit does not follow, so no events of this run are written for TensorBoard.", folder)
            return
        self._writer = SummaryWriter(str(folder), purge_step=start or None)  # what a resumed run does again counts once

    @ddkit.hookimpl
    def step_finished(self, index: int, record: Mapping[str, Any] | None) -> None:
        if self._writer is None or record is None:
            return
        self._writer.add_scalar("total", record["total"], index)
        for label, values in [*record["losses"].items(), *record.get("logged", {}).items()]:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{label}/{name}", value, index)

    @ddkit.hookimpl
    def checkpoint_written(self, index: int, images: Tensor, labels: Tensor) -> None:
        if self._writer is not None:
            self._writer.add_image("synthetic set", grid(images, labels), index)
            self._writer.flush()

    @ddkit.hookimpl
    def run_finished(self, evaluations: Sequence[ddkit.Evaluation]) -> None:
        if self._writer is None:
            return
        for row in evaluations:
            name = f"{row.evaluator}/{row.model}, {row.protocol}, {row.labels} labels, {row.images}"
            if row.accuracy_mean is not None:
                self._writer.add_scalar(name, row.accuracy_mean)
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def grid(images: Tensor, labels: Tensor) -> Tensor:
    """Returns a picture (C, H, W) in 0..1 of images (n, C, H, W) in pixel units: a row for each of the first MOST_ROWS classes."""
    from torchvision.utils import make_grid

    shown = [images[labels == label] for label in labels.unique()[:MOST_ROWS]]
    longest = max(len(row) for row in shown)
    padded = [functional.pad(row, (0, 0) * 3 + (0, longest - len(row)), value=1.0) for row in shown]
    return make_grid(torch.cat(padded).clamp(0, 1), nrow=longest)


observer = TensorBoard()
