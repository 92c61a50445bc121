"""What a step draws: its real images, its network, its augmentations and noise, each a function of seed and index.

A network that is trained between steps depends on the updates since it was fresh, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

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
from ddkit.nn.experts import Experts, Trajectory
from ddkit.nn.networks import build_network, load_weights, modes_kept, network_tensors, redraw
from ddkit.nn.second_order import ClassGradients, SecondOrder
from ddkit.nn.teacher import Teacher
from ddkit.nn.training import fit
from ddkit.recipes.protocols import Schedule
from ddkit.recipes.tables import LabelsTable
from ddkit.seeding import generator

T = TypeVar("T")
NORM_IMAGES = 16  # real images a class that set the statistics of batch norm, as in the public code of gradient matching


class ViewSpec(NamedTuple):
    augmenter: Augmenter
    noise: float


@dataclass(kw_only=True)
class StepSource:
    """The parts of a run that do not change between its steps, and what a step draws from them.

    `real_labels` are ascending and stay on the CPU, as do all draws; images are kept on the device as they come (uint8), those that lie
    on the disk stay there. In a run of several processes `real_labels` are those of all classes and `real_images` those of this one's.
    `twice` gives the teacher's logits to losses that differentiate its gradients (None: plain operations do), and what `differentiate`
    makes of the network gives its gradients by class.
    `inner` says how the network is trained on the synthetic set between the steps that share it (None: it is not). A network is drawn
    from the `experts` at one of their epochs from first to last if `network_epochs` are given, else fresh. `labels` says how the set is
    labelled.
    """

    seed: int
    info: DataInfo
    normalisation: Normalisation
    real_images: Tensor
    real_labels: Tensor
    batch: int
    augmenter: Augmenter
    views: Mapping[str, ViewSpec]
    model: Model | None
    renew_every: int
    teacher: Teacher | None
    device: torch.device
    arithmetic: Arithmetic
    block: int = 0
    twice: SecondOrder | None = None
    differentiate: Callable[[nn.Module], ClassGradients] = ClassGradients
    inner: Schedule | None = None
    experts: Experts | None = None
    network_epochs: tuple[int, int | None] | None = None
    labels: LabelsTable = field(default_factory=LabelsTable)
    ranks: Ranks = ALONE
    gradients: ClassGradients | None = None
    _embedder: Embedder | None = None
    _network_index: int = -1  # the draw that the network is of
    _graph_index: int = -1
    _network_step: int = -1  # where the network is trained: the step that its weights are of
    _draws: dict[tuple[int, str], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own_classes = self.ranks.classes(self.info.classes)
        self.own_real = class_rows(self.real_labels, self.own_classes)
        self.counts = torch.bincount(self.real_labels, minlength=self.info.classes)
        if not on_disk(self.real_images):
            self.real_images = self.real_images.to(self.device)

    def once(self, index: int, purpose: str, make: Callable[[], T]) -> T:
        """Returns what `make` gives for `purpose` at step `index`, made once a step, whatever its chunks."""
        if (index, purpose) not in self._draws:
            self._draws = {key: drawn for key, drawn in self._draws.items() if key[0] == index}
            self._draws[index, purpose] = make()
        found: T = self._draws[index, purpose]
        return found

    def real_rows(self, index: int) -> Tensor:
        """Returns the rows of the real images of this step, ascending, at most `batch` of each class, drawn anew where there are more."""
        return self.once(index, "real", lambda: self._drawn_rows(index, "real", self.batch))

    def _drawn_rows(self, index: int, purpose: str, batch: int) -> Tensor:
        count = len(self.real_labels)
        if count == 0 or int(self.counts.max()) <= batch:
            return torch.arange(count)
        keys = torch.rand(count, generator=generator(self.seed, purpose, index), dtype=torch.float64)
        shuffled = (self.real_labels + keys).argsort()  # class by class, in random order within each
        place = torch.arange(count) - (self.counts.cumsum(0) - self.counts)[self.real_labels]
        return shuffled[place < batch].sort().values

    def real_of(self, rows: Tensor) -> Tensor:
        """Returns `rows` (on the CPU) of the real images, which are of this process's classes, normalised, on the device."""
        rows = rows - self.own_real.start
        if on_disk(self.real_images):
            pixels = to_device(rows_of(self.real_images, rows), self.device)
        else:
            pixels = self.real_images if len(rows) == len(self.real_images) else self.real_images[to_device(rows, self.device)]
        return self.normalisation.normalise(pixels)

    def all_real(self, index: int) -> Tensor:
        """Returns the real images of this step of all processes, exchanged once a step."""
        drawn = self.real_rows(index)
        own = drawn[class_rows(self.real_labels[drawn], self.own_classes)]
        return self.once(index, "all real", lambda: self.ranks.all_gather(self.real_of(own), "real images"))

    def augmented(self, index: int, x: Tensor, labels: Tensor, *, view: str = "") -> Tensor:
        """Returns x (n, C, H, W) under the augmentation of step `index`, or of a view; what is drawn for a class is drawn once a step."""
        augmenter = self.views[view].augmenter if view else self.augmenter
        purpose = f"view {view}" if view else "augmentation"
        with blamed("augmenter", augmenter):
            drawn = self.once(index, purpose, lambda: augmenter.sample(generator(self.seed, purpose, index), self.info.classes))
            return augmenter.apply(x, {key: value[labels] for key, value in drawn.items()})

    def viewed(self, index: int, name: str, images: Tensor, labels: Tensor) -> Tensor:
        """Returns images (n, C, H, W), of ascending labels (n,) on the CPU, in view `name`: augmented, with noise drawn class by class."""
        spec = self.views.get(name)
        if spec is None:
            return images  # "raw", and "default" where the recipe defines no other
        images = self.augmented(index, images, labels, view=name)
        if spec.noise == 0:
            return images
        noise = [
            torch.randn((rows.stop - rows.start, *self.info.shape), generator=generator(self.seed, "view noise", name, index, label))
            for label, rows in class_slices(labels).items()
        ]
        return images + spec.noise * to_device(torch.cat(noise), images.device).to(images.dtype)

    def embedder(self, index: int, *, gradients: bool = False) -> Embedder:
        """Returns the embedder of step `index`: its network, fresh or an expert's, is a function of the seed and index // renew_every.

        Where the network is trained, they are those that `advance` made of them. `gradients`: whether they require gradients.
        """
        if self.model is None:
            raise RunFailed("This run has no network.")
        draw = index // self.renew_every
        if self._embedder is None:
            module = build_network(self.model, self.info, self.seed, "network", draw).to(self.device)
            self._embedder = Embedder(module, self.arithmetic, block=self.block)
        elif draw != self._network_index and self.network_epochs is None:
            redraw(self._embedder.module, self.model, self.info, self.seed, "network", draw)
        if draw != self._network_index and self.network_epochs is not None:
            first, last = self.network_epochs
            load_weights(self._embedder.module, self._experts.drawn(generator(self.seed, "network", draw), first=first, last=last).start)
        if self.arithmetic.graphs and self._graph_index != index:
            torch.compiler.cudagraph_mark_step_begin()
        self._network_index = draw
        self._graph_index = index
        self._embedder.module.requires_grad_(gradients)
        return self._embedder

    def class_gradients(self, network: nn.Module) -> ClassGradients:
        """Returns what gives the gradients by class of `network`, that of the step; made once, as the network is."""
        if self.gradients is None or self.gradients.module is not network:
            self.gradients = self.differentiate(network)
        return self.gradients

    @property
    def _experts(self) -> Experts:
        if self.experts is None:
            raise RunFailed("This run has no experts.")
        return self.experts

    def trajectory(self, index: int, span: int, first: int, last: int | None) -> Trajectory:
        """Returns one expert's weights at a saved epoch from `first` to `last` and `span` epochs later, on the device; drawn once."""

        def draw() -> Trajectory:
            found = self._experts.drawn(generator(self.seed, "experts", index), span=span, first=first, last=last)
            moved = [{name: to_device(value, self.device) for name, value in each.items()} for each in (found.start, found.end)]
            return found._replace(start=moved[0], end=moved[1])

        return self.once(index, f"experts {span} {first} {last}", draw)

    def advance(self, index: int, synthetic: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Makes the network, where it is trained, that of step `index`; `synthetic()` is its whole set: images (n, C, H, W),
        labels (n,) or (n, K).

        It is a fresh one, or that of the step before trained on this set. Nothing happens where it is of step `index` already.
        """
        if self.inner is None or self._network_step == index:
            return
        if index % self.renew_every == 0:
            self._network_index = -1  # also where it is this draw's, but trained
        elif self._network_step != index - 1:
            raise RunFailed(f"The network of step {index} is trained from that of step {index - 1}, which is not here.")
        embedder = self.embedder(index, gradients=True)
        module = embedder.module
        if index % self.renew_every:
            images, labels = synthetic()
            with modes_kept(module):
                fit(
                    module, images.detach(), labels.detach(), self.inner, augmenter=self.augmenter,
                    generator=generator(self.seed, "inner training", index), channels_last=embedder.layout == torch.channels_last,
                )  # fmt: skip
            for parameter in module.parameters():
                parameter.grad = None
        if len(self.real_labels) and any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules()):
            with torch.no_grad():  # sets the running statistics of batch norm, in training mode
                module(self.real_of(self._drawn_rows(index, "batch norm", NORM_IMAGES)))
        self._network_step = index

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
