"""The estimated cost of a run, as `ddkit distill --plan` shows it: seconds, memory and operations."""

from __future__ import annotations

import math
from typing import Any

from ddkit.data.images import on_disk
from ddkit.nn.device import product_rate
from ddkit.nn.networks import build_network, training_flops
from ddkit.run.setup import RunSetup

SHARE = 0.4  # of the rate of large matrix products that networks reach on a CPU: 0.2 uncompiled to 0.68 (docs/explanation/performance.md)
PROCESS_MIB = 450  # Python, torch and what both load
BANK_COPIES = 4  # of the synthetic images: they, their gradient, and two moments


def estimated(setup: RunSetup) -> dict[str, Any]:
    """Returns seconds, MiB and the operations of each stage; the measurement takes about a quarter of a second.

    The seconds leave out reading, augmenting and compiling, and what evaluators do not report.
    """
    recipe, info, decided = setup.recipe, setup.info, setup.decided
    operations = {
        "teacher": training_flops(setup.teacher.module, setup.info, images=len(setup.dataset.labels("train")), epochs=recipe.train.epochs)
        if setup.teacher is not None and not setup.teacher.path
        else 0.0,
        "experts": training_flops(
            build_network(setup.model, info, 0, "probe"), info, epochs=setup.experts.trained,
            images=len(setup.dataset.labels("train") if recipe.experts.data == "all" else setup.real.labels) * setup.experts.count,
        ) if setup.experts is not None and not setup.experts.path else 0.0,
        "steps": decided.step_flops() * recipe.steps / setup.ranks.world_size,
        "evaluation": sum(
            each.operations(
                info, rows=sum(setup.images_per_class), real=len(setup.real.labels), tests=len(setup.real.test_set[1])
            ) for each in setup.evaluators.values()
        ),
    }  # fmt: skip
    side, count = (4096, 20) if setup.device.type == "cuda" else (1024, 8)
    rate = product_rate(setup.device, decided.arithmetic.precision, side=side, count=count)
    held = [setup.real.images, setup.real.test_set[0]] if setup.evaluators else [setup.real.images]
    images = sum(each.nbytes for each in held if not on_disk(each))
    bank = BANK_COPIES * 4 * sum(setup.counts(setup.own_classes)) * math.prod(info.shape)
    return {
        "seconds": round(sum(operations.values()) / (SHARE * rate), 1),
        "memory_mib": round(PROCESS_MIB + (images + bank + decided.step_bytes()) / 2**20),
        "operations": operations,
        "operations_per_second": rate,
    }
