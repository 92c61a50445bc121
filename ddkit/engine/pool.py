"""The networks of the steps: which one a step has, how it is drawn, and how those of a pool are trained between the steps they serve.

Which one it is is a function of seed and index. One that is trained depends on the updates of the set since it was fresh, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddkit.components.base import Model
from ddkit.data.images import NormalisedRows
from ddkit.engine.bank import check_like
from ddkit.engine.draws import Draws
from ddkit.errors import RunFailed
from ddkit.nn.compiling import Arithmetic
from ddkit.nn.device import to_device
from ddkit.nn.embedder import Embedder
from ddkit.nn.experts import Experts, Trajectory
from ddkit.nn.networks import batch_norms, build_network, load_weights, modes_kept, network_tensors, redraw, set_statistics
from ddkit.nn.second_order import ClassGradients
from ddkit.nn.training import fit, optimizer_of
from ddkit.recipes.protocols import Schedule
from ddkit.seeding import generator

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


@dataclass(kw_only=True)
class NetworkPool:
    """The networks of a run; each step has one of `size`, which is drawn anew after `renew_every` steps.

    `inner` says how it is trained between them (None: it is not). A network is drawn from the `experts` at one of their epochs from first
    to last (`interpolate`: between these two) if `epochs` are given, else fresh. What `differentiate` makes of the network gives its
    gradients by class. Networks of all steps are in one module, so that compiled code serves them all; `embedder` holds it, once there is
    one.
    """

    draws: Draws
    model: Model | None
    arithmetic: Arithmetic
    block: int = 0
    size: int = 1
    renew_every: int = 1
    inner: Inner | None = None
    experts: Experts | None = None
    epochs: tuple[int, int | None] | None = None
    interpolate: bool = False
    differentiate: Callable[[nn.Module], ClassGradients] = ClassGradients
    gradients: ClassGradients | None = None
    embedder: Embedder | None = None
    optimizer: torch.optim.Optimizer | None = None  # of the network, where it is trained
    _draw: int = -1  # the number of the network that is in the module
    _others: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by draw, those of the pool that will serve again
    _served: dict[int, Turn] = field(default_factory=dict)  # by place, the last turn before step _served_until, in their order
    _served_until: int = 0
    _statistics_index: int = -1  # the step whose real images the network's batch norm has the statistics of
    _graph_index: int = -1
    _trained_for: int = -1  # where the network is trained: the step that its weights are of

    def turn(self, index: int) -> Turn:
        """Returns which network step `index` has, a function of the seed."""
        served = self._turns_before(index)
        place = 0 if self.size == 1 else int(torch.randint(self.size, (), generator=generator(self.draws.seed, "pool", index)))
        last = served.get(place)
        if last is not None and last.age + 1 < self.renew_every:
            return last._replace(age=last.age + 1)
        return Turn(place, 1 + max((turn.draw for turn in served.values()), default=-1), 0)

    def _turns_before(self, index: int) -> dict[int, Turn]:
        """Returns by place in the pool the last turn before step `index`, in order of their steps."""
        if self.size == 1:
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

    def at(self, index: int, *, gradients: bool = False) -> Embedder:
        """Returns the embedder of step `index`: its network, fresh or an expert's, is a function of the seed and the step's turn.

        Where networks are trained, it is the one that `advance` made. Its batch norm has the statistics of real images of the step, for
        synthetic images too. `gradients`: whether its parameters require gradients.
        """
        embedder = self._brought(self.turn(index).draw)
        if self._statistics_index != index and len(self.draws.real_labels) and batch_norms(embedder.module):
            set_statistics(embedder.module, self.draws.gathered(self.draws.rows(index, "batch norm", NORM_IMAGES)))
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
        if self.embedder is not None and draw == self._draw:
            return self.embedder
        if self.size > 1 and self._draw >= 0:
            self._others[self._draw] = self.tensors()
        kept = self._others.pop(draw, None)
        if self.embedder is None:
            module = build_network(self.model, self.draws.info, self.draws.seed, "network", draw).to(self.draws.device)
            self.embedder = Embedder(module, self.arithmetic, block=self.block)
        elif kept is None and self.epochs is None:
            redraw(self.embedder.module, self.model, self.draws.info, self.draws.seed, "network", draw)
        if kept is None and self.epochs is not None:
            first, last = self.epochs
            drawn = generator(self.draws.seed, "network", draw)
            between = self._experts.between(drawn, first, last) if self.interpolate else None
            kept = between or dict(self._experts.drawn(drawn, first=first, last=last).start)
        if kept is not None:
            load_weights(self.embedder.module, kept)
        if self.inner is not None:
            self._remember(self.embedder.module, self.inner, kept or {})
        self._draw = draw
        self._statistics_index = -1
        return self.embedder

    def _remember(self, module: nn.Module, inner: Inner, tensors: Mapping[str, Tensor]) -> None:
        """Gives the optimizer of the network what `tensors` have that it kept, and no more."""
        self.optimizer = self.optimizer or optimizer_of(module, inner.schedule)
        self.optimizer.state.clear()
        for name, parameter in module.named_parameters():
            own = {key: f"optimizer.{key}.{name}" for key in MEMORY[inner.schedule.optimizer]}
            found = {key: to_device(tensors[full], self.draws.device) for key, full in own.items() if full in tensors}
            if found:  # in the parameter's layout, which fused optimizers rely on
                self.optimizer.state[parameter] = {
                    key: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
                    for key, value in found.items()
                }

    def tensors(self) -> dict[str, Tensor]:
        """Returns copies of the network's weights and of its optimizer's state, by name."""
        assert self.embedder is not None
        tensors = network_tensors(self.embedder.module)
        for name, parameter in self.embedder.module.named_parameters():
            kept = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
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
            found = self._experts.drawn(generator(self.draws.seed, "experts", index), span=span, first=first, last=last)
            moved = [{name: to_device(value, self.draws.device) for name, value in each.items()} for each in (found.start, found.end)]
            return found._replace(start=moved[0], end=moved[1])

        return self.draws.once(index, f"experts {span} {first} {last}", draw)

    def advance(self, index: int, synthetic: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Makes the networks, where they are trained, those of step `index`: trains the one of the step before, if it will serve again.

        `synthetic()` is the whole set: images (n, C, H, W), labels (n,) or (n, K). Nothing happens where they are of step `index` already.
        """
        if self.inner is None or self._trained_for == index:
            if self.model is not None:
                self.at(index)  # at the same time in all processes: they may have real images to exchange
            return
        waiting = self._waiting(index)
        if waiting and self._trained_for != index - 1:
            raise RunFailed(f"The network of step {index} is trained from that of step {index - 1}, which is not available.")
        draws = {turn.draw for turn in waiting}
        self._others = {draw: tensors for draw, tensors in self._others.items() if draw in draws}
        if self._draw not in draws:
            self._draw = -1  # it has served, or is that of an earlier run of the steps
        last = next(reversed(self._turns_before(index).values()), None)
        if last in waiting:
            self._train(index, self._brought(last.draw), self.inner, synthetic)
        self.at(index)
        self._trained_for = index

    def _train(self, index: int, embedder: Embedder, inner: Inner, synthetic: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Trains the network for step `index`. Its real images are drawn from the accessible ones of all processes, which exchange them."""
        draw, module = generator(self.draws.seed, "inner training", index), embedder.module
        images: Tensor | NormalisedRows
        if inner.real:
            count, wanted = len(self.draws.real_labels), inner.steps * inner.schedule.batch
            few = 0 < wanted < count
            rows = torch.randperm(count, generator=draw)[:wanted].sort().values if few else torch.arange(count)
            whole = not few and self.draws.ranks.world_size == 1
            images = self.draws.normalisation.lazily(self.draws.real_images) if whole else self.draws.gathered(rows)
            labels = to_device(self.draws.real_labels[rows], self.draws.device)
        else:
            images, labels = (each.detach() for each in synthetic())
        module.requires_grad_(True)
        self._statistics_index = -1
        with modes_kept(module):
            fit(
                module, images, labels, inner.schedule, augmenter=self.draws.augmenter if inner.augmented else None, generator=draw,
                channels_last=embedder.layout == torch.channels_last, steps=inner.steps, optimizer=self.optimizer,
            )  # fmt: skip
        for parameter in module.parameters():
            parameter.grad = None

    def _prefix(self, turn: Turn) -> str:
        """Returns how the names of a network's tensors begin in a state."""
        return "network." if self.size == 1 else f"network.{turn.place}."

    def state(self, index: int) -> dict[str, Tensor]:
        """Returns copies of the weights and optimizer states with which step `index` goes on; {} if networks are drawn and not trained."""
        waiting = self._waiting(index) if self.embedder is not None and self._trained_for >= 0 else []
        found = {"network_step": torch.tensor(self._trained_for)} if waiting else {}
        for turn in waiting:
            tensors = self.tensors() if turn.draw == self._draw else self._others[turn.draw]
            found |= {f"{self._prefix(turn)}{name}": value for name, value in tensors.items()}
        return found

    def load_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Continues at step `index` from what state(index) returned; raises KeyError or ValueError where it does not fit."""
        self._trained_for = self._draw = -1
        self._others.clear()
        waiting = self._waiting(index)
        if self.inner is None or not waiting:
            return
        step = int(state["network_step"]) if state["network_step"].numel() == 1 else -1
        if step not in (index - 1, index):
            raise ValueError(f"its network is that of step {step}")
        module = self.at(index).module
        wanted, memory = network_tensors(module), MEMORY[self.inner.schedule.optimizer]
        likes = {f"optimizer.{key}.{name}": value for name, value in module.named_parameters() for key in memory if key != "step"}
        counts = {f"optimizer.step.{name}": torch.zeros(()) for name, _ in module.named_parameters()} if "step" in memory else {}
        self._draw = -1
        for turn in waiting:
            prefix = self._prefix(turn)
            kept = {name: state[prefix + name] for name in wanted}
            kept |= {name: state[prefix + name] for name in likes | counts if prefix + name in state}
            for name, value in kept.items():
                check_like(prefix + name, value, (wanted | likes | counts)[name])
            self._others[turn.draw] = kept
        self._trained_for = step
