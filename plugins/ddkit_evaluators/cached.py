"""Keeps the accuracies of networks that are trained on real images: the next set that stands beside the same images finds them.

The key holds everything that an accuracy follows from, so that one from the cache equals one that is computed, bit for bit.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddkit
from ddkit_evaluators.trainer import Result, Task, Trainer, fields_of

FORMAT = 2  # of the key: raised when the same key gives another accuracy


class CachedAccuracies:
    """The accuracies of a trainer's networks in the cache, `found` being those that were there.

    Those of networks on the synthetic set are not kept. If the cache is not `wanted`, nothing is read or kept.
    """

    def __init__(self, trainer: Trainer, *, wanted: bool) -> None:
        self.trainer = trainer
        self.wanted = wanted
        self.found: dict[Task, Result] = {}
        self._entries: dict[tuple[Task, int], ddkit.data.CachedResult] = {}
        self._whole = ""  # the digest of all accessible images, on which every network of pipc-real is trained

    def or_trained(self, tasks: Sequence[Task], threads: int, train: Callable[[list[Task]], list[Result]]) -> list[Result]:
        """Returns the result of every task: from the cache, or else from `train(tasks)`, in whose processes `threads` threads compute."""
        for task in filter(self._may_keep, tasks):
            if (known := self._entry(task, threads).read()) is not None:
                self.found[task] = Result(*known)
        left = [task for task in tasks if task not in self.found]
        if not left:
            self.trainer.data.report(len(tasks), len(tasks))
            return [self.found[task] for task in tasks]
        every = self.found | dict(zip(left, train(left), strict=True))
        return [every[task] for task in tasks]

    def keep(self, task: Task, threads: int, result: Result) -> None:
        """Keeps the result of a network that a process of `threads` threads has trained, unless torch could not compile it."""
        if self._may_keep(task) and self.trainer.compiled == self.trainer.arithmetic.compile:
            self._entry(task, threads).write(result)

    def _may_keep(self, task: Task) -> bool:
        soft = self.trainer.soft
        return self.wanted and task[0] != "synthetic" and self._code is not None and (soft is None or bool(soft.teacher.sha256))

    def _entry(self, task: Task, threads: int) -> ddkit.data.CachedResult:
        if (task, threads) not in self._entries:
            self._entries[task, threads] = ddkit.data.CachedResult("accuracies", self._key(task, threads))
        return self._entries[task, threads]

    def _key(self, task: Task, threads: int) -> dict[str, Any]:
        kind, repeat = task
        trainer, data = self.trainer, self.trainer.data
        network = ddkit.nn.build_network(trainer.model, data.info, data.seed, "evaluate", trainer.name, repeat)
        soft = trainer.soft
        return {
            "format": FORMAT, "ddkit": ddkit.__version__, "torch": torch.__version__, "code": self._code, "device": _device(data.device),
            "threads": [threads, trainer.threads], "arithmetic": fields_of(trainer.arithmetic),
            "trained on": self._training_digest(kind, repeat), "tested on": self._test_digest,
            "mean": trainer.artifact.mean, "std": trainer.artifact.std,
            **({} if trainer.artifact.whitening is None else {"whitening": trainer.artifact.whitening.digest}),
            "network": [trainer.name, fields_of(trainer.model.options), repr(network), _digest(network.state_dict().values())],
            "kind": kind, "repeat": repeat, "seed": data.seed, "schedule": fields_of(trainer.schedule),
            "augmenter": [trainer.protocol.augmenter, fields_of(trainer.augmenter.options)],
            "soft": None if soft is None else [soft.teacher.sha256, soft.temperature, *(soft.teacher.order or ())],
        }  # fmt: skip

    @cached_property
    def _code(self) -> str | None:
        """The digest of the files that define the network, its layers, the augmentation and the teacher; None if a class has no file."""
        trainer = self.trainer
        layers = [*trainer.module.modules(), *(trainer.soft.teacher.module.modules() if trainer.soft else ())]
        kinds = {type(each) for each in (trainer.model, trainer.augmenter, *layers)}
        try:
            files = {f"{kind.__module__}.{kind.__qualname__}": Path(inspect.getfile(kind)).read_bytes() for kind in kinds}
        except (TypeError, OSError):
            return None
        found = hashlib.sha256()
        for name, content in sorted(files.items()):
            found.update(f"{name} {len(content)}\n".encode() + content)
        return found.hexdigest()

    def _training_digest(self, kind: str, repeat: int) -> str:
        if kind == "pipc-real" and self._whole:
            return self._whole
        images, labels = self.trainer.training_set(kind, repeat)
        found = _digest(chain(images.split(500), [labels]))
        self._whole = found if kind == "pipc-real" else self._whole
        return found

    @cached_property
    def _test_digest(self) -> str:
        data = self.trainer.data
        return _digest(chain(ddkit.data.blocks(data.test_images, 500), [data.test_labels]))


def _digest(tensors: Iterable[Tensor]) -> str:
    """Returns the sha256 of type, shape and bytes of tensors, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().numpy())
    return found.hexdigest()


def _device(device: torch.device) -> Any:
    """Returns what kind of processor computes, as far as it may change the last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = getattr(torch.cpu, "get_capabilities", torch.backends.cpu.get_cpu_capability)  # torch 2.6 has the second alone
    return [device.type, platform.machine(), capabilities()]
