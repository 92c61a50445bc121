"""Networks trained at the same time in processes of their own: same result, told when one fails, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ddkit_evaluators
import msgspec
import pytest
import torch
from ddkit_evaluators import Accuracy, workers
from ddkit_evaluators.trainer import Trainer

import ddkit
from tests.plugins.test_evaluators import INFO, artifact, data, images
from tests.plugins.test_evaluators import evaluated as rows_of


def evaluated(report: Callable[[int, int], object] = lambda done, total: None, **options: Any) -> ddkit.Evaluation:
    pixels, labels = images(4, 0)
    learnable = ddkit.Artifact(pixels.float() / 255, labels, artifact().metadata)
    return rows_of(learnable, data(report=report), **{"epochs": 40} | options)[0]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[ddkit.Child]:
    """Returns the processes that were started."""
    found: list[ddkit.Child] = []
    start = ddkit.Child
    monkeypatch.setattr(ddkit, "Child", lambda *given, **named: found.append(start(*given, **named)) or found[-1])
    return found


@pytest.mark.usefixtures("forked_children")
def test_processes_give_what_one_after_the_other_gives() -> None:
    seen: list[tuple[int, int]] = []
    apart, in_turn = evaluated(lambda done, total: seen.append((done, total)), workers=2), evaluated(workers=1)
    assert apart.details["workers"] == 2
    for key in ("accuracies", "random_real_accuracies"):
        assert apart.details[key] == in_turn.details[key]
    assert seen == [(number, 4) for number in (1, 2, 3, 4)]
    assert evaluated(workers=1, epochs=1).details["accuracies"] != in_turn.details["accuracies"], "the figures could differ"


@pytest.mark.usefixtures("forked_children")
def test_processes_take_tensors_that_share_memory() -> None:
    """A set that is tested on its own images, for example."""
    evaluator: Accuracy = ddkit.create("evaluator", "accuracy", {"epochs": 1, "repeats": 2, "model": "mlp", "workers": 2}, data=INFO)
    tests, labels = images(40, 1)
    shared = msgspec.structs.replace(data(), test_images=tests, test_labels=labels, real_images=tests, real_labels=labels)
    (row,) = evaluator(ddkit.Artifact(tests.float() / 255, labels, artifact().metadata), shared, None)
    assert row.details["workers"] == 2


def test_no_more_processes_than_networks() -> None:
    assert evaluated(workers=9, random_real=False, repeats=1).details["workers"] == 1


@pytest.mark.usefixtures("forked_children")
@pytest.mark.parametrize(("error", "phrase"), [(None, "SafetensorError"), (OSError(28, "Disk full"), "Disk full")])
def test_what_processes_cannot_do_is_told_and_their_networks_are_trained_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError | None, phrase: str
) -> None:
    write = workers._write

    def broken(trainer: Trainer, folder: Any, tasks: Any, *, threads: int) -> None:
        if error is not None:
            raise error
        write(trainer, folder, tasks, threads=threads)
        (folder / workers.TENSORS).write_bytes(b"nonsense")

    monkeypatch.setattr(workers, "_write", broken)
    found = evaluated(workers=2)
    assert "4 networks are trained in this process instead" in caplog.text
    assert phrase in caplog.text
    assert found.details["accuracies"] == evaluated(workers=1).details["accuracies"]


def test_several_processes_on_another_device_are_refused() -> None:
    evaluator = Accuracy(workers=2)
    model = ddkit.create("model", "mlp", {"width": 8}, data=INFO)
    with pytest.raises(ddkit.InputError, match="several processes on the CPU"):
        evaluator.plan(INFO, torch.device("cuda"), rows=4, tests=4, networks=4, model=model)


@pytest.mark.usefixtures("forked_children")
def test_an_interruption_leaves_no_process_behind(children: list[ddkit.Child]) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(interrupt, workers=2)
    assert len(children) == 2
    assert not any(child.running for child in children)


@pytest.mark.usefixtures("forked_children")
def test_the_networks_of_a_process_that_dies_are_trained_by_another_or_here(
    children: list[ddkit.Child], caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluated(lambda done, total: children[0]._process.kill() if done == 1 else None, workers=2)
    assert "A process that trained networks ended with exit code -9" in caplog.text
    assert found.details["accuracies"] == evaluated(workers=1).details["accuracies"]


def test_processes_are_used_for_many_networks_on_small_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = ddkit.create("model", "mlp", {"width": 8}, data=INFO)

    def decided(networks: int, compile_: str = "always", rows: int = 4) -> int:
        evaluator = Accuracy(compile=compile_)
        return evaluator.plan(INFO, torch.device("cpu"), rows=rows, tests=4, networks=networks, model=model).workers

    assert decided(ddkit_evaluators.FEW_NETWORKS) == 2
    assert decided(ddkit_evaluators.FEW_NETWORKS - 1) == 1
    assert decided(20, compile_="never") == 1
    assert decided(20, rows=400) == 1
