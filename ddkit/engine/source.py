"""The parts of a run that do not change between its steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from ddkit.engine.draws import Draws
from ddkit.engine.pool import NetworkPool
from ddkit.nn.second_order import SecondOrder
from ddkit.nn.teacher import Teacher
from ddkit.recipes.tables import LabelsTable


@dataclass(kw_only=True)
class StepSource:
    """What a step is built from, beside the set: what is drawn, the networks, the teacher, and how the set is labelled.

    `twice` gives the teacher's logits to losses that differentiate its gradients (None: plain operations do).
    """

    draws: Draws
    networks: NetworkPool
    teacher: Teacher | None = None
    twice: SecondOrder | None = None
    labels: LabelsTable = field(default_factory=LabelsTable)
