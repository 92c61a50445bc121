"""Code that a value names, such as `python:module.factory`: it runs if the user gave that value, never because a file holds it.

What a flag, `--set` or an argument in Python carries is a grant: a recipe path and the text that stands there. A recipe or study file, a
run, a teacher and a set are data, whoever wrote them. Grants hold inside one call, in its own thread, and are handed to processes that
it starts; nothing of them is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ddkit.errors import InputError

DEEPEST = 32  # levels of tables and lists in what is given, as in a recipe


class Granted(NamedTuple):
    """What the user gave: `values` are (recipe path, text), lists with commas also word by word; `everything`: whether any code may run."""

    values: frozenset[tuple[str, str]] = frozenset()
    everything: bool = False


NOTHING = Granted()
_granted: ContextVar[Granted] = ContextVar("granted", default=NOTHING)


def granted() -> Granted:
    """Returns what may run here."""
    return _granted.get()


@contextmanager
def granting(*given: Mapping[str, Any] | None, everything: bool = False) -> Iterator[None]:
    """Inside, code runs that `given` names: tables from recipe paths to values, as the user gave them; or any code, if `everything` may."""
    before = granted()
    values = {pair for table in given if table is not None for pair in _texts(table, "", DEEPEST)}
    token = _granted.set(Granted(before.values | values, before.everything or everything))
    try:
        yield
    finally:
        _granted.reset(token)


def grant_process(what: Granted) -> None:
    """Lets run what another process, which started this one, handed over: for as long as this one lasts."""
    _granted.set(what)


def _texts(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield from ((path, part.strip()) for part in (value, *value.split(",")))
    elif isinstance(value, Mapping) and depth:
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key), depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for item in value:
            yield from _texts(item, path, depth - 1)


def check(kind: str, name: str, code: str, options: Collection[str]) -> None:
    """Raises InputError if the user gave neither `name:code` nor `code` at one of `options`, the recipe paths that can hold it."""
    values, everything = granted()
    if everything or not code or any(text == f"{name}:{code}" or (text == code and path in options) for path, text in values):
        return
    raise InputError(
        f"The {kind} '{name}:{code}' runs Python code, and only a file (a recipe, a run or a teacher) names it, not your command. "
        f"If you trust this code, add --allow-code (allow_code=True in Python), or, to `ddkit distill`, --{kind} {name}:{code}."
    )
