"""When the command shows a progress bar."""

from __future__ import annotations

import sys
from typing import Any

from ddkit.ranks import follows


def observers(quiet: bool) -> list[Any]:
    """Returns a progress bar where stderr is a terminal, in the first process of a run."""
    from ddkit.progress import ProgressBar

    return [] if quiet or follows() or not sys.stderr.isatty() else [ProgressBar()]
