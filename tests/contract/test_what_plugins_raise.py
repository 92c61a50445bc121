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


class Lossy(ddkit.Loss):
    """Raises."""

    def __call__(self, step):
        raise {error}


class Starts(ddkit.Initializer):
    """Raises."""

    def __call__(self, start):
        raise {error}


class Turns(ddkit.Augmenter):
    """Raises."""

    def sample(self, generator, groups):
        raise {error}


class Judges(ddkit.Evaluator):
    """Raises."""

    def __call__(self, artifact, data, teacher):
        raise {error}


class Checks(ddkit.Evaluator):
    """Raises."""

    def check(self, info):
        raise {error}


class Nets(ddkit.Model):
    """Raises."""

    def __call__(self, channels, size, classes):
        raise {error}


class Holds(ddkit.Dataset):
    """Raises."""

    class_names = ("a", "b")

    def labels(self, split):
        raise {error}


class Made(ddkit.Loss):
    """Raises."""

    def requires(self):
        raise {error}


class Resolves(ddkit.Loss):
    """Raises."""

    def __init__(self, **options):
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
    "complex": (["--losses", "complex", "--evaluate", "none"], 1, "attached to the graph of the images; got complex values of"),
    "whole numbers": ([*BASE, "--init", "counts"], 1, "returned images of shape (10, 1, 8, 8), torch.int64; it has to"),
    "None": ([*BASE, "--init", "nothing"], 1, "returned NoneType; it has to return finite floats of shape (10, 1, 8, 8)"),
}  # fmt: skip
FLAGS = SMALL_FLAGS[:2]  # the number of steps


CASES = [(name, "Odd('no')") for name in RAISING]
CASES += [("loss 'lossy'", error) for error in ("GeneratorExit('no')", "SystemExit('no')", "ValueError('no')")]


@pytest.mark.parametrize(("name", "error"), CASES)
def test_whatever_is_raised_names_the_plugin(cli: Callable[..., Result], name: str, error: str) -> None:
    Path("odd.py").write_text(PLUGINS.format(error=error))
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
    Path("odd.py").write_text(PLUGINS.format(error="ValueError"))
    words, code, message = WRONG[name]
    found = cli("distill", "--plugin", "odd.py", *words, *FLAGS, "--out", "run")
    said = " ".join(found.err.split())
    assert (found.code, found.out) == (code, ""), said
    assert message in said
    assert "odd.py" in said


def test_a_component_that_is_not_built_by_its_base_class_is_named(cli: Callable[..., Result]) -> None:
    Path("odd.py").write_text(PLUGINS.format(error="ValueError"))
    found = cli("distill", "--plugin", "odd.py", "--losses", "alone", "--evaluate", "none", *FLAGS, "--out", "run")
    assert (found.code, found.out) == (3, "")
    assert "loss 'alone' of odd.py" in found.err
    assert "super().__init__" in " ".join(found.err.split())


def test_info_names_a_plugin_whose_requirements_cannot_be_computed(cli: Callable[..., Result]) -> None:
    Path("odd.py").write_text(PLUGINS.format(error="ZeroDivisionError('no')"))
    found = cli("info", "--plugin", "odd.py", "made")
    assert (found.code, found.out) == (3, "")
    assert "loss 'made' of odd.py" in found.err
    assert "ZeroDivisionError: no" in " ".join(found.err.split())


def test_an_observer_may_raise_anything_but_ctrl_c_goes_through(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(BaseException):
        pass

    class Watches:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        @ddkit.hookimpl
        def step_finished(self) -> None:
            raise self.error

    for error in (Odd("no"), GeneratorExit("no"), SystemExit("no")):
        Observers([("mine", Watches(error))]).call("step_finished", index=0, steps=1, record=None)
        assert f"The observer 'mine' raised {type(error).__name__}: no; the run goes on without it." in caplog.text
    with pytest.raises(KeyboardInterrupt):
        Observers([("mine", Watches(KeyboardInterrupt()))]).call("step_finished", index=0, steps=1, record=None)
