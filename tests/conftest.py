"""Fixtures that most tests share: a cache of their own, a small data set, a small teacher, the command line in-process."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.forks import HEAVY, OWN, forking

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also if the tests run under nohup

SMALL = {  # keeps every run in tests to a fraction of a second
    "steps": 2,
    "train.epochs": 1,
    "teacher.width": 8,
    "network.width": 8,
    "evaluators.accuracy.epochs": 2,
    "evaluators.accuracy.repeats": 2,
    "evaluators.accuracy.cache": False,  # rows of one test do not depend on what another has trained
    "evaluators.accuracy.model_options.width": 8,
}
CHECKOUT = os.pathsep.join(str(each) for each in (Path(__file__).parents[1], Path(__file__).parents[1] / "plugins"))


def set_flags(values: Mapping[str, Any]) -> list[str]:
    """Returns the flags --set of a command for values by path."""
    return [part for path, value in values.items() for part in ("--set", f"{path}={json.dumps(value)}")]


SMALL_FLAGS = set_flags(SMALL)


class Result(NamedTuple):
    """What a command gave: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives the session a cache of its own and one thread, so that parallel test processes do not fight; those they start, too.

    Ctrl-C works, here and in the processes that tests start, also where a shell started the tests in the background.
    """
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("DDKIT_CACHE", str(cache))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "compile"))  # as the command does; so Python's functions share what is compiled
        if "TORCHINDUCTOR_VEC_ISA_OK" not in os.environ:  # torch need not try the compiler on every kind of vector, which takes 15 s
            patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # users' Python keeps bytecode, and compiles ddkit once
        patch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for a core that others have take ten times as long
        patch.setattr(os, "fsync", lambda file: None)  # no test cuts the power, and waiting for the disk is a tenth of a small run
        yield


@pytest.fixture(scope="module", autouse=True)
def _plain_reports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets charts and pictures be drawn in the tests of reports alone."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.path.name.startswith("test_report"):
            plain_reports(patch)
        yield


def plain_reports(patch: pytest.MonkeyPatch) -> None:
    """Leaves charts and pictures out of reports: every run ends with its report, and they take most of its time."""
    from ddkit.run.report.pictures import Picture

    patch.setattr("ddkit.run.report.svg", lambda chart: "")
    for module in ("pictures", "sections"):
        patch.setattr(f"ddkit.run.report.{module}.picture", lambda rows, alt, *, cell: Picture("", 1, 1, alt))


@pytest.fixture(autouse=True)
def _no_plugin_files() -> Iterator[None]:
    """Every test begins and ends without plugin files."""
    yield
    forget_plugin_files()


def forget_plugin_files() -> None:
    """Makes this process as one that was given no plugin file."""
    from ddkit.components import plugin_file, registry

    if plugin_file.known():
        plugin_file.remember({})
        registry.plugins.cache_clear()


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """Yields what stands in for the module subprocess: its processes are forks of one that has imported torch and ddkit."""
    with forking(*HEAVY, *OWN) as made:
        yield made


@pytest.fixture
def forked_children(monkeypatch: pytest.MonkeyPatch, forks: Any) -> None:
    """Makes the processes that ddkit starts forks."""
    monkeypatch.setattr("ddkit.run.children.subprocess", forks)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """Yields a function that runs `ddkit ARGS...` in this process, in an empty folder."""
    from ddkit.cli import main
    from ddkit.run import warnings

    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ddkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    yield run
    logging.getLogger("ddkit").setLevel(logging.NOTSET)  # as it was before --verbose
    warnings.show_from(logging.NOTSET)  # and before --quiet


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of two steps with the loss dm, evaluated; not to be changed."""
    import ddkit

    path = tmp_path_factory.mktemp("finished") / "run"
    ddkit.distill(losses="dm", pipc=2, sets=SMALL, out=path, device="cpu")
    return path


def content(folder: Path) -> dict[str, bytes]:
    """Returns every file in a folder and below, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def said(text: str) -> str:
    """Returns what a command wrote as one line."""
    return " ".join(text.split())


def timeless(checkpoint: Path) -> str:
    """Returns a sha256 of all that a checkpoint holds but the seconds that it took."""
    from ddkit.files import read_tensors, tensors_digest

    tensors, record = read_tensors(checkpoint)
    return tensors_digest(tensors, record | {"seconds": 0})


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Returns a folder train/{cat,dog,owl} with 6 and test/ with 3 RGB images of 12 x 12 per class."""
    return write_image_folder(tmp_path / "images")


def write_image_folder(root: Path, *, size: tuple[int, int] = (12, 12), train: int = 6, test: int = 3) -> Path:
    """Writes class folders of random PNG images whose brightness tells the class; returns `root`."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog", "owl")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(80 * label, 80 * label + 80, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return root


def png_of(width: int, height: int, depth: int = 8, kind: int = 2, rows: bytes = bytes(100)) -> bytes:
    """Returns a PNG file of `rows`, whatever it declares: `width` x `height` pixels of `depth` bits, their `kind` (2: RGB)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
