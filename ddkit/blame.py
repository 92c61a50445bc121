"""Who is to blame: code of a component runs inside a guard that names it where it raises or moves a global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ddkit import plugins
from ddkit.errors import DdkitError, PluginError, RunFailed


@contextmanager
def blamed(kind: str, name: str, *, building: bool = False, may_draw: bool = False) -> Iterator[None]:
    """Inside runs code of the component `name`: what it raises becomes a RunFailed (a PluginError while `building`) that names it.

    The global random generators have to be as before afterwards, unless it `may_draw`.
    """
    before = random_states()
    try:
        yield
    except DdkitError:
        raise
    except Exception as error:  # a stranger's component can raise anything
        called, advice = plugins.describe(kind, name)
        kind_of_error = PluginError if building else RunFailed
        raise kind_of_error(f"The {called} raised {type(error).__name__}: {error}.{advice}") from error
    if may_draw:
        return
    after = random_states()
    moved = [library for library, state in after.items() if state != before[library]]
    if moved:
        called, advice = plugins.describe(kind, name)
        raise RunFailed(f"The {called} {moved_text(moved)}{advice}")


def moved_text(moved: list[str]) -> str:
    """Returns what to say of a component that moved the random state of these libraries."""
    return (
        f"changes the global random state of {' and '.join(moved)}, so the run would not repeat. It has to draw from the generator "
        "that it is given."
    )


def random_states() -> dict[str, Any]:
    """Returns the states of the global random generators on the CPU, to compare."""
    numpy = np.random.get_state(legacy=False)["state"]
    return {"torch": torch.get_rng_state().numpy().tobytes(), "Python": random.getstate(), "numpy": (numpy["pos"], numpy["key"].tobytes())}
