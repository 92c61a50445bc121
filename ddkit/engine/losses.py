"""The losses of a run, each with its label and weight, and what has to hold of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ddkit.components import registry
from ddkit.components.base import Loss, Step
from ddkit.components.guard import called, check_shared_state, shared_state
from ddkit.components.options import Parameter, Requires
from ddkit.distributed import Ranks
from ddkit.errors import FlagError, InputError, RunFailed, is_its_own, told
from ddkit.recipes.tables import Recipe
from ddkit.text import shown


@dataclass(frozen=True)
class WeightedLoss:
    """One loss of a recipe, with its label and weight there."""

    label: str
    loss: Loss
    weight: float

    @property
    def requires(self) -> Requires:
        found: Requires = self.loss.requires
        return found

    def __str__(self) -> str:
        return called("loss", self.loss, self.label)

    @property
    def advice(self) -> str:
        """What to add to a message about it."""
        return self.loss.advice

    def value(self, step: Step, *, watched: bool = False) -> Tensor:
        """Returns the loss at `step`, its share where that is a part of the set: a scalar attached to the graph of the set.

        Raises RunFailed naming the loss where it raises or returns something else; if `watched` also where it writes to what losses share,
        or to a global random state. (A write to a tensor shows in its version counter. Code that goes around it, such as `x.data`, is
        found by the conformance suite alone.)
        """
        before = shared_state() if watched else {}
        if watched:
            step._watch.written()  # what was written before is not the fault of this loss
        with self.blamed():
            value = self.loss(step)
        if watched:
            written = step._watch.written()
            if written:
                names = " and ".join(written)
                raise RunFailed(
                    f"The {self} changes {names} in place, but other losses use them too. It must compute with copies.{self.advice}"
                )
            check_shared_state(before, str(self), self.advice)
        if not isinstance(value, Tensor) or value.ndim != 0 or not value.requires_grad or value.is_complex():
            what = shown(value)
            if isinstance(value, Tensor):
                what = f"{'complex values of ' * value.is_complex()}shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
            raise RunFailed(f"The {self} must return a scalar tensor that depends on the images, but returned {what}.{self.advice}")
        if self.requires.reduce == "mean" and len(step.labels) < step.size:
            return value * (len(step.labels) / step.size)
        return value

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Inside runs code of the loss: what it raises becomes a RunFailed that names it."""
        try:
            yield
        except BaseException as error:
            if not is_its_own(error):
                raise
            raise RunFailed(f"The {self} raised {told(error)}.{self.advice}") from error


@contextmanager
def differentiated(losses: Sequence[WeightedLoss]) -> Iterator[None]:
    """Inside the gradient of the sum of `losses` is taken: an error becomes a RunFailed that names them."""
    try:
        yield
    except BaseException as error:
        if not is_its_own(error):
            raise
        labels = ", ".join(each.label for each in losses)
        if "is not implemented" not in str(error):
            raise RunFailed(f"The gradient of the losses ({labels}) raised {told(error)}.") from error
        raise RunFailed(
            f"The gradient of the losses ({labels}) cannot be computed: {error}. One of the losses takes second derivatives, and torch "
            "has none for a layer of the teacher or network. Use another model or another loss."
        ) from error


def losses_of(recipe: Recipe) -> list[WeightedLoss]:
    """Returns the losses of `recipe`, built; raises InputError or PluginError. Without steps it needs none."""
    if recipe.steps and not recipe.losses:
        raise InputError(
            "The recipe has no loss. Add one, for example with --losses dm,dkkt, or keep the initial images with --steps 0. (Recipes for a "
            "teacher only are for `ddkit train`.)"
        )
    return [
        WeightedLoss(label, registry.create("loss", recipe.loss_name(label), table.options, where=f"losses.{label}"), table.weight)
        for label, table in recipe.losses.items()
    ]


def check_access(losses: Sequence[WeightedLoss], pipc: int | str) -> None:
    """Raises InputError where no real images are accessible and a loss needs some."""
    needing = [each.label for each in losses if each.requires.real]
    if pipc == 0 and needing:
        need = "needs" if len(needing) == 1 else "need"
        raise InputError(f"With pipc 0 there are no real images, but {', '.join(needing)} {need} some. Set --pipc to at least 1.", "pipc")


def check_reduce(losses: Sequence[WeightedLoss], ranks: Ranks) -> None:
    """Raises InputError where the run has several processes and a loss that has to see the whole set."""
    for each in losses:
        if each.requires.reduce is None and ranks.world_size > 1:
            raise InputError(
                f"The {each} needs the whole synthetic set at once (its ddkit.Requires has no `reduce`), so the set cannot "
                f"be shared among {ranks.world_size} processes. Use one process, or leave the loss out.{each.advice}",
                f"losses.{each.label}",
            )


def declared_by(losses: Sequence[WeightedLoss]) -> Mapping[str, Parameter]:
    """Returns the extra parameters that the losses declare, by name; two may share one that they declare alike."""
    declared: dict[str, Parameter] = {}
    for each in losses:
        for name, spec in each.requires.parameters.items():
            if name in ("images", "labels", "soft_labels"):
                raise FlagError(
                    f"The loss '{each.label}' declares a parameter '{name}', but the set itself uses that name. Rename the parameter."
                )
            if declared.setdefault(name, spec) != spec:
                raise InputError(f"Two losses declare the parameter '{name}' with different values. One of them is '{each.label}'.")
    return declared
