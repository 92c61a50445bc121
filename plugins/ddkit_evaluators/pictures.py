"""Evaluators that look at the images instead of training networks: `spectrum` and `memorisation`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

import ddkit

log = logging.getLogger("ddkit")
MOST_REAL = 1000  # real images whose own neighbours are looked for: a quantile needs no more
AT_ONCE, MOST_VALUES = 4096, 4096 * 3 * 32 * 32  # real images, and their values, compared at once, for memory


def looked_at(name: str, details: dict[str, Any]) -> list[ddkit.Evaluation]:
    """Returns the row of an evaluator that trains no network: it has no accuracy, and all that it found is in `details`."""
    row = ddkit.Evaluation(
        evaluator=name, model="-", protocol="-", labels="hard", repeats=1, accuracy_mean=None, accuracy_std=None, details=details
    )
    return [row]


class Spectrum(ddkit.Evaluator):
    """Radial power spectra of the synthetic images and of the accessible real images; no accuracy.

    The row has the share of the power in equal bands of frequency, and the share above 0.25 cycles per pixel. The papers on deep support
    vectors call images with a small such share low-frequency (arXiv 2405.00348, Fig. 3). For white noise of 32 x 32 pixels it is 80 %.
    """

    bins: int = ddkit.option(16, "number of equal bands from 0 to 0.5 cycles per pixel", ge=2, le=256)

    def __call__(
        self, artifact: ddkit.Artifact, data: ddkit.data.EvaluationData, teacher: ddkit.nn.Teacher | None
    ) -> list[ddkit.Evaluation]:
        frequencies, synthetic = ddkit.data.radial_spectrum(artifact.images, self.bins)
        details: dict[str, Any] = {"frequencies": frequencies, "synthetic": synthetic}
        share = ddkit.data.high_frequency_share(artifact.images)
        details["high_frequency_share"], summary = share, f"{100 * share:.1f} % of power is high-frequency"
        if len(data.real_images):
            real = ddkit.data.spread(data.real_images)
            details["real"] = ddkit.data.radial_spectrum(real, self.bins)[1]
            details["real_high_frequency_share"] = ddkit.data.high_frequency_share(real)
            summary += f", of real images {100 * details['real_high_frequency_share']:.1f} %"
        return looked_at(self.name, {"summary": summary, **details})


class Memorisation(ddkit.Evaluator):
    """Distances from synthetic images to accessible real images, and between real images; no accuracy.

    Distances are root mean squares over pixels and channels, in pixel units. Mirrored images count as the same if the dataset declares it.
    An image is close if it is nearer to a real image than 95 % of the real images are to another. A set with close images shows
    pictures that its owner may want to protect, and a synthetic set does not protect them. (A set without
    close images is no proof of protection, for which distances of pixels do not suffice.)
    """

    requires = ddkit.Requires(real=True)

    quantile: float = ddkit.option(0.05, "quantile of the distances between real images below which a synthetic image is close", gt=0, lt=1)

    def __call__(
        self, artifact: ddkit.Artifact, data: ddkit.data.EvaluationData, teacher: ddkit.nn.Teacher | None
    ) -> list[ddkit.Evaluation]:
        if len(data.real_images) < 2:
            raise ddkit.InputError(
                f"{self.recipe_path} needs at least 2 accessible real images, but there are {len(data.real_images)}. Use a larger --pipc."
            )
        real, mirror = data.real_images, data.info.mirror
        found = nearest(artifact.images, real, mirror=mirror)
        chosen = torch.randperm(len(real), generator=ddkit.generator(data.seed, self.name))[:MOST_REAL]
        own = nearest(ddkit.data.to_unit(real[chosen]), real, mirror=mirror, without=chosen)
        limit = float(own.quantile(self.quantile))
        close = int(((found < limit) | (found == 0)).sum())  # a copy is close also where real images have copies among themselves
        if close:
            log.warning(
                "%d of %d synthetic images are nearer to an accessible real image than %g %% of the real ones are to another: "
                "the set does not hide the images that it was made from.",
                close, len(found), 100 * (1 - self.quantile),
            )  # fmt: skip
        ratio = float(found.median() / own.median()) if float(own.median()) > 0 else None
        details = {
            "summary": f"{close} of {len(found)} images are close to a real one",
            "close": close, "quantile": self.quantile, "close_below": limit, "nearest": found.tolist(),
            "nearest_median": float(found.median()), "real_nearest_median": float(own.median()), "ratio": ratio,
        }  # fmt: skip
        return looked_at(self.name, details)


def nearest(images: Tensor, others: Tensor, *, mirror: bool, without: Tensor | None = None) -> Tensor:
    """Returns (n,) the distance of each of images (n, C, H, W) to the nearest of `others` (m, C, H, W): root mean square over C, H and W.

    Images are floats in pixel units, others may be uint8.
    `without` (n,) is the row of `others` that does not count for each image: itself. With `mirror` the mirrored image counts too.
    """
    queries = [images, images.flip(3)] if mirror else [images]
    parts = [_nearest(query.flatten(1), others, without) for query in queries]
    return torch.stack(parts).amin(0) / images[0].numel() ** 0.5


def _nearest(queries: Tensor, others: Tensor, without: Tensor | None) -> Tensor:
    best, start = torch.full((len(queries),), torch.inf), 0
    for block in ddkit.data.blocks(others, max(1, min(AT_ONCE, MOST_VALUES // others[0].numel()))):
        found = torch.cdist(queries, ddkit.data.to_unit(block).flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        if without is not None:
            own = (without >= start) & (without < start + found.shape[1])
            found[own.nonzero().flatten(), without[own] - start] = torch.inf
        best, start = torch.minimum(best, found.amin(1)), start + len(block)
    return best
