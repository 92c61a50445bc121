"""The notebooks of examples/notebooks: kept without outputs, and they run from top to bottom in an empty folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [(cell.outputs, cell.execution_count) for cell in code(notebook)] == [([], None)] * len(code(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of Jupyter's own libraries
def test_a_notebook_runs_and_shows_images_tables_and_a_bar(path: Path, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    streams = {name: "".join(one.text for one in outputs if one.get("name") == name) for name in ("stdout", "stderr")}
    assert streams["stderr"] == ""  # nothing on red ground
    assert "Distilling 10 images" in streams["stdout"]
    assert "distilling:   0%" in streams["stdout"]
    pages = ["".join(one.data["text/html"]) for one in outputs if "data" in one and "text/html" in one.data]
    assert any(page.count("data:image/png;base64,") == 1 for page in pages)
    assert max(map(len, pages)) < 200_000
    assert not any("0x" in "".join(one.data["text/plain"]) for one in outputs if "data" in one)  # addresses, others in each run
