"""The device that computes: picking it, moving tensors there, how products and attention are computed, and the process's memory."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ddkit.errors import FlagError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def pick_device(name: str) -> torch.device:
    """Returns the device that --device names; "auto" is CUDA, else the CPU (mps has no float64: ask for it by name)."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise FlagError(f"--device {name}: the device must be auto, cpu, cuda, cuda:N or mps.")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(number or 0) >= counts[kind]:
        raise FlagError(f"--device {name}: this machine has no such device ({counts[kind]} of kind {kind}). Use --device auto or cpu.")
    return torch.device(name)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns `tensor`, of any shape, on `device`, without waiting for the device: through pinned memory on CUDA.

    Examples:
        >>> ddkit.nn.to_device(torch.ones(2), torch.device("cpu")).device
        device(type='cpu')
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def products(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, float32 products on CUDA are exact for precision "float32", else TF32; as before afterwards.

    Examples:
        >>> with ddkit.nn.products(torch.device("cpu"), "float32"):
        ...     product = torch.rand(2, 3) @ torch.rand(3, 2)
    """
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

    Examples:
        >>> ddkit.nn.tune_process()  # doctest: +SKIP
        >>> import torch
    """
    if os.environ.get("DDKIT_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
