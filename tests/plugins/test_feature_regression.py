"""Feature regression as a step calls it: mixed real images, and what they should get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddkit_regression import centred
from torch import Tensor

import ddkit
from ddkit.testing.world import Recorder, Setting, World

SETTING = Setting(real=(12, 12, 12))


def queries(**options: Any) -> tuple[Recorder, Tensor, Tensor]:
    """Returns the step, its real images, not augmented, and their targets as feature regression with these options makes them."""
    loss = ddkit.create("loss", "feature-regression", {"real_augmenter": "none", **options})
    step = World(loss, SETTING).step()
    return step, *loss._queries(step)


def test_images_and_labels_are_blended_alike_with_one_other_image_and_a_share_within_the_bound() -> None:
    step, plain, labels = queries()
    assert torch.equal(plain, step.real.images)
    assert torch.equal(labels, centred(step.real.labels, 3))
    _, mixed, wanted = queries(mixup=0.4)
    shares = []
    for image, row, own, label in zip(mixed, wanted + 1 / 3, plain, step.real.labels, strict=True):
        others = plain - own
        found = ((image - own) * others).flatten(1).sum(1) / others.square().flatten(1).sum(1).clamp_min(1e-9)  # as if with each of them
        errors = (own + found.view(-1, 1, 1, 1) * others - image).flatten(1).norm(dim=1)
        partner = int(errors.argmin())
        share = float(found[partner])
        shares.append(share)
        assert float(errors[partner]) < 1e-4
        expected = torch.zeros(3)
        expected[label] += 1 - share
        expected[step.real.labels[partner]] += share
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert 0 <= min(shares) < 0.2 < max(shares) <= 0.4


def test_the_teacher_judges_the_mixed_images() -> None:
    step, mixed, wanted = queries(mixup=0.4, targets="teacher")
    torch.testing.assert_close(wanted, step.teacher.logits(mixed).softmax(1) - 1 / 3)
    assert not torch.equal(mixed, step.real.images)


@pytest.mark.parametrize("value", [-0.1, 1.5, "much"])
def test_a_share_outside_its_range_is_refused(value: object) -> None:
    with pytest.raises(ddkit.InputError, match="mixup"):
        ddkit.create("loss", "feature-regression", {"mixup": value})
