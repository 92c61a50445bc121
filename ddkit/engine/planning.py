"""What a run decides by itself: how many classes and images at once, in which arithmetic, compiled or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from torch import nn

from ddkit.components.base import DataInfo
from ddkit.components.options import Requires
from ddkit.distributed import Ranks
from ddkit.errors import InputError
from ddkit.nn.compiling import Arithmetic, decide_arithmetic
from ddkit.nn.networks import batch_norms, couples_samples, forward_flops, saved_bytes
from ddkit.nn.second_order import no_forward_mode
from ddkit.recipes.tables import Recipe

CACHED_MIB = 64  # activations of a block of images: 50 of 32 x 32 in the standard network; 20 to 50 were equally fast, 250 slower
ALIVE = 1.5  # times the kept activations: their gradients come to live beside them
ALIVE_TWICE = 4.0  # likewise where gradients of the parameters are differentiated again
PASSES = 3  # forward passes that a forward and a backward pass take together
SECOND_ORDER_PASSES = 9  # forward passes that a gradient by parameters, differentiated by the images, takes
IMAGE_COPIES = 4  # float32 images alive at once: as they are, augmented, and what an augmentation needs in between


class ExecutionPlan:
    """How the engine computes, decided from model, shapes, steps and device alone; raises InputError if the network does not allow it.

    `chunk` is the number of classes that losses with `reduce` see at once (0: all), `block` that of images that are embedded at
    once (0: all), and `step_work` the operations (FLOP) that what can be compiled takes a step.
    """

    def __init__(
        self,
        recipe: Recipe,
        requires: Sequence[Requires],
        info: DataInfo,
        device: torch.device,
        ranks: Ranks,
        real_counts: Iterable[int],
        *,
        images_per_class: Sequence[int],
        network: Callable[[], nn.Module],
        teacher: Callable[[], nn.Module],
    ) -> None:
        """`real_counts` are the accessible images of each class, `images_per_class` those of each in the set.

        `network` and `teacher` make one of the run's, to look at.
        """
        self.recipe = recipe
        self.requires = requires
        self.info = info
        self.device = device
        self.ranks = ranks
        self._counts = images_per_class
        self._images = max(images_per_class)
        self._network = network
        self._teacher = teacher
        counts = list(real_counts)
        self._real = [min(count, recipe.data.batch) for count in counts]
        self._accessible = sum(counts)
        self.needs_embedder = any(each.network and not each.second_order for each in requires)
        self.needs_network = any(each.network for each in requires)
        self.chunk = self._automatic_chunk() if recipe.engine.chunk == "auto" else recipe.engine.chunk
        if ranks.world_size > 1 and self.needs_network and self._coupled:
            raise InputError(
                f"The network's features of an image depend on its batch (batch norm without real images), so the classes cannot be shared "
                f"among {ranks.world_size} processes. Use --set network.norm=instance, or one process.",
                "network.norm",
            )
        if self.chunk and self.needs_network and self._coupled:
            raise InputError(
                "engine.chunk: the network's features of an image depend on its batch (batch norm without real images), so the set cannot "
                "be computed in chunks. Use --set engine.chunk=0 or --set network.norm=instance.",
                "engine.chunk",
            )
        self.arithmetic, self.compiled, self.step_work = self._decided()
        self.block = 0
        if self.needs_embedder and not self._coupled:
            if recipe.engine.block == "auto":
                self.block = self._images_at_once(self._probe)
            else:
                self.block = recipe.engine.block

    def _decided(self) -> tuple[Arithmetic, set[str], float]:
        """Returns an arithmetic, what is compiled in it, and the operations of that in a step.

        That is some of "network" (as embedder), "gradients" (the network's, by class) and "teacher".
        """
        engine, work, reasons = self.recipe.engine, {}, []
        synthetic = sum(self._counts)
        real = sum(self._real) if any(each.real for each in self.requires) else 0
        views = {view for each in self.requires if each.teacher and each.second_order for view in each.views}
        fixed = not self.needs_network or not (self._coupled or batch_norms(self._probe))
        if not fixed:
            reasons.append("the network's features of an image depend on the images of the step (batch norm)")
        elif self.needs_embedder and not hasattr(self._probe, "embed"):  # its features are a by-product, by a hook
            reasons.append("the model of the network has no method embed")
        elif self.needs_embedder:
            work["network"] = forward_flops(self._probe, self.info, features=True) * (real + 2 * synthetic)
        if self.needs_network and any(each.network and each.second_order for each in self.requires) and fixed:
            work["gradients"] = forward_flops(self._probe, self.info) * (SECOND_ORDER_PASSES * synthetic + PASSES * real)
        if views:
            work["teacher"] = forward_flops(self._teacher(), self.info) * SECOND_ORDER_PASSES * len(views) * synthetic

        def decide() -> Arithmetic:
            total = sum(work.values())
            per_network = total / max(1, len(work)) * self.recipe.steps  # each has its own code to compile
            wanted = engine.compile if work else False
            return decide_arithmetic(wanted, engine.precision, self.device, work=per_network, step_work=total)

        made = decide()
        for part, whose, probe in (("gradients", "network", self._network), ("teacher", "teacher", self._teacher)):
            reason = no_forward_mode(probe().eval(), self.info) if made.compile and part in work else ""
            if reason:
                reasons.append(f"gradients of the {whose} can only be differentiated by double backward ({reason})")
                del work[part]
        made = decide()
        if engine.compile is True and reasons and not work:
            raise InputError(
                f"engine.compile = true, but nothing can be compiled: {' and '.join(reasons)}. Use auto, or another network, for "
                "example --set network.model=convnet --set network.norm=instance.",
                "engine.compile",
            )
        return made, set(work) if made.compile else set(), sum(work.values())

    def arithmetic_of(self, part: str) -> Arithmetic:
        """Returns the arithmetic of such a part: the plain one if it cannot be compiled and another one is."""
        plain = self.arithmetic.compile and part not in self.compiled
        return Arithmetic(compile=False, precision="float32") if plain else self.arithmetic

    @property
    def teacher_block(self) -> int:
        """How many images the teacher is differentiated with at once. All parts have this size: one compiled shape serves them all."""
        most = -(-self.info.classes // self.ranks.world_size)
        classes = min(self.chunk, most) or most
        rows = max(sum(self._counts[first : first + classes]) for first in range(self.info.classes))
        return self._parts(rows, self._teacher())

    @property
    def gradient_blocks(self) -> tuple[int, int]:
        """How many synthetic and how many real images of a class the network is differentiated with at once."""
        return self._parts(self._images, self._probe), self._parts(max(1, *self._real), self._probe)

    def _parts(self, rows: int, network: nn.Module) -> int:
        """Returns the size of the fewest parts of nearly one size of `rows` images."""
        return -(-rows // -(-rows // self._images_at_once(network)))

    def _images_at_once(self, network: nn.Module) -> int:
        """Returns how many images' activations are few enough for the cache of a CPU, and for engine.memory."""
        limit = min(CACHED_MIB if self.device.type == "cpu" else math.inf, self.recipe.engine.memory / 4)
        return max(1, int(limit * 2**20 / max(1, saved_bytes(network, self.info))))

    @property
    def products(self) -> str:
        """The precision of float32 products on a GPU: exact where a loss needs second derivatives, else as decided."""
        return "float32" if any(each.second_order for each in self.requires) else self.arithmetic.precision

    @cached_property
    def _probe(self) -> nn.Module:
        probe = self._network()
        for layer in batch_norms(probe) if self._accessible else ():
            layer.eval()  # as in a step, whose real images give the statistics
        return probe

    @cached_property
    def _coupled(self) -> bool:
        return couples_samples(self._probe, self.info)

    def step_flops(self) -> float:
        """Returns about how many operations a step takes, for losses with these `requires`: a backward pass takes two forward ones.

        Features of real images are taken without gradient. Where gradients of parameters are matched, the synthetic images' are
        differentiated again.
        """
        synthetic, real = sum(self._counts), sum(self._real)
        total = forward_flops(self._probe, self.info, features=True) * (PASSES * synthetic + real) if self.needs_embedder else 0.0
        teacher_flops = forward_flops(self._teacher(), self.info) if any(each.teacher for each in self.requires) else 0.0
        for each in self.requires:
            if each.network and each.second_order:
                total += forward_flops(self._probe, self.info) * (SECOND_ORDER_PASSES * synthetic + (PASSES * real if each.real else 0))
            if each.teacher:
                passes = (SECOND_ORDER_PASSES if each.second_order else PASSES) * len(each.views or ("default",))
                total += teacher_flops * passes * synthetic
        return total + (self._training_flops() if self.needs_network else 0.0)

    def _training_flops(self) -> float:
        """Returns about how many operations the training of a network between two steps takes."""
        table = self.recipe.network
        images = {"none": 0, "real": self._accessible, "synthetic": sum(self._counts)}[table.trained_on]
        seen = table.inner_steps * min(table.batch, images) or table.inner_epochs * images
        return PASSES * forward_flops(self._probe, self.info) * seen * (1 - 1 / table.renew_every)

    def step_bytes(self) -> int:
        """Returns about how much memory the images and activations of a step take at a time."""
        classes = len(self.ranks.classes(self.info.classes))
        return self._class_bytes(self.requires) * (min(self.chunk, classes) or classes)

    def _automatic_chunk(self) -> int:
        """Returns the classes of a chunk whose images and activations, of network and teacher, take engine.memory; 0: all fit."""
        separable = [each for each in self.requires if each.reduce is not None]
        if not separable or (self.needs_network and self._coupled):
            return 0
        per_class = self._class_bytes(separable)
        chunk = max(1, int(self.recipe.engine.memory * 2**20 / per_class))
        return 0 if chunk >= self.info.classes else chunk  # whatever the number of processes: another number may go on with the run

    def _class_bytes(self, requires: Sequence[Requires]) -> int:
        """Returns what the images and activations of a class take for losses that ask for `requires`."""
        per_image = IMAGE_COPIES * 4 * math.prod(self.info.shape)
        per_class = per_image * self._images
        if any(each.real for each in requires):
            per_class += per_image * max(self._real, default=0)
        if any(each.network for each in requires):
            per_class += int(ALIVE * saved_bytes(self._probe, self.info)) * self._images
        views = {view for each in requires for view in (each.views or ("default",)) if each.teacher}
        if views:
            alive = ALIVE_TWICE if any(each.teacher and each.second_order for each in requires) else ALIVE
            per_class += len(views) * int(alive * saved_bytes(self._teacher(), self.info)) * self._images
        return per_class
