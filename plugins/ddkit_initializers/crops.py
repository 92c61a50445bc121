"""`typical-crops`: the crops of real images that the teacher is surest of."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

import ddkit
from ddkit_initializers import Class, classes


def lowest(losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the images (count,) whose best crop has the lowest of losses (crops, images), lowest first, and their crops (count,).

    >>> lowest(torch.tensor([[3.0, 1.0, 5.0], [2.0, 4.0, 0.0]]), 2)
    (tensor([2, 1]), tensor([1, 0]))
    """
    best, crop = losses.min(0)
    images = best.argsort(stable=True)[:count]
    return images, crop[images]


def cropped(image: Tensor, numbers: Tensor, size: tuple[int, int], smallest: float) -> Tensor:
    """Returns a crop of an image (C, H, W), of its proportions, resized to `size`: bilinear, antialiased.

    numbers (3,), uniform in [0, 1), are where its share of the area lies between `smallest` and 1, and its place from top and left.
    """
    share, down, across = numbers.tolist()
    side = math.sqrt(smallest + (1 - smallest) * share)
    height, width = (max(1, round(each * side)) for each in image.shape[1:])
    top, left = int(down * (image.shape[1] - height + 1)), int(across * (image.shape[2] - width + 1))
    part = image[None, :, top : top + height, left : left + width]
    return functional.interpolate(part, size, mode="bilinear", antialias=True)[0]


class TypicalCrops(ddkit.Initializer):
    """Crops of accessible real images on which the teacher is most confident, one per image; `factor` puts several into one picture.

    From up to `candidates` images of a class, `crops` random crops each are taken. Each image keeps its crop with the lowest cross-entropy,
    and the crops with the lowest values make the set. A crop that is smaller than an image is tested in the middle of the mean image.

    Source: Sun et al., On the Diversity and Realism of Distilled Dataset, CVPR 2024, arXiv 2312.03526, Section 4.2, and its public code.
    """

    factor: int = ddkit.option(1, "number of crops along each side of a picture", ge=1)
    crops: int = ddkit.option(5, "number of random crops per image, of which the best is used", ge=1)
    candidates: int = ddkit.option(300, "number of images per class that are tried, at least as many as the set needs", ge=1)
    smallest: float = ddkit.option(0.08, "smallest share of an image's area in a crop", gt=0, le=1)

    requires = ddkit.Requires(real=True, teacher=True)

    def needed(self, ipc: int) -> int:
        return ipc * self.factor**2

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        height, width = start.shape[1:]
        pictures = []
        for each in classes(start):
            chosen = self._chosen(each, (max(1, height // self.factor), max(1, width // self.factor)))
            pictures += [self._picture(chosen[number :: each.ipc], (height, width)) for number in range(each.ipc)]
        return torch.stack(pictures)

    def _picture(self, parts: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns a picture (C, *size) of factor * factor crops, row by row."""
        rows = [torch.cat(list(row), 2) for row in parts.split(self.factor)]
        return functional.interpolate(torch.cat(rows, 1)[None], size)[0]  # nearest; a side may be no multiple of the factor

    def _chosen(self, each: Class, size: tuple[int, int]) -> Tensor:
        """Returns the crops (ipc * factor², C, *size) of a class, the surest first."""
        needed, draws = self.needed(each.ipc), each.start.generator(each.label)
        images = each.take(torch.randperm(len(each.rows), generator=draws)[: max(self.candidates, needed)])
        numbers = torch.rand((self.crops, len(images), 3), generator=draws, dtype=torch.float64)
        losses = torch.stack([self._losses(each, images, own, size) for own in numbers])
        return torch.stack(
            [cropped(images[row], numbers[crop, row], size, self.smallest) for row, crop in zip(*lowest(losses, needed), strict=True)]
        )

    def _losses(self, each: Class, images: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the teacher's cross-entropy (n,) of a crop of each image (n, C, H, W), in the middle of an image of full size."""
        parts = torch.stack([cropped(image, own, size, self.smallest) for image, own in zip(images, numbers, strict=True)])
        left, top = (images.shape[3] - size[1]) // 2, (images.shape[2] - size[0]) // 2
        padded = functional.pad(parts, (left, images.shape[3] - size[1] - left, top, images.shape[2] - size[0] - top))
        teacher = each.start.teacher
        device = next(teacher.module.parameters()).device
        with torch.no_grad():
            logits = torch.cat([teacher.logits(part.to(device)).cpu() for part in padded.split(256)])
        return functional.cross_entropy(logits, torch.full((len(images),), each.label), reduction="none")
