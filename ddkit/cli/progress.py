"""How a command shows how far it is: a bar on a terminal, else lines, with --verbose more of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ddkit.components.observers import hookimpl
from ddkit.distributed import follows
from ddkit.run.doubts import shares, words
from ddkit.run.progress import ProgressBar, ProgressLines

log = logging.getLogger("ddkit")


class Narrator(ProgressLines):
    """Tells beside the stages what a run is about, its losses at each logged step, and the ends of stages."""

    @hookimpl
    def run_started(self, recipe: Any, path: Path, start: int) -> None:
        """Tells what the run does, from its resolved recipe."""
        engine = recipe.engine
        compiled = {True: "yes", False: "no"}.get(engine.compile, engine.compile)  # else "auto"
        losses = ", ".join(f"{label} x {loss.weight:g}" for label, loss in sorted(recipe.losses.items())) or "none"
        log.info(
            "%s: steps %d to %d, losses %s, initializer %s, network %s, compiled: %s, %s.",
            path, start, recipe.steps, losses, recipe.initializer.use, recipe.network.model, compiled, engine.precision,
        )  # fmt: skip

    @hookimpl
    def step_finished(self, index: int, steps: int, record: Mapping[str, Any] | None) -> None:
        """Tells the losses, and their shares of the gradient on the images, where they were logged."""
        if record is not None:
            terms = ", ".join(f"{label} {term['raw']:.4g}" for label, term in record["losses"].items())
            own = shares(record)
            gradient = f", gradient: {words(own)}" if own else ""
            log.info("step %d of %d: total %.4g (%s)%s", index + 1, steps, record["total"], terms, gradient)

    @hookimpl
    def stage_progress(self, stage: str, done: int, total: int, part: float, values: Mapping[str, float]) -> None:
        """Tells the end of a stage in which networks are trained."""
        super().stage_progress(stage, done, total, part, values)
        if done >= total and stage != "reading":
            log.info("%s: %d of %d", stage, done, total)


@contextmanager
def watching(quiet: bool, verbose: bool = False) -> Iterator[list[Any]]:
    """Yields the observers that show the progress, if it is not to be `quiet`, and takes a bar away at the end.

    Of the processes of a run the first alone shows it.
    """
    if quiet or follows():
        yield []
        return
    bar = ProgressBar()
    terminal = sys.stderr is not None and sys.stderr.isatty()
    try:
        yield [Narrator() if verbose else bar if terminal else ProgressLines()]
    finally:
        with suppress(OSError):  # the terminal is gone
            bar.close()
