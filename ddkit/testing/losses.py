"""The conformance suite of losses."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

from ddkit.engine.loop import distill
from ddkit.files import read_tensors, write_tensors
from ddkit.testing.suite import Broken, ShapeConformance, changed, check, copies, repeated
from ddkit.testing.world import Setting, World, in_parts, part_of

DOUBLE = Setting(dtype=torch.float64)
REQUIREMENTS = ("real", "network", "teacher", "experts")


class LossConformance(ShapeConformance):
    """Checks of a loss, in a tiny run that has everything a loss can ask for."""

    kind = "loss"

    def world(self, setting: Setting | None = None) -> World:
        return World(self.make(), setting or Setting())

    # What it returns

    @check
    def test_returns_a_finite_scalar(self) -> None:
        """The value is a finite scalar tensor attached to the images; undeclared use of a member of the step is an error here."""
        self._value_of(self.world())

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._value_of(self.world(Setting(channels=shape[0], size=shape[1:])))

    @check
    def test_one_image_a_class(self) -> None:
        """So it is with one synthetic image per class."""
        self._value_of(self.world(Setting(rows=(1, 1, 1))))

    @check
    def test_unbalanced_classes(self) -> None:
        """So it is where classes have different numbers of images, and one has a single real image."""
        self._value_of(self.world(Setting(rows=(1, 3, 2), real=(5, 1, 2))))

    def _value_of(self, world: World) -> Tensor:
        value = world.loss(world.step())
        if not isinstance(value, Tensor) or value.ndim != 0:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise Broken(f"The loss '{self.label}' returns {what}, but must return a scalar tensor.")
        if not bool(value.isfinite()):
            raise Broken(f"The loss '{self.label}' is {float(value.detach())} on random images, but must be finite.")
        if not value.requires_grad:
            raise Broken(f"The value of the loss '{self.label}' does not depend on the synthetic images. Avoid .detach().")
        return value

    # What it reaches

    @check
    def test_gradient_reaches_the_bank_and_nothing_else(self) -> None:
        """The gradient is finite and not zero, every declared parameter has a part in it, and nothing is left in `.grad`."""
        world = self.world()
        value = self._value_of(world)
        tensors = world.bank.tensors()
        parts = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
        if not any(part is not None and bool(part.any()) for part in parts):
            raise Broken(f"The gradient of the loss '{self.label}' is zero for the images and all extra parameters.")
        idle = [name for name, part in zip(tensors, parts, strict=True) if part is None and name != "images"]
        if idle:
            raise Broken(f"The loss '{self.label}' declares the parameter '{idle[0]}', but its value does not depend on it.")
        if any(part is not None and not bool(part.isfinite().all()) for part in parts):
            raise Broken(f"The gradient of the loss '{self.label}' is not finite.")
        left = [name for name, tensor in world.inputs().items() if tensor.is_leaf and tensor.grad is not None]
        if left:
            raise Broken(
                f"The loss '{self.label}' leaves .grad on {', '.join(left[:3])}. Use torch.autograd.grad, and never call backward()."
            )

    @check
    def test_inputs_are_unchanged(self) -> None:
        """Images, real images, networks, their mode and their hooks are as before, bit for bit."""
        world = self.world()
        world.loss(world.step())  # builds the network
        teacher = world.source.teacher
        assert teacher is not None
        modules = [teacher.module] + ([world.source.networks.embedder.module] if world.source.networks.embedder else [])
        before, states = copies(world.inputs()), _modes(modules)
        step = world.step()
        world.loss(step)
        moved = step.written() + changed(before, world.inputs())
        if moved:
            raise Broken(f"The loss '{self.label}' changes {', '.join(moved[:3])}. Compute with copies (x + 1, not x.add_(1)).")
        if _modes(modules) != states:
            raise Broken(f"The loss '{self.label}' leaves a network in another mode, or with a hook.")

    @check
    def test_global_random_state_is_untouched(self) -> None:
        """No global random generator and no global setting of torch is changed."""
        world = self.world()
        world.step(index=1).embed  # noqa: B018 (a member, not a call)
        with self.leaves({}):
            world.loss(world.step())

    # What it depends on

    @check
    def test_same_seed_same_value(self) -> None:
        """Value and gradient are a function of images, seed and step: draws come from `step.generator`."""

        def evaluated() -> list[Tensor]:
            world = self.world()
            value = self._value_of(world)
            gradients = torch.autograd.grad(value, list(world.bank.tensors().values()), allow_unused=True)
            return [value.detach(), *(part for part in gradients if part is not None)]

        one, two = repeated(evaluated)
        if not all(torch.equal(*each) for each in zip(one, two, strict=True)):
            values = f"{float(one[0])} and {float(two[0])}"
            raise Broken(f"The loss '{self.label}' returns {values} for the same images, seed and step. Draw from step.generator only.")

    @check
    def test_linear_in_the_weight(self) -> None:
        """The gradient grows with the weight."""
        world = self.world(DOUBLE)
        once, more = (world.engine(weight=weight).evaluate(0).gradients for weight in (1.0, 2.5))
        for name, gradient in once.items():
            if not torch.allclose(2.5 * gradient, more[name], rtol=1e-9, atol=1e-12):
                raise Broken(f"The gradient of the loss '{self.label}' for {name} does not grow with its weight.")

    @check
    def test_order_of_samples_within_a_class(self) -> None:
        """With `order_invariant = True`, another order of the images within their classes gives the same value."""
        world = self.world(DOUBLE)
        if not world.loss.order_invariant:
            return
        turned = torch.cat([torch.arange(rows.stop - 1, rows.start - 1, -1) for rows in world.step().class_slices.values()])
        tensors = world.bank.tensors()
        spec = {"images": "sample"} | {name: each.per for name, each in world.loss.requires.parameters.items()}
        other = {name: tensor[turned] if spec[name] == "sample" else tensor for name, tensor in tensors.items()}
        one, two = float(world.value(tensors).detach()), float(world.value(other).detach())
        if abs(one - two) > 1e-9 * max(1.0, abs(one)):
            raise Broken(
                f"The loss '{self.label}' is {one} and {two} for the same images in another order within their classes. "
                "If the order may matter, remove order_invariant = True."
            )

    # What it declares

    @check
    def test_what_it_requires_is_used(self) -> None:
        """Everything that `requires` declares is used."""
        world = self.world()
        step = world.step()
        world.loss(step)
        world.loss.initial(step)
        declared = {name for name in REQUIREMENTS if getattr(world.loss.requires, name)}
        declared |= {"parameters"} if world.loss.requires.parameters else set()
        unused = sorted(declared - step.used) + [f"the view '{name}'" for name in world.loss.requires.views if name not in step.views]
        if unused:
            raise Broken(
                f"The loss '{self.label}' declares {', '.join(unused)} in `requires`, but does not use it, so a run would build it for "
                "nothing."
            )

    @check
    def test_gradients_of_parameters_are_declared(self) -> None:
        """`second_order` is true where, and only where, it takes a gradient with `create_graph=True`."""
        world = self.world()
        with _watched_gradients() as taken:
            world.loss(world.step())
        declared = world.loss.requires.second_order
        if any(taken) and not declared:
            raise Broken(f"The loss '{self.label}' takes a gradient with create_graph=True. Declare second_order=True in `requires`.")
        if declared and not any(taken):
            raise Broken(f"The loss '{self.label}' declares second_order=True, but takes no gradient with create_graph=True.")

    @check
    def test_reduce_as_declared(self) -> None:
        """Where `reduce` is declared, value and gradient of parts of the set, as declared, make up those of the whole set."""
        world = self.world(Setting(rows=(1, 3, 2), real=(5, 1, 2), dtype=torch.float64))
        reduce = world.loss.requires.reduce
        if reduce is None:
            return
        whole, gradients = world.engine().evaluate(0)[:2]
        parted = {f"in {size} parts": _in_processes(world, size) for size in (2, 3)}
        parted |= {f"in chunks of {chunk}": world.engine(chunk=chunk).evaluate(0)[:2] for chunk in (1, 2)}
        parted["in chunks of 2 parts"] = _in_processes(world, 2, chunk=1)
        for how, (values, others) in parted.items():
            one, two = float(whole["checked"]), float(values["checked"])
            if abs(one - two) > 1e-9 * max(1.0, abs(one)):
                raise Broken(
                    f"The loss '{self.label}' declares reduce={reduce!r}, but is {one} for the whole set and {two} when it is "
                    f"evaluated {how} of its classes."
                )
            if not all(torch.allclose(gradients[name], others[name], rtol=1e-7, atol=1e-10) for name in gradients):
                raise Broken(f"The gradient of the loss '{self.label}' changes if it is evaluated {how} of its classes.")

    # Mathematics

    @check
    def test_gradcheck_in_float64(self) -> None:
        """The gradient is the derivative of the value, by finite differences in float64."""
        world = self.world(Setting(size=(4, 5), rows=(1, 2), real=(2, 2), dtype=torch.float64))
        names = list(world.bank.tensors())
        tensors = tuple(tensor.detach().clone().requires_grad_() for tensor in world.bank.tensors().values())

        def function(*values: Tensor) -> Tensor:
            return world.value(dict(zip(names, values, strict=True)))

        try:
            gradcheck(function, tensors, atol=1e-5, rtol=1e-3)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:300]
            raise Broken(f"The gradient of the loss '{self.label}' is not the derivative of its value in float64: {first}") from None

    # A run

    @check
    def test_state_survives_save_and_load(self) -> None:
        """A run that is continued from a checkpoint is the same as an undisturbed one, bit for bit."""
        whole, first, second = self.world(), self.world(), self.world()
        distill(whole.engine(), 0, 3)
        distill(first.engine(), 0, 2)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "state.safetensors"
            write_tensors(file, first.engine().state(2), {})
            second.engine().load_state(2, read_tensors(file)[0])
        distill(second.engine(), 2, 3)
        moved = changed(copies(whole.bank.tensors()), second.bank.tensors())
        if moved:
            raise Broken(
                f"With the loss '{self.label}' a run that is continued after step 2 differs from an uninterrupted run in "
                f"{', '.join(moved)}. Keep nothing from step to step but declared parameters."
            )


def _in_processes(world: World, size: int, chunk: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns value and gradients of the whole set from the processes among which its classes are dealt out."""
    found = in_parts(size, lambda ranks: part_of(world, ranks).engine(chunk=chunk).evaluate(0))
    gradients = dict(found[0][1])
    for name in gradients:
        if world.bank.is_rowwise(f"bank.{name}"):
            gradients[name] = torch.cat([part[1][name] for part in found])
    return found[-1][0], gradients


def _modes(modules: list[torch.nn.Module]) -> list[Any]:
    return [
        (each.training, len(each._forward_hooks), len(each._forward_pre_hooks), len(each._backward_hooks))
        for module in modules
        for each in module.modules()
    ]


@contextmanager
def _watched_gradients() -> Iterator[list[bool]]:
    """Inside, every gradient that is taken adds whether it builds a graph, however the code calls it.

    torch.autograd.grad, under whatever name it was imported, goes through one function of its module; where a version of torch
    has it no more, calls of torch.autograd.grad are watched.
    """
    place = "_engine_run_backward" if hasattr(torch.autograd, "_engine_run_backward") else "grad"
    original, taken = getattr(torch.autograd, place), []
    signature = inspect.signature(torch.autograd.grad)

    def watched(*arguments: Any, **named: Any) -> Any:
        if place == "grad":
            taken.append(bool(signature.bind(*arguments, **named).arguments.get("create_graph", False)))
        else:
            taken.append(bool(arguments[3] if len(arguments) > 3 else named.get("create_graph", False)))
        return original(*arguments, **named)

    setattr(torch.autograd, place, watched)
    try:
        yield taken
    finally:
        setattr(torch.autograd, place, original)
