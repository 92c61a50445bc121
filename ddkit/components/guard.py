"""Who is to blame: code of a component runs inside a guard that names it where it raises or moves a global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddkit.components import registry
from ddkit.components.base import Component
from ddkit.components.globalstate import SETTINGS, random_states
from ddkit.errors import PluginError, RunFailed, is_its_own, told


@contextmanager
def blamed(kind: str, component: Component, *, building: bool = False, may_draw: bool = False) -> Iterator[None]:
    """Inside runs code of `component`: what it raises becomes a RunFailed (a PluginError while `building`) that names it.

    A stranger's has to leave the global random generators as they were, unless it `may_draw`. (ddkit's own are held to that
    by their conformance tests; asking at every step would cost time.)
    """
    watched = bool(component.origin) and not may_draw
    before = random_states() if watched else {}
    try:
        yield
    except BaseException as error:
        if not is_its_own(error):
            raise
        kind_of_error = PluginError if building else RunFailed
        raise kind_of_error(f"The {called(kind, component)} raised {told(error)}.{advice(kind, component)}") from error
    if watched:
        check_random_states(before, called(kind, component), advice(kind, component))


def called(kind: str, component: Component, label: str = "") -> str:
    """Returns how messages call a component, by its `label` in the recipe if it has one, with the origin of a stranger's."""
    return f"{kind} '{label or component.name}'" + (f" ({component.origin})" if component.origin else "")


def advice(kind: str, component: Component) -> str:
    """Returns what to add to a message about a stranger's component: the command that tells more."""
    return registry.find(kind, component.name).advice if component.origin else ""


def check_random_states(before: dict[str, Any], who: str, helps: str) -> None:
    """Raises RunFailed where a global random generator is not as it was `before`."""
    moved = [library for library, state in random_states().items() if state != before[library]]
    if SETTINGS in moved:
        raise RunFailed(
            f"The {who} changes {SETTINGS} (default dtype, gradients on or off, threads, deterministic algorithms), which hold for every "
            f"other component too. It has to leave them as they are.{helps}"
        )
    if moved:
        raise RunFailed(
            f"The {who} changes the global random state of {' and '.join(moved)}, so the run would not repeat. It has to draw from the "
            f"generator that it is given.{helps}"
        )
