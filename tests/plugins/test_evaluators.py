"""What an evaluation tests on and compares with: held-out images, baselines, soft labels, sharpness-aware training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ddkit_evaluators import Accuracy
from ddkit_evaluators.trainer import SoftLabels, Trainer

import ddkit
from ddkit.components import registry
from ddkit.components.figures import evaluation_table
from ddkit.data.real import RealData, open_dataset
from ddkit.nn.training import Schedule, fit
from ddkit.recipes.tables import DataTable
from tests.conftest import SMALL, SMALL_FLAGS, Result, write_image_folder

ROOT = Path(__file__).parents[2]
CLI = Callable[..., Result]
HELD_OUT = ("--set", "data.test=held-out", "--set", "data.held_out=40")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run without a teacher, evaluated on the test images."""
    path = tmp_path_factory.mktemp("plain") / "run"
    ddkit.distill(losses="dm", pipc=3, sets=SMALL, out=path, device="cpu")
    return path


def rows_of(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def real(pipc: int | str = 10, seed: int = 0, held_out: int | None = 40) -> RealData:
    return RealData(open_dataset(DataTable()), pipc, seed, (1, 8, 8), held_out=held_out)


# Held-out images


def test_held_out_images_are_training_images_that_are_neither_accessible_nor_tested_on() -> None:
    made, everything, tests = real(pipc=100), real("all", held_out=None), real(held_out=None).test_set[0]
    images, labels = made.test_set
    assert torch.bincount(labels).tolist() == [40] * 10
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(everything.images, everything.labels, strict=True)}
    assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert not rows_of(images) & rows_of(made.images)
    assert not rows_of(images) & rows_of(tests)
    assert rows_of(made.images) <= set(label_of), "the control: what is compared can meet"


def test_held_out_images_depend_on_the_seed_and_not_on_pipc() -> None:
    first, more, other = real(pipc=0), real(pipc=90), real(seed=1)
    assert torch.equal(first.test_set[0], more.test_set[0])
    assert torch.equal(first.test_set[1], more.test_set[1])
    assert rows_of(first.test_set[0]) != rows_of(other.test_set[0])
    assert rows_of(real(held_out=20).test_set[0]) < rows_of(first.test_set[0])


@pytest.mark.parametrize(
    ("pipc", "held_out", "said"),
    [
        ("all", 1, "--pipc 139"),
        (139, 200, "held_out=1"),
        (100, 41, "held_out=40"),
        (500, 200, "--pipc 112 with --set data.held_out=28"),
    ],
)
def test_too_few_images_to_hold_out_are_told_before_the_run(pipc: int | str, held_out: int, said: str, cli: CLI) -> None:
    flags = ("--set", "data.test=held-out", "--set", f"data.held_out={held_out}", "--pipc", pipc)
    result = cli("distill", "--losses", "dm", "--plan", *flags)
    assert (result.code, result.out) == (4, "")
    told = " ".join(result.err.split())
    assert "has 140 in all" in told
    assert said in told
    advised = re.findall(r"--pipc \d+|--set data\.held_out=\d+", told.partition("Use ")[2])
    assert cli("distill", "--losses", "dm", "--plan", *flags, *" ".join(advised).split()).code == 0  # it works as printed


@pytest.mark.parametrize(("each", "pipc"), [(8, 50), (8, "all"), (8, 2), (2, 5)])
def test_without_test_images_the_advised_command_works_whatever_the_data(cli: CLI, tmp_path: Path, each: int, pipc: int | str) -> None:
    folder = write_image_folder(tmp_path / "images", train=each)
    shutil.rmtree(folder / "test")
    flags = ("distill", "--losses", "dm", "--plan", "--dataset", f"imagefolder:{folder}", "--pipc", pipc)
    failed = cli(*flags)
    assert failed.code == 4
    advised = " ".join(failed.err.split()).partition("held-out training images with ")[2].rstrip(".").split()
    assert advised[:2] == ["--set", "data.test=held-out"]
    done = cli(*flags, "--json", *advised)
    assert done.code == 0, done.err
    assert json.loads(done.out)["recipe"]["data"]["held_out"] == 1


def test_a_fifth_of_the_smallest_class_is_held_out_and_recorded(cli: CLI) -> None:
    def planned(*flags: object) -> int:
        told = cli("distill", "--losses", "dm", "--plan", "--json", "--set", "data.test=held-out", *flags)
        return int(json.loads(told.out)["recipe"]["data"]["held_out"])

    assert (planned(), planned("--pipc", 120), planned("--set", "data.held_out=7")) == (28, 20, 7)


def test_a_run_is_tuned_on_held_out_images_and_tested_once(cli: CLI, plain: Path) -> None:
    result = cli("distill", "--losses", "dm", "--pipc", 3, *SMALL_FLAGS, *HELD_OUT, "--out", "run")
    assert result.code == 0, result.err
    assert "split" in result.out
    assert "held-out" in result.out
    assert torch.equal(ddkit.load("run").images, ddkit.load(plain).images)
    files = [json.loads(Path(name, "manifest.json").read_text())["real_files"] for name in ("run", plain)]
    assert files[0] == files[1]
    tested = cli("evaluate", "run", "--set", "data.test=test")
    assert tested.code == 0, tested.err
    assert "split" not in tested.out
    rows = json.loads(Path("run/evaluation.json").read_text())["evaluations"]
    assert [row["split"] for row in rows] == ["held-out", "test"]
    assert rows[1] == json.loads((plain / "evaluation.json").read_text())["evaluations"][0]
    assert rows[0]["details"]["accuracies"] != rows[1]["details"]["accuracies"]


def test_another_seed_could_test_on_accessible_images_and_is_refused(cli: CLI) -> None:
    assert cli("distill", "--losses", "dm", "--pipc", 110, "--evaluate", "none", *SMALL_FLAGS, "--out", "run").code == 0
    result = cli("evaluate", "run", "--seed", 1, *HELD_OUT)
    assert (result.code, result.out) == (4, "")
    assert "Use --seed 0" in result.err
    result = cli("evaluate", "run", "--pipc", 5, *HELD_OUT)
    assert result.code == 4, "the set was made with more than pipc 5"
    assert "pipc 110" in " ".join(result.err.split())


# Baselines

INFO = ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(4, 4))


def images(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns uint8 images whose brightness tells the class, and labels, class by class."""
    labels = torch.arange(2).repeat_interleave(rows // 2)
    noise = torch.randint(0, 128, (rows, *INFO.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return noise + (labels * 60).to(torch.uint8).view(-1, 1, 1, 1), labels


def artifact(counts: tuple[int, int] = (2, 2)) -> ddkit.Artifact:
    pixels = torch.rand((sum(counts), *INFO.shape), generator=torch.Generator().manual_seed(0))
    metadata = {"class_names": ["a", "b"], "mean": [0.5], "std": [0.25]}
    return ddkit.Artifact(pixels, torch.arange(2).repeat_interleave(torch.tensor(counts)), metadata)


def data(real_rows: int = 20, seed: int = 3, report: Callable[[int, int], object] = lambda done, total: None) -> ddkit.data.EvaluationData:
    tests, test_labels = images(100, 1)
    real_images, real_labels = images(real_rows, 2)
    return ddkit.data.EvaluationData(
        info=INFO, test_images=tests, test_labels=test_labels, real_images=real_images, real_labels=real_labels, seed=seed,
        device=torch.device("cpu"), report=report,
    )  # fmt: skip


def evaluated(
    made: ddkit.Artifact | None = None,
    given: ddkit.data.EvaluationData | None = None,
    teacher: ddkit.nn.Teacher | None = None,
    **options: Any,
) -> list[ddkit.Evaluation]:
    table = {"epochs": 3, "repeats": 2, "model": "mlp", "model_options": {"width": 8}, "cache": False} | options
    evaluator = ddkit.create("evaluator", "accuracy", table, data=INFO, where="evaluators.accuracy")
    return list(evaluator(made or artifact(), given or data(), teacher))


def trainer(made: ddkit.Artifact, given: ddkit.data.EvaluationData) -> Trainer:
    model = ddkit.create("model", "mlp", {"width": 8}, data=INFO)
    arithmetic = ddkit.nn.Arithmetic(compile=False, precision="float32")
    return Trainer("mlp", model, made, given, ddkit.nn.Protocol(epochs=1, augmenter="none"), arithmetic)


def test_an_evaluation_follows_its_seed() -> None:
    figures = [
        [row.details["accuracies"], row.details["random_real_accuracies"]] for seed in (3, 3, 4) for row in evaluated(given=data(seed=seed))
    ]
    assert figures[0] == figures[1]
    assert all(first != other for first, other in zip(figures[0], figures[2], strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_networks_that_diverge_are_told_also_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path))
    for _ in range(2):
        caplog.clear()
        evaluated(lr=1e20, epochs=3, repeats=2, workers=workers)
        for kind in ("synthetic", "random real"):
            assert f"The training of 2 of 2 networks on {kind} images diverged" in caplog.text
    assert "--set evaluators.accuracy.lr=0.01" in caplog.text, "the protocol's own"
    caplog.clear()
    evaluated(epochs=3, repeats=1)
    assert "diverged" not in caplog.text


BASELINES = ["pipc-real", "class-mean"]


def test_what_is_not_the_protocols_is_told_beside_its_name() -> None:
    (shorter,), (own,) = evaluated(epochs=7, random_real=False), evaluated(epochs=300, random_real=False, repeats=1)
    assert shorter.details["variant"] == "7 epochs, width 8"
    assert own.details["variant"] == "width 8", "300 epochs are those of the protocol"
    assert "short, 7 epochs" in evaluation_table([shorter])


def test_baselines_are_rows_of_their_own_and_change_no_other() -> None:
    synthetic, real_row, means = evaluated(baselines=BASELINES, epochs=60)
    assert [synthetic] == evaluated(epochs=60)
    assert [row.images for row in (synthetic, real_row, means)] == ["synthetic", *BASELINES]
    for row in (real_row, means):
        assert (row.random_real_mean, row.random_real_std, row.repeats) == (None, None, 2)
        assert row.details["random_real_accuracies"] == []
    assert real_row.accuracy_mean > synthetic.accuracy_mean, "pixels without a class teach nothing"
    assert evaluated(baselines=["class-mean", "class-mean"], random_real=False, epochs=60)[1:] == [means]


@pytest.mark.usefixtures("forked_children")
@pytest.mark.parametrize("options", [{"baselines": ["pipc-real", "class-mean"]}, {"protocol": "practical-sam", "epochs": 40}], ids=str)
def test_processes_train_baselines_and_sharpness_aware_as_one_after_the_other_does(options: dict[str, Any]) -> None:
    def accuracies(workers: int, **more: Any) -> list[list[float]]:
        made = ddkit.Artifact(images(4, 7)[0].float() / 255, *artifact().as_dataset().tensors[1:], artifact().metadata)
        return [row.details["accuracies"] for row in evaluated(made, random_real=False, workers=workers, **options | more)]

    assert accuracies(2) == accuracies(1)
    assert "protocol" not in options or accuracies(1) != accuracies(1, protocol="dm-official"), "the control: pixels that can be learned"


def test_pipc_real_is_every_accessible_image() -> None:
    given = data()
    found, labels = trainer(artifact(), given).training_set("pipc-real", 0)
    assert torch.equal(found, (given.real_images.float() / 255 - 0.5) / 0.25)
    assert torch.equal(labels, given.real_labels)


def test_class_means_are_of_disjoint_groups_that_hold_every_image() -> None:
    given, made = data(), artifact((3, 1))
    found, labels = trainer(made, given).training_set("class-mean", 0)
    assert labels.tolist() == [0, 0, 0, 1]
    normalised = (given.real_images.float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(found[3], normalised[10:].mean(0))
    total = found[0] * 4 + found[1] * 3 + found[2] * 3  # 10 images in groups of 4, 3 and 3
    torch.testing.assert_close(total, normalised[:10].sum(0))
    again = trainer(made, given).training_set("class-mean", 0)[0]
    assert torch.equal(found, again)
    assert not torch.equal(found, trainer(made, given).training_set("class-mean", 1)[0])
    one_each = trainer(artifact((15, 15)), given).training_set("class-mean", 0)[0]  # of 10 accessible images per class
    assert rows_of(one_each) == rows_of(normalised)


def test_without_real_images_baselines_are_left_out_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    (row,) = evaluated(given=data(0), baselines=BASELINES)
    assert row.images == "synthetic"
    assert "The baselines are left out" in caplog.text


def test_baselines_alone_have_the_rows_that_they_have_beside_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    plan = Accuracy.plan
    monkeypatch.setattr(Accuracy, "plan", lambda self, *given, **how: (planned.append(how["networks"]), plan(self, *given, **how))[1])
    both = evaluated(baselines=BASELINES)
    trained: list[Any] = []
    fit = ddkit.nn.fit
    monkeypatch.setattr(ddkit.nn, "fit", lambda *given, **options: (trained.append(1), fit(*given, **options)), raising=False)
    assert evaluated(baselines=BASELINES, synthetic=False) == both[1:]
    assert len(trained) == 4  # two networks on each
    assert planned == [4, 4]  # how they are computed does not depend on what else is


def test_without_the_set_and_without_baselines_nothing_is_left(cli: CLI, plain: Path) -> None:
    kept = (plain / "evaluation.json").read_bytes()
    result = cli("evaluate", plain, "--set", "evaluators.accuracy.synthetic=false")
    assert (result.code, "nothing is left to evaluate" in result.err) == (4, True), result.err
    assert (plain / "evaluation.json").read_bytes() == kept
    sets = ("evaluators.accuracy.synthetic=false", "evaluators.accuracy.baselines=['pipc-real']")
    without = cli("evaluate", plain, "--pipc", 0, *(part for each in sets for part in ("--set", each)))
    assert (without.code, "needs some" in without.err) == (4, True), without.err


# Soft labels


def taught(mean: float = 0.5, std: float = 0.25, seed: int = 0) -> ddkit.nn.Teacher:
    model = ddkit.create("model", "mlp", {"width": 8}, data=INFO)
    return ddkit.nn.Teacher(ddkit.nn.build_network(model, INFO, seed, "teacher"), mean=(mean,), std=(std,), sha256="abc")


def test_soft_labels_are_rows_of_their_own_beside_unchanged_hard_ones() -> None:
    guide = taught()
    hard, soft = evaluated(labels="both", epochs=60, teacher=guide)
    assert [hard] == evaluated(epochs=60)
    assert [soft] == evaluated(labels="teacher", epochs=60, teacher=guide) == evaluated(labels="soft", epochs=60, teacher=guide)
    assert (hard.labels, soft.labels) == ("hard", "teacher")
    assert soft.details["accuracies"] != hard.details["accuracies"]
    assert soft.details["random_real_accuracies"] != hard.details["random_real_accuracies"]
    assert (soft.details["temperature"], soft.details["teacher"], soft.details["workers"]) == (1.0, "abc", 1)
    assert [soft] != evaluated(labels="soft", epochs=60, teacher=taught(seed=1))


def test_random_real_and_baselines_are_taught_softly_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ddkit.nn, "fit", lambda *_, **options: seen.append(options.get("targets")), raising=False)
    rows = evaluated(labels="both", baselines=BASELINES, teacher=taught())
    assert [row.labels for row in rows] == ["hard"] * 3 + ["teacher"] * 3
    assert [soft is not None for soft in seen] == [False] * 8 + [True] * 8


def test_soft_labels_come_from_the_augmented_batch_in_the_units_of_the_teacher() -> None:
    guide = taught(mean=0.3, std=0.1)
    x = torch.randn((3, *INFO.shape), generator=torch.Generator().manual_seed(0))
    found = SoftLabels(guide, artifact(), 2.0)(x, torch.zeros(3, dtype=torch.int64))
    expected = (guide.module((x * 0.25 + 0.5 - 0.3) / 0.1) / 2).softmax(1)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    unconverted = SoftLabels(taught(), artifact(), 2.0)(x, torch.zeros(3, dtype=torch.int64))
    assert not torch.allclose(found, unconverted)


class Shift(ddkit.Augmenter):
    """Adds one to every image."""

    def sample(self, generator: torch.Generator, groups: int) -> dict[str, torch.Tensor]:
        return {"by": torch.ones(groups)}

    def apply(self, x: torch.Tensor, parameters: Any) -> torch.Tensor:
        return x + parameters["by"].view(-1, 1, 1, 1)


def linear() -> torch.nn.Linear:
    module = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.3, -0.2, 0.5], [-0.4, 0.1, 0.2]]))
        module.bias.copy_(torch.tensor([0.1, -0.3]))
    return module


def rows64() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 2.0], [0.2, 0.1, -0.7], [3.0, 1.0, 0.4]], dtype=torch.float64)
    return x.view(4, 3, 1, 1), torch.tensor([0, 1, 1, 0])


class Flat(torch.nn.Module):
    """A linear classifier of images (n, 3, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_soft_step_is_that_of_the_written_out_cross_entropy(temperature: float) -> None:
    module, (x, labels) = Flat(), rows64()
    wanted = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.7, 0.3]], dtype=torch.float64)
    by_row = {tuple((image + 1).flatten().tolist()): row for image, row in zip(x, wanted, strict=True)}

    def targets(batch: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.stack([by_row[tuple(image.flatten().tolist())] for image in batch])

    schedule = Schedule(epochs=1, lr=0.1, weight_decay=0.0, schedule="constant")
    fit(module, x, labels, schedule, augmenter=Shift(), generator=torch.Generator(), targets=targets, temperature=temperature)
    own = linear()
    logs = (own((x + 1).flatten(1)) / temperature).log_softmax(1)
    (-(wanted * logs).sum(1).mean() * temperature**2).backward()
    assert own.weight.grad is not None
    torch.testing.assert_close(module.linear.weight, own.weight - 0.1 * own.weight.grad, rtol=1e-12, atol=1e-12)


def test_soft_labels_without_a_teacher_are_refused() -> None:
    with pytest.raises(ddkit.InputError, match="needs a teacher"):
        evaluated(labels="soft")


def test_a_run_without_a_teacher_of_its_own_gets_one_for_soft_labels_and_distils_the_same(cli: CLI, plain: Path) -> None:
    both = ("--set", "evaluators.accuracy.labels=both")
    result = cli("distill", "--losses", "dm", "--pipc", 3, *SMALL_FLAGS, *both, "--out", "run")
    assert result.code == 0, result.err
    manifests = [json.loads(Path(name, "manifest.json").read_text()) for name in ("run", plain)]
    assert manifests[0]["teacher"]["sha256"]
    assert manifests[1]["teacher"] is None
    assert torch.equal(ddkit.load("run").images, ddkit.load(plain).images)
    hard, soft = json.loads(Path("run/evaluation.json").read_text())["evaluations"]
    assert [hard] == json.loads((plain / "evaluation.json").read_text())["evaluations"]
    assert (soft["labels"], soft["details"]["teacher"]) == ("teacher", manifests[0]["teacher"]["sha256"])
    later = shutil.copytree(plain, Path("later"))
    told = cli("evaluate", later, "--set", "evaluators.accuracy.labels=soft")
    assert told.code == 0, told.err
    assert json.loads((later / "evaluation.json").read_text())["evaluations"] == [hard, soft]


# Sharpness-aware minimisation


def by_hand(epochs: int, *, rho: float, lr: float, decay: float) -> torch.Tensor:
    """Returns the weights of the linear model after full-batch steps, every formula written out."""
    (x, labels), module = rows64(), linear()
    x = x.flatten(1)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    pace = [torch.zeros_like(weight), torch.zeros_like(bias)]

    def slopes(w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wrong = ((x @ w.T + b).softmax(1) - torch.nn.functional.one_hot(labels, 2)) / len(x)
        return wrong.T @ x, wrong.sum(0)

    for _ in range(epochs):
        first = slopes(weight, bias)
        norm = (first[0].square().sum() + first[1].square().sum()).sqrt()
        there = slopes(weight + rho * first[0] / norm, bias + rho * first[1] / norm)
        for number, (value, slope) in enumerate(zip((weight, bias), there, strict=True)):
            pace[number] = 0.9 * pace[number] + slope + decay * value
            value -= lr * pace[number]
    return weight


@pytest.mark.parametrize("rho", [0.0, 0.001, 0.5])
def test_sharpness_aware_steps_are_those_written_out_by_hand(rho: float) -> None:
    module, (x, labels) = Flat(), rows64()
    schedule = Schedule(epochs=4, lr=0.1, weight_decay=0.01, schedule="constant", rho=rho)
    fit(module, x, labels, schedule, augmenter=None, generator=torch.Generator())
    expected = by_hand(4, rho=rho, lr=0.1, decay=0.01)
    torch.testing.assert_close(module.linear.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert rho == 0 or not torch.allclose(expected, by_hand(4, rho=0.0, lr=0.1, decay=0.01), rtol=1e-9, atol=1e-9)


def test_both_passes_see_the_same_batch_and_running_statistics_move_once() -> None:
    model = ddkit.create("model", "convnet", {"width": 8, "norm": "batch"}, data=INFO)
    x, labels = images(8, 0)
    states, seen, told = [], [], []
    for rho in (0.0, 0.05):
        module = ddkit.nn.build_network(model, INFO, 0, "test")

        def forward(batch: torch.Tensor, module: torch.nn.Module = module) -> torch.Tensor:
            seen.append(batch)
            return module(batch)

        fit(
            module, x.float() / 255, labels, Schedule(epochs=1, rho=rho), augmenter=Shift(), generator=torch.Generator(), forward=forward,
            on_batch=lambda logits, labels: told.append(logits),
        )  # fmt: skip
        states.append(module.state_dict())
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[2])
    assert len(told) == 2
    assert torch.equal(*told), "the logits before the update"
    buffers = [name for name, _ in module.named_buffers()]
    assert buffers
    assert all(torch.equal(states[0][name], states[1][name]) for name in buffers)
    assert not all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_gradient_of_zero_and_frozen_parameters_do_no_harm() -> None:
    module = Flat()
    module.linear.bias.requires_grad_(False)
    x, labels = rows64()
    fit(module, x * 0, labels, Schedule(epochs=2, rho=0.1), augmenter=None, generator=torch.Generator())
    assert bool(module.linear.weight.isfinite().all())


@pytest.mark.slow
def test_a_compiled_network_is_trained_sharpness_aware_as_a_plain_one() -> None:
    model = ddkit.create("model", "mlp", {"width": 8}, data=INFO)
    x, labels = images(8, 0)
    weights = []
    for wanted in (False, True):
        module = ddkit.nn.build_network(model, INFO, 0, "test")
        forward = ddkit.nn.compiled(module, wanted=wanted)
        fit(module, x.float() / 255, labels, Schedule(epochs=3, rho=0.5), augmenter=None, generator=torch.Generator(), forward=forward)
        assert ddkit.nn.is_compiled(forward) == wanted
        weights.append(torch.cat([value.flatten() for value in module.parameters()]).detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    plain = ddkit.nn.build_network(model, INFO, 0, "test")
    fit(plain, x.float() / 255, labels, Schedule(epochs=3), augmenter=None, generator=torch.Generator())
    assert not torch.allclose(weights[0], torch.cat([value.flatten() for value in plain.parameters()]), rtol=1e-4, atol=1e-6)


def test_the_plan_counts_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    monkeypatch.setattr(ddkit.nn, "training_flops", lambda *_, **options: float(epochs.append(options["epochs"]) or 1), raising=False)
    for protocol in ("dm-official", "practical-sam"):
        evaluator = ddkit.create("evaluator", "accuracy", {"protocol": protocol, "epochs": 7, "model": "mlp"}, data=INFO)
        evaluator.plan(INFO, torch.device("cpu"), rows=4, tests=4, networks=1)
    assert epochs == [7, 1, 14, 2]


def test_every_protocol_is_offered_everywhere(cli: CLI) -> None:
    protocols = [p.name for p in registry.plugins() if p.kind == "protocol" and p.first_party]
    pages = [" ".join(cli(command, "--help").out.split()) for command in ("distill", "evaluate")]
    pages += [(ROOT / "docs" / "reference" / "components" / "protocol.md").read_text(encoding="utf-8")]
    assert [name for name in protocols for page in pages if name not in page.replace("- ", "-")] == []
