"""Real data: `digits` (offline), torchvision's `mnist`, `fashion-mnist`, `cifar10`, and the user's own folders and arrays."""

from __future__ import annotations

from ddkit_datasets.arrays import Digits, Npz
from ddkit_datasets.downloads import Cifar10, FashionMnist, Mnist
from ddkit_datasets.folder import ImageFolder

__all__ = ["Cifar10", "Digits", "FashionMnist", "ImageFolder", "Mnist", "Npz"]
