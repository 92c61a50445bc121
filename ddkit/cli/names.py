"""Names of components and recipes as parameters: a shell completes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem


class Names(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.3 on
    """Text that names components of `kinds`, several separated by commas where `many`; a shell completes the last of them.

    The value stays as it is written: what is wrong with it is told where it is used.
    """

    name = "text"

    def __init__(self, *kinds: str, many: bool = False, files: str = "") -> None:
        """`files`: how the names of files end that may be given too."""
        self.kinds, self.many, self.files = kinds, many, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns the names that begin as what was typed, with their summaries, and files."""
        before, comma, last = incomplete.rpartition(",") if self.many else ("", "", incomplete)
        items = [CompletionItem(f"{before}{comma}{name}", help=summary) for name, summary in _known(self.kinds) if name.startswith(last)]
        return items + [CompletionItem(str(path)) for path in _files(self.files, incomplete)]


def _known(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Returns name and summary of every installed component of `kinds`; imports none of them."""
    from ddkit.components import registry

    return sorted({(plugin.name, registry.status(plugin)[1]) for plugin in registry.plugins() if plugin.kind in kinds})


def _files(ending: str, incomplete: str) -> list[Path]:
    if not ending:
        return []
    folder = Path(incomplete).parent if "/" in incomplete else Path(".")
    return sorted(path for path in folder.glob(f"*{ending}") if str(path).startswith(incomplete.removeprefix("./")))
