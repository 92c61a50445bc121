"""Feature regression as a step calls it: mixed real images, and what they should get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from ddkit_models import ConvNet
from ddkit_regression import FeatureRegression, centred
from torch import Tensor

import ddkit
from ddkit.engine.loop import Engine
from ddkit.engine.step import SharedStep, Step
from ddkit.nn.teachers import save_teacher
from ddkit.recipes.tables import parse_recipe
from ddkit.run.setup import RunSetup


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


def made(losses: dict[str, Any], **keys: Any) -> tuple[RunSetup, Engine]:
    """Returns job and engine of a run on the digits with these losses, nothing written."""
    table = {"ipc": 2, "pipc": 6, "network": {"width": 8}, "initializer": "real", "losses": losses, **keys}
    job = RunSetup(parse_recipe(table), device="cpu")
    job.load_teacher()
    return job, job.engine(job.bank())


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
