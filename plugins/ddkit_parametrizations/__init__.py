"""How images are made of what a set stores: of itself, of a grid, of low frequencies, of bases and coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

import ddkit

Shape = tuple[int, int, int]


class Pixels(ddkit.Parametrization):
    """The set stores the images themselves."""

    stores_images = True
    linear = True

    def encode(self, images: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        return images

    def decode(self, stored: Tensor, shape: Shape, shared: Mapping[str, Tensor]) -> Tensor:
        return stored


class Grid(ddkit.Parametrization):
    """A stored image is a grid of factor x factor images, each enlarged bilinearly to the full size.

    So a set of ipc images per class trains networks with more, coarser images: the multi-formation of Kim et al., Dataset Condensation via
    Efficient Synthetic-Data Parameterization, ICML 2022, arXiv 2205.14959, Section 4. Initial images are reduced (antialiased), which
    is near the least-squares solution, but not equal to it.
    """

    stores_images = True
    linear = True
    factor: int = ddkit.option(2, "number of images along each side of a stored image, a divisor of height and width", ge=1, le=8)

    @property
    def per_row(self) -> int:
        return self.factor**2

    def check(self, shape: Shape) -> None:
        _, height, width = shape
        if height % self.factor or width % self.factor:
            raise ddkit.InputError(
                f"parametrization.factor = {self.factor} cuts an image into {self.factor} x {self.factor} equal parts, but the images have "
                f"{height} x {width} pixels. Use a divisor of both (1 for no grid), or, for a new run, another data.size.",
                "parametrization.factor",
            )

    def encode(self, images: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        if self.factor == 1:
            return images
        return torch.stack([ddkit.data.grid(parts, self.factor) for parts in images.split(self.per_row)])

    def decode(self, stored: Tensor, shape: Shape, shared: Mapping[str, Tensor]) -> Tensor:
        return enlarged_parts(stored, self.factor)


def enlarged_parts(images: Tensor, factor: int) -> Tensor:
    """Returns (n * factor², C, H, W): the parts of each of the images (n, C, H, W), row by row, enlarged bilinearly to H x W.

    Differentiable, and affine in the images, so that it does not matter whether they are normalised. factor 1 changes nothing.
    """
    if factor == 1:
        return images
    count, channels, height, width = images.shape
    cells = images.view(count, channels, factor, height // factor, factor, width // factor)
    parts = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)
    return functional.interpolate(parts, (height, width), mode="bilinear", align_corners=False)


class Fourier(ddkit.Parametrization):
    """The set stores the lowest frequencies of an image, so that several images share the numbers of one.

    A stored row has, of each channel, the height * width / images (rounded down) lowest coefficients of the orthonormal cosine transform
    (DCT-II) of one image; the others are 0. Initial images are encoded as their coefficients (least squares). Shin, Shin and Moon,
    Frequency Domain-based Dataset Distillation, NeurIPS 2023, arXiv 2311.08819, keep for each class the coefficients whose variance over
    its initial images is largest, and do not count the list of their positions; here all classes keep the same, without a list.

    `luma` stores brightness and the differences between channels in the place of channels, and has more coefficients for brightness, as
    JPEG does: photographs have most of their detail in it. Brightness has no more coefficients than pixels, so of two images in one it has
    at most two thirds of the numbers. For images of one channel `luma` has no effect.
    """

    linear = True
    images: int = ddkit.option(4, "number of images that share the numbers of one stored image", ge=1)
    luma: float = ddkit.option(
        0.0, "share of the numbers that is for brightness, the mean of the channels; 0: as many per channel", ge=0, lt=1
    )

    def images_per_class(self, ipc: int) -> int:
        return ipc * self.images

    def check(self, shape: Shape) -> None:
        if shape[1] * shape[2] < self.images:
            raise ddkit.InputError(
                f"parametrization.images = {self.images}: an image of {shape[1]} x {shape[2]} pixels has {shape[1] * shape[2]} "
                "coefficients per channel, and each image that shares them needs at least one. Use fewer images.",
                "parametrization.images",
            )

    def encode(self, images: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        places, rows, columns = self._kept((images.shape[1], images.shape[2], images.shape[3]), images)
        mixed = opponents(images.shape[1], images.device, images.dtype) @ images.flatten(2) if self.luma else images
        return (rows @ mixed.view(images.shape) @ columns.T).flatten(1)[:, places]

    def decode(self, stored: Tensor, shape: Shape, shared: Mapping[str, Tensor]) -> Tensor:
        places, rows, columns = self._kept(shape, stored)
        spectrum = stored.new_zeros((len(stored), shape[0] * len(rows) * len(columns))).index_copy(1, places, stored.flatten(1))
        mixed = rows.T @ spectrum.unflatten(1, (shape[0], len(rows), len(columns))) @ columns
        return (opponents(shape[0], stored.device, stored.dtype).T @ mixed.flatten(2)).view(mixed.shape) if self.luma else mixed

    def _kept(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels, pixels = shape[0], shape[1] * shape[2]
        counts = [pixels // self.images] * channels
        if self.luma and channels > 1:
            others, total = channels - 1, sum(counts)
            brightness = min(max(1, round(self.luma * total)), total - others, pixels)
            each = min((total - brightness) // others, pixels)
            counts = [min(total - others * each, pixels), *[each] * others]
        return lowest(shape[1], shape[2], tuple(counts), like.device, like.dtype)


@cache
def opponents(channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns an orthonormal matrix (channels, channels): the mean of all channels, then how each differs from the mean of those before."""
    found = torch.ones(channels, channels, dtype=torch.float64).tril().roll(1, 0)  # row 0: ones, row k: k ones
    found -= torch.diag(torch.arange(channels, dtype=torch.float64))
    return (found / found.norm(dim=1, keepdim=True)).to(device, dtype)


class Bases(ddkit.Parametrization):
    """Several images are combinations of fewer, smaller stored images, the bases.

    A stored row has the numbers of `pooled` images: the values of its bases, then the coefficients (images, bases). The bases are as large
    as the budget allows, with the proportions of the images, and are enlarged by their cosine waves. Initial images are encoded by least
    squares: the largest singular vectors. The combinations are those of Deng and Russakovsky, Remember the Past, NeurIPS 2022, arXiv
    2206.02916, Section 3, in which all classes share the bases; here only the images of a row share them, so that classes are independent.

    `decoder` adds a convolution that all classes share, instead of the hallucinators of Liu et al., Dataset Distillation via Factorization,
    NeurIPS 2022, arXiv 2210.16774, which are larger. It has a 3 x 3 kernel between all channels, and a bias for each. It starts as the
    identity. Kernel and biases are stored in tenths, so that they change more slowly than pixels, in addition to the budget.
    """

    images: int = ddkit.option(4, "number of images made from the numbers of one stored image", ge=1)
    bases: int = ddkit.option(2, "number of bases that replace one stored image, at most as many as `images`", ge=1)
    pooled: int = ddkit.option(
        1, "number of stored images that share their bases, a divisor of ipc; ipc itself shares them in the whole class", ge=1
    )
    decoder: bool = ddkit.option(False, "whether the images go through a last convolution that all classes share")

    @property
    def per_row(self) -> int:
        return self.images * self.pooled

    def images_per_class(self, ipc: int) -> int:
        if ipc % self.pooled:
            raise ddkit.InputError(
                f"parametrization.pooled = {self.pooled} is not a divisor of ipc = {ipc}. "
                f"Use a divisor, such as {math.gcd(self.pooled, ipc)}.",
                "parametrization.pooled",
            )
        return ipc * self.images

    def check(self, shape: Shape) -> None:
        if self.bases > self.images:
            raise ddkit.InputError(
                f"parametrization.bases = {self.bases}: {self.images} images (parametrization.images) need at most as many bases. "
                "Use fewer bases, or more images.",
                "parametrization.bases",
            )
        if shape[0] * math.prod(self._size(shape)) < self.bases * self.pooled:
            raise ddkit.InputError(
                f"parametrization.bases = {self.bases}: an image of {shape[1]} x {shape[2]} pixels has too few numbers for these bases "
                f"and their coefficients for {self.per_row} images. Use fewer bases or images.",
                "parametrization.bases",
            )

    def shared(self, shape: Shape) -> Mapping[str, Tensor]:
        channels = shape[0]
        return {"decoder": torch.zeros(channels, channels * 9 + 1)} if self.decoder else {}

    def encode(self, images: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        shape = (images.shape[1], images.shape[2], images.shape[3])
        (rows, columns), count = self._enlarging(shape, images), self.bases * self.pooled
        shrunk = rows.T @ images @ columns * (rows.shape[1] * columns.shape[1] / math.prod(shape[1:]))  # waves are orthogonal
        left, sizes, right = torch.linalg.svd(shrunk.unflatten(0, (-1, self.per_row)).flatten(2), full_matrices=False)
        scale = math.sqrt(self.per_row)  # so that coefficients are about 1, and bases as large as images
        bases, coefficients = sizes[:, :count, None] * right[:, :count] / scale, left[:, :, :count] * scale
        return torch.cat([bases.flatten(1), coefficients.flatten(1)], 1)

    def decode(self, stored: Tensor, shape: Shape, shared: Mapping[str, Tensor]) -> Tensor:
        (rows, columns), count = self._enlarging(shape, stored), self.bases * self.pooled
        bases, coefficients = stored.split([stored.shape[1] - self.per_row * count, self.per_row * count], 1)
        small = coefficients.unflatten(1, (-1, count)) @ bases.unflatten(1, (count, -1))
        made = rows @ small.flatten(0, 1).unflatten(1, (shape[0], *self._size(shape))) @ columns.T
        if not self.decoder:
            return made
        kernel, level = (shared["decoder"] / 10).split([shape[0] * 9, 1], 1)
        return made + functional.conv2d(made, kernel.view(shape[0], shape[0], 3, 3), level[:, 0], padding=1)

    def _size(self, shape: Shape) -> tuple[int, int]:
        """Returns the height and width of a base."""
        room = (math.prod(shape) / self.bases - self.per_row) / math.prod(shape)  # as a share of an image
        side = math.sqrt(max(room, 0))
        return int(shape[1] * side + 1e-9), int(shape[2] * side + 1e-9)

    def _enlarging(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the matrices (size of an image, size of a base) that enlarge a base along its height and its width."""
        height, width = self._size(shape)
        return enlarging(height, shape[1], like.device, like.dtype), enlarging(width, shape[2], like.device, like.dtype)


@cache
def enlarging(small: int, large: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the matrix (large, small) that enlarges `small` values to `large` by their cosine waves; even values stay as they are."""
    return (math.sqrt(large / small) * waves(small, large).T @ waves(small, small)).to(device, dtype)


@cache
def lowest(height: int, width: int, counts: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the places of the lowest frequencies, and the waves (a, height) and (b, width).

    The places are those in as many matrices (a, b) as there are counts, one after the other and row by row, of a count of frequencies in
    each. Frequency (u, v) has u / height and v / width half waves a pixel; the length of that vector orders them, and u where it is equal.
    """
    u, v = torch.arange(height, dtype=torch.float64)[:, None] / height, torch.arange(width, dtype=torch.float64) / width
    order = (u.square() + v.square()).flatten().argsort(stable=True)[: max(counts)]
    down, across = order // width, order % width
    rows, columns = (waves(int(side.max()) + 1, size).to(device, dtype) for side, size in ((down, height), (across, width)))
    size = len(rows) * len(columns)
    places = [(down * len(columns) + across)[:count] + number * size for number, count in enumerate(counts)]
    return torch.cat(places).to(device), rows, columns


def waves(count: int, pixels: int) -> Tensor:
    """Returns the `count` lowest waves (count, pixels) of the orthonormal DCT-II, float64."""
    frequency = torch.arange(count, dtype=torch.float64)[:, None]
    found = (math.pi / pixels * frequency * (torch.arange(pixels, dtype=torch.float64) + 0.5)).cos() * math.sqrt(2 / pixels)
    found[0] /= math.sqrt(2)
    return found
