"""How networks are computed: on which device, in which precision, compiled or plain."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import msgspec

from ddkit.components.options import check_fields
from ddkit.errors import FlagError, RunFilesError, out_of_memory
from ddkit.files import passing_folder, private_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger("ddkit")

# Work, in floating-point operations, from which compiling pays back, by device. What it saves and costs was measured with
# `ddkit bench` on 2 CPU cores (docs/performance.md). The figure for GPUs is an estimate: nobody has measured it yet.
PAYS_BACK = {"cpu": 4e12, "cuda": 1e15}
# Operations of one step below which a GPU waits for launches, so that CUDA graphs are recorded: an estimate too.
LAUNCH_BOUND = 5e11


class Arithmetic(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided: whether a network is compiled, its precision, and on a GPU whether CUDA graphs are recorded."""

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

    `compile_` is True, False or "auto": where the work pays compilation back. `precision` "auto" is bfloat16 where the
    network is compiled and the hardware multiplies bfloat16 natively, else float32. Depends on nothing else: no timing.
    """
    compiles = work > PAYS_BACK.get(device.type, float("inf")) if compile_ == "auto" else bool(compile_)
    if precision == "auto":
        precision = "bfloat16" if compiles and native_bfloat16(device) else "float32"
    graphs = compiles and device.type == "cuda" and step_work < LAUNCH_BOUND
    return Arithmetic(compile=compiles, precision=precision, graphs=graphs)  # type: ignore[arg-type]  # another word is refused there


def pick_device(name: str) -> torch.device:
    """Returns the device that --device names; "auto" is CUDA, else the CPU (mps has no float64: ask for it by name)."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise FlagError(f"--device {name}: it is auto, cpu, cuda, cuda:N or mps.")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(number or 0) >= counts[kind]:
        raise FlagError(f"--device {name}: there is no such device here ({counts[kind]} of kind {kind}). Use --device auto or cpu.")
    return torch.device(name)


def native_bfloat16(device: torch.device) -> bool:
    """Returns whether bfloat16 products are faster than float32 ones on `device` by hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def pick_precision(setting: str, device: torch.device, *, automatic: bool) -> torch.dtype:
    """Returns the dtype of a precision setting; "auto" is bfloat16 where `automatic` allows it and hardware has it."""
    import torch

    if setting == "auto":
        return torch.bfloat16 if automatic and native_bfloat16(device) else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def compiled(module: nn.Module | Callable[..., Tensor], *, wanted: bool, graphs: bool = False) -> Callable[..., Tensor]:
    """Returns a compiled `module` where wanted and possible, else `module`; says so when it is not possible."""
    if not wanted:
        return module
    import torch

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells that there is no CUDA, to whom did not ask
    _choose_compile_cache()
    return Compiled(module, torch.compile(module, mode="reduce-overhead") if graphs else torch.compile(module))


def _choose_compile_cache() -> None:
    """Has torch keep what it compiles in the private part of ddkit's cache, unless TORCHINDUCTOR_CACHE_DIR names another folder.

    torch unpickles what it finds there, and its own default is a folder that another user may have made. So where ddkit's is not private
    the code is compiled for this process alone.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return
    try:
        folder = private_folder("compile")
    except RunFilesError as error:
        log.warning("Compiled code is not kept for the next time. %s", error, extra={"news": True})
        folder = passing_folder()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


class Compiled:
    """A compiled function that goes on uncompiled, and says so once, where torch cannot compile it here.

    `failed` tells whether that happened.
    """

    def __init__(self, plain: Callable[..., Tensor], fast: Callable[..., Tensor]) -> None:
        self.plain, self.fast, self.failed = plain, fast, False

    def __call__(self, *arguments: Tensor) -> Tensor:
        if self.failed:
            return self.plain(*arguments)
        try:
            return self.fast(*arguments)
        except Exception as error:  # torch.compile needs a C++ compiler and raises many kinds
            if out_of_memory(error):
                raise
            result = self.plain(*arguments)  # an error of the module itself shows as such
            log.warning("torch.compile did not work here (%s); going on without.", type(error).__name__)
            self.failed = True
            return result


def is_compiled(forward: Callable[..., Tensor]) -> bool:
    """Returns whether what compiled() returned runs compiled code: it was wanted, and torch could compile it."""
    return isinstance(forward, Compiled) and not forward.failed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns `tensor` on `device`, without waiting for the device: through pinned memory on CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def products(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, float32 products on CUDA are exact for precision "float32", else TF32; as before afterwards."""
    import torch

    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    fast = precision != "float32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def differentiable_attention(wanted: bool) -> Iterator[None]:
    """Inside, attention is computed by plain matrix products if `wanted`: torch's fused kernels have no second derivative.

    torch's switches hold for the whole process: of runs in several threads the first sets them, and the last puts them back.
    """
    if not wanted:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with _PLAIN_LOCK:
        _PLAIN.append(nullcontext() if _PLAIN else sdpa_kernel(SDPBackend.MATH))
        _PLAIN[-1].__enter__()
    try:
        yield
    finally:
        with _PLAIN_LOCK:
            _PLAIN.pop().__exit__(None, None, None)


_PLAIN: list[AbstractContextManager[object]] = []  # one for each that is inside; the lowest, which leaves last, is that of torch
_PLAIN_LOCK = threading.Lock()


def product_rate(device: torch.device, precision: str, *, side: int, count: int) -> float:
    """Returns the floating-point operations per second of `count` square matrix products, `side` a side: what the machine can do."""
    import torch

    def finish() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    draws = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.randn(2, side, side, generator=draws).to(device, dtype).unbind()
    with products(device, precision), torch.no_grad():
        torch.mm(a, b)
        finish()
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        finish()
        return 2 * side**3 * count / (time.perf_counter() - began)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def tune_process() -> None:
    """Sets up the allocator of a process that is ddkit's own, before torch is imported.

    glibc gives every large tensor back to the system when it is freed, and the next step pays for fresh pages. So freed
    memory is kept, in huge pages where the system allows them. DDKIT_KEEP_MEMORY=0 leaves the allocator alone.
    """
    if os.environ.get("DDKIT_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
