"""The one place where a recipe is put together and validated: files and names, rules, --set, flags, and which of them wins.

Names and ddkit's own keys are checked first, and without torch; then the options of the components that the recipe names, whose
classes are imported for that. What depends on the data is left to ddkit.run.setup.
"""

from __future__ import annotations

import copy
import math
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ddkit.components import registry, trust
from ddkit.components.base import Component
from ddkit.components.options import fields, options_type, parse_struct, takes
from ddkit.components.plugin_file import hyphenated
from ddkit.errors import FlagError, InputError, PluginError, refuse_unused
from ddkit.files import MOST_TOML, read_text, with_home
from ddkit.recipes.protocols import Protocol
from ddkit.recipes.settings import Raw, assign_all, flattened
from ddkit.recipes.tables import (
    CHOOSING,
    INNER,
    NAMED_BY_LABEL,
    NAMED_TABLES,
    EvaluatorTable,
    Recipe,
    RuleTable,
    check_depth,
    parse_recipe,
)
from ddkit.text import shown, suggestion

FLAGS = {  # what a flag of the command line sets in the recipe, where it is not called alike
    "dataset": "data.use",
    "data_dir": "data.dir",
    "teacher": "teacher.use",
    "init": "initializer.use",
    "augment": "augmenter.use",
    "deterministic": "engine.deterministic",
}


def read_recipe(name: str, kind: str = "recipe") -> Raw:
    """Returns the TOML data of an installed recipe (study, protocol), or of a file; raises InputError with the nearest name."""
    if _is_file(name):
        return parse_toml(Path(with_home(name)), kind)
    known = {p.name: p for p in reversed(registry.plugins()) if p.kind == kind}
    if name not in known:
        hint = f"There is no {kind} '{name}'. {suggestion(name, known)}"
        raise InputError(f"{hint} For a file, write its path: ./{name or 'FILE'}.toml")
    return parse_toml(Path(known[name].value), kind)


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith(".toml")


def read_protocol(name: str, known: Mapping[str, Protocol] | None = None) -> Protocol:
    """Returns a protocol: from a file, from the tables `known` of a recipe, or an installed one, in this order.

    If a file or table changes values of an installed protocol of its name, `usual` has the installed values. Raises InputError
    for an unknown name, with the nearest one, and for a file that is missing or has errors.

    Examples:
        >>> ddkit.nn.read_protocol("short").epochs, ddkit.nn.read_protocol("dm-official").epochs
        (300, 1000)
    """
    known, short = known or {}, Path(name).stem if _is_file(name) else name
    installed = any(p.kind == "protocol" and p.name == short for p in registry.plugins())
    usual = Protocol.of_file(read_recipe(short, "protocol"), short) if installed else known.get(short)
    if short in known and not _is_file(name):
        return known[short].called(short, usual)
    return Protocol.of_file(read_recipe(name, "protocol"), name).called(short, usual)


def parse_toml(path: Path, kind: str = "recipe") -> Raw:
    """Returns the TOML data of a file; raises InputError naming the file and line."""
    try:
        found = tomllib.loads(read_text(path, most=MOST_TOML).removeprefix("\ufeff"))  # with which some editors begin a file
    except FileNotFoundError:
        raise InputError(f"The {kind} file {path} does not exist.") from None
    except OSError as error:
        raise InputError(f"The {kind} file {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"The {kind} file {path} cannot be read as TOML: {error}.") from None
    check_depth(found, f"The {kind} file {path}")
    return found


class Part(NamedTuple):
    """What of a recipe a command uses: tables and values, those values of them that it does not use, and why, for the errors."""

    used: Collection[str]
    unused: Collection[str]
    why: str


def resolve(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    losses: str | Sequence[str] | None = None,
    evaluators: str | Sequence[str] | None = None,
    model: str | None = None,
    sets: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
    part: Part | None = None,
    fallback: str | None = None,
    **flags: Any,
) -> Recipe:
    """Returns the recipe that flags describe: flags > sets > recipe (its rules over its tables) > defaults of the plugins.

    `sets` are recipe paths and values: ("losses.dm.weight", 0.01). `losses` and `evaluators` select as on the command line; a loss that
    the recipe does not have has the weight and options of the recipe `fallback` (None: default). `model` is that of teacher, network and
    evaluation, `evaluation` are options of the evaluators that have them, and `flags` are others of `ddkit
    distill`; None is not given. With `part` only that of the recipe may be set, and only its options are checked. Raises a DdkitError.
    """
    losses = names("losses", losses)
    evaluators = names("evaluators", evaluators)
    sets = list(sets.items() if isinstance(sets, Mapping) else sets)
    given = {FLAGS.get(flag, flag): value for flag, value in flags.items() if value is not None}
    if model is not None:
        given |= {"teacher.model": model, "network.model": model}
    override = [*sets, *given.items()]
    if isinstance(recipe, Mapping):
        check_depth(recipe, "The recipe")
        raw = copy.deepcopy(dict(recipe))
    else:
        raw = parse_toml(recipe) if isinstance(recipe, Path) else read_recipe("default" if recipe is None else recipe)
    ipc, pipc = (dict(override).get(key, raw.get(key, default)) for key, default in (("ipc", 1), ("pipc", 50)))
    raw = _with_rules(raw, ipc, pipc)
    if losses is not None:
        has_default = any(p.kind == "recipe" and p.name == "default" for p in registry.plugins())
        beside = _with_rules(read_recipe(fallback or "default"), ipc, pipc) if fallback or has_default else {}
        raw["losses"] = select_losses(losses, _loss_tables(raw), _loss_tables(beside))
    assign_all(raw, override)
    check_depth(raw, "The recipe with its settings")
    with _blaming_flags(given, evaluation or {}):
        built = parse_recipe({key: value if key in TOLD_APART else _with_home(value) for key, value in raw.items()})
        if not built.name:
            name = Path(recipe).stem if isinstance(recipe, str | Path) else "custom" if recipe else "default"
            built = msgspec.structs.replace(built, name=name)
        if evaluators is not None:
            wanted = [] if evaluators == "none" else [name.strip() for name in evaluators.split(",")]
            built = msgspec.structs.replace(built, evaluators={n: built.evaluators.get(n, EvaluatorTable()) for n in wanted})
        for kind, name, _, _ in named_components(built):
            registry.find(kind, registry.split_name(name)[0])
        dataset = registry.split_name(built.data.use)[0]
        directories = [*(["--data-dir"] if "data.dir" in given else []), *(["--set data.dir"] if "data.dir" in dict(sets) else [])]
        if directories and not registry.load("dataset", dataset).takes_directory:
            refuse_unused(directories, f"the dataset '{dataset}' downloads nothing.")
        if part is not None:
            others = [path for path, _ in flattened(dict(sets)) if path.split(".")[0] not in part.used or path in part.unused]
            refuse_unused([f"--set {path}" for path in others], part.why)
        built = msgspec.structs.replace(built, evaluators=_with_options(built.evaluators, evaluation or {}, model))
        built = _with_protocols(built)
        with trust.granting(everything=True):  # to read options runs no code that they name; to build the component does
            check_options(built, part)
    return built


def names(flag: str, given: Any) -> str | None:
    """Returns names of components, given as text or one by one, with commas; raises FlagError for what is no text, such as a class."""
    if given is None:
        return None
    each = given if isinstance(given, list | tuple) else [given]
    for wrong in (one for one in each if not isinstance(one, str)):
        kind = wrong if isinstance(wrong, type) else type(wrong)
        if not issubclass(kind, Component):
            raise FlagError(f"{flag} = {shown(given)}: it takes names, as text with commas or as a list of texts.")
        raise FlagError(
            f"{flag} = {shown(given)}: it takes names. A class of your own stands in a file, so that a run can be continued and repeated: "
            "write it to mine.py (in a notebook with %%writefile mine.py at the top of its cell), call ddkit.add_plugin_file('mine.py'), "
            f"and give its name, '{hyphenated(kind.__name__)}'."
        )
    return ",".join(each)


def check_effect(recipe: Recipe, given: Collection[str]) -> None:
    """Raises FlagError if there are paths among `given`, which a user has set, that the recipe makes no use of."""
    labels, network = recipe.own_labels, recipe.network
    learned, drawn = labels.kind == "learned", network.source == "experts"
    experts = [path for path in given if path.split(".")[0] == "experts"]
    losses = [(recipe.loss_name(label), table.options, f"losses.{label}") for label, table in recipe.losses.items() if experts]
    in_use = (
        drawn
        or (learned and labels.init == "experts")
        or any(registry.create("loss", name, options, where=where).requires.experts for name, options, where in losses)
    )
    begin, reuse = recipe.initializer, "initializer.reuse"
    takes_real = reuse not in given or registry.create("initializer", begin.use, begin.options, where="initializer").requires.real
    rules = [  # whether keys are in use, why they are not, and the keys
        (learned, "labels.kind is not learned", ["labels.lr", "labels.init"]),
        (
            labels.kind == "teacher" or (learned and labels.init == "teacher"),
            "the set has no labels from the teacher",
            ["labels.temperature"],
        ),
        (recipe.train.optimizer == "sgd", "train.optimizer is not sgd", ["train.momentum"]),
        (drawn, "network.source is not experts", ["network.first", "network.last"]),
        (network.trained_on != "none", "no network is trained between steps", [f"network.{key}" for key in ("inner_lr", *INNER)]),
        (takes_real, f"the initializer '{begin.use}' uses no real images", [reuse]),
        (in_use, "no loss uses experts, and neither network.source nor labels.init is experts", experts),
    ]
    for used, why, keys in rules:
        if not used:
            refuse_unused([f"--set {path}" for path in given if path in keys], f"{why}.")


def check_options(recipe: Recipe, part: Part | None = None) -> None:
    """Raises InputError for an option that a component of the recipe does not have or allow, or that names code which may not run."""
    for kind, name, options, where in named_components(recipe):
        if part is None or where.split(".")[0] in part.used:
            registry.options_of(kind, name, options, where)


@contextmanager
def _blaming_flags(given: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterator[None]:
    """Turns an InputError about a value that a flag has set into a FlagError that names the flag."""
    try:
        yield
    except InputError as error:
        path = error.path or ""
        flag = path.partition(".")[0]
        if flag in ("ipc", "pipc", "steps", "seed") and flag in given and "is not possible" in str(error):
            raise FlagError(f"--{flag}: {error}") from None
        if path.endswith(".protocol") and evaluation.get("protocol") is not None:
            raise FlagError(f"--protocol: {error}") from None
        if path.endswith(".use") and path in given:
            raise FlagError(str(error)) from None
        raise


def _with_home(value: Any) -> Any:
    """Returns a value of a recipe with the user's home folder for the `~` of its paths."""
    if isinstance(value, str):
        return with_home(value)
    if isinstance(value, Mapping):
        return {key: _with_home(item) for key, item in value.items()}
    return [_with_home(item) for item in value] if isinstance(value, list) else value


def _with_rules(raw: Raw, ipc: Any, pipc: Any) -> Raw:
    """Returns `raw` with the settings of every matching rule, in order, and without the rules."""
    result = copy.deepcopy(raw)
    rules = result.pop("rules", [])
    if not isinstance(rules, list):
        raise InputError("rules must be an array of tables, written as [[rules]].", "rules")
    if isinstance(ipc, Mapping):  # a recipe's rules go by the number of most classes
        ipc = ipc.get("default", max((each for each in ipc.values() if isinstance(each, int)), default=1))
    values = {"ipc": ipc, "pipc": math.inf if pipc == "all" else pipc}
    known = all(isinstance(value, int | float) for value in values.values())  # else the recipe's own check names the bad value
    for number, entry in enumerate(rules):
        rule = parse_struct(RuleTable, entry if isinstance(entry, Mapping) else {"": entry}, f"rules[{number}]", whole="the rule")
        bounds = [(values[str(key)[:-4]], str(key)[-3:], bound) for key, bound in rule.when.items()] if known else []
        if known and all(value >= bound if end == "min" else value <= bound for value, end, bound in bounds):
            assign_all(result, flattened(rule.set))
    return result


TOLD_APART = ("name", "summary", "source", "notes", "rules")


def described(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the settings of raw recipe data, in order: `path`, `value`, `rules` that change it, `origin` and `why`.

    A rule is {"when", "value"}; one that sets what the tables leave out stands alone (`value` None), as does a note on a
    setting that is left at its default (no rules either). Origin and reason are the recipe's note for the path, or for the
    nearest path above it, split at its first colon; "" where it has none.
    """
    notes = raw.get("notes", {})

    def row(path: str, value: Any) -> dict[str, Any]:
        keys = path.split(".")
        above = (".".join(keys[:length]) for length in range(len(keys), 0, -1))
        origin, _, why = next((notes[key] for key in above if key in notes), "").partition(":")
        return {"path": path, "value": value, "rules": [], "origin": origin.strip(), "why": why.strip()}

    rows = {path: row(path, value) for path, value in flattened({k: v for k, v in raw.items() if k not in TOLD_APART})}
    for rule in raw.get("rules", []):
        for path, value in flattened(rule["set"]):
            rows.setdefault(path, row(path, None))["rules"].append({"when": rule["when"], "value": value})
    for path in notes:
        if not any(known == path or known.startswith(f"{path}.") for known in rows):
            rows[path] = row(path, None)  # left at its default, and said why
    return list(rows.values())


def select_losses(text: str, tables: Mapping[str, Any], fallback: Mapping[str, Any]) -> Raw:
    """Returns the loss tables that `--losses text` selects; weights and options from `tables`, else `fallback`.

    Raises FlagError for a name given twice or an impossible weight, PluginError for an unknown loss.
    """
    chosen: Raw = {}
    groups = {p.name for p in registry.plugins() if p.kind == "loss-group"}
    installed = groups | {p.name for p in registry.plugins() if p.kind == "loss"}
    for item in (part.strip() for part in text.split(",")):
        name, colon, number = item.partition(":")
        if not name:
            raise FlagError("--losses: a name is empty. Write names separated by commas, for example --losses dm,dkkt")
        try:
            weight = float(number) if colon else None
        except ValueError:
            raise FlagError(f"--losses {item}: the weight '{number}' is not a number.") from None
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            raise FlagError(f"--losses {item}: the weight must be a finite number and at least 0.")
        is_group = name not in tables and name.rpartition("/")[2] in groups
        for label in registry.members(registry.find("loss-group", name)) if is_group else (name,):
            if label in chosen:
                raise FlagError(f"--losses {text}: the loss '{label}' is chosen twice. Name it once.")
            if label not in {*tables, *fallback} and label.rpartition("/")[2] not in installed:
                raise PluginError(f"There is no loss '{label}'. {suggestion(label, installed)} (`ddkit list losses` shows all losses.)")
            table = dict(tables.get(label, fallback.get(label, {})))
            own = table.get("weight", 1.0)
            fits = isinstance(own, int | float) and abs(own) < 2**63  # else the recipe's own check names it
            if weight is not None and (fits or not is_group):
                table = table | {"weight": weight * own if is_group else weight}
            chosen[label] = table
    return chosen


def _loss_tables(raw: Raw) -> dict[str, Raw]:
    tables = raw.get("losses", {})
    if not isinstance(tables, Mapping):
        raise InputError(f"losses must be a table of the recipe, but is {shown(tables)}.", "losses")
    for label, table in tables.items():
        if not isinstance(table, Mapping):
            raise InputError(f"losses.{label} must be a table of the recipe, but is {shown(table)}.", f"losses.{label}")
    return dict(tables)


def _with_options(tables: Mapping[str, EvaluatorTable], asked: Mapping[str, Any], model: str | None) -> dict[str, EvaluatorTable]:
    """Returns evaluator tables with each option of `asked` (None: not given), and the `model`, set if the evaluator has that option.

    Raises FlagError for an option of `asked` that none of the evaluators has.
    """
    given = {key: value for key, value in asked.items() if value is not None}
    if not given and model is None:
        return dict(tables)
    known = {name: fields(options_type(registry.load("evaluator", table.use or name))) for name, table in tables.items()}
    for key in given:
        if not any(key in names for names in known.values()):
            why = f"none of the evaluators ({', '.join(tables)}) has this option" if tables else "nothing is evaluated"
            raise FlagError(f"--{key} has no effect: {why}. Leave it out.")
    given |= {} if model is None else {"model": model}
    return {
        name: msgspec.structs.replace(table, options=table.options | {k: v for k, v in given.items() if k in known[name]})
        for name, table in tables.items()
    }


def _with_protocols(recipe: Recipe) -> Recipe:
    """Returns the recipe with the values of every protocol that an evaluator names, so that a figure can be had again without its file."""
    protocols, evaluators = dict(recipe.protocols), dict(recipe.evaluators)
    for label, table in recipe.evaluators.items():
        kind = options_type(registry.load("evaluator", table.use or label))
        if not takes(kind, "protocol", Protocol):
            continue
        name, path = table.options.get("protocol", fields(kind)["protocol"].default), f"evaluators.{label}.protocol"
        if isinstance(name, Mapping):
            raise InputError(
                f"{path} must be the name of a protocol, or a file. Write the values of a protocol under [protocols.NAME].", path
            )
        installed = {p.name for p in registry.plugins() if p.kind == "protocol"}
        if isinstance(name, str) and not _is_file(name) and name not in {*protocols, *installed}:
            near = suggestion(name, {*protocols, *installed})
            raise InputError(f"{path} = {name!r}: there is no such protocol. {near} For a file, write its path: ./{name}.toml", path)
        if isinstance(name, str):
            found = read_protocol(name, recipe.protocols)
            protocols[found.name] = found
            evaluators[label] = msgspec.structs.replace(table, options=table.options | {"protocol": found.name})
    return msgspec.structs.replace(recipe, protocols=protocols, evaluators=evaluators)


def evaluator_options(recipe: Recipe, label: str) -> dict[str, Any]:
    """Returns the options of an evaluator, with the values of its protocol in the place of the name if it takes them.

    A recipe of an earlier version has the name alone.
    """
    table = recipe.evaluators[label]
    values = recipe.protocols.get(str(table.options.get("protocol")))
    if values is None or not takes(options_type(registry.load("evaluator", table.use or label)), "protocol", Protocol):
        return table.options
    return table.options | {"protocol": values}


def named_components(recipe: Recipe) -> list[tuple[str, str, Mapping[str, Any], str]]:
    """Returns kind, name, options and place in the recipe of every component that it names."""
    named: list[tuple[str, str, Mapping[str, Any], str]] = []
    for table, (key, kind) in CHOOSING.items():
        chosen = getattr(recipe, table)
        if table in NAMED_TABLES:
            for label, entry in chosen.items():
                name = getattr(entry, key) or (label if table in NAMED_BY_LABEL else "")
                named.append((kind, name, entry.options, f"{table}.{label}"))
        else:
            named.append((kind, getattr(chosen, key), chosen.options, table))
    return named
