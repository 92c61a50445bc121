"""Datasets that the caller of a Python function passes as objects, in the place of a name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ddkit.components import registry
from ddkit.errors import FlagError
from ddkit.text import counted, shown

log = logging.getLogger("ddkit")
PYTHON = "python"  # the dataset that stands for objects


class Passed(NamedTuple):
    """Datasets that are Python objects: `train` and `test` (None: some of `train` is held out), and what was found out about them once."""

    train: Any
    test: Any
    known: dict[str, Any]


_PASSED: ContextVar[Passed | None] = ContextVar("ddkit_passed", default=None)


def passed_dataset() -> Passed | None:
    """Returns the datasets that the caller of ddkit.distill, evaluate or train passed as objects, or None.

    Examples:
        >>> ddkit.data.passed_dataset() is None
        True
    """
    return _PASSED.get()


@contextmanager
def passing(dataset: Any) -> Iterator[dict[str, Any]]:
    """Inside, `dataset` is the recipe's; yields the flags and recipe paths that say so.

    `dataset` is a name or None, which are yielded as they are, a dataset, (training, test), or a dict of splits, such as Hugging Face's
    DatasetDict. Raises FlagError for anything else, InputError for a dataset that cannot be used.
    """
    if dataset is None or isinstance(dataset, str):
        yield {"dataset": dataset}
        return
    pair = _splits(dataset) if isinstance(dataset, Mapping) else dataset if isinstance(dataset, tuple) else (dataset, None)
    if len(pair) != 2:
        raise FlagError(f"dataset: a tuple must be (training, test), but this one has {counted(len(pair), 'item')}.")
    for each in pair:
        if each is not None and not (hasattr(each, "__len__") and hasattr(each, "__getitem__")):
            raise FlagError(
                f"dataset: an object of the type {type(each).__name__} cannot be used. Pass a name, such as 'imagefolder:PATH', "
                "or a dataset whose len() and [index] give its length and (image, label), such as a map-style dataset of torch, or a "
                "tuple (training, test) of two such datasets."
            )
    if pair[0] is None:
        raise FlagError("dataset: the training dataset is None. Pass a dataset, or (training, test).")
    token = _PASSED.set(Passed(*pair, {}))
    try:
        made = registry.create("dataset", PYTHON)
        yield {"dataset": PYTHON, "data.labels": made.options.labels}  # by these an evaluation knows whether it is the run's own data
    finally:
        _PASSED.reset(token)


def _splits(parts: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns (training, test) of a dict of splits, with the validation split if it has no test; raises FlagError without training."""
    train = next((parts[name] for name in ("train", "training") if name in parts), None)
    if train is None:
        raise FlagError(f"dataset: a dict of splits must have the key 'train', but has {shown(list(parts))}. Or pass (training, test).")
    test = next((name for name in ("test", "testing", "val", "valid", "validation", "dev") if name in parts), None)
    if test not in (None, "test"):
        log.warning("There is no split 'test', so the split '%s' is the test split.", test)
    return train, None if test is None else parts[test]
