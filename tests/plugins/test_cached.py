"""Networks that are trained on real images are trained once: the same accuracies from the cache, and none for anything that differs."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import ddkit
from ddkit.cache import CachedResult
from ddkit.components.figures import evaluation_table
from ddkit.components.registry import add_plugin_file
from tests.conftest import SMALL, Result, forget_plugin_files, set_flags
from tests.plugins.test_evaluators import BASELINES, artifact, data, images, taught
from tests.plugins.test_evaluators import evaluated as evaluated_anew

CLI = Callable[..., Result]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of accuracies in a cache that is the test's own."""
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "private" / "accuracies"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows by an entry for each network that is trained."""
    found: list[int] = []
    fit = ddkit.nn.fit
    monkeypatch.setattr(ddkit.nn, "fit", lambda *given, **options: (found.append(1), fit(*given, **options)), raising=False)
    return found


def evaluated(made: ddkit.Artifact | None = None, *given: Any, **options: Any) -> list[ddkit.Evaluation]:
    return evaluated_anew(made, *given, **{"cache": True} | options)


def figures(rows: list[ddkit.Evaluation]) -> list[ddkit.Evaluation]:
    return [msgspec.structs.replace(row, details={key: row.details[key] for key in row.details if key != "cached"}) for row in rows]


def cached(rows: list[ddkit.Evaluation]) -> list[int]:
    return [row.details.get("cached", 0) for row in rows]


def test_accuracies_from_the_cache_are_those_of_training_bit_for_bit(trained: list[int]) -> None:
    first = evaluated(baselines=BASELINES, epochs=40)
    assert (cached(first), len(trained)) == ([0, 0, 0], 8)
    again = evaluated(baselines=BASELINES, epochs=40)
    assert (cached(again), len(trained)) == ([2, 2, 2], 10), "networks on the synthetic set alone are trained"
    assert figures(again) == first == evaluated(baselines=BASELINES, epochs=40, cache=False)
    assert len({*first[0].details["random_real_accuracies"], *first[1].details["accuracies"]}) > 1, "accuracies that could be mixed up"
    other_set = ddkit.Artifact(images(4, 7)[0].float() / 255, *artifact().as_dataset().tensors[1:], artifact().metadata)
    assert cached(evaluated(other_set, epochs=40)) == [2], "whatever the set is"
    assert "2 of 2" in evaluation_table(again)
    assert "cache" not in evaluation_table(first)


def test_more_repeats_use_the_networks_of_fewer() -> None:
    evaluated(repeats=2)
    more = evaluated(repeats=4)
    assert cached(more) == [2]
    assert figures(more) == evaluated(repeats=4, cache=False)


def test_all_baselines_in_the_cache_are_reported_as_done() -> None:
    only = {"synthetic": False, "baselines": BASELINES}
    evaluated(**only)
    seen: list[tuple[int, int]] = []
    assert cached(evaluated(None, data(report=lambda done, total: seen.append((done, total))), **only)) == [2, 2]
    assert seen == [(4, 4)]


def changed(name: str) -> ddkit.data.EvaluationData:
    """Returns the data with one value of a tensor changed by one."""
    given = data()
    tensor = getattr(given, name).clone()
    tensor.view(-1)[0] = 1 - tensor.view(-1)[0] if "labels" in name else tensor.view(-1)[0] + 1
    return msgspec.structs.replace(given, **{name: tensor})


OPTIONS = [
    {"protocol": "dc-official"}, {"protocol": "practical-sam"}, {"epochs": 4}, {"augment": "none"}, {"ema": 0.5}, {"model": "lenet"},
    {"model_options": {"width": 9}}, {"precision": "bfloat16"}, {"labels": "soft"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_another_training_is_not_taken_for_this_one(options: dict[str, Any]) -> None:
    given = {"model": "mlp", "protocol": "short"}
    teacher = taught() if "labels" in options else None
    sizes = {"model_options": {}} if options.get("model") == "lenet" else {}
    evaluated(**given)
    assert cached(evaluated(None, None, teacher, **given | sizes | options)) == [0]
    assert cached(evaluated(None, None, teacher, **given | sizes | options)) == [2], "the control: the same again"


def test_random_real_with_soft_labels_is_that_of_its_teacher_and_temperature() -> None:
    first, other, unnamed = taught(), taught(seed=1), taught()
    other.sha256, unnamed.sha256 = "def", ""
    evaluated(None, None, first, labels="soft")
    assert cached(evaluated(None, None, first, labels="soft")) == [2]
    assert cached(evaluated(None, None, first, labels="soft", temperature=2.0)) == [0]
    assert cached(evaluated(None, None, other, labels="soft")) == [0]
    assert [cached(evaluated(None, None, unnamed, labels="soft")) for _ in range(2)] == [[0], [0]], "weights that no sha256 names"


@pytest.mark.parametrize("name", ["real_images", "real_labels", "test_images", "test_labels"])
def test_other_images_or_labels_are_not_taken_for_these(name: str) -> None:
    whole = artifact((10, 10))  # random real are all accessible images
    evaluated(whole, baselines=BASELINES)
    assert cached(evaluated(whole, changed(name), baselines=BASELINES)) == [0, 0, 0]
    assert cached(evaluated(whole, baselines=BASELINES)) == [2, 2, 2]


def test_another_seed_or_other_units_are_not_taken_for_these() -> None:
    evaluated()
    assert cached(evaluated(None, data(seed=4))) == [0]
    units = ddkit.Artifact(artifact().images, artifact().labels, artifact().metadata | {"std": [0.26]})
    assert cached(evaluated(units)) == [0]
    assert cached(evaluated(artifact((3, 3)))) == [0], "more random real images"
    assert cached(evaluated(None, data(seed=3))) == [2]


def test_other_threads_are_not_taken_for_these() -> None:
    evaluated()
    torch.set_num_threads(2)
    try:
        assert cached(evaluated()) == [0]
    finally:
        torch.set_num_threads(1)
    assert cached(evaluated()) == [2]


def test_a_network_whose_code_has_changed_is_trained_anew(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    code = (
        "import torch\nimport ddkit\nclass Own(ddkit.Model):\n    '''A network.'''\n"
        "    def __call__(self, channels, size, classes):\n"
        "        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size[0] * size[1], classes))\n"
    )
    found = []
    for text in (code, code, f"{code}# another\n"):
        forget_plugin_files()
        file.write_text(text)
        add_plugin_file(file)
        found += cached(evaluated(model="own", model_options={}))
    assert found == [0, 2, 0]


def damaged(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "of another network":
        shutil.copy(next(each for each in file.parent.iterdir() if each != file), file)
    elif how == "edited":
        file.write_text(json.dumps(json.loads(content) | {"value": 0.5}))
    else:
        file.write_bytes({"cut off": content[:-20], "empty": b"", "no JSON object": b"[1, 2]"}[how])


@pytest.mark.parametrize("how", ["cut off", "empty", "edited", "no JSON object", "of another network"])
def test_a_damaged_entry_is_computed_anew_and_replaced(folder: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    first = evaluated()
    file = min(folder.iterdir())
    before = file.read_bytes()
    damaged(file, how)
    with caplog.at_level(logging.INFO, "ddkit"):
        again = evaluated()
    assert (cached(again), figures(again)) == ([1], first)
    assert caplog.text.count("A result in the cache is not used") == 1
    assert file.read_bytes() == before
    assert cached(evaluated()) == [2]


def test_a_cache_that_cannot_be_written_or_is_open_to_others_ends_no_evaluation(folder: Path, tmp_path: Path) -> None:
    first = evaluated()
    folder.parent.chmod(0o777)  # others could put something there
    assert evaluated() == first
    folder.parent.chmod(0o700)
    assert cached(evaluated()) == [2], "the control"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    assert [evaluated() for _ in range(2)] == [first, first]


def test_two_processes_that_write_and_read_one_result_see_it_whole(forks: Any, folder: Path) -> None:
    code = (
        "from ddkit.cache import CachedResult\n"
        "entry, value = CachedResult('accuracies', {'a': 1}), [0.25] * 5000\n"
        "for _ in range(40):\n    entry.write(value); assert entry.read() == value\n"
    )
    processes = [forks.Popen([sys.executable, "-c", code], stdout=forks.PIPE, stderr=forks.PIPE, text=True) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 2
    assert CachedResult("accuracies", {"a": 1}).read() == [0.25] * 5000
    assert CachedResult("accuracies", {"a": 2}).read() is None
    assert len(list(folder.iterdir())) == 1


@pytest.mark.usefixtures("forked_children")
def test_processes_keep_what_they_train_and_no_more_start_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    child = ddkit.Child
    monkeypatch.setattr(ddkit, "Child", lambda *given, **named: started.append(child(*given, **named)) or started[-1])
    alone = evaluated(workers=1, cache=False)
    first = evaluated(workers=2)
    again = evaluated(workers=2, repeats=1)
    assert (cached(first), cached(again), len(started)) == ([0], [1], 3)
    assert first[0].details["random_real_accuracies"] == alone[0].details["random_real_accuracies"]
    assert again[0].details["random_real_accuracies"] == alone[0].details["random_real_accuracies"][:1]


@pytest.mark.usefixtures("forked_children")
def test_a_network_that_is_not_compiled_against_the_decision_is_not_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fails(*given: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda module, **options: fails)
    (row,) = evaluated(compile="always")
    assert row.details["compiled"] is False
    assert not folder.exists() or not list(folder.iterdir())


def test_files_and_output_of_a_run_say_what_came_from_the_cache(cli: CLI) -> None:
    flags = ["--losses", "dm", "--pipc", 3, *set_flags(SMALL | {"evaluators.accuracy.cache": True}), "--json"]
    for name in ("first", "second"):
        done = cli("distill", *flags, "--out", name)
        assert done.code == 0, done.err
    rows = [json.loads(Path(name, "evaluation.json").read_text())["evaluations"] for name in ("first", "second")]
    assert [row["details"].get("cached") for (row,) in rows] == [None, 2]
    assert rows[1][0]["details"].pop("cached") == 2
    assert rows[0] == rows[1]
    told = "2 of 2 networks of the baseline come from the cache"
    assert [told in Path(name, "report.html").read_text() for name in ("first", "second")] == [False, True]
    judged = json.loads(cli("evaluate", "first", "--json").out)["evaluations"]
    assert judged[0]["details"]["cached"] == 2
