"""Figures of evaluations for people: accuracies, budgets, and tables of rows, on a terminal or as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddkit.text import printable

MOST_CLASSES = 50  # whose accuracies are printed


def percent(mean: float | None, std: float | None) -> str:
    """Returns a fraction as "81.2 ± 0.4 %"."""
    if mean is None:
        return "-"
    return f"{100 * mean:.1f} %" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f} %"


def _accuracy(row: Any) -> str:
    """Returns the accuracy of a row with its evaluator's summary behind it, or the summary alone if there is no accuracy."""
    said = str(row.details.get("summary", ""))
    return said if row.accuracy_mean is None and said else percent(row.accuracy_mean, row.accuracy_std) + (f" ({said})" if said else "")


def budget(numbers: float | None, images: float | None, by_class: Mapping[str, float] | None = None) -> str:
    """Returns the budget of a set as "640 (10 images)": the numbers that it stores for a class, and how many images have as many.

    With the numbers of each class it is "64 to 256 (1 to 4 images)".
    """
    if numbers and images and by_class:
        low, high = min(by_class.values()), max(by_class.values())
        return f"{low:,.6g} to {high:,.6g} ({low * images / numbers:.3g} to {high * images / numbers:.3g} images)"
    return "-" if numbers is None else f"{numbers:,.6g} ({images:.3g} image{'s' if images != 1 else ''})"


def evaluation_table(rows: Sequence[Any], form: str = "simple") -> str:
    """Returns a table of the evaluations, below it one of the classes for each row that has them; with `form` "html" the first as HTML."""
    from tabulate import tabulate

    columns: dict[str, list[Any]] = {key: [getattr(row, key) for row in rows] for key in ("evaluator", "model", "protocol", "labels")}
    columns["protocol"] = [", ".join(filter(None, (row.protocol, str(row.details.get("variant", ""))))) for row in rows]
    for key, usual in (("images", "synthetic"), ("split", "test")):
        values = [getattr(row, key) for row in rows]
        columns |= {key: values} if any(value != usual for value in values) else {}
    columns["accuracy"] = [_accuracy(row) for row in rows]
    more = [str(row.details.get("random_real", "")) for row in rows]  # how many they are, if not as many as the set has
    columns["random real"] = [
        percent(row.random_real_mean, row.random_real_std) + (f" ({said})" if said else "") for row, said in zip(rows, more, strict=True)
    ]
    balanced = [percent(row.details.get("balanced_mean"), row.details.get("balanced_std")) for row in rows]
    if any(row.details.get("balanced_mean") is not None for row in rows):
        columns["balanced accuracy"] = balanced
        columns["balanced, random real"] = [
            percent(row.details.get("random_real_balanced_mean"), row.details.get("random_real_balanced_std")) for row in rows
        ]
    columns["networks"] = [row.repeats for row in rows]
    columns["stored per class"] = [budget(row.stored_numbers, row.stored_as_images, row.details.get("stored_by_class")) for row in rows]
    cached = [f"{row.details['cached']} of {row.repeats}" if row.details.get("cached") else "" for row in rows]
    columns |= {"baseline from cache": cached} if any(cached) else {}
    tables = [tabulate(columns, headers="keys", tablefmt=form, disable_numparse=True)]
    for row in rows if form == "simple" else ():
        classes = row.details.get("class_accuracies", {}) if "balanced_mean" in row.details else {}
        lines = [
            [printable(name), each["test_images"], percent(each["accuracy"], None), percent(each.get("random_real"), None)]
            for name, each in list(classes.items())[:MOST_CLASSES]
        ]
        rest = f"\n{len(classes) - MOST_CLASSES} more classes are in the output of --json" if len(classes) > MOST_CLASSES else ""
        head = [f"class ({row.model}, {row.images})", "test images", "accuracy", "random real"]
        tables += [tabulate(lines, head, tablefmt="simple", disable_numparse=True) + rest] if lines else []
    return "\n\n".join(tables)


def budgets_differ(numbers: Iterable[float]) -> bool:
    """Whether stored numbers differ by more than 1 %: not every parametrization can use the last few numbers of an image."""
    known = list(numbers)
    return max(known) > 1.01 * min(known)
