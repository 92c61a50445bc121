"""Plain loops: what `ddkit bench` compares with. Eager, float32, class by class, with torch's defaults.

ReferenceStep with the loss dm has the structure of Zhao and Bilen's main_DM.py (arXiv 2110.04181): a new network each step; class by
class, the images are picked, augmented, embedded, and their mean features compared. With gm it has that of their main.py (arXiv
2006.05929). The other losses are straightforward implementations from the papers, without published code. No gradient is computed
that nothing uses. ReferenceEvaluation is the published evaluation: it trains one network after another from a DataLoader, augmenting
batch by batch, reads loss and accuracy back at every batch, and tests without switching gradients off. All is written anew, with
ddkit's networks and augmentation operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from ddkit.components import registry
from ddkit.components.base import Augmenter, DataInfo, Model
from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network


class ReferenceStep:
    """One update of the synthetic images by a plain loop: the sum of `losses`, names of LOSSES with their weights."""

    def __init__(
        self,
        losses: Mapping[str, float],
        model: Model,
        info: DataInfo,
        augmenter: Augmenter,
        teacher: nn.Module,
        real: Tensor,
        *,
        ipc: int,
        batch: int,
    ) -> None:
        """`real` (classes, m, C, H, W) are normalised images; at most `batch` of a class enter a step."""
        self.losses = losses
        self.model = model
        self.info = info
        self.augmenter = augmenter
        self.real = real
        self.ipc = ipc
        self.batch = batch
        self.device = real.device
        self.teacher = teacher
        self.view = registry.create("augmenter", "dsa", {"compose": 6}, data=info)  # of the recipe practical, with its noise
        self.noise = 0.2
        self.real_augmenter = registry.create("augmenter", "dsv", data=info)  # of feature regression
        self.labels = torch.arange(info.classes, device=self.device).repeat_interleave(ipc)
        self.images = torch.randn((info.classes * ipc, *info.shape), device=self.device).requires_grad_()
        self.multipliers = torch.ones(info.classes * ipc, device=self.device).requires_grad_()
        self.optimizer = torch.optim.SGD([self.images], lr=1.0, momentum=0.5)
        self.multiplier_optimizer = torch.optim.Adam([self.multipliers], lr=0.01)
        self.generator = torch.Generator().manual_seed(0)
        self.random = np.random.default_rng(0)
        self.index = 0

    def __call__(self) -> float:
        self._views: list[Tensor] = []
        loss = torch.zeros((), device=self.device)
        for name, weight in self.losses.items():
            loss = loss + weight * LOSSES[name](self)
        self.optimizer.zero_grad()
        self.multiplier_optimizer.zero_grad()
        loss.backward(inputs=[self.images, self.multipliers])
        self.optimizer.step()
        self.multiplier_optimizer.step()
        self.multipliers.data.clamp_(min=0)
        self.index += 1
        return float(loss.detach())

    def own(self, label: int) -> slice:
        """Returns the rows of a class in the synthetic set."""
        return slice(label * self.ipc, (label + 1) * self.ipc)

    def picked(self, label: int) -> Tensor:
        """Returns real images (b, C, H, W) of a class, picked at random."""
        return self.real[label][self.random.permutation(self.real.shape[1])[: self.batch]]

    def pair(self, label: int) -> tuple[Tensor, Tensor]:
        """Returns the real and the synthetic images of a class under one augmentation."""
        drawn = self.augmenter.sample(self.generator, 1)
        real = _augmented(self.augmenter, drawn, self.picked(label))
        return real, _augmented(self.augmenter, drawn, self.images[self.own(label)])

    def network(self, *, gradients: bool) -> nn.Module:
        """Returns the network of this step."""
        return build_network(self.model, self.info, 0, "reference", self.index).to(self.device).train().requires_grad_(gradients)

    def views(self) -> list[Tensor]:
        """Returns the synthetic images of each class as the teacher sees them in this step."""
        if not self._views:
            for label in range(self.info.classes):
                images = _augmented(self.view, self.view.sample(self.generator, 1), self.images[self.own(label)])
                self._views.append(images + self.noise * torch.randn_like(images))
        return self._views


def _augmented(augmenter: Augmenter, drawn: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return augmenter.apply(x, {key: value.expand(len(x), -1) for key, value in drawn.items()})


def distribution_matching(step: ReferenceStep) -> Tensor:
    """Returns the sum over classes of the squared distance of mean features."""
    network = step.network(gradients=False)
    loss = torch.zeros((), device=step.device)
    for label in range(step.info.classes):
        real, synthetic = step.pair(label)
        gap = embed(network, real).mean(0) - embed(network, synthetic).mean(0)
        loss = loss + gap.square().sum()
    return loss


def primal(step: ReferenceStep) -> Tensor:
    """Returns the teacher's mean cross-entropy on the synthetic images."""
    step.teacher.requires_grad_(False)
    loss = torch.zeros((), device=step.device)
    for label, images in enumerate(step.views()):
        loss = loss + cross_entropy(step.teacher(images), step.labels[step.own(label)])
    return loss / step.info.classes


def stationarity(step: ReferenceStep) -> Tensor:
    """Returns 1 - cosine of the teacher's parameters and -sum_i lambda_i grad L_i over the whole set."""
    parameters = list(step.teacher.requires_grad_(True).parameters())
    losses = cross_entropy(step.teacher(torch.cat(step.views())), step.labels, reduction="none")
    gradients = torch.autograd.grad((step.multipliers * losses).sum(), parameters, create_graph=True)
    theta = torch.cat([each.detach().flatten() for each in parameters])
    return 1 + cosine_similarity(theta, torch.cat([each.flatten() for each in gradients]), dim=0)


def gradient_matching(step: ReferenceStep) -> Tensor:
    """Returns the sum over classes, layers and output channels of 1 - cosine of the network's gradients."""
    network = step.network(gradients=True)
    parameters = list(network.parameters())
    loss = torch.zeros((), device=step.device)
    for label in range(step.info.classes):
        real, synthetic = step.pair(label)
        answers = torch.full((len(real),), label, device=step.device)
        wanted = torch.autograd.grad(cross_entropy(network(real), answers), parameters)
        value = cross_entropy(network(synthetic), step.labels[step.own(label)])
        found = torch.autograd.grad(value, parameters, create_graph=True)
        for a, b in zip(wanted, found, strict=True):
            if a.ndim > 1:  # biases and norms do not count
                norms = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
                loss = loss + (1 - (a * b).flatten(1).sum(1) / (norms + 1e-6)).sum()
    return loss


def feature_regression(step: ReferenceStep) -> Tensor:
    """Returns the squared error, on real images, of ridge regression on the features of the synthetic ones; the mean over images."""
    network = step.network(gradients=False)
    classes = step.info.classes
    real = torch.cat([step.picked(label) for label in range(classes)])
    answers = torch.arange(classes, device=step.device).repeat_interleave(len(real) // classes)
    real = step.real_augmenter.apply(real, step.real_augmenter.sample_batch(step.generator, len(real)))
    images = step.augmenter.apply(step.images, step.augmenter.sample_batch(step.generator, len(step.images)))
    queries = embed(network, real)
    features = embed(network, images)
    wanted = one_hot(answers, classes) - 1 / classes
    targets = one_hot(step.labels, classes) - 1 / classes
    kernel = (features @ features.T).double()
    ridge = 0.001 * kernel.diagonal().mean() * torch.eye(len(kernel), device=step.device)
    found = (queries @ features.T).double() @ torch.linalg.solve(kernel + ridge, targets.double())
    return (found - wanted).square().sum(1).mean().float()


LOSSES: dict[str, Callable[[ReferenceStep], Tensor]] = {
    "dm": distribution_matching,
    "dkkt-primal": primal,
    "dkkt-stationarity": stationarity,
    "gm": gradient_matching,
    "feature-regression": feature_regression,
}


class ReferenceEvaluation:
    """Trains one network on a labelled set and tests it."""

    def __init__(self, model: Model, info: DataInfo, augmenter: Augmenter, images: Tensor, labels: Tensor, test: TensorDataset) -> None:
        self.model = model
        self.info = info
        self.augmenter = augmenter
        self.train = DataLoader(TensorDataset(images, labels), batch_size=256, shuffle=True)
        self.test = DataLoader(test, batch_size=256)
        self.device = images.device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, index: int, epochs: int) -> float:
        """Returns the test accuracy of network `index` after `epochs` passes."""
        network = build_network(self.model, self.info, 0, "reference", index).to(self.device).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for x, y in self.train:
                self._pass(network, self.augmenter.apply(x, self.augmenter.sample_batch(self.generator, len(x))), y, optimizer)
        network.eval()
        return sum(self._pass(network, x.to(self.device), y.to(self.device), None) for x, y in self.test) / len(self.test.dataset)  # type: ignore[arg-type]

    @staticmethod
    def _pass(network: torch.nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> int:
        logits = network(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        right = int((logits.detach().cpu().numpy().argmax(-1) == y.cpu().numpy()).sum())
        _ = float(loss.detach()) * len(y)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return right


def field_components(info: DataInfo) -> tuple[Model, Augmenter]:
    """Returns the field's standard network and augmentation."""
    return registry.create("model", "convnet", data=info), registry.create("augmenter", "dsa", data=info)
