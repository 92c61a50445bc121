"""The conformance kit itself: for every check a component that breaks it and nothing else that matters, and the reason given."""

# ruff: noqa: E501 (tables with one broken component a line)

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ddkit
from ddkit import testing
from ddkit.components import registry
from ddkit.testing import Broken, Conformance
from tests.conftest import SMALL_FLAGS


class Good(ddkit.Loss):
    """A loss that keeps every promise: squared distance of the mean images."""

    order_invariant = True
    requires = ddkit.Requires(real=True)

    def __call__(self, step: ddkit.Step) -> Tensor:
        return (step.images.mean(0) - step.real.images.mean(0)).square().sum()


def _bad(name: str, call: Callable[[Any, ddkit.Step], Any], **members: Any) -> type[ddkit.Loss]:
    return type(name, (ddkit.Loss,), {"__doc__": "Broken.", "__call__": call, "requires": ddkit.Requires(), **members})


def _square(step: ddkit.Step) -> Tensor:
    return step.images.square().sum()


def _fails_where(condition: Callable[[ddkit.Step], bool]) -> type[ddkit.Loss]:
    def call(self: Any, step: ddkit.Step) -> Tensor:
        if condition(step):
            raise ValueError("cannot do that")
        return _square(step)

    return _bad("Fails", call)


def _second_order(self: Any, step: ddkit.Step) -> Tensor:
    images = step.images
    (gradient,) = torch.autograd.grad(images.pow(3).sum(), images, create_graph=True)
    return gradient.square().sum()


class _Custom(torch.autograd.Function):
    """A square with the wrong derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0]  # half of what it is


class _Remembers(ddkit.Loss):
    """Keeps something from step to step."""

    def __call__(self, step: ddkit.Step) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls * _square(step)


class _HalvesLater(ddkit.Loss):
    """Is half as steep from its second call on, so its gradient does not follow the weight."""

    def __call__(self, step: ddkit.Step) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return _square(step) if self.calls == 1 else 0.5 * _square(step)


LOSSES: dict[str, tuple[type[ddkit.Loss], str]] = {
    "returns-a-finite-scalar": (_bad("Nan", lambda self, step: _square(step) * float("nan")), "is nan"),
    "one-channel": (_fails_where(lambda step: step.images.shape[1] == 1), "cannot do that"),
    "three-channels": (_fails_where(lambda step: step.images.shape[1] == 3), "cannot do that"),
    "images-that-are-not-square": (_fails_where(lambda step: step.images.shape[2:] == (6, 11)), "cannot do that"),
    "one-image-a-class": (_fails_where(lambda step: step.size == step.info.classes), "cannot do that"),
    "unbalanced-classes": (_fails_where(lambda step: len({rows.stop - rows.start for rows in step.class_slices.values()}) > 1), "cannot"),
    "gradient-reaches-the-bank-and-nothing-else": (_bad("Backward", lambda self, step: (_square(step).backward(retain_graph=True), _square(step))[1]), ".grad"),
    "inputs-are-unchanged": (_bad("Writes", lambda self, step: (step.images.data.mul_(0.99), _square(step))[1]), "changes images"),
    "global-random-state-is-untouched": (_bad("Seeds", lambda self, step: (torch.manual_seed(0), _square(step))[1]), "global state of torch"),
    "same-seed-same-value": (_bad("Draws", lambda self, step: (torch.randn(step.images.shape, dtype=step.images.dtype) * step.images).sum()), "step.generator"),
    "linear-in-the-weight": (_HalvesLater, "weight"),
    "order-of-samples-within-a-class": (_bad("First", lambda self, step: step.images[0].square().sum(), order_invariant=True), "another order"),
    "what-it-requires-is-used": (_bad("Greedy", lambda self, step: _square(step), requires=ddkit.Requires(real=True, teacher=True, views=("default",))), "real, teacher, the view 'default'"),
    "gradients-of-parameters-are-declared": (_bad("Second", _second_order), "second_order=True"),
    "reduce-as-declared": (_bad("Mean", lambda self, step: step.images.square().mean().sqrt(), requires=ddkit.Requires(reduce="sum")), "reduce='sum'"),
    "gradcheck-in-float64": (_bad("Custom", lambda self, step: _Custom.apply(step.images)), "not the derivative"),
    "state-survives-save-and-load": (_Remembers, "step to step"),
}  # fmt: skip


SHARED = {"imports-without-a-gpu", "import-is-cheap", "is-of-its-kind", "options-survive-a-recipe", "deviations-are-of-checks"}


def suite_of(kind: str, component: Any, **members: Any) -> Conformance:
    """Returns the suite of a kind for a component, as an author's subclass would be."""
    found: Conformance = type("Mine", (testing.SUITES[kind],), {"component": component, **members})()
    return found


def problem_of(suite: Conformance, check: str) -> str:
    """Returns what the check says of the component, "" where it holds."""
    try:
        getattr(suite, type(suite).checks()[check])()
    except SkipTest:  # the import of a class
        assert check in ("import-is-cheap", "imports-without-a-gpu")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda self, step: step.images, "shape (6, 1, 8, 6)"),
        (lambda self, step: 1.0, "returns 1.0"),
        (lambda self, step: _square(step).detach(), "Avoid .detach()"),
        (lambda self, step: step.teacher.module, "Add teacher=True"),
        (lambda self, step: step.real.images.sum() + _square(step), "Add real=True"),
    ],
    ids=["no scalar", "no tensor", "detached", "undeclared teacher", "undeclared real images"],
)
def test_other_ways_to_return_the_wrong_thing(call: Callable[[Any, ddkit.Step], Any], reason: str) -> None:
    assert reason in problem_of(suite_of("loss", _bad("Wrong", call)), "returns-a-finite-scalar")


WRITES: dict[str, tuple[Callable[[ddkit.Step], Any], str]] = {
    "real images": (lambda step: step.real.images.mul_(2), "the real images"),
    "real labels": (lambda step: step.real.labels.zero_(), "the real labels"),
    "augmented real images": (lambda step: step.real.augmented.mul_(2), "the augmented real images"),
    "real embeddings": (lambda step: step.real.embeddings.mul_(0), "the real images' embeddings"),
    "labels": (lambda step: step.labels.zero_(), "the labels"),
    "teacher": (lambda step: step.teacher.module.classifier.bias.data.add_(1), "teacher classifier.bias"),
    "teacher's statistics": (lambda step: step.teacher.module.features[1].running_mean.add_(1), "the teacher"),
    "network": (lambda step: step.network.classifier.bias.data.add_(1), "network classifier.bias"),
}  # fmt: skip


@pytest.mark.parametrize("target", WRITES)
def test_a_loss_that_writes_to_anything_that_losses_share_is_found(target: str) -> None:
    write, reason = WRITES[target]

    def call(self: Any, step: ddkit.Step) -> Tensor:
        write(step)
        return _square(step)

    requires = ddkit.Requires(real=True, network=True, teacher=True)
    problem = problem_of(suite_of("loss", _bad("Writes", call, requires=requires)), "inputs-are-unchanged")
    assert reason in problem


def test_a_graph_of_gradients_is_seen_however_it_is_taken() -> None:
    from torch.autograd import grad

    def by_another_name(self: Any, step: ddkit.Step) -> Tensor:
        images = step.images
        return grad(images.pow(3).sum(), images, None, None, True)[0].square().sum()  # create_graph by its place

    silent = _bad("Silent", by_another_name)
    assert "Declare second_order=True" in problem_of(suite_of("loss", silent), "gradients-of-parameters-are-declared")
    honest = _bad("Honest", by_another_name, requires=ddkit.Requires(second_order=True))
    assert problem_of(suite_of("loss", honest), "gradients-of-parameters-are-declared") == ""


def test_declared_parameters_have_to_be_used() -> None:
    idle = ddkit.Requires(parameters={"extra": ddkit.Parameter()})
    forgets = _bad("Forgets", lambda self, step: _square(step) + 0 * len(step.parameters), requires=idle)
    assert "parameter 'extra'" in problem_of(suite_of("loss", forgets), "gradient-reaches-the-bank-and-nothing-else")


def test_a_zero_gradient_and_a_declared_graph_that_is_none_are_found() -> None:
    flat = _bad("Flat", lambda self, step: (step.images * 0).sum())
    assert "zero" in problem_of(suite_of("loss", flat), "gradient-reaches-the-bank-and-nothing-else")
    boast = _bad("Boast", lambda self, step: _square(step), requires=ddkit.Requires(second_order=True))
    assert "declares second_order=True" in problem_of(suite_of("loss", boast), "gradients-of-parameters-are-declared")


# Checks that all kinds share


def test_a_component_without_a_docstring_or_of_another_kind_is_found() -> None:
    silent = type("Silent", (ddkit.Loss,), {"__call__": lambda self, step: _square(step), "__doc__": None})
    assert "docstring" in problem_of(suite_of("loss", silent), "is-of-its-kind")
    assert "subclass" in problem_of(suite_of("loss", ddkit.Model), "is-of-its-kind")


def test_options_that_a_recipe_cannot_hold_are_found() -> None:
    class Odd(ddkit.Loss):
        """Odd."""

        table: Any = ddkit.option(None)

        def __call__(self, step: ddkit.Step) -> Tensor:
            return _square(step)

    assert problem_of(suite_of("loss", Odd, options={"table": {"a": (1, 2), "b": None}}), "options-survive-a-recipe")


HEAVY = "import time\nimport ddkit\n{}\n\n\nclass HeavyLoss(ddkit.Loss):\n    'Heavy.'\n\n    def __call__(self, step):\n        return step.images.sum()\n"


@pytest.fixture
def heavy(tmp_path: Path) -> Callable[[str], str]:
    """Returns a function that makes a loss whose module does something when another process imports it."""

    def make(line: str) -> str:
        file = tmp_path / f"heavy{len(line)}.py"
        file.write_text(HEAVY.format(f"import os\nif os.getpid() != {__import__('os').getpid()}:\n    {line}"))
        registry.add_plugin_file(file)
        return "heavy-loss"

    return make


@pytest.mark.usefixtures("forked_children")
@pytest.mark.parametrize(
    ("line", "check", "reason"),
    [
        ("time.sleep(2.5)", "import-is-cheap", "in addition to torch"),
        ("raise RuntimeError('no GPU')", "imports-without-a-gpu", "no GPU"),
    ],
)
def test_a_module_that_is_slow_or_fails_elsewhere_is_found(heavy: Callable[[str], str], line: str, check: str, reason: str) -> None:
    from ddkit.testing import suite

    suite._cost_of.cache_clear()
    try:
        assert reason in problem_of(suite_of("loss", heavy(line)), check)
    finally:
        suite._cost_of.cache_clear()
        registry.plugins.cache_clear()


# Losses that every part computes


def _spread(step: ddkit.Step, *, of_a_part: bool = False, nested: bool = False) -> Tensor:
    """Returns the variance of the images, from totals; `of_a_part` forgets the others, `nested` sums what depends on a total."""
    total = (lambda t: t) if of_a_part else step.all_reduce
    mean = total(step.images.sum(0)) / step.size
    if nested:
        return total((step.images - mean + 1).square().sum(0)).sum() / step.size
    return (total(step.images.square().sum(0)) / step.size - mean.square()).mean()


TOTAL = ddkit.Requires(reduce="global")


def test_a_loss_of_totals_passes_and_one_that_forgets_the_other_parts_does_not() -> None:
    for harm, told in (({}, ""), ({"of_a_part": True}, "in 2 parts"), ({"nested": True}, "The gradient of the loss")):
        loss = _bad("Spread", lambda self, step, harm=harm: _spread(step, **harm), requires=TOTAL)
        problem = problem_of(suite_of("loss", loss), "reduce-as-declared")
        assert told in problem, harm
        assert bool(told) == bool(problem), harm


def test_total_in_a_part_of_a_loss_that_does_not_declare_it_is_refused() -> None:
    loss = _bad("Sum", lambda self, step: step.all_reduce(_square(step)), requires=ddkit.Requires(reduce="sum"))
    assert 'Add reduce="global"' in problem_of(suite_of("loss", loss), "reduce-as-declared")


def test_rows_that_are_gathered_and_drawn_for_the_whole_set_are_those_of_one_part() -> None:
    def call(self: Any, step: ddkit.Step) -> Tensor:
        drawn = torch.rand(step.size, generator=step.generator, dtype=step.images.dtype)
        rows = step.all_gather(step.local_rows(drawn)[:, None] * step.images.flatten(1))
        return (rows @ rows.T).square().mean()

    assert problem_of(suite_of("loss", _bad("Gram", call, requires=TOTAL)), "reduce-as-declared") == ""


# Declared deviations


def test_a_deviation_from_a_check_that_is_none_is_refused() -> None:
    with pytest.raises(Broken, match="cannot name 'one-chanel'"):
        suite_of("loss", Good, deviations={"one-chanel": "a slip"})
    slip = _bad("Slip", lambda self, step: no_such_name, requires=ddkit.Requires(reduce="sum"))  # noqa: F821
    assert "NameError" in problem_of(suite_of("loss", slip, deviations={"reduce-as-declared": "meant"}), "reduce-as-declared")


def _odd(**members: Any) -> type[ddkit.Loss]:
    """Returns a loss whose gradient is zero, with `deviations` of its own."""
    return _bad("Odd", lambda self, step: (step.images * 0).sum(), **members)


REACH = "gradient-reaches-the-bank-and-nothing-else"


def test_a_component_declares_its_own_deviations_and_its_suite_may_add_some() -> None:
    assert "zero" in problem_of(suite_of("loss", _odd()), REACH)
    assert problem_of(suite_of("loss", _odd(), deviations={REACH: "for the test"}), REACH) == ""
    mine = _odd(deviations={REACH: "a constant, for the test"})
    assert problem_of(suite_of("loss", mine), REACH) == ""
    both = suite_of("loss", mine, deviations={REACH: "said twice", "one-channel": "holds"})
    assert both.reasons() == {REACH: "said twice", "one-channel": "holds"}
    assert problem_of(both, REACH) == ""
    assert "Remove it" in problem_of(both, "one-channel")


@pytest.mark.parametrize(
    ("deviations", "reason"),
    [
        ({"one-chanel": "a slip"}, "`deviations` of 'Odd' cannot name 'one-chanel'. Possible checks: "),
        ({"deviations-are-of-checks": "of itself"}, "cannot name 'deviations-are-of-checks'"),
        ({"one-channel": ""}, "must map names of checks to reasons"),
        ("one-channel", "must map names of checks to reasons"),
    ],
    ids=str,
)
def test_a_component_with_a_deviation_that_can_be_none_is_told(deviations: Any, reason: str) -> None:
    suite = suite_of("loss", _odd(deviations=deviations))
    assert reason in problem_of(suite, "deviations-are-of-checks")
    assert problem_of(suite, "one-channel") == "" or deviations == {"one-channel": ""}
    assert problem_of(suite_of("loss", Good), "deviations-are-of-checks") == ""


def test_an_observer_declares_deviations_too() -> None:
    fails = _Observer(step_finished=_fails_without_record)
    fails.deviations = {"every-hook-can-be-called": "for the test"}  # type: ignore[attr-defined]
    assert problem_of(suite_of("observer", fails), "every-hook-can-be-called") == ""


# Every kind: (kind, check) -> a component that breaks it, and the reason


class _Initializer(ddkit.Initializer):
    """Broken in one of its lines."""

    requires = ddkit.Requires(real=True)
    change: ClassVar[Callable[[ddkit.InitContext, Tensor], Tensor]] = staticmethod(lambda start, images: images)

    def __call__(self, start: ddkit.InitContext) -> Tensor:
        parts = [
            torch.randn((int(n), *start.shape), generator=start.generator(int(c)))
            for c, n in zip(*start.labels.unique(return_counts=True), strict=True)
        ]
        return type(self).change(start, torch.cat(parts))


def _initializer(change: Callable[[ddkit.InitContext, Tensor], Any]) -> type[ddkit.Initializer]:
    return type("Broken", (_Initializer,), {"change": staticmethod(change), "__doc__": "Broken."})


def _parametrization(**members: Any) -> type[ddkit.Parametrization]:
    whole = {"encode": lambda self, images, shared: images, "decode": lambda self, stored, shape, shared: stored}
    return type("Broken", (ddkit.Parametrization,), {"__doc__": "Broken.", "linear": True, "stores_images": True, **whole, **members})


class _Augmenter(ddkit.Augmenter):
    """Broken in one of its lines."""

    change: ClassVar[Callable[..., Tensor]] = staticmethod(lambda x, shift: x + shift)

    def sample(self, generator: torch.Generator, groups: int) -> dict[str, Tensor]:
        return {"shift": torch.rand(groups, generator=generator)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return type(self).change(x, parameters["shift"].to(x).view(-1, 1, 1, 1))


def _augmenter(change: Callable[[Tensor, Tensor], Any] = lambda x, shift: x + shift, **members: Any) -> type[ddkit.Augmenter]:
    return type("Broken", (_Augmenter,), {"change": staticmethod(change), "__doc__": "Broken.", **members})


def _evaluator(call: Callable[..., Any]) -> type[ddkit.Evaluator]:
    return type("Broken", (ddkit.Evaluator,), {"__doc__": "Broken.", "__call__": call})


def _evaluator_fails_where(condition: Callable[[ddkit.Artifact], bool]) -> type[ddkit.Evaluator]:
    def call(self: Any, artifact: ddkit.Artifact, data: ddkit.data.EvaluationData, teacher: Any) -> list[ddkit.Evaluation]:
        if condition(artifact):
            raise ValueError("cannot do that")
        return [_row()]

    return _evaluator(call)


def _row(**values: Any) -> ddkit.Evaluation:
    named = {"evaluator": "e", "model": "m", "protocol": "p", "labels": "hard", "repeats": 1, "accuracy_mean": 0.5, "accuracy_std": None}
    return ddkit.Evaluation(**{**named, **values})


def _model(build: Callable[[int, tuple[int, int], int], nn.Module]) -> type[ddkit.Model]:
    return type(
        "Broken", (ddkit.Model,), {"__doc__": "Broken.", "__call__": lambda self, channels, size, classes: build(channels, size, classes)}
    )


def _linear(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))


class _Hidden(nn.Module):
    """Keeps a tensor that is neither parameter nor buffer."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.scale = inside, torch.rand(())

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) * self.scale


class _Unused(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.spare = inside, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


class _OddFeatures(_Unused):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        del self.spare

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(0, 2)


class _FixedWeights(nn.Module):
    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels * size[0] * size[1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


class _Dataset(ddkit.Dataset):
    """Two classes of random images; broken in one of its methods."""

    @property
    def class_names(self) -> Sequence[str]:
        return ["a", "b"]

    def labels(self, split: str) -> Tensor:
        return torch.arange(6) % 2

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        return [torch.rand((1, 4, 4), generator=ddkit.generator(0, split, index)) for index in indices]

    def fingerprint(self) -> str:
        return "0" * 64


def _dataset(**members: Any) -> type[ddkit.Dataset]:
    return type("Broken", (_Dataset,), {"__doc__": "Broken.", **members})


def _exporter(call: Callable[..., Any]) -> type[ddkit.Exporter]:
    return type("Broken", (ddkit.Exporter,), {"__doc__": "Broken.", "__call__": call})


def _write(folder: str, content: bytes = b"x") -> None:
    (Path(folder) / "set.bin").write_bytes(content)


class _Observer:
    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, hook in hooks.items():
            setattr(self, name, ddkit.hookimpl(hook))


def _fails_without_record(record: Any) -> None:
    record["total"]  # is None where the step is not logged


BROKEN: dict[tuple[str, str], tuple[Any, str]] = {
    **{("loss", check): broken for check, broken in LOSSES.items()},
    ("initializer", "one-channel"): (_initializer(lambda start, images: images.double()), "float64"),
    ("initializer", "three-channels"): (_initializer(lambda start, images: images[:, :1]), "shape"),
    ("initializer", "images-that-are-not-square"): (_initializer(lambda start, images: images.transpose(2, 3)), "shape"),
    ("initializer", "one-image-a-class"): (_initializer(lambda start, images: (images - images.mean(0)) / images.unflatten(0, (3, -1)).var(1, correction=0).mean()), "finite"),
    ("initializer", "unbalanced-classes"): (_initializer(lambda start, images: images[: 3 * (len(images) // 3) - (start.labels.bincount().unique().numel() > 1)]), "shape"),
    ("initializer", "same-seed-same-images"): (_initializer(lambda start, images: images + torch.randn(images.shape)), "same seed"),
    ("initializer", "a-class-does-not-depend-on-others"): (_initializer(lambda start, images: images - images.mean(0)), "made alone"),
    ("initializer", "inputs-are-unchanged"): (_initializer(lambda start, images: start.real_images[: len(images)]), "real images"),
    ("parametrization", "one-channel"): (_parametrization(decode=lambda self, stored, shape, shared: stored[:, :1].double()), "float64"),
    ("parametrization", "three-channels"): (_parametrization(decode=lambda self, stored, shape, shared: stored[:, :1]), "(2, 1, 12, 12)"),
    ("parametrization", "images-that-are-not-square"): (_parametrization(decode=lambda self, stored, shape, shared: stored.transpose(2, 3)), "(2, 3, 18, 12)"),
    ("parametrization", "one-row"): (_parametrization(decode=lambda self, stored, shape, shared: stored / stored.std(0, correction=0)), "finite"),
    ("parametrization", "it-keeps-to-the-budget"): (_parametrization(images_per_class=lambda self, ipc: 2 * ipc), "12 images have"),
    ("parametrization", "a-row-depends-on-its-own-images-only"): (_parametrization(decode=lambda self, stored, shape, shared: stored - stored.mean(0)), "if other rows are present"),
    ("parametrization", "encodes-near-images"): (_parametrization(encode=lambda self, images, shared: -images), "encodes images badly"),
    ("parametrization", "flags-as-declared"): (_parametrization(decode=lambda self, stored, shape, shared: stored.tanh()), "linear"),
    ("parametrization", "gradients-reach-every-number"): (_parametrization(decode=lambda self, stored, shape, shared: stored.detach() + 0 * stored), "do not depend"),
    ("parametrization", "inputs-are-unchanged"): (_parametrization(decode=lambda self, stored, shape, shared: stored.mul_(1.5)), "rows"),
    ("augmenter", "one-channel"): (_augmenter(lambda x, shift: x[:, :, 1:]), "(5, 1, 7, 8)"),
    ("augmenter", "three-channels"): (_augmenter(lambda x, shift: x.mean(1, keepdim=True)), "(5, 1, 8, 8)"),
    ("augmenter", "images-that-are-not-square"): (_augmenter(lambda x, shift: x.transpose(2, 3)), "(5, 3, 11, 6)"),
    ("augmenter", "one-image"): (_augmenter(lambda x, shift: x / x.std(0, correction=0)), "not finite"),
    ("augmenter", "parameters-have-a-row-each"): (_augmenter(sample=lambda self, generator, groups: {"shift": torch.rand(1, generator=generator)}), "'shift' without one row"),
    ("augmenter", "same-seed-same-draw"): (_augmenter(sample=lambda self, generator, groups: {"shift": torch.rand(groups)}), "same generator"),
    ("augmenter", "a-row-depends-on-its-own-parameters-only"): (_augmenter(lambda x, shift: x + shift.cumsum(0)), "a row that is moved"),
    ("augmenter", "rowwise-as-declared"): (_augmenter(lambda x, shift: x + shift.mean(), rowwise=True), "rowwise"),
    ("augmenter", "gradients-pass"): (_augmenter(lambda x, shift: x.detach() + shift + 0 * x.sum()), "gradient"),
    ("augmenter", "inputs-are-unchanged"): (_augmenter(lambda x, shift: x.add_(shift)), "images"),
    ("evaluator", "returns-rows-of-fractions"): (_evaluator(lambda self, artifact, data, teacher: [_row(accuracy_mean=81.3)]), "accuracy_mean=81.3"),
    ("evaluator", "one-channel"): (_evaluator_fails_where(lambda artifact: artifact.images.shape[1] == 1), "cannot do that"),
    ("evaluator", "three-channels"): (_evaluator_fails_where(lambda artifact: artifact.images.shape[1] == 3), "cannot do that"),
    ("evaluator", "images-that-are-not-square"): (_evaluator_fails_where(lambda artifact: artifact.images.shape[3] == 12), "cannot"),
    ("evaluator", "same-seed-same-result"): (_evaluator(lambda self, artifact, data, teacher: [_row(accuracy_mean=float(torch.rand(())))]), "another accuracy"),
    ("evaluator", "inputs-are-unchanged"): (_evaluator(lambda self, artifact, data, teacher: (np.random.seed(0), [_row()])[1]), "global state of numpy"),
    ("model", "one-channel"): (_model(lambda c, size, k: _linear(c, size, k + 1)), "logits of shape"),
    ("model", "three-channels"): (_model(lambda c, size, k: _linear(1, size, k)), "shape"),
    ("model", "images-that-are-not-square"): (_model(lambda c, size, k: _linear(c, (size[0], size[0]), k)), "shape"),
    ("model", "one-image"): (_model(lambda c, size, k: nn.Sequential(_linear(c, size, k), nn.BatchNorm1d(k).train(), _Trains())), "more than 1 value"),
    ("model", "draws-its-weights-from-the-default-generator"): (_model(_FixedWeights), "same weights"),
    ("model", "features-have-a-row-an-image"): (_model(lambda c, size, k: _OddFeatures(_linear(c, size, k))), "(3, d)"),
    ("model", "gradients-reach-images-and-parameters"): (_model(lambda c, size, k: _Unused(_linear(c, size, k))), "do not depend"),
    ("model", "state-survives-save-and-load"): (_model(lambda c, size, k: _Hidden(_linear(c, size, k))), "Register every tensor"),
    ("dataset", "labels-fit-the-class-names"): (_dataset(labels=lambda self, split: torch.arange(6) % 3), "0..1"),
    ("dataset", "images-are-of-the-documented-kind"): (_dataset(images=lambda self, split, indices: [torch.rand(1, 4, 4) * 255 for _ in indices]), "outside 0..1"),
    ("dataset", "images-come-in-the-order-asked-for"): (_dataset(images=lambda self, split, indices: _Dataset.images(self, split, sorted(indices))), "order"),
    ("dataset", "the-same-every-time"): (_dataset(fingerprint=lambda self: str(random.random())), "opened again"),
    ("dataset", "sources-name-every-image"): (_dataset(sources=lambda self, split, indices: ["one file"] * len(indices)), "sources"),
    ("dataset", "files-are-there"): (_dataset(files=lambda self, split, indices: ["/no/such.png"] * len(indices)), "absolute path of a file"),
    ("dataset", "global-random-state-is-untouched"): (_dataset(images=lambda self, split, indices: [torch.rand(1, 4, 4) for _ in indices]), "global state of torch"),
    ("exporter", "writes-into-the-folder-and-changes-nothing"): (_exporter(lambda self, artifact, folder: None), "no file"),
    ("exporter", "same-set-same-files"): (_exporter(lambda self, artifact, folder: _write(folder, str(random.random()).encode())), "other bytes"),
    ("observer", "is-of-its-kind"): (_Observer(), "no hook"),
    ("observer", "every-hook-can-be-called"): (_Observer(step_finished=_fails_without_record), "NoneType"),
}  # fmt: skip


class _Trains(nn.Module):
    """Stays in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(("kind", "check"), BROKEN, ids=lambda value: value)
def test_a_broken_component_fails_its_check_with_the_reason(kind: str, check: str) -> None:
    component, reason = BROKEN[kind, check]
    assert reason in problem_of(suite_of(kind, component), check)


GOOD: dict[str, Any] = {
    "loss": Good,
    "initializer": _initializer(lambda start, images: images),
    "parametrization": _parametrization(),
    "augmenter": _augmenter(),
    "evaluator": _evaluator(lambda self, artifact, data, teacher: [_row()]),
    "model": _model(_linear),
    "dataset": _dataset(),
    "exporter": _exporter(lambda self, artifact, folder: _write(folder)),
    "observer": _Observer(step_finished=lambda index, record: None),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_component_passes_every_check_of_its_kind(kind: str) -> None:
    suite = suite_of(kind, GOOD[kind])
    assert {check: problem for check in suite.checks() if (problem := problem_of(suite, check))} == {}


def test_every_check_of_every_kind_has_a_broken_component() -> None:
    for kind, suite in testing.SUITES.items():
        assert set(suite.checks()) - SHARED == {check for known, check in BROKEN if known == kind} - SHARED, kind


def test_a_dataset_whose_test_images_cannot_be_had_is_found() -> None:
    def images(self: Any, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        if split == "test":
            raise OSError("gone")
        return _Dataset.images(self, split, indices)

    assert "gone" in problem_of(suite_of("dataset", _dataset(images=images)), "images-are-of-the-documented-kind")


# The command


@pytest.mark.usefixtures("forked_children")
def test_the_command_takes_options_by_path(cli: Callable[..., Any]) -> None:
    flags = ("epochs=2", "repeats=1", "model_options.width=4")
    result = cli("check", "evaluator", "accuracy", *(part for flag in flags for part in ("--set", flag)))
    assert result.code == 0, result.out + result.err


@pytest.mark.usefixtures("forked_children")
def test_the_command_lists_every_check_and_ends_with_zero(cli: Callable[..., Any]) -> None:
    result = cli("check", "image-norm")
    assert result.code == 0, result.out
    assert "22 of 22 checks hold" in result.out
    rows = json.loads(cli("check", "loss", "image-norm", "--json").out)
    assert (rows["schema"], rows["kind"], rows["name"]) == (1, "loss", "image-norm")
    assert [row["check"] for row in rows["checks"]] == sorted(testing.LossConformance.checks())
    assert {row["status"] for row in rows["checks"]} == {"ok"}


@pytest.mark.usefixtures("forked_children")
def test_the_command_says_what_is_broken_and_ends_with_one(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "import ddkit\n\n\nclass Detached(ddkit.Loss):\n    'Bad.'\n\n    def __call__(self, step):\n        return step.images.detach().sum()\n"
    )
    result = cli("check", "--plugin", file, "detached")
    assert result.code == 1
    assert "broken    returns-a-finite-scalar" in result.out
    assert "detached" in result.out
    assert "ok        is-of-its-kind" in result.out


DEVIATES = '''"""Mine."""

import ddkit


class Declares(ddkit.Loss):
    """Gradient zero, on purpose."""

    deviations = {deviations}

    def __call__(self, step):
        return (step.images * 0).sum()
'''


@pytest.mark.usefixtures("forked_children")
def test_the_command_shows_a_declared_deviation_with_its_reason_and_ends_with_zero(cli: Callable[..., Any], tmp_path: Path) -> None:
    reason = "a constant, for the test"
    file = tmp_path / "declares.py"
    file.write_text(DEVIATES.format(deviations=json.dumps({REACH: reason})))
    result = cli("check", "--plugin", file, "declares")
    assert result.code == 0, result.out
    assert f"deviates  {REACH}\n          {reason}\n" in result.out
    assert "21 of 22 checks hold, 1 deviates on purpose" in result.out
    rows = {row["check"]: row for row in json.loads(cli("check", "--plugin", file, "declares", "--json").out)["checks"]}
    assert rows[REACH] == {"check": REACH, "status": "deviates", "problem": "", "reason": reason}
    assert rows["one-channel"] == {"check": "one-channel", "status": "ok", "problem": "", "reason": ""}


# Observers


def test_a_trace_tells_every_call_with_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {flag.split("=")[0]: json.loads(flag.split("=")[1]) for flag in SMALL_FLAGS[1::2]}

    def distil(folder: str) -> list[str]:
        ddkit.distill(
            losses="image-norm", evaluators="none", sets=sets | {"steps": 2}, out=tmp_path / folder,
            observers=[_Observer(step_finished=lambda index: None)],
        )  # fmt: skip
        return [line for line in capsys.readouterr().err.splitlines() if line.endswith(" ms")]

    assert distil("without") == []
    monkeypatch.setenv("DDKIT_TRACE", "1")
    lines = [line for line in distil("with") if "observer 0" in line]
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["step_finished observer 0"] * 2
    assert all(float(line.split()[-2]) >= 0 for line in lines)
