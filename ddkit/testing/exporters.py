"""The conformance suite of exporters."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddkit.run.artifact import Artifact
from ddkit.seeding import generator
from ddkit.testing.suite import Broken, Conformance, changed, check, copies, global_state_is_kept


class ExporterConformance(Conformance):
    """Checks of an exporter."""

    kind = "exporter"

    def _set(self) -> Artifact:
        images = torch.rand((3, 3, 8, 8), generator=generator(0, "conformance", "set"))
        metadata: Mapping[str, Any] = {"class_names": ["a", "b c", "ü"], "mean": [0.5] * 3, "std": [0.25] * 3, "ipc": 1}
        return Artifact(images, torch.arange(3), dict(metadata))

    @check
    def test_writes_into_the_folder_and_changes_nothing(self) -> None:
        """At least one file is written into the folder, and neither the set nor global state is changed."""
        found = self._set()
        tensors = {"images": found.images, "labels": found.labels}
        before = copies(tensors)
        with tempfile.TemporaryDirectory() as folder, global_state_is_kept(f"The exporter '{self.label}'"):
            self.make()(found, folder)
            if not any(path.is_file() for path in Path(folder).rglob("*")):
                raise Broken(f"The exporter '{self.label}' wrote no file into the folder that it was given.")
        if changed(before, tensors):
            raise Broken(f"The exporter '{self.label}' changes the set.")

    @check
    def test_same_set_same_files(self) -> None:
        """The same set gives the same bytes."""
        written = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                self.make()(self._set(), folder)
                written.append({str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()})
        if written[0] != written[1]:
            raise Broken(f"The exporter '{self.label}' writes other bytes for the same set.")
