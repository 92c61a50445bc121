"""The papers that a recipe uses, as BibTeX: those that its source and its components' docstrings name by number at arXiv or OpenReview.

The entries are in citations.bib, which `python docs/generate.py` writes from CITATION.cff.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ddkit.components import registry
from ddkit.recipes.resolve import named_components
from ddkit.recipes.tables import Recipe

ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
ENTRIES = Path(__file__).with_name("citations.bib")
PARTS = ("losses", "initializer", "parametrization", "augmenter", "views", "evaluators")  # tables whose components make or test the set


class Citation(msgspec.Struct, frozen=True, kw_only=True):
    """A BibTeX entry: its `key`, its text `bibtex`, and in words what of the recipe it is cited for, as ["the loss dm"]."""

    key: str
    bibtex: str
    used_for: list[str]

    def __str__(self) -> str:
        return f"% {', '.join(self.used_for)}\n{self.bibtex}"


def citations(recipe: Recipe) -> list[Citation]:
    """Returns ddkit's own entry, then those of what the recipe uses, in the order in which it names them, each once.

    A paper that ddkit does not know has an entry of its arXiv number and the source that names it; so has the source of third parties that
    names no number.
    """
    own, *papers = ENTRIES.read_text(encoding="utf-8").strip().split("\n\n")
    known = {number[1]: entry for entry in papers if (number := re.search(r"eprint = \{(.*)\}", entry))}
    entries = {own: ["ddkit itself"]}
    for part, source, is_own in _sources(recipe):
        named = list(dict.fromkeys([*ARXIV.findall(source), *(each for each in known if each in source)]))
        found = [known.get(each) or _entry(f"arxiv-{each}", source, each) for each in named]
        if not (found or is_own):
            found = [_entry(part.removeprefix("the "), source)]
        for entry in found:
            entries.setdefault(entry, [])
            entries[entry] += [part] if part not in entries[entry] else []
    return [Citation(key=entry.partition("{")[2].partition(",")[0], bibtex=entry, used_for=parts) for entry, parts in entries.items()]


def _sources(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Yields what the recipe uses, in words, the source that it names, and whether it comes with ddkit."""
    own = {(plugin.kind, plugin.name) for plugin in registry.plugins() if plugin.first_party}
    if recipe.source:
        yield f"the recipe {recipe.name}", recipe.source, ("recipe", recipe.name) in own
    components = [each for each in named_components(recipe) if each[3].partition(".")[0] in PARTS]
    for kind, name, _, _ in components:
        plugin = registry.find(kind, registry.split_name(name)[0])
        text = " ".join((inspect.getdoc(registry.load_plugin(plugin)) or "").split())
        source = text.partition("Source: ")[2] or (text if ARXIV.search(text) else "")
        if source:
            yield f"the {kind} {plugin.name}", source, plugin.first_party
    for name, protocol in recipe.protocols.items():
        if protocol.source:
            yield f"the protocol {name}", protocol.source, ("protocol", name) in own


def _entry(key: str, source: str, number: str = "") -> str:
    """Returns the entry of a source that is known by its own words alone."""
    words = re.sub(r"([&%$#_])", r"\\\1", re.sub(r"[{}\\@]", "", " ".join(source.split())))
    fields = {"note": words} | ({"eprint": number, "archiveprefix": "arXiv", "url": f"https://arxiv.org/abs/{number}"} if number else {})
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    return f"@misc{{{re.sub(r'[^A-Za-z0-9.]+', '-', key)},\n{lines}}}"
