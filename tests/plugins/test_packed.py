"""Datasets in files of other libraries: Hugging Face's parquet and arrow files, WebDataset's tar shards."""

from __future__ import annotations

import io
import logging
import sys
import tarfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddkit_datasets import HuggingFace, WebDataset
from ddkit_datasets.packed import Packed, Samples
from PIL import Image
from torch.utils.data import TensorDataset

import ddkit
from ddkit import testing
from tests.conftest import SMALL, Result

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 8, 7, 3), dtype=np.uint8)


def png(row: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS[row]).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def labelled(rows: range) -> list[tuple[str, bytes]]:
    return [(f"{row:04d}.{ending}", content) for row in rows for ending, content in (("png", png(row)), ("cls", b"%d\n" % (row % 2 + 9)))]


@pytest.mark.parametrize(("name", "library"), [("huggingface", "datasets"), ("webdataset", "webdataset")])
def test_without_the_library_one_paragraph_says_how_to_install_it(
    name: str, library: str, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    file = tmp_path / ("train.parquet" if name == "huggingface" else "train.tar")
    file.touch()
    found = cli("distill", "--losses", "dm", "--dataset", f"{name}:{file}", "--out", "run")
    assert (found.code, found.out) == (3, "")
    assert f"pip install 'ddkit[{library}]'" in " ".join(found.err.split())
    assert not Path("run").exists()


class Named(Packed):
    """Gives back the names of the files of each split."""

    library = "sys"
    endings = (".tar",)

    def read(self, library: Any, files: Sequence[Path], root: Path) -> Any:
        names.append([file.relative_to(root).as_posix() for file in files])
        return TensorDataset(torch.from_numpy(PIXELS[:4]), torch.tensor([0, 1, 0, 1]))


names: list[list[str]] = []


@pytest.mark.parametrize(
    ("files", "expected", "said"),
    [
        (("b-train-1.tar", "a_train_0.tar"), [["a_train_0.tar", "b-train-1.tar"]], ""),
        (("0.tar", "sub/1.tar"), [["0.tar", "sub/1.tar"]], ""),
        (("train/0.tar", "test/0.tar"), [["train/0.tar"], ["test/0.tar"]], ""),
        (("test-sets/train-0.tar", "test-sets/val-0.tar"), [["test-sets/train-0.tar"], ["test-sets/val-0.tar"]], "the test split is 'val'"),
        (("train.tar", "test.tar", "val.tar", "extra.tar"), [["train.tar"], ["test.tar"]], "not used: val, extra.tar"),
    ],
)
def test_splits_are_told_by_the_names_of_files_and_folders(
    files: Sequence[str], expected: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in (*files, "._hidden.tar", "note.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    names.clear()
    with caplog.at_level(logging.WARNING, "ddkit"):
        Named(name="named", path=str(tmp_path))
    assert names == expected
    assert caplog.text.rstrip().endswith(f"{said}." if said else "")
    assert bool(caplog.text) == bool(said)


def test_without_files_to_train_on_the_paragraph_says_what_is_there(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "contains no .tar file"), (tmp_path / "no", "does not exist"), ("", "needs the path of a folder")):
        with pytest.raises(ddkit.InputError, match=message):
            Named(name="named", path=str(path))
    (tmp_path / "val-0.tar").touch()
    with pytest.raises(ddkit.InputError, match=rf"only contains files of the split val.* --dataset named:{tmp_path}/val-0\.tar$"):
        Named(name="named", path=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"jpg": png(0), "cls": b"cat\n", "json": b"{}"}, "cat"),
        ({"v2.webp": png(0), "json": b'{"caption": "x", "label": 3.0}'}, "3"),
        ({"png": png(0), "json": b'{"class_name": "dog"}'}, "dog"),
    ],
)
def test_a_sample_is_an_image_and_its_label(fields: dict[str, Any], label: str) -> None:
    found = Samples()
    found.add(Path("a.tar"), [{"__key__": "x", "__url__": "a.tar", **fields}] * 2)
    image, text = found[1]
    assert (len(found), found.targets, text) == (2, [label] * 2, label)
    np.testing.assert_array_equal(np.asarray(image), PIXELS[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cls": b"1", "txt": b"x"}, r"a\.tar, sample x: it has no image \(cls, txt\)"),
        ({"jpg": b"", "seg.png": b"", "cls": b"1"}, r"several images \(jpg, seg.png\)"),
        ({"jpg": b""}, r"it has no label.*unpack it with `mkdir FOLDER && tar -xf a\.tar -C FOLDER"),
        ({"jpg": b"", "json": b'{"caption": 1}'}, r"its \.json has caption"),
        ({"jpg": b"", "json": b'{"label": [1, 2]}'}, "label has several values"),
        ({"jpg": b"", "json": b"{"}, "its label cannot be read"),
        ({"jpg": b"", "json": b"[]"}, "it has no label"),
        ({"jpg": b"", "cls": b"\xff"}, "its label cannot be read"),
        ({"jpg": b"", "cls": b" "}, "cls is empty"),
    ],
)
def test_another_sample_is_an_error_that_names_it(fields: dict[str, bytes], message: str) -> None:
    with pytest.raises(ddkit.InputError, match=message):
        Samples().add(Path("a.tar"), [{"__key__": "x", **fields}])


def test_an_image_that_cannot_be_decoded_is_named() -> None:
    found = Samples()
    found.add(Path("a.tar"), [{"__key__": "x", "jpg": b"<html>", "cls": b"1"}])
    with pytest.raises(ddkit.InputError, match=r"a\.tar, sample x\.jpg cannot be decoded \(cannot identify image file\)"):
        found[0]


def test_several_sets_of_one_split_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    for name in ("fine", "coarse"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000-of-00001.parquet").touch()
    with pytest.raises(
        ddkit.InputError, match=rf"several sets of the same split, in 'coarse', 'fine'.*--dataset huggingface:{tmp_path}/coarse$"
    ):
        HuggingFace(name="huggingface", path=str(tmp_path))


# Against the libraries themselves


def check(name: str, data: ddkit.Dataset, classes: list[str], train: range, test: range) -> None:
    """Checks the images and labels of a dataset whose image `row` is PIXELS[row], and the promises of every dataset."""
    assert list(data.class_names) == classes
    for split, rows in (("train", train), ("test", test)):
        assert data.labels(split).tolist() == [row % 2 for row in rows]
        for found, row in zip(data.images(split, range(len(rows))), rows, strict=True):
            np.testing.assert_array_equal(found.numpy(), PIXELS[row].transpose(2, 0, 1))
    assert {each.check: each.problem for each in testing.check("dataset", name) if each.problem} == {}


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_tar_shards_are_read(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset", reason="an extra")
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train-0", range(4)), ("train-1", range(4, 8)), ("val-0", range(8, 12))):
        shard(tmp_path / "s" / f"{name}{ending}", labelled(rows))
    name = f"webdataset:{tmp_path / 's'}"
    check(name, WebDataset(name="webdataset", path="s"), ["9", "10"], range(8), range(8, 12))
    run = ddkit.distill(losses="dm", dataset=name, ipc=1, pipc=2, steps=1, sets=SMALL, evaluators="none", out="run")
    assert ddkit.resume(run.path, steps=2).steps == 2
    (tmp_path / "s" / f"train-1{ending}").write_bytes((tmp_path / "s" / f"train-0{ending}").read_bytes()[:300])
    with pytest.raises(ddkit.InputError, match=r"The shard .*train-1\.tar.* cannot be read"):
        WebDataset(name="webdataset", path="s")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library
def test_exports_of_hugging_face_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("datasets", reason="an extra")
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    features = library.Features({"img": library.Image(), "fine_label": library.ClassLabel(names=["cat", "dog"])})
    parts = {
        name: library.Dataset.from_list([{"img": {"bytes": png(row), "path": None}, "fine_label": row % 2} for row in rows], features)
        for name, rows in (("train", range(8)), ("test", range(8, 12)))
    }
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, part in parts.items():
        part.to_parquet(str(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet"))
    library.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "cached").mkdir()
    for name in parts:
        (tmp_path / "cached" / f"own-{name}.arrow").write_bytes((tmp_path / "saved" / name / "data-00000-of-00001.arrow").read_bytes())
    for name in ("hub", "saved", "cached"):
        path = str(tmp_path / name)
        check(f"huggingface:{path}", HuggingFace(name="huggingface", path=path), ["cat", "dog"], range(8), range(8, 12))
    bare = library.Dataset.from_list([{"image": png(row), "label": "ba"[row % 2]} for row in range(12)])  # without the type Image
    (tmp_path / "bare").mkdir()
    bare.to_parquet(str(tmp_path / "bare" / "0.parquet"))
    assert list(HuggingFace(name="huggingface", path=str(tmp_path / "bare")).class_names) == ["a", "b"]
    (tmp_path / "bare" / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ddkit.InputError, match="cannot be read"):
        HuggingFace(name="huggingface", path=str(tmp_path / "bare"))
