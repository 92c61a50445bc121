"""What holds for the process while a run is made: signals are noted, and torch is held to deterministic operations if that is wanted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from ddkit.distributed import ending_signals


@contextmanager
def interruption() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP are noted in the list, and a second SIGINT acts at once.

    A second one of the others is the same request once more, as a cluster sends it to all processes and torchrun, or a study, passes it
    on.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch refuses operations that are not deterministic on this device, if that is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA's matrix products when the first is made
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
