"""Evaluators made of `accuracy`: `transfer`, over architectures, and `ranking`, the scores of DD-Ranking."""

from __future__ import annotations

import logging
import math
from typing import Any

import ddkit
from ddkit_evaluators import Accuracy, stored_with_a_set
from ddkit_evaluators.trainer import fields_of

log = logging.getLogger("ddkit")


class Transfer(Accuracy):
    """Test accuracy over architectures: several kinds of networks are trained on the set, with a row for each.

    It shows how well a set trains architectures that it was not made with. All options are those of the evaluator `accuracy`.
    """

    model: str | None = ddkit.option("convnet,mlp,lenet,resnet18,vgg11", "architectures of the networks, separated by commas")


class Ranking(ddkit.Evaluator):
    """The scores of DD-Ranking, which separate the effect of the set from that of the protocol and of soft labels.

    With accuracies as fractions of 1, hard labels, and the evaluation of `accuracy` under `protocol`:

    - hlr, the hard-label recovery: accuracy of a network trained on all real data, minus that of one trained on the set, lower is better
    - ior, the improvement over random: accuracy of the set, minus that of as many random real images (the row says if there are fewer)
    - lrs = (e^a - e^-1) / (e - e^-1) with a = 0.5 ior - 0.5 hlr
    - ars, the same formula with a = 0.5 times the improvement over random with augmentation plus 0.5 times that without

    "All real data" is the teacher's accuracy on the same test images, or the option `full`. accuracy_mean is that of the set.
    Source: Li et al., DD-Ranking: Rethinking the Evaluation of Dataset Distillation, arXiv 2505.13300.
    """

    shares = True

    protocol: str | ddkit.nn.Protocol = ddkit.option(
        "short", "name or file of the protocol, which says how networks are trained and tested"
    )
    model: str = ddkit.option("convnet", "architecture of the networks")
    model_options: dict[str, Any] = ddkit.option(dict(), "options of the model")
    repeats: int | None = ddkit.option(None, "number of networks; if left out, as in the protocol", ge=1)
    epochs: int | None = ddkit.option(None, "passes over the set; if left out, as in the protocol", ge=1)
    full: float | None = ddkit.option(
        None, "accuracy of networks trained on all real data; if left out, the accuracy of the teacher", ge=0, le=1
    )

    def requires(self) -> ddkit.Requires:
        protocol = ddkit.nn.read_protocol(self.protocol) if isinstance(self.protocol, str) else self.protocol
        return ddkit.Requires(real=True, teacher=self.full is None, parameters=stored_with_a_set(lr=protocol.lr))

    def check(self, info: ddkit.DataInfo) -> None:
        if "," in self.model:
            raise ddkit.InputError(f"{self.recipe_path}.model = {self.model!r}: the scores are for one architecture. Name only one.")
        self._accuracy(info, "auto").check(info)

    def _accuracy(self, info: ddkit.DataInfo, augment: str) -> ddkit.Evaluator:
        own = {key: value for key, value in fields_of(self.options).items() if key != "full" and value is not None}
        made: ddkit.Evaluator = ddkit.create(
            "evaluator", "accuracy", own | {"augment": augment, "labels": "hard"}, data=info, where=self.recipe_path
        )
        return made

    def __call__(
        self, artifact: ddkit.Artifact, data: ddkit.data.EvaluationData, teacher: ddkit.nn.Teacher | None
    ) -> list[ddkit.Evaluation]:
        if not len(data.real_images):
            raise ddkit.InputError(
                f"{self.recipe_path} compares the set with random real images, but none are accessible. Use a larger --pipc."
            )
        full = self._full(data, teacher)
        with_, without = (self._accuracy(data.info, augment)(artifact, data, None)[0] for augment in ("auto", "none"))
        found = scores(full, _pair(with_), _pair(without))
        summary = ", ".join(f"{name.upper()} {value:.3f}" for name, value in found.items())
        summary += f", random real: {with_.details['random_real']}" if with_.details.get("random_real") else ""
        details = {"summary": summary, **found, "full": full}
        details |= {"unaugmented": {"accuracy_mean": without.accuracy_mean, "random_real_mean": without.random_real_mean}}
        return [ddkit.Evaluation(**fields_of(with_) | {"evaluator": self.name, "details": with_.details | details})]

    def _full(self, data: ddkit.data.EvaluationData, teacher: ddkit.nn.Teacher | None) -> float:
        if self.full is not None:
            return float(self.full)
        if teacher is None:
            raise ddkit.InputError(f"{self.recipe_path} needs a teacher, or --set {self.recipe_path}.full=ACCURACY.")
        if data.split != "test":
            log.warning(
                "hlr and lrs are worse than they should be, because the teacher was trained on the held-out images too. Set %s.full.",
                self.recipe_path,
            )
        images = teacher.normalisation.lazily(data.test_images).to(data.device)
        return ddkit.nn.accuracy(teacher.module, images, data.test_labels.to(data.device))


def _pair(row: ddkit.Evaluation) -> tuple[float, float]:
    assert row.accuracy_mean is not None
    assert row.random_real_mean is not None
    return row.accuracy_mean, row.random_real_mean


def scores(full: float, augmented: tuple[float, float], plain: tuple[float, float]) -> dict[str, float]:
    """Returns hlr, ior, lrs and ars from fractions: `full`, and (set, random real) with augmentation and without."""
    hlr, ior = full - augmented[0], augmented[0] - augmented[1]
    gap = 0.5 * ior + 0.5 * (plain[0] - plain[1])
    return {"hlr": hlr, "ior": ior, "lrs": _scaled(0.5 * ior - 0.5 * hlr), "ars": _scaled(gap)}


def _scaled(value: float) -> float:
    """Returns 0 for -1, 1 for 1, growing exponentially in between."""
    return (math.exp(value) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
