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
from ddkit.data.images import Normalisation, NormalisedRows, on_disk, rows_of
from ddkit.distributed import ALONE, Ranks, class_rows
from ddkit.engine.bank import check_like
from ddkit.errors import RunFailed
from ddkit.nn.compiling import Arithmetic
from ddkit.nn.device import to_device
from ddkit.nn.embedder import Embedder
from ddkit.nn.experts import Experts, Trajectory
from ddkit.nn.networks import batch_norms, build_network, load_weights, modes_kept, network_tensors, redraw, set_statistics
from ddkit.nn.second_order import ClassGradients, SecondOrder
from ddkit.nn.teacher import Teacher
from ddkit.nn.training import fit, optimizer_of
from ddkit.recipes.protocols import Schedule
from ddkit.recipes.tables import LabelsTable
from ddkit.seeding import generator

T = TypeVar("T")
NORM_IMAGES = 16  # real images per class that give the statistics of batch norm, as many as in the public code of gradient matching
MEMORY = {  # what torch's optimizers keep for each parameter
    "sgd": {"momentum_buffer"},
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
}


class Inner(NamedTuple):
    """How a network is trained between the steps that it serves: `steps` batches (0: the epochs of `schedule`) of the synthetic set, or of
    `real` images, `augmented` or as they are."""

    schedule: Schedule
    steps: int = 0
    real: bool = False
    augmented: bool = True


class Turn(NamedTuple):
    """The network of a step: its place in the pool, its number among all that are drawn, and how many steps it has served before."""

    place: int
    draw: int
    age: int


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
    Each step has one of a `pool` of networks, which is drawn anew after `renew_every` steps. `inner` says how it is trained between them
    (None: it is not). A network is drawn from the `experts` at one of their epochs from first to last (`interpolate`: between these two) if
    `network_epochs` are given, else fresh. `labels` says how the set is labelled.
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
    pool: int = 1
    inner: Inner | None = None
    experts: Experts | None = None
    network_epochs: tuple[int, int | None] | None = None
    interpolate: bool = False
    labels: LabelsTable = field(default_factory=LabelsTable)
    ranks: Ranks = ALONE
    gradients: ClassGradients | None = None
    _whitened: Tensor | None = None
    _embedder: Embedder | None = None
    _network_index: int = -1  # the draw that the network is of
    _others: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by draw, those of the pool that will serve again
    _served: dict[int, Turn] = field(default_factory=dict)  # by place, the last turn before step _served_until, in their order
    _served_until: int = 0
    _optimizer: torch.optim.Optimizer | None = None  # of the network, where it is trained
    _statistics_index: int = -1  # the step whose real images the network's batch norm has the statistics of
    _graph_index: int = -1
    _network_step: int = -1  # where the network is trained: the step that its weights are of
    _draws: dict[tuple[int, str], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own_classes = self.ranks.classes(self.info.classes)
        self.own_real = class_rows(self.real_labels, self.own_classes)
        self.counts = torch.bincount(self.real_labels, minlength=self.info.classes)
        if not on_disk(self.real_images):
            self.real_images = self.real_images.to(self.device)
            if self.normalisation.whitening is not None:  # once: it may cost as much as embedding them
                self._whitened = self.normalisation.normalise(self.real_images)

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
        if self._whitened is not None:
            return self._whitened if len(rows) == len(self._whitened) else self._whitened[to_device(rows, self.device)]
        if on_disk(self.real_images):
            pixels = to_device(rows_of(self.real_images, rows), self.device)
        else:
            pixels = self.real_images if len(rows) == len(self.real_images) else self.real_images[to_device(rows, self.device)]
        return self.normalisation.normalise(pixels)

    def all_real(self, index: int) -> Tensor:
        """Returns the real images of this step of all processes, exchanged once a step."""
        return self.once(index, "all real", lambda: self.gathered(self.real_rows(index)))

    def gathered(self, rows: Tensor) -> Tensor:
        """Returns ascending `rows` (on the CPU) of the real images of all processes, normalised, on the device, exchanged."""
        own = rows[class_rows(self.real_labels[rows], self.own_classes)]
        return self.ranks.all_gather(self.real_of(own), "real images")

    def augmented(self, index: int, x: Tensor, labels: Tensor, *, view: str = "", draw: int = 0) -> Tensor:
        """Returns x (n, C, H, W) under draw `draw` of the augmentation of step `index`, or under that of a view.

        What is drawn for a class is drawn once a step.
        """
        augmenter = self.views[view].augmenter if view else self.augmenter
        purpose = f"view {view}" if view else f"augmentation {draw}" if draw else "augmentation"
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

    def turn(self, index: int) -> Turn:
        """Returns which network step `index` has, a function of the seed."""
        served = self._turns_before(index)
        place = 0 if self.pool == 1 else int(torch.randint(self.pool, (), generator=generator(self.seed, "pool", index)))
        last = served.get(place)
        if last is not None and last.age + 1 < self.renew_every:
            return last._replace(age=last.age + 1)
        return Turn(place, 1 + max((turn.draw for turn in served.values()), default=-1), 0)

    def _turns_before(self, index: int) -> dict[int, Turn]:
        """Returns by place in the pool the last turn before step `index`, in order of their steps."""
        if self.pool == 1:
            return {0: Turn(0, *divmod(index - 1, self.renew_every))} if index else {}
        if self._served_until > index:
            self._served.clear()
            self._served_until = 0
        while self._served_until < index:
            turn = self.turn(self._served_until)
            self._served.pop(turn.place, None)
            self._served[turn.place] = turn
            self._served_until += 1
        return self._served

    def _waiting(self, index: int) -> list[Turn]:
        """Returns the last turns of the networks that have served before step `index`, and will again; without training there is none."""
        turns = self._turns_before(index).values() if self.inner is not None else ()
        return [turn for turn in turns if turn.age + 1 < self.renew_every]

    def embedder(self, index: int, *, gradients: bool = False) -> Embedder:
        """Returns the embedder of step `index`: its network, fresh or an expert's, is a function of the seed and the step's turn.

        Where networks are trained, it is the one that `advance` made. Its batch norm has the statistics of real images of the step, for
        synthetic images too. `gradients`: whether its parameters require gradients.
        """
        embedder = self._brought(self.turn(index).draw)
        if self._statistics_index != index and len(self.real_labels) and batch_norms(embedder.module):
            set_statistics(embedder.module, self.gathered(self._drawn_rows(index, "batch norm", NORM_IMAGES)))
            self._statistics_index = index
        if self.arithmetic.graphs and self._graph_index != index:
            torch.compiler.cudagraph_mark_step_begin()
        self._graph_index = index
        embedder.module.requires_grad_(gradients)
        return embedder

    def _brought(self, draw: int) -> Embedder:
        """Returns the embedder with the network of number `draw` in it, as it was kept, or drawn; that of before is kept in a pool."""
        if self.model is None:
            raise RunFailed("This run has no network.")
        if self._embedder is not None and draw == self._network_index:
            return self._embedder
        if self.pool > 1 and self._network_index >= 0:
            self._others[self._network_index] = self._tensors()
        kept = self._others.pop(draw, None)
        if self._embedder is None:
            module = build_network(self.model, self.info, self.seed, "network", draw).to(self.device)
            self._embedder = Embedder(module, self.arithmetic, block=self.block)
        elif kept is None and self.network_epochs is None:
            redraw(self._embedder.module, self.model, self.info, self.seed, "network", draw)
        if kept is None and self.network_epochs is not None:
            first, last = self.network_epochs
            drawn = generator(self.seed, "network", draw)
            between = self._experts.between(drawn, first, last) if self.interpolate else None
            kept = between or dict(self._experts.drawn(drawn, first=first, last=last).start)
        if kept is not None:
            load_weights(self._embedder.module, kept)
        if self.inner is not None:
            self._remember(self._embedder.module, self.inner, kept or {})
        self._network_index = draw
        self._statistics_index = -1
        return self._embedder

    def _remember(self, module: nn.Module, inner: Inner, tensors: Mapping[str, Tensor]) -> None:
        """Gives the optimizer of the network what `tensors` have that it kept, and no more."""
        self._optimizer = self._optimizer or optimizer_of(module, inner.schedule)
        self._optimizer.state.clear()
        for name, parameter in module.named_parameters():
            own = {key: f"optimizer.{key}.{name}" for key in MEMORY[inner.schedule.optimizer]}
            found = {key: to_device(tensors[full], self.device) for key, full in own.items() if full in tensors}
            if found:  # in the parameter's layout, which fused optimizers rely on
                self._optimizer.state[parameter] = {
                    key: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
                    for key, value in found.items()
                }

    def _tensors(self) -> dict[str, Tensor]:
        """Returns copies of the network's weights and of its optimizer's state, by name."""
        assert self._embedder is not None
        tensors = network_tensors(self._embedder.module)
        for name, parameter in self._embedder.module.named_parameters():
            kept = {} if self._optimizer is None else self._optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": value for key, value in kept.items() if isinstance(value, Tensor)}
        return {name: value.clone() for name, value in tensors.items()}

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
        """Makes the networks, where they are trained, those of step `index`: trains the one of the step before, if it will serve again.

        `synthetic()` is the whole set: images (n, C, H, W), labels (n,) or (n, K). Nothing happens where they are of step `index` already.
        """
        if self.inner is None or self._network_step == index:
            if self.model is not None:
                self.embedder(index)  # at the same time in all processes: they may have real images to exchange
            return
        waiting = self._waiting(index)
        if waiting and self._network_step != index - 1:
            raise RunFailed(f"The network of step {index} is trained from that of step {index - 1}, which is not available.")
        draws = {turn.draw for turn in waiting}
        self._others = {draw: tensors for draw, tensors in self._others.items() if draw in draws}
        if self._network_index not in draws:
            self._network_index = -1  # it has served, or is that of an earlier run of the steps
        last = next(reversed(self._turns_before(index).values()), None)
        if last in waiting:
            self._train(index, self._brought(last.draw), self.inner, synthetic)
        self.embedder(index)
        self._network_step = index

    def _train(self, index: int, embedder: Embedder, inner: Inner, synthetic: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Trains the network for step `index`. Its real images are drawn from the accessible ones of all processes, which exchange them."""
        draw, module = generator(self.seed, "inner training", index), embedder.module
        images: Tensor | NormalisedRows
        if inner.real:
            count, wanted = len(self.real_labels), inner.steps * inner.schedule.batch
            few = 0 < wanted < count
            rows = torch.randperm(count, generator=draw)[:wanted].sort().values if few else torch.arange(count)
            whole = not few and self.ranks.world_size == 1
            images = self.normalisation.lazily(self.real_images) if whole else self.gathered(rows)
            labels = to_device(self.real_labels[rows], self.device)
        else:
            images, labels = (each.detach() for each in synthetic())
        module.requires_grad_(True)
        self._statistics_index = -1
        with modes_kept(module):
            fit(
                module, images, labels, inner.schedule, augmenter=self.augmenter if inner.augmented else None, generator=draw,
                channels_last=embedder.layout == torch.channels_last, steps=inner.steps, optimizer=self._optimizer,
            )  # fmt: skip
        for parameter in module.parameters():
            parameter.grad = None

    def _prefix(self, turn: Turn) -> str:
        """Returns how the names of a network's tensors begin in a state."""
        return "network." if self.pool == 1 else f"network.{turn.place}."

    def network_state(self, index: int) -> dict[str, Tensor]:
        """Returns copies of the weights and optimizer states with which step `index` goes on; {} if networks are drawn and not trained."""
        waiting = self._waiting(index) if self._embedder is not None and self._network_step >= 0 else []
        found = {"network_step": torch.tensor(self._network_step)} if waiting else {}
        for turn in waiting:
            tensors = self._tensors() if turn.draw == self._network_index else self._others[turn.draw]
            found |= {f"{self._prefix(turn)}{name}": value for name, value in tensors.items()}
        return found

    def load_network(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Continues at step `index` from what network_state(index) returned; raises KeyError or ValueError where it does not fit."""
        self._network_step = self._network_index = -1
        self._others.clear()
        waiting = self._waiting(index)
        if self.inner is None or not waiting:
            return
        step = int(state["network_step"]) if state["network_step"].numel() == 1 else -1
        if step not in (index - 1, index):
            raise ValueError(f"its network is that of step {step}")
        module = self.embedder(index).module
        wanted, memory = network_tensors(module), MEMORY[self.inner.schedule.optimizer]
        likes = {f"optimizer.{key}.{name}": value for name, value in module.named_parameters() for key in memory if key != "step"}
        counts = {f"optimizer.step.{name}": torch.zeros(()) for name, _ in module.named_parameters()} if "step" in memory else {}
        self._network_index = -1
        for turn in waiting:
            prefix = self._prefix(turn)
            kept = {name: state[prefix + name] for name in wanted}
            kept |= {name: state[prefix + name] for name in likes | counts if prefix + name in state}
            for name, value in kept.items():
                check_like(prefix + name, value, (wanted | likes | counts)[name])
            self._others[turn.draw] = kept
        self._network_step = step


def class_slices(labels: Tensor) -> dict[int, slice]:
    """Returns the rows of each class of ascending labels (n,) on the CPU: asking the device for them would make it wait."""
    classes, counts = labels.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    starts = (ends - counts).tolist()
    return {label: slice(start, end) for label, start, end in zip(classes.tolist(), starts, ends.tolist(), strict=True)}
