"""Engine settings do what they say or are refused."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddkit.engine import deterministic
from tests.conftest import SMALL_FLAGS, Result


def test_deterministic_is_on_inside_and_as_before_afterwards() -> None:
    seen = []
    for wanted in (True, False):
        with deterministic(wanted):
            seen.append(torch.are_deterministic_algorithms_enabled())
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_of_all_losses_works_on_the_cpu(cli: Callable[..., Result]) -> None:
    flags = ("--losses", "dm,dkkt,gm", "--evaluate", "none", "--set", "engine.deterministic=true")
    assert cli("distill", *flags, *SMALL_FLAGS).code == 0
