"""A tiny run to check a loss in: random images, a small network and teacher, in float64 where gradients are compared; also in parts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from ddkit.components import registry
from ddkit.components.base import DataInfo, Loss, Model
from ddkit.data.images import Normalisation
from ddkit.distributed import Ranks, class_rows
from ddkit.engine.bank import Bank
from ddkit.engine.draws import Draws, ViewSpec
from ddkit.engine.loop import Engine
from ddkit.engine.losses import WeightedLoss
from ddkit.engine.pool import NetworkPool
from ddkit.engine.source import StepSource
from ddkit.engine.step import Step
from ddkit.nn.compiling import Arithmetic
from ddkit.nn.embedder import Embedder
from ddkit.nn.experts import untrained
from ddkit.nn.networks import build_network
from ddkit.nn.teacher import Teacher
from ddkit.recipes.tables import ExpertsTable
from ddkit.seeding import generator

T = TypeVar("T")
CPU = torch.device("cpu")
PLAIN = Arithmetic(compile=False, precision="float32")


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What a tiny run looks like: `rows` and `real` are the synthetic and the real images of each class."""

    channels: int = 1
    size: tuple[int, int] = (8, 6)
    rows: tuple[int, ...] = (2, 2, 2)
    real: tuple[int, ...] = (3, 4, 3)
    dtype: torch.dtype = torch.float32

    @property
    def info(self) -> DataInfo:
        return DataInfo(class_names=tuple(f"class {i}" for i in range(len(self.rows))), channels=self.channels, size=self.size)


@dataclass(kw_only=True)
class _Networks(NetworkPool):
    """Networks in the images' type."""

    dtype: torch.dtype = torch.float32

    def at(self, index: int, *, gradients: bool = False) -> Embedder:
        found = super().at(index, gradients=gradients)
        found.module.to(self.dtype)
        return found


class Recorder(Step):
    """A step that remembers which declared members were used."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.used: set[str] = set()
        self.views: set[str] = set()

    def _declared(self, needs: str, member: str) -> None:
        self.used.add(needs)
        super()._declared(needs, member)

    def written(self) -> list[str]:
        """Returns the names of what was written to since it was built."""
        return self._watch.written()

    def view(self, name: str) -> Any:
        self.views.add(name)
        return super().view(name)

    @property
    def parameters(self) -> Any:
        self.used.add("parameters")
        return super().parameters


class World:
    """Everything that a loss can ask for, in the smallest size: `step()` gives what one call of it sees."""

    def __init__(self, loss: Loss, setting: Setting) -> None:
        self.loss = loss
        self.info = info = setting.info
        dtype = setting.dtype
        draw = generator(0, "conformance", "real")
        count = sum(setting.real)
        real = torch.rand((count, *info.shape), generator=draw, dtype=dtype)
        real_labels = torch.arange(info.classes).repeat_interleave(torch.tensor(setting.real))
        views = {name: ViewSpec(_augmenter("none", info), 0.0) for name in loss.requires.views if name not in ("raw", "augmented")}
        normalisation = Normalisation([0.5] * info.channels, [0.25] * info.channels)
        draws = Draws(
            seed=0, info=info, normalisation=normalisation, batch=max(setting.real), real_images=real, real_labels=real_labels,
            augmenter=_augmenter("dsa", info), views=views, device=CPU,
        )  # fmt: skip
        model = _model("instance", info)
        networks = _Networks(
            draws=draws, model=model, arithmetic=PLAIN, experts=untrained(model, info, ExpertsTable(), normalisation), dtype=dtype,
        )  # fmt: skip
        self.source = StepSource(draws=draws, networks=networks, teacher=untrained_teacher(info, dtype))
        labels = torch.arange(info.classes).repeat_interleave(torch.tensor(setting.rows))
        images = torch.randn((len(labels), *info.shape), generator=generator(0, "conformance", "images"), dtype=dtype)
        self.bank = Bank(images, labels, loss.requires.parameters, {})
        for name, value in self.loss.initial(self.step()).items():  # as a run does
            self.bank.fill(name, value)

    def step(self, *, index: int = 0, bank: Bank | None = None) -> Recorder:
        checked = WeightedLoss("checked", self.loss, 1.0)
        return Recorder(self.source, bank or self.bank, index, None, [checked]).for_loss(checked)

    def value(self, tensors: Mapping[str, Tensor], *, index: int = 0) -> Tensor:
        """Returns the loss as a function of the bank's tensors."""
        bank = copy.copy(self.bank)
        bank.images = tensors["images"]
        bank.parameters = {name: tensors[name] for name in self.bank.parameters}
        return self.loss(self.step(index=index, bank=bank))

    def engine(self, *, weight: float = 1.0, chunk: int = 0) -> Engine:
        return Engine(self.bank, self.source, [WeightedLoss("checked", self.loss, weight)], chunk=chunk)

    def inputs(self) -> dict[str, Tensor]:
        """Returns everything that a loss can reach and may not change, by name."""
        found = {"images": self.bank.images, "labels": self.bank.labels, **self.bank.parameters}
        found |= {"real images": self.source.draws.real_images, "real labels": self.source.draws.real_labels}
        teacher = self.source.teacher
        modules = {"teacher": teacher.module} if teacher else {}
        modules |= {"network": self.source.networks.embedder.module} if self.source.networks.embedder else {}
        for owner, module in modules.items():
            found |= {f"{owner} {name}": value for name, value in (*module.named_parameters(), *module.named_buffers())}
        return found


def untrained_teacher(info: DataInfo, dtype: torch.dtype = torch.float32) -> Teacher:
    """Returns an untrained teacher with batch norm, whose running statistics are those of some noise."""
    module = build_network(_model("batch", info), info, 0, "conformance teacher").train()
    with torch.no_grad():
        module(torch.randn((16, *info.shape), generator=generator(0, "conformance", "noise")))
    return Teacher(module.to(dtype), mean=tuple([0.5] * info.channels), std=tuple([0.25] * info.channels))


def _augmenter(name: str, info: DataInfo) -> Any:
    return registry.create("augmenter", name, data=info)


def _model(norm: str, info: DataInfo) -> Model:
    model: Model = registry.create("model", "convnet", {"depth": 2, "width": 4, "norm": norm}, data=info)
    return model


# A set that is dealt out to several parts, as to the processes of a run: here each part is a thread


class _Table:
    """Where the threads lay what they exchange, and wait for one another. Elsewhere one thread runs at a time: modules are shared."""

    def __init__(self, size: int) -> None:
        self.places: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.turn = threading.Lock()

    def exchanged(self, rank: int, value: Any) -> list[Any]:
        """Returns the values of all; only those who have a turn may ask."""
        self.places[rank] = value
        self.turn.release()
        try:
            self.barrier.wait()
            found = list(self.places)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return found


class Thread(Ranks):
    """One of several threads that stand for the processes of a run."""

    def __init__(self, rank: int, table: _Table) -> None:
        super().__init__()
        self.rank = rank
        self.world_size = len(table.places)
        self._table = table

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._table.exchanged(self.rank, value)

    def all_reduce(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        self.exchanged[purpose] += sum(tensor.nbytes for tensor in tensors)
        parts = self.all_gather_object([tensor.detach().clone() for tensor in tensors])
        return [torch.stack(list(each)).sum(0) for each in zip(*parts, strict=True)]

    def max(self, number: int) -> int:
        return max(self.all_gather_object(number))


def in_parts(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Returns what `work` returns in each of `size` parts; raises what the first of them raised that was not left waiting."""
    table = _Table(size)

    def guarded(rank: int) -> T:
        with table.turn:
            try:
                return work(Thread(rank, table))
            except BaseException:
                table.barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error.__cause__ or error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def part_of(world: World, ranks: Ranks) -> World:
    """Returns the world of one part: its classes' rows and real images."""
    found = copy.copy(world)
    whole = world.source.draws
    own = class_rows(whole.real_labels, ranks.classes(world.info.classes))
    draws = replace(whole, ranks=ranks, real_images=whole.real_images[own], _drawn={})
    networks = replace(world.source.networks, draws=draws, embedder=None)  # a network of its own
    found.source = replace(world.source, draws=draws, networks=networks)
    rows = class_rows(world.bank.labels, draws.own_classes)
    found.bank = type(world.bank)(
        world.bank.images[rows], world.bank.labels[rows], world.loss.requires.parameters, {}, start=rows.start, size=len(world.bank.labels)
    )
    found.bank.load_state(found.bank.own_part(world.bank.state()))
    return found
