"""The loss batch-norm-statistics: its value, what its gradient is, and which teachers it refuses before anything is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ddkit_methods.statistics import centred_sums, statistics_distance
from torch import Tensor, nn
from torch.autograd import gradcheck

import ddkit


def distance(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return statistics_distance(centred_sums(x, mean), x[:, 0].numel(), variance)


def test_the_distance_is_that_of_loops_over_channels() -> None:
    x = torch.randn((4, 3, 2, 5), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    gaps, spreads = 0.0, 0.0
    for channel in range(3):
        values = x[:, channel].flatten().tolist()
        centre = sum(values) / len(values)
        gaps += (centre - float(mean[channel])) ** 2
        spreads += (sum((value - centre) ** 2 for value in values) / len(values) - float(variance[channel])) ** 2
    assert float(distance(x, mean, variance)) == pytest.approx(gaps**0.5 + spreads**0.5, rel=1e-12)
    assert gradcheck(lambda t: distance(t, mean, variance), (x.requires_grad_(),))


def test_equal_statistics_have_no_distance_and_a_finite_gradient() -> None:
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    value = distance(x, x.new_tensor([2.0]), x.new_tensor([1.0]))
    assert float(value.detach()) == 0
    assert bool(torch.autograd.grad(value, x)[0].isfinite().all())


def test_a_layer_that_is_used_twice_counts_twice_and_the_first_has_a_factor() -> None:
    norm = nn.BatchNorm2d(1).eval()
    x = torch.randn((3, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    loss = ddkit.create("loss", "batch-norm-statistics", {"first": 3.0})
    teacher = SimpleNamespace(module=nn.Sequential(norm, norm))
    step = SimpleNamespace(teacher=teacher, view=lambda name: SimpleNamespace(images=x), size=3, all_reduce=lambda sums: sums)
    zero, one = torch.zeros(1), torch.ones(1)
    wanted = 3 * distance(x, zero, one) + distance(norm(x).detach(), zero, one)
    torch.testing.assert_close(loss(step).detach(), wanted)


@pytest.mark.parametrize("sets", [{"teacher.norm": "instance"}, {"teacher.model": "mlp"}])
def test_a_teacher_without_batch_norm_is_refused_before_it_is_trained(
    sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddkit.run.setup.automatic_teacher", lambda *given, **more: pytest.fail("a teacher was trained"))
    with pytest.raises(ddkit.InputError, match="no batch norm"):
        ddkit.distill(losses="batch-norm-statistics", steps=1, evaluators="none", sets=sets, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
