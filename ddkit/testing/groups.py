"""The conformance suite of loss groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ddkit.components import registry
from ddkit.errors import PluginError
from ddkit.testing.suite import Broken, Conformance, check


class LossGroupConformance(Conformance):
    """Checks of a loss group."""

    kind = "loss-group"

    def _members(self) -> Any:
        found: Any = self.found()
        return found.members

    @check
    def test_members_are_losses(self) -> None:
        """There is at least one member, and each is the name of a loss that loads; a group is none."""
        members = self._members()
        if isinstance(members, str) or not members:
            raise Broken(f"The loss group '{self.label}' has the members {members!r}; they have to be the names of at least one loss.")
        for name in members:
            try:
                registry.load("loss", name)
            except PluginError as error:
                raise Broken(f"A member of the loss group '{self.label}' is no loss that can be had: {error}") from None

    @check
    def test_members_are_named_once(self) -> None:
        """No loss is named twice."""
        names = Counter(str(name).rpartition("/")[2] for name in self._members())
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise Broken(f"The loss group '{self.label}' names {', '.join(twice)} more than once: a recipe has each loss once.")
