"""Real images that stand for their class: `kmeans`, `herding` and `k-center`, on pixels or on the teacher's features."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

import ddkit
from ddkit_initializers import classes

Points = NDArray[np.float64]  # (m, d): a row an image


def herd(points: Points, count: int) -> list[int]:
    """Returns `count` rows whose means, one added after the other, stay nearest to the mean of all.

    Row k is the argmin over those left of || mean - (x + sum of the rows before) / k ||. Source: Welling, "Herding dynamical weights
    to learn" (ICML 2009), as in Rebuffi et al., iCaRL, arXiv 1611.07725, Algorithm 4.

    >>> herd(np.array([[0.0], [1.0], [5.0]]), 2)
    [1, 2]
    """
    mean, total = points.mean(0), np.zeros(points.shape[1])
    chosen: list[int] = []
    for number in range(1, count + 1):
        distance = np.square(number * mean - total - points).sum(1)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
        total = total + points[chosen[-1]]
    return chosen


def farthest(points: Points, count: int) -> list[int]:
    """Returns `count` rows: the one nearest to the mean, then always the one farthest from all before it.

    The greedy 2-approximation of the k-center problem; source: Sener and Savarese, arXiv 1708.00489, Algorithm 1.

    >>> farthest(np.array([[0.0], [1.0], [5.0]]), 3)
    [1, 2, 0]
    """
    chosen = [int(np.square(points - points.mean(0)).sum(1).argmin())]
    distance = np.square(points - points[chosen[0]]).sum(1)
    while len(chosen) < count:
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(1))
    return chosen


def central(points: Points, count: int, seed: int, *, restarts: int) -> list[int]:
    """Returns `count` rows: of each of as many k-means clusters the member nearest to its centre.

    Where rows are equal there may be fewer clusters; what is missing is the lowest rows left. scikit-learn's KMeans, on one thread, as
    the order in which threads add up is not fixed.
    """
    if count == len(points):
        return list(range(count))
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        found = KMeans(count, n_init=restarts, random_state=seed).fit(points)
    distance = np.square(points - found.cluster_centers_[found.labels_]).sum(1)
    members = [np.flatnonzero(found.labels_ == cluster) for cluster in range(count)]
    chosen = [int(rows[distance[rows].argmin()]) for rows in members if len(rows)]
    return chosen + [row for row in range(len(points)) if row not in chosen][: count - len(chosen)]


class Coreset(ddkit.Initializer):
    """Base of those that choose accessible real images of a class by their features, in the images' own order."""

    features: Literal["pixels", "teacher"] = ddkit.option(
        "pixels", "values that are compared: normalised pixels, or features of the teacher"
    )

    def requires(self) -> ddkit.Requires:
        return ddkit.Requires(real=True, teacher=self.features == "teacher")

    def needed(self, ipc: int) -> int:
        return ipc

    def choose(self, points: Points, count: int, generator: Generator) -> list[int]:
        """Returns `count` different rows of points (m, d)."""
        raise NotImplementedError

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        parts = []
        for each in classes(start):
            if self.features == "pixels":
                points = each.images.flatten(1)
            else:
                assert start.features is not None
                points = start.features(each.images)
            chosen = torch.tensor(self.choose(points.double().numpy(), each.ipc, start.generator(each.label))).sort().values
            parts.append(each.take(chosen))
        return torch.cat(parts)


class Herding(Coreset):
    """Accessible real images whose mean follows the class mean: herding, as in iCaRL (arXiv 1611.07725).

    Greedy and without a random draw: each chosen image moves the mean of the chosen images nearest to the mean of the class.
    """

    def choose(self, points: Points, count: int, generator: Generator) -> list[int]:
        return herd(points, count)


class KCenter(Coreset):
    """Accessible real images far apart from each other: greedy k-center (Sener and Savarese, arXiv 1708.00489).

    The first image is nearest to the class mean, and each next one is farthest from all before it. There is no random draw.
    """

    def choose(self, points: Points, count: int, generator: Generator) -> list[int]:
        return farthest(points, count)


class KMeans(Coreset):
    """Accessible real images in the middle of k-means clusters of their class, one per cluster.

    Uses KMeans of scikit-learn with a cluster for each image of the class, and takes the member nearest to the centre of each cluster.
    """

    restarts: int = ddkit.option(10, "number of runs of k-means, of which the best is used", ge=1)

    def choose(self, points: Points, count: int, generator: Generator) -> list[int]:
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        return central(points, count, seed, restarts=self.restarts)
