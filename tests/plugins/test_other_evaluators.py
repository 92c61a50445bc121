"""The evaluators beside accuracy: spectrum, memorisation, transfer, ranking; and the average of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ddkit_evaluators.derived import scores
from ddkit_evaluators.pictures import nearest

import ddkit
from tests.conftest import SMALL, SMALL_FLAGS, Result

Cli = Callable[..., Result]


def info(size: int = 16, mirror: bool = False) -> ddkit.DataInfo:
    return ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(size, size), mirror=mirror)


def given(images: torch.Tensor, real: torch.Tensor, *, mirror: bool = False) -> tuple[ddkit.Artifact, ddkit.data.EvaluationData]:
    """Returns a set of images of two classes, and real images beside it."""
    labels, real_labels = torch.arange(len(images)) % 2, torch.arange(len(real)) % 2
    artifact = ddkit.Artifact(images, labels.sort().values, {"class_names": ["a", "b"], "mean": [0.5], "std": [0.25]})
    data = ddkit.data.EvaluationData(
        info=info(images.shape[-1], mirror), test_images=real, test_labels=real_labels, real_images=real, real_labels=real_labels, seed=0,
        device=torch.device("cpu"), report=lambda done, total: None,
    )  # fmt: skip
    return artifact, data


def judged(name: str, artifact: ddkit.Artifact, data: ddkit.data.EvaluationData, teacher: Any = None, **options: Any) -> ddkit.Evaluation:
    evaluator = ddkit.create("evaluator", name, options, data=data.info)
    evaluator.check(data.info)
    (row,) = evaluator(artifact, data, teacher)
    found: ddkit.Evaluation = row
    return found


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, 1, 16, 16), generator=torch.Generator().manual_seed(seed))


# Spectrum


def test_a_wave_has_its_power_in_its_own_band_and_noise_in_all() -> None:
    across = torch.arange(16.0)
    slow = 0.5 + 0.4 * torch.cos(2 * math.pi * across * 2 / 16).expand(2, 1, 16, 16)  # 2 of 16: 0.125 cycles per pixel
    row = judged("spectrum", *given(slow, noise(20)), bins=8)
    assert row.details["frequencies"][2] == pytest.approx(2.5 / 16)
    assert row.details["synthetic"][2] == pytest.approx(1.0)
    assert row.details["high_frequency_share"] == pytest.approx(0.0, abs=1e-9)
    assert row.details["real_high_frequency_share"] > 0.7
    assert row.accuracy_mean is None
    assert sum(row.details["real"]) == pytest.approx(1.0)


def test_a_spectrum_looks_at_real_images_of_all_classes_and_needs_none() -> None:
    flat = torch.full((1500, 1, 16, 16), 0.5)
    flat[750:] = noise(750)
    assert judged("spectrum", *given(noise(2), flat)).details["real_high_frequency_share"] > 0.7
    assert "real" not in judged("spectrum", *given(noise(2), noise(0))).details


# Memorisation


def test_distances_are_root_mean_squares_to_the_nearest_and_not_to_itself() -> None:
    real = torch.stack([torch.full((1, 4, 4), value) for value in (0.0, 0.5, 0.9)])
    images = torch.stack([torch.full((1, 4, 4), value) for value in (0.1, 0.75)])
    torch.testing.assert_close(nearest(images, real, mirror=False), torch.tensor([0.1, 0.15]))
    torch.testing.assert_close(nearest(real, real, mirror=False, without=torch.arange(3)), torch.tensor([0.5, 0.4, 0.4]))
    assert nearest(real, real, mirror=False).tolist() == [0.0, 0.0, 0.0]


def test_a_mirrored_copy_counts_only_where_a_mirrored_image_is_one_of_its_class() -> None:
    real = noise(3)
    assert nearest(real[:1].flip(3), real, mirror=True).tolist() == [0.0]
    assert float(nearest(real[:1].flip(3), real, mirror=False)) > 0.1


def test_copies_of_real_images_are_called_close_with_a_warning_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    real = noise(40)
    copied = judged("memorisation", *given(real[:4] + 0.001, real))
    assert copied.details["close"] == 4
    assert copied.details["ratio"] < 0.1
    assert "4 of 4 synthetic images are nearer" in caplog.text
    caplog.clear()
    fresh = judged("memorisation", *given(noise(4, seed=1) * 3, real))
    assert fresh.details["close"] == 0
    assert caplog.text == ""
    twice = torch.cat([noise(20), noise(20)])  # real images have copies of their own
    assert judged("memorisation", *given(twice[:4], twice)).details["close"] == 4


def test_a_comparison_with_one_real_image_is_refused() -> None:
    with pytest.raises(ddkit.InputError, match="there are 1"):
        judged("memorisation", *given(noise(2), noise(1)))


# Ranking


def test_scores_are_the_formulas_worked_by_hand() -> None:
    found = scores(0.9, (0.5, 0.3), (0.4, 0.3))
    assert found["hlr"] == pytest.approx(0.4)
    assert found["ior"] == pytest.approx(0.2)
    assert found["lrs"] == pytest.approx((math.exp(-0.1) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert found["ars"] == pytest.approx((math.exp(0.15) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert scores(0.0, (1.0, 0.0), (1.0, 0.0))["lrs"] == pytest.approx(1.0)
    assert scores(1.0, (0.0, 1.0), (0.0, 1.0))["lrs"] == pytest.approx(0.0)


def test_ranking_needs_all_real_data_from_a_teacher_or_a_number() -> None:
    artifact, data = given(noise(2), noise(8))
    quick = {"epochs": 1, "repeats": 1, "model_options": {"width": 4}}
    row = judged("ranking", artifact, data, full=0.8, **quick)
    assert row.details["hlr"] == pytest.approx(0.8 - row.accuracy_mean)  # type: ignore[operator]
    assert row.details["ior"] == pytest.approx(row.accuracy_mean - row.random_real_mean)  # type: ignore[operator]
    assert ddkit.create("evaluator", "ranking", {"full": 0.8}, data=data.info).requires.teacher is False
    assert ddkit.create("evaluator", "ranking", {}, data=data.info).requires.teacher is True
    with pytest.raises(ddkit.InputError, match="Name only one"):
        judged("ranking", artifact, data, full=0.8, model="convnet,mlp")


# On the command line


def test_all_of_them_stand_in_one_table(cli: Cli) -> None:
    assert cli("distill", "--losses", "dm", "--pipc", 5, "--evaluate", "none", *SMALL_FLAGS, "--out", "run").code == 0
    quick = ["--set", "train.epochs=1", "--set", "teacher.width=8"]
    for name in ("ranking", "transfer"):
        quick += ["--set", f"evaluators.{name}.epochs=1", "--repeats", 1]
    quick += ["--set", "evaluators.transfer.model=convnet,mlp"]
    shown = cli("evaluate", "run", "--evaluate", "spectrum,memorisation,ranking,transfer", *quick)
    assert shown.code == 0, shown.err
    assert "of power is high-frequency, of real images" in shown.out
    assert "HLR" in shown.out
    assert shown.out.count("transfer") >= 2
    again = cli("evaluate", "run", "--evaluate", "spectrum", "--json")
    row = json.loads(again.out)["evaluations"][0]
    assert (row["evaluator"], row["accuracy_mean"]) == ("spectrum", None)


# The average of weights


def test_the_average_of_weights_follows_its_recursion() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(6, 1, 2, 2), torch.arange(6) % 2
    schedule = ddkit.nn.Schedule(epochs=3, batch=6, lr=0.5, schedule="constant")
    start = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    weights = {name: value.clone() for name, value in start.state_dict().items()}

    def after(epochs: int, ema: float) -> torch.Tensor:
        start.load_state_dict(weights)
        changed = ddkit.nn.Schedule(epochs=epochs, batch=6, lr=0.5, schedule="constant", ema=ema)
        ddkit.nn.fit(start, images, labels, changed, augmenter=None, generator=torch.Generator().manual_seed(0))
        return start[1].weight.detach().clone()

    steps = [after(epochs, 0.0) for epochs in (1, 2, 3)]
    expected = steps[0]  # the first update is the start of the average
    for value in steps[1:]:
        expected = 0.8 * expected + 0.2 * value
    torch.testing.assert_close(after(schedule.epochs, 0.8), expected)
    assert not torch.equal(after(3, 0.8), steps[-1])


def test_a_variant_of_a_protocol_is_a_row_of_its_own_and_says_so(tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    ddkit.distill(losses="dm", pipc=2, sets=SMALL, out=run, device="cpu")
    refused = cli("evaluate", run, "--set", "evaluators.accuracy.augment=dsaa")
    assert (refused.code, "Did you mean 'dsa'" in " ".join(refused.err.split())) == (3, True)
    told = cli("evaluate", run, "--set", "evaluators.accuracy.ema=0.5", "--set", "evaluators.accuracy.augment=none")
    assert told.code == 0, told.err
    assert "short, 2 epochs, ema 0.5, augment none, width 8" in told.out
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert (rows[1]["details"]["ema"], rows[1]["details"]["augment"]) == (0.5, "none")
    assert [row["details"].get("variant") for row in rows] == ["2 epochs, width 8", "2 epochs, ema 0.5, augment none, width 8"]
    assert "convnet, short, 2 epochs, ema 0.5, augment none, width 8" in (run / "report.html").read_text()
    card = (ddkit.export(run, "card", tmp_path / "card") / "README.md").read_text()
    assert "| short, 2 epochs, ema 0.5, augment none, width 8 | test |" in card
