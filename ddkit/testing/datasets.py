"""The conformance suite of datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from ddkit.components.base import DataInfo
from ddkit.testing.suite import Broken, Conformance, check, global_state_is_kept


class DatasetConformance(Conformance):
    """Checks of a dataset. `component` may carry an argument, as in "imagefolder:PATH"."""

    kind = "dataset"
    most: ClassVar[int] = 20  # images that are opened
    directory: ClassVar[str | None] = None  # of datasets that download

    def make(self, info: DataInfo | None = None, **arguments: Any) -> Any:
        return super().make(info, directory=self.directory, **arguments)

    def prepare(self) -> None:
        self.make().labels("train")

    @check
    def test_labels_fit_the_class_names(self) -> None:
        """At least two class names, all different; labels (n,) int64 that fit them; every class has a training image."""
        dataset = self.make()
        names = list(dataset.class_names)
        if len(names) < 2 or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise Broken(f"The dataset '{self.label}' has the class names {names[:5]}; they have to be at least two different words.")
        for split in ("train", "test"):
            labels = dataset.labels(split)
            if labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
                raise Broken(f"The labels of the dataset '{self.label}', split {split}, have to be (n,) int64, n at least 1.")
            if int(labels.min()) < 0 or int(labels.max()) >= len(names):
                raise Broken(f"The labels of the dataset '{self.label}', split {split}, are not all in 0..{len(names) - 1}.")
        if set(dataset.labels("train").tolist()) != set(range(len(names))):
            raise Broken(f"The dataset '{self.label}' has a class without a training image.")

    @check
    def test_images_are_of_the_documented_kind(self) -> None:
        """Images are (1 or 3, H, W), uint8 or float32 in 0..1, one for each index, in both splits."""
        for split in ("train", "test"):
            self._check_images(split)

    def _check_images(self, split: str) -> None:
        dataset = self.make()
        indices = list(range(min(self.most, len(dataset.labels(split)))))
        images = dataset.images(split, indices)
        if len(images) != len(indices):
            raise Broken(f"The dataset '{self.label}' gives {len(images)} images for {len(indices)} indices, split {split}.")
        for image in images:
            if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype not in (torch.uint8, torch.float32):
                raise Broken(
                    f"An image of the dataset '{self.label}' is {tuple(image.shape)} {image.dtype}, not (1 or 3, H, W) uint8 or float32."
                )
            if image.dtype == torch.float32 and not bool(((image >= 0) & (image <= 1)).all()):
                raise Broken(f"A float image of the dataset '{self.label}' has values outside 0..1.")

    @check
    def test_images_come_in_the_order_asked_for(self) -> None:
        """Images come in the order of the indices."""
        dataset = self.make()
        count = min(3, len(dataset.labels("train")))
        forward = dataset.images("train", list(range(count)))
        backward = dataset.images("train", list(range(count))[::-1])
        if not all(torch.equal(one, other) for one, other in zip(forward, list(backward)[::-1], strict=True)):
            raise Broken(f"The dataset '{self.label}' does not give images in the order of the indices.")

    @check
    def test_the_same_every_time(self) -> None:
        """Opened again it has the same labels and the same fingerprint."""
        one, two = self.make(), self.make()
        same = [torch.equal(one.labels(split), two.labels(split)) for split in ("train", "test")]
        if one.fingerprint() != two.fingerprint() or not all(same):
            raise Broken(f"The dataset '{self.label}' is another one when it is opened again (labels or fingerprint).")

    @check
    def test_sources_name_every_image(self) -> None:
        """`sources` gives one name an image, all different."""
        dataset = self.make()
        found = dataset.sources("train", [1, 0])
        if len(found) != 2 or len(set(found)) != 2:
            raise Broken(f"The dataset '{self.label}' gives the sources {found} for two images.")

    @check
    def test_files_are_there(self) -> None:
        """`files` gives the absolute path of a file for each image, in order, or None."""
        found = self.make().files("train", [1, 0])
        if found is not None and (len(found) != 2 or not all(Path(file).is_absolute() and Path(file).is_file() for file in found)):
            raise Broken(f"The dataset '{self.label}' gives the files {found} for two images; each has to be the absolute path of a file.")

    @check
    def test_global_random_state_is_untouched(self) -> None:
        """Opening it and reading images changes no global state."""
        self.make().images("train", [0])
        with global_state_is_kept(f"The dataset '{self.label}'"):
            dataset = self.make()
            dataset.labels("train")
            dataset.images("train", [0])
