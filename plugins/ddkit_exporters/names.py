"""Class names as names of folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

LONGEST = 200  # bytes of a folder's name; file systems take 255
WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
SPLITS = re.compile(r"(?<![^-._ 0-9])(?=(?:train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?![^-._ 0-9]))")


def folder_names(names: Sequence[str]) -> list[str]:
    """Returns a folder name for each class name, all different, also where capitals are not told apart.

    Letters, digits, "-", "_", "." and spaces stay; anything else is %XX, its bytes in UTF-8. So are a first or last dot or
    space, and the first letter of what Windows keeps for itself and of what Hugging Face takes for the name of a split.
    """
    found: list[str] = []
    taken: set[str] = set()
    for label, name in enumerate(names):
        folder = _escaped(name)
        if folder.casefold() in taken:
            folder = f"{folder}~{label}"
        taken.add(folder.casefold())
        found.append(folder)
    return found


def _escaped(name: str) -> str:
    text = "".join(char if char.isalnum() or char in "-_. " else _percent(char) for char in name)
    if text[:1] in (".", " ") or WINDOWS.fullmatch(text):
        text = _percent(text[0]) + text[1:]
    if text[-1:] in (".", " "):
        text = text[:-1] + _percent(text[-1])
    while match := SPLITS.search(text):
        text = text[: match.start()] + _percent(text[match.start()]) + text[match.start() + 1 :]
    if len(text.encode()) > LONGEST:
        cut = text.encode()[: LONGEST - 9].decode(errors="ignore")
        text = f"{cut}~{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return text or "%"


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogatepass"))
