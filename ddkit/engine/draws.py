"""What the steps of a run are made of: its real images, networks and teacher, and the random draws of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddkit.components.base import Augmenter, DataInfo, Model
from ddkit.components.guard import blamed
from ddkit.data.images import Normalisation, on_disk, rows_of
from ddkit.distributed import ALONE, Ranks, class_rows
from ddkit.engine.bank import check_like
from ddkit.errors import RunFailed
from ddkit.nn.compiling import Arithmetic
from ddkit.nn.device import to_device
from ddkit.nn.embedder import Embedder
from ddkit.nn.networks import build_network, network_tensors, redraw
from ddkit.nn.teacher import Teacher
from ddkit.nn.training import Schedule, fit
from ddkit.seeding import generator

Parameters = dict[str, Tensor]
NORM_IMAGES = 16  # real images a class that set the statistics of batch norm, as in the public code of gradient matching


class ViewSpec(NamedTuple):
    augmenter: Augmenter
    noise: float


class StepSource:
    """What does not change between the steps of a run, and the draws of the step at hand."""

    def __init__(
        self,
        *,
        seed: int,
        info: DataInfo,
        normalisation: Normalisation,
        real_images: Tensor,
        real_labels: Tensor,
        batch: int,
        augmenter: Augmenter,
        views: Mapping[str, ViewSpec],
        model: Model | None,
        renew_every: int,
        teacher: Teacher | None,
        device: torch.device,
        arithmetic: Arithmetic,
        block: int = 0,
        inner: Schedule | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`real_labels` are ascending and stay on the CPU, as do all draws; images are kept on the device as they come (uint8).

        Those that lie on the disk stay there. `inner` says how the network is trained on the synthetic set between the steps that share it
        (None: it is not). In a run of several processes `real_labels` are those of all classes and `real_images` those of this one's.
        """
        self.ranks, self.own_classes = ranks, ranks.classes(info.classes)
        self.own_real = class_rows(real_labels, self.own_classes)
        self.seed, self.info, self.normalisation, self.device = seed, info, normalisation, device
        self.real_images, self.real_labels = real_images if on_disk(real_images) else real_images.to(device), real_labels
        self.counts = torch.bincount(real_labels, minlength=info.classes)
        self.batch, self.augmenter, self.views = batch, augmenter, dict(views)
        self.model, self.renew_every, self.teacher = model, renew_every, teacher
        self.arithmetic, self.block, self.inner = arithmetic, block, inner
        self._embedder: Embedder | None = None
        self._network_index = self._graph_index = -1
        self._network_step = -1  # where the network is trained: the step that its weights are of
        self._draws: tuple[int, dict[str, Any]] = (-1, {})

    def _once(self, index: int, purpose: str, make: Callable[[], Any]) -> Any:
        """Returns what `make` gives for `purpose` at step `index`, made once a step, whatever its chunks."""
        if self._draws[0] != index:
            self._draws = (index, {})
        drawn = self._draws[1]
        if purpose not in drawn:
            drawn[purpose] = make()
        return drawn[purpose]

    def real_rows(self, index: int) -> Tensor:
        """Returns the rows of the real images of this step, ascending, at most `batch` of each class, drawn anew where there are more."""
        rows: Tensor = self._once(index, "real", lambda: self._drawn_rows(index, "real", self.batch))
        return rows

    def real_pixels(self, rows: Tensor) -> Tensor:
        """Returns rows of the real images, in pixel units, on the device; `rows` is on the CPU."""
        if on_disk(self.real_images):
            return to_device(rows_of(self.real_images, rows), self.device)
        return self.real_images if len(rows) == len(self.real_images) else self.real_images[to_device(rows, self.device)]

    def _drawn_rows(self, index: int, purpose: str, batch: int) -> Tensor:
        count = len(self.real_labels)
        if count == 0 or int(self.counts.max()) <= batch:
            return torch.arange(count)
        keys = torch.rand(count, generator=generator(self.seed, purpose, index), dtype=torch.float64)
        shuffled = (self.real_labels + keys).argsort()  # class by class, in random order within each
        place = torch.arange(count) - (self.counts.cumsum(0) - self.counts)[self.real_labels]
        return shuffled[place < batch].sort().values

    def augmentation(self, index: int, purpose: str, augmenter: Augmenter) -> Parameters:
        """Returns one parameter set per class for `purpose` at step `index`, drawn once for all classes."""

        def draw() -> Parameters:
            with blamed("augmenter", augmenter):
                return augmenter.sample(generator(self.seed, purpose, index), self.info.classes)

        drawn: Parameters = self._once(index, purpose, draw)
        return drawn

    def noise(self, index: int, name: str, labels: Tensor) -> Tensor:
        """Returns standard normal noise (n, C, H, W) on the CPU for ascending labels (n,) in view `name` at step `index`.

        It is drawn class by class.
        """
        parts = [
            torch.randn((rows.stop - rows.start, *self.info.shape), generator=generator(self.seed, "view noise", name, index, label))
            for label, rows in class_slices(labels).items()
        ]
        return torch.cat(parts)

    def embedder(self, index: int) -> Embedder:
        """Returns the embedder of step `index`: its network's weights are a function of the seed and index // renew_every.

        Where the network is trained, they are those that `advance` made of them.
        """
        if self.model is None:
            raise RunFailed("This run has no network.")
        draw = index // self.renew_every
        if self._embedder is None:
            module = build_network(self.model, self.info, self.seed, "network", draw).to(self.device)
            self._embedder = Embedder(module, self.arithmetic, block=self.block)
        elif draw != self._network_index:
            redraw(self._embedder.module, self.model, self.info, self.seed, "network", draw)
        if self.arithmetic.graphs and self._graph_index != index:
            torch.compiler.cudagraph_mark_step_begin()
        self._network_index, self._graph_index = draw, index
        return self._embedder

    def advance(self, index: int, synthetic: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Makes the network, where it is trained, that of step `index`; `synthetic()` is its whole set: images (n, C, H, W), labels (n,).

        It is a fresh one, or that of the step before trained on this set: the network of a step depends on all updates
        since it was fresh. Nothing happens where it is of step `index` already.
        """
        if self.inner is None or self._network_step == index:
            return
        if index % self.renew_every == 0:
            self._network_index = -1  # also where it is this draw's, but trained
        elif self._network_step != index - 1:
            raise RunFailed(f"The network of step {index} is trained from that of step {index - 1}, which is not here.")
        embedder = self.embedder(index)
        if index % self.renew_every:
            self._train(index, embedder, *synthetic())
        self._measure(index, embedder.module)
        self._network_step = index

    def _train(self, index: int, embedder: Embedder, images: Tensor, labels: Tensor) -> None:
        assert self.inner is not None
        module = embedder.module
        modes = {each: each.training for each in module.modules()}
        wanted = {each: each.requires_grad for each in module.parameters()}
        fit(
            module.requires_grad_(), images.detach(), labels, self.inner, augmenter=self.augmenter,
            generator=generator(self.seed, "inner training", index), channels_last=embedder.layout == torch.channels_last,
        )  # fmt: skip
        for each, mode in modes.items():
            each.training = mode
        for parameter, gradients in wanted.items():
            parameter.requires_grad_(gradients).grad = None

    def _measure(self, index: int, module: nn.Module) -> None:
        """Sets the running statistics of batch norm: one pass in training mode over a few real images of every class."""
        if len(self.real_labels) and any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules()):
            rows = self._drawn_rows(index, "batch norm", NORM_IMAGES)
            with torch.no_grad():
                module(self.normalisation.normalise(self.real_pixels(rows)))

    def network_state(self, index: int) -> dict[str, Tensor]:
        """Returns copies of what the network of step `index` and later depends on beside the synthetic set; {} where it is only drawn."""
        if self.inner is None or self._embedder is None or self._network_step < 0 or index % self.renew_every == 0:
            return {}
        tensors = {f"network.{name}": value.clone() for name, value in network_tensors(self._embedder.module).items()}
        return tensors | {"network_step": torch.tensor(self._network_step)}

    def load_network(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Continues at step `index` from what network_state(index) returned; raises KeyError or ValueError where it does not fit."""
        self._network_step = -1
        if self.inner is None or index % self.renew_every == 0:
            return
        step = int(state["network_step"]) if state["network_step"].numel() == 1 else -1
        if step not in (index - 1, index):
            raise ValueError(f"its network is that of step {step}")
        tensors = network_tensors(self.embedder(index).module)
        for name, value in tensors.items():
            check_like(f"network.{name}", state[f"network.{name}"], value)
        for name, value in tensors.items():
            value.copy_(state[f"network.{name}"])
        self._network_step = step


def class_slices(labels: Tensor) -> dict[int, slice]:
    """Returns the rows of each class of ascending labels (n,) on the CPU: asking the device for them would make it wait."""
    classes, counts = labels.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    starts = (ends - counts).tolist()
    return {label: slice(start, end) for label, start, end in zip(classes.tolist(), starts, ends.tolist(), strict=True)}
