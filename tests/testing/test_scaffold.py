"""`ddkit new`: as generated a package installs, passes its test, is listed and runs; for every kind, in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ddkit.testing import scaffold
from tests.conftest import CHECKOUT
from tests.contract.test_third_party import _environment
from tests.forks import HEAVY, forking

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a generated package of every kind, each called my-KIND."""
    root = tmp_path_factory.mktemp("scaffold")
    for kind in scaffold.KINDS:
        scaffold.new_package(kind, f"my-{kind}", root / f"ddkit-my-{kind}")
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    """Yields a function that runs `python ARGS...` in an environment in which all of them are installed; `fork` saves its start."""
    python = _environment(folder / "venv")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DDKIT_PLUGIN", "PYTHONPATH", "PYTEST"))} | {
        "PYTHONPATH": CHECKOUT
    }

    def call(*arguments: object, fork: bool = False) -> subprocess.CompletedProcess[str]:
        command, processes = [str(python), *map(str, arguments)], forks if fork else subprocess
        return processes.run(command, capture_output=True, text=True, check=False, cwd=folder, env=clean)

    done = call(
        "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index",
        *(f"./ddkit-my-{kind}" for kind in scaffold.KINDS),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with forking(*HEAVY, python=str(python), env=clean) as forks:
        yield call


def test_every_one_is_listed_and_loads(run: Run) -> None:
    rows = json.loads(run("-m", "ddkit", "list", "--check", "--json", fork=True).stdout)["components"]
    mine = {row["kind"]: row for row in rows if row["name"].startswith("my-")}
    assert set(mine) == set(scaffold.KINDS)
    for kind, row in mine.items():
        assert (row["name"], row["distribution"], row["version"], row["status"]) == (f"my-{kind}", f"ddkit-my-{kind}", "0.1.0", "ok")
        assert row["summary"]


# A plugin of pytest: each module is imported in a fork of one process that has what an import is timed beside.
FORKED = """
import pytest
from forks import forking


@pytest.fixture(autouse=True, scope="session")
def forked():
    with forking("torch", "numpy", "ddkit") as forks, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddkit.run.children.subprocess", forks)
        yield
"""


@pytest.fixture(scope="module")
def outcomes(run: Run, folder: Path) -> dict[str, list[ElementTree.Element]]:
    """Returns what each package's own tests gave, by kind; one process runs them all."""
    folders = [f"ddkit-my-{kind}/tests" for kind in scaffold.KINDS]
    shutil.copy(Path(__file__).parents[1] / "forks.py", folder)
    (folder / "forked.py").write_text(FORKED)
    flags = ("-q", "-p", "no:cacheprovider", "-p", "forked", "--import-mode=importlib", "--junitxml=own.xml")
    done = run("-m", "pytest", *flags, *folders, fork=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    cases = list(ElementTree.parse(folder / "own.xml").iter("testcase"))
    suites = {kind: f"TestMy{kind.title().replace('-', '')}" for kind in scaffold.KINDS}
    return {kind: [case for case in cases if case.attrib["classname"].endswith(f".{suite}")] for kind, suite in suites.items()}


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_its_own_test_passes(outcomes: dict[str, list[ElementTree.Element]], kind: str) -> None:
    assert len(outcomes[kind]) >= 4
    assert [(case.attrib["name"], ElementTree.tostring(part)) for case in outcomes[kind] for part in case if part.tag != "properties"] == []


def test_a_run_uses_all_of_them_at_once(run: Run, folder: Path) -> None:
    sets = ("--set", "steps=2", "--set", "train.epochs=1", "--set", "parametrization=my-parametrization")
    done = run(
        "-m", "ddkit", "distill", "--dataset", "my-dataset", "--losses", "dm,my-loss:0.5", "--init", "my-initializer", "--augment",
        "my-augmenter", "--model", "my-model", "--evaluate", "my-evaluator", "--pipc", 5, "--out", "run", "--verbose", *sets, fork=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    used = {(each["kind"], each["name"]) for each in json.loads((folder / "run" / "manifest.json").read_text())["plugins"]}
    assert {(kind, f"my-{kind}") for kind in scaffold.KINDS if kind not in ("exporter", "observer")} <= used
    assert "step 1 of 2: total" in done.stderr, "the observer is called"
    line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["losses"]["my-loss"]["raw"] > 0


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_what_is_written_has_no_gap_left(folder: Path, kind: str) -> None:
    package = folder / f"ddkit-my-{kind}"
    texts = {path.relative_to(package): path.read_text() for path in package.rglob("*") if path.suffix in (".py", ".toml", ".md")}
    assert {Path("pyproject.toml"), Path("README.md"), Path("tests/test_conformance.py")} < set(texts)
    assert not [path for path, text in texts.items() if "$" in text]


# The command


def test_the_command_writes_beside_and_tells_how_to_go_on(cli: Callable[..., Any]) -> None:
    result = cli("new", "losses", "sharp-edge")
    assert result.code == 0, result.err
    assert Path("ddkit-sharp-edge/src/ddkit_sharp_edge/__init__.py").is_file()
    assert result.out.splitlines() == ["ddkit-sharp-edge", "  pip install -e ddkit-sharp-edge", "  ddkit check loss sharp-edge"]
    assert "class SharpEdge(ddkit.Loss):" in Path("ddkit-sharp-edge/src/ddkit_sharp_edge/__init__.py").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["loss", "Sharp"], 2, "lower-case letters"),
        (["loss", "sharp_edge"], 2, "lower-case letters"),
        (["loss", "2nd"], 2, "lower-case letters"),
        (["loss", "edge-"], 2, "lower-case letters"),
        (["loss", "a--b"], 2, "lower-case letters"),
        (["loss", "../x"], 2, "lower-case letters"),
        (["loss", "none"], 2, "would hide a name"),
        (["exporter", "path"], 2, "would hide a name"),
        (["loss", "tensor"], 2, "would hide a name"),
        (["loss", "priors"], 2, "a package ddkit_priors here already"),
        (["loss", "dkkt"], 2, "has that name already"),
        (["loss", "dm"], 2, "has that name already"),
        (["recipe", "mine"], 2, "no scaffold for a recipe"),
        (["los", "mine"], 2, "Did you mean 'loss'?"),
        (["loss"], 2, "Missing argument"),
        (["loss", "mine", "--out", "full"], 5, "is there already"),
        (["loss", "mine", "--out", "full/file"], 5, "is there already"),
    ],
)
def test_bad_input_is_told_and_writes_nothing(cli: Callable[..., Any], words: list[str], code: int, message: str) -> None:
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    before = sorted(Path().rglob("*"))
    result = cli("new", *words)
    assert (result.code, result.out) == (code, "")
    assert message in " ".join(result.err.split())
    assert sorted(Path().rglob("*")) == before
