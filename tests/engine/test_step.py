"""What a loss declares, and what its step offers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result

OLD = {
    'separable="total"': 'write reduce="global" in the place of separable="total"',
    "separable=None": "write reduce=None in the place of separable=None",
    "embedder=True": "write network=True in the place of embedder=True",
    "network_gradients=True": "write network=True, second_order=True",
    "teacher=True, teacher_gradients=True": "write teacher=True, second_order=True",
}


@pytest.mark.parametrize("given", OLD)
def test_a_requirement_of_version_01_is_refused_with_the_line_to_write(cli: Callable[..., Result], given: str) -> None:
    Path("old.py").write_text(
        f'import ddkit\nclass Old(ddkit.Loss):\n    """Old."""\n    requires = ddkit.Requires({given})\n'
        "    def __call__(self, step):\n        return step.images.sum()\n"
    )
    result = cli("distill", "--plugin", "old.py", "--losses", "old", "--out", "run")
    assert (result.code, result.out) == (3, "")
    assert OLD[given] in " ".join(result.err.split())
    assert "old.py" in result.err
    assert "Traceback" not in result.err
