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

FINE_LABELS = (  # of CIFAR-100, in the order of its labels
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish "
    "forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle "
    "mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine "
    "possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
    "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree "
    "wolf woman worm"
)


class Torchvision(InMemory):
    """Base of the downloaded datasets; `source` is the name of torchvision's class, `labelled` of its attribute with the labels."""

    source: str
    names: tuple[str, ...]
    labelled = "targets"

    @property
    def class_names(self) -> Sequence[str]:
        return self.names

    @cached_property
    def splits(self) -> Splits:  # type: ignore[override]
        """Both splits, downloaded into `directory` (default: ddkit's cache) if they are not there."""
        return {"train": self._load(train=True), "test": self._load(train=False)}

    def _load(self, *, train: bool) -> tuple[Tensor, Tensor]:
        import torchvision.datasets

        folder = Path(self.directory) if self.directory else ddkit.data.cache_folder() / "datasets"
        try:
            folder.mkdir(mode=0o777 if self.directory else 0o700, parents=True, exist_ok=True)
            found: Any = getattr(torchvision.datasets, self.source)(str(folder), download=True, **self._split(train))
        except (OSError, RuntimeError) as error:
            raise ddkit.InputError(
                f"The dataset '{self.name}' is not in {folder} and could not be downloaded ({_reason(error)}). Without a network "
                "use --dataset digits, which is installed with ddkit, or your own images with --dataset imagefolder:PATH; "
                "--data-dir names a folder that holds the download already."
            ) from None
        images = torch.as_tensor(found.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(getattr(found, self.labelled), dtype=torch.int64)

    @staticmethod
    def _split(train: bool) -> dict[str, Any]:
        """Returns the argument by which torchvision's class knows the split."""
        return {"train": train}


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


class Svhn(Torchvision):
    """SVHN: 99,289 house numbers in photographs, 32 x 32 RGB (torchvision, downloaded on first use); without the extra images."""

    source = "SVHN"
    mirror = False
    labelled = "labels"
    names = tuple(str(digit) for digit in range(10))

    @staticmethod
    def _split(train: bool) -> dict[str, Any]:
        return {"split": "train" if train else "test"}


class Cifar100(Torchvision):
    """CIFAR-100: 60,000 photographs of 100 classes, 32 x 32 RGB (torchvision, downloaded on first use)."""

    source = "CIFAR100"
    names = tuple(FINE_LABELS.split())
