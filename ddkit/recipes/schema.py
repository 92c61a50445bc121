"""The JSON schemas of recipe and protocol files, a recipe's with the options of ddkit's own components, for editors and programs."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from ddkit.components import registry
from ddkit.components.options import options_type
from ddkit.recipes.protocols import ProtocolFile
from ddkit.recipes.tables import CHOOSING, NAMED_BY_LABEL, NAMED_TABLES, SHORTHAND, TABLES, Recipe, RuleTable, own_keys

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> Schema:
    """Returns the JSON schema (draft 2020-12) of a recipe file, read as TOML.

    Keys, types, bounds and words are those of the recipe's tables; a table that chooses a component of ddkit's own takes that
    component's options and no other key. What other distributions bring is taken with any options. What depends on more than
    one table, or on the data, is for `ddkit distill --plan` to tell.
    """
    structs, definitions = msgspec.json.schema_components([Recipe, RuleTable], ref_template="#/$defs/{name}")
    keys = definitions["Recipe"]["properties"]
    for table, struct in {**TABLES, **NAMED_TABLES}.items():
        if table in CHOOSING:
            entries = _choose(definitions, table, struct)
            if table in NAMED_BY_LABEL:
                keys[table]["properties"] = entries
    for table, key in SHORTHAND.items():
        keys[table] = {"anyOf": [{"type": "string", "description": f"short for {table}.{key}"}, keys[table]]}
    keys["rules"] = {"type": "array", "items": structs[1], "description": "settings for some values of ipc and pipc"}
    (when,) = (field.type for field in msgspec.structs.fields(RuleTable) if field.name == "when")
    conditions = list(get_args(get_args(when)[0]))  # which msgspec's schema leaves out
    definitions["RuleTable"]["properties"]["when"]["propertyNames"] = {"enum": conditions}
    whole = {"$schema": DIALECT, "title": "A recipe of ddkit", **structs[0], "$defs": definitions}
    found: Schema = msgspec.json.decode(msgspec.json.encode(whole))
    return found


def protocol_schema() -> Schema:
    """Returns the JSON schema (draft 2020-12) of a protocol file, read as TOML."""
    found: Schema = msgspec.json.schema(ProtocolFile)
    return {"$schema": DIALECT, "title": "A protocol of ddkit", **found}


def _choose(definitions: Schema, table: str, struct: type[Any]) -> Schema:
    """Lets `definitions` say of a table that chooses a component: the options of the chosen one stand beside its own keys.

    Returns, by name of a component of ddkit's own, the schema of an entry that is called so, and means it unless it says `use`.
    """
    key, kind = CHOOSING[table]
    own, entries, cases = sorted(own_keys(struct)), {}, []
    default = None if table in NAMED_BY_LABEL else getattr(struct(), key, None)
    for name in [p.name for p in registry.plugins() if p.kind == kind and p.first_party]:
        options = options_type(registry.load(kind, f"ddkit/{name}"))
        title = f"options of the {kind} {name}"
        reference = f"#/$defs/{title}".replace(" ", "%20")
        _, parts = msgspec.json.schema_components([options], ref_template=f"{reference},%20{{name}}")
        definitions[title] = {"properties": parts.pop(options.__name__)["properties"]}
        definitions |= {f"{title}, {part}": schema for part, schema in parts.items()}
        known = [*own, *(field.encode_name for field in msgspec.structs.fields(options))]
        taking = {"$ref": reference, "propertyNames": {"enum": known}}
        chosen: Schema = {"properties": {key: {"pattern": f"^(ddkit/)?{name}(:|$)"}}}
        cases.append({"if": chosen if name == default else {**chosen, "required": [key]}, "then": taking})
        unless = {"if": {"not": {"required": ["use"]}}, "then": taking}
        entries[name] = {"allOf": [{"$ref": f"#/$defs/{struct.__name__}"}, unless]}
    schema = definitions[struct.__name__]
    schema.pop("additionalProperties", None)
    schema["properties"].pop("options")
    schema["allOf"] = cases
    return entries
