"""Several images decoded from each stored one: exact, differentiable, the same wherever a set is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import ddkit
from ddkit.components.options import Parameter
from ddkit.engine.bank import Bank, decoded, encoded
from ddkit.files import read_tensors, write_tensors
from tests.conftest import SMALL, SMALL_FLAGS, Result

Cli = Callable[..., Result]
FOUR = ["--set", "decode.factor=2"]


def test_the_parts_of_an_image_come_row_by_row_and_are_enlarged() -> None:
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, :2, 2:] = 1.0  # the second part
    image[0, 0, 2:, :2] = 2.0  # the third
    assert [part.unique().tolist() for part in decoded(image, 2)] == [[0.0], [1.0], [2.0], [0.0]]
    wide = torch.arange(12.0).view(1, 1, 2, 6)
    assert decoded(wide, 2).shape == (4, 1, 2, 6)
    reference = torch.nn.functional.interpolate(wide[:, :, 1:, 3:], (2, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoded(wide, 2)[3:], reference)


def test_decoding_is_affine_so_normalised_or_not_makes_no_difference() -> None:
    images = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(decoded((images - 0.3) / 0.2, 3), (decoded(images, 3) - 0.3) / 0.2)
    assert torch.autograd.gradcheck(lambda x: decoded(x, 2), images[:, :, :4, :4].clone().requires_grad_())


def test_encoding_keeps_order_and_smooth_images_survive_both() -> None:
    flat = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 8, 8)
    assert torch.equal(decoded(encoded(flat, 2), 2), flat)
    ramp = torch.linspace(0, 1, 32).expand(4, 1, 32, 32)
    assert (decoded(encoded(ramp, 2), 2) - ramp).abs()[..., 2:-2].max() < 0.02


def test_one_changes_nothing() -> None:
    images = torch.rand(2, 1, 5, 7)
    assert decoded(images, 1) is images
    assert encoded(images, 1) is images


def test_rows_and_parameters_of_a_bank_are_those_of_the_decoded_images() -> None:
    labels = torch.tensor([0, 0, 1])
    bank = Bank(torch.rand(3, 1, 4, 4), labels, {"multipliers": Parameter(shape=(), per="sample")}, {}, factor=2)
    assert bank.decoded_labels.tolist() == [0] * 8 + [1] * 4
    assert bank.parameters["multipliers"].shape == (12,)
    assert bank.rows(range(1, 2)) == slice(8, 12)
    whole = bank.decoded(bank.rows(None))
    assert torch.equal(bank.decoded(slice(8, 12)), whole[8:])
    whole.sum().backward()
    assert bank.images.grad is not None
    assert bool((bank.images.grad > 0).all())


def test_losses_see_four_times_as_many_images_as_are_stored_and_so_do_networks(cli: Cli) -> None:
    made = cli("distill", "--losses", "dm,dkkt", "--ipc", 2, "--pipc", 10, *SMALL_FLAGS, *FOUR, "--out", "run", "--json")
    assert made.code == 0, made.err
    stored, record = read_tensors(Path("run/synthetic.safetensors"))
    assert (stored["images"].shape, stored["labels"].shape, record["ipc"]) == ((20, 1, 8, 8), (20,), 2)
    assert record["decode"] == {"factor": 2}
    assert stored["multipliers"].shape == (80,)
    found = ddkit.load("run")
    assert (found.images.shape, found.stored_images.shape) == ((80, 1, 8, 8), (20, 1, 8, 8))
    assert found.labels.tolist() == [label for label in range(10) for _ in range(8)]
    assert torch.equal(found.images, decoded(found.stored_images, 2))
    assert len(found.as_dataset()) == 80
    again = cli("evaluate", "run", "--json")
    assert json.loads(again.out)["evaluations"] == json.loads(made.out)["evaluations"]


def test_random_real_images_beside_it_are_as_many_as_are_stored(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddkit_evaluators.trainer as trainer

    seen: dict[str, int] = {}
    original = trainer.Trainer.training_set

    def spy(self: trainer.Trainer, kind: str, repeat: int) -> trainer.Labelled:
        found = original(self, kind, repeat)
        seen[kind] = len(found[1])
        return found

    monkeypatch.setattr(trainer.Trainer, "training_set", spy)
    flags = [*SMALL_FLAGS, *FOUR, "--set", "evaluators.accuracy.workers=1"]
    told = cli("distill", "--losses", "dm", "--ipc", 2, "--pipc", 10, *flags, "--out", "run")
    assert seen == {"synthetic": 80, "random real": 20}
    assert "% (2 a class, beside 8 decoded ones)" in told.out


def test_the_first_image_of_a_run_without_steps_is_a_grid_of_accessible_ones(tmp_path: Path) -> None:
    sets = SMALL | {"decode.factor": 2, "steps": 0}
    ddkit.distill(losses="dm", ipc=1, pipc=4, sets=sets, evaluators="none", out=tmp_path / "four", device="cpu")
    sets = SMALL | {"steps": 0}
    ddkit.distill(losses="dm", ipc=4, pipc=4, sets=sets, evaluators="none", out=tmp_path / "plain", device="cpu")
    torch.testing.assert_close(ddkit.load(tmp_path / "four").stored_images, encoded(ddkit.load(tmp_path / "plain").images, 2))


def test_too_few_real_images_are_used_again_mirrored_if_asked(tmp_path: Path) -> None:
    given = {"losses": "dm", "evaluators": "none", "device": "cpu", "pipc": 3}
    sets = SMALL | {"steps": 0, "initializer.reuse": True}
    ddkit.distill(ipc=8, sets=sets, out=tmp_path / "more", **given)  # type: ignore[arg-type]
    ddkit.distill(ipc=3, sets=SMALL | {"steps": 0}, out=tmp_path / "three", **given)  # type: ignore[arg-type]
    more, three = ddkit.load(tmp_path / "more").images[:8], ddkit.load(tmp_path / "three").images[:3]
    assert torch.equal(more, torch.cat([three, three.flip(3), three[:2]]))


def test_sets_that_are_decoded_differently_cannot_be_averaged_and_alike_ones_can(cli: Cli) -> None:
    for name, flags in (("plain", []), ("four", FOUR)):
        made = cli("distill", "--losses", "dm", "--pipc", 4, "--evaluate", "none", *SMALL_FLAGS, *flags, "--out", name)
        assert made.code == 0, made.err
    refused = cli("blend", "plain", "four", "--out", "both")
    assert refused.code == 4
    assert "not in the same way" in " ".join(refused.err.split())
    assert cli("blend", "four", "four", "--out", "same").code == 0
    torch.testing.assert_close(ddkit.load("same").images, ddkit.load("four").images)


def test_a_file_that_decodes_what_it_cannot_is_refused(tmp_path: Path) -> None:
    ddkit.distill(losses="dm", pipc=4, evaluators="none", sets=SMALL | {"decode.factor": 2}, out=tmp_path / "run", device="cpu")
    tensors, record = read_tensors(tmp_path / "run" / "synthetic.safetensors")
    for factor in (3, 0, "two"):
        write_tensors(tmp_path / "bad.safetensors", tensors, {**record, "decode": {"factor": factor}})
        with pytest.raises(ddkit.RunFilesError, match=r"bad\.safetensors is no synthetic set"):
            ddkit.load(tmp_path / "bad.safetensors")


def test_the_report_and_the_picture_show_what_is_stored_and_other_exports_what_networks_see(cli: Cli) -> None:
    made = cli("distill", "--losses", "dm", "--pipc", 4, "--evaluate", "none", *SMALL_FLAGS, *FOUR, "--out", "run")
    assert made.code == 0, made.err
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert ">10</b>" in page
    assert "Start and end" in page
    for name in ("npz", "png"):
        assert cli("export", "run", "--to", name, "--out", name).code == 0
    assert np.load(next(Path("npz").glob("*.npz")))["x_train"].shape == (40, 1, 8, 8)
    assert "decoded from 10 stored images, each a grid of 4" in Path("npz/README.md").read_text(encoding="utf-8")
