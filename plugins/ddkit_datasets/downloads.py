"""torchvision's datasets by name, downloaded on first use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddkit
from ddkit_datasets.arrays import InMemory, Splits


class Torchvision(InMemory):
    """Base of the downloaded datasets; `source` is the name of torchvision's class."""

    source: str
    names: tuple[str, ...]

    @property
    def class_names(self) -> Sequence[str]:
        return self.names

    @cached_property
    def splits(self) -> Splits:  # type: ignore[override]
        """Both splits, downloaded into `directory` (default: ddkit's cache) if they are not there."""
        return {"train": self._load(train=True), "test": self._load(train=False)}

    def _load(self, *, train: bool) -> tuple[Tensor, Tensor]:
        import torchvision.datasets

        folder = Path(self.directory) if self.directory else ddkit.cache_folder() / "datasets"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found: Any = getattr(torchvision.datasets, self.source)(str(folder), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise ddkit.InputError(
                f"The dataset '{self.name}' is not in {folder} and could not be downloaded ({_reason(error)}). Without a network "
                "use --dataset digits, which is installed with ddkit, or your own images with --dataset imagefolder:PATH; "
                "--data-dir names a folder that holds the download already."
            ) from None
        images = torch.as_tensor(found.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(found.targets, dtype=torch.int64)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


class Mnist(Torchvision):
    """MNIST: 70,000 handwritten digits, 28 x 28 grey (torchvision, downloaded on first use)."""

    source = "MNIST"
    mirror = False
    names = tuple(str(digit) for digit in range(10))


class FashionMnist(Torchvision):
    """Fashion-MNIST: 70,000 garments, 28 x 28 grey (torchvision, downloaded on first use)."""

    source = "FashionMNIST"
    names = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Cifar10(Torchvision):
    """CIFAR-10: 60,000 photographs, 32 x 32 RGB (torchvision, downloaded on first use)."""

    source = "CIFAR10"
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
