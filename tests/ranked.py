"""What the processes of tests/contract/test_ranks.py do: `torchrun ... -m tests.ranked FOLDER [LEFT OUT]` works off FOLDER/cases.json."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ddkit_datasets.decoding as decoding
import msgspec
import pytest
import torch
from ddkit_evaluators.trainer import Trainer

import ddkit
from tests.conftest import plain_reports

Case = dict[str, Any]


def work(folder: Path, cases: dict[str, Case], *, distributed: bool) -> None:
    """Distils every case into FOLDER/<number of processes>/<case>; one that is refused leaves its message there.

    A case with the key "evaluate" is evaluated too, which its files do not tell: the rows are kept beside them, and which networks
    this process has trained. Which image files it has opened is kept likewise.
    """
    size, rank = (os.environ.get(name, "1") if distributed else "1" for name in ("WORLD_SIZE", "RANK"))
    for name, case in cases.items():
        out = folder / size / name
        out.parent.mkdir(exist_ok=True, parents=True)
        arguments = {key: value for key, value in case.items() if key not in ("evaluate", "plugin")}
        with _noted(out.with_name(f"{name}.opened-{rank}"), decoding, "_decode"):
            try:
                if "plugin" in case:
                    ddkit.add_plugin_file(case["plugin"])
                ddkit.distill(out=out, evaluators="none", distributed=distributed, **arguments)
            except ddkit.DdkitError as error:
                out.with_name(f"{name}.error-{rank}").write_text(f"{error.exit_code} {error}")
                continue
        if "evaluate" in case:
            with _noted(out.with_name(f"{name}.trained-{rank}"), Trainer, "tested"):
                rows = ddkit.evaluate(ddkit.load(out), distributed=distributed, **case["evaluate"])
            out.with_name(f"{name}.rows-{rank}").write_bytes(msgspec.json.encode(rows))


@contextmanager
def _noted(file: Path, owner: Any, name: str) -> Iterator[None]:
    """Inside, calls of the function `name` of `owner` are noted; afterwards FILE has their first arguments."""
    seen: list[str] = []
    plain = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        seen.append(str(arguments[0]))
        return plain(*arguments)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, plain)
        file.write_text(json.dumps(sorted(seen)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain_reports(pytest.MonkeyPatch())
    torch.distributed.init_process_group("gloo")  # as a program that uses it anyway: ddkit takes the group that is there
    place, left_out = Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else []
    cases = json.loads((place / "cases.json").read_text())
    work(place, {name: case for name, case in cases.items() if name not in left_out}, distributed=True)
    torch.distributed.destroy_process_group()
