"""Training, evaluation protocols and teachers: exact numbers, and the same result for the same seed."""

from __future__ import annotations

import json
import logging
import os
import stat
import statistics
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import ddkit_evaluators
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ddkit
from ddkit.components.figures import evaluation_table
from ddkit.data.images import Normalisation
from ddkit.data.real import open_dataset
from ddkit.files import read_tensors, sha256
from ddkit.nn.automatic_teacher import automatic_teacher
from ddkit.nn.compiling import compiled
from ddkit.nn.teacher import load_teacher
from ddkit.nn.training import Schedule, accuracy, fit
from ddkit.recipes.tables import DataTable, TeacherTable, TrainTable
from ddkit.run.report.sections import Files, evaluation
from tests.conftest import SMALL, SMALL_FLAGS, Result, write_image_folder

INFO = ddkit.DataInfo(class_names=("a", "b", "c"), channels=1, size=(4, 4))
Cli = Callable[..., Result]
CPU = torch.device("cpu")


def sample(rows: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns noisy images (rows, 1, 4, 4) with one bright row of pixels that tells the class, and labels."""
    labels = torch.arange(rows) % 3
    images = torch.randn((rows, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
    images[torch.arange(rows), 0, labels] += 3
    return images, labels


def network(seed: int = 0, **options: Any) -> nn.Module:
    return ddkit.nn.build_network(ddkit.create("model", "convnet", {"width": 8} | options, data=INFO), INFO, seed, "test")


def augmenter() -> ddkit.Augmenter:
    made: ddkit.Augmenter = ddkit.create("augmenter", "dsa", data=INFO)
    return made


def trained(seed: int = 0) -> dict[str, Tensor]:
    module = network()
    fit(module, *sample(), Schedule(epochs=3, batch=5), augmenter=augmenter(), generator=torch.Generator().manual_seed(seed))
    return module.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# fit


def test_training_is_a_function_of_the_generator_and_leaves_the_global_one() -> None:
    before = torch.get_rng_state()
    first = trained(0)
    assert same(first, trained(0))
    assert not same(first, trained(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_visits_each_image_once_in_random_order() -> None:
    module, (images, labels) = network(), sample(11)
    images[:, 0, 0, 0] = torch.arange(11.0)
    seen: list[list[float]] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x[:, 0, 0, 0].tolist())
        return module(x)

    fit(module, images, labels, Schedule(epochs=2, batch=4), augmenter=None, generator=torch.Generator().manual_seed(0), forward=forward)
    assert [len(batch) for batch in seen] == [4, 4, 3, 4, 4, 3]
    epochs = [[*chain(*seen[:3])], [*chain(*seen[3:])]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "step", "epochs": 1}, [0.1] * 2),
        ({"schedule": "step", "epochs": 4}, [0.1] * 4 + [0.01] * 4),
        ({"schedule": "step", "epochs": 5}, [0.1] * 6 + [0.01] * 4),
        ({"schedule": "constant", "epochs": 3, "optimizer": "adam"}, [0.1] * 6),
        ({"schedule": "one-cycle", "epochs": 10}, [0.025, 0.05, 0.075, 0.1, *(0.1 * left / 16 for left in range(16, 0, -1))]),
    ],
)
def test_rate_of_each_update_is_that_of_the_schedule(
    schedule: dict[str, Any], expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """step: a tenth after half of the epochs; one-cycle: warms up over a fifth, and ends near 0. SGD's momentum is the published one."""
    found: list[float] = []
    kind = torch.optim.Adam if "optimizer" in schedule else torch.optim.SGD
    original = kind.step

    def step(self: Any, *arguments: Any) -> Any:
        (group,) = self.param_groups
        assert "optimizer" in schedule or (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
        found.append(group["lr"])
        return original(self, *arguments)

    monkeypatch.setattr(kind, "step", step)
    fit(network(), *sample(8), Schedule(batch=4, lr=0.1, **schedule), augmenter=None, generator=torch.Generator())
    assert found == pytest.approx(expected)


def test_training_learns_reports_every_epoch_and_ends_in_evaluation_mode() -> None:
    module, (images, labels), seen = network(), sample(60), list[tuple[int, int]]()
    before = accuracy(module, images, labels)
    schedule = Schedule(epochs=20, batch=16, lr=0.05)
    fit(module, images, labels, schedule, augmenter=None, generator=torch.Generator(), report=lambda *at: seen.append(at))
    assert accuracy(module, images, labels) > max(0.9, before)
    assert not module.training
    assert seen == [(epoch, 20) for epoch in range(1, 21)]


# accuracy


class Fixed(nn.Module):
    """Answers with the class that the first pixel holds."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float()


@pytest.mark.parametrize("batch", [1, 3, 7, 500])
def test_accuracy_is_the_fraction_of_right_answers(batch: int) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    answers = torch.tensor([0, 1, 2, 0, 1, 0, 1])
    images = answers.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).float()
    assert accuracy(Fixed(), images, labels, batch=batch) == 5 / 7


def test_accuracy_uses_running_statistics_and_moves_nothing() -> None:
    module, (images, labels) = network(norm="batch").train(), sample()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    one_by_one = accuracy(module, images, labels, batch=1)
    assert accuracy(module, images, labels) == one_by_one
    assert same(module.state_dict(), before)


# protocols and the evaluator


def artifact(per_class: int = 2) -> ddkit.Artifact:
    images, _ = sample(3 * per_class, seed=1)
    order = (torch.arange(3 * per_class) % 3).argsort(stable=True)
    metadata = {"class_names": list(INFO.class_names), "mean": [0.5], "std": [0.25]}
    return ddkit.Artifact(images[order] * 0.1, (torch.arange(3 * per_class) % 3)[order], metadata)


def evaluation_data(real_rows: int = 12, seed: int = 0, report: Callable[[int, int], None] = lambda *_: None) -> ddkit.data.EvaluationData:
    test, test_labels = sample(30, seed=2)
    real, real_labels = sample(real_rows, seed=3)
    order = real_labels.argsort(stable=True)
    return ddkit.data.EvaluationData(
        info=INFO, test_images=test * 0.1, test_labels=test_labels, real_images=real[order] * 0.1, real_labels=real_labels[order],
        seed=seed, device=CPU, report=report,
    )  # fmt: skip


def evaluated(data: ddkit.data.EvaluationData | None = None, **options: Any) -> list[ddkit.Evaluation]:
    table = {"epochs": 2, "repeats": 3, "model_options": {"width": 8}, "cache": False} | options
    evaluator = ddkit.create("evaluator", "accuracy", table, data=INFO)
    return evaluator(artifact(), data or evaluation_data(), None)


def test_mean_and_sample_deviation_are_over_the_repeats_and_every_network_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    (row,) = evaluated(evaluation_data(report=lambda *at: seen.append(at)), repeats=4, epochs=10, model="mlp")
    assert seen == [(network, 8) for network in range(1, 9)]
    made, real = row.details["accuracies"], row.details["random_real_accuracies"]
    assert len(made) == len(real) == row.repeats == 4
    assert len(set(made)) > 1
    assert row.accuracy_mean == pytest.approx(statistics.mean(made))
    assert row.accuracy_std == pytest.approx(statistics.stdev(made))
    assert row.random_real_mean == pytest.approx(statistics.mean(real))
    assert row.random_real_std == pytest.approx(statistics.stdev(real))
    assert (row.evaluator, row.model, row.protocol, row.labels) == ("accuracy", "mlp", "short", "hard")


def test_one_repeat_has_no_deviation_and_random_real_can_be_left_out() -> None:
    (row,) = evaluated(repeats=1)
    assert (row.accuracy_std, row.random_real_std) == (None, None)
    for (without,) in (evaluated(random_real=False), evaluated(evaluation_data(real_rows=0))):
        assert (without.random_real_mean, without.random_real_std) == (None, None)


class Recorder:
    """Stands for the trainer's fit: keeps what it was asked to train on, trains nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(ddkit.nn, "fit", self, raising=False)

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, schedule: Schedule, **options: Any) -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.calls.append({"images": images, "labels": labels, "schedule": schedule, "state": state, **options})


def test_random_real_is_ipc_accessible_images_a_class_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, data = Recorder(monkeypatch), evaluation_data()
    evaluated(data)
    assert [torch.bincount(call["labels"]).tolist() for call in recorder.calls] == [[2, 2, 2]] * 6
    pool = Normalisation((0.5,), (0.25,)).normalise(data.real_images)
    drawn = []
    for call in recorder.calls[3:]:
        rows = [int((pool == image).flatten(1).all(1).nonzero()) for image in call["images"]]
        assert data.real_labels[rows].tolist() == call["labels"].tolist()
        assert len(set(rows)) == 6
        drawn.append(tuple(rows))
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(("counts", "words"), [((2, 2, 2), ""), ((1, 1, 1), "1 of 2 per class"), ((2, 1, 2), "5 of 6 in all")], ids=str)
def test_fewer_random_real_images_than_the_set_has_are_counted_and_said(
    counts: tuple[int, ...], words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, whole = Recorder(monkeypatch), evaluation_data()
    rows = torch.cat([(whole.real_labels == label).nonzero().flatten()[:count] for label, count in enumerate(counts)])
    data = msgspec.structs.replace(whole, real_images=whole.real_images[rows], real_labels=whole.real_labels[rows])
    made, means = evaluated(data, repeats=1, baselines=["class-mean"])
    assert [torch.bincount(call["labels"]).tolist() for call in recorder.calls[1:]] == [list(counts)] * 2
    assert made.details["random_real_images"] == list(counts)
    assert made.details.get("random_real", "") == means.details.get("summary", "") == words
    assert (f"random real has {words}" in caplog.text) == bool(words)
    assert (f"% ({words})" in evaluation_table([made])) == bool(words)
    (group,) = evaluation(Files(artifact=artifact(), facts={}, evaluations=msgspec.to_builtins([made])))["groups"]
    assert (f"% ({words})" in group["rows"][0][4].replace("\u00a0", " ")) == bool(words)


def test_the_set_is_trained_on_as_recorded_by_networks_that_start_as_those_of_random_real(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    evaluated()
    assert torch.equal(recorder.calls[0]["images"], (artifact().images - 0.5) / 0.25)
    states = [call["state"] for call in recorder.calls]
    assert all(same(states[repeat], states[3 + repeat]) for repeat in range(3))
    assert not same(states[0], states[1])


@pytest.mark.parametrize(("small", "options", "threads"), [(5e9, {}, 1), (0, {}, 3), (5e9, {"compile": "always"}, 3)])
def test_small_steps_are_computed_in_one_thread_and_others_in_all(
    small: float, options: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, tested = set(), set()

    def predicted(module: nn.Module, test_images: torch.Tensor, **_: Any) -> torch.Tensor:
        tested.add(torch.get_num_threads())
        return torch.zeros(len(test_images), dtype=torch.int64)

    monkeypatch.setattr(ddkit_evaluators, "SMALL_STEP", small)
    monkeypatch.setattr(ddkit.nn, "fit", lambda *_, **__: seen.add(torch.get_num_threads()), raising=False)
    monkeypatch.setattr(ddkit.nn, "predicted", predicted, raising=False)
    monkeypatch.setattr(ddkit.nn, "compiled", lambda module, **_: module, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        evaluated(repeats=1, workers=1, **options)
        assert (seen, torch.get_num_threads(), tested) == ({threads}, 3, {3})
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("protocol", "kind"), [("dm-official", "SiameseAugmentation"), ("dc-official", "Identity")])
def test_protocol_decides_epochs_repeats_and_augmentation_and_options_replace_them(
    protocol: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    (row,) = evaluated(protocol=protocol, epochs=None, repeats=None)
    assert (len(recorder.calls), row.repeats) == (40, 20)
    assert {call["schedule"].epochs for call in recorder.calls} == {ddkit.nn.read_protocol(protocol).epochs}
    assert {type(call["augmenter"]).__name__ for call in recorder.calls} == {kind}
    recorder.calls.clear()
    (row,) = evaluated(protocol=protocol, repeats=2, epochs=7)
    assert [call["schedule"].epochs for call in recorder.calls] == [7] * 4
    assert row.details["epochs"] == 7


def test_last_epoch_is_reported_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(module: nn.Module, *_: Any, **__: Any) -> None:
        """Is right about class 0 alone in the end, whatever it was before."""
        with torch.no_grad():
            module.classifier.weight.zero_()  # type: ignore[union-attr, operator]
            module.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # type: ignore[union-attr, operator]

    calls = []
    original = ddkit.nn.predicted

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(ddkit.nn, "fit", spoil, raising=False)
    monkeypatch.setattr(ddkit.nn, "predicted", counted, raising=False)
    (row,) = evaluated()
    assert row.accuracy_mean == pytest.approx(1 / 3)
    assert len(calls) == 6  # the test set is looked at once per network, after its training


def test_several_models_give_a_row_each_and_do_not_influence_each_other() -> None:
    both = evaluated(model="convnet, mlp")
    assert [row.model for row in both] == ["convnet", "mlp"]
    assert both[1] == evaluated(model="mlp")[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_evaluation_is_the_same_compiled_or_not() -> None:
    plain, fast = (evaluated(compile=how, precision="float32", repeats=2, epochs=150)[0] for how in ("never", "always"))
    assert (plain.details["compiled"], fast.details["compiled"]) == (False, True)
    assert plain.accuracy_mean > 0.8
    assert fast.accuracy_mean == pytest.approx(plain.accuracy_mean, abs=0.05)
    assert fast.random_real_mean == pytest.approx(plain.random_real_mean, abs=0.05)


def test_compiling_that_fails_goes_on_without_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(module: nn.Module, **settings: object) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            raise OSError("no compiler")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    module, x = network(), sample()[0]
    forward = compiled(module, wanted=True)
    with caplog.at_level(logging.WARNING, "ddkit"):
        assert torch.equal(forward(x), module(x))
        forward(x)
    assert caplog.text.count("torch.compile failed (OSError)") == 1
    assert compiled(module, wanted=False) is module


# teachers

TEACHER_SETS = {"train.epochs": 2, "teacher.width": 8}


def make_teacher(path: Path, folder: Path, **sets: Any) -> ddkit.nn.Teacher:
    return ddkit.train(path, dataset=f"imagefolder:{folder}", sets=TEACHER_SETS | sets)


def folder_info(folder: Path) -> ddkit.DataInfo:
    dataset = open_dataset(DataTable(use="imagefolder", options={"path": str(folder)}))
    return ddkit.DataInfo(class_names=tuple(dataset.class_names), channels=3, size=(12, 12))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_teacher_file_reads_back_with_identical_logits_and_record(tmp_path: Path, image_folder: Path, norm: str) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher = make_teacher(path, image_folder, **{"teacher.norm": norm, "seed": 4, "train.augmenter": "none"})
    read = load_teacher(TeacherTable(use=str(path)), folder_info(image_folder), CPU)
    x = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read.logits(x), teacher.logits(x))
    assert (read.mean, read.std) == (teacher.mean, teacher.std)
    record = read_tensors(path)[1]
    assert record.pop("schema") == 1
    assert record == json.loads(json.dumps(teacher.info))
    assert record["model"] == "convnet"
    assert record["options"] | {"width": 8, "norm": norm, "depth": 2} == record["options"]
    assert record["class_names"] == ["cat", "dog", "owl"]
    assert record["input_shape"] == [3, 12, 12]
    assert record["training"]["epochs"] == 2
    assert record["training"]["seed"] == 4
    assert not read.module.training
    assert not any(parameter.requires_grad for parameter in read.module.parameters())


def test_recorded_statistics_and_accuracy_are_those_of_the_data(tmp_path: Path, image_folder: Path) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", image_folder)
    dataset = open_dataset(DataTable(use="imagefolder", options={"path": str(image_folder)}))
    train = torch.stack(list(dataset.images("train", range(18)))).double() / 255
    np.testing.assert_allclose(teacher.mean, train.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(teacher.std, train.std((0, 2, 3), correction=0), rtol=1e-6)
    test = torch.stack(list(dataset.images("test", range(9))))
    logits = teacher.logits(Normalisation(teacher.mean, teacher.std).normalise(test))
    assert teacher.info["test_accuracy"] == float((logits.argmax(1) == dataset.labels("test")).double().mean())
    without = write_image_folder(tmp_path / "without", test=0)
    assert make_teacher(tmp_path / "w.safetensors", without).info["test_accuracy"] is None


def test_training_a_teacher_twice_gives_the_same_bytes(tmp_path: Path, image_folder: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_teacher(tmp_path / name, image_folder, seed=seed)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b") != sha256(tmp_path / "c")


@pytest.mark.parametrize("command", [("train", "--out", "new/t.safetensors"), ("distill", "--losses", "dkkt", "--out", "new/run")])
def test_a_teacher_whose_training_diverges_is_told_and_not_kept(own_cache: Path, cli: Cli, command: tuple[str, ...]) -> None:
    small = ("--set", "train.lr=1e12", "--set", "train.epochs=1", "--set", "teacher.width=4", "--set", "teacher.norm=none")
    result = cli(*command, *small)
    assert (result.code, result.out) == (1, "")
    assert "diverged" in result.err
    assert "--set train.lr=" in result.err
    assert not Path("new").exists()
    assert list(own_cache.glob("teachers/*")) == []


def automatic(folder: Path, caplog: pytest.LogCaptureFixture, **changed: Any) -> tuple[ddkit.nn.Teacher, bool]:
    """Returns an automatic teacher, and whether it was said to be trained now."""
    dataset = open_dataset(DataTable(use="imagefolder", options={"path": str(folder)}))
    table = TeacherTable(model=changed.pop("model", "convnet"), options={"width": changed.pop("width", 8)})
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ddkit"):
        teacher = automatic_teacher(dataset, (3, 12, 12), table, TrainTable(epochs=1, **changed), CPU, data=DataTable())
    said = "One is trained on all training images" in caplog.text
    assert said == bool(caplog.text)
    return teacher, said


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "own cache"))
    return tmp_path / "own cache"


def test_automatic_teacher_is_trained_once_and_says_so(own_cache: Path, image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, trained_now = automatic(image_folder, caplog)
    assert trained_now
    (file,) = (own_cache / "teachers").iterdir()
    before = file.stat().st_mtime_ns
    second, trained_again = automatic(image_folder, caplog)
    assert not trained_again
    assert same(first.module.state_dict(), second.module.state_dict())
    assert file.stat().st_mtime_ns == before
    assert second.sha256 == first.sha256 != ""


def test_an_exchanged_teacher_in_the_cache_is_not_used(own_cache: Path, image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = automatic(image_folder, caplog)
    (file,) = (own_cache / "teachers").iterdir()
    whole = file.read_bytes()
    other, _ = automatic(image_folder, caplog, lr=0.05)
    (second,) = set((own_cache / "teachers").iterdir()) - {file}
    assert not same(first.module.state_dict(), other.module.state_dict())
    file.write_bytes(second.read_bytes())  # whole, and of the same model
    again, trained = automatic(image_folder, caplog)
    assert trained
    assert f"{file} is not the file that ddkit has saved there" in caplog.text
    assert same(first.module.state_dict(), again.module.state_dict())
    assert file.read_bytes() == whole
    assert not automatic(image_folder, caplog)[1]  # negative control
    (own_cache / "private").chmod(0o777)  # then its marks may be anybody's
    assert automatic(image_folder, caplog)[1]


def test_a_teacher_that_cannot_be_kept_is_used_all_the_same(
    own_cache: Path, image_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = automatic(image_folder, caplog)
    monkeypatch.setenv("DDKIT_CACHE", str(own_cache.parent / "full"))

    def full(path: Path, *_: object) -> None:
        raise ddkit.RunFilesError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr("ddkit.nn.teacher.write_tensors", full)
    found, _ = automatic(image_folder, caplog)
    assert "could not be saved for later runs" in caplog.text
    assert "No space left on device" in caplog.text
    assert same(found.module.state_dict(), kept.module.state_dict())
    assert (found.sha256, found.info) == (kept.sha256, kept.info)
    assert list((own_cache.parent / "full/teachers").iterdir()) == []


def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Takes home and cache away; returns the folder for temporary files."""
    for name in ("DDKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "no/home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_without_a_home_everything_works_with_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = no_home(monkeypatch, tmp_path) / f"ddkit-{os.getuid()}"
    small = ("--set", "train.epochs=1", "--set", "teacher.width=4", *SMALL_FLAGS)
    done = cli("distill", "--losses", "dkkt", "--pipc", 1, "--out", "run", *small)
    assert done.code == 0, done.err
    assert caplog.text.count("You have no home folder") == 1
    assert f"{folder} is used instead" in caplog.text
    assert not (tmp_path / "no/home/.cache/ddkit").exists()  # matplotlib has a folder of its own
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, *folder.rglob("*")) if each.is_dir()} == {0o700}
    os.environ.pop("DDKIT_CACHE")  # the next command is a process of its own
    judged = cli("evaluate", "run", "--repeats", 1)
    assert judged.code == 0, judged.err
    os.environ.pop("DDKIT_CACHE", None)
    caplog.clear()
    assert cli("distill", "--losses", "dkkt", "--pipc", 1, "--out", "again", *small).code == 0
    assert "training one" not in caplog.text, "the folder is the same one"


def test_a_temporary_cache_whose_name_another_has_taken_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = no_home(monkeypatch, tmp_path) / f"ddkit-{os.getuid()}"
    taken.mkdir(mode=0o755)
    found = ddkit.data.cache_folder()
    assert found not in (taken, *taken.parents)
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


def test_a_home_that_can_be_written_is_used_and_a_cache_may_be_named_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_home(monkeypatch, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ddkit.data.cache_folder() == tmp_path / ".cache/ddkit"
    monkeypatch.setenv("DDKIT_CACHE", "~/mine")
    assert ddkit.data.cache_folder() == tmp_path / "mine"


def test_changed_option_recipe_model_or_pixel_trains_anew(own_cache: Path, image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from PIL import Image

    automatic(image_folder, caplog)
    changes: list[dict[str, Any]] = [{"width": 9}, {"lr": 0.05}, {"model": "mlp"}, {"augmenter": "none"}, {"options": {"compose": 2}}]
    assert all(automatic(image_folder, caplog, **change)[1] for change in changes)
    file = image_folder / "train/dog/003.png"
    pixels = np.array(Image.open(file))
    pixels[5, 5, 1] ^= 1
    Image.fromarray(pixels).save(file)
    assert automatic(image_folder, caplog)[1]
    assert not automatic(image_folder, caplog)[1]
    assert len(list((own_cache / "teachers").iterdir())) == 7


def test_renamed_classes_of_an_npz_train_anew(own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 4), dtype=np.uint8)
    found = []
    for names in (["a", "b", "c"], ["b", "a", "c"]):
        np.savez(tmp_path / "data.npz", x_train=x, y_train=np.arange(12) % 3, x_test=x, y_test=np.arange(12) % 3, class_names=names)
        dataset = open_dataset(DataTable(use=f"npz:{tmp_path / 'data.npz'}"))
        found.append(automatic_teacher(dataset, (1, 4, 4), TeacherTable(options={"width": 8}), TrainTable(epochs=1), CPU, data=DataTable()))
    assert [teacher.info["class_names"] for teacher in found] == [["a", "b", "c"], ["b", "a", "c"]]


def bare_state(path: Path, **options: Any) -> Path:
    info = ddkit.DataInfo(class_names=("cat", "dog", "owl"), channels=3, size=(12, 12))
    module = ddkit.nn.build_network(ddkit.create("model", "convnet", {"width": 8} | options, data=info), info, 0, "bare")
    save_file(module.state_dict(), path)
    return path


def test_bare_state_dict_with_batch_norm_works_with_model_and_statistics(cli: Cli, tmp_path: Path, image_folder: Path) -> None:
    path = bare_state(tmp_path / "bare.safetensors", norm="batch")
    flags = ["--losses", "dkkt", "--dataset", f"imagefolder:{image_folder}", "--teacher", path, "--model", "convnet", "--pipc", 2]
    statistics_ = ["--set", "teacher.mean=[0.5,0.4,0.3]", "--set", "teacher.std=[0.2,0.25,0.3]"]
    result = cli("distill", *flags, *SMALL_FLAGS, "--set", "teacher.norm=batch", *statistics_, "--out", "run")
    assert result.code == 0, result.err
    made = ddkit.load("run")
    assert (made.mean, made.std) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["teacher"]["sha256"] == sha256(path)
    without = cli("distill", *flags, *SMALL_FLAGS, "--set", "teacher.norm=batch", "--out", "none")
    assert without.code == 4
    assert "--set 'teacher.mean=" in " ".join(without.err.split())


def test_run_is_normalised_as_its_teacher_was(tmp_path: Path, image_folder: Path) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", image_folder)
    runs = {
        name: ddkit.load(
            ddkit.distill(losses="dm", dataset=f"imagefolder:{image_folder}", teacher=chosen, pipc=1, sets=SMALL, out=tmp_path / name).path
        )
        for name, chosen in (("with", str(tmp_path / "t.safetensors")), ("without", None))
    }
    assert runs["with"].mean == pytest.approx(teacher.mean)
    assert runs["with"].std == pytest.approx(teacher.std)
    assert runs["without"].mean != pytest.approx(teacher.mean)  # else that of the accessible images
    accessible = json.loads((tmp_path / "without/manifest.json").read_text())["real_files"]
    assert len(accessible) == 3
