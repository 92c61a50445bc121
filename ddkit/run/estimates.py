"""Roughly how long a run takes on this machine, and how much memory: counted operations, at a measured rate of matrix products."""

from __future__ import annotations

from typing import Any

from ddkit.data.images import on_disk
from ddkit.nn.device import product_rate
from ddkit.nn.networks import training_flops
from ddkit.run.setup import RunSetup

SHARE = 0.4  # of the rate of large matrix products that networks reach on a CPU: 0.2 uncompiled to 0.68 (docs/performance.md)
PROCESS_MIB = 450  # Python, torch and what both load
BANK_COPIES = 4  # of the synthetic images: they, their gradient, and two moments


def estimated(job: RunSetup) -> dict[str, Any]:
    """Returns seconds, MiB and the operations of each stage; the measurement takes about a quarter of a second.

    The seconds leave out reading, augmenting and compiling, and what evaluators do not tell.
    """
    recipe, info, decided = job.recipe, job.info, job.decided
    operations = {
        "teacher": _training(job),
        "steps": decided.step_flops() * recipe.steps / job.ranks.world_size,
        "evaluation": sum(
            each.operations(
                info, rows=info.classes * recipe.rows_per_class, real=len(job.real.labels), tests=len(job.real.test_set[1])
            ) for each in job.evaluators.values()
        ),
    }  # fmt: skip
    side, count = (4096, 20) if job.device.type == "cuda" else (1024, 8)
    rate = product_rate(job.device, decided.arithmetic.precision, side=side, count=count)
    held = [job.real.images, job.real.test_set[0]] if job.evaluators else [job.real.images]
    images = sum(each.nbytes for each in held if not on_disk(each))
    bank = BANK_COPIES * 4 * len(job.own_classes) * recipe.rows_per_class * info.channels * info.size[0] * info.size[1]
    return {
        "seconds": round(sum(operations.values()) / (SHARE * rate), 1),
        "memory_mib": round(PROCESS_MIB + (images + bank + decided.step_bytes()) / 2**20),
        "operations": operations,
        "operations_per_second": rate,
    }


def _training(job: RunSetup) -> float:
    """Returns the operations of training the teacher, 0 where it is there."""
    if job.teacher is None or job.teacher.path:
        return 0.0
    return training_flops(job.teacher.module, job.info, images=len(job.dataset.labels("train")), epochs=job.recipe.train.epochs)
