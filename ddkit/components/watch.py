"""Tells what was written to, by the version counters of tensors: nothing is read from a device."""

from __future__ import annotations

from torch import Tensor, nn


class Watch:
    """Remembers the versions of tensors and modules that several may read and nobody may write to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor | nn.Module, int]] = {}

    def note(self, name: str, made: Tensor | nn.Module) -> None:
        """Watches `made` from now on, under `name`."""
        self._known[name] = (made, _version(made))

    def noted(self, name: str, made: Tensor) -> Tensor:
        """Watches `made` and returns it."""
        self.note(name, made)
        return made

    def written(self) -> list[str]:
        """Returns the names of what was written to since it was noted, or since this was asked."""
        found = [name for name, (made, version) in self._known.items() if _version(made) != version]
        for name in found:
            self.note(name, self._known[name][0])
        return found


def _version(made: Tensor | nn.Module) -> int:
    """Returns a number that grows with every write to a tensor, or to a parameter or buffer of a module."""
    if isinstance(made, nn.Module):
        return sum(each._version for each in (*made.parameters(), *made.buffers()))
    return made._version
