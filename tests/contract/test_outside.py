"""Nothing outside the folder of a run is read, written or removed, whatever its files and the names in them are."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddkit
from ddkit.files import open_regular, path_part, read_bytes, read_json, read_with_digest, with_digest, write_json
from ddkit.run.manifest import LISTED, file_entry
from ddkit.studies.sharding import merge
from tests.conftest import SMALL_FLAGS, Result, content

Cli = Callable[..., Result]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


COMMANDS = {
    "resume": "distill --resume --out RUN",
    "prolong": "distill --resume --out RUN --steps 3",
    "evaluate": "evaluate RUN",
    "report": "report RUN",
    "export": "export RUN --to npz --out new",
    "blend": "blend RUN RUN --out new",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [*LISTED, "manifest.json", "checkpoints", ".lock", "checkpoints/step-00000002.safetensors"])
def test_a_link_in_a_run_is_refused_by_every_command(cli: Cli, run: Path, tmp_path: Path, command: str, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    original = outside / Path(name).name
    if (run / name).exists():
        (run / name).rename(original)  # the very same content: a link to it could be read
    else:
        original.write_bytes(b"")
    (run / name).symlink_to(original)
    (outside / original / ".tmpabc123" if original.is_dir() else outside / ".tmpabc123").write_text("somebody's")  # as of a killed write
    before = content(outside), content(run)
    result = cli(*COMMANDS[command].replace("RUN", str(run)).split())
    assert (result.code, result.out) == (5, ""), result
    assert f"{run / name} is a symbolic link" in " ".join(result.err.split())
    assert (content(outside), content(run)) == before
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.toml", "manifest.json", "checkpoints/step-00000002.safetensors"])
def test_a_pipe_in_a_run_is_refused_at_once(cli: Cli, run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    for command in COMMANDS.values():
        result = cli(*command.replace("RUN", str(run)).split())
        assert (result.code, result.out) == (5, ""), result
        assert "is a named pipe" in " ".join(result.err.split())


def test_a_run_is_found_through_a_link_to_its_folder(cli: Cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert cli("distill", "--resume", "--out", tmp_path / "link", "--steps", 3).code == 0
    assert cli("report", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()


# What is no regular file, in the place of a file that a command reads

KINDS = {"pipe": "a named pipe", "device": "a device"}


def put(kind: str, path: Path) -> Path:
    """Puts a pipe that nobody writes into, an endless device, a socket, or a folder at `path`."""
    if path.is_file():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path.mkdir()
    return path


@pytest.fixture
def at_once() -> Iterator[None]:
    """Ends a test that waits."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OSError, match=r"pipe|device|directory"):
        open_regular(put(kind, tmp_path / "x"))
    with pytest.raises(ddkit.InputError, match="x"):
        ddkit.data.read_arrays(tmp_path / "x")  # of which plugins are made


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(5000))
    (tmp_path / "link").symlink_to("x")
    assert len(read_bytes(tmp_path / "link", most=5000)) == 5000
    with pytest.raises(OSError, match=r"x is larger than 0 MiB, the limit for such a file"):
        read_bytes(tmp_path / "x", most=4999)


READING = {  # command -> exit code; X is what is no regular file
    "distill --recipe X.toml": 4,
    "distill --dataset npz:X.npz": 4,
    "distill --losses dkkt --pipc 2 --teacher X.safetensors": 4,
    "train --recipe X.toml --out new.safetensors": 4,
    "reproduce X.toml --out new": 4,
    "evaluate X.safetensors --dataset digits": 5,
    "blend X.safetensors X.safetensors --out new": 5,
    "export X.safetensors --to npz --out new": 5,
    "import X.pt --out new --mean 0.5 --std 0.5": 4,
}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("command", READING)
def test_a_command_refuses_it_in_the_place_of_its_file(cli: Cli, command: str, kind: str) -> None:
    name = next(part.rpartition(":")[2] for part in command.split() if "X." in part)
    put(kind, Path(name))
    result = cli(*command.split())
    assert (result.code, result.out) == (READING[command], ""), result
    assert KINDS[kind] in " ".join(result.err.split())
    assert name in result.err
    assert {entry.name for entry in Path.cwd().iterdir()} == {name}


@pytest.mark.usefixtures("at_once")
def test_a_list_of_classes_without_an_end_is_refused(cli: Cli) -> None:
    result = cli("import", "x.pt", "--out", "new", "--classes", "/dev/zero")
    assert result.code == 2
    assert "/dev/zero is a device" in " ".join(result.err.split())


# Names


HOSTILE = ["/abs/X", "../../X", "a\0b", "x" * 400, "..", "", "con", "a\nb\x1b[31m", "\udcff", "é", "-rf", "a/../b", "C:\\x", "~"]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_one_part_of_a_path(tmp_path: Path, name: str) -> None:
    part = path_part(name)
    assert 0 < len(part) <= 100
    assert part.isascii()
    (tmp_path / part).write_bytes(b"")
    assert [entry.name for entry in tmp_path.iterdir()] == [part]
    assert part[0] not in ".-"
    assert path_part(part) == part


# Stores


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "store" / "sets" / "one")
    write_json(tmp_path / "store" / "sets" / "one-abc.json", with_digest({"schema": 1, "row": {}}))
    return tmp_path / "store"


def test_merging_copies_what_the_manifest_lists_and_nothing_else(store: Path, tmp_path: Path) -> None:
    (store / "sets" / "one" / "secret.key").write_text("mine")
    (store / "sets" / "one" / "more").symlink_to("/etc")
    assert merge(store, tmp_path / "out") == 2
    copied = tmp_path / "out" / "sets" / "one"
    assert {entry.name for entry in copied.iterdir()} == {*read_json(copied / "manifest.json")["files"], "manifest.json"}
    assert (tmp_path / "out" / "sets" / "one-abc.json").is_file()


@pytest.mark.parametrize("place", ["", "sets", "sets/one", "sets/one/report.html", "sets/one-abc.json"])
def test_merging_follows_no_link(store: Path, tmp_path: Path, place: str) -> None:
    (store / place).rename(tmp_path / "elsewhere")
    (store / place).symlink_to(tmp_path / "elsewhere")
    if not place:  # the store itself may be reached through one
        assert merge(store, tmp_path / "out") == 2
        return
    with pytest.raises(ddkit.RunFilesError, match="is a symbolic link"):
        merge(store, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_merging_copies_no_link_that_a_manifest_lists(store: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    run = store / "sets" / "one"
    manifest = read_with_digest(run / "manifest.json")
    for kind in ("regular file", "link"):
        manifest["files"]["key"] = file_entry(tmp_path / "secret")
        write_json(run / "manifest.json", with_digest(manifest))
        if kind == "link":
            (run / "key").unlink()
            (run / "key").symlink_to(tmp_path / "secret")
            with pytest.raises(ddkit.RunFilesError, match="key is not the file that"):
                merge(store, tmp_path / kind)
        else:
            shutil.copyfile(tmp_path / "secret", run / "key")
            assert merge(store, tmp_path / kind) == 2
        assert (tmp_path / kind / "sets" / "one").exists() == (kind != "link")


def test_merging_replaces_a_run_that_was_begun_but_none_of_the_users_files(store: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "sets" / "one"
    shutil.copytree(store / "sets" / "one", place)
    (place / "manifest.json").unlink()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ddkit.RunFilesError, match="one cannot be copied: Directory not empty"):
        merge(store, tmp_path / "out")
    assert [entry.name for entry in place.parent.rglob("*")] == ["one", "notes.txt"]
    (place / "notes.txt").unlink()
    shutil.copyfile(store / "sets" / "one" / "recipe.toml", place / "recipe.toml")
    assert merge(store, tmp_path / "out") == 2
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    (place / "manifest.json").unlink()
    with pytest.raises(ddkit.RunFilesError, match="one is a symbolic link"):
        merge(store, tmp_path / "out")
    assert (place / "recipe.toml").is_file()


@pytest.mark.parametrize("name", ["/dev/zero", "../../secret", "a/b", "a\\b", "..", ".hidden", "", "a\0"])
def test_a_manifest_that_lists_other_places_is_refused(store: Path, tmp_path: Path, name: str) -> None:
    path = store / "sets" / "one" / "manifest.json"
    manifest = read_with_digest(path)
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    write_json(path, with_digest(manifest))
    with pytest.raises(ddkit.RunFilesError, match=r"manifest\.json is damaged or was edited"):
        merge(store, tmp_path / "out")
    with pytest.raises(ddkit.RunFilesError, match=r"manifest\.json is damaged or was edited"):
        ddkit.load(path.parent)


def test_a_report_names_no_folder_of_the_users(cli: Cli, tmp_path: Path) -> None:
    labels = np.arange(8) % 2
    images = np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    flags = ("--dataset", f"npz:{tmp_path / 'two.npz'}", "--losses", "dm", "--pipc", 2, "--evaluate", "none", *SMALL_FLAGS)
    assert cli("distill", *flags, "--out", "run").code == 0
    assert cli("blend", "run", "run", "--out", "blend").code == 0
    manifest = read_with_digest(Path("run/manifest.json"))
    manifest["warnings"] = [f"The file {tmp_path}/a/t.safetensors is odd: see https://example.org/a/b and 1/2/3."]
    write_json(Path("run/manifest.json"), with_digest(manifest))
    assert cli("report", "run").code == 0
    for run in ("run", "blend"):
        assert str(tmp_path) in Path(run, "recipe.toml").read_text()
        told = Path(run, "report.html").read_text()
        assert str(tmp_path) not in told
        assert "two.npz" in told
    assert "The file t.safetensors is odd: see https://example.org/a/b and 1/2/3." in Path("run/report.html").read_text()


# What is removed, and what a new file may be


@pytest.mark.parametrize("there", [False, True])
def test_what_users_put_into_a_folder_stays_where_the_run_never_begins(cli: Cli, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    if there:
        Path("run").mkdir()

    def put(*arguments: object, **named: object) -> Any:
        for name in ("notes.txt", "data/image.png", "checkpoints/mine.txt", "parts/mine.txt", ".hidden"):
            Path("run", name).parent.mkdir(exist_ok=True)
            Path("run", name).write_text("mine")
        Path("run/checkpoints/step-00000000.safetensors").write_text("ddkit's own")
        raise KeyboardInterrupt

    monkeypatch.setattr("ddkit.run.setup.automatic_teacher", put)
    assert cli("distill", "--losses", "dkkt", "--pipc", 1, "--out", "run", *SMALL_FLAGS).code == 130
    assert set(content(Path("run"))) == {"notes.txt", "data/image.png", "checkpoints/mine.txt", "parts/mine.txt", ".hidden"}


def test_writing_never_changes_the_umask_of_other_threads(tmp_path: Path) -> None:
    """A mask of 0, if only for a moment, lets a file of another thread be anybody's to write."""
    modes: set[int] = set()
    ended = threading.Event()

    def make() -> None:
        while not ended.is_set():
            with open(tmp_path / "theirs", "w"):
                modes.add(stat.S_IMODE((tmp_path / "theirs").stat().st_mode))
            (tmp_path / "theirs").unlink()

    other = threading.Thread(target=make)
    other.start()
    before = os.umask(0o027)
    try:
        for number in range(300):
            write_json(tmp_path / f"{number % 3}.json", {})
    finally:
        ended.set()
        other.join()
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("*.json")} == {0o640}
    assert modes <= {0o640, 0o666 & ~before}


def test_a_second_training_to_one_file_leaves_that_of_the_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: object, **named: object) -> Any:
        Path("teacher.safetensors").write_text("of the first")  # which ends while the second trains
        raise KeyboardInterrupt

    monkeypatch.setattr("ddkit.nn.automatic_teacher.train_teacher", train)
    assert cli("train", "--out", "teacher.safetensors").code == 130
    assert Path("teacher.safetensors").read_text() == "of the first"
    monkeypatch.setattr("ddkit.data.real.open_dataset", train)
    assert cli("train", "--out", "teacher.safetensors").code == 5
