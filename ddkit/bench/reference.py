"""Plain loops in the structure of the published distribution matching code: what `ddkit bench` compares with.

Zhao and Bilen's main_DM.py (arXiv 2110.04181): a new network each step; class by class, eagerly, in float32: the class's
images are picked, augmented, embedded, and their mean features compared. Its evaluation trains one network after another
from a DataLoader, augmenting batch by batch, reads loss and accuracy back at every batch, and tests without switching
gradients off. Written anew from that structure, with ddkit's network and augmentation operations; torch's defaults.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ddkit.components import registry
from ddkit.components.base import Augmenter, DataInfo, Model
from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network


class ReferenceStep:
    """One update of the synthetic images by distribution matching, class by class."""

    def __init__(self, model: Model, info: DataInfo, augmenter: Augmenter, real: Tensor, *, ipc: int, batch: int) -> None:
        """`real` (classes, m, C, H, W) are normalised images; at most `batch` of a class enter a step."""
        self.model = model
        self.info = info
        self.augmenter = augmenter
        self.real = real
        self.ipc = ipc
        self.batch = batch
        self.images = torch.randn((info.classes * ipc, *info.shape), device=real.device).requires_grad_()
        self.optimizer = torch.optim.SGD([self.images], lr=1.0, momentum=0.5)
        self.generator = torch.Generator().manual_seed(0)
        self.random = np.random.default_rng(0)
        self.index = 0

    def __call__(self) -> float:
        network = build_network(self.model, self.info, 0, "reference", self.index).to(self.real.device).train().requires_grad_(False)
        self.index += 1
        loss = torch.zeros((), device=self.real.device)
        for label in range(self.info.classes):
            rows = self.random.permutation(self.real.shape[1])[: self.batch]
            real, synthetic = self.real[label][rows], self.images[label * self.ipc : (label + 1) * self.ipc]
            drawn = self.augmenter.sample(self.generator, 1)
            real, synthetic = (self.augmenter.apply(x, {k: v.expand(len(x), -1) for k, v in drawn.items()}) for x in (real, synthetic))
            gap = embed(network, real).detach().mean(0) - embed(network, synthetic).mean(0)
            loss = loss + gap.square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


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
