"""The conformance suite of initializers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from ddkit.components.base import InitContext
from ddkit.data.images import Normalisation
from ddkit.nn.embedder import features_of
from ddkit.seeding import generator
from ddkit.testing.suite import Broken, ShapeConformance, changed, check, copies, global_state_is_kept, info_of, noise
from ddkit.testing.world import untrained_teacher


class InitializerConformance(ShapeConformance):
    """Checks of an initializer."""

    kind = "initializer"

    def start(
        self, shape: tuple[int, int, int] = (1, 8, 8), rows: Sequence[int] = (2, 2, 2), real: Sequence[int] = (3, 4, 3)
    ) -> InitContext:
        """Returns what an initializer sees; without real images, and without a teacher, where it does not require them."""
        requires = self.make().requires
        real = real if requires.real else [0] * len(real)
        half = [0.5] * shape[0]
        teacher = untrained_teacher(info_of(shape, len(rows))) if requires.teacher else None
        return InitContext(
            labels=torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)), shape=shape,
            real_images=noise((sum(real), *shape), "real"), real_labels=torch.arange(len(real)).repeat_interleave(torch.tensor(real)),
            generator=lambda label: generator(0, "conformance", "class", label), class_names=info_of(shape, len(rows)).class_names,
            normalisation=Normalisation(half, half), teacher=teacher,
            features=None if teacher is None else lambda images: features_of(teacher.module, images),
        )  # fmt: skip

    def _made(self, start: InitContext) -> Tensor:
        images = self.make()(start)
        wanted = (len(start.labels), *start.shape)
        if not isinstance(images, Tensor) or tuple(images.shape) != wanted or images.dtype != torch.float32:
            what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else repr(images)
            raise Broken(f"The initializer '{self.label}' returns {what}; it has to be float32 images of shape {wanted}.")
        if not bool(images.isfinite().all()):
            raise Broken(f"The initializer '{self.label}' returns images that are not finite.")
        return images

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._made(self.start(shape))

    @check
    def test_one_image_a_class(self) -> None:
        """It works with one image a class."""
        self._made(self.start(rows=(1, 1, 1)))

    @check
    def test_unbalanced_classes(self) -> None:
        """It works where classes have different numbers of images."""
        self._made(self.start(rows=(1, 3, 2), real=(5, 4, 2)))

    @check
    def test_same_seed_same_images(self) -> None:
        """The images are a function of the seed: draws come from `start.generator(label)`."""
        torch.manual_seed(1)
        one = self._made(self.start())
        torch.manual_seed(2)
        if not torch.equal(one, self._made(self.start())):
            raise Broken(f"The initializer '{self.label}' gives other images for the same seed. Draw from start.generator(label) only.")

    @check
    def test_a_class_does_not_depend_on_others(self) -> None:
        """A class that is made alone gets the same images, bit for bit."""
        start = self.start()
        whole = self._made(start)
        rows, real = start.labels == 1, start.real_labels == 1
        alone = msgspec.structs.replace(
            start, labels=start.labels[rows], real_images=start.real_images[real], real_labels=start.real_labels[real]
        )
        if not torch.equal(whole[rows], self._made(alone)):
            raise Broken(
                f"The initializer '{self.label}' gives a class other images when it is made alone: draw from start.generator(label)."
            )

    @check
    def test_inputs_are_unchanged(self) -> None:
        """Labels and real images are as before, also after the result is written to, and so is all global state."""
        start = self.start()
        tensors = {"labels": start.labels, "real images": start.real_images, "real labels": start.real_labels}
        before = copies(tensors)
        with global_state_is_kept(f"The initializer '{self.label}'"):
            images = self._made(start)
        images.add_(1)  # as an optimizer will
        moved = changed(before, tensors)
        if moved:
            raise Broken(f"The initializer '{self.label}' changes {', '.join(moved)}, or returns a view of them: return a copy.")
