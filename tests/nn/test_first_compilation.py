"""Kernels that are compiled together and in the background are those that torch makes."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch._inductor.sizevars import stride_at_vec_range
from torch.nn import functional
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ddkit.nn.compiling import OPTIONS
from ddkit.nn.first_compilation import KNOWN, Kernel, hasten, join, quick_stride, spread_over_tiles

pytestmark = pytest.mark.skipif(not torch.__version__.startswith(KNOWN), reason="another version of torch is left as it is")
X, Y = sympy.symbols("d0 d1", integer=True, nonnegative=True)


@pytest.mark.parametrize(
    ("index", "slowly"),
    [
        (X, 0), (X + 128 * Y, 0), (sympy.Integer(7), 0), (32 * (X + 4 * Y) + 1, 0),
        (FloorDiv(Y, 3) + 8 * X, 0), (ModularIndexing(Y, 1, 32), 0), (FloorDiv(X, 16) + Y, 1), (ModularIndexing(X, 1, 32) + 64 * Y, 1),
        (X * Y, 1),
    ],
)  # fmt: skip
def test_the_step_of_an_index_is_torchs_and_a_linear_one_needs_no_simplifying(index: Any, slowly: int) -> None:
    asked = []

    def slow(*arguments: Any) -> Any:
        asked.append(arguments)
        return stride_at_vec_range(*arguments)

    for length in (None, 16):
        assert quick_stride(slow)(index, X, length) == stride_at_vec_range(index, X, length)
    assert len(asked) == 2 * slowly


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_average_pooling_over_tiles_is_torchs_in_its_layout(layout: torch.memory_format) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 4, 6), generator=draw).contiguous(memory_format=layout)
    grad = torch.randn((2, 3, 2, 2), generator=draw)
    options: list[Any] = [(2, 3), (), (0, 0), False, True, None]
    found = spread_over_tiles(grad, x, *options)
    assert torch.equal(found, torch.ops.aten.avg_pool2d_backward(grad, x, *options))
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "options",
    [((2, 2), (1, 1), (0, 0), False, True, None), ((2, 2), (), (1, 1), False, True, None), ((2, 2), (), (0, 0), False, True, 3)],
)
def test_average_pooling_over_windows_that_are_no_tiles_is_left_to_torch(options: Any) -> None:
    for size in ((2, 3, 4, 4), (2, 3, 5, 5), (3, 4, 4)):
        x = torch.zeros(size)
        assert spread_over_tiles(functional.avg_pool2d(x, *options), x, *options) is NotImplemented
    assert spread_over_tiles(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 5, 4), (2, 2), (), (0, 0), False, True) is NotImplemented


def test_each_kernel_of_several_in_one_module_gets_its_own_arguments() -> None:
    hasten(**OPTIONS)
    adds = Kernel(["float*", "const float*"], "(float* out, const float* x) { out[0] += x[0]; }")
    times = Kernel(["float*", "const int64_t"], "(float* out, const int64_t x) { out[0] *= x; }")
    third = Kernel(["float*"], "(float* out) { out[0] -= 1; }")
    join([adds, times, third])
    value = torch.tensor([2.0])
    adds(value, torch.tensor([3.0]))
    times(value, 4)
    third(value)
    assert value.tolist() == [19.0]
    with pytest.raises(RuntimeError, match="expected int arg"):
        times(value, "4")
