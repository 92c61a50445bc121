"""The progress bar: an observer like any other."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ddkit.hookspecs import hookimpl


class ProgressBar:
    """Shows steps with the loss terms, and the stages before and after, on a terminal's stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def _to(self, name: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._name != name:
            self.close()
            self._bar, self._name = tqdm(total=total, desc=name, file=sys.stderr, leave=False, dynamic_ncols=True), name
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._name = None, ""

    @hookimpl
    def step_finished(self, index: int, steps: int, record: Mapping[str, Any] | None) -> None:
        self._to("distilling", index + 1, steps)
        if record is not None and self._bar is not None:
            self._bar.set_postfix({label: f"{term['raw']:.4g}" for label, term in record["losses"].items()}, refresh=False)

    @hookimpl
    def stage_progress(self, stage: str, done: int, total: int) -> None:
        self._to(stage, done, total)


def observers(quiet: bool) -> list[Any]:
    """Returns a progress bar where stderr is a terminal."""
    return [] if quiet or not sys.stderr.isatty() else [ProgressBar()]
