"""The labels of the set as rows of probabilities (n, K): one-hot, the teacher's of the images as they are, or learned with them.

Learned labels are a parameter of the bank, `soft_labels`: probabilities, which are optimised as they are and put back onto the simplex
after each update. Logits cannot say "this class alone", so a set with learned labels could not begin as the plain one, and what is
stored would not be what is optimised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddkit.components.options import Parameter
from ddkit.engine.bank import Bank
from ddkit.engine.source import StepSource
from ddkit.nn.networks import build_network, load_weights
from ddkit.recipes.tables import LabelsTable

SOFT_LABELS = "soft_labels"
AT_ONCE = 500  # images that the teacher labels in one pass


def label_parameters(table: LabelsTable, classes: int) -> dict[str, Parameter]:
    """Returns what a bank has beside the parameters of its losses: the learned labels, {} if they are not learned."""
    if table.kind != "learned":
        return {}
    return {SOFT_LABELS: Parameter(shape=(classes,), init=1 / classes, constraint="simplex", lr=table.lr)}


def begin_labels(source: StepSource, bank: Bank, given: Tensor | None) -> None:
    """Fills learned labels with what they begin as; `given` (n, K) are those of the initializer, None if it has none."""
    if SOFT_LABELS not in bank.parameters:
        return
    rows = bank.rows(None)
    if source.labels.init == "teacher":
        given = _teachers(source, bank.decoded(rows))
    elif source.labels.init == "experts":
        given = _experts(source, bank.decoded(rows).detach(), _one_hot(source, bank, rows))
    bank.fill(SOFT_LABELS, _one_hot(source, bank, rows) if given is None else given)


def targets_of(source: StepSource, bank: Bank, index: int, rows: slice) -> Tensor:
    """Returns the labels (n, K) at step `index` of the bank's decoded rows, of the images' type; learned ones with their graph."""
    if SOFT_LABELS in bank.parameters:
        return bank.parameters[SOFT_LABELS][rows]
    if source.labels.kind == "teacher":
        return source.draws.once(index, f"targets {rows.start}:{rows.stop}", lambda: _teachers(source, bank.decoded(rows)))
    return _one_hot(source, bank, rows)


def _one_hot(source: StepSource, bank: Bank, rows: slice) -> Tensor:
    labels = bank.decoded_labels[rows]
    return (labels[:, None] == torch.arange(source.draws.info.classes, device=labels.device)).to(bank.images.dtype)


def _teachers(source: StepSource, images: Tensor) -> Tensor:
    """Returns softmax(logits / temperature) of the teacher on the run's normalised images, without a graph."""
    assert source.teacher is not None
    with torch.no_grad():
        logits = torch.cat([source.teacher.logits(part) for part in images.split(AT_ONCE)])
        return (logits.to(images.dtype) / source.labels.temperature).softmax(1)


def _experts(source: StepSource, images: Tensor, classes: Tensor) -> Tensor:
    """Returns the softmax of the mean logits, after the last epoch, of the experts that are right about an image, of all images (n, K).

    `classes` (n, K) are one-hot, and stay where no expert is right. Source: Guo et al., arXiv 2310.05773, and its public code.
    """
    assert source.networks.experts is not None
    assert source.networks.model is not None
    module = build_network(source.networks.model, source.draws.info, source.draws.seed, "labels").to(source.draws.device).eval()
    total = torch.zeros_like(classes)
    right = torch.zeros_like(classes[:, :1])
    for expert in range(source.networks.experts.count):
        load_weights(module, source.networks.experts.weights(expert, len(source.networks.experts.epochs) - 1))
        with torch.no_grad():
            logits = torch.cat([module(part).to(classes.dtype) for part in images.split(AT_ONCE)])
        agrees = (logits.argmax(1) == classes.argmax(1))[:, None]
        total += logits * agrees
        right += agrees
    return torch.where(right > 0, (total / right.clamp_min(1)).softmax(1), classes)
