"""The terms of a run: its losses, each with its label and weight, and what has to hold of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ddkit.components import registry
from ddkit.components.base import Loss
from ddkit.components.guard import advice, called
from ddkit.components.options import Parameter
from ddkit.distributed import Ranks
from ddkit.errors import FlagError, InputError
from ddkit.recipes.tables import Recipe


class WeightedLoss(NamedTuple):
    """One weighted loss of a recipe."""

    label: str
    loss: Loss
    weight: float

    def __str__(self) -> str:
        return called("loss", self.loss, self.label)

    @property
    def advice(self) -> str:
        """What to add to a message about it."""
        return advice("loss", self.loss)


def terms_of(recipe: Recipe) -> list[WeightedLoss]:
    """Returns the losses of `recipe`, built; raises InputError or PluginError."""
    if not recipe.losses:
        raise InputError("The recipe has no loss. Choose some: --losses dm,dkkt (Recipes of a teacher alone are for `ddkit train`.)")
    terms = []
    for label, table in recipe.losses.items():
        name = recipe.loss_name(label)
        loss: Loss = registry.create("loss", name, table.options, where=f"losses.{label}")
        terms.append(WeightedLoss(label, loss, table.weight))
    return terms


def check_access(terms: Sequence[WeightedLoss], pipc: int | str) -> None:
    """Raises InputError where no real images are accessible and a loss needs some."""
    needing = needing_real(terms)
    if pipc == 0 and needing:
        need = "needs" if len(needing) == 1 else "need"
        raise InputError(f"With pipc 0 there are no real images, but {', '.join(needing)} {need} some. Give --pipc 1 or more.", "pipc")


def needing_real(terms: Sequence[WeightedLoss]) -> list[str]:
    """Returns the labels of the losses that need real images."""
    return [term.label for term in terms if term.loss.requires.real]


def check_separable(terms: Sequence[WeightedLoss], ranks: Ranks) -> None:
    """Raises InputError where the run has several processes and a loss that has to see the whole set."""
    whole = [term for term in terms if term.loss.requires.reduce is None]
    if whole and ranks.size > 1:
        raise InputError(
            f"The {whole[0]} sees the whole synthetic set at once (its ddkit.Requires says nothing of `reduce`), so its classes cannot "
            f"be dealt out to {ranks.size} processes. Run it in one process, or leave it out.{whole[0].advice}",
            f"losses.{whole[0].label}",
        )


def declared_by(terms: Sequence[WeightedLoss]) -> Mapping[str, Parameter]:
    """Returns the extra parameters that the losses declare, by name; two may share one that they declare alike."""
    declared: dict[str, Parameter] = {}
    for term in terms:
        for name, spec in term.loss.requires.parameters.items():
            if name in ("images", "labels", "soft_labels"):
                raise FlagError(f"The loss '{term.label}' declares a parameter '{name}', a name that the set itself uses.")
            if declared.setdefault(name, spec) != spec:
                raise InputError(f"Two losses declare the parameter '{name}' differently; '{term.label}' is one of them.")
    return declared
