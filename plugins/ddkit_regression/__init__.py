"""Neural feature regression: the loss `feature-regression`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

import ddkit


def ridge_prediction(features: Tensor, targets: Tensor, queries: Tensor, ridge: float) -> Tensor:
    """Returns the targets (m, K) that ridge regression on features (n, d), targets (n, K) predicts for queries (m, d).

    The kernel is linear in the features; `ridge` (> 0) is relative to the mean of the kernel's diagonal. Solved in
    float64. Source: Zhou, Nezhadarya and Ba, Dataset Distillation using Neural Feature Regression, arXiv 2206.00719, Eq. 5.

    >>> import torch
    >>> ridge_prediction(torch.eye(2), torch.eye(2), torch.tensor([[2.0, 0.0]]), 1e-9).round().tolist()
    [[2.0, 0.0]]
    """
    own = (features @ features.T).double()
    regularised = own + ridge * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
    weights = torch.linalg.solve(regularised, targets.double())
    return ((queries @ features.T).double() @ weights).to(features.dtype)


def centred(labels: Tensor, classes: int) -> Tensor:
    """Returns one-hot rows (n, classes) minus 1 / classes, float32."""
    return functional.one_hot(labels, classes).float() - 1 / classes


def label_margin(targets: Tensor) -> Tensor:
    """Returns how far the largest of each row of targets (n, K) lies above the next one, at most 1 / K: the mean over rows, a scalar.

    Source: Zhou, Nezhadarya and Ba, arXiv 2206.00719, the public code.

    >>> import torch
    >>> float(label_margin(torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])))
    0.25
    """
    first, second = targets.topk(2, dim=1).values.T
    return (first - second).clamp_max(1 / targets.shape[1]).mean()


class FeatureRegression(ddkit.Loss):
    """Error on accessible real images of a ridge regression that is fitted on the features of the synthetic set.

    The regression is the last layer that a network would learn from the set, in closed form. Both sides are augmented
    per image as in the training of a network, because an augmentation per class would reveal the class.
    Source: Zhou, Nezhadarya and Ba, NeurIPS 2022, arXiv 2206.00719, Eq. 5, recipe `frepo`; their networks are trained on the set in
    between (`network.inner_steps`), and they solve in float32. Their labels are learned, as here with `labels.kind = "learned"`,
    but they are any numbers around 0; here they are probabilities minus 1 / K.
    """

    ridge: float = ddkit.option(0.001, "regularisation of the regression, relative to the mean squared norm of the features", gt=0)
    augmenter: str = ddkit.option("dsa", "augmenter of the synthetic images: one operation per step, with parameters per image")
    real_augmenter: str = ddkit.option("dsv", "augmenter of the real images: one operation per step, with parameters per image")
    targets: Literal["labels", "teacher"] = ddkit.option(
        "labels", "targets of the real images: their labels, or the probabilities of the teacher"
    )
    mixup: float = ddkit.option(0.0, "largest share of another real image that is blended into each", ge=0, le=1)

    mirror: bool = ddkit.option(False, "whether mirrored synthetic images are fitted too, if a mirrored image has the same class")
    margin: float = ddkit.option(0.0, "weight of the margin (at most 1 / K) of the likeliest class of learned labels", ge=0)

    def requires(self) -> ddkit.Requires:
        return ddkit.Requires(real=True, network=True, teacher=self.targets == "teacher", reduce="global")

    def initial(self, step: ddkit.Step) -> Mapping[str, Tensor]:
        self._augmenters(step.info)  # one that is not there is an error before the first step
        return {}

    def __call__(self, step: ddkit.Step) -> Tensor:
        classes = step.info.classes
        with torch.no_grad():
            real, wanted = self._queries(step)
            queries, wanted = step.all_gather(step.embed(real), real=True), step.all_gather(wanted, real=True)
        drawn = self._augmenters(step.info)[self.augmenter]
        augmented = drawn.apply(step.images, self._rows(step, drawn.sample_batch(step.generator, step.size)))
        targets = step.all_gather(step.targets)
        sides = [augmented, augmented.flip(3)] if self.mirror and step.info.mirror else [augmented]
        features = torch.cat([step.all_gather(step.embed(each)) for each in sides])
        found = ridge_prediction(features, (targets - 1 / classes).repeat(len(sides), 1), queries, self.ridge)
        step.log("accuracy", (found.argmax(1) == step.real.all_labels).float().mean())
        error = (found - wanted).square().sum(1).mean()
        return error - self.margin * label_margin(targets) if self.margin else error

    def _queries(self, step: ddkit.Step) -> tuple[Tensor, Tensor]:
        """Returns augmented real images (m, C, H, W), blended where `mixup` says so, and what they should get (m, K)."""
        augmenter, size = self._augmenters(step.info)[self.real_augmenter], step.real.size
        drawn = augmenter.sample_batch(step.generator, size)
        if not self.mixup:
            real = augmenter.apply(step.real.images, self._rows(step, drawn, real=True))
            wanted = centred(step.real.labels, step.info.classes).to(real.dtype)
        else:  # with images of other parts, which all have: what is blended is not exchanged
            every = augmenter.apply(step.real.all_images, drawn)
            targets = centred(step.real.all_labels, step.info.classes).to(every.dtype)
            mixed = torch.randperm(size, generator=step.generator), torch.rand(size, generator=step.generator)
            other, share = (ddkit.nn.to_device(step.local_rows(each, real=True), every.device) for each in mixed)
            share = self.mixup * share.to(every.dtype)
            real = torch.lerp(step.local_rows(every, real=True), every[other], share[:, None, None, None])
            wanted = torch.lerp(step.local_rows(targets, real=True), targets[other], share[:, None])
        if self.targets == "teacher":
            wanted = step.teacher.logits(real).softmax(1) - 1 / step.info.classes
        return real, wanted

    def _rows(self, step: ddkit.Step, drawn: Mapping[str, Tensor], *, real: bool = False) -> dict[str, Tensor]:
        """Returns what was drawn for the images of this part; what is drawn for an image does not depend on how the set is parted."""
        return {key: step.local_rows(value, real=real) for key, value in drawn.items()}

    def _augmenters(self, info: ddkit.DataInfo) -> dict[str, ddkit.Augmenter]:
        if "_made" not in self.__dict__:
            names = {self.augmenter, self.real_augmenter}
            self._made = {name: ddkit.create("augmenter", name, data=info) for name in sorted(names)}
        return self._made
