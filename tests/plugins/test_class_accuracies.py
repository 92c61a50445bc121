"""What an evaluation says of classes: balanced accuracy and that of each class if the test split is uneven, and the confusion of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ddkit_evaluators import by_class
from ddkit_evaluators.trainer import MOST_CONFUSED, Result

import ddkit
from ddkit.components.figures import evaluation_table
from ddkit.run.report import charts
from ddkit.run.report.sections import Files, evaluation
from tests.plugins.test_evaluators import artifact, data, evaluated


def result(*pairs: tuple[int, int], classes: int = 3) -> Result:
    """Returns the result of a network for test images, given as (class, found class)."""
    labels, found = torch.tensor(pairs).T
    return Result.of(found, labels, classes)


UNEVEN = [(0, 0)] * 6 + [(1, 0)] * 2 + [(1, 1), (2, 0)]


@pytest.mark.parametrize("classes", [3, MOST_CONFUSED, MOST_CONFUSED + 1])
def test_results_count_classes_as_a_plain_loop_does(classes: int) -> None:
    made = result(*UNEVEN, classes=classes)
    assert made.accuracy == 0.7
    assert made.class_accuracies()[:3] == [1.0, pytest.approx(1 / 3), 0.0]
    assert made.balanced() == pytest.approx(4 / 9), "classes without test images do not count"
    counts = [[sum(pair == (row, column) for pair in UNEVEN) for column in range(classes)] for row in range(classes)]
    assert made.counts == (counts if classes <= MOST_CONFUSED else [[own[row], sum(own) - own[row]] for row, own in enumerate(counts)])


def test_an_uneven_split_is_told_class_by_class_and_an_even_one_is_not() -> None:
    names, majority = ["a", "b", "c"], result(*((label, 0) for label, _ in UNEVEN))
    found = by_class(names, [result(*UNEVEN), majority], [majority])
    assert found["confusion"] == [[12, 0, 0], [5, 1, 0], [2, 0, 0]]
    assert (found["balanced_mean"], found["random_real_balanced_mean"]) == (pytest.approx((4 / 9 + 1 / 3) / 2), pytest.approx(1 / 3))
    assert found["class_accuracies"]["b"] == {"test_images": 3, "accuracy": pytest.approx(1 / 6), "random_real": 0.0}
    even = by_class(names, [result((0, 0), (1, 1), (2, 0))], [])
    assert even == {"confusion": [[1, 0, 0], [0, 1, 0], [1, 0, 0]]}


def test_json_table_and_report_have_them(tmp_path: Path) -> None:
    given = data()
    kept = torch.cat([(given.test_labels == label).nonzero().flatten()[: 1 if label else 3] for label in range(2)])
    uneven: Any = type(given)(**{key: getattr(given, key) for key in given.__struct_fields__} | {
        "test_images": given.test_images[kept], "test_labels": given.test_labels[kept],
    })  # fmt: skip
    rows = evaluated(artifact(), uneven, epochs=1)
    (row,) = rows
    assert sum(map(sum, row.details["confusion"])) == row.repeats * 4
    assert [each["test_images"] for each in row.details["class_accuracies"].values()] == [3, 1]
    assert "balanced accuracy" in evaluation_table(rows)
    (even,) = evaluated(artifact(), given, epochs=1)
    assert "class_accuracies" not in even.details
    assert "balanced" not in evaluation_table([even])
    plain = {key: getattr(row, key) for key in row.__struct_fields__}
    (group,) = evaluation(Files(artifact=artifact(), facts={}, evaluations=[plain]))["groups"]
    assert [line[0] for line in group["classes"]] == artifact().class_names
    picture = group["charts"][-1]
    assert picture.file.startswith("confusion-")
    assert str(charts.svg(picture)).count("<path") >= 4
    assert list(charts.files(picture)) == [f"{picture.file}.pdf", f"{picture.file}.png"]
    (tmp_path / "confusion.png").write_bytes(charts.files(picture)[f"{picture.file}.png"])
    damaged = plain | {"details": row.details | {"confusion": [[1]]}}
    (group,) = evaluation(Files(artifact=artifact(), facts={}, evaluations=[damaged]))["groups"]
    assert [chart.file for chart in group["charts"]] == ["accuracy-hard", "classes-hard"]
    assert isinstance(row, ddkit.Evaluation)
