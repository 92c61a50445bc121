"""How much each loss moves the images: logged, shown, and said if it is next to nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkit.run import doubts as shares
from tests.conftest import SMALL_FLAGS, Result

Cli = Callable[..., Result]
RUN = ["distill", *SMALL_FLAGS, "--steps", 3, "--ipc", 1, "--pipc", 3, "--evaluate", "none", "--set", "engine.log_every=1"]


def lines_of(*norms: dict[str, float]) -> list[dict[str, Any]]:
    return [{"losses": {label: {"raw": 1.0, "gradient": norm} for label, norm in each.items()}} for each in norms]


def test_a_silent_loss_is_named_with_the_weight_that_gives_it_a_tenth() -> None:
    norms = [{"dm": 3.0, "gm": 1.0, "tv": 0.004}, {"dm": 2.0, "gm": 2.0, "tv": 0.004}]
    (told,) = shares.silent(lines_of(*norms), {"dm": 1.0, "gm": 1.0, "tv": 0.5})
    weight = float(re.search(r"--set losses\.tv\.weight=(\S+)$", told)[1])  # type: ignore[index]
    again = lines_of(*({**each, "tv": each["tv"] * weight / 0.5} for each in norms))
    assert shares.typical_shares(again)["tv"] == pytest.approx(0.1, rel=0.05)
    assert shares.silent(again, {"dm": 1.0, "gm": 1.0, "tv": weight}) == []
    (rare,) = shares.silent(lines_of({"dm": 1.0, "tv": 1e-5}), {"dm": 1.0, "tv": 1.0})
    assert rare.endswith("--set losses.tv.weight=11000")


@pytest.mark.parametrize(
    ("norms", "weight"),
    [
        ([{"dm": 1.0, "tv": 0.001}, {"dm": 1.0, "tv": 0.02}], 1.0),
        ([{"dm": 1.0, "tv": 0.0}], 0.0),
        ([{"tv": 0.0}], 1.0),
        ([], 1.0),
    ],
    ids=["once above a hundredth", "weight 0", "alone", "nothing logged"],
)
def test_no_other_loss_is_named(norms: list[dict[str, float]], weight: float) -> None:
    assert shares.silent(lines_of(*norms), {"dm": 1.0, "tv": weight}) == []


def test_a_loss_without_gradient_is_told_that_no_weight_helps() -> None:
    (told,) = shares.silent(lines_of({"dm": 1.0, "tv": 0.0}, {"dm": 2.0, "tv": 0.0}), {"dm": 1.0, "tv": 1.0})
    assert "tv had no gradient" in told
    assert "no weight helps" in told
    assert "--set losses.tv.weight=0" in told, "the one weight that changes something"


def test_a_run_names_its_silent_loss_where_it_warns_and_shows_all_shares(cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    found = cli(*RUN, "--losses", "dm,image-norm:1e-7", "--out", "run")
    assert found.code == 0
    (told,) = json.loads(Path("run/manifest.json").read_text())["warnings"]
    assert "image-norm had less than 1 %" in told
    assert caplog.messages == [told]
    assert re.search(r"^gradient dm 100\.0 %, image-norm 0\.0 % ", found.out, re.M)
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "image-norm had less than 1 %" in page
    assert "Shares of the gradient on the images" in page
    assert "share of the gradient, median" in page

    weight = told.rpartition("=")[2]
    caplog.clear()
    balanced = cli(*RUN, "--losses", f"dm,image-norm:{weight}", "--out", "balanced", "--verbose", "--json")
    assert 0.05 < json.loads(balanced.out)["shares"]["image-norm"] < 0.2
    assert re.search(r"step 3 of 3: .*, gradient: dm \d\d\.\d %, image-norm \d+\.\d %$", "\n".join(caplog.messages), re.M)
    assert "less than 1 %" not in caplog.text


def test_a_run_of_one_loss_has_no_shares_but_its_norm(cli: Cli) -> None:
    found = cli(*RUN, "--losses", "dm", "--out", "run")
    assert "gradient" not in found.out
    assert "Shares of the gradient" not in Path("run/report.html").read_text(encoding="utf-8")
    assert all(json.loads(line)["losses"]["dm"]["gradient"] > 0 for line in Path("run/metrics.jsonl").read_text().splitlines())
