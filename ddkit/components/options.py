"""Options of plugins: typed fields of a component's class, bounded, and validated without running plugin code."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from ddkit.errors import InputError
from ddkit.text import is_text, printable, shown, suggestion

T = TypeVar("T", bound=msgspec.Struct)
V = TypeVar("V")
C = TypeVar("C")


class Field:
    """An option as its class declares it. Read from the class it is its default; instances have values of their own."""

    def __init__(self, default: Any, help: str, bounds: Mapping[str, Any], choices: Sequence[str] | None) -> None:
        self.default = default
        self.help = help
        self.bounds = bounds
        self.choices = choices

    def __get__(self, made: Any, owner: type) -> Any:
        return self.default


def option(
    default: V,
    help: str = "",
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    min_length: int | None = None,
) -> V:
    """Declares an option of a component: `power: float = ddkit.option(1.0, "exponent of the differences", ge=1)`.

    Its type is that of the annotation, and instances have its value as an attribute (`self.power`). `gt`, `ge`, `lt` and `le` are bounds of
    numbers, also inside tuples, lists and tables. `choices` are the possible words of a text, as with `Literal["a", "b"]`.
    `min_length` is for a text, list or table. If the class needs the name of an option for something else, write it with an underscore
    at its end: `labels_: str = ddkit.option("hard")` is the option `labels`, and `self.labels_`.

    Examples:
        >>> class Level(ddkit.Loss):
        ...     '''Squared distance of the mean pixel to a level.'''
        ...     level: float = ddkit.option(0.0, "in normalised units", ge=-3, le=3)
        ...     def __call__(self, step: ddkit.Step) -> torch.Tensor:
        ...         return (step.images.mean() - self.level).square()
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le, "min_length": min_length}
    field: Any = Field(default, help, {key: value for key, value in bounds.items() if value is not None}, choices)
    return field


def overriding(kind: type[msgspec.Struct], keys: Sequence[str], otherwise: str) -> Callable[[type[C]], type[C]]:
    """Decorates a component's class: each of the `keys` of `kind` that it does not declare becomes an option, None by default.

    Type, bounds and description are those of the key; `otherwise` ends the description and tells the meaning of None.

    Examples:
        >>> @ddkit.overriding(ddkit.nn.Schedule, ["epochs", "lr"], "if left out, as in the protocol")
        ... class Longest(ddkit.Evaluator):
        ...     '''The epochs that were asked for.'''
        >>> Longest(epochs=30).epochs, Longest().lr
        (30, None)
    """
    schemas = _schemas(kind)

    def declare(owner: type[C]) -> type[C]:
        for name in keys:
            if name not in vars(owner):
                owner.__annotations__[name] = fields(kind)[name].type | None
                help = "; ".join(filter(None, [_merged(schemas[name]).get("description", ""), otherwise]))
                setattr(owner, name, Field(None, help, {}, None))
        return owner

    return declare


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of the values of a component's options, as they are validated, resolved and recorded."""

    def __post_init__(self) -> None:
        check_fields(self)


def declared(kind: type) -> dict[str, tuple[type, Field]]:
    """Returns the options of a class, inherited ones first: attribute to (the class that declares it, its field)."""
    found: dict[str, tuple[type, Field]] = {}
    for owner in reversed(kind.__mro__):
        for name, value in vars(owner).items():
            if isinstance(value, Field):
                found[name] = (owner, value)
            else:
                found.pop(name, None)
    return found


def _options_type(kind: type) -> type[Options]:
    """Returns the struct of a component's options; built on first use, as importing a plugin should cost nothing."""
    made = []
    for attribute, (owner, field) in declared(kind).items():
        annotation = inspect.get_annotations(owner).get(attribute)
        if annotation is None:
            raise TypeError(f"the option {attribute} has no type. Write {attribute}: {type(field.default).__name__} = ddkit.option(...)")
        holder = types.SimpleNamespace(__annotations__={attribute: annotation})  # of the options alone: others may not lead anywhere
        hint = get_type_hints(holder, vars(sys.modules[owner.__module__]), dict(vars(owner)), include_extras=True)[attribute]
        length = {key: value for key, value in field.bounds.items() if key == "min_length"}
        numbers = {key: value for key, value in field.bounds.items() if key != "min_length"}
        meta = msgspec.Meta(description=field.help or None)
        default = field.default
        if isinstance(default, dict | list | set):
            default = msgspec.field(default_factory=partial(copy.deepcopy, default))
        made.append((attribute.removesuffix("_"), Annotated[_bounded(hint, numbers, length, field.choices), meta], default))
    found: Any = msgspec.defstruct("Options", made, bases=(Options,), module=kind.__module__, kw_only=True)
    return found


options_type: Callable[[Any], type[Options]] = cache(_options_type)


def _bounded(hint: Any, numbers: Mapping[str, Any], length: Mapping[str, Any], choices: Sequence[str] | None) -> Any:
    """Returns a type with bounds on its numbers, on the length of the whole, and with `choices` in the place of any text."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return Union[tuple(_bounded(part, numbers, length, choices) for part in parts)]  # noqa: UP007
    if hint in (int, float):
        return Annotated[hint, msgspec.Meta(**numbers)] if numbers else hint
    if hint is str and choices:
        return Literal[tuple(choices)]
    if isinstance(origin, type) and issubclass(origin, tuple | list | Mapping):
        within = tuple(part if part is ... else _bounded(part, numbers, {}, choices) for part in parts)
        hint = cast(Any, origin)[within]
    elif hint is not str or not length:
        return hint
    return Annotated[hint, msgspec.Meta(**length)] if length else hint


def Option(description: str = "", **bounds: Any) -> msgspec.Meta:
    """Returns the annotation of a key of one of ddkit's own tables: `lr: Annotated[float, Option("learning rate", gt=0)] = 1.0`.

    `bounds` are those of ddkit.option, but for `choices`.
    """
    return msgspec.Meta(description=description or None, **bounds)


Count = Annotated[int, Option(ge=1)]


class Parameter(msgspec.Struct, frozen=True):
    """An extra parameter of the synthetic set, declared by a loss in its `requires`.

    It is optimised with the images, projected, checkpointed and written to the artifact. `per` is "sample" (one value
    of `shape` per row) or "set" (one for the whole set). After each update `constraint` "nonnegative" clamps it at 0, and "simplex" makes
    its last dimension the nearest probabilities. `lr` is that of its Adam optimizer, unless the recipe has a table `[optimizer.NAME]`.
    With `direction` "max" its updates increase the weighted sum of the losses, while those of the images decrease it.

    Examples:
        >>> requires = ddkit.Requires(parameters={"multipliers": ddkit.Parameter(init=0.5, constraint="nonnegative")})
        >>> requires.parameters["multipliers"].per
        'sample'
    """

    shape: tuple[Count, ...] = ()
    per: Literal["sample", "set"] = "sample"
    init: float = 1.0
    constraint: Literal["nonnegative", "simplex"] | None = None
    lr: Annotated[float, Option(ge=0)] = 0.1
    direction: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.constraint == "simplex" and not self.shape:
            raise ValueError("Parameter: constraint='simplex' needs a last dimension, but shape is ()")


class Requires(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs that a component needs from a run, read before it starts; by default none.

    `parameters` are those that a loss adds to the set, or those that an evaluator needs of the set.
    `second_order` makes the parameters of network and teacher require gradients, for a loss that differentiates through their gradients.
    `reduce` declares how the value of the whole set follows from parts of it, each with some classes: "sum" (the sum of the parts'
    values), "mean" (the mean weighted by rows), "global" (every part computes the value of the whole set, from sums over samples
    in step.all_reduce or rows in step.all_gather; in chunks it is evaluated twice) or None
    (the loss always needs the whole set: it is never chunked, and refused in a run of several processes).

    Examples:
        >>> class Mean(ddkit.Loss):
        ...     '''Squared difference of the mean images, real to synthetic.'''
        ...     requires = ddkit.Requires(real=True)
        ...     def __call__(self, step: ddkit.Step) -> torch.Tensor:
        ...         return (step.images.mean(0) - step.real.images.mean(0)).square().sum()
    """

    real: bool = False
    network: bool = False
    teacher: bool = False
    experts: bool = False
    second_order: bool = False
    views: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = {}
    reduce: Literal["sum", "mean", "global"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reduce == "global" and any(spec.per == "set" for spec in self.parameters.values()):
            raise ValueError(
                "Requires: a loss with reduce='global' cannot have a Parameter(per='set'), because its gradient would be counted twice"
            )
        if self.views and not self.teacher:
            raise ValueError("Requires: views need teacher=True as well")


@cache
def fields(kind: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """Returns the fields of a kind of table or options, by their names there; kept, as msgspec evaluates all annotations at each call."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def check_fields(made: msgspec.Struct) -> None:
    """Raises ValueError where a field that Python code gave is not what its annotation says: msgspec itself checks only what it decodes."""
    kind = type(made)
    for name, field in fields(kind).items():
        value = getattr(made, name)
        try:
            msgspec.convert(value, field.type)
            _check_leaf(name, value)
        except (msgspec.ValidationError, InputError) as error:
            choices = literal_choices(kind, name)
            hint = f" {suggestion(str(value), choices)}" if choices else ""
            raise ValueError(f"{kind.__name__}({name}={shown(value)}): {str(error).rstrip('.')}.{hint}") from None


def parse_struct(kind: type[T], table: Mapping[str, Any], where: str, also: Collection[str] = (), *, whole: str = "the recipe") -> T:
    """Returns `table` as a `kind`, or raises InputError naming `where`, the key, and what would be right.

    `also` are keys that the same table of the recipe may hold, to suggest from. `whole` is what a table is called that is in no other;
    advice has the flag --set only for values of the recipe.
    """
    known = fields(kind)
    for key in table:
        if key not in known:
            at = f"{where}.{key}" if where else key
            raise InputError(f"{where or whole} has no key '{key}'. {suggestion(key, {*known, *also})}", at)
    for path, value in _leaves(table, where):
        _check_leaf(path, value)
    try:
        return msgspec.convert(dict(table), kind)
    except msgspec.ValidationError as error:
        raise _explained(error, kind, where, table, flag=whole == "the recipe") from None


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value


def _check_leaf(path: str, value: Any) -> None:
    """Raises InputError for what TOML cannot write: numbers that are not finite or longer than 64 bits, half characters."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path} is {value}, but it must be a finite number.", path)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{path} is a number of more than 64 bits. Use a smaller one.", path)
    for text in (path, value):
        if isinstance(text, str) and not is_text(text):
            raise InputError(f"{printable(path)} holds bytes that are not UTF-8 text ({shown(text)}).", path)


def _explained(
    error: msgspec.ValidationError, kind: type[msgspec.Struct], where: str, table: Mapping[str, Any], *, flag: bool = True
) -> InputError:
    text, _, place = str(error).replace(" - at `key` in `$", " as a key - at `$").partition(" - at `$")
    keys = re.sub(r"\[\.\.\.\]|\[\d+\]", "", place.rstrip("`")).strip(".")
    path = ".".join(part for part in (where, keys) if part)
    value: Any = table
    for key in filter(None, keys.split(".")):
        value = value.get(key) if isinstance(value, Mapping) else None
    text = text[:1].lower() + text[1:]
    choices = literal_choices(kind, keys)
    word = value if isinstance(value, str) else shown(value)
    hint = f" {suggestion(word, choices)}" if choices else ""
    if isinstance(value, str) and choices and text.startswith("expected `array`"):
        hint = f" Write a list: {json.dumps([value])}." if value in choices else f"{hint} Write a list."
    elif text.startswith("expected `array"):
        listed = value if isinstance(value, str) and re.fullmatch(r"[\d., -]+", value) else "..."
        hint = f" Write a list in brackets: --set '{path}=[{listed}]'." if flag else f" Write a list in brackets: {path} = [{listed}]."
    if any(isinstance(part, msgspec.inspect.IntType | msgspec.inspect.FloatType) for part in _alternatives(kind, keys)):
        hint = hint.replace("Choose from:", "Use a number, or one of:")
    return InputError(f"{path} = {shown(value)} is not possible: {text.replace('`', '')}.{hint}", path)


def literal_choices(kind: type[msgspec.Struct], name: str) -> tuple[str, ...]:
    """Returns the words that field `name` of `kind` may take, as TOML writes them, () if it is not a choice among words."""
    kinds = _alternatives(kind, name)
    words = [str(word) for part in kinds if isinstance(part, msgspec.inspect.LiteralType) for word in part.values]
    truths = ["true", "false"] if words and any(isinstance(part, msgspec.inspect.BoolType) for part in kinds) else []
    return (*words, *truths)


def _alternatives(kind: type[msgspec.Struct], name: str) -> list[msgspec.inspect.Type]:
    """Returns the types that field `name` of `kind` may have, those of a union one by one, those of a list for its items."""

    def unfolded(each: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
        if isinstance(each, msgspec.inspect.Metadata):
            return unfolded(each.type)
        if isinstance(each, msgspec.inspect.VarTupleType | msgspec.inspect.ListType):
            return unfolded(each.item_type)
        return [part for other in each.types for part in unfolded(other)] if isinstance(each, msgspec.inspect.UnionType) else [each]

    types = {field.encode_name: field.type for field in msgspec.inspect.type_info(kind).fields}  # type: ignore[attr-defined]
    return unfolded(types[name]) if name in types else []


def takes(kind: type[msgspec.Struct], name: str, table: type[msgspec.Struct]) -> bool:
    """Whether field `name` of `kind` may be a `table`."""
    return any(isinstance(part, msgspec.inspect.StructType) and part.cls is table for part in _alternatives(kind, name))


def parse_options(kind: type[T], table: Mapping[str, Any], where: str, plugin: str, also: Collection[str] = (), *, flag: str = "") -> T:
    """Returns a plugin's options; errors name the plugin as well as the recipe path. `also`: as in parse_struct.

    `flag` is what `ddkit info` needs to find the plugin: "--plugin FILE ", "" for an installed one.
    """
    try:
        return parse_struct(kind, table, where, also)
    except InputError as error:
        raise InputError(f"{plugin}: {error} (`ddkit info {flag}{plugin}` shows the options of {plugin}.)", error.path) from None


def written_options(options: msgspec.Struct) -> dict[str, Any]:
    """Returns options as a recipe writes them: plain values, those that are None left out."""
    return {key: value for key, value in msgspec.to_builtins(options).items() if value is not None}


_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}", "maximum": "<= {}"}


def describe_options(component: type) -> list[dict[str, Any]]:
    """Returns name, type, default, bounds and description of every option of a component's class, in order of declaration."""
    kind = options_type(component)
    described = []
    for name, schema in _schemas(kind).items():
        merged, field = _merged(schema), fields(kind)[name]
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        described.append(
            {
                "name": name,
                "type": " | ".join(
                    str(word)
                    for part in schema.get("anyOf", [schema])
                    for word in part.get("enum") or [part.get("type", "table" if "$ref" in part else "any")]
                ),
                "default": list(default) if isinstance(default, tuple) else default,
                "bounds": ", ".join(text.format(merged[key]) for key, text in _BOUNDS.items() if key in merged),
                "description": merged.get("description", ""),
            }
        )
    return described


def _schemas(kind: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """Returns the JSON schema of each field of `kind`."""
    found: dict[str, dict[str, Any]] = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    return found


def _merged(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the alternatives of a field's schema say, and what it says itself, which wins."""
    return {key: value for part in schema.get("anyOf", [schema]) for key, value in part.items()} | dict(schema)
