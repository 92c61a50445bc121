"""The JSON schema of a recipe file, with the options of ddkit's own components, for editors and other programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from ddkit.components import registry
from ddkit.components.options import options_type
from ddkit.recipes.resolve import CHOOSING_KEYS
from ddkit.recipes.tables import NAMED_TABLES, SHORTHAND, TABLES, PluginTable, Recipe, RuleTable, own_keys

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
CHOSEN = {
    "data": "dataset", "teacher": "model", "train": "augmenter", "network": "model", "initializer": "initializer", "augmenter": "augmenter",
    "views": "augmenter", "losses": "loss", "evaluators": "evaluator",
}  # fmt: skip
NAMED_BY_LABEL = ("losses", "evaluators")  # whose entry is called as its component, unless it says `use`


def recipe_schema() -> Schema:
    """Returns the JSON schema (draft 2020-12) of a recipe file, read as TOML.

    Keys, types, bounds and words are those of the recipe's tables; a table that chooses a component of ddkit's own takes that
    component's options and no other key. What other distributions bring is taken with any options. What depends on more than
    one table, or on the data, is for `ddkit distill --plan` to tell.
    """
    structs, definitions = msgspec.json.schema_components([Recipe, RuleTable], ref_template="#/$defs/{name}")
    keys = definitions["Recipe"]["properties"]
    for table, kind in CHOSEN.items():
        struct = {**TABLES, **NAMED_TABLES}[table]
        definitions |= _options(kind)
        definitions[struct.__name__] = _with_options(definitions[struct.__name__], struct, table, _own(kind))
    for table in NAMED_BY_LABEL:
        keys[table] |= {"properties": {name: _labelled(table, name) for name in _own(CHOSEN[table])}}
    for table, key in SHORTHAND.items():
        keys[table] = {"anyOf": [{"type": "string", "description": f"short for {table}.{key}"}, keys[table]]}
    keys["rules"] = {"type": "array", "items": structs[1], "description": "settings that depend on ipc and pipc"}
    definitions["RuleTable"]["properties"]["when"]["propertyNames"] = {"enum": _conditions()}
    whole = {"$schema": DIALECT, "title": "A recipe of ddkit", **structs[0], "$defs": definitions}
    found: Schema = msgspec.json.decode(msgspec.json.encode(whole))
    return found


def _conditions() -> list[str]:
    """Returns the keys of a rule's `when`, which msgspec's schema leaves out."""
    (when,) = (field.type for field in msgspec.structs.fields(RuleTable) if field.name == "when")
    return list(get_args(get_args(when)[0]))


def _own(kind: str) -> list[str]:
    return [p.name for p in registry.plugins() if p.kind == kind and p.first_party]


def _defined(kind: str, name: str) -> str:
    return f"options of the {kind} {name}"


def _reference(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name.replace(' ', '%20')}"}


def _options(kind: str) -> Schema:
    """Returns, by name of definition, the options of every component of ddkit's own of a kind, and of what they are made of."""
    found: Schema = {}
    for name in _own(kind):
        options = options_type(registry.load(kind, f"ddkit/{name}"))
        prefix = _defined(kind, name)
        template = f"#/$defs/{prefix}, {{name}}".replace(" ", "%20")
        _, parts = msgspec.json.schema_components([options], ref_template=template)
        found[prefix] = {"properties": parts.pop(options.__name__)["properties"]}
        found |= {f"{prefix}, {part}": schema for part, schema in parts.items()}
    return found


def _with_options(schema: Schema, struct: type[Any], table: str, names: Sequence[str]) -> Schema:
    """Returns the schema of a table that chooses a component: the options of the chosen one stand beside its own keys."""
    key, kind, own = CHOOSING_KEYS[table], CHOSEN[table], sorted(own_keys(struct))
    default = None if table in NAMED_BY_LABEL else getattr(struct(), key, None)
    properties = {name: value for name, value in schema["properties"].items() if name != "options"}
    cases = [_case(key, kind, name, own, by_default=name == default) for name in names]
    return {**{k: v for k, v in schema.items() if k != "additionalProperties"}, "properties": properties, "allOf": cases}


def _case(key: str, kind: str, name: str, own: Sequence[str], *, by_default: bool) -> Schema:
    """Returns what holds where `key` names a component, or where it is left out and the component is the default."""
    chosen: Schema = {"properties": {key: {"pattern": f"^(ddkit/)?{name}(:|$)"}}}
    return {"if": chosen if by_default else {**chosen, "required": [key]}, "then": _taking(kind, name, own)}


def _taking(kind: str, name: str, own: Sequence[str]) -> Schema:
    """Returns a schema of tables whose keys are ddkit's `own` or options of a component."""
    options = msgspec.structs.fields(options_type(registry.load(kind, f"ddkit/{name}")))
    return {**_reference(_defined(kind, name)), "propertyNames": {"enum": [*own, *(field.encode_name for field in options)]}}


def _labelled(table: str, name: str) -> Schema:
    """Returns the schema of an entry that is called as a component: it means that one, unless it says `use`."""
    struct = NAMED_TABLES[table]
    assert issubclass(struct, PluginTable)
    own = _taking(CHOSEN[table], name, sorted(own_keys(struct)))
    return {"allOf": [_reference(struct.__name__), {"if": {"not": {"required": ["use"]}}, "then": own}]}
