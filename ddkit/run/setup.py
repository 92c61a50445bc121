"""From a recipe to the objects of a run: components built, data opened, what the engine decides decided once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddkit.components import plugin_file, registry
from ddkit.components.base import Augmenter, DataInfo, Dataset, Evaluator, Initializer, Model, Parametrization
from ddkit.components.guard import blamed, called
from ddkit.components.observers import Observers
from ddkit.data.images import Normalisation, channel_statistics
from ddkit.data.real import NoImages, RealData, check_classes, colour, open_dataset
from ddkit.data.whitening import Whitening, shared, whitening_of
from ddkit.distributed import ALONE, Ranks
from ddkit.engine.bank import Bank
from ddkit.engine.draws import Draws, ViewSpec
from ddkit.engine.labels import SOFT_LABELS
from ddkit.engine.loop import Engine
from ddkit.engine.losses import check_access, check_reduce, declared_by, losses_of
from ddkit.engine.planning import ExecutionPlan
from ddkit.engine.pool import Inner, NetworkPool
from ddkit.engine.source import StepSource
from ddkit.errors import InputError
from ddkit.nn.automatic_teacher import automatic_teacher
from ddkit.nn.compiling import get_ready
from ddkit.nn.device import pick_device, products
from ddkit.nn.expert_training import experts_of
from ddkit.nn.experts import Experts, untrained
from ddkit.nn.networks import build_network, modes_kept
from ddkit.nn.second_order import ClassGradients, SecondOrder
from ddkit.nn.teacher import Teacher, Tested, load_teacher, read_teacher, tested
from ddkit.recipes.protocols import Schedule
from ddkit.recipes.resolve import evaluator_options
from ddkit.recipes.settings import flattened
from ddkit.recipes.tables import NetworkTable, Recipe, recipe_dict
from ddkit.run.artifact import stored_in_pixels
from ddkit.run.checks import check_deterministic, check_epochs, check_memory, check_networks, check_room, check_training, check_whitened
from ddkit.run.initial_set import initial_set
from ddkit.run.resolved import plugins_used, resolved

AUTOMATIC_TEACHER = "the automatic teacher"
AUTOMATIC_EXPERTS = "the automatic experts"
TEACHER_FILE = "the teacher "  # and the name of its file
BUILT_IN_VIEWS = ("default", "raw", "augmented")


class RunSetup:
    """Everything a run needs, checked before anything is trained or written.

    `begun`: its set is to be read from a checkpoint, so that the initializer has nothing to do. `ranks`: the processes that share the
    run; this one has the images and the rows of its own classes. `watchers` are called at each stage.
    """

    def __init__(
        self, recipe: Recipe, *, device: str = "auto", begun: bool = False, ranks: Ranks = ALONE, watchers: Observers | None = None
    ) -> None:
        self.recipe = recipe
        self.begun = begun
        self.ranks = ranks
        self.watchers = watchers or Observers()
        self.device = pick_device(device)
        self.losses = losses_of(recipe)
        self.requires = [each.requires for each in self.losses]
        check_access(self.losses, recipe.pipc)
        self.dataset = self._without_data() or open_dataset(recipe.data)
        check_classes(self.dataset)
        ranks.check_classes(len(self.dataset.class_names))
        check_reduce(self.losses, ranks)
        start, makes = recipe.initializer, recipe.parametrization
        self.initializer: Initializer = registry.create("initializer", start.use, start.options, where="initializer")
        self.parametrization: Parametrization = registry.create("parametrization", makes.use, makes.options, where="parametrization")
        self.ipc = recipe.ipc_of(self.dataset.class_names)
        self.images_per_class = [self.parametrization.images_per_class(ipc) for ipc in self.ipc]
        if not begun:
            check_room(self)
        self.teacher: Teacher | None = None
        self.tested: Tested | None = None
        self.experts: Experts | None = None
        self._normalisation: Normalisation | None = None
        self.real = RealData.of(recipe, self.dataset, self._shape(), ranks, self.watchers)
        self.info: DataInfo = self.real.info
        with blamed("parametrization", self.parametrization, building=True):
            self.parametrization.check(self.info.shape)
        check_memory(self)
        self._build_components()
        self.plugin_files = plugin_file.known()
        self.plugins_used = plugins_used(self)

    def _without_data(self) -> Dataset | None:
        """Returns the classes of a recorded teacher where nothing of the run needs real data, else None."""
        recipe = self.recipe
        of_experts = recipe.network.source == "experts" or self._labelled_by_experts or any(each.experts for each in self.requires)
        if recipe.pipc != 0 or recipe.teacher.use == "auto" or recipe.evaluators or of_experts:
            return None
        names = recipe.teacher.classes or self._teacher_record.get("class_names")
        return NoImages(names) if names else None

    @cached_property
    def _teacher_record(self) -> dict[str, Any]:
        """What the recipe's teacher file records, {} for a bare state dict; raises InputError naming a file that is unusable."""
        return read_teacher(Path(self.recipe.teacher.use))[1]

    @property
    def own_classes(self) -> range:
        return self.ranks.classes(self.info.classes)

    def counts(self, classes: range) -> list[int]:
        """Returns the images of each of `classes` in the set, as losses see them."""
        return self.images_per_class[classes.start : classes.stop]

    def labels_of(self, classes: range) -> Tensor:
        """Returns (n,) int64, ascending: the labels of the images of `classes`."""
        return torch.tensor(classes).repeat_interleave(torch.tensor(self.counts(classes)))

    def _shape(self) -> tuple[int, int, int] | None:
        """Returns the image shape of a recipe without accessible images; None if these show it, or if nothing does."""
        if self.recipe.pipc != 0:
            return None
        automatic = self.recipe.teacher.use == "auto"
        shape = None if automatic else self._teacher_record.get("input_shape")
        if shape:
            return int(shape[0]), int(shape[1]), int(shape[2])
        split = "train" if automatic else "test"  # an automatic teacher is trained on all of them anyway; else none of them is accessible
        if split == "test" and not len(self.dataset.labels("test")):
            return None
        channels, height, width = self.dataset.images(split, [0])[0].shape
        return colour(self.dataset, (channels, height, width))

    def _build_components(self) -> None:
        recipe, info = self.recipe, self.info
        self.model: Model = registry.create("model", recipe.network.model, recipe.network.options, data=info, where="network")
        self.augmenter: Augmenter = registry.create(
            "augmenter", recipe.augmenter.use, recipe.augmenter.options, data=info, where="augmenter"
        )
        self.views = {name: self._view(name) for name in recipe.views}
        for each in self.losses:
            for name in each.requires.views:
                if name not in self.views and name not in BUILT_IN_VIEWS:
                    known = ", ".join(sorted({*self.views, *BUILT_IN_VIEWS}))
                    raise InputError(
                        f"The loss '{each.label}' needs the view '{name}', but this recipe has {known}. Add a table [views.{name}]."
                    )
        self.evaluators = evaluators_of(
            recipe, info, {*declared_by(self.losses), *({SOFT_LABELS} if recipe.own_labels.kind != "hard" else ())}
        )
        if self.evaluators:
            self.real.check_test_set()
        if recipe.engine.deterministic:
            check_deterministic(self)
        self.decided = ExecutionPlan(
            recipe, self.requires, info, self.device, self.ranks, self.real.counts().values(),
            images_per_class=self.images_per_class, network=lambda: self.probe("network", self.model),
            teacher=self.teacher_probe,
        )  # fmt: skip
        check_networks(self)
        if recipe.network.trained_on != "none" and self.decided.needs_network:
            check_training(self)

    def _view(self, name: str) -> ViewSpec:
        table = self.recipe.views[name]
        if table.compose is not None and not hasattr(registry.options_of("augmenter", table.augmenter, {}, f"views.{name}"), "compose"):
            where = f"views.{name}.compose"
            raise InputError(f"{where}: the augmenter '{table.augmenter}' has no option 'compose'. Leave it out, or use dsa.", where)
        options = table.options | ({} if table.compose is None else {"compose": table.compose})
        return ViewSpec(registry.create("augmenter", table.augmenter, options, data=self.info, where=f"views.{name}"), table.noise)

    def teacher_probe(self) -> nn.Module:
        """Returns a network of the teacher's kind: what its file records, else what the recipe says."""
        table = self.recipe.teacher
        record = {} if table.use == "auto" else self._teacher_record
        name, options = record.get("model", table.model), record.get("options", table.options)
        return self.probe(
            "teacher", registry.create("model", name, options, data=self.info, where="teacher"), record.get("input_shape")
        ).eval()

    def probe(self, whose: str, model: Model, made_for: Sequence[int] | None = None) -> nn.Module:
        """Returns a network of `model`, made for images (C, H, W) if that is known; raises InputError if it does not take the data's."""
        probe = build_network(model, self.info, 0, "probe")
        with modes_kept(probe), torch.no_grad():
            probe.eval()
            try:
                probe(torch.zeros(2, *self.info.shape))
            except (RuntimeError, ValueError) as error:
                size = ",".join(str(side) for side in made_for[1:]) if made_for else "HEIGHT,WIDTH"
                raise InputError(
                    f"The {called('model', model)} of the {whose} does not take the images of the data, which have the shape "
                    f"{self.info.shape} (C, H, W): {str(error).splitlines()[0]}. Add --set 'data.size=[{size}]', the size that it was made "
                    "for, or use another model.",
                    f"{whose}.model",
                ) from None
        return probe

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The sha256 of what the result depends on beside recipe and code, by name: accessible images and labels, and the teacher."""
        found = {"the accessible data": self.real.digest()}
        if self.teacher is not None and self.distils_with_teacher:
            name = AUTOMATIC_TEACHER if self.recipe.teacher.use == "auto" else f"{TEACHER_FILE}{Path(self.recipe.teacher.use).name}"
            found[name] = self.teacher.sha256 or ""
        if self.experts is not None:
            found[AUTOMATIC_EXPERTS if self.recipe.experts.use == "auto" else "the experts"] = self.experts.digest
        return found

    @property
    def needs_teacher(self) -> bool:
        return self.distils_with_teacher or any(evaluator.requires.teacher for evaluator in self.evaluators.values())

    @property
    def distils_with_teacher(self) -> bool:
        asked = [*self.requires, self.initializer.requires]
        labels = self.recipe.own_labels
        labelled = labels.kind == "teacher" or (labels.kind == "learned" and labels.init == "teacher")
        return labelled or any(requires.teacher for requires in asked) or self.recipe.teacher.use != "auto"

    def prepare(self, *, train_it: bool = True) -> None:
        """Makes teacher, first images, engine and resolved recipe: what fails after this is a step, an evaluation or the disk.

        Writes nothing but caches. `train_it`: as in load_teacher.
        """
        if self.decided.arithmetic.compile and train_it:
            get_ready()
        self.load_teacher(train_it=train_it)
        self.load_experts(train_it=train_it)
        self.initial = initial_set(self)
        self.bank = self.initial.bank
        self.resolved_recipe = resolved(self)
        self.ranks.check_same("The resolved recipe", dict(flattened(recipe_dict(self.resolved_recipe))))
        self.engine = self.engine_over(self.bank)
        if self.begun:
            return
        with products(self.device, self.decided.products):
            self.engine.start(self.initial.soft_labels)
            if SOFT_LABELS in self.bank.parameters and self.recipe.steps:
                self.engine.evaluate(0)  # an error if no loss teaches the labels, which a step shows
        if self.evaluators and self.ranks.is_main:
            _ = self.real.test_set  # a test image that cannot be read is reported before the run, not after it

    def load_teacher(self, *, train_it: bool = True) -> None:
        """Loads the teacher, or trains an automatic one; a recipe that needs none gets none.

        Where it is not to be trained (`train_it`) and is not in the cache, a fresh network stands in for it, for the checks of a plan.
        """
        if not self.needs_teacher:
            return
        if self.recipe.teacher.use == "auto":
            self.teacher = automatic_teacher(
                self.dataset, self.info.shape, self.recipe.teacher, self.recipe.train, self.device, self.watchers,
                data=self.recipe.data, ranks=self.ranks, train_it=train_it,
            )  # fmt: skip
            if self.teacher is None:
                channels = self.info.channels
                units = self.normalisation if len(self.real.labels) else Normalisation([0.5] * channels, [0.25] * channels)
                self.teacher = Teacher(self.teacher_probe().to(self.device), mean=units.mean, std=units.std, whitening=units.whitening)
                return
        else:
            self.teacher = load_teacher(self.recipe.teacher, self.info, self.device)
            check_whitened(self, self.teacher)
        self.ranks.check_same("The teacher", self.teacher.sha256)
        self.tested = tested(self.teacher, self.real, self.device, self.recipe.teacher)

    @property
    def draws_experts(self) -> bool:
        """Whether the networks of the steps are experts."""
        return self.recipe.network.source == "experts" and self.decided.needs_network

    @property
    def needs_experts(self) -> bool:
        return self.draws_experts or self._labelled_by_experts or any(requires.experts for requires in self.requires)

    @property
    def _labelled_by_experts(self) -> bool:
        """Whether learned labels begin as those of experts."""
        return self.recipe.own_labels.kind == "learned" and self.recipe.own_labels.init == "experts"

    def load_experts(self, *, train_it: bool = True) -> None:
        """Loads the experts, or trains automatic ones; a recipe that needs none gets none. `train_it`: as in load_teacher."""
        if not self.needs_experts:
            return
        recipe, channels = self.recipe, self.info.channels
        units = self.normalisation if self.teacher is not None and self.distils_with_teacher else None
        stand_in = untrained(self.model, self.info, recipe.experts, units or Normalisation([0.5] * channels, [0.25] * channels))
        if recipe.experts.use == "auto":
            check_epochs(self, stand_in)  # before they are trained
        self.experts = experts_of(
            recipe, self.real, self.model, self.device, self.watchers, units=units, ranks=self.ranks, train_it=train_it
        )
        if self.experts is None:
            self.experts = stand_in
            if recipe.data.whiten and units is None and len(self.real.labels):
                stand_in.normalisation = self.normalisation
        self.ranks.check_same("The experts", self.experts.digest)
        check_epochs(self, self.experts)
        self._normalisation = self.experts.normalisation

    @property
    def normalisation(self) -> Normalisation:
        """The teacher's statistics where there is a teacher (load it first), else the experts', else those of the accessible images.

        An automatic teacher that evaluators alone ask for does not count: what is distilled does not depend on them.
        """
        if self._normalisation is not None:  # a cached_property holds a lock, and this waits for other parts of the run
            return self._normalisation
        if self.teacher is not None and (self.distils_with_teacher or len(self.real.labels) == 0):
            self._normalisation = self.teacher.normalisation
        elif len(self.real.labels) == 0:
            raise InputError("With --pipc 0 the normalisation must come from a teacher. Add --teacher FILE.")
        else:
            together = channel_statistics(
                self.real.images, rows=len(self.real.labels), total=lambda own: self.ranks.all_reduce([own], "channel statistics")[0]
            )
            self._normalisation = Normalisation(*together, self._whitening() if self.recipe.data.whiten else None)
        return self._normalisation

    def _whitening(self) -> Whitening:
        """Returns the ZCA of the accessible images, which the main process computes."""
        self.watchers.begin("start", f"Computing the whitening of {len(self.real.labels):,} images")
        made = whitening_of(self.real.all_images(), self.recipe.data) if self.ranks.is_main else None
        return shared(made, self.info.shape, self.ranks)

    @property
    def stores_pixels(self) -> bool:
        """Whether what the set stores are images in pixel units."""
        whitened = self.recipe.data.whiten and self.recipe.parametrization.use != "pixels"
        return stored_in_pixels(self.parametrization, whitened)

    @property
    def stored_labels(self) -> Tensor:
        """(n,) int64: the class of each row that the set stores."""
        return self.labels_of(range(self.info.classes))[:: self.parametrization.per_row]

    @property
    def shown_labels(self) -> Tensor:
        """(n,) int64: the class of each image of the set in pictures: its rows if they are images, else what they make."""
        return self.stored_labels if self.stores_pixels else self.labels_of(range(self.info.classes))

    def engine_over(self, bank: Bank) -> Engine:
        """Returns the engine of this run over `bank`."""
        table = self.recipe.network
        twice = None
        if self.teacher is not None and "teacher" in self.decided.compiled:
            twice = SecondOrder(self.teacher.module, self.decided.arithmetic_of("teacher"), block=self.decided.teacher_block)
        differentiate: Callable[[nn.Module], ClassGradients] = ClassGradients
        if "gradients" in self.decided.compiled:
            blocks = self.decided.gradient_blocks
            differentiate = partial(ClassGradients, arithmetic=self.decided.arithmetic_of("gradients"), blocks=blocks)
        draws = Draws(
            seed=self.recipe.seed, info=self.info, normalisation=self.normalisation, real_images=self.real.images,
            real_labels=self.real.labels, batch=self.recipe.data.batch, augmenter=self.augmenter, views=self.views,
            device=self.device, ranks=self.ranks,
        )  # fmt: skip
        networks = NetworkPool(
            draws=draws, model=self.model if self.decided.needs_network or self._labelled_by_experts else None,
            arithmetic=self.decided.arithmetic_of("network"), block=self.decided.block, size=table.pool, renew_every=table.renew_every,
            inner=_inner(table) if table.trained_on != "none" and self.decided.needs_network else None, experts=self.experts,
            epochs=(table.first, table.last) if self.draws_experts else None, interpolate=table.interpolate, differentiate=differentiate,
        )  # fmt: skip
        source = StepSource(draws=draws, networks=networks, teacher=self.teacher, twice=twice, labels=self.recipe.own_labels)
        return Engine(bank, source, self.losses, chunk=self.decided.chunk)


def _inner(table: NetworkTable) -> Inner:
    """Returns how [network] says that networks are trained between steps."""
    schedule = Schedule(
        epochs=table.inner_epochs or 1, batch=table.batch, optimizer=table.inner_optimizer, lr=table.inner_lr, schedule="constant",
        momentum=table.inner_momentum, weight_decay=table.inner_weight_decay, mix=table.inner_mix, mix_share=table.inner_mix_share,
    )  # fmt: skip
    return Inner(schedule, steps=table.inner_steps, real=table.trained_on == "real", augmented=table.inner_augment)


def evaluators_of(recipe: Recipe, info: DataInfo, parameters: Collection[str]) -> dict[str, Evaluator]:
    """Returns the evaluators of `recipe` for the data, by label, checked, for a set that has `parameters` beside its images.

    Raises InputError where one needs real images and there are none, or a parameter that the set does not have.
    """
    made: dict[str, Evaluator] = {
        label: registry.create("evaluator", table.use or label, evaluator_options(recipe, label), data=info, where=f"evaluators.{label}")
        for label, table in recipe.evaluators.items()
    }
    for label, evaluator in made.items():
        with blamed("evaluator", evaluator, building=True, may_draw=True):
            evaluator.check(info)
        for name in (name for name in evaluator.requires.parameters if name not in parameters):
            raise InputError(
                f"evaluators.{label} has an option `stored`, in its table or its protocol, which needs the parameter {name} of the set. "
                f"This set has none. Use a value instead of `stored`, or another protocol. `ddkit info {evaluator.name}` shows the "
                "options.",
                f"evaluators.{label}",
            )
    needing = [label for label, evaluator in made.items() if evaluator.requires.real]
    if recipe.pipc == 0 and needing:
        raise InputError(
            f"With pipc 0 there are no real images, but the evaluator {', '.join(needing)} needs some. Set --pipc to at least 1.", "pipc"
        )
    return made
