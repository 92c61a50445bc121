"""Losses as a step calls them: statistics of the teacher's batch norms, and mixed real images of feature regression."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from ddkit_models import ConvNet
from ddkit_priors import statistics_distance
from ddkit_regression import FeatureRegression, centred
from torch import Tensor
from torch.autograd import gradcheck

import ddkit
from ddkit.engine import Engine
from ddkit.jobs import Job
from ddkit.recipe import parse_recipe
from ddkit.step import SharedStep, Step
from ddkit.teachers import save_teacher

F64 = torch.float64


def teacher_file(folder: Path, norm: str) -> Path:
    """Writes an untrained teacher for the digits, its batch norms (if any) with running statistics of noise."""
    info = ddkit.DataInfo(class_names=tuple("0123456789"), channels=1, size=(8, 8))
    options = ConvNet.Options(depth=2, width=8, norm=norm)  # type: ignore[arg-type]
    module = ddkit.build_network(ConvNet(options), info, 0, "teacher").train()
    module(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    record = {"model": "convnet", "options": msgspec.to_builtins(options), "mean": [0.5], "std": [0.25]}
    file = folder / f"{norm}.safetensors"
    save_teacher(file, ddkit.Teacher(module, mean=(0.5,), std=(0.25,), info=record))
    return file


def made(losses: dict[str, Any], **keys: Any) -> tuple[Job, Engine]:
    """Returns job and engine of a run on the digits with these losses, nothing written."""
    table = {"ipc": 2, "pipc": 6, "network": {"width": 8}, "initializer": "real", "losses": losses, **keys}
    job = Job(parse_recipe(table), device="cpu")
    job.load_teacher()
    return job, job.engine(job.bank())


# Statistics of batch norm


def test_the_distance_of_statistics_is_that_of_loops_over_channels() -> None:
    x = torch.randn(4, 3, 2, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.tensor([0.1, -0.2, 0.3], dtype=F64), torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    gaps, spreads = 0.0, 0.0
    for channel in range(3):
        values = x[:, channel].flatten().tolist()
        centre = sum(values) / len(values)
        gaps += (centre - float(mean[channel])) ** 2
        spreads += (sum((value - centre) ** 2 for value in values) / len(values) - float(variance[channel])) ** 2
    assert float(statistics_distance(x, mean, variance)) == pytest.approx(gaps**0.5 + spreads**0.5, rel=1e-9)
    assert gradcheck(lambda t: statistics_distance(t, mean, variance), x.requires_grad_())


def test_equal_statistics_have_no_distance_and_a_finite_gradient() -> None:
    x = torch.tensor([[1.0], [3.0]], dtype=F64, requires_grad=True)
    value = statistics_distance(x, torch.tensor([2.0], dtype=F64), torch.tensor([1.0], dtype=F64))
    assert float(value.detach()) < 1e-5
    assert bool(torch.autograd.grad(value, x)[0].isfinite().all())


def test_the_loss_adds_up_the_distances_at_every_batch_norm_of_the_teacher(tmp_path: Path) -> None:
    job, engine = made({"batch-norm-statistics": {"views": {"raw": 2.0}}}, teacher=str(teacher_file(tmp_path, "batch")))
    values, gradients, _ = engine.evaluate(0)
    assert job.teacher is not None
    x, expected = engine.bank.images.detach(), 0.0
    for layer in job.teacher.module.features:  # type: ignore[union-attr]
        if isinstance(layer, torch.nn.BatchNorm2d):
            expected += float(statistics_distance(x, layer.running_mean, layer.running_var))  # type: ignore[arg-type]
        x = layer(x)
    assert float(values["batch-norm-statistics"]) == pytest.approx(2 * expected, rel=1e-5)
    assert expected > 0.1
    assert bool(gradients["images"].flatten(1).any(1).all()), "every image takes part"


def test_the_loss_leaves_no_hook_on_the_teacher_even_where_a_pass_fails(tmp_path: Path) -> None:
    job, engine = made({"batch-norm-statistics": {}}, teacher=str(teacher_file(tmp_path, "batch")))
    engine.evaluate(0)
    assert job.teacher is not None
    assert not any(module._forward_pre_hooks for module in job.teacher.module.modules())


def test_a_few_steps_bring_the_statistics_nearer(tmp_path: Path) -> None:
    _, engine = made({"batch-norm-statistics": {}}, teacher=str(teacher_file(tmp_path, "batch")), initializer="noise")
    before = float(engine.evaluate(0)[0]["batch-norm-statistics"])
    engine.run(0, 20, observe=lambda index, record: None, save=lambda index: None)
    assert float(engine.evaluate(20)[0]["batch-norm-statistics"]) < 0.8 * before


def test_a_teacher_without_running_statistics_is_told_before_the_first_step(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli(
        "distill", "--losses", "batch-norm-statistics", "--teacher", teacher_file(tmp_path, "instance"), "--steps", 1, "--out", "run"
    )  # fmt: skip
    assert result.code == 4
    assert "no batch norm with running statistics" in result.err
    assert "Traceback" not in result.err


# Mixed real images


def queries(engine: Engine, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the real images of step 0 and their targets as feature regression with these options makes them."""
    loss = FeatureRegression(FeatureRegression.Options(real_augmenter="none", **options))
    return loss._queries(Step(SharedStep(engine.source, engine.bank, 0), "feature-regression", loss.requires))


def test_mixed_images_and_labels_are_blended_alike_and_the_share_has_a_bound() -> None:
    _, engine = made({"feature-regression": {}})
    plain, labels = queries(engine)
    mixed, wanted = queries(engine, mixup=0.4)
    real = SharedStep(engine.source, engine.bank, 0).real
    torch.testing.assert_close(plain, real.images)
    assert torch.equal(labels, centred(real.labels, 10))
    torch.testing.assert_close(wanted.sum(1), torch.zeros(len(wanted)), atol=1e-6, rtol=0)
    share = 1 - (wanted.gather(1, real.labels[:, None])[:, 0] + 0.1)  # of the other image, where its class is another
    assert bool((share < 0.4 + 1e-6).all())
    assert float(share.max()) > 0.2
    unmixed = share < 1e-6
    assert not torch.equal(mixed, plain)
    assert int(unmixed.sum()) < len(mixed) / 2
    for row in (~unmixed).nonzero().flatten().tolist()[:5]:
        other = int((wanted[row] + 0.1 > 1e-6).nonzero().flatten().tolist()[0])
        other = other if other != int(real.labels[row]) else int((wanted[row] + 0.1 > 1e-6).nonzero().flatten()[1])
        rest = (mixed[row] - (1 - share[row]) * plain[row]) / share[row]
        assert any(torch.allclose(rest, image, atol=1e-3) for image in plain[real.labels == other])


def test_the_teacher_judges_the_mixed_images(tmp_path: Path) -> None:
    job, engine = made({"feature-regression": {"targets": "teacher"}}, teacher=str(teacher_file(tmp_path, "batch")))
    mixed, wanted = queries(engine, mixup=0.4, targets="teacher")
    assert job.teacher is not None
    torch.testing.assert_close(wanted, job.teacher.logits(mixed).softmax(1) - 0.1)


@pytest.mark.parametrize("value", ["-0.1", "1.5", "much"])
def test_a_share_outside_its_range_is_refused(cli: Callable[..., Any], value: str) -> None:
    result = cli("distill", "--losses", "feature-regression", "--set", f"losses.feature-regression.mixup={value}", "--out", "run")
    assert result.code == 4
    assert "mixup" in result.err
