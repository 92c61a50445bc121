"""What cannot be right of a run that ends without an error, in a sentence each, with what to check or change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

LOWEST, HIGHEST, MOST_OUTSIDE = -1.0, 2.0, 0.05  # pixel units; more of the values beyond are no image any more
ROUNDING = 1e-6  # relative: what float32 sums of the same values may differ by


def constant_losses(lines: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, float]:
    """Returns by label the value of each loss of positive weight that had the same, to rounding, in all lines of the metrics.

    Of a single line it is each loss that was 0.
    """
    found = {}
    for label in (label for label, weight in weights.items() if weight > 0):
        values = [float(line["losses"][label]["raw"]) for line in lines if label in line["losses"]]
        if (len(values) > 1 or values == [0]) and max(values) - min(values) <= ROUNDING * max(map(abs, values)):
            found[label] = values[-1]
    return found


def outside(images: Tensor, lower: str) -> list[str]:
    """Returns what to say of images in pixel units many of whose values are far from any real one; `lower` is the flag that helps."""
    share = float(((images < LOWEST) | (images > HIGHEST)).double().mean())
    if share <= MOST_OUTSIDE:
        return []
    return [
        f"{100 * share:.0f} % of the values of the images have left {LOWEST:g} to {HIGHEST:g} (real ones lie in 0 to 1; the largest is now "
        f"{float(images.abs().max()):,.5g}): the learning rate is too high. Lower it: {lower}"
    ]


def below_random_real(row: Any, tests: int) -> list[str]:
    """Returns what to say of a row of an evaluation, on `tests` images, whose set is worse than random real images beyond the spread.

    The spread is twice the largest of three: both standard deviations, and the one that a difference has by the number of test images.
    """
    mean, real = row.accuracy_mean, row.random_real_mean
    if row.images != "synthetic" or mean is None or real is None:
        return []
    scatter = max(row.accuracy_std or 0.0, row.random_real_std or 0.0, math.sqrt(0.5 / max(1, tests)))
    if real - mean <= 2 * scatter:
        return []
    return [
        f"The set is worse than random real images: {100 * mean:.1f} against {100 * real:.1f} % ({row.model}, {row.protocol}, {row.labels} "
        f"labels). Look at its images and at its losses over the steps; more steps, a smaller learning rate or another loss may help."
    ]
