"""Compile or not: what is decided from the work ahead, and networks compiled if torch can."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec

from ddkit.cache import passing_folder, private_folder
from ddkit.components.options import check_fields
from ddkit.errors import NEWS, RunFilesError, out_of_memory
from ddkit.nn.first_compilation import hasten

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
log = logging.getLogger("ddkit")

# Work, in floating-point operations, from which compiling pays back, by device. What it saves and costs was measured with
# `ddkit bench` on 2 CPU cores (docs/explanation/performance.md). The figure for GPUs is an estimate: nobody has measured it yet.
PAYS_BACK = {"cpu": 4e12, "cuda": 1e15}
# Operations of one step below which a GPU waits for launches, so that CUDA graphs are recorded: an estimate too.
LAUNCH_BOUND = 5e11
# torch compiles a trial program for each vector instruction set of the processor, 7 s with an empty cache. A compiler that can compile
# torch's headers (C++20) knows all of them, and AMX and bfloat16 are tried anyway, which takes 1 s.
OPTIONS = {"cpp.vec_isa_ok": True}


class Arithmetic(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a network is compiled, its precision, and whether CUDA graphs are recorded on a GPU.

    Examples:
        >>> ddkit.nn.Arithmetic(compile=True, precision="bfloat16").dtype
        torch.bfloat16
    """

    compile: bool
    precision: Literal["float32", "tf32", "bfloat16"]
    graphs: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def dtype(self) -> torch.dtype:
        """The autocast type of the network: bfloat16, or float32 for none."""
        import torch

        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def decide_arithmetic(compile_: bool | str, precision: str, device: torch.device, *, work: float, step_work: float = 0.0) -> Arithmetic:
    """Returns the arithmetic for `work` floating-point operations in all, `step_work` of them between two updates.

    `compile_` is True, False, or "auto" to compile only if it saves time. `precision` "auto" is bfloat16 if the
    network is compiled and the hardware multiplies bfloat16 natively, else float32. Depends on nothing else: no timing.

    Examples:
        >>> ddkit.nn.decide_arithmetic("auto", "auto", torch.device("cpu"), work=1e6).compile
        False
    """
    compiles = work > PAYS_BACK.get(device.type, float("inf")) if compile_ == "auto" else bool(compile_)
    if precision == "auto":
        precision = "bfloat16" if compiles and native_bfloat16(device) else "float32"
    graphs = compiles and device.type == "cuda" and step_work < LAUNCH_BOUND
    return Arithmetic(compile=compiles, precision=precision, graphs=graphs)  # type: ignore[arg-type]  # another word is refused there


def native_bfloat16(device: torch.device) -> bool:
    """Returns whether bfloat16 products are faster than float32 ones on `device` by hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def compiled(module: Callable[..., T], *, wanted: bool, graphs: bool = False, static: bool = False) -> Callable[..., T]:
    """Returns a compiled `module` if wanted and possible, else `module`; a warning says that it was not possible.

    With `graphs` CUDA graphs are recorded. With `static` the code is for inputs of one shape, and compiled again for another shape.

    Compiled code and precompiled headers are kept in the private part of ddkit's cache, unless TORCHINDUCTOR_CACHE_DIR names another
    folder. torch unpickles files of that folder, and its own default may belong to another user. So if the cache is not private, the code
    is compiled for this process only.

    Examples:
        >>> module = torch.nn.Linear(2, 2)
        >>> ddkit.nn.compiled(module, wanted=False) is module
        True
    """
    if not wanted:
        return module
    import torch

    get_ready()
    options = OPTIONS | ({"triton.cudagraphs": True} if graphs else {})
    return Compiled(module, torch.compile(module, options=options, dynamic=False if static else None))  # type: ignore[arg-type]


def get_ready() -> None:
    """Says where compiled code is kept, and has what all of it needs made in the background: a run calls it as soon as it will compile."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it reports that there is no CUDA, which nobody asked
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            folder = private_folder("compile")
        except RunFilesError as error:
            log.warning("Compiled code is not kept for later runs. %s", error, extra=NEWS)
            folder = passing_folder()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    from torch._inductor import codecache

    codecache._HEADER_DIR = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "precompiled_headers")  # in the shared /tmp otherwise
    hasten(**OPTIONS)


class Compiled(Generic[T]):
    """A compiled function that goes on uncompiled, and says so once, where torch cannot compile it here.

    `failed`: whether that happened.
    """

    def __init__(self, plain: Callable[..., T], fast: Callable[..., T]) -> None:
        self.plain = plain
        self.fast = fast
        self.failed = False

    def __call__(self, *arguments: Any) -> T:
        if self.failed:
            return self.plain(*arguments)
        try:
            return self.fast(*arguments)
        except Exception as error:  # torch.compile needs a C++ compiler and raises many kinds
            if out_of_memory(error):
                raise
            result = self.plain(*arguments)  # an error of the module itself shows as such
            log.warning("torch.compile failed (%s). The run continues without compiled code.", type(error).__name__)
            self.failed = True
            return result


def is_compiled(forward: Callable[..., Any]) -> bool:
    """Returns whether the result of compiled() runs compiled code: it was wanted, and torch could compile it.

    Examples:
        >>> ddkit.nn.is_compiled(ddkit.nn.compiled(torch.nn.Linear(2, 2), wanted=False))
        False
    """
    return isinstance(forward, Compiled) and not forward.failed
