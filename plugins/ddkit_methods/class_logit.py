"""The logit of an image's class, with the features before it held near real ones: the loss `class-logit`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ddkit
from ddkit.nn import layer_features


def class_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns minus the mean logit of each row's label, a scalar, of logits (n, K) and labels (n,) int64.

    Source: Nguyen et al., Re-thinking Model Inversion Attacks, CVPR 2023, arXiv 2304.01669, first term of L_logit.

    >>> import torch
    >>> float(class_logit(torch.tensor([[1.0, 5.0], [3.0, 0.0]]), torch.tensor([1, 0])))
    -4.0
    """
    return -logits.gather(1, labels[:, None]).mean()


def feature_distance(features: Tensor, real: Tensor) -> Tensor:
    """Returns the mean over all values of (features - mean of real)², a scalar, of features (n, d) and real ones (m, d).

    Source: the public code of arXiv 2304.01669; the paper has the sum over d.

    >>> import torch
    >>> float(feature_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 1.0]])))
    2.5
    """
    return (features - real.mean(0)).square().mean()


def penultimate(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the input (n, d) of the last linear layer that `module` uses on images x (n, C, H, W)."""
    return list(layer_features(module, x, nn.Linear, inputs=True).values())[-1]


class ClassLogit(ddkit.Loss):
    """Minus the logit of the class in the teacher and the step's network, with teacher features kept near the mean of real features.

    A logit has no upper limit, while a cross-entropy stops if it exceeds those of the other classes. The features before the last linear
    layer are those of the set in the view `default`, and of the step's real images without augmentation. With `[network] source =
    "experts"` each step draws another network, so that images suit several.

    Source: Nguyen et al., Re-thinking Model Inversion Attacks Against Deep Neural Networks, CVPR 2023, arXiv 2304.01669.
    """

    others: float = ddkit.option(
        0.75,
        "weight of the step's network in the logit, 0 for the teacher only; k / (k + 1) is a mean over the teacher and k networks",
        ge=0,
        lt=1,
    )
    features: float = ddkit.option(1.0, "factor of the mean squared distance of features, 0 to use no real images", ge=0)

    order_invariant = True

    def requires(self) -> ddkit.Requires:
        real, network = self.features > 0, self.others > 0
        return ddkit.Requires(teacher=True, real=real, network=network, views=("default",), reduce="mean")

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        if self.features and teacher is not None and not any(isinstance(each, nn.Linear) for each in teacher.modules()):
            raise ddkit.InputError(
                "class-logit: the teacher has no linear layer, so it has no features. Use another teacher, e.g. "
                f"--set teacher.model=convnet, or --set {self.recipe_path}.features=0.",
                "teacher.model",
            )

    def __call__(self, step: ddkit.Step) -> Tensor:
        images, labels, logits = step.view("default")
        value = (1 - self.others) * class_logit(logits, labels)
        if self.others:
            value = value + self.others * class_logit(step.network(images), labels)
        if self.features:
            with torch.no_grad():
                real = penultimate(step.teacher.module, step.real.all_images)
            value = value + self.features * feature_distance(penultimate(step.teacher.module, images), real)
        return value
