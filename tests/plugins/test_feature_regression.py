"""Feature regression as a step calls it: mixed real images, and what they should get."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from ddkit_regression import centred, label_margin, ridge_prediction
from torch import Tensor
from torch.autograd import gradcheck

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


def test_mirrored_images_are_fitted_too_where_a_mirrored_image_keeps_its_class_and_the_margin_counts() -> None:
    def value(keeps: bool, **options: Any) -> Tensor:
        loss = ddkit.create("loss", "feature-regression", {"augmenter": "none", "real_augmenter": "none", **options})
        world = World(loss, SETTING)
        world.source.draws.info = msgspec.structs.replace(world.source.draws.info, mirror=keeps)
        step = world.step()
        images, targets = (torch.cat([each, other]) for each, other in ((step.images, step.images.flip(3)), (step.targets, step.targets)))
        fitted = (images, targets) if options.get("mirror") and keeps else (step.images, step.targets)
        found = ridge_prediction(step.embed(fitted[0]), fitted[1] - 1 / 3, step.embed(step.real.images), loss.ridge)
        wanted = (found - centred(step.real.labels, 3)).square().sum(1).mean() - options.get("margin", 0) / 3  # hard labels have all of it
        torch.testing.assert_close(loss(step), wanted)
        return wanted.detach()

    assert value(True, mirror=True) != value(True)
    assert value(False, mirror=True) == value(False)
    assert value(True, margin=2.0) < value(True)


def test_the_label_margin_agrees_with_sorted_rows_and_finite_differences() -> None:
    targets = torch.rand((5, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = [sorted(row) for row in targets.tolist()]
    assert float(label_margin(targets).detach()) == pytest.approx(sum(min(row[-1] - row[-2], 0.25) for row in rows) / 5, rel=1e-12)
    assert gradcheck(label_margin, (targets,))
