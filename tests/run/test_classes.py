"""A set is evaluated on data that have its classes among others, in another order, or under other names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit.components import registry
from ddkit.data.real import SomeClasses
from ddkit.run.classes import matched
from tests.conftest import SMALL, Result, set_flags, write_image_folder

Cli = Callable[..., Result]
NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("pets"))


@pytest.fixture
def dataset(pets: Path) -> ddkit.Dataset:
    found: ddkit.Dataset = registry.create("dataset", f"imagefolder:{pets}")
    return found


def a_set(names: list[str], **parameters: torch.Tensor) -> ddkit.Artifact:
    """Returns a set of two images of 12 x 12 pixels per class, each as bright as the class's place in `names`."""
    labels = torch.arange(len(names)).repeat_interleave(2)
    images = (labels[:, None, None, None] / len(names)).expand(-1, 3, 12, 12).clone()
    return ddkit.Artifact(images, labels, {"class_names": names, "mean": [0.5] * 3, "std": [0.2] * 3}, parameters)


def saved(names: list[str]) -> str:
    a_set(names).save(Path("set.safetensors"))
    return "set.safetensors"


def evaluate(cli: Cli, pets: Path, names: list[str], *flags: object) -> Result:
    small = set_flags({path: value for path, value in SMALL.items() if path.startswith("evaluators")})
    return cli("evaluate", saved(names), "--dataset", f"imagefolder:{pets}", "--pipc", 2, "--repeats", 1, *small, *flags)


def test_labels_follow_the_order_of_the_data(dataset: ddkit.Dataset) -> None:
    soft = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) + 5 * torch.eye(3).repeat_interleave(2, 0), 1)
    own = a_set(["owl", "cat", "dog"], soft_labels=soft, step_size=torch.tensor([0.1]))
    made, data = matched(own, dataset, {})
    assert data is dataset
    assert (made.class_names, made.labels.tolist()) == (NAMES, [2, 2, 0, 0, 1, 1])
    assert made.soft_labels is not None
    assert torch.equal(made.soft_labels, soft[:, [1, 2, 0]])
    assert torch.equal(made.images, own.images)
    assert float(made.parameters["step_size"]) == pytest.approx(0.1)
    same = a_set(NAMES)
    assert matched(same, dataset, {})[0] is same


def test_some_classes_of_data_are_a_data_set_of_their_own(dataset: ddkit.Dataset) -> None:
    made, data = matched(a_set(["owl", "cat"]), dataset, {})
    assert isinstance(data, SomeClasses)
    assert (list(data.class_names), made.labels.tolist()) == (["cat", "owl"], [1, 1, 0, 0])
    assert data.labels("train").bincount().tolist() == [6, 6]
    last = len(data.labels("train")) - 1
    assert torch.equal(data.images("train", [last])[0], dataset.images("train", [len(dataset.labels("train")) - 1])[0])
    assert all("dog" not in str(source) for source in data.sources("test", range(len(data.labels("test")))))
    assert data.fingerprint() != dataset.fingerprint()


def test_a_set_is_evaluated_on_its_own_classes_of_larger_data(cli: Cli, pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = evaluate(cli, pets, ["owl", "cat"], "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)["evaluations"][0]
    assert row["details"]["classes"] == ["cat", "owl"]
    assert "on the classes of the set (cat, owl)" in caplog.text
    assert "into the order of the data" in caplog.text


def test_the_pairs_of_names_that_are_suggested_work_as_printed(cli: Cli, pets: Path) -> None:
    refused = evaluate(cli, pets, ["0", "dogs", "a, b"])
    assert (refused.code, refused.out) == (4, "")
    flag = re.search(r"--match-classes (?:'[^']*'|\S+)", " ".join(refused.err.split()))
    assert flag, refused.err
    assert '"dogs"="dog"' in flag[0], "the nearest name"
    assert evaluate(cli, pets, ["0", "dogs", "a, b"], *shlex.split(flag[0])).code == 0
    assert evaluate(cli, pets, ["tabby", "dog"], "--match-classes", "cat=tabby").code == 0, "either side may be the set's"


@pytest.mark.parametrize(
    ("names", "pairs", "code", "said"),
    [
        (NAMES, "cat", 2, "cat=tabby"),
        (NAMES, "cat,dog", 2, "cat=tabby"),
        (NAMES, "cat=", 2, "cat=tabby"),
        (NAMES, "cat=dog,cat=owl", 2, "each class once"),
        (NAMES, "{cat=1}", 2, "cat=tabby"),
        (["x", "dog", "owl"], "x=catt", 4, "Did you mean 'cat'?"),
        (["x", "dog", "owl"], "x=dog", 4, "two classes of the set"),
        (["a", "b", "c", "d"], None, 4, "all of its classes"),
        (["cat"], None, 4, "a classifier needs two"),
    ],
)
def test_classes_that_do_not_match_are_an_error(cli: Cli, pets: Path, names: list[str], pairs: str | None, code: int, said: str) -> None:
    flags: tuple[Any, ...] = () if pairs is None else ("--match-classes", pairs)
    result = evaluate(cli, pets, names, *flags)
    assert (result.code, result.out) == (code, ""), result.err
    assert said in " ".join(result.err.split())
