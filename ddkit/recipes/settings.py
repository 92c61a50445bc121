"""Settings by path, PATH=VALUE as `--set` has them, and how they go into the tables of a recipe."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from ddkit.components.options import fields
from ddkit.errors import FlagError, InputError
from ddkit.recipes.tables import CHOOSING, NAMED_TABLES, SHORTHAND, TABLES, Recipe, check_depth, instead_of_decode, own_keys
from ddkit.text import suggestion

Raw = dict[str, Any]


def flattened(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns (path, value) of every value in nested tables, in order."""
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        path = f"{prefix}.{key}" if prefix else key
        pairs += flattened(value, path) if isinstance(value, Mapping) and value else [(path, value)]
    return pairs


def parse_set(text: str) -> tuple[str, Any]:
    """Returns (path, value) of a `--set PATH=VALUE`; VALUE is TOML, else a string."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise FlagError(f"--set {text}: write PATH=VALUE, for example --set losses.dm.weight=0.01")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return path.strip(), value
    except (ValueError, RecursionError) as error:
        raise FlagError(f"--set {path.strip()}: the value cannot be read: {error}.") from None
    return path.strip(), parsed["value"] if set(parsed) == {"value"} else value


def assign_all(raw: Raw, pairs: Iterable[tuple[str, Any]]) -> None:
    """Assigns (path, value) pairs in order, those that choose a component before those that set its options."""
    for path, value in sorted(pairs, key=lambda pair: not _chooses(pair[0].split("."))):
        assign(raw, path, value)


def _chooses(keys: list[str]) -> bool:
    """Whether `keys` name a component: a whole table, its choosing key, or that of a named table (`views.NAME.augmenter`)."""
    names = keys[1:] if keys[0] not in NAMED_TABLES else keys[2:]
    return keys[0] in CHOOSING and names in ([], [CHOOSING[keys[0]][0]])


def assign(raw: Raw, path: str, value: Any) -> None:
    """Sets `path` of raw recipe data. Naming another component drops the options of the one before."""
    keys = path.split(".")
    _check_path(raw, keys, path, value)
    top = keys[0]
    if len(keys) == 1 and top in SHORTHAND and isinstance(value, str):
        keys, path = [top, SHORTHAND[top]], f"{top}.{SHORTHAND[top]}"
    table = raw
    for key in keys[:-1]:
        if isinstance(table.get(key), str) and key in SHORTHAND:
            table[key] = {SHORTHAND[key]: table[key]}
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise InputError(f"{path} cannot be set: {key} is not a table in this recipe.", path)
    named = top in NAMED_TABLES
    if len(keys) == 2 + named and _chooses(keys) and table.get(keys[-1], keys[-2]) != value:
        for key in table.keys() - _lasting(top):
            del table[key]
    if isinstance(value, Mapping):
        check_depth(value, path)
    table[keys[-1]] = _copied(value)


def _copied(value: Any) -> Any:
    """Returns the value with tables of its own, into which later paths may write."""
    return {key: _copied(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def _lasting(top: str) -> set[str]:
    """Returns the keys of the tables `top` that stay where another component is chosen: those that are no options of the one before."""
    return own_keys((NAMED_TABLES | TABLES)[top]) - {"compose"}


def superseded(path: str, value: Any, others: Mapping[str, Any]) -> list[str]:
    """Returns those paths of `others` that end where `path` becomes `value`: those of a whole table, or options of another component.

    >>> superseded("parametrization.use", "pixels", {"parametrization.use": "grid", "parametrization.factor": 2, "network.width": 8})
    ['parametrization.use', 'parametrization.factor']
    """
    keys = path.split(".")
    if not _chooses(keys) or others.get(path) == value:
        return []
    named = keys[0] in NAMED_TABLES
    whole = len(keys) == 1 + named and not isinstance(value, str)
    table = ".".join(keys[: 1 + named])
    kept = set() if whole else _lasting(keys[0]) - {CHOOSING[keys[0]][0]}
    below = {other: other.removeprefix(f"{table}.").split(".")[0] for other in others if f"{other}.".startswith(f"{table}.")}
    return [other for other, key in below.items() if key not in kept]


def _check_path(raw: Raw, keys: list[str], path: str, value: Any) -> None:
    known = fields(Recipe)
    if keys[0] == "decode":
        raise InputError(f"The key 'decode' ({path}) is no longer supported. {instead_of_decode(value)}", path)
    if keys[0] not in known:
        raise InputError(f"The recipe has no key '{keys[0]}' ({path}). {suggestion(keys[0], known)}", path)
    chosen = raw.get("losses", {})
    if keys[0] == "losses" and len(keys) > 1 and isinstance(chosen, Mapping) and keys[1] not in chosen:
        raise InputError(f"{path}: this run has no loss '{keys[1]}'. {suggestion(keys[1], chosen)}", path)
    if len(keys) > 1 and keys[0] not in TABLES and keys[0] not in NAMED_TABLES:
        raise InputError(f"{path} cannot be set: {keys[0]} is a value, not a table.", path)
