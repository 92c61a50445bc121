"""When the command shows a progress bar."""

from __future__ import annotations

import sys
from typing import Any


def observers(quiet: bool) -> list[Any]:
    """Returns a progress bar where stderr is a terminal."""
    from ddkit.progress import ProgressBar

    return [] if quiet or not sys.stderr.isatty() else [ProgressBar()]
