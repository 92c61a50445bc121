"""How many training images of each class are held out for testing, and whether there are so many."""

from __future__ import annotations

import torch

from ddkit.components.base import Dataset
from ddkit.errors import InputError


def fewest(dataset: Dataset) -> tuple[str, int]:
    """Returns the first class with the fewest training images, and how many."""
    counts = torch.bincount(dataset.labels("train"), minlength=len(dataset.class_names)).tolist()
    return dataset.class_names[counts.index(min(counts))], min(counts)


def held_out_count(dataset: Dataset, pipc: int | str) -> int:
    """Returns how many images of each class are held out by default: a fifth of the smallest class, at most 200 and what pipc leaves."""
    least = fewest(dataset)[1]
    left = least - int(pipc) if pipc != "all" else 0
    fifth = min(200, least // 5)
    return max(1, min(fifth, left) if left > 0 else fifth)


def check_held_out(dataset: Dataset, pipc: int | str, held_out: int, *, remedy: str = "") -> None:
    """Raises InputError where a class has fewer than pipc + held_out training images. `remedy` ends the message; "": flags of a run."""
    name, least = fewest(dataset)
    if pipc != "all" and int(pipc) + held_out <= least:
        return
    fits = held_out if held_out < least else held_out_count(dataset, "all")
    if least == 1:
        flags = "Add images of this class, or use --evaluate none"
    elif pipc == "all" or int(pipc) >= least:
        flags = f"Use at most --pipc {least - fits}{'' if fits == held_out else f' with --set data.held_out={fits}'}"
    else:
        flags = f"Use --set data.held_out={least - int(pipc)} or a smaller value{', or a smaller --pipc' if pipc else ''}"
    raise InputError(
        f"data.test = held-out needs {held_out} training images of each class (data.held_out) in addition to the accessible ones "
        f"(pipc {pipc}), but the class '{name}' has {least} in all. {remedy or f'{flags}, or --set data.test=test.'}",
        "data.held_out",
    )
