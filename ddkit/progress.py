"""The progress bar: an observer like any other."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ddkit.hookspecs import hookimpl


class ProgressBar:
    """Shows steps with the loss terms and the time left, and the stages before and after: on stderr, in a notebook as a notebook's bar.

        ddkit.distill(losses="dm", observers=[ddkit.ProgressBar()])

    The command shows one by itself where stderr is a terminal.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def _to(self, name: str, done: int, total: int) -> None:
        if self._name != name:
            self.close()
            self._bar, self._name = _new_bar(name, total), name
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


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell is not None else None
    return type(found).__name__ == "ZMQInteractiveShell"


def _new_bar(name: str, total: int) -> Any:
    if in_notebook():
        from tqdm.auto import tqdm  # a notebook's bar where ipywidgets is installed, else text

        return tqdm(total=total, desc=name, leave=False)
    from tqdm import tqdm as plain

    return plain(total=total, desc=name, file=sys.stderr, leave=False, dynamic_ncols=True)
