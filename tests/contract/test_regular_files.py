"""Only regular files are read: a pipe, a device, a socket or a folder in the place of one is refused at once, as a damaged file is."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ddkit
from ddkit.files import open_regular, read_bytes
from tests.conftest import Result

Cli = Callable[..., Result]
KINDS = {"pipe": "a named pipe", "device": "a device", "folder": ""}


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


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Ends a test that waits."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OSError, match=r"pipe|device|directory"):
        open_regular(put(kind, tmp_path / "x"))


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(5000))
    (tmp_path / "link").symlink_to("x")
    assert len(read_bytes(tmp_path / "link", most=5000)) == 5000
    with pytest.raises(OSError, match=r"x has more than 0 MiB, the most that is read of such a file"):
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


def test_a_list_of_classes_without_an_end_is_refused(cli: Cli) -> None:
    result = cli("import", "x.pt", "--out", "new", "--classes", "/dev/zero")
    assert result.code == 2
    assert "/dev/zero is a device" in " ".join(result.err.split())


def test_plugins_are_refused_it_too(tmp_path: Path) -> None:
    with pytest.raises(ddkit.InputError, match=r"a named pipe, not a regular file"):
        ddkit.read_arrays(put("pipe", tmp_path / "x.npz"))
