"""The conformance suite of augmenters."""

from __future__ import annotations

import torch
from torch import Tensor

from ddkit.components.base import Augmenter
from ddkit.seeding import generator
from ddkit.testing.suite import Broken, ShapeConformance, changed, check, copies, global_state_is_kept, info_of, noise


class AugmenterConformance(ShapeConformance):
    """Checks of an augmenter."""

    kind = "augmenter"

    def _applied(self, shape: tuple[int, int, int], rows: int = 5) -> Tensor:
        augmenter: Augmenter = self.make(info_of(shape))
        x = noise((rows, *shape), "augmented")
        found = augmenter.apply(x, augmenter.sample(generator(0, "conformance", "draw"), rows))
        if tuple(found.shape) != tuple(x.shape) or found.dtype != x.dtype or not bool(found.isfinite().all()):
            raise Broken(
                f"The augmenter '{self.label}' makes {tuple(found.shape)} of {tuple(x.shape)}, another type, or values not finite."
            )
        return found

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._applied(shape)

    @check
    def test_one_image(self) -> None:
        """It works with a single image."""
        self._applied((1, 8, 8), rows=1)

    @check
    def test_parameters_have_a_row_each(self) -> None:
        """`sample` and `sample_batch` give tensors with a row for each group or image."""
        augmenter: Augmenter = self.make(info_of())
        for name, drawn in (("sample", augmenter.sample), ("sample_batch", augmenter.sample_batch)):
            for key, value in drawn(generator(0, "conformance", "draw"), 4).items():
                if not isinstance(value, Tensor) or len(value) != 4:
                    raise Broken(f"{name} of the augmenter '{self.label}' gives '{key}' without a row for each of 4 groups.")

    @check
    def test_same_seed_same_draw(self) -> None:
        """A draw is a function of the generator that is passed."""
        augmenter: Augmenter = self.make(info_of())
        draws = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            draws.append(augmenter.sample(generator(0, "conformance", "draw"), 4))
        if changed(draws[0], draws[1]):
            raise Broken(f"The augmenter '{self.label}' draws otherwise from the same generator. Use the generator that it is given.")

    @check
    def test_a_row_depends_on_its_own_parameters_only(self) -> None:
        """Row i of the result depends on row i of the images and of the parameters, wherever it stands."""
        augmenter: Augmenter = self.make(info_of((3, 8, 8)))
        x = noise((5, 3, 8, 8), "augmented")
        drawn = augmenter.sample(generator(0, "conformance", "draw"), 5)
        turned = torch.tensor([3, 1, 4, 0, 2])
        one = augmenter.apply(x, drawn)[turned]
        two = augmenter.apply(x[turned], {key: value[turned] for key, value in drawn.items()})
        if not torch.allclose(one, two, atol=1e-6):
            raise Broken(f"The augmenter '{self.label}' gives a row another result in another place: row i uses row i of each parameter.")

    @check
    def test_rowwise_as_declared(self) -> None:
        """With `rowwise = True`, two batches in one call give what they give apart."""
        augmenter: Augmenter = self.make(info_of((3, 8, 8)))
        if not augmenter.rowwise:
            return
        x = noise((6, 3, 8, 8), "augmented")
        batches = [augmenter.sample_batch(generator(0, "conformance", str(i)), 3) for i in range(2)]
        apart = torch.cat([augmenter.apply(part, drawn) for part, drawn in zip(x.split(3), batches, strict=True)])
        together = augmenter.apply(x, {key: torch.cat([drawn[key] for drawn in batches]) for key in batches[0]})
        if not torch.allclose(apart, together, atol=1e-6):
            raise Broken(f"The augmenter '{self.label}' says rowwise and treats two batches otherwise in one call.")

    @check
    def test_gradients_pass(self) -> None:
        """A finite gradient, not zero, passes to the images."""
        augmenter: Augmenter = self.make(info_of((1, 8, 8)))
        x = noise((8, 1, 8, 8), "augmented").requires_grad_()
        found = augmenter.apply(x, augmenter.sample(generator(0, "conformance", "draw"), 8))
        (gradient,) = torch.autograd.grad(found.square().sum(), x, allow_unused=True)
        if gradient is None or not bool(gradient.any()) or not bool(gradient.isfinite().all()):
            raise Broken(f"No finite gradient passes through the augmenter '{self.label}': it has to be differentiable in the images.")

    @check
    def test_inputs_are_unchanged(self) -> None:
        """Images and parameters are as before, and so is all global state: `apply` draws nothing."""
        augmenter: Augmenter = self.make(info_of())
        x, drawn = noise((4, 1, 8, 8), "augmented"), augmenter.sample(generator(0, "conformance", "draw"), 4)
        tensors = {"images": x, **drawn}
        before = copies(tensors)
        with global_state_is_kept(f"The augmenter '{self.label}'"):
            augmenter.apply(x, drawn)
        if changed(before, tensors):
            raise Broken(f"The augmenter '{self.label}' changes its input: {', '.join(changed(before, tensors))}.")
