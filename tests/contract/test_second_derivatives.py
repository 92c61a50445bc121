"""Losses that differentiate twice: attention has a second derivative, and a layer without one is told before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddkit.components.trust import granting
from ddkit.engine.loop import Engine
from ddkit.recipes.resolve import resolve
from ddkit.run.initial_set import initial_set
from ddkit.run.setup import RunSetup
from tests import factories
from tests.conftest import Result

Cli = Callable[..., Result]
FLAGS = ("--evaluate", "none", "--steps", 2, "--set", "train.epochs=1", "--set", "train.batch=1000")


@pytest.mark.parametrize("losses", ["dm,dkkt", "gm"])
def test_attention_may_be_differentiated_twice(cli: Cli, losses: str) -> None:
    result = cli("distill", "--losses", losses, "--model", "python:tests.factories.attentive", "--out", "run", *FLAGS)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["losses"] != lines[-1]["losses"]


def test_fused_attention_is_given_up_for_second_derivatives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = nn.functional.scaled_dot_product_attention

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return original(*arguments, **named)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    with granting(everything=True):
        for losses, fused in (("dm", True), ("gm", False)):
            recipe = resolve(None, losses=losses, evaluators="none", model="python:tests.factories.attentive", sets=[], steps=1)
            job = RunSetup(recipe, device="cpu")
            engine: Engine = job.engine_over(initial_set(job).bank)
            seen.clear()
            engine.evaluate(0)
            assert set(seen) == {fused}
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("model", ["once", "silent"])
@pytest.mark.parametrize(("losses", "where"), [("dm,dkkt", "teacher"), ("gm", "network")])
def test_a_layer_without_second_derivative_is_refused_before_anything_is_trained(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, model: str, losses: str, where: str
) -> None:
    monkeypatch.setattr("ddkit.nn.automatic_teacher.fit", lambda *arguments, **named: pytest.fail("a teacher is trained"))
    for plan in ((), ("--plan",)):
        result = cli("distill", "--losses", losses, "--model", f"python:tests.factories.{model}", *FLAGS, *plan)
        assert (result.code, result.out) == (4, "")
        assert f"second derivatives, but the {where} has none" in " ".join(result.err.split())


def test_a_layer_of_ones_own_in_the_graph_and_first_derivatives_of_any_are_fine(cli: Cli) -> None:
    assert cli("distill", "--losses", "gm", "--model", "python:tests.factories.twice", *FLAGS, "--out", "twice").code == 0
    assert cli("distill", "--losses", "dm", "--model", "python:tests.factories.silent", *FLAGS, "--out", "silent").code == 0


def test_what_is_silently_left_out_of_the_graph_is_wrong_by_the_numbers() -> None:
    """The negative control of the check: torch raises nothing for such a layer, and its second derivative is another."""
    found = []
    for make in (factories.once, factories.silent, factories.twice):
        torch.manual_seed(0)
        module = make(1, (8, 8), 3)
        x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8).requires_grad_()
        loss = nn.functional.cross_entropy(module(x), torch.tensor([0, 1]))
        first = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), x)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2], rtol=1e-2)
