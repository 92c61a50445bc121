"""A dataset that is a Python object: passed to ddkit.distill, evaluate or train, and used by the dataset `python`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ddkit.components import registry
from ddkit.errors import FlagError

NAME = "python"


class Passed(NamedTuple):
    """`train` and `test` (None: part of the training images is held out), and what was found out about them once."""

    train: Any
    test: Any
    known: dict[str, Any]


_PASSED: ContextVar[Passed | None] = ContextVar("ddkit_passed", default=None)


def passed_dataset() -> Passed | None:
    """Returns the datasets that the caller passed as objects, None where there are none."""
    return _PASSED.get()


@contextmanager
def passing(dataset: Any) -> Iterator[dict[str, Any]]:
    """Inside, `dataset` is the recipe's; yields the values of recipe paths (dots as double underscores) that say so.

    `dataset` is a name or None, which are yielded as they are, a dataset, or (training, test). Raises FlagError for anything else,
    InputError for a dataset that cannot be used.
    """
    if dataset is None or isinstance(dataset, str):
        yield {"data__use": dataset}
        return
    token = _PASSED.set(Passed(*_pair(dataset), {}))
    try:
        made = registry.create("dataset", NAME)
        yield {"data__use": NAME, "data__labels": made.options.labels}  # tells an evaluation whether it is the run's own data
    finally:
        _PASSED.reset(token)


def _pair(dataset: Any) -> tuple[Any, Any]:
    pair = dataset if isinstance(dataset, tuple) else (dataset, None)
    if len(pair) != 2:
        raise FlagError(f"dataset: a tuple is (training, test), two datasets; got one of {len(pair)}.")
    for each in pair:
        if each is not None and not (hasattr(each, "__len__") and hasattr(each, "__getitem__")):
            raise FlagError(
                f"dataset: an object of the type {type(each).__name__} cannot be used. It is a name, such as 'imagefolder:PATH', or a "
                "dataset with a length and an [index] that gives (image, label), such as torch's map-style datasets, or (training, test) "
                "of these."
            )
    if pair[0] is None:
        raise FlagError("dataset: the training dataset is None. Pass it, or (training, test).")
    return pair
