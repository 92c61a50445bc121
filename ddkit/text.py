"""Names, numbers and values as messages show them."""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def doubles(values: Iterable[Any]) -> list[Any]:
    """Returns the values that are there more than once, each once, in order."""
    return [value for value, count in Counter(values).items() if count > 1]


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Returns "Did you mean 'x'?" where one of `choices` is near `name`, else the choices; that there is none to choose from, if so."""
    known = sorted(filter(None, choices))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Choose from: {', '.join(known)}." if known else "None is available."


def counted(number: int, noun: str) -> str:
    """Returns "1 epoch", "2 epochs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def few(names: Sequence[str], most: int = 5) -> str:
    """Returns the first `most` names, and how many more there are.

    Examples:
        >>> ddkit.data.few(["cat", "dog", "owl"], most=2)
        'cat, dog and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    r"""Returns `text` with what acts on a terminal, hides, or cannot be written as JSON's escapes: control characters, direction marks.

    >>> printable("cat\x1b[31m"), printable("chat é")
    ('cat\\u001b[31m', 'chat é')
    """

    def shown(char: re.Match[str]) -> str:
        hides = unicodedata.category(char[0]) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return json.dumps(char[0])[1:-1] if hides else char[0]

    return re.sub(r"[^ -~\n\t]", shown, text)


def is_text(text: str) -> bool:
    """Whether `text` can be written as UTF-8: a file name of other bytes has half characters in it."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def shown(value: object, most: int = 80) -> str:
    """Returns repr(value) for a message, cut to `most` characters; a number too long to be written says so."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"<a {type(value).__name__} too long to be shown>"
    return text if len(text) <= most else f"{text[: most - 5]} ..."
