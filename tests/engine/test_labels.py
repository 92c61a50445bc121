"""Labels of the set: one-hot, the teacher's, or learned with the images; stored, trained on, exported and imported."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ddkit
from ddkit.components.options import Parameter
from ddkit.engine.bank import Bank, on_simplex
from ddkit.engine.loop import distill
from ddkit.files import read_tensors, write_tensors
from ddkit.recipes.tables import OptimizerTable
from tests.conftest import SMALL, SMALL_FLAGS, Result, set_flags
from tests.engine.runs import made, write_npz

Cli = Callable[..., Result]
LEARNED = {"kind": "learned", "lr": 0.05}


def table_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Returns a recipe of feature-regression on 3 classes of 8 x 8, with learned labels."""
    found: dict[str, Any] = {
        "ipc": 2, "pipc": 6, "steps": 6, "data": {"use": "npz", "path": str(write_npz(tmp_path / "data.npz", (8, 7, 9)))},
        "network": {"model": "convnet", "width": 4, "depth": 2}, "teacher": {"model": "convnet", "width": 4, "depth": 2},
        "train": {"epochs": 1}, "losses": {"feature-regression": {}}, "labels": LEARNED, "engine": {"compile": False},
    }  # fmt: skip
    return found | changes


def test_the_projection_gives_the_nearest_probabilities() -> None:
    values = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = on_simplex(values)
    torch.testing.assert_close(found.sum(1), torch.ones(20, dtype=torch.float64))
    assert bool((found >= 0).all())
    for other in torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample(torch.Size([200])):
        assert bool(((values - found).norm(dim=1) <= (values - other).norm(dim=1) + 1e-12).all())
    one_hot = torch.eye(4)
    assert torch.equal(on_simplex(one_hot), one_hot)


def test_learned_labels_begin_as_the_classes_and_stay_probabilities(tmp_path: Path) -> None:
    _, bank, engine = made(table_of(tmp_path))
    engine.start()
    start = bank.parameters["soft_labels"].detach().clone()
    assert torch.equal(start, torch.eye(3).repeat_interleave(2, 0))
    distill(engine, 0, 3)
    labels = bank.parameters["soft_labels"].detach()
    assert bool((labels >= 0).all())
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    assert not torch.equal(labels, start)


def test_a_first_step_with_learned_labels_moves_the_images_as_the_plain_one_does(tmp_path: Path) -> None:
    found = []
    for labels in (LEARNED, {"kind": "hard"}):
        _, bank, engine = made(table_of(tmp_path, labels=labels))
        engine.start()
        distill(engine, 0, 1)
        found.append(bank.images.detach())
    assert torch.equal(*found)


def test_in_chunks_of_classes_the_gradient_of_the_labels_is_that_of_the_whole_set(tmp_path: Path) -> None:
    found = []
    for chunk in (0, 1):
        _, _, engine = made(table_of(tmp_path, engine={"compile": False, "chunk": chunk}))
        engine.start()
        found.append(engine.evaluate(0).gradients["soft_labels"])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert float(found[0].abs().max()) > 1e-3


def test_the_teachers_targets_are_its_probabilities_at_the_temperature_on_the_images_as_they_are(tmp_path: Path) -> None:
    setup, bank, engine = made(table_of(tmp_path, labels={"kind": "teacher", "temperature": 4.0}))
    engine.start()
    distill(engine, 0, 2)
    teacher = setup.teacher
    assert teacher is not None
    with torch.no_grad():
        wanted = (teacher.logits(bank.images) / 4.0).softmax(1)
    torch.testing.assert_close(engine.whole_set(2)[1], wanted)
    assert not torch.allclose(engine.whole_set(2)[1], (teacher.logits(bank.images)).softmax(1)), "another temperature gives others"


def test_a_network_between_steps_is_trained_on_the_labels_of_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr("ddkit.engine.pool.fit", lambda module, images, labels, *rest, **how: seen.append(labels.clone()))
    network = {"model": "convnet", "width": 4, "depth": 2, "renew_every": 2, "inner_epochs": 1}
    for labels in (LEARNED, {"kind": "hard"}):
        _, bank, engine = made(table_of(tmp_path, labels=labels, network=network))
        engine.start()
        distill(engine, 0, 1)
        now = bank.parameters["soft_labels"].detach().clone() if labels["kind"] == "learned" else bank.labels
        distill(engine, 1, 2)
        assert torch.equal(seen.pop(), now)


def test_a_parameter_that_is_maximised_rises_under_adam_and_sgd() -> None:
    declared = {"up": Parameter(per="set", direction="max"), "down": Parameter(per="set")}
    for kind in ("adam", "sgd"):
        settings = {name: OptimizerTable(kind=kind, lr=0.1) for name in declared}  # type: ignore[arg-type]
        bank = Bank(torch.zeros(1, 1, 2, 2), torch.tensor([0]), declared, settings)
        bank.update({name: torch.ones_like(tensor) for name, tensor in bank.tensors().items()})
        assert float(bank.parameters["up"].detach()) == pytest.approx(1.1)
        assert float(bank.parameters["down"].detach()) == pytest.approx(0.9)


# What a user has of it

ONE_LINE = ("distill", "--losses", "feature-regression", "--set", "labels.kind=learned")


def distilled(cli: Cli, *flags: object, out: str = "run") -> dict[str, Any]:
    told = cli(*ONE_LINE, "--pipc", 4, *SMALL_FLAGS, *flags, "--out", out, "--json")
    assert told.code == 0, told.err
    found: dict[str, Any] = json.loads(told.out)
    return found


def test_one_command_learns_labels_of_digits_stores_them_and_says_that_networks_learned_them(cli: Cli) -> None:
    rows = distilled(cli)["evaluations"]
    assert [(row["labels"], row["details"]["random_real"]) for row in rows] == [("stored", "hard labels")]
    found = ddkit.load("run")
    assert found.soft_labels is not None
    assert found.soft_labels.shape == (10, 10)
    assert not torch.equal(found.soft_labels, torch.eye(10))
    assert torch.equal(found.as_dataset(targets=True)[3][1], found.soft_labels[3])
    assert int(found.as_dataset()[3][1]) == int(found.soft_labels[3].argmax())
    assert "probability of an image&#39;s own class" in Path("run/report.html").read_text(encoding="utf-8")


def test_a_run_that_begins_with_a_set_goes_on_with_its_learned_labels_unless_it_is_told_not_to(cli: Cli) -> None:
    distilled(cli, "--evaluate", "none")
    for init, wanted in (("auto", ddkit.load("run").soft_labels), ("hard", torch.eye(10))):
        distilled(cli, "--evaluate", "none", "--init", "file:run", "--steps", 0, "--set", f"labels.init={init}", out=init)
        torch.testing.assert_close(ddkit.load(init).soft_labels, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["grid", "fourier"])
def test_labels_are_learned_with_grids_and_with_frequencies(cli: Cli, kind: str) -> None:
    row = distilled(cli, "--set", f"parametrization={kind}", "--ipc", 1)["evaluations"][0]
    soft = ddkit.load("run").soft_labels
    assert soft is not None
    assert (soft.shape, row["labels"], row["stored_as_images"] <= 1) == ((40, 10), "stored", True)
    assert not torch.equal(soft, torch.eye(10).repeat_interleave(4, 0)), "they moved"


def test_rows_of_hard_stored_and_the_teachers_labels_stand_beside_one_another(cli: Cli) -> None:
    distilled(cli)
    for labels in ("hard", "teacher", "soft"):
        assert cli("evaluate", "run", "--set", f"evaluators.accuracy.labels={labels}").code == 0
    rows = json.loads(Path("run/evaluation.json").read_text(encoding="utf-8"))["evaluations"]
    assert sorted(row["labels"] for row in rows) == ["hard", "stored", "teacher"], "soft is the older word for teacher"
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert all(title in page for title in ("Hard labels", "Labels stored with the set", "The teacher&#39;s labels"))


def test_networks_of_an_evaluation_learn_the_stored_labels(cli: Cli) -> None:
    one = distilled(cli)["evaluations"][0]
    made_set = ddkit.load("run")
    tensors, record = read_tensors(Path("run/synthetic.safetensors"))
    turned = {**tensors, "soft_labels": tensors["soft_labels"].roll(1, 1)}
    write_tensors(Path("turned.safetensors"), turned, {key: value for key, value in record.items() if key != "schema"})
    flags = ["--dataset", "digits", "--pipc", 4, *set_flags({path: value for path, value in SMALL.items() if "evaluators" in path})]
    told = json.loads(cli("evaluate", "turned.safetensors", *flags, "--json").out)["evaluations"][0]
    assert told["labels"] == "stored"
    assert told["details"]["accuracies"] != one["details"]["accuracies"]
    assert told["details"]["random_real_accuracies"] == one["details"]["random_real_accuracies"]
    assert torch.equal(ddkit.load("turned.safetensors").labels, (made_set.labels + 1) % 10), "the class of an image is its likeliest one"


def test_exports_and_imports_keep_the_labels(cli: Cli) -> None:
    distilled(cli, "--evaluate", "none")
    soft = ddkit.load("run").soft_labels
    assert soft is not None
    for name in ("npz", "imagefolder"):
        assert cli("export", "run", "--to", name, "--out", name).code == 0
        assert "labels are probabilities of the classes (learned)" in Path(name, "README.md").read_text(encoding="utf-8")
    with Path("imagefolder/soft_labels.csv").open(encoding="utf-8", newline="") as stream:
        head, *lines = csv.reader(stream)
    assert head == ["file_name", *map(str, range(10))]
    assert [line[0] for line in lines] == [f"{digit}/0001.png" for digit in range(10)]
    np.testing.assert_allclose(np.array([line[1:] for line in lines], dtype=np.float32), soft)
    for number, file in enumerate(("npz/synthetic.npz", "run/synthetic.safetensors")):
        assert cli("import", file, "--out", f"again-{number}").code == 0
        assert torch.equal(ddkit.load(f"again-{number}").targets, soft)


def test_a_set_of_another_project_may_have_logits_or_probabilities_in_any_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, logits = torch.rand(4, 1, 8, 8), torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    given: dict[str, Any] = {"pixels": "unit", "mean": [0.3], "std": [0.4]}
    for name, labels in (("probabilities", logits.softmax(1)), ("logits", logits)):
        torch.save({"images": images, "labels": labels}, tmp_path / f"{name}.pt")
        found = ddkit.import_file(tmp_path / f"{name}.pt", tmp_path / name, **given)
        order = logits.argmax(1).argsort(stable=True)
        torch.testing.assert_close(ddkit.load(tmp_path / name).soft_labels, logits.softmax(1)[order])
        assert isinstance(found, ddkit.Artifact)
        assert torch.equal(found.labels, logits.argmax(1)[order])
        assert ("used as logits" in caplog.text) == (name == "logits")
    torch.save({"images": images, "labels": logits[:3]}, tmp_path / "short.pt")
    with pytest.raises(ddkit.InputError, match="one row for each of the 4 images"):
        ddkit.import_file(tmp_path / "short.pt", tmp_path / "short", **given)


def test_a_file_whose_soft_labels_are_no_probabilities_is_refused(tmp_path: Path, finished: Path) -> None:
    tensors, record = read_tensors(finished / "synthetic.safetensors")
    for soft in (torch.full((10, 10), 0.2), torch.eye(10)[:9], torch.eye(10).double(), torch.full((10, 10), float("nan"))):
        write_tensors(tmp_path / "bad.safetensors", {**tensors, "soft_labels": soft}, {k: v for k, v in record.items() if k != "schema"})
        with pytest.raises(ddkit.RunFilesError, match="soft_labels"):
            ddkit.load(tmp_path / "bad.safetensors")


def test_a_blend_averages_labels_by_class_name(tmp_path: Path, finished: Path) -> None:
    tensors, record = read_tensors(finished / "synthetic.safetensors")
    record = {key: value for key, value in record.items() if key != "schema"}
    soft = torch.full((10, 10), 0.05) + 0.5 * torch.eye(10)
    turned = record | {"class_names": record["class_names"][::-1]}
    mirrored = {"labels": tensors["labels"], "images": tensors["images"].flip(0), "soft_labels": soft.flip(0, 1)}
    write_tensors(tmp_path / "theirs.safetensors", mirrored, turned)
    ddkit.blend(finished, tmp_path / "theirs.safetensors", alpha=0.5, out=tmp_path / "both")
    torch.testing.assert_close(ddkit.load(tmp_path / "both").targets, (torch.eye(10) + soft) / 2)


def test_a_stored_step_size_trains_the_networks_of_an_evaluation(cli: Cli) -> None:
    Path("mine.py").write_text(STEP_SIZE, encoding="utf-8")
    flags = ("--plugin", "mine.py", "--pipc", 4, *SMALL_FLAGS, "--set", "evaluators.accuracy.lr=stored")
    told = cli("distill", "--losses", "step", *flags, "--out", "run", "--json")
    assert told.code == 0, told.err
    row = json.loads(told.out)["evaluations"][0]
    stored = float(ddkit.load("run").parameters["step_size"])
    assert stored > 0.01, "it was maximised"
    assert (row["details"]["lr"], row["details"]["variant"]) == (stored, "2 epochs, lr stored, width 8")
    plain = cli("distill", "--losses", "dm", "--pipc", 4, *SMALL_FLAGS, "--set", "evaluators.accuracy.lr=stored", "--out", "plain")
    assert plain.code == 4
    assert "needs the parameter step_size" in " ".join(plain.err.split())


STEP_SIZE = '''
import ddkit
from torch import Tensor


class Step(ddkit.Loss):
    """A loss with a step size that rises."""

    requires = ddkit.Requires(parameters={"step_size": ddkit.Parameter(per="set", init=0.01, lr=0.01, direction="max")})

    def __call__(self, step: ddkit.Step) -> Tensor:
        return step.images.square().mean() + step.parameters["step_size"]
'''


@pytest.mark.usefixtures("forked_children")
def test_processes_that_train_networks_at_the_same_time_learn_the_stored_labels_too(cli: Cli) -> None:
    distilled(cli, "--evaluate", "none")
    sets = {path: value for path, value in SMALL.items() if "evaluators" in path} | {"evaluators.accuracy.epochs": 20}
    rows = [ddkit.evaluate("run", sets=sets | {"evaluators.accuracy.workers": workers}, device="cpu")[0] for workers in (1, 2)]
    assert rows[0].details["accuracies"] == rows[1].details["accuracies"]
    hard = ddkit.evaluate("run", sets=sets | {"evaluators.accuracy.labels": "hard"}, device="cpu")[0]
    assert hard.details["accuracies"] != rows[0].details["accuracies"], "the figures could differ"


def test_each_image_of_a_grid_has_labels_of_its_own_that_survive_an_import(cli: Cli) -> None:
    distilled(cli, "--set", "parametrization.use=grid", "--set", "parametrization.factor=2", "--pipc", 5)
    soft = ddkit.load("run").soft_labels
    assert soft is not None
    assert soft.shape == (40, 10)
    assert len(ddkit.load("run").as_dataset(targets=True)) == 40
    assert cli("import", "run/synthetic.safetensors", "--out", "again").code == 0
    assert torch.equal(ddkit.load("again").targets, soft)
