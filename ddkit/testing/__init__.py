"""Conformance suites: what every component of a kind has to keep, as tests that an author subclasses in one line.

    from ddkit.testing import LossConformance

    class TestMine(LossConformance):
        component = "my-loss"

pytest finds the checks by their names; without pytest, `ddkit check my-loss` runs the same ones.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import msgspec

from ddkit.errors import DdkitError, FlagError
from ddkit.testing.kinds import (
    AugmenterConformance,
    DatasetConformance,
    EvaluatorConformance,
    ExporterConformance,
    InitializerConformance,
    ModelConformance,
    ObserverConformance,
    ParametrizationConformance,
)
from ddkit.testing.losses import LossConformance
from ddkit.testing.suite import Broken, Conformance

__all__ = [
    "SUITES",
    "AugmenterConformance",
    "Broken",
    "Conformance",
    "DatasetConformance",
    "EvaluatorConformance",
    "ExporterConformance",
    "InitializerConformance",
    "LossConformance",
    "ModelConformance",
    "ObserverConformance",
    "Outcome",
    "ParametrizationConformance",
    "check",
]

SUITES: dict[str, type[Conformance]] = {
    suite.kind: suite
    for suite in (
        LossConformance, InitializerConformance, ParametrizationConformance, AugmenterConformance, EvaluatorConformance,
        ModelConformance, DatasetConformance, ExporterConformance, ObserverConformance,
    )
}  # fmt: skip


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one check said: `problem` is "" where it holds; `place` is where in the code an exception came from.

    `reason` is why the component does not pass it on purpose, "" where it declares no deviation.
    """

    check: str
    problem: str
    place: str = ""
    reason: str = ""

    @property
    def status(self) -> str:
        """Returns "broken", "deviates" (as declared) or "ok"."""
        return "broken" if self.problem else "deviates" if self.reason else "ok"


def check(kind: str, name: str, options: Mapping[str, Any] | None = None, *, directory: str | None = None) -> list[Outcome]:
    """Returns the outcome of every check of the component, in order of name; raises DdkitError where it cannot be built.

    `options` are the component's; `directory` is where a dataset that downloads keeps its files.
    """
    from ddkit.components import registry

    if kind not in SUITES:
        raise FlagError(f"There is no conformance suite for a {kind}. There is one for {', '.join(SUITES)}.")
    registry.load(kind, registry.split_name(name)[0])
    suite: type[Conformance] = type("Checked", (SUITES[kind],), {"component": name, "options": dict(options or {}), "directory": directory})
    suite().prepare()
    return [_outcome(suite(), label, method) for label, method in suite.checks().items()]


def _outcome(suite: Conformance, label: str, method: str) -> Outcome:
    place = ""
    try:
        getattr(suite, method)()
        return Outcome(check=label, problem="", reason=suite.reasons().get(label, ""))
    except (Broken, DdkitError) as error:
        said = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said = f"{type(error).__name__}: {error}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}, line {last.lineno}"
    return Outcome(check=label, problem=" ".join(said.split()), place=place)
