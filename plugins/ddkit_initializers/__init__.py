"""First synthetic images: `noise` and `real`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

import ddkit


class Noise(ddkit.Initializer):
    """Gaussian noise in normalised units."""

    class Options(ddkit.Options):
        std: Annotated[float, ddkit.Option("standard deviation, normalised units", gt=0)] = 1.0

    def __call__(self, start: ddkit.Start) -> Tensor:
        parts = [
            torch.randn((int(count), *start.shape), generator=start.generator(int(label)))
            for label, count in zip(*start.labels.unique(return_counts=True), strict=True)
        ]
        return self.options.std * torch.cat(parts)


class Real(ddkit.Initializer):
    """Accessible real images of the class, drawn without replacement."""

    requires = ddkit.Requires(real=True)

    class Options(ddkit.Options):
        reuse: Annotated[bool, ddkit.Option("where a class has too few: take them again, every second time mirrored")] = False

    def check(self, ipc: int, available: Mapping[str, int]) -> None:
        needed = 1 if self.options.reuse else ipc
        short = [f"'{name}' has {count}" for name, count in available.items() if count < needed]
        if short:
            raise ddkit.InputError(
                f"Initializer 'real' needs {needed} accessible images a class for {ipc} images, but {', '.join(short[:5])}"
                f"{' ...' if len(short) > 5 else ''}. Raise --pipc, lower --ipc, use --init noise, or --set initializer.reuse=true.",
                "ipc",
            )

    def __call__(self, start: ddkit.Start) -> Tensor:
        parts = []
        for label, count in zip(*start.labels.unique(return_counts=True), strict=True):
            images = start.real_images[start.real_labels == label]
            chosen = torch.randperm(len(images), generator=start.generator(int(label)))[: int(count)]
            own = images[chosen.sort().values]  # in order: ipc = pipc gives exactly the real set
            rounds = [own if turn % 2 == 0 else own.flip(3) for turn in range(-(-int(count) // len(own)))]
            parts.append(torch.cat(rounds)[: int(count)])
        return torch.cat(parts)
