"""How much each loss moves the images: its share of the norms of the gradients, from the lines of metrics.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SMALL, WANTED = 0.01, 0.1

Line = Mapping[str, Any]


def shares(line: Line) -> dict[str, float]:
    """Returns by label the norm of the loss's weighted gradient on the images as a share of the sum of these norms.

    It is {} for a line without norms, as older runs have, and for a run of one loss.

    >>> shares({"losses": {"dm": {"gradient": 3.0}, "gm": {"gradient": 1.0}}})
    {'dm': 0.75, 'gm': 0.25}
    """
    norms = {label: float(term["gradient"]) for label, term in line["losses"].items() if "gradient" in term}
    total = sum(norms.values())
    return {label: norm / total if total > 0 else 0.0 for label, norm in norms.items()} if len(norms) > 1 else {}


def typical_shares(lines: Sequence[Line]) -> dict[str, float]:
    """Returns by label the median share over the lines."""
    found = [each for line in lines if (each := shares(line))]
    return {label: statistics.median(each.get(label, 0.0) for each in found) for label in (found[-1] if found else {})}


def words(found: Mapping[str, float]) -> str:
    """Returns shares as text: "dm 75.0 %, gm 25.0 %"."""
    return ", ".join(f"{label} {100 * share:.1f} %" for label, share in found.items())


def silent(lines: Sequence[Line], weights: Mapping[str, float]) -> list[str]:
    """Returns a sentence for each loss whose share stays below SMALL in all lines, with the weight that would make it WANTED.

    `weights` are those of the recipe. A loss of weight 0 is silent on purpose.
    """
    found = [each for line in lines if (each := shares(line))]
    told = []
    for label, weight in weights.items():
        own = [each[label] for each in found if label in each]
        if not own or weight == 0 or max(own) >= SMALL:
            continue
        moving = [share for share in own if share > 0]
        if not moving:
            told.append(f"The loss {label} has no gradient on the images at any logged step: it changed nothing, whatever its weight.")
            continue
        wanted = float(f"{weight * statistics.median((1 - share) / share for share in moving) * WANTED / (1 - WANTED):.2g}")
        told.append(
            f"The loss {label} has less than {100 * SMALL:.0f} % of the gradient on the images at every logged step "
            f"({100 * statistics.median(own):.2g} % at the median), so it changed little. With weight {wanted:g} in the place of "
            f"{weight:g} it would have about a tenth: --set losses.{label}.weight={wanted:g}"
        )
    return told
