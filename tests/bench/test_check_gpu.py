"""The script of `make check-gpu`: what it says without a GPU, and that a check can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import check_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_gpu.main([]) == 0
    assert capsys.readouterr().out == "check-gpu: no GPU here, so nothing was checked.\n"


def test_a_check_fails_if_its_value_does_not_hold_or_it_raises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def some(checks: check_gpu.Checks, *others: Any) -> None:
        checks.run("dm", "error", lambda: 0.5, "{:.1e}", lambda value: value < 1e-2)
        checks.run("dm", "waits", lambda: 1 / 0)
        checks.run("gm", "waits", lambda: "none")

    monkeypatch.setattr(check_gpu, "check", some)
    assert check_gpu.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED dm, error: 5.0e-01 FAILED" in out
    assert "FAILED dm, waits: ZeroDivisionError" in out
    assert "FAILED gm" not in out


def test_a_check_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def endless(checks: check_gpu.Checks, *others: Any) -> None:
        checks.run("dm", "error", lambda: [None for _ in iter(int, 1)])

    monkeypatch.setattr(check_gpu, "check", endless)
    assert check_gpu.main(["--device", "cpu", "--seconds", "1"]) == 1
    assert "FAILED dm, error: 1 s were up" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_on_the_cpu_fills_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forks: Any) -> None:
    monkeypatch.setattr("ddkit.bench.subprocess", forks)
    monkeypatch.setattr("ddkit.run.children.subprocess", forks)
    code = check_gpu.main(["--device", "cpu", "--cell", "1:2", "--size", "8"])
    out = capsys.readouterr().out
    assert code == 0, out
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in out.splitlines()) if cells[1:]
    }
    for losses in check_gpu.SPEED:
        error, cosine, waits, *speed = rows[losses]
        assert (error, waits) == ("0.0e+00", "-")  # the CPU equals itself
        assert float(cosine) > 0.98
        assert "-" not in speed
    assert {check_gpu.OTHERS, "evaluation"} < set(rows)
