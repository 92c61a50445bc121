"""Sets joined into one, and classes of a set apart: no image is lost or changed, and what cannot stand in one set is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit.data.whitening import Whitening
from ddkit.errors import FlagError, InputError
from ddkit.run.artifact import Artifact
from ddkit.run.blend import blended
from ddkit.run.join import joined, of_classes
from tests.conftest import Result

CLI = Callable[..., Result]


def _set(
    names: str, labels: tuple[int, ...], *, size: int = 4, mean: float = 0.5, more: dict[str, Any] | None = None, **tensors: Any
) -> Artifact:
    images = torch.rand(len(labels), 1, size, size, generator=torch.Generator().manual_seed(len(names) + len(labels)))
    metadata = {"class_names": list(names), "mean": [mean], "std": [0.2], "pipc": len(names), "seed": len(names), **(more or {})}
    return Artifact(images, torch.tensor(labels), metadata, {"multipliers": torch.ones(len(labels)), **tensors})


def _joined(*sets: Artifact) -> Artifact:
    return joined([(Path(f"set-{number}"), each) for number, each in enumerate(sets)])


def _images(found: Artifact, name: str) -> list[torch.Tensor]:
    return list(found.images[found.labels == found.class_names.index(name)])


def test_a_joined_set_has_every_image_under_its_class() -> None:
    first, second = _set("abc", (0, 1, 1, 2)), _set("xb", (0, 1, 0))
    found = _joined(first, second)
    assert found.class_names == ["a", "b", "c", "x"]
    assert found.labels.tolist() == [0, 1, 1, 1, 2, 3, 3]
    for name in found.class_names:
        wanted = [image for part in (first, second) if name in part.class_names for image in _images(part, name)]
        assert torch.equal(torch.stack(_images(found, name)), torch.stack(wanted))
    assert (found.seeds, found.metadata["pipc"], found.metadata["recipe"], found.parameters) == ([2, 3], 3, "join", {})
    assert found.stored_numbers == 7 * 16 / 4


def test_statistics_of_sets_that_differ_are_those_of_all_classes_together(caplog: pytest.LogCaptureFixture) -> None:
    pixels = torch.cat([torch.full((3, 10), 0.4), torch.full((1, 10), 0.8)])  # three classes and one, each of std 0
    found = _joined(*(_set(names, (0,) * len(names), mean=mean, more={"std": [1e-6]}) for names, mean in (("abc", 0.4), ("x", 0.8))))
    assert (found.mean[0], found.std[0]) == pytest.approx((float(pixels.mean()), float(pixels.std(correction=0))), rel=1e-4)
    assert "different means and stds" in caplog.text
    caplog.clear()
    assert _joined(_set("a", (0,)), _set("x", (0, 0))).mean == [0.5]
    assert caplog.text == ""


def test_labels_that_are_probabilities_keep_their_classes_joined_and_apart() -> None:
    soft = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.0, 1.0, 0.0]])
    first = _set("abc", (0, 2, 1), soft_labels=soft, more={"labels": "learned"})
    found = _joined(first, _set("xb", (1, 0)))
    assert found.class_names == ["a", "b", "c", "x"]
    wanted = [[0.7, 0.2, 0.1, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.3, 0.6, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert torch.equal(found.targets, torch.tensor(wanted))
    apart = of_classes(first, ["c", "a"])
    assert apart.class_names == ["a", "c"]
    assert torch.allclose(apart.targets, torch.tensor([[0.7 / 0.8, 0.1 / 0.8], [0.1 / 0.7, 0.6 / 0.7]]))
    nothing_left = _set("abc", (0, 1), soft_labels=torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]))
    assert of_classes(nothing_left, ["a", "b"]).targets.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_sets_of_grids_stay_sets_of_grids_with_a_label_for_each_image() -> None:
    makes = {"parametrization": {"use": "grid", "factor": 2}}
    soft = torch.eye(2).repeat_interleave(4, 0)
    first, second = _set("ab", (0, 1), more=makes, soft_labels=soft), _set("xb", (1, 0), more=makes)
    found = _joined(first, second)
    assert (len(found.stored), len(found.images)) == (4, 16)
    assert torch.equal(found.images, torch.cat([first.images, second.images]))
    assert found.labels.tolist() == [0] * 4 + [1] * 8 + [2] * 4
    assert torch.equal(of_classes(found, ["x"]).images, second.images[4:])


def test_the_classes_of_a_set_apart_and_joined_again_are_the_set() -> None:
    whole = _set("abc", (0, 0, 1, 2), step_size=torch.tensor(0.1))
    again = _joined(of_classes(whole, ["a", "b"]), of_classes(whole, ["c"]))
    assert torch.equal(again.images, whole.images)
    assert torch.equal(again.labels, whole.labels)
    assert (again.class_names, again.mean, again.std) == (whole.class_names, whole.mean, whole.std)
    assert float(again.parameters["step_size"]) == pytest.approx(0.1)


def test_step_sizes_that_differ_are_left_out_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = _joined(_set("a", (0,), step_size=torch.tensor(0.1)), _set("b", (0, 0), step_size=torch.tensor(0.2)))
    assert found.parameters == {}
    assert "step sizes" in caplog.text


def test_names_that_look_alike_are_two_classes_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert _joined(_set("ab", (0, 1)), _set("A", (0,))).class_names == ["a", "b", "A"]
    assert "'a' and 'A'" in caplog.text


WHITE = Whitening(torch.zeros(1, 4, 4), torch.eye(16)[:2], torch.ones(3)).tensors


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (_set("x", (0,), size=5), "another image shape ((1, 5, 5) (C, H, W), not (1, 4, 4)"),
        (_set("x", (0,), **WHITE), "another whitening"),
        (
            _set("x", (0,), more={"parametrization": {"use": "grid", "factor": 2}}),
            "another parametrization (grid {'factor': 2}, not pixels)",
        ),
    ],
)
def test_what_cannot_stand_in_one_set_is_refused_with_the_two_names(second: Artifact, said: str) -> None:
    with pytest.raises(InputError) as error:
        _joined(_set("ab", (0, 1)), _set("ac", (0, 1)), second)
    assert said in str(error.value)
    assert "set-2 cannot be joined to set-0" in str(error.value)


def test_rows_of_an_older_layout_are_neither_joined_nor_averaged_with_those_of_today() -> None:
    made = {"class_names": ["a"], "mean": [0.5], "std": [0.2], "image_shape": [1, 4, 4], "parametrization": {"use": "fourier", "images": 4}}
    today, older = (Artifact(torch.ones(4, *shape), torch.zeros(4, dtype=torch.int64), made) for shape in ((4,), (1, 4)))
    assert len(_joined(today, today).images) == 8
    with pytest.raises(InputError, match=r"other stored rows \(1 x 4, not 4\)"):
        _joined(today, older)
    with pytest.raises(InputError, match="different parametrizations"):
        blended(today, older, 0.5)


def test_sets_of_one_whitening_keep_it() -> None:
    found = _joined(_set("a", (0,), **WHITE), _set("b", (0, 0), **WHITE))
    assert found.whitening is not None
    assert all(torch.equal(value, WHITE[name]) for name, value in found.whitening.tensors.items())


@pytest.mark.parametrize(
    ("classes", "said"),
    [([], "one class"), (["a", "a"], "twice"), (["d"], "Choose from: a, b"), (["A"], "no class 'A'"), ("ab", "one class")],
)
def test_classes_that_are_not_there_are_refused(classes: list[str], said: str) -> None:
    with pytest.raises(FlagError) as error:
        of_classes(_set("ab", (0, 1)), classes)
    assert said in str(error.value)


def test_the_commands_write_runs_that_tell_of_their_parts_and_can_be_evaluated(cli: CLI) -> None:
    _set("45", (0, 0, 1), size=8).save(Path("one.safetensors"))
    _set("57", (0, 1), size=8).save(Path("two.safetensors"))
    done = cli("join", "one.safetensors", "two.safetensors", "--out", "both", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["classes"] == {"4": 2, "5": 2, "7": 1}
    parts = json.loads(Path("both/manifest.json").read_text())["join"]["parts"]
    assert [(part["class_names"], part["images"], part["pipc"], part["seeds"]) for part in parts] == [
        (["4", "5"], 3, 2, [2]),
        (["5", "7"], 2, 2, [2]),
    ]
    assert "Synthetic sets that were joined" in Path("both/report.html").read_text()
    small = ("--dataset", "digits", "--model", "mlp", "--set", "evaluators.accuracy.epochs=1", "--set", "evaluators.accuracy.repeats=1")
    rows = json.loads(cli("evaluate", "both", *small, "--json").out)["evaluations"]
    assert (rows[0]["details"]["classes"], rows[0]["stored_numbers"]) == (["4", "5", "7"], pytest.approx(5 * 64 / 3))
    assert cli("export", "both", "--to", "card", "--out", "card").code == 0
    card = Path("card/README.md").read_text()
    assert "3 images of 2 classes" in card
    assert "optimised" in card
    done = cli("split", "both", "--classes", "7,5", "--out", "apart")
    assert done.code == 0, done.err
    apart = ddkit.load("apart")
    assert (apart.class_names, apart.labels.tolist()) == (["5", "7"], [0, 0, 1])
    assert cli("split", "both", "--classes", "7", "--out", "only").code == 0
    refused = cli("evaluate", "only", "--dataset", "digits")
    assert (refused.code, refused.out) == (4, "")
    assert "only the class '7'" in " ".join(refused.err.split())
