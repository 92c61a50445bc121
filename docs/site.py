"""Hooks of mkdocs: the order of the pages is that of the links of each index.md, and links may leave docs/.

CONTRIBUTING.md and CHANGELOG.md are pages of the site too. A link to another file of the repository becomes its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ALSO = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def _pages(folder: str) -> list[Any]:
    """Returns the index of a folder and the pages that it links, those of a folder below as a section."""
    found: list[Any] = [f"{folder}index.md"]
    text = (DOCS / folder / "index.md").read_text(encoding="utf-8")
    for path in dict.fromkeys(match[3] for match in LINK.finditer(text)):
        if path.endswith("/index.md") and not path.startswith("."):
            below = path.removesuffix("index.md")
            found.append({below.strip("/").capitalize(): _pages(folder + below)})
        elif path.endswith(".md") and "/" not in path:
            found.append(folder + path)
    return found


def on_config(config: Any) -> None:
    config.nav = [{title: _pages(at) if str(at).endswith("/") else at for title, at in entry.items()} for entry in config.nav]


def on_files(files: Any, config: Any) -> None:
    for name in ALSO:
        files.append(File.generated(config, name, abs_src_path=str(DOCS.parent / name)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri if page.file.src_uri in ALSO else f"docs/{page.file.src_uri}"

    def link(match: re.Match[str]) -> str:
        picture, text, path, anchor = match.groups(default="")
        target = os.path.normpath(os.path.join(os.path.dirname(here), path))
        if ":" in path or (target.startswith("docs/") and here.startswith("docs/")):
            return match[0]
        if target.endswith(".py") or not (target.startswith("docs/") or target in ALSO):
            return text
        to = os.path.relpath(target.removeprefix("docs/"), os.path.dirname(page.file.src_uri) or ".")
        return f"{picture}[{text}]({to}{anchor})"

    return LINK.sub(link, markdown)
