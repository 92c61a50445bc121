"""Finds and loads plugins through entry points. Listing imports none of them."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ddkit.components import base as base
from ddkit.components import plugin_file, source, trust, upgrade
from ddkit.components.kinds import BASES, CHECKED, DATA_KINDS, KINDS
from ddkit.components.observers import Observers
from ddkit.components.options import Requires, describe_options, fields, options_type, parse_options
from ddkit.errors import FlagError, InputError, PluginError, is_its_own, told
from ddkit.text import shown, suggestion

log = logging.getLogger("ddkit")

GROUPS_FILE = "groups.toml"  # beside recipes: names of several losses that are chosen together
NAME = re.compile(r"[a-z][a-z0-9-]*")


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """A component as its distribution's metadata tells it; `value` is "module:Class", or the path of a recipe, protocol or study.

    `file` and `sha256` are those of a plugin file (`--plugin`), whose name stands for the distribution.
    """

    kind: str
    name: str
    distribution: str
    version: str
    value: str
    file: str = ""
    sha256: str = ""

    @property
    def first_party(self) -> bool:
        return self.distribution == "ddkit"

    @property
    def origin(self) -> str:
        """The distribution and version of a third-party component, "" for ddkit's own."""
        return "" if self.first_party else f"{self.distribution} {self.version}"

    @property
    def label(self) -> str:
        return f"{self.kind} '{self.name}' of {self.distribution} {self.version}"

    @property
    def flag(self) -> str:
        """What a command needs to find the component: "--plugin FILE " for that of a plugin file, else ""."""
        return f"--plugin {shlex.quote(self.file)} " if self.file else ""

    @property
    def advice(self) -> str:
        """What helps a third-party component, to add to a message: "" for ddkit's own, and for kinds without a suite."""
        if self.first_party or self.kind not in CHECKED:
            return ""
        return f" `ddkit check {self.flag}{self.kind} {self.name}` shows more."


def parse_kind(text: str) -> str:
    """Returns the kind that `text` names, singular or plural; raises FlagError otherwise. Augmenters make views and augmentations."""
    name = text.lower().replace("_", "-")
    if name.removesuffix("s") in ("view", "augmentation"):
        return "augmenter"
    for kind in KINDS:
        if name in (kind, kind + "s", kind.replace("loss", "losse") + "s", kind.replace("study", "studies")):
            return kind
    raise FlagError(f"'{text}' is not a kind of component. {suggestion(name, KINDS)}")


@cache
def plugins() -> tuple[Plugin, ...]:
    """Returns every installed component, in order of kind and name, first-party ones first. One metadata scan a process."""
    listed: list[Plugin] = []
    owners: dict[Any, tuple[str, str]] = {}  # a distribution's metadata is parsed once, whatever it brings
    allowed = os.environ.get("DDKIT_PLUGINS")
    names = {_canonical(name) for name in (allowed or "").split(",")}
    installed = metadata.entry_points()
    for kind, (group, *_) in KINDS.items():
        for point in installed.select(group=group) if kind != "loss-group" else ():  # these stand in files of a package of recipes
            if point.dist not in owners:
                owners[point.dist] = (_canonical(point.dist.name), point.dist.version) if point.dist else ("unknown", "0")
            distribution, version = owners[point.dist]
            found = Plugin(kind=kind, name=point.name, distribution=distribution, version=version, value=point.value)
            if allowed is None or found.first_party or distribution in names:
                listed += _files(found) if kind in DATA_KINDS else [found]
    for path, digest in plugin_file.known().items():
        try:
            listed += _of_file(plugin_file.opened(path, digest))
        except plugin_file.FileChanged:
            raise
        except PluginError as error:  # handed to this process, and gone or broken by now
            log.warning("%s", error)
    order = list(KINDS)
    return tuple(sorted(set(listed), key=lambda p: (order.index(p.kind), p.name, not p.first_party, p.distribution)))


def add_plugin_file(path: str | Path) -> None:
    """Makes the components of one Python file available by name, here and in processes that this one starts.

    Raises FlagError if there is no such file, PluginError if it cannot be imported, defines no component, or one
    whose name is taken. Only this call reads an edited file again: a run that follows, and the processes
    that it starts, use the code that was read here.

    Examples:
        >>> lines = ["class Flat(ddkit.Loss):", "  'Nothing.'", "  def __call__(self, step): return 0 * step.images.sum()"]
        >>> _ = Path("flat.py").write_text(chr(10).join(["import ddkit", *lines]))
        >>> ddkit.add_plugin_file("flat.py")
        >>> type(ddkit.create("loss", "flat")).__name__
        'Flat'
    """
    file = str(Path(path).resolve())
    if not Path(file).is_file() or not file.endswith(".py"):
        raise FlagError(f"--plugin {path}: there is no such Python file. Name a .py file with the class of a component.")
    added = _of_file(plugin_file.opened(file))
    before = plugin_file.known()
    plugin_file.remember(before | {file: added[0].sha256})
    plugins.cache_clear()
    try:
        known = [*added, *(plugin for plugin in plugins() if plugin.file != file)]
        for number, plugin in enumerate(added):
            others = [p for p in (*known[:number], *known[len(added) :]) if p.name == plugin.name and share_names(p.kind, plugin.kind)]
            if others:
                inside = others[0].file == file
                owner = "another of its classes" if inside else f"{others[0].distribution} {others[0].version}"
                advice = "Rename" if inside else "Leave out --plugin to use that one, or rename"
                raise PluginError(
                    f"The plugin file {path} defines the {plugin.kind} '{plugin.name}', but {owner} has "
                    f"that name already. {advice} the class: MyLoss becomes the component my-loss."
                )
    except BaseException:
        plugin_file.remember(before)
        plugins.cache_clear()
        raise


def share_names(kind: str, other: str) -> bool:
    """Whether both kinds are chosen from one set of names: a loss and a group of losses are."""
    return kind == other or {kind, other} == {"loss", "loss-group"}


def _of_file(found: plugin_file.PluginFile) -> list[Plugin]:
    """Returns every component that a plugin file itself defines; raises PluginError if there is none.

    A component's name is its class name in lower case with hyphens, `ClassMean` being class-mean. A class whose name begins with
    an underscore is none.
    """
    name, version = found.file.name, found.sha256[:12]
    own = [each for each in vars(found.module).values() if inspect.isclass(each) and each.__module__ == found.module.__name__]
    defined = [
        Plugin(
            kind=kind, name=plugin_file.hyphenated(each.__name__), distribution=name, version=version,
            value=f"{each.__module__}:{each.__name__}", file=str(found.file), sha256=found.sha256,
        )
        for each in dict.fromkeys(own) if not each.__name__.startswith("_")
        for kind, expected in BASES.items() if issubclass(each, expected)
    ]  # fmt: skip
    if not defined:
        kinds = ", ".join(f"ddkit.{expected.__name__}" for expected in BASES.values())
        raise PluginError(f"The plugin file {found.file} defines no component. A component is a subclass of one of {kinds}.")
    return defined


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _files(package: Plugin) -> list[Plugin]:
    folder = source.package_folder(package.value)
    files = sorted(folder.glob("*.toml")) if folder else []
    kinds = {file: "loss-group" if package.kind == "recipe" and file.name == GROUPS_FILE else package.kind for file in files}
    return [
        msgspec.structs.replace(package, kind=kind, name=name, value=str(file))
        for file, kind in kinds.items()
        for name in (source.group_names(file) if kind == "loss-group" else [file.stem])
    ]


def members(plugin: Plugin) -> tuple[str, ...]:
    """Returns the losses of a loss group; raises PluginError where its file has none for it."""
    status, names = source.group(Path(plugin.value), plugin.name)
    if status != "ok":
        raise PluginError(f"The {plugin.label} cannot be used: {plugin.value}: {status}.")
    return names


def find(kind: str, name: str) -> Plugin:
    """Returns the plugin that `name` or `distribution/name` means; raises PluginError with the nearest name."""
    distribution, _, short = name.rpartition("/")
    of_kind = [p for p in plugins() if p.kind == kind]
    matches = [p for p in of_kind if p.name == short and _canonical(distribution) in ("", _canonical(p.distribution))]
    if not matches:
        names = {p.name for p in of_kind}
        use = "npz" if name.lower().endswith(".npz") else "imagefolder" if name.startswith((".", "/", "~")) or os.path.isdir(name) else ""
        if kind == "dataset" and use:
            raise PluginError(
                f"'{name}' is a path, not the name of a dataset. Write the name before the path: --dataset {shlex.quote(f'{use}:{name}')}"
            )
        raise PluginError(
            f"There is no {kind} '{name}'. {suggestion(short, names)} (`ddkit list {kind}` shows all that are installed. "
            "--plugin FILE adds your own file.)"
        )
    if len(matches) > 1 and not matches[0].first_party:
        owners = " or ".join(f"{p.distribution}/{p.name}" for p in matches)
        raise PluginError(f"The {kind} '{name}' is in two distributions. Write {owners}.")
    return matches[0]


def status(plugin: Plugin) -> tuple[str, str]:
    """Returns (status, summary) of a plugin from metadata and source alone; status "ok" means found and parses."""
    if plugin.kind == "loss-group":
        found, names = source.group(Path(plugin.value), plugin.name)
        return found, f"The losses {' and '.join(names)}, used together." if names else ""
    if plugin.kind in DATA_KINDS:
        return source.toml_summary(Path(plugin.value))
    if not NAME.fullmatch(plugin.name):
        return "bad name (lower-case letters, digits and hyphens)", ""
    namesakes = [p for p in plugins() if p.kind == plugin.kind and p.name == plugin.name]
    found, summary = source.summary(plugin.value)
    if namesakes[0] != plugin and namesakes[0].first_party:
        return f"name taken (write {plugin.distribution}/{plugin.name})", summary
    if found == "ok" and len(namesakes) > 1 and not namesakes[0].first_party:
        return f"name in two distributions (write {plugin.distribution}/{plugin.name})", summary
    return found, summary


def load(kind: str, name: str) -> type[Any]:
    """Returns the class of a plugin; raises PluginError with distribution, version, cause and remedy."""
    return load_plugin(find(kind, name))


@cache
def load_plugin(plugin: Plugin) -> type[Any]:
    """Returns the class of `plugin`, imported once and checked against its kind's base class."""
    remedy = f" Reinstall or remove it (`pip uninstall {plugin.distribution}`), or report this to its authors."
    if plugin.file:
        remedy = f" Fix {plugin.file}."
    module, _, attribute = plugin.value.partition(":")
    if not NAME.fullmatch(plugin.name):
        raise PluginError(f"The {plugin.label} has an impossible name. Names consist of lower-case letters, digits and hyphens.{remedy}")
    from ddkit.components.guard import unchanged  # imports torch: if that fails, it is no fault of the plugin's

    with _blamed(plugin, f"could not be loaded from {plugin.value}", remedy):
        found: Any = sys.modules.get(module)
        if found is None:
            try:
                with unchanged(plugin.label, remedy):
                    found = importlib.import_module(module)
            except PluginError:
                sys.modules.pop(module, None)  # whoever asks again is told again
                raise
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
    expected = BASES.get(plugin.kind)
    if expected is None:
        return found  # an observer, which may be a module
    if not (isinstance(found, type) and issubclass(found, expected)):
        raise PluginError(f"The {plugin.label} is not a subclass of ddkit.{expected.__name__} ({plugin.value}).{remedy}")
    for each in found.__mro__:
        if {"Options", "api"} & vars(each).keys() or isinstance(vars(each).get("requires"), property):
            raise PluginError(upgrade.problem(plugin.label, Path(inspect.getfile(each))))
    try:
        names = fields(options_type(found))
        describe_options(found)
        options_type(found)()
    except Exception as error:  # an annotation that leads nowhere, or to what no recipe can hold; a default that is not possible
        raise PluginError(f"The {plugin.label} has options that cannot be read: {told(error)}.{remedy}") from error
    declared = {  # attributes that are of the kind which the base class declares, and what that is
        "argument": (found.argument is None or found.argument in names, f"None or one of its options ({', '.join(names) or 'none'})"),
        "requires": (isinstance(found.requires, Requires | base.RequiresMethod), "a ddkit.Requires(...), or a method that returns one"),
        "deviations": (isinstance(found.deviations, Mapping), "a mapping from checks to reasons"),
    }
    for name, (fits, must) in declared.items():
        if not fits:
            raise PluginError(f"The {plugin.label} has {name} = {shown(getattr(found, name))}, but it must be {must}.{remedy}")
    taken = sorted({*names} & OWN_KEYS.get(KINDS[plugin.kind].table, set()))
    if taken:
        told_names = " and ".join(f"'{name}'" for name in taken)
        raise PluginError(
            f"The {plugin.label} has an option {told_names}, but recipes already have a key of that name in the same table. Rename it."
        )
    return found


@contextmanager
def _blamed(plugin: Plugin, failed: str, helps: str) -> Iterator[None]:
    """Turns what the code of a plugin raises inside into a PluginError that names it and says what `failed`, and how a 0.1 one changes."""
    try:
        yield
    except BaseException as error:
        if not is_its_own(error):
            raise
        changes = upgrade.problem(plugin.label, source.module_file(plugin.value.partition(":")[0]))
        raise PluginError(changes or f"The {plugin.label} {failed}: {told(error)}.{helps}") from error


OWN_KEYS = {  # of each table of a recipe that carries options, the keys beside them, which ddkit.recipes.tables declares
    "data": {"use", "dir", "batch", "test", "held_out", "memory", "whiten", "whiten_eps", "whiten_absolute"},
    "teacher": {"use", "model", "mean", "std", "classes", "check"},
    "train": {"epochs", "batch", "optimizer", "lr", "momentum", "weight_decay", "schedule", "augmenter"},
    "network": {
        "model", "source", "first", "last", "interpolate", "renew_every", "pool", "train_on", "inner_epochs", "inner_steps", "inner_lr",
        "batch", "inner_optimizer", "inner_momentum", "inner_weight_decay", "inner_augment", "inner_mix", "inner_mix_share",
    },
    "losses": {"use", "weight"},
    "initializer": {"use", "reuse"},
    "parametrization": {"use"},
    "augmenter": {"use"},
    "views": {"augmenter", "compose", "noise"},
    "evaluators": {"use"},
}  # fmt: skip


def split_name(name: str) -> tuple[str, str | None]:
    """Returns (component name, argument) of "imagefolder:PATH"; the argument is None where there is no colon."""
    short, colon, argument = name.partition(":")
    return short, argument if colon else None


def options_of(kind: str, name: str, table: Mapping[str, Any], where: str, data: base.DataInfo | None = None) -> Any:
    """Returns the validated options of component `name`, which may carry an argument, from a recipe table."""
    short, argument = split_name(name)
    plugin = find(kind, short)
    found = load_plugin(plugin)
    merged = dict(table)
    if argument is not None:
        if found.argument is None:
            raise InputError(f"The {kind} '{short}' takes no argument after a colon, but got '{argument}'.", f"{where}.use")
        merged[found.argument] = argument
    options = parse_options(options_type(found), merged, where, short, OWN_KEYS.get(where.partition(".")[0], set()), flag=plugin.flag)
    if found.runs_code and found.argument is not None:
        paths = (f"{where}.{found.argument}", f"{where}.{short}.{found.argument}")  # the second: in a table of that model, of several
        trust.check(kind, short, str(getattr(options, found.argument)), paths)
    if data is None:
        return options
    with _blamed(plugin, "could not be built", plugin.advice):
        return msgspec.structs.replace(options, **found.resolve(options, data))


def create(
    kind: str,
    name: str,
    table: Mapping[str, Any] | None = None,
    *,
    data: base.DataInfo | None = None,
    where: str | None = None,
    **arguments: Any,
) -> Any:
    """Returns a component built by name, as a recipe would build it.

    `table` holds its options. With `data` the options that depend on the data are filled in. `where` is the recipe
    path for error messages. Raises PluginError if it cannot be loaded and InputError for a bad option.

    Examples:
        >>> loss = ddkit.create("loss", "total-variation", {"power": 2.0})
        >>> loss.power
        2.0
    """
    options = options_of(kind, name, table or {}, where or kind, data)
    short = split_name(name)[0]
    plugin = find(kind, short)
    with _blamed(plugin, "could not be built", plugin.advice):
        made = load_plugin(plugin)(name=short, **msgspec.structs.asdict(options), **arguments)
        made.origin = plugin.origin
        made.advice = plugin.advice
        made.recipe_path = where or short
        if "name" not in vars(made):
            raise PluginError(f"The {plugin.label} has an __init__ that does not call super().__init__(**options).{plugin.advice}")
        required_by(plugin, made)
    return made


def required_by(plugin: Plugin, made: Any = None) -> Requires:
    """Returns what a component requires, which a property may compute: `made`, or one with its defaults; raises PluginError."""
    found = load_plugin(plugin)
    with _blamed(plugin, "could not be built", plugin.advice):
        if made is None:
            made = found if isinstance(found.requires, Requires) else found(name=plugin.name)
        requires = made.requires
    if not isinstance(requires, Requires):
        raise PluginError(f"The {plugin.label}: `requires` must be a ddkit.Requires(...).{plugin.advice}")
    return requires


def watchers_of(observers: Sequence[Any]) -> Observers:
    """Returns the installed observers that load (of others a warning tells), and `observers`."""
    found: list[tuple[str, Any]] = []
    for plugin in plugins():
        if plugin.kind == "observer":
            try:
                found.append((plugin.name if plugin.first_party else f"{plugin.distribution}/{plugin.name}", load_plugin(plugin)))
            except PluginError as error:
                log.warning("%s", error)
    return Observers([*found, *((f"observer {i}", o) for i, o in enumerate(observers))])
