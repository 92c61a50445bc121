"""What a step draws but its network: its real images, augmentations and noise, each a function of seed and index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ddkit.components.base import Augmenter, DataInfo
from ddkit.components.guard import blamed
from ddkit.data.images import Normalisation, on_disk, rows_of
from ddkit.distributed import ALONE, Ranks, class_rows
from ddkit.nn.device import to_device
from ddkit.seeding import generator

T = TypeVar("T")


class ViewSpec(NamedTuple):
    augmenter: Augmenter
    noise: float


@dataclass(kw_only=True)
class Draws:
    """The data of a run, and what a step draws from them.

    `real_labels` are ascending and stay on the CPU, as do all draws; images are kept on the device as they come (uint8), those that lie
    on the disk stay there. In a run of several processes `real_labels` are those of all classes and `real_images` those of this one's.
    """

    seed: int
    info: DataInfo
    normalisation: Normalisation
    real_images: Tensor
    real_labels: Tensor
    batch: int
    augmenter: Augmenter
    views: Mapping[str, ViewSpec]
    device: torch.device
    ranks: Ranks = ALONE
    _whitened: Tensor | None = None
    _drawn: dict[tuple[int, str], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own_classes = self.ranks.classes(self.info.classes)
        self.own_real = class_rows(self.real_labels, self.own_classes)
        self.counts = torch.bincount(self.real_labels, minlength=self.info.classes)
        if not on_disk(self.real_images):
            self.real_images = self.real_images.to(self.device)
            if self.normalisation.whitening is not None:  # once: it may cost as much as embedding them
                self._whitened = self.normalisation.normalise(self.real_images)

    def once(self, index: int, purpose: str, make: Callable[[], T]) -> T:
        """Returns what `make` gives for `purpose` at step `index`, made once a step, whatever its chunks."""
        if (index, purpose) not in self._drawn:
            self._drawn = {key: drawn for key, drawn in self._drawn.items() if key[0] == index}
            self._drawn[index, purpose] = make()
        found: T = self._drawn[index, purpose]
        return found

    def real_rows(self, index: int) -> Tensor:
        """Returns the rows of the real images of this step, ascending, at most `batch` of each class, drawn anew where there are more."""
        return self.once(index, "real", lambda: self.rows(index, "real", self.batch))

    def rows(self, index: int, purpose: str, batch: int) -> Tensor:
        """Returns rows of the real images, ascending, at most `batch` of each class, drawn for a purpose at step `index`."""
        count = len(self.real_labels)
        if count == 0 or int(self.counts.max()) <= batch:
            return torch.arange(count)
        keys = torch.rand(count, generator=generator(self.seed, purpose, index), dtype=torch.float64)
        shuffled = (self.real_labels + keys).argsort()  # class by class, in random order within each
        place = torch.arange(count) - (self.counts.cumsum(0) - self.counts)[self.real_labels]
        return shuffled[place < batch].sort().values

    def real_of(self, rows: Tensor) -> Tensor:
        """Returns `rows` (on the CPU) of the real images, which are of this process's classes, normalised, on the device."""
        rows = rows - self.own_real.start
        if self._whitened is not None:
            return self._whitened if len(rows) == len(self._whitened) else self._whitened[to_device(rows, self.device)]
        if on_disk(self.real_images):
            pixels = to_device(rows_of(self.real_images, rows), self.device)
        else:
            pixels = self.real_images if len(rows) == len(self.real_images) else self.real_images[to_device(rows, self.device)]
        return self.normalisation.normalise(pixels)

    def all_real(self, index: int) -> Tensor:
        """Returns the real images of this step of all processes, exchanged once a step."""
        return self.once(index, "all real", lambda: self.gathered(self.real_rows(index)))

    def gathered(self, rows: Tensor) -> Tensor:
        """Returns ascending `rows` (on the CPU) of the real images of all processes, normalised, on the device, exchanged."""
        own = rows[class_rows(self.real_labels[rows], self.own_classes)]
        return self.ranks.all_gather(self.real_of(own), "real images")

    def augmented(self, index: int, x: Tensor, labels: Tensor, *, view: str = "", draw: int = 0) -> Tensor:
        """Returns x (n, C, H, W) under draw `draw` of the augmentation of step `index`, or under that of a view.

        What is drawn for a class is drawn once a step.
        """
        augmenter = self.views[view].augmenter if view else self.augmenter
        purpose = f"view {view}" if view else f"augmentation {draw}" if draw else "augmentation"
        with blamed("augmenter", augmenter):
            drawn = self.once(index, purpose, lambda: augmenter.sample(generator(self.seed, purpose, index), self.info.classes))
            return augmenter.apply(x, {key: value[labels] for key, value in drawn.items()})

    def viewed(self, index: int, name: str, images: Tensor, labels: Tensor) -> Tensor:
        """Returns images (n, C, H, W), of ascending labels (n,) on the CPU, in view `name`: augmented, with noise drawn class by class."""
        spec = self.views.get(name)
        if spec is None:
            return images  # "raw", and "default" where the recipe defines no other
        images = self.augmented(index, images, labels, view=name)
        if spec.noise == 0:
            return images
        noise = [
            torch.randn((rows.stop - rows.start, *self.info.shape), generator=generator(self.seed, "view noise", name, index, label))
            for label, rows in class_slices(labels).items()
        ]
        return images + spec.noise * to_device(torch.cat(noise), images.device).to(images.dtype)


def class_slices(labels: Tensor) -> dict[int, slice]:
    """Returns the rows of each class of ascending labels (n,) on the CPU: asking the device for them would make it wait."""
    classes, counts = labels.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    starts = (ends - counts).tolist()
    return {label: slice(start, end) for label, start, end in zip(classes.tolist(), starts, ends.tolist(), strict=True)}
