"""The processes of one run: which classes each of them owns, and what they exchange, in torch.distributed's words.

A run is one process, or several that torchrun started. Classes are dealt out in contiguous ranges, so the rows of a
process are contiguous too. Tensors and JSON travel, nothing is pickled.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ddkit.errors import FlagError, InputError, RunFailed
from ddkit.text import counted, shown

if TYPE_CHECKING:
    from torch import Tensor

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun gives its processes
# A process that dies closes its connections, which ends the others at once. The limit is for those that wait for the main one
# while it trains a teacher, or evaluates.
PATIENCE = timedelta(days=2)
SECOND_THOUGHTS = 0.5  # seconds in which a process that knows the cause may report it, before one that only saw another end


class OthersEnded(RunFailed):
    """An exchange failed, as another process of the run is gone."""


class Ranks:
    """One process of a run: number `rank` of `world_size`. The main one, rank 0, prints and writes files.

    Without a `group` it is the whole run. `exchanged` counts the bytes that this process gave to exchanges, by purpose. CPU tensors
    travel over gloo, others over the default group's backend (NCCL).
    """

    rank = 0
    world_size = 1

    def __init__(self, group: Any = None) -> None:
        self.exchanged: Counter[str] = Counter()
        self._group = group
        if group is not None:
            import torch.distributed

            self.rank = torch.distributed.get_rank()
            self.world_size = torch.distributed.get_world_size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def classes(self, count: int) -> range:
        """Returns the classes of 0..count-1 that this process owns: ranges differ in length by one at most."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def all_reduce(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Returns the sum over all processes of each tensor, without gradients, in one exchange; the tensors are of one dtype."""
        if self.world_size == 1:
            return [tensor.detach() for tensor in tensors]
        import torch

        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])  # a copy, also of one tensor
        parts = self._reduced(flat, purpose).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def all_gather(self, rows: Tensor, purpose: str) -> Tensor:
        """Returns the rows (n, ...) of all processes in their order, in every process, without gradients."""
        if self.world_size == 1:
            return rows.detach()
        counts = self.all_gather_object(len(rows))
        found = rows.new_zeros((sum(counts), *rows.shape[1:]))
        start = sum(counts[: self.rank])
        found[start : start + len(rows)] = rows.detach()
        return self.all_reduce([found], purpose)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns the `value` (JSON data) of every process, in their order."""
        if self.world_size == 1:
            return [value]
        import torch

        content = json.dumps(value).encode()
        length = self.max(len(content))
        own = torch.frombuffer(bytearray(content.ljust(length)), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        self.exchanged["control"] += length
        with others_may_end():
            torch.distributed.all_gather(parts, own, group=self._group)
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def broadcast(self, value: Any) -> Any:
        """Returns the main process's `value`, which is JSON data; what the others give is not looked at."""
        return value if self.world_size == 1 else self.all_gather_object(value if self.is_main else None)[0]

    def max(self, number: int) -> int:
        """Returns the largest `number` of all processes."""
        if self.world_size == 1:
            return number
        import torch

        return int(self._reduced(torch.tensor(number), "control", torch.distributed.ReduceOp.MAX))

    def all(self, flag: bool) -> bool:
        """Returns whether `flag` is true in every process."""
        return self.max(int(not flag)) == 0

    def barrier(self) -> None:
        """Returns when every process is here."""
        self.max(0)

    def _reduced(self, tensor: Tensor, purpose: str, operation: Any = None) -> Tensor:
        """Returns `tensor`, changed in place to its sum, or what `operation` makes of it, over all processes."""
        import torch.distributed as distributed

        self.exchanged[purpose] += tensor.nbytes
        with others_may_end():
            distributed.all_reduce(
                tensor, op=operation or distributed.ReduceOp.SUM, group=self._group if tensor.device.type == "cpu" else None
            )
        return tensor

    def check_classes(self, classes: int) -> None:
        """Raises InputError where there are more processes than classes."""
        if self.world_size > classes:
            raise InputError(
                f"{self.world_size} processes were started for {classes} classes, but each process needs at least one class. "
                f"Start at most {classes}: torchrun --nproc-per-node={classes}."
            )

    def check_same(self, what: str, value: Any) -> None:
        """Raises InputError where `value` (JSON data) differs between processes; of tables it names the first key that does."""
        values = self.all_gather_object(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                theirs, ours, which = other, values[0], ""
                if isinstance(other, dict) and isinstance(values[0], dict):
                    key = next(key for key in sorted({*other, *values[0]}) if other.get(key) != values[0].get(key))
                    theirs, ours, which = other.get(key), values[0].get(key), f"{key} is "
                raise InputError(
                    f"{what} of process {rank} and of process 0 differ: {which}{shown(theirs)} in process {rank} and {shown(ours)} in "
                    "process 0. All processes of a run need the same files and the same version of ddkit. Use the same command and paths "
                    "on every machine."
                )


ALONE = Ranks()


def class_rows(labels: Tensor, classes: range) -> slice:
    """Returns the rows of ascending labels (n,) on the CPU that belong to `classes`."""
    import torch

    return slice(*torch.searchsorted(labels, torch.tensor([classes.start, classes.stop])).tolist())


@contextmanager
def others_may_end() -> Iterator[None]:
    """Turns what torch raises, when another process is gone in mid-exchange, into OthersEnded."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's errors are of this kind
        raise OthersEnded(
            f"Another process of this run has ended, so this one ends too ({' '.join(str(error).split())[:80]}). The output of torchrun "
            "below names it. A run with a checkpoint can be continued by `ddkit distill --out DIR --resume`, with any number of "
            "processes."
        ) from error


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def follows() -> bool:
    """Whether this is not the main one of several processes: it prints nothing."""
    return launched() and os.environ["RANK"] != "0"


def plain_environment() -> dict[str, str]:
    """Returns the environment for processes that are not part of the group: without what torchrun gives its own."""
    ours = (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("TORCHELASTIC_")}


@contextmanager
def group(*, wanted: bool = True) -> Iterator[Ranks]:
    """Inside, the processes that torchrun started are one group, if that is `wanted`; elsewhere this one is alone.

    A group that is there already (of a program that uses torch.distributed itself) is used, and left as it was.
    """
    if not wanted or not launched():
        yield Ranks()
        return
    import torch
    import torch.distributed as distributed

    own = not distributed.is_initialized()
    if own:
        gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # SIGTERM and SIGHUP end the process meanwhile: while it waits for the others outside Python, a handler would not be called.
        numbers = ending_signals() if threading.current_thread() is threading.main_thread() else []
        before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
        try:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                f"The processes that torchrun started could not connect to each other at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({' '.join(str(error).split())[:300]}). If the network does not know the name of this "
                "machine, set the network interface, e.g. GLOO_SOCKET_IFNAME=lo if all processes are on one machine."
            ) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    with others_may_end():
        made: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)
    yield Ranks(made)
    # Not after an error: the others may be gone, and leaving in order would wait for them.
    distributed.destroy_process_group(None if own else made)


def ending_signals() -> list[signal.Signals]:
    """Returns the signals that ask a process to end, beside Ctrl-C: SIGTERM, and SIGHUP where it is not ignored, as under nohup."""
    return [signal.SIGTERM] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGTERM, signal.SIGHUP]


def own_device(name: str) -> str:
    """Returns the device of this process for what --device names: on a machine with several GPUs one for each process."""
    import torch

    if not launched() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        if launched() and name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise FlagError(f"--device {name}: under torchrun each process uses its own GPU. Use --device cuda.")
        return name
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise FlagError(
            f"torchrun started more processes on this machine than its {counted(gpus, 'GPU')}. Use --nproc-per-node={gpus}, or --device "
            "cpu."
        )
    return f"cuda:{local}"


class LastWords:
    """Lets one process report why a run of several ended, while the others are silent; they agree through torchrun's own store."""

    def __init__(self) -> None:
        """From now on torchrun's request to end is ignored: it would cut off the report."""
        if threading.current_thread() is threading.main_thread():
            for number in ending_signals():
                signal.signal(number, signal.SIG_IGN)
        self._store: Any = None
        with suppress(Exception):  # whatever is wrong with the store, the error itself must be reported
            import torch.distributed
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # Without torchrun's agent the store is that of the first process, from when the processes have found one another.
            there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or torch.distributed.is_initialized()
            self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5)) if there else None

    def mine(self, error: BaseException | None) -> bool:
        """Returns whether this process is the one to report `error`."""
        if self._store is None:
            return not follows()
        if isinstance(error, OthersEnded):
            time.sleep(SECOND_THOUGHTS)
        with suppress(Exception):
            return bool(self._store.add(f"ddkit/last words {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1)
        return not follows()
