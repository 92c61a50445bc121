"""Whitening: ZCA of real images, W = (C + eps v I)^(-1/2), C being the covariance of their pixels in 0..1 and v the mean of its diagonal.

It is kept as the directions in which W differs from one number: with fewer images than numbers an image has there are as few of them,
so that a set of 3 x 32 x 32 pixels made of 100 images carries 1.2 MB in the place of the 36 MB of W. Sources: kernel inducing points
(arXiv 2107.13034: eps 0.1 of v), trajectory matching (arXiv 2203.11932: eps 0.1 itself, on pixels in 0..1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ddkit.data.images import Normalisation, blocks, channel_statistics, to_unit
from ddkit.distributed import Ranks
from ddkit.errors import InputError
from ddkit.files import bytes_of, machine_bytes
from ddkit.recipes.tables import DataTable

EPS = 0.1  # of the mean variance of a pixel, as kernel inducing points have it
LEAST = 0.01  # of the regularisation: along directions of less variance W is as for none, within half a percent
BLOCK = 64  # rows that are multiplied at once, always as many, so that an image's bytes do not depend on how many there are
FEW = 200  # images whose covariance is added at once
NAMES = ("whitening.centre", "whitening.vectors", "whitening.gains")  # of the tensors in files


class Whitening:
    """Maps images in pixel units to W (x - centre), and back.

    `centre` (C, H, W) is the mean image, `vectors` (k, C * H * W) are orthonormal rows, `gains` (k + 1,) what W multiplies along each, and
    last along all else; float32 on the CPU. W = gains[-1] (I - V'V) + V' diag(gains[:-1]) V.
    """

    def __init__(self, centre: Tensor, vectors: Tensor, gains: Tensor) -> None:
        self.centre = centre
        self.vectors = vectors
        self.gains = gains
        self._kept: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def taken(cls, tensors: MutableMapping[str, Tensor], shape: tuple[int, ...]) -> Whitening | None:
        """Takes the whitening of images of `shape` (C, H, W) out of the tensors of a file; None if there is none.

        Raises ValueError if its tensors cannot be used.
        """
        found = [tensors[name] for name in NAMES if name in tensors]
        if not found:
            return None
        if len(found) < len(NAMES):
            raise ValueError(f"some of the whitening tensors {', '.join(NAMES)} are missing")
        centre, vectors, gains = found
        rows, numbers = len(gains.flatten()) - 1, math.prod(shape)
        fits = tuple(centre.shape) == shape and tuple(vectors.shape) == (rows, numbers) and gains.ndim == 1 and rows <= numbers
        fits = fits and all(each.dtype == torch.float32 and bool(each.isfinite().all()) for each in found)
        if not fits or not bool((gains > 0).all()):
            raise ValueError(f"the whitening tensors are not finite float32 tensors for images of shape {shape}")
        for name in NAMES:
            del tensors[name]
        return cls(*found)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for a file."""
        return dict(zip(NAMES, (self.centre, self.vectors, self.gains), strict=True))

    @property
    def digest(self) -> str:
        """The sha256 of its tensors."""
        return hashlib.sha256(b"".join(bytes_of(each) for each in self.tensors.values())).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What metadata and manifests tell of it."""
        return {
            "regularisation": float(self.gains[-1]) ** -2,  # eps v, of pixels in 0..1
            "directions": len(self.vectors),
            "bytes": sum(each.nbytes for each in self.tensors.values()),
            "sha256": self.digest,
        }

    def whiten(self, images: Tensor) -> Tensor:
        """Returns W (x - centre) for images x (n, C, H, W) in pixel units, computed in float64; of their type."""
        centre, _, _ = self._on(images.device)
        return self._multiplied(images - centre.to(images.dtype), lambda gains: gains)

    def undo(self, images: Tensor) -> Tensor:
        """Returns images in pixel units from whitened ones; not clipped."""
        centre, _, _ = self._on(images.device)
        return self._multiplied(images, torch.Tensor.reciprocal) + centre.to(images.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._kept:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._kept[device] = self.centre.to(device), self.vectors.to(device, dtype), self.gains.to(device, dtype)
        return self._kept[device]

    def _multiplied(self, images: Tensor, power: Any) -> Tensor:
        _, vectors, gains = self._on(images.device)
        along, rest = power(gains)[:-1], power(gains)[-1]
        found = torch.empty_like(images, memory_format=torch.contiguous_format)
        for source, target in zip(images.split(BLOCK), found.split(BLOCK), strict=True):
            rows = vectors.new_zeros(BLOCK, vectors.shape[1])
            rows[: len(source)] = source.flatten(1)
            rows = rows * rest + ((rows @ vectors.T) * (along - rest)) @ vectors
            target.copy_(rows[: len(source)].view_as(source))
        return found


def normalisation_of(images: Tensor, table: DataTable) -> Normalisation:
    """Returns the channel statistics of images (n, C, H, W) in pixel units, with their whitening if `table` asks for it."""
    return Normalisation(*channel_statistics(images), whitening_of(images, table) if table.whiten else None)


def whitening_key(table: DataTable) -> dict[str, Any]:
    """Returns the settings of the whitening, as a part of a cache key; {} if `table` has none."""
    return {"whiten": [table.whiten_eps, table.whiten_absolute]} if table.whiten else {}


def whitening_of(images: Tensor, table: DataTable) -> Whitening:
    """Returns the ZCA of images (n, C, H, W) in pixel units; raises InputError if there is none, or no memory for it.

    Where `table` leaves whiten_eps open it is 0.1, and s / (1 - s) of the mean variance more: s is the intensity with which Ledoit and Wolf
    (2004) shrink the covariance of so few images, 0 for very many. Computed in one thread, so that its bytes do not
    depend on their number.
    """
    count, numbers = len(images), math.prod(images.shape[1:])
    side = min(count, numbers)
    needed = 8 * (4 * side * side + 2 * side * numbers)
    if needed > machine_bytes():
        raise InputError(
            f"data.whiten: the covariance of {count:,} images of {numbers:,} numbers needs {needed / 2**30:,.0f} GiB, but this machine has "
            f"{machine_bytes() / 2**30:,.0f} GiB of memory. Use fewer images (--pipc) or smaller images.",
            "data.whiten",
        )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        centre = sum((part.double().sum(0) for part in map(to_unit, blocks(images, FEW))), torch.zeros(())) / count
        if count <= numbers:
            rows = (to_unit(images).double() - centre).flatten(1)
            norms = rows.square().sum(1)
            values, own = torch.linalg.eigh(rows @ rows.T / count)
        else:
            covariance, norms = torch.zeros(numbers, numbers, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
            for part in blocks(images, FEW):
                rows = (to_unit(part).double() - centre).flatten(1)
                norms = torch.cat([norms, rows.square().sum(1)])
                covariance += rows.T @ rows / count
            values, own = torch.linalg.eigh(covariance)
        variance = float(norms.sum()) / count / numbers
        if not variance > 1e-12:
            raise InputError(
                f"data.whiten: all {count} images are the same, so they cannot be whitened. Use more images (--pipc).", "data.whiten"
            )
        regular = (table.whiten_eps or EPS) * (1.0 if table.whiten_absolute else variance)
        if table.whiten_eps is None:
            regular += _shrinkage(values, norms, numbers) * variance
        kept = values > LEAST * regular
        vectors = own[:, kept].T
        if count <= numbers:
            vectors = vectors @ rows / (count * values[kept, None]).sqrt()
        gains = torch.cat([values[kept] + regular, torch.tensor([regular], dtype=torch.float64)]).rsqrt()
    finally:
        torch.set_num_threads(before)
    return Whitening(*((each + 0.0).float().contiguous() for each in (centre, vectors, gains)))  # without a -0, as sums of processes are


def _shrinkage(values: Tensor, norms: Tensor, numbers: int) -> float:
    """Returns s / (1 - s) for the intensity s of Ledoit and Wolf, from the eigenvalues and the squared norms of the centred rows.

    Theirs is (1 - s) C + s v I, which is C + s / (1 - s) v I but for a factor. Source: their estimators m, d^2
    and b^2, lemmas 3.2 to 3.4.
    """
    count, mean = len(norms), float(norms.mean()) / numbers
    squares = float(values.square().sum())
    spread = squares / numbers - mean * mean
    error = min((float(norms.square().sum()) / count - squares) / (count * numbers), spread)
    return error / (spread - error) if error < 0.9 * spread else 9.0


def shared(made: Whitening | None, shape: tuple[int, ...], ranks: Ranks) -> Whitening:
    """Returns the main process's whitening in all processes of a run, bit for bit."""
    if ranks.world_size == 1:
        assert made is not None
        return made
    rows = ranks.broadcast(None if made is None else len(made.vectors))
    shapes = (shape, (rows, math.prod(shape)), (rows + 1,))
    own: Mapping[str, Tensor] = made.tensors if made else {name: torch.zeros(size) for name, size in zip(NAMES, shapes, strict=True)}
    return Whitening(*ranks.all_reduce([own[name] for name in NAMES], "whitening"))
