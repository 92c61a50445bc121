"""What the processes of tests/contract/test_ranks.py do: `torchrun ... -m tests.ranked FOLDER [LEFT OUT]` works off FOLDER/cases.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ddkit_datasets.decoding as decoding
import msgspec
import torch
from ddkit_evaluators.trainer import Trainer

import ddkit

Case = dict[str, Any]


def work(folder: Path, cases: dict[str, Case], *, distributed: bool) -> None:
    """Distils every case into FOLDER/<number of processes>/<case>; one that is refused leaves its message there.

    A case with the key "evaluate" is evaluated too, which its files do not tell: the rows are kept beside them, and how many networks
    this process has trained. Which image files it has opened is kept likewise.
    """
    size, rank = (os.environ.get(name, "1") if distributed else "1" for name in ("WORLD_SIZE", "RANK"))
    for name, case in cases.items():
        out = folder / size / name
        out.parent.mkdir(exist_ok=True, parents=True)
        arguments = {key: value for key, value in case.items() if key not in ("evaluate", "plugin")}
        with _opened(out.with_name(f"{name}.opened-{rank}")):
            try:
                if "plugin" in case:
                    ddkit.add_plugin_file(case["plugin"])
                ddkit.distill(out=out, evaluators="none", distributed=distributed, **arguments)
            except ddkit.DdkitError as error:
                out.with_name(f"{name}.error-{rank}").write_text(f"{error.exit_code} {error}")
                continue
        if "evaluate" in case:
            with _counted(out.with_name(f"{name}.trained-{rank}")):
                rows = ddkit.evaluate(ddkit.load(out), distributed=distributed, **case["evaluate"])
            out.with_name(f"{name}.rows-{rank}").write_bytes(msgspec.json.encode(rows))


class _opened:
    """Inside, the image files that are decoded are noted; afterwards FILE has their names."""

    def __init__(self, file: Path) -> None:
        self.file, self.names, self.plain = file, [], decoding._decode

    def __enter__(self) -> None:
        def decode(file: str, *arguments: Any) -> Any:
            self.names.append(file)
            return self.plain(file, *arguments)

        decoding._decode = decode

    def __exit__(self, *error: object) -> None:
        decoding._decode = self.plain
        self.file.write_text(json.dumps(sorted(self.names)))


class _counted:
    """Inside, the networks that evaluations train are counted; afterwards FILE has their number."""

    def __init__(self, file: Path) -> None:
        self.file, self.count, self.plain = file, 0, Trainer.accuracy

    def __enter__(self) -> None:
        def accuracy(trainer: Trainer, *task: Any) -> float:
            self.count += 1
            return self.plain(trainer, *task)

        Trainer.accuracy = accuracy

    def __exit__(self, *error: object) -> None:
        Trainer.accuracy = self.plain
        self.file.write_text(str(self.count))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # as a program that uses it anyway: ddkit takes the group that is there
    place, left_out = Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else []
    cases = json.loads((place / "cases.json").read_text())
    work(place, {name: case for name, case in cases.items() if name not in left_out}, distributed=True)
    torch.distributed.destroy_process_group()
