"""The set that a run begins from: the initializer's images, encoded by the parametrization, in the bank that the engine updates."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ddkit.components import registry
from ddkit.components.base import InitContext
from ddkit.components.guard import blamed, called
from ddkit.data.real import repeated
from ddkit.distributed import class_rows
from ddkit.engine.bank import Bank
from ddkit.engine.labels import label_parameters
from ddkit.engine.losses import declared_by
from ddkit.errors import RunFailed
from ddkit.nn.embedder import features_of
from ddkit.run.doubts import too_coarse
from ddkit.seeding import generator

if TYPE_CHECKING:
    from ddkit.run.setup import RunSetup

log = logging.getLogger("ddkit")


class InitialSet(NamedTuple):
    bank: Bank
    soft_labels: Tensor | None = None  # (n, K), if the initializer has others than the classes of its images
    encoding_error: float = 0.0  # root mean square difference of the decoded images from the initializer's, normalised units


def initial_set(setup: RunSetup) -> InitialSet:
    """Returns the initial synthetic set; where the run has begun, one of zeros for the state that was kept."""
    own = setup.own_classes
    parametrization = setup.parametrization
    rows = setup.labels_of(own)
    soft_labels = None
    if setup.begun:
        images = torch.zeros((len(rows), *setup.info.shape))
    else:
        setup.watchers.begin("start", f"Making the first images ({registry.split_name(setup.recipe.initializer.use)[0]})")
        images, soft_labels = _initial_images(setup, rows)
    with blamed("parametrization", parametrization, building=True):
        stored = parametrization.encode(images, parametrization.shared(setup.info.shape))
    declared = {**declared_by(setup.losses), **label_parameters(setup.recipe.own_labels, setup.info.classes)}
    bank = Bank(
        stored.to(setup.device), rows[:: parametrization.per_row].to(setup.device), declared, setup.recipe.optimizer,
        parametrization=parametrization, shape=setup.info.shape,
        start=sum(setup.counts(range(own.start))) // parametrization.per_row, size=len(setup.stored_labels),
    )  # fmt: skip
    if stored is images:
        return InitialSet(bank, soft_labels)
    made = bank.decoded(bank.rows(None))
    if (made.shape, made.dtype) != (images.shape, torch.float32) or not bool(made.isfinite().all()):
        raise RunFailed(
            f"The {called('parametrization', parametrization)} made images of shape {tuple(made.shape)} and {made.dtype}, or images that "
            f"are not finite. It must make finite float32 images of shape {tuple(images.shape)}.{parametrization.advice}"
        )
    if setup.begun:
        return InitialSet(bank)
    square = (made.detach().cpu() - images).double().square().sum()
    total, whole = setup.ranks.all_reduce([square, images.double().square().sum()], "encoding")
    error = math.sqrt(float(total) / (sum(setup.images_per_class) * math.prod(setup.info.shape)))
    setup.watchers.begin(
        "start",
        f"The first images of the parametrization {parametrization.name} differ by {error:.3f} (root mean square, normalised units) from "
        "those of the initializer",
    )
    if setup.initializer.needed(max(setup.images_per_class)):  # noise has no form that could be lost
        for sentence in too_coarse(parametrization.name, math.sqrt(float(total / whole))):
            log.warning("%s", sentence)
    return InitialSet(bank, soft_labels, error)


def _initial_images(setup: RunSetup, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns what the initializer gives for labels (n,) of this process's classes: images (n, C, H, W), normalised, and soft labels.

    An initializer that does not do class by class gets the labels of all classes, so that the set begins as that of a single process.
    """
    recipe = setup.recipe
    initializer = setup.initializer
    together = setup.ranks.world_size > 1 and not initializer.by_class
    if together:
        labels = setup.labels_of(range(setup.info.classes))
    real = setup.real.all_images() if together else setup.real.images
    real_labels = setup.real.labels if together else setup.real.labels[setup.real.own]
    if recipe.initializer.reuse:
        real, real_labels = repeated(real, real_labels, [initializer.needed(each) for each in setup.images_per_class])
    guide = setup.teacher if initializer.requires.teacher else None
    start = InitContext(
        labels=labels,
        shape=setup.info.shape,
        real_images=setup.normalisation.lazily(real),
        real_labels=real_labels,
        generator=lambda label: generator(recipe.seed, "initializer", label),
        class_names=setup.info.class_names,
        normalisation=setup.normalisation,
        teacher=guide,
        features=None if guide is None else lambda images: features_of(guide.module, images),
    )
    soft_labels = None
    with blamed("initializer", initializer, building=True):
        images = initializer(start)
    shape = (len(labels), *setup.info.shape)
    fits = isinstance(images, Tensor) and images.is_floating_point() and tuple(images.shape) == shape
    if not fits or not bool(images.isfinite().all()):
        what = f"images of shape {tuple(images.shape)}, {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise RunFailed(
            f"The {called('initializer', initializer)} returned {what}{', not finite' if fits else ''}. It must return finite "
            f"floats of shape {shape}.{initializer.advice}"
        )
    if (recipe.own_labels.kind, recipe.own_labels.init) == ("learned", "auto"):
        with blamed("initializer", initializer, building=True):
            soft_labels = initializer.soft_labels(start)
        if soft_labels is not None and soft_labels.shape != (len(labels), setup.info.classes):
            raise RunFailed(
                f"The {called('initializer', initializer)} returned soft labels of shape {tuple(soft_labels.shape)}. The shape must be "
                f"{(len(labels), setup.info.classes)}, a row for each image.{initializer.advice}"
            )
    own = class_rows(labels, setup.own_classes) if together else slice(None)
    return images[own], None if soft_labels is None else soft_labels[own]
