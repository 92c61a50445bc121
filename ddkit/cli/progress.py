"""How a command shows how far it is: a bar on a terminal, or lines with --verbose."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddkit.hookspecs import hookimpl
from ddkit.ranks import follows
from ddkit.shares import shares, words

log = logging.getLogger("ddkit")


class Narrator:
    """Tells in lines of the log what a run is about, its losses at each logged step, and the ends of its stages."""

    @hookimpl
    def run_started(self, recipe: Any, path: Path, start: int) -> None:
        """Tells what the run does, from its resolved recipe."""
        engine = recipe.engine
        losses = ", ".join(f"{label} x {loss.weight:g}" for label, loss in sorted(recipe.losses.items())) or "none"
        log.info(
            "%s: steps %d to %d, losses %s; %s at the start, %s as network, compiled: %s, %s.",
            path, start, recipe.steps, losses, recipe.initializer.use, recipe.network.model, _yes(engine.compile), engine.precision,
        )  # fmt: skip

    @hookimpl
    def step_finished(self, index: int, steps: int, record: Mapping[str, Any] | None) -> None:
        """Tells the losses, and their shares of the gradient on the images, where they were logged."""
        if record is not None:
            terms = ", ".join(f"{label} {term['raw']:.4g}" for label, term in record["losses"].items())
            own = shares(record)
            gradient = f"; gradient: {words(own)}" if own else ""
            log.info("step %d of %d: total %.4g (%s)%s", index + 1, steps, record["total"], terms, gradient)

    @hookimpl
    def stage_progress(self, stage: str, done: int, total: int) -> None:
        """Tells the end of a stage."""
        if done >= total:
            log.info("%s: %d of %d", stage, done, total)


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value))


def observers(quiet: bool, verbose: bool = False) -> list[Any]:
    """Returns what shows the progress: with `verbose` lines, else a bar where stderr is a terminal, nothing where it is to be `quiet`.

    Of the processes of a run the first alone shows it.
    """
    from ddkit.progress import ProgressBar

    if quiet or follows():
        return []
    if verbose:
        return [Narrator()]
    return [ProgressBar()] if sys.stderr.isatty() else []


def reporter(stage: str, watchers: list[Any]) -> Callable[[int, int], None] | None:
    """Returns a function that shows how far a stage is, None where nobody watches."""
    return (lambda done, total: watchers[0].stage_progress(stage, done, total)) if watchers else None
