"""Third-party files: none of their code runs, none is unpacked beyond reason, none acts on the terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import ddkit
from ddkit.cli.common import LogFormat
from ddkit.data.arrays import check_declared
from ddkit.files import read_tensors, write_tensors
from ddkit.run.markdown import markdown
from ddkit.studies.results import Figure, Report, report_table
from ddkit.studies.study import PublishedOn
from ddkit.text import printable
from tests.conftest import SMALL_FLAGS, Result, png_of, said, write_image_folder

Cli = Callable[..., Result]


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


@pytest.fixture
def hostile(finished: Path, marker: Path, tmp_path: Path) -> Path:
    """Returns a folder of files that make `marker` if anything unpickles them, under the names that ddkit reads."""
    root = tmp_path / "hostile"
    root.mkdir()
    content = pickle.dumps(_Bomb(marker))
    for name in ("set.safetensors", "teacher.safetensors", "data.npz", "recipe.toml", "study.toml", "set.pt", "classes.txt"):
        (root / name).write_bytes(content)
    torch.save({"images": torch.rand(2, 1, 4, 4), "labels": torch.arange(2), "more": _Bomb(marker)}, root / "dict.pt")
    torch.save(_Bomb(marker), root / "bomb.pt")
    torch.save([torch.rand(2, 1, 4, 4), _Bomb(marker)], root / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(root / "objects.npz", x_train=np.array([_Bomb(marker)] * 2, dtype=object), y_train=np.arange(2))
    np.savez(root / "pairs.npz", images=np.array([_Bomb(marker)] * 2, dtype=object), labels=np.arange(2))
    write_image_folder(root / "images")
    (root / "images" / "train" / "cat" / "000.png").write_bytes(content)
    for name in ("synthetic.safetensors", "recipe.toml", "manifest.json"):
        folder = shutil.copytree(finished, root / f"run-{name}")
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    folder = shutil.copytree(finished, root / "run-checkpoints")
    (folder / "manifest.json").unlink()
    for file in (folder / "checkpoints").iterdir():
        file.write_bytes(content)
    cifar = root / "cifar" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (cifar / name).write_bytes(content)
    mnist = root / "mnist" / "MNIST" / "processed"
    mnist.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (mnist / name).write_bytes(content)
    return root


IMPORT = "--out new --mean 0.5 --std 0.5 --pixels unit"
READING = [
    "evaluate H/set.safetensors --dataset digits",
    "evaluate H/run-synthetic.safetensors",
    "evaluate H/run-recipe.toml",
    "evaluate H/run-manifest.json",
    "blend H/set.safetensors GOOD --out new",
    "blend GOOD H/run-synthetic.safetensors --out new",
    "distill --losses dkkt --pipc 2 --teacher H/teacher.safetensors",
    "distill --losses dkkt --pipc 0 --init noise --evaluate none --teacher H/teacher.safetensors",
    "distill --losses dm --teacher H/bomb.pt --pipc 2",
    "distill --losses dm --dataset npz:H/data.npz",
    "distill --losses dm --dataset npz:H/objects.npz",
    "distill --losses dm --pipc all --dataset imagefolder:H/images",
    "distill --losses dm --dataset cifar10 --data-dir H/cifar",
    "distill --losses dm --dataset mnist --data-dir H/mnist",
    "distill --recipe H/recipe.toml",
    "distill --resume --out H/run-recipe.toml",
    "distill --resume --out H/run-checkpoints",
    "train --dataset npz:H/objects.npz --out new.safetensors",
    "train --recipe H/recipe.toml --out new.safetensors",
    "reproduce H/study.toml --out new",
    f"import H/set.pt {IMPORT}",
    f"import H/dict.pt {IMPORT}",
    f"import H/bomb.pt {IMPORT}",
    f"import H/old.pt {IMPORT}",
    f"import H/pairs.npz {IMPORT}",
    f"import H/set.safetensors {IMPORT}",
    f"import H/teacher.safetensors {IMPORT} --as teacher",
    f"import GOOD/synthetic.safetensors {IMPORT} --classes H/classes.txt",
]


def _never(*arguments: object, **named: object) -> Any:
    raise AssertionError("something was unpickled")


@pytest.mark.parametrize("command", READING)
def test_no_reading_command_unpickles_anything(
    command: str, hostile: Path, finished: Path, marker: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import _pickle

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, _never)
    monkeypatch.setattr(pickle, "_Unpickler", _never)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    result = cli(*command.replace("GOOD", str(finished)).replace("H/", f"{hostile}/").split())
    assert result.code in (2, 4, 5), result
    assert (result.code == 2) == ("classes.txt" in command)
    assert result.out == ""
    assert result.err.count("ddkit:") >= 1
    assert "Traceback" not in result.err
    assert not marker.exists()
    assert list(Path.cwd().iterdir()) in ([], [Path.cwd() / "new"])


def test_unpickling_such_a_file_would_run_its_code(hostile: Path, marker: Path) -> None:
    pickle.loads((hostile / "set.safetensors").read_bytes())  # noqa: S301
    assert marker.exists()
    marker.rmdir()
    torch.load(hostile / "bomb.pt", weights_only=False)
    assert marker.exists()


# Archives that declare too much


def _npz(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def _npy(shape: tuple[int, ...], kind: str = "|u1", data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
    return stream.getvalue() + data


def _claiming(path: Path, size: int) -> Path:
    """Writes into the directory of a zip archive that its only file has `size` bytes."""
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", size)
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize(("size", "declared", "fits"), [(63, 4096, True), (63, 7000, False), (500, 4999, True), (500, 5001, False)])
def test_a_large_archive_may_be_ten_times_its_file(tmp_path: Path, size: int, declared: int, fits: bool) -> None:
    with (tmp_path / "x.npz").open("wb") as stream:
        stream.truncate(size * 2**20)
    archive: Any = SimpleNamespace(infolist=lambda: [SimpleNamespace(file_size=declared * 2**20)])
    with nullcontext() if fits else pytest.raises(ddkit.InputError, match=f"would have {declared:,} MiB"):
        check_declared(archive, tmp_path / "x.npz")


def test_an_archive_that_declares_too_much_is_refused_before_it_is_unpacked(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _claiming(_npz(tmp_path / "x.npz", "x_train.npy", _npy((4,), data=b"abcd")), 2**31)
    of_torch = _claiming(_npz(tmp_path / "x.pt", "x/data.pkl", b"abcd"), 2**31)
    monkeypatch.setattr(zipfile.ZipFile, "open", _never)
    monkeypatch.setattr("torch.load", _never)
    with pytest.raises(ddkit.InputError, match=r"x\.npz .* would have 2,048 MiB after unpacking.* the limit is 1,024 MiB"):
        ddkit.data.read_arrays(path)
    result = cli("import", of_torch, *IMPORT.split())
    assert result.code == 4
    assert "would have 2,048 MiB after unpacking" in said(result.err)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (_npy((10**12,)), "declares an array of shape (1000000000000,)"),
        (_npy((-1,)), "declares an array of shape (-1,)"),
        (_npy((2,), data=b"abc"), "declares an array of shape (2,)"),
        (_npy((1,), "|O", b"x"), "contains Python objects, and ddkit unpickles nothing"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000, "cannot be read as a NumPy .npz archive"),
        (b"\x93NUMPY\x09\x00", "has the .npy version (9, 0)"),
        (b"hello", "cannot be read as a NumPy .npz archive"),
    ],
)
def test_an_array_whose_header_lies_is_refused_before_it_is_made(tmp_path: Path, content: bytes, told: str) -> None:
    path = _npz(tmp_path / "x.npz", "x_train.npy", content)
    with pytest.raises(ddkit.InputError, match=r"x\.npz") as caught:
        ddkit.data.read_arrays(path)
    assert told in str(caught.value)


def test_an_archive_that_holds_more_than_its_directory_says_gives_no_more(tmp_path: Path) -> None:
    path = _claiming(_npz(tmp_path / "x.npz", "x_train.npy", _npy((10**6,), data=bytes(10**6))), 200)
    with pytest.raises(ddkit.InputError, match=r"x\.npz cannot be read"):
        ddkit.data.read_arrays(path)


def test_a_well_packed_archive_of_honest_size_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 32, 32), np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 1000 * 32 * 32 / 100
    assert ddkit.data.read_arrays(tmp_path / "x.npz")["x"].shape == (1000, 32, 32)


# Images that declare too much


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("side", "shown"), [(60_000, "3,600,000,000"), (10_000, "100,000,000")])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    cli: Cli, image_folder: Path, monkeypatch: pytest.MonkeyPatch, split: str, side: int, shown: str
) -> None:
    bad = image_folder / split / "owl" / "000.png"
    bad.write_bytes(png_of(side, side))
    prepared: list[tuple[int, int]] = []
    original = ImageFile.ImageFile.load_prepare

    def note(image: Any) -> None:
        prepared.append(image.size)
        original(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", note)
    result = cli("distill", "--losses", "dm", "--pipc", "all", "--dataset", f"imagefolder:{image_folder}", *SMALL_FLAGS)
    assert (result.code, result.out) == (4, "")
    assert said(result.err).endswith(
        f"ddkit: The image {bad} declares {shown} pixels, but the limit is {Image.MAX_IMAGE_PIXELS:,}. Scale it down or remove it."
    )
    assert set(prepared) == {(12, 12)}, "the others are decoded, this one is not"


def test_images_with_changed_bytes_are_decoded_or_refused(tmp_path: Path) -> None:
    """2,100 mutated files in seven formats: no other exception, no warning."""
    from ddkit_datasets.decoding import Decoding, decode_images

    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 255, (9, 11, 3), dtype=np.uint8))
    outcomes = set()
    for form in ("PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG", "PPM"):
        stream = io.BytesIO()
        image.save(stream, form)
        for number in range(300):
            content = bytearray(stream.getvalue())
            content = content[: random.integers(1, len(content))] if number % 3 == 0 else content
            for place in random.integers(0, min(len(content), 80 if number % 2 else len(content)), int(random.choice([1, 2, 8]))):
                content[place] = random.integers(256)
            file = tmp_path / "x.img"
            file.write_bytes(bytes(content))
            try:
                outcomes.add((form, len(decode_images([str(file)], Decoding()))))
            except ddkit.InputError as error:
                outcomes.add((form, "refused" if "x.img" in str(error) else str(error)))
    assert {outcome for _, outcome in outcomes} == {1, "refused"}


# What a record may hold


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"class_names": "abcdefghij"}, "its metadata has no class_names"),
        ({"class_names": [1] * 10}, "Expected `str`, got `int` - at `$.class_names[0]`"),
        ({"mean": ["0"]}, "Expected `float`, got `str` - at `$.mean[0]`"),
        ({"mean": [0.1, 0.2]}, "its mean and std do not have one value per channel"),
        ({"std": [1e400]}, "Infinity is not JSON"),
        ({"ipc": "x"}, "Expected `int | null`, got `str` - at `$.ipc`"),
        ({"seed": -1}, "Expected `int` >= 0 - at `$.seed`"),
        ({"seeds": ["x"]}, "Expected `int`, got `str` - at `$.seeds[0]`"),
        ({"schema": "1" * 3000}, "this version of ddkit reads schema 1"),
    ],
)
def test_a_set_whose_record_cannot_be_used_is_refused(finished: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    from safetensors.torch import save_file

    tensors, record = read_tensors(finished / "synthetic.safetensors")
    save_file(tensors, tmp_path / "x.safetensors", {"ddkit": json.dumps({**record, **change})})
    with pytest.raises(ddkit.RunFilesError, match=r"x\.safetensors") as caught:
        ddkit.load(tmp_path / "x.safetensors")
    assert told in str(caught.value)


@pytest.mark.parametrize("header", ["[]", "3", "null", "{", "[" * 100_000, '{"a":' * 100_000, "\udcff", "9" * 5000])
def test_metadata_that_is_no_record_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "x.safetensors"
    table = json.dumps({"__metadata__": {"ddkit": header}, "images": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(table)) + table + bytes(4))
    with pytest.raises(ddkit.RunFilesError, match=r"x\.safetensors"):
        ddkit.load(path)


@pytest.mark.parametrize("change", [{"model": 3}, {"options": []}, {"mean": "0.5"}, {"class_names": [[]]}, {"input_shape": [1, 8]}])
def test_a_teacher_whose_record_cannot_be_used_is_refused(cli: Cli, tmp_path: Path, change: dict[str, Any]) -> None:
    record = {"model": "convnet", "options": {}, "mean": [0.5], "std": [0.5], "class_names": list("ab"), "input_shape": [1, 8, 8]}
    write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(1)}, record | change)
    result = cli("distill", "--losses", "dkkt", "--pipc", 2, "--teacher", tmp_path / "t.safetensors")
    assert (result.code, result.out) == (4, "")
    assert f"The teacher {tmp_path / 't.safetensors'} has damaged metadata: Expected" in said(result.err)


# What is shown


def test_what_acts_on_a_terminal_is_escaped() -> None:
    assert printable("chat é 猫\t\n") == "chat é 猫\t\n"
    assert printable("\x1b[31m\x07\r\x9b\u202e\u2028\udcff") == "\\u001b[31m\\u0007\\r\\u009b\\u202e\\u2028\\udcff"
    record = logging.LogRecord("ddkit", logging.WARNING, "x.py", 1, "class %s", ("\x1b[2J",), None)
    assert LogFormat().format(record) == "class \\u001b[2J"


NAMES = ["\x1b[31mred\x1b[0m", "a\nb", "c|d <script>`", "\u202eexe", "x" * 5000]


def _named(tmp_path: Path) -> Path:
    x, y = np.random.default_rng(0).random((20, 8, 8)), np.arange(20) % 5
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x, y_test=y, class_names=np.array(NAMES))
    return tmp_path / "x.npz"


def test_class_names_of_any_kind_make_a_run_and_never_reach_the_terminal(cli: Cli, tmp_path: Path) -> None:
    file = _named(tmp_path)
    for command in (
        ["distill", "--losses", "dm", "--dataset", f"npz:{file}", "--pipc", 2, "--out", "run", *SMALL_FLAGS],
        ["evaluate", "run", "--json"],
        ["distill", "--losses", "dm", "--dataset", f"npz:{file}", "--pipc", 2, "--plan", "--json"],
        ["distill", "--losses", "dm", "--dataset", f"npz:{file}", "--pipc", 2, "--ipc", 9],
        ["evaluate", "run", "--dataset", "digits"],
    ):
        result = cli(*command)
        assert result.code in (0, 4), result.err
        assert not {"\x1b", "\u202e"} & set(result.out + result.err)
        if "--json" in command:
            json.loads(result.out)
    assert ddkit.load("run").class_names == NAMES
    with Image.open("run/preview.png") as picture:
        assert picture.width < 1200, "long names are cut"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b <img src=x> `c`\n# d & \x1b", r"a\|b &lt;img src=x&gt; \`c\` # d &amp; \\u001b"),
        ("# x", r"\# x"),
        ("1. x", r"1\. x"),
        ("0.1.0", "0.1.0"),
        ("![a](http://b) www.c d@e", r"!\[a\](http&#58;//b) www&#46;c d&#64;e"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, escaped: str) -> None:
    assert markdown(text) == escaped


HOSTILE = "\n# h <img src=x> [a](b) `c` | d | http://e"


def test_no_word_of_a_study_is_more_than_text_in_its_report() -> None:
    figure = Figure(
        ipc=1, pipc=2, system="s", title="t", protocol="p", labels="hard", steps=3, wanted=2, published=0.5, mean=0.25, sets=1, networks=2,
        failed="f", dataset="d", teacher="r", comparable=False, warnings=["w"],
    )  # fmt: skip
    on = PublishedOn(name="n", dataset="digits", classes=10, shape=(1, 8, 8))
    report = Report(study="y", summary="", source="", split="test", published_on=on, figures=[figure], pictures=[])
    usual, seen = report_table(report, "pipe"), 0
    for field in ("title", "protocol", "failed", "dataset", "teacher"):
        hostile = msgspec.structs.replace(report, figures=[msgspec.structs.replace(figure, **{field: HOSTILE})])
        seen += _as_text(report_table(hostile, "pipe"), usual)
    for field in ("name", "dataset"):
        seen += _as_text(
            report_table(msgspec.structs.replace(report, published_on=msgspec.structs.replace(on, **{field: HOSTILE})), "pipe"), usual
        )
    hostile = msgspec.structs.replace(report, study=HOSTILE, figures=[msgspec.structs.replace(figure, warnings=[HOSTILE])])
    seen += _as_text(report_table(hostile, "pipe"), usual)
    assert seen == 8


def _as_text(page: str, usual: str) -> bool:
    """Returns whether the hostile text is on the page, after checking that it is nothing but text."""
    assert len(page.splitlines()) == len(usual.splitlines())
    assert not re.search(r"<img|(?<!\\)[\[`]|://", page)
    assert len(re.findall(r"(?<!\\)\|", page)) == usual.count("|")
    return "&lt;img src=x&gt;" in page


@pytest.mark.parametrize("flag", ["--markdown", "--quiet"])
def test_the_title_of_a_study_is_escaped(cli: Cli, tmp_path: Path, flag: str) -> None:
    study = tmp_path / "s.toml"
    study.write_text('[systems.a]\ntitle = "x|y <b>\\u001b[31m"\nbaseline = "random-real"\n[[cells]]\nipc = 1\npipc = 2\n')
    result = cli("reproduce", study, "--show", flag)
    assert result.code == 0, result.err
    assert "\x1b" not in result.out
    assert (r"x\|y &lt;b&gt;\\u001b\[31m" if flag == "--markdown" else "x|y <b>\\u001b[31m") in result.out
