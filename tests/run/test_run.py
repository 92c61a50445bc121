"""The main command, end to end on the digits, as small as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ddkit
from tests.conftest import SMALL_FLAGS, Result


def test_distill_writes_every_file_of_a_run_and_prints_the_picture(cli: Callable[..., Result]) -> None:
    result = cli("distill", "--losses", "dm,dkkt", "--ipc", 2, "--pipc", 5, "--out", "run", *SMALL_FLAGS)
    assert result.code == 0, result.err
    assert "run/preview.png" in result.out
    artifact = ddkit.load("run")
    assert artifact.images.shape == (20, 1, 8, 8)
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert len(manifest["real_files"]) == 50
