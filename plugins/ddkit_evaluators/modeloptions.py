"""Which options of a list of models belong to which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ddkit


def split_options(names: Sequence[str], options: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Returns the options of each model by its name.

    A table under a model's name holds options of that model alone, and wins; any other option goes to the models that have it.
    Raises InputError for an option that none of several models has (of one model it is passed on, and refused there), and for a
    table of a model that is not in the list. `where` is the recipe path, for messages.
    """
    own = {name: options[name] for name in names if isinstance(options.get(name), Mapping)}
    shared = {key: value for key, value in options.items() if key not in own}
    if len(names) == 1:
        return {names[0]: {**shared, **own.get(names[0], {})}}
    known = {name: _fields(name) for name in names}
    for key, value in shared.items():
        if not any(key in fields for fields in known.values()):
            raise ddkit.InputError(f"{where}.{key}: {_problem(key, value, known)}", f"{where}.{key}")
    return {name: {key: value for key, value in shared.items() if key in known[name]} | dict(own.get(name, {})) for name in names}


def _fields(name: str) -> set[str]:
    return set(ddkit.create("model", name).options.__struct_fields__)


def _problem(key: str, value: Any, known: Mapping[str, set[str]]) -> str:
    if isinstance(value, Mapping):
        return f"the models of this evaluation are {', '.join(known)}. Name one of them, or take the table out."
    have = "; ".join(f"{name} has {', '.join(sorted(fields)) or 'none'}" for name, fields in known.items())
    return f"none of the models {', '.join(known)} has that option: {have}."
