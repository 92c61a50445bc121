"""Whatever a plugin raises or returns, one paragraph names it: also what is no Exception, and values of a wrong kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import ddkit
from ddkit.components.observers import Observers
from tests.conftest import SMALL_FLAGS, Result

PLUGINS = '''
import ddkit
import torch


class Odd(BaseException):
    pass


class Holds(ddkit.Dataset):
    """Raises."""

    class_names = ("a", "b")

    def labels(self, split):
        raise {error}


class Alone(ddkit.Loss):
    """Calls no super().__init__."""

    def __init__(self, *args, **kwargs):
        pass


class Complex(ddkit.Loss):
    """Complex values."""

    def __call__(self, step):
        return torch.fft.fft2(step.images).sum()


class Backward(ddkit.Loss):
    """Raises in its gradient."""

    def __call__(self, step):
        return _Backward.apply(step.images)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.sum()

    @staticmethod
    def backward(ctx, gradient):
        raise {error}


class Counts(ddkit.Initializer):
    """Whole numbers."""

    def __call__(self, start):
        return torch.zeros((len(start.labels), *start.shape), dtype=torch.int64)


class Nothing(ddkit.Initializer):
    """None."""

    def __call__(self, start):
        return None
'''
RAISES = '''

class {name}(ddkit.{base}):
    """Raises."""

    def {method}:
        raise {error}
'''
METHODS = {
    "Lossy": ("Loss", "__call__(self, step)"),
    "Starts": ("Initializer", "__call__(self, start)"),
    "Turns": ("Augmenter", "sample(self, generator, groups)"),
    "Judges": ("Evaluator", "__call__(self, artifact, data, teacher)"),
    "Checks": ("Evaluator", "check(self, info)"),
    "Nets": ("Model", "__call__(self, channels, size, classes)"),
    "Made": ("Loss", "requires(self)"),
    "Resolves": ("Loss", "__init__(self, **options)"),
}
BASE = ["--losses", "image-norm", "--evaluate", "none"]
RAISING = {
    "loss 'lossy'": (["--losses", "lossy", "--evaluate", "none"], 1),
    "loss 'made'": (["--losses", "made", "--evaluate", "none"], 3),
    "loss 'resolves'": (["--losses", "resolves", "--evaluate", "none"], 3),
    "losses (backward)": (["--losses", "backward", "--evaluate", "none"], 1),
    "initializer 'starts'": ([*BASE, "--init", "starts"], 3),
    "augmenter 'turns'": (["--losses", "dm", "--evaluate", "none", "--augment", "turns"], 1),
    "model 'nets'": (["--losses", "dm", "--evaluate", "none", "--set", "network.model=nets"], 3),
    "holds": ([*BASE, "--dataset", "holds"], 4),
    "evaluator 'judges'": (["--losses", "image-norm", "--evaluate", "judges"], 1),
    "evaluator 'checks'": (["--losses", "image-norm", "--evaluate", "checks"], 3),
}
WRONG = {
    "complex": (["--losses", "complex", "--evaluate", "none"], 1, "that depends on the images, but returned complex values of"),
    "whole numbers": ([*BASE, "--init", "counts"], 1, "returned images of shape (10, 1, 8, 8), torch.int64. It must"),
    "no super": (["--losses", "alone", "--evaluate", "none"], 3, "super().__init__"),
    "None": ([*BASE, "--init", "nothing"], 1, "returned NoneType. It must return finite floats of shape (10, 1, 8, 8)"),
}  # fmt: skip
FLAGS = SMALL_FLAGS[:2]  # the number of steps


CASES = [(name, "Odd('no')") for name in RAISING]
CASES += [("loss 'lossy'", error) for error in ("GeneratorExit('no')", "SystemExit('no')", "ValueError('no')")]


def write_plugins(error: str) -> None:
    raising = [RAISES.format(name=name, base=base, method=method, error=error) for name, (base, method) in METHODS.items()]
    Path("odd.py").write_text(PLUGINS.format(error=error) + "".join(raising))


@pytest.mark.parametrize(("name", "error"), CASES)
def test_whatever_is_raised_names_the_plugin(cli: Callable[..., Result], name: str, error: str) -> None:
    write_plugins(error)
    words, code = RAISING[name]
    found = cli("distill", "--plugin", "odd.py", *words, *FLAGS, "--out", "run")
    said = " ".join(found.err.split())
    assert (found.code, found.out) == (code, ""), said
    assert name in said
    kind = name.partition(" ")[0] if "'" in name else "dataset"
    assert f"`ddkit check --plugin {Path('odd.py').resolve()} {kind} " in said or "backward" in words
    assert f"{error.partition('(')[0]}: no" in said
    assert "Traceback" not in found.err


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_a_wrong_kind_names_the_plugin(cli: Callable[..., Result], name: str) -> None:
    write_plugins("ValueError")
    words, code, message = WRONG[name]
    found = cli("distill", "--plugin", "odd.py", *words, *FLAGS, "--out", "run")
    said = " ".join(found.err.split())
    assert (found.code, found.out) == (code, ""), said
    assert message in said
    assert "odd.py" in said


def test_info_names_a_plugin_whose_requirements_cannot_be_computed(cli: Callable[..., Result]) -> None:
    write_plugins("ZeroDivisionError('no')")
    found = cli("info", "--plugin", "odd.py", "made")
    assert (found.code, found.out) == (3, "")
    assert "loss 'made' of odd.py" in found.err
    assert "ZeroDivisionError: no" in " ".join(found.err.split())


def test_ctrl_c_in_an_observer_goes_through() -> None:
    class Watches:
        @ddkit.hookimpl
        def step_finished(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers([("mine", Watches())]).call("step_finished", index=0, steps=1, record=None)
