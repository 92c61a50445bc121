"""The conformance suite of evaluators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddkit.components import registry
from ddkit.components.base import Evaluation, EvaluationData
from ddkit.nn.networks import build_network
from ddkit.nn.teacher import Teacher
from ddkit.run.artifact import Artifact
from ddkit.seeding import generator
from ddkit.testing.suite import Broken, ShapeConformance, changed, check, copies, global_state_is_kept, info_of
from ddkit.testing.world import CPU


class EvaluatorConformance(ShapeConformance):
    """Checks of an evaluator; give it `options` that make it quick."""

    kind = "evaluator"
    oblong = (3, 8, 12)

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._evaluated(shape)

    def _evaluated(self, shape: tuple[int, int, int] = (1, 8, 8)) -> tuple[Sequence[Evaluation], dict[str, Tensor]]:
        info = info_of(shape)
        labels = torch.arange(3)
        artifact = Artifact(
            torch.rand((3, *shape), generator=generator(0, "conformance", "set")), labels,
            {"class_names": list(info.class_names), "mean": [0.5] * shape[0], "std": [0.25] * shape[0], "ipc": 1, "pipc": 2, "seed": 0},
        )  # fmt: skip
        data = EvaluationData(
            info=info, test_images=torch.rand((9, *shape), generator=generator(0, "test")), test_labels=labels.repeat(3),
            real_images=torch.rand((6, *shape), generator=generator(0, "real")), real_labels=labels.repeat_interleave(2), seed=0,
            device=CPU, report=lambda done, total: None,
        )  # fmt: skip
        evaluator = self.make(info)
        evaluator.check(info)
        module = build_network(registry.create("model", "convnet", {"width": 4}, data=info), info, 0, "conformance")
        teacher = Teacher(module, mean=(0.5,) * shape[0], std=(0.25,) * shape[0]) if evaluator.requires.teacher else None
        tensors = {"set": artifact.images, "labels": artifact.labels, "test images": data.test_images, "real images": data.real_images}
        return evaluator(artifact, data, teacher), tensors

    @check
    def test_returns_rows_of_fractions(self) -> None:
        """It returns one `ddkit.Evaluation` or more, which take accuracies in 0..1 and hard or soft labels alone."""
        rows, _ = self._evaluated()
        if not rows or not all(isinstance(row, Evaluation) for row in rows):
            raise Broken(f"The evaluator '{self.label}' returns {rows!r}; it has to be at least one ddkit.Evaluation.")

    @check
    def test_same_seed_same_result(self) -> None:
        """The accuracies are a function of set, data and seed."""
        torch.manual_seed(1)
        one, _ = self._evaluated()
        torch.manual_seed(2)
        two, _ = self._evaluated()
        if [row.accuracy_mean for row in one] != [row.accuracy_mean for row in two]:
            raise Broken(f"The evaluator '{self.label}' gives another accuracy for the same set and seed.")

    @check
    def test_inputs_are_unchanged(self) -> None:
        """The set and the real data are as before, and so is all global state."""
        with global_state_is_kept(f"The evaluator '{self.label}'"):
            _, tensors = self._evaluated()
        _, fresh = self._evaluated()
        if changed(copies(fresh), tensors):
            raise Broken(f"The evaluator '{self.label}' changes {', '.join(changed(copies(fresh), tensors))}.")
