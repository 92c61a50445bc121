"""What is said of a finished run: how much each loss moved the images, and what cannot be right, with what to check or change.

The share of a loss is that of its weighted gradient on the images, from the lines of metrics.jsonl.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ddkit.recipes.tables import OptimizerTable, Recipe

if TYPE_CHECKING:
    from torch import Tensor

LOWEST, HIGHEST, MOST_OUTSIDE = -1.0, 2.0, 0.05  # pixel units; more of the values beyond are no image any more
EXPLODED = 10.0  # pixel units: not one value of an image is as large (the largest of some thousand sets, of good settings, is 2.3)
ROUNDING = 1e-6  # relative: what float32 sums of the same values may differ by
SMALL, WANTED = 0.01, 0.1
COARSE = 0.65  # CIFAR-10 in practical-plus has at most 0.28; digits with 0.59 lose 8 points, with 0.7 18 and more
SEAM = 1.5  # times the steps beside it: in photographs and sets made of them 0.5 to 1.3, in grids of them 2.3 to 5

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
            told.append(
                f"The loss {label} had no gradient on the images at any logged step, so it changed nothing, "
                f"and no weight helps. {without(label, weights)}"
            )
            continue
        wanted = float(f"{weight * statistics.median((1 - share) / share for share in moving) * WANTED / (1 - WANTED):.2g}")
        told.append(
            f"The loss {label} had less than {100 * SMALL:.0f} % of the gradient on the images at every logged step "
            f"({100 * statistics.median(own):.2g} % at the median), so it changed little. With weight {wanted:g} instead of "
            f"{weight:g} it would have about 10 %: --set losses.{label}.weight={wanted:g}"
        )
    return told


def without(label: str, weights: Mapping[str, float]) -> str:
    """Returns what to do if a loss teaches nothing: the flag that leaves it out if there are others."""
    others = any(weight > 0 for other, weight in weights.items() if other != label)
    return f"Turn it off: --set losses.{label}.weight=0" if others else "Use another loss, for example --losses dm"


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
    """Returns what to say of images in pixel units with many values, or very large ones, that none has; `lower` is the flag that helps."""
    share = float(((images < LOWEST) | (images > HIGHEST)).double().mean())
    largest = float(images.abs().max())
    if share <= MOST_OUTSIDE and largest <= EXPLODED:
        return []
    return [
        f"{100 * share:.3g} % of the pixel values are outside {LOWEST:g} to {HIGHEST:g} (real images have 0 to 1, the largest value is now "
        f"{largest:,.5g}), so the learning rate is too high. Lower it: {lower}"
    ]


def looks_like_grid(images: Tensor) -> int | None:
    """Returns the largest factor of 2 to 8 if images (n, C, H, W) look like grids of factor x factor images, else None.

    At a seam neighbouring pixels differ more than at the rows and columns on both sides of it. Grids of noise, and of objects on one
    background, show no seams.
    """
    for factor in range(8, 1, -1):
        steps = []
        for axis in (2, 3):
            cell, rest = divmod(images.shape[axis], factor)
            if rest or cell < 4:
                break
            sizes = images.diff(dim=axis).abs().mean([each for each in range(4) if each != axis]).tolist()
            steps += [(sizes[seam], max(sizes[seam - 1], sizes[seam + 1])) for seam in range(cell - 1, len(sizes), cell)]
        else:
            if all(seam > SEAM * beside for seam, beside in steps):
                return factor
    return None


def looks_whitened(images: Tensor) -> bool:
    """Whether images (n, C, H, W) as a file has them look whitened: about half negative, not skewed, neighbours hardly alike, heavy tails.

    Normalised photographs and digits have neighbours that are alike, and kurtosis 2; noise has light tails, kurtosis 3 if it is normal.
    Measured on 10 and 100 images of digits and CIFAR-10, whitened as the public code of kernel inducing points and of trajectory matching
    do: 50 to 60 % negative, skewness up to 0.4, correlation of neighbours 0.04 to 0.67, kurtosis 3.5 to 4.5.
    """
    if (
        not images.is_floating_point()
        or images.ndim != 4
        or min(images.shape[2:]) < 2
        or not 0.3 < float((images < 0).float().mean()) < 0.7
    ):
        return False
    x = images.double() - images.double().mean()
    variance = float(x.square().mean())
    skewness, kurtosis = float((x**3).mean()) / variance**1.5, float((x**4).mean()) / variance**2
    alike = float((x[..., 1:] * x[..., :-1]).mean() + (x[..., 1:, :] * x[..., :-1, :]).mean()) / 2 / variance
    heavy = 3 + max(0.3, 4 * math.sqrt(24 / x.numel()))  # four standard deviations of the kurtosis of so many normal numbers
    return abs(skewness) < 0.7 and alike < 0.75 and kurtosis > heavy


def too_coarse(parametrization: str, lost: float) -> list[str]:
    """Returns what to say where the first images differ from the real ones by the share `lost` of these (root mean squares)."""
    if not lost > COARSE:  # images that are all 0 make it nan
        return []
    return [
        f"The parametrization {parametrization} has too few numbers for these images: the first images differ from the real ones by "
        f"{100 * lost:.0f} % of these (root mean square; photographs in practical-plus by at most 28 %), so networks may learn "
        "little from the set. Use one image in one, in the place of all of your settings of the parametrization: --set "
        "parametrization.use=pixels"
    ]


def for_a_better_set(recipe: Recipe) -> str:
    """Returns what to try if the set of `recipe` is worth nothing: more steps, the usual learning rate or less, the usual start."""
    usual = OptimizerTable().lr
    rate = recipe.optimizer.get("images", OptimizerTable()).lr
    flags = f"--steps {max(100, 10 * recipe.steps)} --set optimizer.images.lr={rate / 10 if rate == usual else usual:g}"
    if recipe.initializer.use == "noise":
        return f"More steps, another learning rate and real images at the start may help: {flags} --init real"
    return f"More steps and another learning rate may help: {flags}"


def below_random_real(row: Any, tests: int, helps: str = "") -> list[str]:
    """Returns what to say of a row of an evaluation, on `tests` images, whose set is worse than random real images beyond the spread.

    `helps` is a sentence on how to make a better set.
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
        f"labels). Look at its images and its loss curves. {helps}"
    ]
