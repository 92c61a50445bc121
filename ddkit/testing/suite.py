"""What every conformance suite shares: checks as methods, declared deviations, the component under test."""

from __future__ import annotations

import functools
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar
from unittest import SkipTest

import msgspec
import tomli_w
import torch
from torch import Tensor

from ddkit.components import registry
from ddkit.components.base import Component, DataInfo
from ddkit.components.guard import moved_since, shared_state
from ddkit.components.kinds import BASES
from ddkit.components.options import written_options
from ddkit.components.trust import granting
from ddkit.recipes.tables import parse_recipe, recipe_dict
from ddkit.run import children
from ddkit.seeding import generator

S = TypeVar("S", bound="Conformance")
T = TypeVar("T")
IMPORT_SECONDS = 2.0  # that the component's module may add to importing torch and ddkit
_COST = """
import time
import torch, numpy, ddkit
from ddkit.components import guard, registry
began = time.perf_counter()
registry.plugins()  # plugin files are imported here
__import__(sys.argv[1])
children.reply({"seconds": time.perf_counter() - began})
"""


class Broken(AssertionError):
    """A component does not keep a promise; the message says which and how to keep it."""


def check(method: Callable[[S], None]) -> Callable[[S], None]:
    """Makes a method `test_NAME` a check: a deviation declared under NAME has to fail, and everything else has to hold."""
    name = method.__name__.removeprefix("test_").replace("_", "-")

    @functools.wraps(method)
    def checked(self: S) -> None:
        reason = self.reasons().get(name)
        if reason is None:
            method(self)
            return
        try:
            method(self)
        except BaseException as error:  # a component may break a promise by raising
            if isinstance(error, KeyboardInterrupt) or any(
                isinstance(each, ImportError | NameError | SyntaxError) for each in (error, error.__cause__)
            ):
                raise  # nothing that was meant
            return
        raise Broken(f"The deviation '{name}' is declared ({reason}), but its check holds. Remove it from `deviations`.")

    checked.check_name = name  # type: ignore[attr-defined]
    return checked


class Conformance:
    """Base of the suites. Subclass the one of your component's kind and name the component:

        class TestMine(ddkit.testing.LossConformance):
            component = "my-loss"

    `options` are the component's, where the defaults do not suit a tiny run. `deviations` maps the name of a check that the
    component does not pass, on purpose, to the reason; those that the component declares itself hold too. A deviation that is
    no longer one fails.
    """

    kind: ClassVar[str]
    component: ClassVar[str | type[Component]]
    options: ClassVar[Mapping[str, Any]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def checks(cls) -> dict[str, str]:
        """Returns the names of the suite's checks, each with the method that does it."""
        found = {name: getattr(cls, name) for name in dir(cls) if name.startswith("test_")}
        return {method.check_name: name for name, method in found.items() if hasattr(method, "check_name")}

    @classmethod
    def _may_deviate(cls) -> list[str]:
        return [name for name in cls.checks() if name != "deviations-are-of-checks"]

    @classmethod
    def _check_names(cls, deviations: Any, whose: str) -> None:
        """Raises Broken where `deviations` names what is no check, or gives no reason."""
        if not isinstance(deviations, Mapping) or not all(isinstance(reason, str) and reason for reason in deviations.values()):
            raise Broken(f"`deviations`{whose} is {deviations!r}, but must map names of checks to reasons.")
        unknown = [str(name) for name in deviations if name not in cls._may_deviate()]
        if unknown:
            raise Broken(
                f"`deviations`{whose} cannot name {', '.join(map(repr, unknown))}. Possible checks: {', '.join(cls._may_deviate())}."
            )

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        cls._check_names(cls.deviations, "")

    def reasons(self) -> dict[str, str]:
        """Returns the declared deviations, the component's and the suite's: name of the check to reason."""
        own = getattr(self.found(), "deviations", {})
        both = {**own, **self.deviations} if isinstance(own, Mapping) else dict(self.deviations)
        return {name: reason for name, reason in both.items() if name in self._may_deviate()}

    @property
    def label(self) -> str:
        return self.component if isinstance(self.component, str) else self.component.__name__

    def make(self, info: DataInfo | None = None, **arguments: Any) -> Any:
        """Returns the component, built as a recipe would build it."""
        if isinstance(self.component, str):
            with granting({self.kind: self.component}, {self.kind: self.options}):
                return registry.create(self.kind, self.component, self.options, data=info, **arguments)
        found = self.component
        options = dict(self.options)
        if info is not None:
            options |= found.resolve(found(**options).options, info)
        return found(name=found.__name__.lower(), **options, **arguments)

    def found(self) -> type[Component]:
        """Returns the component's class."""
        return registry.load(self.kind, registry.split_name(self.component)[0]) if isinstance(self.component, str) else self.component

    def prepare(self) -> None:
        """Builds what the checks need from outside; a DdkitError here says that they cannot be made at all."""
        self.make()

    @contextmanager
    def leaves(self, tensors: Mapping[str, Tensor], also: str = "") -> Iterator[None]:
        """Raises Broken if the code inside changes one of `tensors`, or any global state; `also` is added to the former."""
        known, before = copies(tensors), shared_state()
        yield
        moved = moved_since(before)
        if moved:
            raise Broken(
                f"The {self.kind} '{self.label}' changes the global state of {', '.join(moved)}. Draw only from the generator that is "
                "passed to it, and set nothing globally."
            )
        if written := changed(known, tensors):
            raise Broken(f"The {self.kind} '{self.label}' changes {', '.join(written)}{also}.")

    # Checks of every kind

    @check
    def test_imports_without_a_gpu(self) -> None:
        """The module can be imported in a process that sees no GPU."""
        self._import_seconds()

    @check
    def test_import_is_cheap(self) -> None:
        """Importing the module takes 2 s or less beside torch and ddkit."""
        seconds = self._import_seconds()
        if seconds > IMPORT_SECONDS:
            raise Broken(
                f"Importing the module of '{self.label}' takes {seconds:.1f} s in addition to torch and ddkit. Import heavy libraries "
                "inside functions, and read files when the component is called."
            )

    def _import_seconds(self) -> float:
        if not isinstance(self.component, str):
            raise SkipTest("A class is imported already: name the component by its entry point to check its import.")
        plugin = registry.find(self.kind, registry.split_name(self.component)[0])
        return _cost_of(plugin.value.partition(":")[0])

    @check
    def test_deviations_are_of_checks(self) -> None:
        """The names in `deviations` of the component are checks of its suite, each with a reason."""
        self._check_names(getattr(self.found(), "deviations", {}), f" of '{self.label}'")

    @check
    def test_is_of_its_kind(self) -> None:
        """It is a subclass of the kind's base class, with a docstring."""
        found, base = self.found(), BASES[self.kind]
        if not issubclass(found, base):
            raise Broken(f"'{self.label}' is not a subclass of ddkit.{base.__name__}.")
        if not (found.__doc__ or "").strip():
            raise Broken(f"'{self.label}' has no docstring. Its first line must be the summary that `ddkit list` shows.")

    @check
    def test_options_survive_a_recipe(self) -> None:
        """The options written to a recipe and read again are the same."""
        component = self.make()
        written = written_options(component.options)
        text = tomli_w.dumps(recipe_dict(parse_recipe({"losses": {"mine": {"use": "dm", **written}}})))
        read = tomllib.loads(text)["losses"]["mine"]
        again = msgspec.convert({key: read[key] for key in written}, type(component.options))
        if again != component.options:
            raise Broken(f"The options of '{self.label}' change if a recipe stores them: {again} instead of {component.options}.")


class ShapeConformance(Conformance):
    """Base of the suites whose component has to do with images of any shape."""

    one, three, oblong = (1, 8, 8), (3, 8, 8), (3, 6, 11)

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        """Raises where the component does not work with images of `shape`."""
        raise NotImplementedError

    @check
    def test_one_channel(self) -> None:
        """It works with images of one channel."""
        self.holds_for(self.one)

    @check
    def test_three_channels(self) -> None:
        """It works with images of three channels."""
        self.holds_for(self.three)

    @check
    def test_images_that_are_not_square(self) -> None:
        """It works with images whose height is not their width."""
        self.holds_for(self.oblong)


@functools.cache
def _cost_of(module: str) -> float:
    """Returns the seconds that importing a module takes; asked once for all components in it."""
    done = children.run(_COST, module, environment={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith((" ", "Traceback"))]
        last = " ".join(lines[-2:]) or f"exit code {done.returncode}"
        raise Broken(f"{module} cannot be imported in a process without a GPU: {last}")
    return float(json.loads(done.stdout)["seconds"])


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns detached copies, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that are not bit for bit as they were."""
    return [name for name, tensor in before.items() if tensor.dtype != after[name].dtype or not torch.equal(tensor, after[name].detach())]


def repeated(make: Callable[[], T]) -> tuple[T, T]:
    """Returns what `make` gives twice, each time from another state of torch's default generator, at which it may not look."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = make()
        torch.manual_seed(2)
        return one, make()


def info_of(shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3) -> DataInfo:
    return DataInfo(class_names=tuple(f"class {i}" for i in range(classes)), channels=shape[0], size=shape[1:])


def noise(shape: tuple[int, ...], *purpose: str) -> Tensor:
    """Returns Gaussian noise, the same for the same purpose."""
    return torch.randn(shape, generator=generator(0, "conformance", *purpose))
