"""Real data: `digits` (offline), those of torchvision (`mnist`, `cifar10`, ...), and the user's own folders, arrays, files and objects."""

from __future__ import annotations

from ddkit_datasets.arrays import Cifar10, Cifar100, Digits, FashionMnist, Mnist, Npz, Svhn
from ddkit_datasets.folder import ImageFolder
from ddkit_datasets.objects import Python
from ddkit_datasets.packed import HuggingFace, WebDataset

__all__ = ["Cifar10", "Cifar100", "Digits", "FashionMnist", "HuggingFace", "ImageFolder", "Mnist", "Npz", "Python", "Svhn", "WebDataset"]
