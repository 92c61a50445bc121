"""Real data: `digits` (offline), those of torchvision (`mnist`, `svhn`, `cifar10`, ...), and the user's own folders, arrays and objects."""

from __future__ import annotations

from ddkit_datasets.arrays import Cifar10, Cifar100, Digits, FashionMnist, Mnist, Npz, Svhn
from ddkit_datasets.folder import ImageFolder
from ddkit_datasets.objects import Python

__all__ = ["Cifar10", "Cifar100", "Digits", "FashionMnist", "ImageFolder", "Mnist", "Npz", "Python", "Svhn"]
