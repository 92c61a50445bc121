"""What Python code gives to ddkit's records is held to what they say, as a recipe's values are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import ddkit


class Power(ddkit.Loss):
    power: float = ddkit.option(1.0, "exponent", gt=0)


def evaluation(**values: Any) -> ddkit.Evaluation:
    usual = {"evaluator": "a", "model": "m", "protocol": "p", "labels": "hard", "repeats": 1, "accuracy_mean": 0.5, "accuracy_std": None}
    return ddkit.Evaluation(**usual | values)


def info(**values: Any) -> ddkit.DataInfo:
    return ddkit.DataInfo(**{"class_names": ("a", "b"), "channels": 3, "size": (8, 8)} | values)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ddkit.nn.Schedule(epochs=1, optimizer="adamm"), "Did you mean 'adam'?"),  # type: ignore[arg-type]
        (lambda: ddkit.nn.Schedule(epochs=1, schedule="one_cycle"), "Did you mean 'one-cycle'?"),  # type: ignore[arg-type]
        (lambda: ddkit.nn.Schedule(epochs=0), "epochs=0"),
        (lambda: ddkit.nn.Schedule(epochs=1, batch=0), "batch=0"),
        (lambda: ddkit.nn.Schedule(epochs=1, lr=-0.1), "lr=-0.1"),
        (lambda: ddkit.nn.Schedule(epochs=1, weight_decay=math.inf), "weight_decay"),
        (lambda: ddkit.Parameter(per="samples"), "Did you mean 'sample'?"),  # type: ignore[arg-type]
        (lambda: ddkit.Parameter(shape=(0,)), "shape"),
        (lambda: ddkit.Parameter(lr=-1), "lr=-1"),
        (lambda: ddkit.Requires(reduce="globally"), "Did you mean 'global'?"),  # type: ignore[arg-type]
        (lambda: ddkit.Requires(views="default"), "views='default'"),  # type: ignore[arg-type]
        (lambda: ddkit.Requires(reduce="global", parameters={"scale": ddkit.Parameter(per="set")}), "would be counted twice"),
        (lambda: info(size=(0, 8)), "size"),
        (lambda: info(class_names="ab"), "class_names"),
        (lambda: evaluation(accuracy_mean=81.2), "accuracy_mean=81.2"),
        (lambda: evaluation(accuracy_mean=math.nan), "accuracy_mean=nan"),
        (lambda: evaluation(random_real_std=-0.1), "random_real_std=-0.1"),
        (lambda: ddkit.data.Normalisation([0.5], [0.0]), "above 0"),
        (lambda: ddkit.data.Normalisation([0.5, 0.5], [0.2]), "each channel needs"),
        (lambda: ddkit.nn.Arithmetic(compile=False, precision="bf16"), "Did you mean 'bfloat16'?"),  # type: ignore[arg-type]
    ],
)
def test_values_that_are_none_are_refused_where_they_are_given(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"\w+[(:]") as refused:
        make()
    assert said in str(refused.value)


def test_options_of_a_component_are_held_to_what_its_class_says() -> None:
    assert Power().power == Power.power == 1.0
    for wrong in ({"power": -1.0}, {"power": "many"}, {"powr": 2.0}):
        with pytest.raises(ddkit.InputError, match=r"Power: .*pow"):
            Power(**wrong)  # type: ignore[arg-type]


def test_values_that_are_right_are_kept_as_they_are() -> None:
    assert ddkit.nn.Schedule(epochs=2, optimizer="adam", lr=1).optimizer == "adam"
    assert ddkit.Parameter((2, 3), per="set", constraint="nonnegative").shape == (2, 3)
    assert info().shape == (3, 8, 8)
    assert evaluation(accuracy_mean=None, details={"any": object}).accuracy_mean is None
    assert Power(power=2).power == 2


def test_an_evaluator_that_gives_percents_is_named() -> None:
    from ddkit.components.guard import blamed

    with pytest.raises(ddkit.RunFailed, match=r"evaluator 'Evaluator'.*accuracy_mean=81.2"), blamed("evaluator", ddkit.Evaluator()):
        evaluation(accuracy_mean=81.2)
