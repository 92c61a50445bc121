"""The refusals of a run before it trains or writes anything: what its initializer, memory, networks, teacher or experts do not allow."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch

from ddkit.components import registry
from ddkit.components.base import Component
from ddkit.components.guard import called
from ddkit.data.real import class_counts
from ddkit.errors import InputError
from ddkit.files import machine_bytes
from ddkit.nn.experts import Experts
from ddkit.nn.networks import batch_norms, build_network, network_tensors, no_second_derivative
from ddkit.nn.teacher import Teacher
from ddkit.text import shown

if TYPE_CHECKING:
    from ddkit.run.setup import RunSetup


def check_room(setup: RunSetup) -> None:
    """Raises InputError, before an image is opened, where the initializer cannot have its images."""
    recipe, counts = setup.recipe, class_counts(setup.dataset.labels("train"), len(setup.dataset.class_names))
    limit = math.inf if recipe.pipc == "all" else recipe.pipc
    available = {name: int(min(count, limit)) for name, count in zip(setup.dataset.class_names, counts, strict=True)}
    for each in sorted(set(setup.images_per_class)):
        own = {name: available[name] for name, images in zip(available, setup.images_per_class, strict=True) if images == each}
        if recipe.initializer.reuse:
            own = {name: max(count, setup.initializer.needed(each)) if count else 0 for name, count in own.items()}
        setup.initializer.check(each, own)


def check_memory(setup: RunSetup) -> None:
    """Raises InputError if the synthetic images, their gradient and Adam's two averages are larger than this machine's memory."""
    images, memory = 4 * sum(setup.counts(setup.own_classes)) * math.prod(setup.info.shape), machine_bytes()
    if (4 * images if setup.recipe.steps else images) > memory:
        more = " Their updates need four times as much." if images <= memory else ""
        raise InputError(
            f"ipc = {shown(setup.recipe.ipc)} makes {images / 2**30:,.0f} GiB of images, but this machine has "
            f"{memory / 2**30:,.0f} GiB of memory.{more} Use a smaller ipc.",
            "ipc",
        )


def check_deterministic(setup: RunSetup) -> None:
    """Raises InputError naming the components that cannot keep engine.deterministic on the run's device."""
    named: list[tuple[str, Component]] = [
        *((str(each), each.loss) for each in setup.losses),
        (called("augmenter", setup.augmenter), setup.augmenter),
        *((f"{called('augmenter', view.augmenter)} of views.{name}", view.augmenter) for name, view in sorted(setup.views.items())),
        (called("model", setup.model), setup.model),
    ]
    kind = setup.device.type
    reasons = [f"{name}: {reason}" for name, component in named if (reason := component.nondeterministic(kind))]
    if reasons:
        raise InputError(
            f"engine.deterministic (--deterministic): on {kind} these components cannot give the same bytes twice: "
            f"{'; '.join(reasons)}. Use other components (for dsa, other operations), --device cpu, or leave --deterministic out.",
            "engine.deterministic",
        )


def check_networks(setup: RunSetup) -> None:
    """Raises InputError, before a teacher is trained, where a loss cannot work with networks or teachers of the run's kind."""
    probes = {"teacher": cache(setup.teacher_probe), "network": cache(lambda: setup.probe("network", setup.model))}
    for each in setup.losses:
        needed = {name: probe().to(setup.device) for name, probe in probes.items() if getattr(each.requires, name)}
        with each.blamed():
            each.loss.check(network=needed.get("network"), teacher=needed.get("teacher"))
        for name, probe in needed.items() if each.requires.second_order else ():
            reason = no_second_derivative(probe, setup.info)
            if reason:
                raise InputError(
                    f"The {each} needs second derivatives, but the {name} has none: {reason}. Use another --model, or "
                    f"leave the loss out.{each.advice}",
                    f"losses.{each.label}",
                )


def check_training(setup: RunSetup) -> None:
    """Raises InputError if the pool's weights, and what their optimizers keep, are larger than this machine's memory, or if a batch of
    one image is left that batch norm cannot take."""
    table, memory, probe = setup.recipe.network, machine_bytes(), build_network(setup.model, setup.info, 0, "probe")
    copies = 1 + (2 if table.inner_optimizer != "sgd" else 1 if table.inner_momentum else 0)
    each = copies * sum(value.nbytes for value in network_tensors(probe).values())
    if table.pool > 1 and table.pool * each > memory:
        raise InputError(
            f"network.pool = {table.pool}: the networks need {table.pool * each / 2**30:,.0f} GiB, but this machine has "
            f"{memory / 2**30:,.0f} GiB of memory. Use at most {memory // each // 2}.",
            "network.pool",
        )
    images = len(setup.real.labels) if table.trained_on == "real" else sum(setup.images_per_class)
    reached = not table.inner_steps or table.inner_steps * table.batch > images
    if batch_norms(probe) and (table.batch == 1 or (images % table.batch == 1 and reached)):
        try:
            probe.train()(torch.zeros(1, *setup.info.shape))
        except ValueError as error:
            raise InputError(
                f"network.batch = {table.batch}: the last batch of {images} images has one image, which batch norm cannot use "
                f"({error}). Use --set network.batch={table.batch + 1}.",
                "network.batch",
            ) from None


def check_whitened(setup: RunSetup, teacher: Teacher) -> None:
    """Raises InputError where a teacher that takes part was trained on whitened images and the run's are plain, or the reverse."""
    whiten, data = setup.recipe.data.whiten, registry.split_name(setup.recipe.data.use)[0]
    if (teacher.whitening is not None) == whiten or not setup.distils_with_teacher:
        return
    if whiten:
        raise InputError(
            f"data.whiten: the teacher {teacher.path} was trained on plain images, but the networks of this run see whitened images. "
            f"Leave data.whiten out, or train a teacher on whitened images: ddkit train --dataset {data} --set data.whiten=true --out "
            "FILE.",
            "data.whiten",
        )
    raise InputError(
        f"The teacher {teacher.path} was trained on whitened images, but those of this run are plain. Use --set data.whiten=true.",
        "data.whiten",
    )


def check_epochs(setup: RunSetup, experts: Experts) -> None:
    """Raises InputError where the experts have no epochs such as networks or losses ask for."""
    table = setup.recipe.network
    if setup.draws_experts:
        experts.rows(table.first, table.last)
    if setup.draws_experts and table.interpolate:
        experts.rows(table.first, table.first, experts.span(table.first, table.last))
    for each in setup.losses:
        with each.blamed():
            draws = each.loss.expert_draws()
        for span, first, last in draws:
            experts.rows(first, last, span, f"losses.{each.label}")
