"""The conformance suite of models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network
from ddkit.testing.suite import Broken, ShapeConformance, changed, check, info_of, noise


class ModelConformance(ShapeConformance):
    """Checks of a model."""

    kind = "model"
    three, oblong = (3, 32, 32), (3, 16, 24)

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._logits(shape)

    def _network(self, shape: tuple[int, int, int], purpose: str = "network") -> nn.Module:
        info = info_of(shape)
        return build_network(self.make(info), info, 0, purpose)

    def _logits(self, shape: tuple[int, int, int], rows: int = 2) -> Tensor:
        found = self._network(shape).eval()(noise((rows, *shape), "x").requires_grad_())
        if not isinstance(found, Tensor) or tuple(found.shape) != (rows, 3) or not bool(found.isfinite().all()):
            raise Broken(f"A network of the model '{self.label}' does not map {(rows, *shape)} to finite logits of shape {(rows, 3)}.")
        return found

    @check
    def test_one_image(self) -> None:
        """A network maps a single image to finite logits."""
        self._logits((1, 8, 8), rows=1)

    @check
    def test_draws_its_weights_from_the_default_generator(self) -> None:
        """The same state of torch's default generator gives the same weights, another state others."""
        states = [self._network((1, 8, 8), purpose).state_dict() for purpose in ("one", "one", "two")]
        if changed(states[0], states[1]):
            raise Broken(f"The model '{self.label}' gives other weights for the same state of torch's default generator.")
        if states[0] and not changed(states[0], states[2]):
            raise Broken(f"The model '{self.label}' gives the same weights for every draw; each network has to be a fresh one.")

    @check
    def test_features_have_a_row_an_image(self) -> None:
        """The features, those of `embed` or the input of the last linear layer, have shape (n, d)."""
        features = embed(self._network((1, 8, 8)).eval(), noise((3, 1, 8, 8), "x"))
        if features.ndim != 2 or len(features) != 3:
            raise Broken(f"The features of the model '{self.label}' have shape {tuple(features.shape)}, not (3, d).")

    @check
    def test_gradients_reach_images_and_parameters(self) -> None:
        """The logits depend on the images and on every parameter."""
        network, x = self._network((1, 8, 8)), noise((2, 1, 8, 8), "x").requires_grad_()
        wanted = [x, *network.parameters()]
        parts = torch.autograd.grad(network(x).square().sum(), wanted, allow_unused=True)
        if parts[0] is None or any(part is None for part in parts[1:]):
            raise Broken(f"A network of the model '{self.label}' has parameters, or an input, that its logits do not depend on.")

    @check
    def test_state_survives_save_and_load(self) -> None:
        """A state dict carries everything: a network that loads it gives the same logits."""
        one, two = self._network((1, 8, 8), "one").eval(), self._network((1, 8, 8), "two").eval()
        two.load_state_dict(one.state_dict())
        x = noise((2, 1, 8, 8), "x")
        if not torch.equal(one(x), two(x)):
            raise Broken(f"A network of the model '{self.label}' is another one after its state dict was loaded: register every tensor.")
