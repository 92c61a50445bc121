"""Images made of what a set stores: exact, differentiable, the same wherever a set is read, and of a budget that every figure states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddkit_parametrizations import Bases, Fourier, Grid, enlarged_parts

import ddkit
from ddkit.components.options import Parameter
from ddkit.engine.bank import Bank
from ddkit.files import read_tensors, write_tensors
from ddkit.studies.results import Figure, Report, report_table
from tests.conftest import SMALL, SMALL_FLAGS, Result

Cli = Callable[..., Result]
GRID, FOURIER = ["--set", "parametrization=grid"], ["--set", "parametrization=fourier"]
KINDS = {"grid": GRID, "fourier": FOURIER}


def test_the_parts_of_a_grid_come_row_by_row_and_are_enlarged() -> None:
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, :2, 2:] = 1.0  # the second part
    image[0, 0, 2:, :2] = 2.0  # the third
    assert [part.unique().tolist() for part in enlarged_parts(image, 2)] == [[0.0], [1.0], [2.0], [0.0]]
    wide = torch.arange(12.0).view(1, 1, 2, 6)
    assert enlarged_parts(wide, 2).shape == (4, 1, 2, 6)
    reference = torch.nn.functional.interpolate(wide[:, :, 1:, 3:], (2, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged_parts(wide, 2)[3:], reference)


def test_a_grid_keeps_order_and_smooth_images_survive_it() -> None:
    grid = Grid(factor=2)
    flat = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 8, 8)
    assert torch.equal(grid.decode(grid.encode(flat, {}), (3, 8, 8), {}), flat)
    ramp = torch.linspace(0, 1, 32).expand(4, 1, 32, 32)
    assert (grid.decode(grid.encode(ramp, {}), (1, 32, 32), {}) - ramp).abs()[..., 2:-2].max() < 0.02


def _slow_wave(u: int, v: int, height: int, width: int) -> torch.Tensor:
    """Returns one wave (height, width) of the cosine transform, of length 1, from its definition."""
    rows = [np.cos(np.pi * u * (2 * y + 1) / (2 * height)) for y in range(height)]
    columns = [np.cos(np.pi * v * (2 * x + 1) / (2 * width)) for x in range(width)]
    found = torch.tensor(rows, dtype=torch.float64)[:, None] * torch.tensor(columns, dtype=torch.float64)
    return found / found.norm()


def test_fourier_is_the_least_squares_of_the_lowest_waves_in_every_channel() -> None:
    height, width, images = 6, 10, torch.randn(3, 2, 6, 10, dtype=torch.float64)
    makes = Fourier(images=4)
    stored = makes.encode(images, {})
    assert stored.shape == (3, 2 * 15)
    lowest = sorted(((u / height) ** 2 + (v / width) ** 2, u, v) for u in range(height) for v in range(width))[:15]
    waves = torch.stack([_slow_wave(u, v, height, width).flatten() for _, u, v in lowest])
    wanted = torch.linalg.lstsq(waves.T, images.view(6, -1).T).solution.T.view(3, 2, 15)
    torch.testing.assert_close(stored, wanted.flatten(1))
    torch.testing.assert_close(makes.decode(stored, (2, height, width), {}), (wanted @ waves).view_as(images))
    assert torch.equal(
        makes.decode(stored.unflatten(1, (2, 15)), (2, height, width), {}), makes.decode(stored, (2, height, width), {})
    )  # earlier sets
    for whole in (Fourier(images=1), Fourier(images=1, luma=0.8)):
        torch.testing.assert_close(whole.decode(whole.encode(images, {}), (2, height, width), {}), images)


def test_luma_keeps_more_waves_of_brightness_than_of_the_differences_between_channels() -> None:
    shape = (3, 8, 8)
    wave = _slow_wave(
        2, 2, 8, 8
    )  # the ninth lowest: ten images have 18 numbers each, 6 of a channel, or 14 of brightness and 2 of each difference
    grey, coloured = wave.expand(1, *shape), torch.stack([wave, 0 * wave, -wave])[None]
    makes, equal = Fourier(images=10, luma=0.7), Fourier(images=10)
    assert makes.encode(grey, {}).shape == (1, 14 + 2 * 2)
    assert len(makes.encode(torch.randn(1, 1, 8, 8), {})[0]) == len(equal.encode(torch.randn(1, 1, 8, 8), {})[0]) == 6
    torch.testing.assert_close(makes.decode(makes.encode(grey, {}), shape, {}), grey)
    assert makes.decode(makes.encode(coloured, {}), shape, {}).abs().max() < 1e-12
    assert equal.decode(equal.encode(grey, {}), shape, {}).abs().max() < 1e-12
    smooth = torch.randn(1, 3, 1, 1, dtype=torch.float64).expand(1, *shape)
    torch.testing.assert_close(makes.decode(makes.encode(smooth, {}), shape, {}), smooth)
    images = torch.randn(2, *shape, dtype=torch.float64)
    near = makes.decode(makes.encode(images, {}), shape, {})
    torch.testing.assert_close(((images - near) * near).sum().item(), 0.0, atol=1e-10, rtol=0)  # an orthogonal projection: least squares


def test_bases_are_the_least_squares_of_fewer_smaller_images_and_all_that_they_store_is_within_the_budget() -> None:
    shape, makes = (2, 6, 10), Bases(images=3, bases=2, pooled=2)
    images = torch.randn(12, *shape, dtype=torch.float64)
    stored = makes.encode(images, {})
    height, width = 4, 6  # 2 * 4 * 6 values and 6 coefficients for each of 4 bases, which is the most that fits: 216 of 240 numbers
    assert stored.shape == (2, 4 * (2 * height * width + 6))
    waves = torch.stack([_slow_wave(u, v, 6, 10).flatten() for u in range(height) for v in range(width)])
    near = images.flatten(2) @ waves.T @ waves
    left, sizes, right = torch.linalg.svd(near.view(2, 6, -1), full_matrices=False)
    wanted = left[..., :4] * sizes[:, None, :4] @ right[:, :4]
    torch.testing.assert_close(makes.decode(stored, shape, {}), wanted.view_as(images))
    flat = torch.full((12, *shape), 0.7)
    torch.testing.assert_close(makes.decode(makes.encode(flat, {}), shape, {}), flat)


def test_the_decoder_of_bases_begins_as_the_identity_and_is_a_convolution_of_all_channels() -> None:
    shape, makes, plain = (2, 8, 6), Bases(decoder=True), Bases()
    stored, shared = makes.encode(torch.randn(4, *shape), {}), dict(makes.shared(shape))
    made = plain.decode(stored, shape, {})
    assert torch.equal(makes.decode(stored, shape, shared), made)
    shared["decoder"][1, 4] = 10.0  # the middle of the kernel from the first channel to the second
    shared["decoder"][0, -1] = 3.0  # the level of the first
    wanted = torch.stack([made[:, 0] + 0.3, made[:, 1] + made[:, 0]], 1)
    torch.testing.assert_close(makes.decode(stored, shape, shared), wanted)


def test_rows_and_parameters_of_a_bank_are_those_of_the_images() -> None:
    labels = torch.tensor([0, 0, 1])
    declared = {"multipliers": Parameter(shape=(), per="sample")}
    bank = Bank(torch.rand(3, 1, 4, 4), labels, declared, {}, parametrization=Grid(factor=2), shape=(1, 4, 4))
    assert bank.decoded_labels.tolist() == [0] * 8 + [1] * 4
    assert bank.parameters["multipliers"].shape == (12,)
    assert (bank.rows(range(1, 2)), bank.stored_numbers) == (slice(8, 12), 48)
    whole = bank.decoded(bank.rows(None))
    assert torch.equal(bank.decoded(slice(8, 12)), whole[8:])
    whole.sum().backward()
    assert bank.images.grad is not None
    assert bool((bank.images.grad > 0).all())


class Shared(ddkit.Parametrization):
    """Rows times a number that all classes share."""

    def encode(self, images: torch.Tensor, shared: Any) -> torch.Tensor:
        return images / shared["scale"]

    def decode(self, stored: torch.Tensor, shape: Any, shared: Any) -> torch.Tensor:
        return stored * shared["scale"]

    def shared(self, shape: Any) -> dict[str, torch.Tensor]:
        return {"scale": torch.tensor([2.0])}


def test_what_all_classes_share_is_optimised_kept_and_counted_and_no_loss_may_have_its_name() -> None:
    images, labels = torch.rand(2, 1, 4, 4), torch.arange(2)
    bank = Bank(images / 2, labels, {}, {}, parametrization=Shared(), shape=(1, 4, 4))
    torch.testing.assert_close(bank.decoded(bank.rows(None)), images)
    assert bank.stored_numbers == 33
    bank.update({"images": torch.zeros_like(images), "scale": torch.ones(1)})
    assert bank.parameters["scale"].item() == pytest.approx(1.9)
    again = Bank(images, labels, {}, {}, parametrization=Shared(), shape=(1, 4, 4))
    again.load_state(bank.own_part(bank.state()))
    assert torch.equal(again.decoded(again.rows(None)), bank.decoded(bank.rows(None)))
    with pytest.raises(ddkit.InputError, match="both have a parameter 'scale'"):
        Bank(images, labels, {"scale": Parameter()}, {}, parametrization=Shared(), shape=(1, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_networks_see_the_images_that_are_made_and_a_file_alone_gives_them(cli: Cli, kind: str) -> None:
    made = cli("distill", "--losses", "dm,dkkt", "--ipc", 2, "--pipc", 10, *SMALL_FLAGS, *KINDS[kind], "--out", "run", "--json")
    assert made.code == 0, made.err
    stored, record = read_tensors(Path("run/synthetic.safetensors"))
    shapes = {"grid": ("images", (20, 1, 8, 8)), "fourier": ("stored", (80, 16))}
    name, shape = shapes[kind]
    assert (stored[name].shape, len(stored["labels"]), record["ipc"], record["parametrization"]["use"]) == (shape, shape[0], 2, kind)
    assert stored["multipliers"].shape == (80,)
    Path("run/synthetic.safetensors").rename("alone.safetensors")
    found = ddkit.load("alone.safetensors")
    assert (found.images.shape, len(found.as_dataset()), found.stored_as_images) == ((80, 1, 8, 8), 80, 2)
    assert found.labels.tolist() == [label for label in range(10) for _ in range(8)]
    state, _ = read_tensors(next(Path("run/checkpoints").glob("*2.safetensors")))
    makes = ddkit.create("parametrization", kind)
    torch.testing.assert_close(found.normalised, makes.decode(state["bank.images"], (1, 8, 8), {}))
    Path("alone.safetensors").rename("run/synthetic.safetensors")
    again = cli("evaluate", "run", "--json")
    rows = json.loads(made.out)["evaluations"]
    assert json.loads(again.out)["evaluations"] == rows
    assert (rows[0]["stored_numbers"], rows[0]["stored_as_images"]) == (128, 2)


def test_random_real_images_beside_it_are_as_many_as_have_its_numbers(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddkit_evaluators.trainer as trainer

    seen: dict[str, int] = {}
    original = trainer.Trainer.training_set

    def spy(self: trainer.Trainer, kind: str, repeat: int) -> trainer.Labelled:
        found = original(self, kind, repeat)
        seen[kind] = len(found[1])
        return found

    monkeypatch.setattr(trainer.Trainer, "training_set", spy)
    for kind, images, budget in (("grid", 8, "128 (2 images)"), ("fourier", 6, "126 (1.97 images)")):
        more = ["--set", "parametrization.images=3"] if kind == "fourier" else []
        flags = [*SMALL_FLAGS, *KINDS[kind], *more, "--set", "evaluators.accuracy.workers=1"]
        told = cli("distill", "--losses", "dm", "--ipc", 2, "--pipc", 10, *flags, "--out", kind)
        assert seen == {"synthetic": 10 * images, "random real": 20}
        assert f"% (2 per class, while the set shows {images})" in told.out
        assert budget in told.out


@pytest.mark.usefixtures("forked_children")
def test_networks_trained_apart_see_the_same_images(tmp_path: Path) -> None:
    ddkit.distill(losses="dm", pipc=4, sets=SMALL | {"parametrization": "fourier"}, evaluators="none", out=tmp_path / "run", device="cpu")
    rows = [
        ddkit.evaluate(tmp_path / "run", repeats=2, sets={"evaluators.accuracy.workers": count, "evaluators.accuracy.epochs": 2})[0]
        for count in (1, 2)
    ]
    assert rows[0].details["accuracies"] == pytest.approx(rows[1].details["accuracies"], abs=0.02)


def test_the_first_rows_are_what_the_initializer_made_and_the_plan_tells_how_far_it_is(cli: Cli) -> None:
    plain = cli("distill", "--losses", "dm", "--ipc", 4, "--pipc", 4, *SMALL_FLAGS, "--steps", 0, "--evaluate", "none", "--out", "plain")
    assert plain.code == 0, plain.err
    real = ddkit.load("plain")
    for kind, makes in (("grid", Grid()), ("fourier", Fourier())):
        flags = ("distill", "--losses", "dm", "--pipc", 4, *SMALL_FLAGS, *KINDS[kind], "--steps", 0, "--evaluate", "none")
        assert cli(*flags, "--out", kind).code == 0
        error = json.loads(cli(*flags, "--plan", "--json").out)["parametrization"]["encoding_error"]
        wanted = makes.decode(makes.encode(real.normalised, {}), (1, 8, 8), {})
        torch.testing.assert_close(ddkit.load(kind).normalised, wanted, atol=1e-5, rtol=0)
        assert error == pytest.approx(float((wanted - real.normalised).square().mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize("kind", [*KINDS, "bases"])
def test_a_run_in_chunks_of_classes_does_the_same_steps(kind: str, tmp_path: Path) -> None:
    for chunk in (0, 3):
        sets = SMALL | {"parametrization": kind, "engine.chunk": chunk, "steps": 3}
        sets |= {"parametrization.decoder": True} if kind == "bases" else {}
        ddkit.distill(losses="dm,dkkt", pipc=4, sets=sets, evaluators="none", out=tmp_path / str(chunk), device="cpu")
    torch.testing.assert_close(ddkit.load(tmp_path / "0").images, ddkit.load(tmp_path / "3").images, atol=1e-3, rtol=0)
    numbers = {"grid": 64, "fourier": 64, "bases": 2 * (5 * 5 + 4) + 10 / 10}  # ten classes share the ten numbers of the decoder
    assert ddkit.load(tmp_path / "0").stored_numbers == numbers[kind]


def test_sets_that_are_made_differently_cannot_be_averaged_and_alike_ones_can(cli: Cli) -> None:
    for name, flags in (("plain", []), *KINDS.items()):
        made = cli("distill", "--losses", "dm", "--pipc", 4, "--evaluate", "none", *SMALL_FLAGS, *flags, "--out", name)
        assert made.code == 0, made.err
    for one, other in (("plain", "grid"), ("grid", "fourier")):
        refused = cli("blend", one, other, "--out", "both")
        assert refused.code == 4
        assert "have different parametrizations" in " ".join(refused.err.split())
    for name in KINDS:
        assert cli("blend", name, name, "--out", f"same-{name}").code == 0
        torch.testing.assert_close(ddkit.load(f"same-{name}").images, ddkit.load(name).images)


def test_a_file_that_makes_images_that_it_cannot_is_refused(tmp_path: Path) -> None:
    bad: dict[str, list[dict[str, Any]]] = {
        "grid": [{"parametrization": {"use": "grid", "factor": factor}} for factor in (3, 0, "two")] + [{"decode": {"factor": 3}}],
        "fourier": [
            {"image_shape": [1, 8, 9]}, {"image_shape": [1, 10**6, 10**6]}, {"image_shape": None}, {"parametrization": {"use": "pixels"}},
            {"parametrization": {"use": 3}}, {"parametrization": {"use": "fourier", "images": 5}},
        ],
    }  # fmt: skip
    for kind, changes in bad.items():
        sets = SMALL | {"parametrization": kind, "steps": 0}
        ddkit.distill(losses="dm", pipc=4, evaluators="none", sets=sets, out=tmp_path / kind, device="cpu")
        tensors, record = read_tensors(tmp_path / kind / "synthetic.safetensors")
        for change in changes:
            write_tensors(tmp_path / "bad.safetensors", tensors, {**record, **change})
            with pytest.raises(ddkit.RunFilesError, match=r"bad\.safetensors is not a synthetic set"):
                ddkit.load(tmp_path / "bad.safetensors")
    with pytest.raises(ddkit.InputError, match="is already a set of ddkit"):
        ddkit.import_file(tmp_path / "fourier" / "synthetic.safetensors", tmp_path / "again")


def test_the_report_and_the_picture_show_what_can_be_looked_at_and_exports_what_networks_see(cli: Cli) -> None:
    for kind, shown in (("grid", 10), ("fourier", 40)):
        made = cli("distill", "--losses", "dm", "--pipc", 4, "--evaluate", "none", *SMALL_FLAGS, *KINDS[kind], "--out", kind)
        assert made.code == 0, made.err
        page = Path(kind, "report.html").read_text(encoding="utf-8")
        assert f">{shown}</b>" in page
        assert "Before and after" in page
        assert f"as many as 1 images of this size have; {kind} makes 4 of them" in page
        for name in ("npz", "png"):
            assert cli("export", kind, "--to", name, "--out", f"{kind}-{name}").code == 0
        assert np.load(next(Path(f"{kind}-npz").glob("*.npz")))["x_train"].shape == (40, 1, 8, 8)
        assert f"64 stored numbers per class, as many as 1 image of this size has (parametrization {kind})" in Path(
            f"{kind}-npz/README.md"
        ).read_text(encoding="utf-8")


def test_a_study_says_which_systems_of_a_cell_have_another_budget_and_is_silent_if_they_have_the_same() -> None:
    def table(*numbers: float | None) -> str:
        figures = [
            Figure(ipc=1, pipc=10, system=f"s{n}", title=f"s{n}", protocol="short", labels="hard", steps=1, wanted=1, stored_numbers=each)
            for n, each in enumerate(numbers)
        ]
        return report_table(Report(study="x", summary="", source="", split="test", published_on=None, figures=figures, pictures=[]))

    assert "Do not compare these systems at ipc 1, pipc 10, as their budgets differ: s0 64 numbers per class, s1 65 numbers" in table(
        64, 65
    )
    assert "budgets" not in table(64, 64, None)
