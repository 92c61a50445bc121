"""Real data: what is in the splits, what is opened, what is said of data that cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddkit_datasets.arrays import holdout
from PIL import Image
from torch import Tensor

import ddkit
from ddkit.components.base import Dataset
from ddkit.data.images import Kinds, Normalisation, channel_statistics, conform
from ddkit.data.real import RealData, class_indices, open_dataset
from ddkit.nn.teacher import read_teacher
from ddkit.recipes.tables import DataTable
from ddkit.run.directory import RunDirectory
from tests.conftest import SMALL, SMALL_FLAGS, Result, png_of


def opened(use: str, **options: Any) -> Dataset:
    return open_dataset(DataTable(use=use, options=options))


def write_image(path: Path, pixels: Any, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(path)
    return path


def grey(value: int, size: tuple[int, int] = (6, 6)) -> Any:
    return np.full(size, value, dtype=np.uint8)


def rgb(value: int, size: tuple[int, int] = (6, 6)) -> Any:
    return np.full((*size, 3), (value, value // 2, 7), dtype=np.uint8)


# digits


def test_digits_are_all_of_the_source_in_a_stratified_split() -> None:
    from sklearn.datasets import load_digits

    digits = opened("digits")
    labels = {split: digits.labels(split) for split in ("train", "test")}
    images = torch.cat([torch.stack(list(digits.images(split, range(len(each))))) for split, each in labels.items()])
    assert (images.shape, images.dtype) == ((1797, 1, 8, 8), torch.float32)
    assert sorted((images * 16).round().int().flatten(1).tolist()) == sorted(load_digits().data.astype(int).tolist())
    shares = torch.bincount(labels["test"]) / torch.bincount(torch.cat(list(labels.values())))
    assert 0.19 < float(shares.min()) <= float(shares.max()) < 0.21
    assert list(digits.class_names) == [str(digit) for digit in range(10)]
    assert digits.mirror is False


# npz


def write_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


Y = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 5, 4), (1, 5, 4)),
        ((6, 5, 4, 3), (3, 5, 4)),
        ((6, 5, 4, 1), (1, 5, 4)),
        ((6, 3, 5, 4), (3, 5, 4)),
        ((6, 1, 5, 4), (1, 5, 4)),
    ],
)
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64, np.float16])
def test_npz_takes_the_common_layouts(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...], kind: type) -> None:
    x = np.random.default_rng(0).random(shape)
    x = (x * 255).astype(np.uint8) if kind is np.uint8 else x.astype(kind)
    data = opened(write_npz(tmp_path / "a.npz", x_train=x, y_train=Y, x_test=x[:3], y_test=Y[:3]))
    images = data.images("train", [0, 5])
    assert [tuple(image.shape) for image in images] == [expected, expected]
    assert images[0].dtype == (torch.uint8 if kind is np.uint8 else torch.float32)
    channel_first = x[5][None] if len(shape) == 3 else (x[5] if shape[1] in (1, 3) else x[5].transpose(2, 0, 1))
    np.testing.assert_array_equal(images[1].numpy(), channel_first.astype(images[1].numpy().dtype))
    assert data.labels("test").tolist() == [0, 1, 2]
    whole = data.images("train", range(6))
    assert isinstance(whole, Tensor)
    assert whole.stride() == torch.empty(whole.shape).stride(), "which convolution computes must not depend on the layout"


@pytest.mark.parametrize("names", [["α", "b c", "d"], ["α".encode(), b"b c", b"d"]], ids=["text", "bytes"])
def test_npz_without_test_arrays_holds_out_a_share_of_each_class(tmp_path: Path, names: list[str] | list[bytes]) -> None:
    x = np.arange(60, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    use = write_npz(tmp_path / "a.npz", x_train=x, y_train=np.arange(60) % 3, class_names=np.array(names))
    data = opened(use, holdout=0.25)
    assert list(data.class_names) == ["α", "b c", "d"]
    for part, split in zip(holdout(torch.arange(60) % 3, 0.25, 0), ("train", "test"), strict=True):
        assert [int(image[0, 0, 0]) for image in data.images(split, range(len(part)))] == part.tolist()
        assert data.labels(split).tolist() == (part % 3).tolist()


X = np.zeros((6, 4, 4), np.uint8)


RGB = np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3), dtype=np.uint8)
BOTH = {"x_test": RGB, "y_test": Y}
WILD: dict[str, dict[str, Any]] = {
    "train_images": {"train_images": RGB, "train_labels": Y[:, None], "test_images": RGB, "test_labels": Y[:, None], "val_images": RGB[:1]},
    "validation alone": {"images_train": RGB, "labels_train": Y, "images_val": RGB, "labels_val": Y},
    "X and y of splits": {"X": np.concatenate([RGB, RGB]), "y": np.tile(Y, 2), "split": np.array(["train", "test"]).repeat(6)},
    "Xtrain": {"Xtrain": RGB, "Ytrain": Y, "Xtest": RGB, "Ytest": Y},
    "(n, 1)": {"x_train": RGB, "y_train": Y[:, None], **BOTH},
    "one-hot": {"x_train": RGB, "y_train": np.eye(3)[Y], **BOTH},
    "whole floats": {"x_train": RGB, "y_train": Y.astype(float), **BOTH},
    "RGBA": {"x_train": np.concatenate([RGB, RGB[..., :1]], -1), "y_train": Y, **BOTH},
    "integers": {"x_train": RGB.astype(np.int64), "y_train": Y, **BOTH},
    "16 bits": {"x_train": RGB.astype(np.uint16) * 257, "y_train": Y, **BOTH},
}


@pytest.mark.parametrize("form", WILD)
def test_npz_takes_arrays_as_they_are_in_the_wild(tmp_path: Path, form: str) -> None:
    data = opened(write_npz(tmp_path / "a.npz", **WILD[form]))
    for split in ("train", "test"):
        np.testing.assert_array_equal(np.asarray(data.images(split, range(6))), RGB.transpose(0, 3, 1, 2))
        assert data.labels(split).tolist() == Y.tolist()
    assert list(data.class_names) == ["0", "1", "2"]


def test_npz_says_what_it_took_and_texts_become_class_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = np.array(["owl", "b10", "b9"])[Y]
    write_npz(tmp_path / "a.npz", x_train=RGB.astype(np.float32), y_train=names, x_val=RGB.astype(np.float64), y_val=names[:6])
    data = opened(f"npz:{tmp_path}/a.npz")
    assert (list(data.class_names), data.labels("train").tolist()) == (["b9", "b10", "owl"], [2, 1, 0, 2, 1, 0])
    np.testing.assert_allclose(np.asarray(data.images("test", range(6))), RGB.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    said = "a.npz: training images x_train, test images x_val, y_train class names as labels, floats up to 255 are divided by 255."
    assert said in caplog.text


@pytest.mark.parametrize(("shape", "flat"), [((5, 4, 3), RGB), ((3, 5, 4), RGB.transpose(0, 3, 1, 2))])
def test_rows_of_numbers_and_npy_files_become_images(tmp_path: Path, shape: tuple[int, ...], flat: Any) -> None:
    np.save(tmp_path / "images.npy", flat.reshape(6, -1))
    np.save(tmp_path / "classes.npy", Y)
    data = opened(f"npz:{tmp_path}/images.npy", labels=str(tmp_path / "classes.npy"), shape=list(shape))
    kept, _ = holdout(torch.from_numpy(Y), 0.2, 0)
    np.testing.assert_array_equal(np.asarray(data.images("train", range(len(kept)))), RGB.transpose(0, 3, 1, 2)[kept])
    np.save(tmp_path / "y.npy", Y)
    (tmp_path / "classes.npy").unlink()
    assert opened(f"npz:{tmp_path}", shape=list(shape)).labels("train").tolist() == Y[kept].tolist()
    with pytest.raises(ddkit.InputError, match=r"rows of numbers\. Add the shape of an image"):
        opened(f"npz:{tmp_path}")


def test_npz_fingerprint_tells_a_changed_pixel(tmp_path: Path) -> None:
    first = opened(write_npz(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X, y_test=Y)).fingerprint()
    changed = X.copy()
    changed[2, 3, 1] = 1
    assert opened(write_npz(tmp_path / "b.npz", x_train=X, y_train=Y, x_test=X, y_test=Y)).fingerprint() == first
    assert opened(write_npz(tmp_path / "c.npz", x_train=changed, y_train=Y, x_test=X, y_test=Y)).fingerprint() != first


# image folders


HALF_WHITE = np.concatenate([np.full((3, 6, 3), 255, np.uint8), np.zeros((3, 6, 3), np.uint8)])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_every_common_image_mode_is_decoded(tmp_path: Path, mode: str) -> None:
    write_image(tmp_path / "a/1.png", HALF_WHITE, mode)
    data = opened(f"imagefolder:{tmp_path}")
    (image,) = data.images("train", [0])
    assert data.shapes("train", [0]) == [tuple(image.shape)] == [((1 if mode in ("L", "1", "LA") else 3), 6, 6)]
    assert opened(f"imagefolder:{tmp_path}", size=[3, 4]).shapes("train", [0]) == [(image.shape[0], 3, 4)]
    assert image.dtype == torch.uint8
    assert (image[:, :3] == 255).all()
    assert (image[:, 3:] == 0).all()


@pytest.mark.parametrize(("channels", "expected"), [(2, [40, 40, 40]), (3, [40, 90, 200]), (4, [40, 90, 200])])
def test_sixteen_bit_files_with_colour_or_alpha_are_scaled(tmp_path: Path, channels: int, expected: list[int]) -> None:
    values = [40 * 257, 9 * 257] if channels == 2 else [40 * 257, 90 * 257, 200 * 257, 9 * 257][:channels]
    rows = np.full((5, 4, channels), values, ">u2")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(png_of(4, 5, 16, {2: 4, 3: 2, 4: 6}[channels], b"".join(b"\0" + row.tobytes() for row in rows)))
    data = opened(f"imagefolder:{tmp_path}")
    (image,) = data.images("train", [0])
    assert image[:, 0, 0].tolist() == expected  # Pillow gives grey with alpha as colours
    assert data.shapes("train", [0]) == [tuple(image.shape)]


def test_folders_inside_of_class_folders_are_said_and_become_classes_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test"):
        for name in ("animal/cat", "animal/dog", "thing/car", "thing/tram"):
            write_image(tmp_path / split / name / "1.png", HALF_WHITE)
    data = opened(f"imagefolder:{tmp_path}")
    assert (list(data.class_names), data.labels("train").tolist()) == (["animal", "thing"], [0, 0, 1, 1])
    assert "'cat', 'dog', 'car', 'tram' are parts of the classes (to make them classes: --set data.nested=true)" in caplog.text
    caplog.clear()
    data = opened(f"imagefolder:{tmp_path}", nested=True)
    assert list(data.class_names) == ["animal/cat", "animal/dog", "thing/car", "thing/tram"]
    assert data.labels("train").tolist() == data.labels("test").tolist() == [0, 1, 2, 3]
    assert caplog.text == ""
    write_image(tmp_path / "train/animal/1.png", HALF_WHITE)
    with pytest.raises(ddkit.InputError, match="animal and 'animal/cat' inside it both contain images"):
        opened(f"imagefolder:{tmp_path}", nested=True)
    assert len(opened(f"imagefolder:{tmp_path}").labels("train")) == 5
    assert "data.nested" not in caplog.text


def test_evaluate_of_a_run_whose_images_were_moved_says_how_to_name_them(cli: Callable[..., Result]) -> None:
    for split, name in ((split, name) for split in ("train", "test") for name in "ab"):
        write_image(Path("old") / split / name / "1.png", HALF_WHITE)
    run = ("distill", "--losses", "dm", "--dataset", "imagefolder:old", "--pipc", 1, *SMALL_FLAGS, "--evaluate", "none", "--out", "run")
    assert cli(*run).code == 0
    Path("old").rename("new")
    result = cli("evaluate", "run")
    assert (result.code, result.out) == (4, "")
    assert "If it was moved: ddkit evaluate run --dataset imagefolder:PATH" in " ".join(result.err.split())


@pytest.mark.parametrize("most", [4095, 65535])
def test_a_sixteen_bit_pgm_file_is_scaled_by_the_range_that_it_tells(tmp_path: Path, most: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.pgm").write_bytes(b"P5\n2 1\n%d\n" % most + np.array([most, most // 5], ">u2").tobytes())
    data = opened(f"imagefolder:{tmp_path}", bits=12)
    assert data.images("train", [0])[0].tolist() == [[[255, 51]]]
    assert data.shapes("train", [0]) == [(1, 1, 2)]


def test_cmyk_becomes_rgb_and_a_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(rgb(200, (16, 16))).convert("CMYK").save(tmp_path / "a/1.jpg", quality=95)
    Image.fromarray(rgb(200)).quantize(4).save(tmp_path / "a/2.png", transparency=bytes([255, 0, 255, 0]))
    (tmp_path / "a/3.png").symlink_to(tmp_path / "a/2.png")  # held out
    data = opened(f"imagefolder:{tmp_path}", holdout=0.01)
    found = {str(source)[2]: image for source, image in zip(data.sources("train", [0, 1]), data.images("train", [0, 1]), strict=True)}
    for name, image in found.items():
        assert (image[:, 3, 3].int() - torch.tensor([200, 100, 7])).abs().max() < (12 if name == "1" else 1)
    assert data.shapes("train", [0, 1]) == [tuple(image.shape) for image in found.values()]


def test_images_of_several_kinds_become_the_most_common_size_and_colour_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, size in enumerate([(12, 4), (6, 8), (6, 8), (6, 8)]):
        write_image(tmp_path / f"train/a/{number}.png", rgb(90, size))
    write_image(tmp_path / "train/b/1.png", grey(10, (6, 8)))
    real = RealData(opened(f"imagefolder:{tmp_path}"), "all", 0)
    assert real.images.shape == (5, 3, 6, 8)
    assert real.images[[0, 4], :, 3, 4].tolist() == [[90, 45, 7], [10, 10, 10]]
    assert "1 of 5 images were resized to 6 x 8 pixels" in caplog.text
    caplog.clear()
    RealData(opened(f"imagefolder:{tmp_path}", size=[12, 4]), "all", 0)
    assert "4 of 5 images were resized to 12 x 4 pixels" in caplog.text


def test_common_shape_is_the_most_frequent_and_of_equals_the_larger() -> None:
    def of(*shapes: tuple[int, int, int]) -> tuple[int, int, int]:
        kinds = Kinds()
        kinds.add([torch.zeros(shape) for shape in shapes])
        return kinds.shape

    assert of((1, 4, 6), (1, 8, 8), (1, 4, 6)) == (1, 4, 6)
    assert of((3, 4, 6), (1, 8, 8)) == (3, 8, 8)


def test_size_is_part_of_the_fingerprint(image_folder: Path) -> None:
    assert opened(f"imagefolder:{image_folder}", size=[5, 9]).fingerprint() != opened(f"imagefolder:{image_folder}").fingerprint()


def _poison(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an image was opened")


# what is where in a folder


def make(root: Path, *files: str) -> Path:
    """Writes small images, or other files by their ending, under `root`."""
    for number, name in enumerate(files):
        if name.endswith(".png"):
            write_image(root / name, rgb(40 + number))
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x" * 40)
    return root


def split_of(data: Dataset, split: str) -> list[str]:
    return [str(source) for source in data.sources(split, range(len(data.labels(split))))]


CLASSES = ("train/a/1.png", "train/b/1.png")


SYSTEMS = ("__MACOSX/a/._1.png", "@eaDir/1.png", ".ipynb_checkpoints/1.png", "$RECYCLE.BIN/1.png", "System Volume Information/x")


@pytest.mark.parametrize(
    ("files", "train", "test", "said"),
    [
        ((*CLASSES, "test/a/2.png"), CLASSES, ["test/a/2.png"], ""),
        *(
            ((*CLASSES, f"{name}/a/2.png"), CLASSES, [f"{name}/a/2.png"], f"the test split is '{name}'")
            for name in ("val", "valid", "Validation", "testing", "TEST")
        ),
        (
            (*CLASSES, "val/a/2.png", "test/a/3.png", "extra/x.png", "notes/readme.txt"), CLASSES, ["test/a/3.png"],
            "the test split is 'test'; not used: 'val', 'extra'",
        ),
        (("Training/a/1.png", "Training/b/1.png"), ("Training/a/1.png", "Training/b/1.png"), [], ""),
        (("a/1.png", "b/1.png", "val/b/2.png"), ("a/1.png", "b/1.png"), ["val/b/2.png"], "the test split is 'val'"),
        (("bus/1.png", "car/1.png", "train/1.png"), ("bus/1.png", "car/1.png", "train/1.png"), [], ""),
        (("a/1.png", "b/1.png", "test/9.png"), ("a/1.png", "b/1.png"), [], "not used, without class folders: 'test'"),
        (
            (*CLASSES, "test/images/1.png", "val/images/2.png"), CLASSES, [], "not used, without class folders: 'test', 'val'",
        ),
        (
            ("set/train/a/1.png", "set/train/b/1.png", "set/Val/a/2.png"), ("set/train/a/1.png", "set/train/b/1.png"), ["set/Val/a/2.png"],
            "the images are in 'set'; the test split is 'Val'",
        ),
        (
            ("val/a/1.png", "val/b/1.png"), ("val/a/1.png", "val/b/1.png"), [],
            "there is no training split, so 'val' is used for training, except a part that is held out for testing",
        ),
        (("a/1.png", "b/1.png", "a/desktop.ini", *SYSTEMS, *(f"a/{name}" for name in SYSTEMS)), ("a/1.png", "b/1.png"), [], ""),
    ],
)  # fmt: skip
def test_splits_are_found_by_common_names_and_what_is_not_obvious_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: Sequence[str], train: Sequence[str], test: Sequence[str], said: str
) -> None:
    data = opened(f"imagefolder:{make(tmp_path, *files)}")
    assert (split_of(data, "train"), split_of(data, "test")) == (list(train), list(test))
    assert caplog.messages == ([f"{tmp_path}: {said}."] if said else [])
    assert all(record.news for record in caplog.records)  # type: ignore[attr-defined]  # no warnings of the result


@pytest.mark.parametrize(
    ("files", "message", "advised"),
    [
        (
            ("bus/1.png", "car/1.png", "train/x/1.png", "train/y/1.png"),
            "also 'bus', 'car' with images. If 'train' is the training split",
            "train",
        ),
        (("bus/1.png", "train/1.png", "test/1.png"), "can be classes or splits", None),
        (("train/a/1.png", "train/b/1.png", "training/a/1.png"), "two training splits", "train"),
        (("val/a/1.png", "val/b/1.png", "test/a/1.png", "test/b/1.png"), "no training split", "test"),
        (
            ("train/data-0.arrow", "train/state.json", "test/data-0.arrow"),
            r"--dataset huggingface:/.*pip install 'ddkit\[datasets\]'",
            None,
        ),
        (("data/train-0.parquet", "README.md"), "--dataset huggingface:/", None),
        (("train-0000.tar", "train-0001.tar"), r"tar files.*--dataset webdataset:/.*pip install 'ddkit\[webdataset\]'", None),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path: Path, files: Sequence[str], message: str, advised: str | None) -> None:
    make(tmp_path, *files)
    with pytest.raises(ddkit.InputError, match=message) as caught:
        opened(f"imagefolder:{tmp_path}")
    if advised:
        assert f"--dataset imagefolder:{tmp_path / advised}" in str(caught.value)
        assert len(opened(f"imagefolder:{tmp_path / advised}").class_names) == 2  # the advice works as printed


def test_a_table_gives_labels_in_the_place_of_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """metadata.csv of all images, metadata.jsonl of each split, Tiny-ImageNet's annotations, and a table of any name with its columns."""
    one, two, tiny = tmp_path / "one", tmp_path / "two", tmp_path / "tiny-imagenet-200"
    make(one, *(f"img/{row}.png" for row in range(6)))
    lines = [f"img/{row}.png;{2 + 8 * (row % 2)}.0;{'train' if row < 4 else 'Val'}" for row in range(5)]
    (one / "metadata.csv").write_text("\n".join(["file_name;label;split", *lines]))
    data = opened(f"imagefolder:{one}")
    assert (list(data.class_names), split_of(data, "train")) == (["2", "10"], ["img/0.png", "img/2.png", "img/1.png", "img/3.png"])
    assert split_of(data, "test") == ["img/4.png"]
    said = "labels come from a table; the test split is 'Val'; 1 image not in the table is ignored"
    assert caplog.messages == [f"{one}: {said}."]
    for split in ("train", "test"):
        make(two / split, "0.png", "1.png")
        (two / split / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 1}\n{"file_name": "1.png", "label": 0}\n')
    data = opened(f"imagefolder:{two}")
    assert [split_of(data, split) for split in ("train", "test")] == [[f"{split}/1.png", f"{split}/0.png"] for split in ("train", "test")]
    make(tiny, "train/n2/images/0.png", "train/n1/images/0.png", "val/images/v0.png", "val/images/v1.png", "test/images/x.png")
    (tiny / "val/val_annotations.txt").write_text("v0.png\tn2\t0\t0\t9\t9\nv1.png\tn1\t0\t0\t9\t9\n")
    data = opened(f"imagefolder:{tiny}")
    assert (list(data.class_names), split_of(data, "test")) == (["n1", "n2"], ["val/images/v1.png", "val/images/v0.png"])
    (one / "mine.csv").write_text("id,kind\nimg/0.png,b\nimg/1.png,a\n")
    data = opened(f"imagefolder:{one / 'mine.csv'}", columns=["id", "kind"])
    assert (list(data.class_names), split_of(data, "train")) == (["a", "b"], ["img/1.png", "img/0.png"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_name,label\na.png,1\na.png,2\n", "line 3: 'a.png' is listed twice"),
        ("file_name,label\na.png,1\nb.png,2\n", "line 3: there is no file"),
        ("file_name,label\n../a.png,1\n", "line 2: '../a.png' is not inside"),
        ("file_name,label\na.png,\n", "line 2: label is empty"),
        ("file_name,label,split\na.png,1,extra\n", "line 2: the split is 'extra', but must be one of train"),
        ("file_name,label,split\na.png,1,test\n", "only has images of the split 'test'"),
        ("id,label\na.png,1\n", "Its columns are id, label. Name the columns of file and label: --set 'data.columns="),
        ("file_name,label\n", "lists no image"),
        ("file_name,label\na.png,\xff\n", "cannot be read"),
        ('{"file_name": "a.png", "label": ["x", "y"]}', r"line 1: label has several values \(\['x', 'y'\]\)"),
        ('{"file_name": "a.png", "label": "x"}\n{"file_name":', "line 2 is not JSON"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, table: str, message: str) -> None:
    name = "metadata.jsonl" if table.startswith("{") else "metadata.csv"
    (make(tmp_path, "a.png") / name).write_bytes(table.encode("latin-1"))
    with pytest.raises(ddkit.InputError, match=message):
        opened(f"imagefolder:{tmp_path}")


def test_numbers_in_class_names_sort_as_numbers_and_recorded_runs_keep_their_order(tmp_path: Path) -> None:
    make(tmp_path / "images", *(f"{name}/{row}.png" for name in (*range(12), "x 2", "x 10") for row in range(2)))
    use = f"imagefolder:{tmp_path / 'images'}"
    natural = [*map(str, range(12)), "x 2", "x 10"]
    assert list(opened(use).class_names) == natural
    assert list(opened(use, class_order="alphabetical").class_names) == sorted(natural)
    longest = [f"x{number}" for number in ("0" * 5000, "7", "1" + "0" * 4999, "1" + "0" * 5000)]
    assert sorted(reversed(longest), key=ddkit.data.natural) == longest
    run = ddkit.distill(losses="dm", dataset=use, pipc=1, steps=0, sets=SMALL, evaluators="none", out=tmp_path / "run")
    assert ddkit.load(run.path).class_names == natural
    for recorded, expected in ((run.path, "natural"), (tmp_path / "old", "alphabetical")):
        recorded.mkdir(exist_ok=True)
        lines = (run.path / "recipe.toml").read_text().splitlines(keepends=True)
        if expected == "alphabetical":  # as a run of 0.2 wrote it
            (recorded / "recipe.toml").write_text("".join(line for line in lines if not line.startswith("class_order")))
        assert RunDirectory(recorded).read_recipe()["data"]["class_order"] == expected


def test_folders_inside_of_a_class_belong_to_it_in_the_order_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    make(tmp_path, "a/9.png", "a/deep/er/2.png", "a/deep/1.png", "a/deep-not/3.png", "a/Up/4.png", "b/inner/1.png")
    (tmp_path / "b/round").symlink_to(tmp_path / "b")
    data = opened(f"imagefolder:{tmp_path}", holdout=0.01)
    found = sorted(split_of(data, "train") + split_of(data, "test"))
    assert found == sorted(
        Path(path).relative_to(tmp_path).as_posix() for path, _ in ImageFolder(str(tmp_path)).samples if "round" not in path
    )
    make(tmp_path, "a/.hidden/1.png", "a/@eaDir/1.png")
    theirs = [path for path, label in ImageFolder(str(tmp_path)).samples if label == 0 and "/." not in path and "@" not in path]
    from ddkit_datasets.class_folders import walk

    assert walk(tmp_path / "a").names == [Path(path).relative_to(tmp_path / "a").as_posix() for path in theirs]


def test_images_of_other_formats_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "train/a/1.jpg", rgb(50)).rename(tmp_path / "train/a/1.JFIF")
    make(tmp_path, *CLASSES, "train/a/x.HEIC", "train/a/deep/y.heic", "train/b/z.npy", "test/a/z", "train/a/notes.txt")
    data = opened(f"imagefolder:{tmp_path}")
    assert split_of(data, "train") == ["train/a/1.JFIF", *CLASSES]
    assert data.images("train", [0])[0].shape == (3, 6, 6)
    (message,) = caplog.messages
    assert "ddkit cannot read some files and ignores them: 2 .heic, 1 .npy, 1 without a suffix." in message
    make(tmp_path, "train/c/only.heic")
    with pytest.raises(ddkit.InputError, match=r"train/c contains no image \(1 \.heic which ddkit cannot read"):
        opened(f"imagefolder:{tmp_path}")


def test_a_pipe_that_is_called_an_image_is_refused_when_it_is_read(tmp_path: Path) -> None:
    make(tmp_path, *CLASSES)
    os.mkfifo(tmp_path / "train/a/0.png")
    data = opened(f"imagefolder:{tmp_path}")
    assert data.images("train", [1])[0].shape == (3, 6, 6)
    with pytest.raises(ddkit.InputError, match=r"train/a/0\.png"):
        data.images("train", [0])


def test_runs_inside_of_the_folder_are_no_class(cli: Callable[..., Result], tmp_path: Path) -> None:
    make(Path.cwd(), *(f"{name}/{number}.png" for name in "ab" for number in range(4)))
    for number in (1, 2):  # the second finds the first's pictures
        done = cli("distill", "--dataset", "imagefolder:.", "--losses", "dm", "--pipc", 2, *SMALL_FLAGS, "--evaluate", "none")
        assert done.code == 0, done.err
        assert ddkit.load(Path(f"runs/dm-imagefolder-{number}")).class_names == ["a", "b"]
    (Path.cwd() / "runs/dm-imagefolder-1").rename("own")
    assert list(opened(f"imagefolder:{Path.cwd()}").class_names) == ["a", "b"]
    make(Path.cwd(), "runs/1.png")  # negative control: a folder of this name that holds images is a class
    assert list(opened(f"imagefolder:{Path.cwd()}").class_names) == ["a", "b", "runs"]


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_photographs_are_turned_as_exif_says(tmp_path: Path, tag: int, ending: str) -> None:
    from PIL import ImageOps

    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = tag
    (tmp_path / "a").mkdir()
    image.save(tmp_path / f"a/1.{ending}", exif=exif, quality=95)
    data = opened(f"imagefolder:{tmp_path}")
    (found,) = data.images("train", [0])
    assert data.shapes("train", [0]) == [tuple(found.shape)]
    with Image.open(tmp_path / f"a/1.{ending}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored)).transpose(2, 0, 1)
        np.testing.assert_array_equal(found.numpy(), expected)
    assert tuple(found.shape) == ((3, 24, 16) if tag > 4 else (3, 16, 24))


def test_twelve_bits_in_sixteen_are_told_and_scaled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, values in (("a", (0, 4095)), ("b", (1000, 2000))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.array([values] * 2, np.uint16)).save(tmp_path / f"{name}/1.png")
    use = f"imagefolder:{tmp_path}"
    assert RealData(opened(use), "all", 0).images.max() == 16
    assert "almost black: their largest value is 16 of 255" in caplog.text
    assert "--set data.bits=12" in caplog.text
    caplog.clear()
    assert RealData(opened(use, bits=12), "all", 0).images[:, 0, 0].tolist() == [[0, 255], [62, 125]]
    assert caplog.messages == []
    with pytest.raises(ddkit.InputError, match=r"a/1\.png cannot be used: its value 4095 needs 12 bits.*data\.bits=12"):
        RealData(opened(use, bits=11), "all", 0)
    Image.fromarray(np.array([(0, 65535)] * 2, np.uint16)).save(tmp_path / "b/1.png")
    RealData(opened(use), "all", 0)
    assert caplog.messages == []


def test_channels_do_not_depend_on_which_images_are_accessible(tmp_path: Path) -> None:
    for name in "ab":
        for number in range(4):
            write_image(tmp_path / f"{name}/{number}.png", grey(10 * number))
    use = f"imagefolder:{tmp_path}"
    assert {RealData(opened(use), 1, seed).info.channels for seed in range(6)} == {1}
    write_image(tmp_path / "b/2.png", rgb(90))
    assert {RealData(opened(use), 1, seed).info.channels for seed in range(6)} == {3}
    assert {RealData(opened(use, channels=1), 1, seed).info.channels for seed in range(6)} == {1}
    assert opened(use, channels=1).shapes("train", [0]) == [(1, 6, 6)]
    (tmp_path / "b/2.png").write_bytes(b"garbage")  # whose header cannot be read tells nothing
    assert opened(use).grey()
    assert RealData(opened(use, channels=3), 1, 0, None).info.channels == 3


def test_colour_folders_are_not_looked_through_for_grey(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddkit_datasets.folder.any_coloured", _poison)
    assert RealData(opened(f"imagefolder:{image_folder}"), 1, 0).info.channels == 3


def test_an_image_that_may_not_be_read_is_told_as_that(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("ddkit.data.open_regular", denied)
    with pytest.raises(ddkit.InputError, match=r"The image .*000\.png cannot be opened: Permission denied.*chmod") as caught:
        opened(f"imagefolder:{image_folder}").images("train", [0])
    assert "decoded" not in str(caught.value)
    monkeypatch.setattr("ddkit.data.arrays.open_regular", denied)
    with pytest.raises(ddkit.InputError, match=r"The data file .*x\.npz cannot be opened: Permission denied"):
        opened("npz:x.npz")
    monkeypatch.setattr("ddkit.nn.teacher.open_regular", denied)
    with pytest.raises(ddkit.InputError, match=r"The teacher .*000\.png cannot be opened: Permission denied"):
        read_teacher(image_folder / "train/cat/000.png")


# where data are


def test_a_leading_tilde_is_the_home_folder(
    cli: Callable[..., Result], image_folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.toml").write_text('losses.dm = {}\ndata.path = "~/images"\ndata.use = "imagefolder"\n')
    flags = ("distill", "--plan", "--json", "--pipc", 2, "--recipe", "~/r.toml", "--teacher", "~/teacher.safetensors")
    for more in ((), ("--dataset", "imagefolder:~/images"), ("--dataset", "imagefolder", "--set", "data.path=~/images")):
        result = cli(*flags, *more)
        assert result.code == 0, result.err
        recipe = json.loads(result.out)["recipe"]
        assert (recipe["data"]["path"], recipe["teacher"]["use"]) == (str(image_folder), str(teacher))
    np.savez(tmp_path / "x.npz", x_train=np.zeros((8, 8, 8), np.uint8), y_train=np.arange(8) % 2)
    assert cli("distill", "--losses", "dm", "--plan", "--pipc", 2, "--dataset", "npz:~/x.npz").code == 0
    assert cli("new", "loss", "mine", "--out=~/package").code == 0
    assert (tmp_path / "package").is_dir()
    assert f"The image folder {Path.cwd()}/~images" in " ".join(
        cli("distill", "--losses", "dm", "--dataset", "imagefolder:~images").err.split()
    )


# practical access


@pytest.fixture
def teacher(tmp_path: Path, image_folder: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    ddkit.train(path, dataset=f"imagefolder:{image_folder}", sets={"train.epochs": 1, "teacher.width": 8})
    return path


def accessible(folder: Path, out: str) -> set[Path]:
    return {folder / name for name in json.loads(Path(out, "manifest.json").read_text())["real_files"]}


def test_garbage_in_every_inaccessible_file_changes_nothing(cli: Callable[..., Result], image_folder: Path, teacher: Path) -> None:
    flags = ["--losses", "dm,dkkt", "--dataset", f"imagefolder:{image_folder}", "--teacher", teacher, "--pipc", 2, *SMALL_FLAGS]
    assert cli("distill", *flags, "--out", "before").code == 0
    others = set((image_folder / "train").rglob("*.png")) - accessible(image_folder, "before")
    assert len(others) == 12
    for file in others:
        file.write_bytes(b"garbage")
    after = cli("distill", *flags, "--out", "after")
    assert after.code == 0, after.err
    for name in ("synthetic.safetensors", "evaluation.json"):
        assert Path("before", name).read_bytes() == Path("after", name).read_bytes()
    # negative control: an accessible file is opened, and its garbage is an error of the data
    spoilt = sorted(accessible(image_folder, "before"))[0]
    spoilt.write_bytes(b"garbage")
    failed = cli("distill", *flags, "--out", "failed")
    assert failed.code == 4
    assert str(spoilt) in failed.err
    assert not Path("failed").exists()


def test_distilling_opens_no_training_file_but_the_accessible_ones(
    tmp_path: Path, image_folder: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_files: set[Path] = set()
    original = Image.open

    def recording(file: Any, *arguments: Any, **options: Any) -> Any:
        opened_files.add(Path(file.name))
        return original(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", recording)
    run = ddkit.distill(
        losses="dm", dataset=f"imagefolder:{image_folder}", teacher=str(teacher), pipc=2, seed=3, sets=SMALL, evaluators="none",
        out=tmp_path / "run",
    )  # fmt: skip
    assert opened_files == accessible(image_folder, str(run.path))
    data = opened(f"imagefolder:{image_folder}")
    chosen = data.sources("train", class_indices(data.labels("train"), 3, 3, slice(2)))
    assert opened_files == {image_folder / str(name) for name in chosen}


# torchvision's data sets, without a network


class FakeMnist:
    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        assert Path(root).is_dir()
        assert download
        self.data = torch.arange(20 * 28 * 28).view(20, 28, 28).to(torch.uint8)
        self.targets = torch.arange(20) % 10


class FakeCifar(FakeMnist):
    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)  # type: ignore[assignment]
        self.targets = [row % 10 for row in range(20)]  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "source", "fake", "shape", "first"),
    [
        ("mnist", "MNIST", FakeMnist, (1, 28, 28), "0"),
        ("fashion-mnist", "FashionMNIST", FakeMnist, (1, 28, 28), "t-shirt"),
        ("cifar10", "CIFAR10", FakeCifar, (3, 32, 32), "airplane"),
    ],
)
def test_torchvision_data_has_the_right_shape_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, fake: Any, shape: tuple[int, ...], first: str
) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{source}", fake)
    data = open_dataset(DataTable(use=name, dir=str(tmp_path / "down load")))
    assert len(data.class_names) == 10
    assert data.class_names[0] == first
    for split in ("train", "test"):
        assert data.labels(split).dtype == torch.int64
        images = data.images(split, [0, 19])
        assert [tuple(image.shape) for image in images] == [shape, shape]
    raw = fake(str(tmp_path), train=True, download=True).data
    reference = torch.as_tensor(raw)[7]
    assert torch.equal(data.images("train", [7])[0], reference[None] if reference.ndim == 2 else reference.permute(2, 0, 1))


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def test_cifar100_is_read_from_the_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the published layout, a few rows long; torchvision is told their md5."""
    from ddkit_datasets.arrays import FINE_LABELS
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (200, 3 * 32 * 32), dtype=np.uint8)
    content = {"data": rows, "fine_labels": [row % 100 for row in range(200)], "coarse_labels": [0] * 200}
    for name, value in (("train", content), ("test", content), ("meta", {"fine_label_names": FINE_LABELS.split()})):
        (folder / name).write_bytes(pickle.dumps(value))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(folder / "meta")})
    data = open_dataset(DataTable(use="cifar100", dir=str(tmp_path)))
    assert list(data.class_names) == CIFAR100(str(tmp_path)).classes
    assert len(set(data.class_names)) == 100
    assert data.labels("train").tolist() == content["fine_labels"]
    assert torch.equal(data.images("test", [7])[0], torch.from_numpy(rows[7]).view(3, 32, 32))
    assert data.mirror


def test_svhn_is_read_from_the_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATLAB files of the published layout: X (32, 32, 3, n), y (n, 1) in 1..10, ten being the digit 0."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    labels = (np.arange(20) % 10 + 1).reshape(-1, 1)
    listed = {}
    for split in ("train", "test"):
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": pixels, "y": labels})
        listed[split] = ["", file.name, md5(file)]
    monkeypatch.setattr(SVHN, "split_list", SVHN.split_list | listed)
    data = open_dataset(DataTable(use="svhn", dir=str(tmp_path)))
    assert list(data.class_names) == [str(digit) for digit in range(10)]
    assert data.labels("train").tolist() == [(row + 1) % 10 for row in range(20)]
    for split in ("train", "test"):
        images = data.images(split, [0, 9])
        assert images[1].shape == (3, 32, 32)
        assert torch.equal(images[1], torch.from_numpy(pixels[..., 9]).permute(2, 0, 1))
    assert not data.mirror  # a mirrored digit is none


# a third party's data set


class ThirdParty(ddkit.Dataset):
    names: Sequence[str] = ("a", "b")
    targets: Any = (0, 1)

    @property
    def class_names(self) -> Sequence[str]:
        return self.names

    def labels(self, split: str) -> Tensor:
        return torch.tensor(self.targets)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((0, 1, 2), "label 2, but only 2 class names"),
        ((0, -1), "could not be opened"),
        ((0, 0), "class 'b'"),
        ("ab", "could not be opened"),
    ],
)
def test_strange_labels_are_an_input_error(monkeypatch: pytest.MonkeyPatch, targets: Any, message: str) -> None:
    made = ThirdParty()
    made.targets = targets
    monkeypatch.setattr("ddkit.components.registry.create", lambda *_, **__: made)
    with pytest.raises(ddkit.InputError, match=message):
        open_dataset(DataTable(use="third-party"))


# images as tensors


def test_luminance_of_colour_images_follows_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    (ours,) = conform([torch.from_numpy(pixels).permute(2, 0, 1)], (1, 6, 6))
    theirs = np.asarray(Image.fromarray(pixels).convert("L")).astype(int)
    assert np.abs(ours[0].numpy().astype(int) - theirs).max() <= 1


def test_conform_of_bytes_and_floats_together_gives_floats_in_unit_range() -> None:
    images = conform([torch.full((1, 2, 2), 255, dtype=torch.uint8), torch.full((1, 2, 2), 0.5)], (1, 2, 2))
    assert images.dtype == torch.float32
    assert images[:, 0, 0, 0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_channel_statistics_agree_with_numpy_across_chunks(kind: torch.dtype) -> None:
    raw = torch.randint(0, 256, (2300, 3, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    raw[:, 1] //= 3
    mean, std = channel_statistics(raw if kind == torch.uint8 else raw.float() / 255)
    reference = raw.double().numpy() / 255
    np.testing.assert_allclose(mean, reference.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, reference.std((0, 2, 3)), rtol=1e-6)


def test_normalising_and_back_is_the_identity() -> None:
    norm = Normalisation((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm.to_pixels(norm.normalise(x)), x)
    assert norm.normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten().tolist() == pytest.approx([4.5, 5 / 3, 0.25])
