"""The first compilation on a CPU in less time: torch writes code with less work, and goes on while it is compiled.

torch 2.14 has sympy simplify every index of a kernel, which is a third of its own time. It calls the C++ compiler for each kernel, most of
whose time is the header's, and waits for all kernels of a graph. Here the step of a linear index is read off its terms, the gradient of
average pooling has simple indices, the kernels of a graph are compiled together, and each is waited for when it is first called. torch
looks at the backward graph while the kernels of the forward graph are compiled. The header is made while torch looks at the network.
"""

from __future__ import annotations

import contextvars
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = "2.14."  # the version of torch that this is for; others are left as they are
TOGETHER = 16  # kernels that one call of the C++ compiler takes: half a second of a call is the header's, and 0.2 s each kernel's
HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>"
KERNEL = re.compile(rf'\s*{re.escape(HEADER)}\s*extern "C"\s+void\s+kernel(\(.*)', re.DOTALL)


class Kernel:
    """A kernel as Python calls it: `types` are those of its arguments in C++, `code` is what follows its name."""

    def __init__(self, types: Sequence[str], code: str) -> None:
        self.types = types
        self.code = code
        self.load: Callable[[], Any] | None = None

    def __call__(self, *arguments: Any) -> None:
        load = self.load
        if load is not None:  # the first call
            self.call = load()
            self.load = None
        self.call(*arguments)


@cache
def hasten(**options: Any) -> None:
    """Makes torch compile so in this process, if it has no GPU; `options` are those that it will compile with."""
    import torch

    if torch.cuda.is_available() or not torch.__version__.startswith(KNOWN):
        return
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # else torch starts processes that compile for a GPU
    from torch._decomp import register_decomposition
    from torch._functorch import config as graphs
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen import cpp
    from torch._inductor.decomposition import decompositions

    alone, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

    def cpp_pybinding(self: Any, types: Sequence[str], source: str) -> Any:
        found = KERNEL.fullmatch(source)
        if found is None or len(re.findall(r"\bkernel\(", source)) > 1:
            return alone(self, list(types), source)
        kernel = Kernel(types, found[1])
        self.__dict__.setdefault("joined", []).append(kernel)
        return kernel

    def wait_for_others(self: Any, scope: dict[str, Any]) -> None:
        join(self.__dict__.pop("joined", []))
        wait(self, scope)

    AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[assignment,method-assign]
    AsyncCompile.wait = wait_for_others  # type: ignore[method-assign]
    cpp.stride_at_vec_range = quick_stride(cpp.stride_at_vec_range)  # type: ignore[assignment,attr-defined]
    register_decomposition(torch.ops.aten.avg_pool2d_backward, registry=decompositions)(spread_over_tiles)
    graphs.force_non_lazy_backward_lowering = True
    config.aot_inductor.enable_line_tables = False  # nobody debugs the kernels

    def make_header() -> None:
        with suppress(Exception):
            module_of([Kernel([], "() {}")])

    with suppress(Exception), config.patch(options):  # a compiler that is missing is reported when code is compiled
        cpu_vec_isa.pick_vec_isa()  # not in the thread: torch does not expect several
        threading.Thread(target=contextvars.copy_context().run, args=(make_header,), daemon=True).start()


def quick_stride(slow: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that finds the step of an index by a variable as torch's `slow` does: from the terms that have the variable, and
    without it if they are linear.
    """
    import sympy  # type: ignore[import-untyped]

    def stride(index: Any, variable: Any, vec_length: int | None = None) -> Any:
        terms = [term for term in sympy.Add.make_args(index) if term.has(variable)]
        factors = [term.as_coeff_Mul() for term in terms]
        if all(rest == variable for _, rest in factors):
            return sympy.Add(*(factor for factor, _ in factors))
        return slow(sympy.Add(*terms), variable, vec_length)

    return stride


def spread_over_tiles(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> Tensor:
    """Returns the gradient of average pooling by x (n, C, H, W) if its windows are tiles of x, else leaves it to torch.

    torch's own code looks at each pixel for the windows that it may be in, with indices that take sympy seconds.
    """
    import torch

    high, wide = kernel_size
    tiled = list(stride or kernel_size) == [high, wide] and not any(padding) and divisor_override is None
    if not tiled or x.ndim != 4 or x.shape[2] % high or x.shape[3] % wide:
        return NotImplemented
    last = x.is_contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = grad.shape
    tiles = (grad / (high * wide))[:, :, :, None, :, None].expand(rows, channels, height, high, width, wide)
    return tiles.reshape(x.shape).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def join(kernels: Sequence[Kernel]) -> None:
    """Has the kernels of a graph compiled in the background, several together."""
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    for first in range(0, len(kernels), TOGETHER):
        own = kernels[first : first + TOGETHER]
        module = module_of(own, AsyncCompile.pool().submit if get_compile_threads() > 1 else None)
        for number, kernel in enumerate(own):
            kernel.load = partial(_function, module, number)


def _function(module: Callable[[], Any], number: int) -> Callable[..., None]:
    return partial(module().kernel, number)


def module_of(kernels: Sequence[Kernel], submit: Callable[..., Any] | None = None) -> Callable[[], Any]:
    """Returns what waits for the code of `kernels` and gives it as a module, whose function `kernel` takes a number and its arguments.

    `submit` has it compiled in the background. The header is made before this returns.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    functions, cases = [HEADER], []
    for number, kernel in enumerate(kernels):
        arguments = (f"parse_arg<{each.replace('const ', '')}>(args, {place})" for place, each in enumerate(kernel.types, start=1))
        functions.append(f"static void kernel_{number}{kernel.code}")
        cases.append(f"case {number}: kernel_{number}({', '.join(arguments)});")
    call = f"switch (parse_arg<int64_t>(args, 0)) {{ {' break; '.join(cases)} }} Py_RETURN_NONE;"
    binding = Cache.suffix_template.format(
        entry_func=Cache.entry_function, arg_len="PyTuple_GET_SIZE(args)", call_entry_func=call, extra_parse_arg=""
    )

    def begin(work: Callable[[], None]) -> None:  # gives no future: who calls a kernel waits for the lock of its file, in a fork too
        assert submit is not None
        submit(work)

    found: Callable[[], Any] = Cache.load_async("\n".join(functions) + binding, submit_fn=submit and begin)
    return found
