"""The teacher: one trained classifier, never updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """A trained classifier in evaluation mode and what is recorded of it.

    `mean` and `std` are the channel statistics of its inputs (of pixels in 0..1); `info` holds the metadata of its
    file ({} for a bare state dict); `sha256` is that of the file.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        info: Mapping[str, Any] | None = None,
        sha256: str = "",
        path: str = "",
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.mean, self.std, self.info = mean, std, dict(info or {})
        self.sha256, self.path = sha256, path

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, without gradients."""
        return dict(self.module.named_parameters())

    def logits(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns (n, K) logits of normalised images x (n, C, H, W) under `parameters` (None: the teacher's own)."""
        if parameters is None:
            return self.module(x)
        return torch.func.functional_call(self.module, dict(parameters), (x,))

    def exact_logits(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns (n, K) logits computed on the CPU in the dtype of `parameters`: for checks in float64."""
        buffers = {
            name: value.cpu().to(x.dtype) if value.is_floating_point() else value.cpu() for name, value in self.module.named_buffers()
        }
        result: Tensor = torch.func.functional_call(self.module, {**buffers, **parameters}, (x,))
        return result
