"""A Dataset object passed to ddkit.distill: what it may hold, what is opened, and what a run remembers of it."""

from __future__ import annotations

import logging
import random
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms

import ddkit
from ddkit.data.passed import passing
from ddkit.data.real import open_dataset
from ddkit.recipes.tables import DataTable
from tests.conftest import SMALL, Result


class Pictures:
    """A map-style dataset of 2 classes: PIL images of 10 x 8 whose grey tells the row; it remembers what was opened."""

    classes = ("кот", "dog two")

    def __init__(self, count: int = 24, transform: Any = None, shade: int = 0) -> None:
        self.targets, self.transform, self.shade, self.opened = [row % 2 for row in range(count)], transform, shade, list[int]()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        self.opened.append(row)
        image = Image.fromarray(np.full((10, 8), 4 * row + self.shade + self.targets[row], np.uint8))
        return image if self.transform is None else self.transform(image), self.targets[row]


class Listed:
    """Items from a list; nothing else is told."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


def opened(dataset: Any, **options: Any) -> ddkit.Dataset:
    with passing(dataset):
        return open_dataset(DataTable(use="python", options=options))


def pixels(image: Any) -> Tensor:
    """Returns the only image of a dataset of one item for each of two classes."""
    return opened((Listed((image, 0), (image, 1)), Listed((image, 0)))).images("train", [1])[0]


# What it tells


def test_labels_and_names_are_had_without_opening_an_item() -> None:
    train, test = Pictures(), Pictures(6)
    data = opened((train, test))
    assert (list(data.class_names), data.labels("train").tolist(), len(data.labels("test"))) == (["кот", "dog two"], train.targets, 6)
    assert train.opened == test.opened == []
    assert [int(image[0, 0, 0]) for image in data.images("train", [7, 2])] == [29, 8]
    assert train.opened == [7, 2]
    assert data.sources("train", [7, 2]) == [7, 2]


def test_without_a_test_dataset_a_share_of_each_class_is_held_out() -> None:
    data = opened(Pictures(), holdout=0.25)
    assert [torch.bincount(data.labels(split)).tolist() for split in ("train", "test")] == [[9, 9], [3, 3]]
    shown = [int(i[0, 0, 0]) // 4 for s in ("train", "test") for i in data.images(s, range(len(data.labels(s))))]
    assert sorted(shown) == list(range(24))
    assert data.sources("test", [0]) == [shown[18]], "rows of the dataset that was passed"


def test_subsets_concatenations_and_tensors_tell_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Pictures()
    joined = ConcatDataset([Subset(base, [3, 4, 5]), Subset(Subset(base, range(10, 20)), [0, 1])])  # type: ignore[arg-type]
    data = opened((joined, joined))
    assert (data.labels("train").tolist(), list(data.class_names), base.opened) == ([1, 0, 1, 0, 1], list(base.classes), [])
    assert [int(image[0, 0, 0]) for image in data.images("train", range(5))] == [13, 16, 21, 40, 45]
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 5, 6)
    tensors = TensorDataset(images, torch.tensor([0, 1, 0, 1]))
    assert opened((tensors, tensors)).labels("train").tolist() == [0, 1, 0, 1]


def test_a_changed_label_is_followed_and_a_wrong_one_is_an_error() -> None:
    changed: Any = Pictures()
    changed.target_transform = lambda label: 1 - label
    data = opened((changed, changed))
    assert data.labels("train")[:2].tolist() == [1, 0]
    with pytest.raises(
        ddkit.InputError, match=r"Item 3 of the dataset that was passed, .*Pictures, has the label 1, but \.targets or \.labels have 0\."
    ):
        data.images("train", [3])


def test_a_dataset_that_tells_nothing_is_opened_once_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    grey = np.zeros((4, 4), np.uint8)
    given = Listed((grey, torch.tensor(1)), (grey, np.int64(0)), (grey, 2), (grey, 2))
    with caplog.at_level(logging.WARNING, "ddkit"):
        data = opened((given, given))
        open_again = opened((given, given))
    assert data.labels("train").tolist() == [1, 0, 2, 2]
    assert list(open_again.class_names) == ["0", "1", "2"]
    assert "has no attribute .targets or .labels, so all of its 4 items are opened once to read their labels." in caplog.text


def test_names_of_several_words_and_twice_the_same() -> None:
    given: Any = Listed(*((np.zeros((4, 4), np.uint8), label) for label in range(4)))
    given.classes = [("tench", "Tinca tinca"), "crane", ("crane",)]
    assert list(opened((given, given)).class_names) == ["tench, Tinca tinca", "crane (1)", "crane (2)", "3"]


# Images

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5)
RGB = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
RGBA = np.concatenate([RGB, np.full((4, 5, 1), 9, np.uint8)], 2)
TURNED = Image.fromarray(GREY)
TURNED.getexif()[0x0112] = 6


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), GREY[None]),
        (TURNED, np.rot90(GREY, -1)[None]),
        (Image.fromarray(RGB), RGB.transpose(2, 0, 1)),
        (Image.fromarray(RGBA), RGB.transpose(2, 0, 1)),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY[None]),
        (GREY, GREY[None]),
        (RGB, RGB.transpose(2, 0, 1)),
        (RGBA, RGB.transpose(2, 0, 1)),
        (GREY.astype(np.uint16) * 257, GREY[None]),
        (GREY > 7, (GREY > 7)[None] * np.uint8(255)),
        (torch.from_numpy(GREY), GREY[None]),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB.transpose(2, 0, 1)),
        (transforms.ToTensor()(Image.fromarray(RGB)), RGB.transpose(2, 0, 1)),
    ],
)
def test_images_of_every_kind_become_bytes(image: Any, expected: Any) -> None:
    found = pixels(image)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), expected)


def test_other_floats_stay_floats() -> None:
    assert torch.equal(pixels(torch.full((3, 4, 4), 0.3)), torch.full((3, 4, 4), 0.3))
    assert pixels(np.full((4, 4), 0.3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 4, 4), -1.5), r"its pixels go from -1\.5 to -1\.5, not from 0 to 1\. Remove Normalize"),
        (torch.full((3, 4, 4), torch.nan), "not from 0 to 1"),
        (torch.zeros((3, 4, 4), dtype=torch.int64), "its pixels are int64, not uint8"),
        (torch.zeros(3), "it has the shape"),
        (torch.zeros((5, 4, 4)), "it has the shape"),
        ("a.png", "it is a str, not a PIL image"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "32-bit numbers of unknown range"),
    ],
)
def test_what_is_no_image_is_an_error_that_names_the_item(image: Any, message: str) -> None:
    with pytest.raises(ddkit.InputError, match=rf"Item 1 of the dataset .*Listed, is not a usable image: .*{message}"):
        pixels(image)


def test_what_a_transform_draws_is_the_same_in_every_run_and_moves_no_generator() -> None:
    jitter = transforms.Compose([transforms.ToTensor(), lambda x: x * 0 + torch.rand(()) / 3 + random.random() / 3 + np.random.rand() / 3])
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]
    one, two = (opened((Pictures(transform=jitter), Pictures())).images("train", order) for order in ([3, 4], [4, 3]))
    assert torch.equal(one[0], two[1])
    assert not torch.equal(one[0], one[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]) == before[1:]


# What cannot be passed


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


class Broken(Listed):
    def __getitem__(self, row: int) -> Any:
        raise KeyError("lost")


FINE = (GREY, 0)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Stream(), ddkit.FlagError, "dataset: an object of the type Stream cannot be used. Pass a name"),
        (3, ddkit.FlagError, "dataset: an object of the type int cannot be used"),
        ((Pictures(), Pictures(), Pictures()), ddkit.FlagError, "must be .training, test., but this one has 3 items"),
        ((None, Pictures()), ddkit.FlagError, "the training dataset is None"),
        (Listed(), ddkit.InputError, "Listed, is empty"),
        (Listed((GREY, None)), ddkit.InputError, "Item 0 .* has the label 'None', but must be an integer from 0, a one-hot row or a text"),
        (Listed((GREY, [0, 1, 1])), ddkit.InputError, r"Item 0 .* has the label '\[0, 1, 1\]'"),
        (
            Listed({"image": GREY, "note": 3}),
            ddkit.InputError,
            "Item 0 .* is a dict of image, note, and none of these names is known for the label",
        ),
        (Listed({"image": GREY, "label": 0}, {"image": GREY}), ddkit.InputError, "Item 1 .* has no 'label'"),
        ({"validation": Pictures()}, ddkit.FlagError, "a dict of splits must have the key 'train'"),
        (Listed(3), ddkit.InputError, "Item 0 .* is a int, but must be"),
        (Listed(FINE, (GREY, "cat")), ddkit.InputError, "Item 1 .* has the label 'cat'. Labels must be integers from 0, or all"),
        (Listed(FINE, (GREY, -1)), ddkit.InputError, "has the label -1, but labels count from 0"),
        (Broken(FINE), ddkit.InputError, "Item 0 .* cannot be read: KeyError: 'lost'"),
        (Listed(FINE, (GREY, 2)), ddkit.InputError, "class '1' of the dataset 'python' has no training image"),
    ],
)
def test_what_cannot_be_passed_is_told_in_one_paragraph(dataset: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        ddkit.distill(losses="dm", dataset=dataset, pipc=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Items of other libraries


class ClassLabel:
    """Stands for the feature type of that name of Hugging Face's library."""

    names = ("cat", "dog")


class Columns(list[dict[str, Any]]):
    """Stands for a Dataset of Hugging Face's library."""

    def __init__(self, items: Any, **features: Any) -> None:
        super().__init__(items)
        self.features = features


@pytest.mark.parametrize("label", ["label", "fine_label"])
def test_items_that_are_dicts_tell_image_label_and_class_names(label: str) -> None:
    items = [{"coarse": 9, "img": Image.fromarray(GREY), label: row % 2} for row in range(4)]
    for given, names in ((items, ["0", "1"]), (Columns(items, **{label: ClassLabel()}), ["cat", "dog"])):
        data = opened({"train": given, "validation": given[:2]})
        assert (data.labels("train").tolist(), data.labels("test").tolist(), list(data.class_names)) == ([0, 1, 0, 1], [0, 1], names)
        np.testing.assert_array_equal(data.images("train", [1])[0].numpy(), GREY[None])


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["b", "a10", "a2", "b"], [2, 1, 0, 2], ["a2", "a10", "b"]),
        ([[0, 1], [1, 0], [1, 0], [0, 1]], [1, 0, 0, 1], ["0", "1"]),
        ([1.0, 0.0, np.float32(1), torch.tensor([1.0])], [1, 0, 1, 1], ["0", "1"]),
    ],
)
def test_labels_may_be_texts_one_hot_rows_and_whole_floats(labels: list[Any], expected: list[int], names: list[str]) -> None:
    given = Listed(*((GREY, label) for label in labels))
    data = opened((given, given))
    assert (data.labels("test").tolist(), list(data.class_names)) == (expected, names)
    assert len(data.images("train", range(4))) == 4


def test_floats_to_255_are_known_by_all_images_and_said(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.stack([torch.full((3, 4, 4), value) for value in (1.0, 0.0, 250.0, 100.5)])
    given = TensorDataset(images, torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
    found = opened((given, given)).images("train", range(4))
    assert [float(image[0, 0, 0]) for image in found] == pytest.approx([1, 0, 250, 100.5 / 255])  # bytes, but for the last
    assert "are floats up to 250, so they are read as 0 (black) to 255 (white)" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_datasets_of_hugging_face_and_of_torchvision_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    # Its fingerprints pickle whole modules, which fails with some releases of pyarrow.
    monkeypatch.setattr("datasets.fingerprint.Hasher.hash", staticmethod(lambda value: "0"))
    from torchvision.datasets import FakeData, ImageFolder

    pictures = [Image.fromarray(RGB + row) for row in range(6)]
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["cat", "dog"]), "note": datasets.Value("string")}
    )
    columns = {"img": pictures, "fine": [0, 1] * 3, "note": list("abcdef")}
    train = datasets.Dataset.from_dict(columns, features=features)
    for given in (datasets.DatasetDict({"train": train, "test": train}), (train.with_format("torch"), train.with_format("numpy"))):
        data = opened(given)
        assert (list(data.class_names), data.labels("train").tolist()) == (["cat", "dog"], [0, 1] * 3)
        for split in ("train", "test"):
            np.testing.assert_array_equal(data.images(split, [4])[0].numpy(), (RGB + 4).transpose(2, 0, 1))
    text = train.cast_column("fine", datasets.Value("int64")).rename_column("note", "label")
    assert list(opened((text, text)).class_names) == list("abcdef")
    for name, picture in zip("aabb", pictures, strict=False):
        (tmp_path / name).mkdir(exist_ok=True)
        picture.save(tmp_path / name / f"{len(list((tmp_path / name).iterdir()))}.png")
    folder = ImageFolder(str(tmp_path))
    assert list(opened((folder, folder)).class_names) == ["a", "b"]
    fake = FakeData(8, (3, 8, 8), 2, transforms.ToTensor())
    assert opened((fake, fake)).images("train", [0])[0].dtype == torch.uint8


# A run


def test_a_run_goes_on_and_is_evaluated_when_the_dataset_is_passed_again(
    tmp_path: Path, cli: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    both, path = (Pictures(), Pictures(6)), tmp_path / "run"
    short = {key: value for key, value in SMALL.items() if key.startswith("evaluators")}
    ddkit.distill(losses="dm,dkkt", dataset=both, pipc=4, sets=SMALL, evaluators="none", out=path)
    data = tomllib.loads((path / "recipe.toml").read_text(encoding="utf-8"))["data"]
    assert (data["use"], data["of"]) == ("python", f"{__name__}.Pictures of 24 and {__name__}.Pictures of 6")
    assert ddkit.load(path).class_names == ["кот", "dog two"]
    ddkit.evaluate(path, dataset=(Pictures(), Pictures(6)), sets=short)
    assert (path / "evaluation.json").is_file(), "the run's own data"
    kept = (path / "evaluation.json").read_bytes()
    assert ddkit.evaluate(path, dataset=(Pictures(), Pictures(8)), sets=short), "other data: told, not recorded"
    assert (path / "evaluation.json").read_bytes() == kept
    assert ddkit.resume(path, dataset=(Pictures(), Pictures(6)), steps=3).steps == 3
    with pytest.raises(ddkit.RunFilesError, match=r"the accessible data has changed since the run .* began"):
        ddkit.resume(path, dataset=(Pictures(shade=1), Pictures(6)), steps=4)
    with pytest.raises(ddkit.FlagError, match="can only continue with its own dataset"):
        ddkit.resume(path, dataset="digits", steps=4)
    for command in (
        ["evaluate", path],
        ["distill", "--resume", "--steps", 9, "--out", path],
        ["distill", "--recipe", path / "recipe.toml"],
    ):
        result = cli(*command)
        assert (result.code, result.out) == (4, "")
        assert f"(it was {data['of']}), and a command or file cannot contain it. Pass it again" in " ".join(result.err.split())


def test_a_teacher_is_trained_on_a_dataset_object_and_a_streamed_one_gives_the_same_set(tmp_path: Path) -> None:
    both = (Pictures(transform=transforms.Resize((256, 256))), Pictures(4, transform=transforms.Resize((256, 256))))
    sets = {"train.epochs": 1, "teacher.model": "mlp"}
    teacher = ddkit.train(tmp_path / "t.safetensors", dataset=both, sets=sets)
    assert teacher.info["class_names"] == list(Pictures.classes)
    found = [
        ddkit.distill(losses="total-variation", dataset=both, pipc="all", evaluators="none", steps=1, init="herding",
                      sets={"data.memory": memory, "initializer.features": "pixels"}, out=tmp_path / str(memory))
        for memory in (1, 9)
    ]  # fmt: skip
    one, two = (ddkit.load(run.path) for run in found)
    assert torch.equal(one.images, two.images)
    assert one.mean == two.mean
