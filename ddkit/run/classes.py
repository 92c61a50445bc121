"""A set on data of other classes: its classes get the names and the order of the data, which are reduced to the classes of the set."""

from __future__ import annotations

import difflib
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence

import torch

from ddkit.components.base import Dataset
from ddkit.data.real import SomeClasses
from ddkit.errors import NEWS, InputError
from ddkit.run.artifact import Artifact
from ddkit.text import doubles, few, suggestion

log = logging.getLogger("ddkit")
LONGEST = 1200  # characters of a flag in a message


def matched(artifact: Artifact, dataset: Dataset, pairs: Mapping[str, str]) -> tuple[Artifact, Dataset]:
    """Returns the set with its classes under the names and in the order of the data, and the data of these classes alone.

    `pairs` are classes that have two names, one in the set and one in the data. Raises InputError if the data have not all classes of the
    set, with the pairs that may be meant.
    """
    classes = list(dataset.class_names)
    names = _renamed(artifact.class_names, classes, pairs)
    missing = [name for name in names if name not in classes]
    if missing:
        advice = _advice(missing, [name for name in classes if name not in names])
        raise InputError(f"The data does not have these classes of the set: {few(missing, 12)}. {advice}")
    if len(names) < 2:
        raise InputError(f"The set has only the class '{names[0]}', but a classifier needs two. `ddkit join` makes one set of several.")
    own = [name for name in classes if name in names]
    if own != classes:
        log.warning(
            "The data has %d classes, and the set has %d of them. Networks are trained and tested on the classes of the set (%s).",
            len(classes), len(own), few(own, 12), extra=NEWS,
        )  # fmt: skip
        dataset = SomeClasses(dataset, own)
    if names != own:
        log.warning("The classes of the set are sorted into the order of the data (%s).", few(own, 12), extra=NEWS)
    return (artifact if artifact.class_names == own else _in_order(artifact, names, own)), dataset


def _renamed(names: Sequence[str], classes: Sequence[str], pairs: Mapping[str, str]) -> list[str]:
    """Returns the names of the set's classes in the data."""
    of_data: dict[str, str] = {}
    for one, other in pairs.items():
        own, its = (one, other) if one in names and other in classes else (other, one)
        if own not in names or its not in classes:
            unknown = next((name for name in (one, other) if name not in (*names, *classes)), one)
            raise InputError(
                f"--match-classes {one}={other}: write a class of the set and a class of the data. '{unknown}' is in neither. "
                f"{suggestion(unknown, {*names, *classes})}"
            )
        of_data[own] = its
    found = [of_data.get(name, name) for name in names]
    for twice in doubles(found):
        raise InputError(f"--match-classes gives two classes of the set the name '{twice}'. Give each class its own.")
    return found


def _in_order(artifact: Artifact, names: Sequence[str], own: Sequence[str]) -> Artifact:
    """Returns the set whose classes are called `names`, with labels in the order of `own`."""
    parameters = artifact.all_parameters
    if "soft_labels" in parameters:
        parameters["soft_labels"] = parameters["soft_labels"][:, [list(names).index(name) for name in own]]
    place = torch.tensor([list(own).index(name) for name in names])
    made = Artifact(artifact.stored, place[artifact.row_labels], artifact.metadata | {"class_names": list(own)}, parameters)
    made.provenance = artifact.provenance
    return made


def _advice(missing: Sequence[str], others: Sequence[str]) -> str:
    """Returns the flag that calls classes of the set as the data does: by the nearest name, else in order."""
    if len(others) < len(missing):
        return f"A set is evaluated on data with all of its classes. The data has only these other classes: {few(others, 12) or 'none'}."
    left = list(others)
    pairs: dict[str, str] = {}
    for name in missing:
        near = difflib.get_close_matches(name, left, n=1, cutoff=0.6)
        pairs[name] = near[0] if near else ""
        left = [other for other in left if other != pairs[name]]
    pairs = {name: other or left.pop(0) for name, other in pairs.items()}
    flag = f"--match-classes {shlex.quote(_written(pairs))}"
    flag = (
        flag if len(flag) <= LONGEST else f"--match-classes {shlex.quote(_written(dict([*pairs.items()][:2])))} and so on, for all of them"
    )
    return f"If the data has them by other names, give these names, for example: {flag}"


def _written(pairs: Mapping[str, str]) -> str:
    """Returns pairs as the flag takes them: cat=tabby,dog=beagle, or a TOML table if a name has a mark of these."""
    if all(re.fullmatch(r"[^\s,={}]+", name) for name in (*pairs, *pairs.values())):
        return ",".join(f"{one}={other}" for one, other in pairs.items())
    return f"{{{','.join(f'{_quoted(one)}={_quoted(other)}' for one, other in pairs.items())}}}"


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
