"""Code that a recipe names, such as `python:module.factory`: it runs where the user named it, never because a file did.

What is named on the command line, or handed over in Python, is the user's. A recipe file, a run directory and a teacher file are data,
whoever wrote them: code that they alone name is refused, unless everything is allowed (`--allow-code`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ddkit.errors import InputError

VARIABLE = "DDKIT_ALLOWED_CODE"  # a JSON list: how processes that a run starts know what the user named
EVERYTHING = "*"
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def named_by_user(*values: Any) -> None:
    """Lets code run that stands in `values` (texts, tables, lists of them), in this process and in those that it starts."""
    found = {name for text in _texts(values) for part in re.split(r"[,:=]", text) if NAME.fullmatch(name := part.strip(" '\""))}
    if found - _allowed():
        _allow(_allowed() | found)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


@contextmanager
def allowing(wanted: bool) -> Iterator[None]:
    """Inside, code that files name may run too, if that is wanted."""
    new = wanted and EVERYTHING not in _allowed()
    if new:
        _allow(_allowed() | {EVERYTHING})
    try:
        yield
    finally:
        if new:
            _allow(_allowed() - {EVERYTHING})


def check(kind: str, name: str, code: str) -> None:
    """Raises InputError where `code`, which the component `name` would run, was named by a file alone."""
    if code and not {code, EVERYTHING} & _allowed():
        raise InputError(
            f"The {kind} '{name}:{code}' runs Python code of that name, and a file asks for it (a recipe, a run or a teacher), not you. "
            f"If you trust it, say so with --allow-code (allow_code=True in Python), or name it yourself with --{kind} {name}:{code}."
        )


def _allow(names: set[str]) -> None:
    os.environ[VARIABLE] = json.dumps(sorted(names))


def _allowed() -> set[str]:
    try:
        found = json.loads(os.environ.get(VARIABLE) or "[]")
    except ValueError:
        return set()
    return {str(each) for each in found} if isinstance(found, list) else set()
