"""Stationarity: the teacher's parameters are a weighted sum of the synthetic images' gradients."""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import ddkit
from ddkit_dkkt.invariance import module_groups, scale_invariant_groups
from ddkit_dkkt.primal import VIEWS

log = logging.getLogger("ddkit")

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
TINY = 1e-30  # keeps square roots differentiable at zero, in float32 too
Pairs = Sequence[tuple[Tensor, Tensor]]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) the logit of each row's label minus the largest of the others, logits (n, K), K >= 2, labels (n,) int64.

    Source: Buzaglo et al., Deconstructing Data Reconstruction, arXiv 2307.01827; for two classes arXiv 2206.07758.

    >>> import torch
    >>> margins(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([2])).tolist()
    [-2.0]
    """
    own = labels[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -math.inf).amax(1)


def negative_gradient(
    logits: Tensor, labels: Tensor, multipliers: Tensor, parameters: Sequence[Tensor], objective: str = "cross-entropy"
) -> list[Tensor]:
    """Returns - sum_i lambda_i grad_theta L(logits_i, label_i) for each of `parameters`, differentiable.

    logits (n, K) must depend on the parameters; multipliers (n,) >= 0. L is the cross-entropy, as in the right-hand side of
    [D Eq. 6, stationarity], or for the objective "margin" minus the margin.
    """
    margin = objective == "margin"
    values = -margins(logits, labels) if margin else functional.cross_entropy(logits, labels, reduction="none")
    weighted = (multipliers * values).sum()
    return [-g for g in torch.autograd.grad(weighted, list(parameters), create_graph=True, materialize_grads=True)]


def stationarity_distances(pairs: Pairs, distance: str, *, average: bool = True) -> tuple[Tensor, Tensor]:
    """Returns the distance of theta to the negative gradient over all k pairs of tensors (theta, gradient), a scalar, and of each, (k,).

    "l1": sum |theta - g|, [D Eq. 8]; "l2": sum (theta - g)^2, Algorithm 1 of [D]; both divided by the number of scalars
    with `average`, [D App. D]. "cosine": 1 - cosine of the concatenated vectors; "layer-cosine": the mean over tensors
    of 1 - cosine. Source: Lee et al., Deep Support Vectors, arXiv 2403.17329.
    """
    if "cosine" in distance:
        inner = torch.stack([(theta * g).sum() for theta, g in pairs])
        squares = [torch.stack([t.square().sum() for t in side]) for side in zip(*pairs, strict=True)]
        each = _one_minus_cosine(inner, *squares)
        return each.mean() if distance == "layer-cosine" else _one_minus_cosine(inner.sum(), *(own.sum() for own in squares)), each
    power = 1 if distance == "l1" else 2
    sums = torch.stack([(theta - g).abs().pow(power).sum() for theta, g in pairs])
    if not average:
        return sums.sum(), sums
    counts = [theta.numel() for theta, _ in pairs]
    return sums.sum() / sum(counts), torch.stack([own / count for own, count in zip(sums.unbind(), counts, strict=True)])


def _one_minus_cosine(inner: Tensor, square: Tensor, other: Tensor) -> Tensor:
    return 1 - inner / (square * other + TINY).sqrt()


def least_squares_scale(pairs: Pairs) -> float:
    """Returns the multiplier s that brings s * g nearest to theta: <theta, g> / <g, g>; nan where g is zero."""
    inner = sum(float((theta * g.detach()).sum()) for theta, g in pairs)
    square = sum(float(g.detach().square().sum()) for _, g in pairs)
    return inner / square if square > 0 else math.nan


class Stationarity(ddkit.Loss):
    """Distance of the teacher's parameters to the multiplier-weighted sum of negative loss gradients.

    Parameter groups for which stationarity is impossible (scale-invariant layers, such as a convolution before
    instance norm) are found numerically and left out, unless `scale_invariant` is "keep".

    Source: Lee et al., Deep Support Vectors, arXiv 2403.17329, Eq. 8 and Algorithm 1; with `objective = "margin"` Haim et al.,
    Reconstructing Training Data from Trained Neural Networks, arXiv 2206.07758.
    """

    objective: Literal["cross-entropy", "margin"] = ddkit.option(
        "cross-entropy",
        "function whose gradients are summed: the cross-entropy, or the margin between the logit of the class and the largest other "
        "logit, which needs a teacher without norm layers",
    )
    distance: Literal["l1", "l2", "cosine", "layer-cosine"] = ddkit.option(
        "cosine", "distance to the parameters of the teacher; the paper has l1 (Eq. 8) and l2 (Algorithm 1)"
    )
    average: bool = ddkit.option(True, "whether l1 and l2 are means over the parameters, instead of sums")
    parameters: str = ddkit.option(
        "all", "parameters of the teacher: all, weights (no biases or norms), classifier (the last layer), or a name pattern"
    )
    scale_invariant: Literal["skip", "keep"] = ddkit.option("skip", "whether scale-invariant parameter groups are skipped or kept")
    views: dict[str, float] = ddkit.option({"default": 1.0}, VIEWS, gt=0, min_length=1)
    init: float | Literal["least-squares"] = ddkit.option(1.0, "first multiplier", gt=0)
    lr: float = ddkit.option(0.01, "learning rate of the multipliers (Adam)", ge=0)
    constraint: Literal["project", "softplus"] = ddkit.option(
        "project", "how multipliers stay at least 0: clamped at 0, or softplus of a free value"
    )

    order_invariant = True

    def requires(self) -> ddkit.Requires:
        first = self._free(1.0 if self.init == "least-squares" else self.init)
        multipliers = ddkit.Parameter(init=first, constraint="nonnegative" if self.constraint == "project" else None, lr=self.lr)
        return ddkit.Requires(
            teacher=True, second_order=True, views=tuple(self.views), reduce="global", parameters={"multipliers": multipliers}
        )

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        if self.objective == "margin" and teacher is not None and any(isinstance(each, NORMS) for each in teacher.modules()):
            raise ddkit.InputError(
                "dkkt-stationarity: the teacher has norm layers, but the objective margin needs a teacher without them. "
                f"Use --set teacher.norm=none for convnet, --set teacher.model=mlp, or "
                f"--set {self.recipe_path}.objective=cross-entropy.",
                "teacher",
            )

    def initial(self, step: ddkit.Step) -> Mapping[str, Tensor]:
        """Returns the least-squares multipliers, -<theta, G> / <G, G> with G = sum_i grad L_i, where they were asked for."""
        self._included(step)  # a selection that cannot work is an error before the first step
        if self.init != "least-squares":
            return {}
        free = step.parameters["multipliers"]
        pairs = [pair for view in self.views for pair in self._pairs(step, view, torch.ones_like(free))]
        scale = least_squares_scale(pairs)
        if not scale > 0:
            log.warning("dkkt-stationarity: the least-squares multiplier is %.3g; starting from 1 instead.", scale)
            return {}
        return {"multipliers": torch.full_like(free, self._free(scale))}

    def __call__(self, step: ddkit.Step) -> Tensor:
        free = step.parameters["multipliers"]
        multipliers = functional.softplus(free) if self.constraint == "softplus" else free
        mean = step.all_reduce(multipliers.sum()) / step.size
        step.log("multiplier mean", mean)
        # the scale of a cosine is undetermined: its multipliers are divided by their mean
        scale = mean.clamp_min(1e-12) if "cosine" in self.distance else torch.ones_like(mean)
        terms = []
        for view, factor in sorted(self.views.items()):
            pairs = [(theta, g / scale) for theta, g in self._pairs(step, view, multipliers)]
            value, each = stationarity_distances(pairs, self.distance, average=self.average)
            terms.append(factor * value)
            for name, own in zip(self._included(step), each.detach().unbind(), strict=True):
                step.log(f"distance {view} {name}", own)
        return torch.stack(terms).sum()

    def _free(self, multiplier: float) -> float:
        """Returns the value of the free parameter at which the multiplier is `multiplier` > 0."""
        return multiplier + math.log(-math.expm1(-multiplier)) if self.constraint == "softplus" else multiplier

    def _pairs(self, step: ddkit.Step, view: str, multipliers: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns (theta, negative gradient of the whole set) for each included parameter: the sums are exchanged once a view."""
        names = self._included(step)
        theta = [step.teacher_parameters[name] for name in names]
        found = step.view(view)
        sums = step.all_reduce(negative_gradient(found.teacher_logits, found.labels, multipliers, theta, self.objective))
        return list(zip([t.detach() for t in theta], sums, strict=True))

    def _included(self, step: ddkit.Step) -> list[str]:
        if "_names" not in self.__dict__:
            skip = self.scale_invariant == "skip"
            self._names = included_parameters(step.teacher, step.info.shape, self.parameters, skip=skip, who="dkkt-stationarity")
        return self._names


def included_parameters(teacher: ddkit.nn.Teacher, shape: tuple[int, int, int], which: str, *, skip: bool, who: str) -> list[str]:
    """Returns the names of the teacher's parameters that `which` selects; with `skip` without those of scale-invariant layers.

    Raises InputError where none is left. `who` asks, for messages; images are of `shape` (C, H, W).
    """
    own = {name: value.detach() for name, value in teacher.parameters.items()}
    chosen = selected_parameters(teacher.module, list(own), which)
    if not chosen:
        raise ddkit.InputError(f"{who}: the teacher has no parameter that '{which}' selects. It has {', '.join(own)}.")
    if not skip:
        return chosen
    invariant = scale_invariant_groups(teacher.exact_logits, own, shape)
    skipped = {name for group, names in module_groups(list(own)).items() if group in invariant for name in names}
    kept = [name for name in chosen if name not in skipped]
    if not kept:
        raise ddkit.InputError(
            f"{who}: every selected parameter of the teacher belongs to a scale-invariant layer, for which "
            "stationarity is impossible. Use a teacher with batch norm or no norm (--set teacher.norm=batch)."
        )
    if len(kept) < len(chosen):
        share = sum(own[name].numel() for name in kept) / sum(own[name].numel() for name in chosen)
        log.warning(
            "%s: the teacher's layers %s are scale-invariant (parameters and gradient are orthogonal), so "
            "stationarity is impossible for them. They are left out, and %.1f %% of the selected parameters remain.",
            who, ", ".join(invariant), 100 * share,
        )  # fmt: skip
    return kept


def selected_parameters(module: nn.Module, names: Sequence[str], which: str) -> list[str]:
    """Returns the parameter names that `which` selects: all, weights, classifier (the last linear layer), or a pattern."""
    parameters = dict(module.named_parameters())
    if which == "all":
        return list(names)
    if which == "weights":
        norms = {name for name, layer in module.named_modules() if isinstance(layer, NORMS)}
        return [name for name in names if parameters[name].ndim >= 2 and name.rpartition(".")[0] not in norms]
    if which == "classifier":
        linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        return [name for name in names if linear and name.rpartition(".")[0] == linear[-1]]
    return [name for name in names if fnmatch.fnmatchcase(name, which)]
