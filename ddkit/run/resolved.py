"""What is recorded of a setup: the recipe with every value that was used, and the plugins."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ddkit.components import registry
from ddkit.components.options import written_options
from ddkit.data.real import NoImages
from ddkit.errors import DdkitError
from ddkit.nn.automatic_teacher import resolved_training
from ddkit.recipes.resolve import named_components
from ddkit.recipes.tables import Recipe

if TYPE_CHECKING:
    from ddkit.run.setup import RunSetup


def resolved(setup: RunSetup) -> Recipe:
    """Returns the recipe with every option, and what the engine decided, written out.

    Its notes are left out: they are about the values that the recipe had before they were changed.
    """
    recipe = setup.recipe
    replace = msgspec.structs.replace

    def written(table: Any, key: str, options: Any) -> Any:
        """Returns a table with its component named without an argument, and with all of its options."""
        return replace(table, **{key: registry.split_name(getattr(table, key))[0]}, options=written_options(options))

    teacher, training = recipe.teacher, recipe.train
    if teacher.use == "auto":
        teacher, training = resolved_training(teacher, training, setup.info)
    else:
        teacher = replace(teacher, use=str(Path(teacher.use).absolute()))
    experts = recipe.experts
    if setup.experts is not None:
        experts = replace(
            experts, count=setup.experts.count, epochs=setup.experts.trained, save_every=setup.experts.save_every,
            use=experts.use if experts.use == "auto" else str(Path(experts.use).absolute()),
        )  # fmt: skip
    data = recipe.data
    if isinstance(setup.dataset, NoImages):  # the data are not opened, and may not even be there
        data_options = registry.options_of("dataset", data.use, data.options, "data")
        with suppress(DdkitError):
            data_options = registry.create("dataset", data.use, data.options, where="data", directory=data.dir).options
    else:
        data_options = setup.dataset.options
    return replace(
        recipe,
        notes={},
        teacher=teacher,
        train=training,
        experts=experts,
        data=replace(written(data, "use", data_options), held_out=setup.real.held_out or data.held_out),
        network=written(recipe.network, "model", setup.model.options),
        initializer=written(recipe.initializer, "use", setup.initializer.options),
        parametrization=written(recipe.parametrization, "use", setup.parametrization.options),
        augmenter=written(recipe.augmenter, "use", setup.augmenter.options),
        views={
            name: replace(written(recipe.views[name], "augmenter", view.augmenter.options), compose=None)
            for name, view in setup.views.items()
        },
        engine=replace(
            recipe.engine, chunk=setup.decided.chunk, block=setup.decided.block, compile=setup.decided.arithmetic.compile,
            precision=setup.decided.arithmetic.precision,
        ),
        losses={
            each.label: replace(recipe.losses[each.label], use=recipe.loss_name(each.label), options=written_options(each.loss.options))
            for each in setup.losses
        },
        evaluators={
            label: replace(recipe.evaluators[label], options=_named(written_options(each.options)))
            for label, each in setup.evaluators.items()
        },
    )  # fmt: skip


def plugins_used(setup: RunSetup) -> list[dict[str, str]]:
    """Returns kind, name, distribution and version of every plugin of the run, of a plugin file its path and sha256."""
    trains = (setup.needs_teacher and setup.recipe.teacher.use == "auto") or (setup.needs_experts and setup.recipe.experts.use == "auto")
    in_use = {"network": setup.decided.needs_network, "teacher": setup.needs_teacher, "train": trains}
    named = {(kind, name) for kind, name, _, where in named_components(setup.recipe) if in_use.get(where, True)}
    used = [registry.find(kind, registry.split_name(name)[0]) for kind, name in sorted(named)]
    return [
        {"kind": p.kind, "name": p.name, "distribution": p.distribution, "version": p.version}
        | ({"file": p.file, "sha256": p.sha256} if p.file else {})
        for p in used
    ]


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the written options of an evaluator with the name of its protocol, whose values the recipe's [protocols] has."""
    protocol = options.get("protocol")
    return options | {"protocol": protocol["name"]} if isinstance(protocol, dict) and "usual" in protocol else options
