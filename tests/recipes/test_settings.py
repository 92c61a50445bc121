"""Engine settings do what they say or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ddkit
from ddkit.engine.guards import deterministic
from ddkit.recipes.resolve import resolve
from ddkit.run.setup import RunSetup
from tests.conftest import SMALL_FLAGS, Result

Cli = Callable[..., Result]


def test_deterministic_is_on_inside_and_as_before_afterwards() -> None:
    seen = []
    for wanted in (True, False):
        with deterministic(wanted):
            seen.append(torch.are_deterministic_algorithms_enabled())
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_of_all_losses_works_on_the_cpu(cli: Cli) -> None:
    result = cli("distill", "--losses", "dm,dkkt,gm", "--evaluate", "none", "--deterministic", *SMALL_FLAGS, "--out", "run")
    assert result.code == 0
    assert "deterministic = true" in Path("run/recipe.toml").read_text()


def _on_a_gpu(monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    """Prepares a run as if its device were a GPU; nothing is computed there before the check."""
    monkeypatch.setattr("ddkit.run.setup.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("ddkit.run.checks.no_second_derivative", lambda *arguments, **more: "")
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *arguments, **more: module)
    monkeypatch.setattr("ddkit.run.setup.ExecutionPlan", lambda *arguments, **more: SimpleNamespace(needs_network=True))
    sets = [("engine.deterministic", True), *given.pop("sets", [])]
    RunSetup(resolve(losses="dm,dkkt", pipc=2, evaluators="none", sets=sets, **given))


@pytest.mark.parametrize(
    ("augmenter", "sets", "named"),
    [
        ("dsa", [], ["augmenter 'dsa': the backward pass of bilinear sampling (scale, rotate)"]),
        ("dsa", [("augmenter.operations", ["flip", "rotate"])], ["augmenter 'dsa': the backward pass of bilinear sampling (rotate)"]),
        ("dsv", [], ["augmenter 'dsv': the backward pass"]),
        ("none", [], ["augmenter 'dsa' of views.default"]),
    ],
)
def test_what_cannot_be_deterministic_on_a_gpu_is_refused_by_name_before_the_run(
    monkeypatch: pytest.MonkeyPatch, augmenter: str, sets: list[tuple[str, Any]], named: list[str]
) -> None:
    with pytest.raises(ddkit.InputError) as caught:
        _on_a_gpu(monkeypatch, init="real", augment=augmenter, sets=sets)
    assert "on cuda these components cannot give the same bytes twice" in str(caught.value)
    for words in named:
        assert words in str(caught.value)


def test_what_can_be_deterministic_on_a_gpu_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = ["color", "crop", "cutout", "flip"]
    _on_a_gpu(
        monkeypatch, sets=[("augmenter.operations", pixels), ("views.default.augmenter", "dsa"), ("views.default.operations", pixels)]
    )
