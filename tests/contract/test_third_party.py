"""Third-party packages, the examples and what `ddkit new` writes: installed from folders, without network, and used by name."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import shutil
import site
import subprocess
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import ddkit as package
from ddkit.components.kinds import CHECKED
from ddkit.testing import LossConformance, scaffold
from tests.conftest import CHECKOUT, SMALL_FLAGS
from tests.forks import HEAVY, forking

EXAMPLES = Path(__file__).parents[2] / "examples" / "third-party"
NAMES = ("gram-matching", "second-moment", "sliced-wasserstein")
Ddkit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with copies of the examples, and of what `ddkit new` writes a package of every kind, called my-KIND."""
    root = tmp_path_factory.mktemp("stranger")
    for name in NAMES:
        shutil.copytree(EXAMPLES / f"ddkit-{name}", root / f"ddkit-{name}", ignore=shutil.ignore_patterns("__pycache__", "build", "dist"))
    for kind in CHECKED:
        scaffold.new_package(kind, f"my-{kind}", root / f"ddkit-my-{kind}")
    return root


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Path:
    """Returns the Python of a fresh environment in which all of them are installed."""
    python = _environment(folder / "venv")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", *map(str, folder.glob("ddkit-*"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def _environment(folder: Path) -> Path:
    """Makes an environment that sees what this interpreter sees: a .pth file adds its site-packages, editable lines and all.

    (--system-site-packages alone shows those of the base Python, not those of the environment that the tests run in.)
    """
    venv.create(folder, system_site_packages=True, symlinks=os.name != "nt", with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        ours.add(site.getusersitepackages())
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(ours)]
    (Path(inside) / "of_the_tests.pth").write_text("\n".join(lines) + "\n")
    return python


@pytest.fixture(scope="module")
def processes(stranger: Path) -> Iterator[Any]:
    """Yields what starts processes of that environment: forks of one that has imported torch, but nothing of ddkit or a stranger."""
    with forking(*HEAVY, python=str(stranger), env=_clean()) as made:
        yield made


def _clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("DDKIT_PLUGINS", "PYTHONPATH")} | {"PYTHONPATH": CHECKOUT}


@pytest.fixture
def ddkit(stranger: Path, processes: Any, tmp_path: Path) -> Ddkit:
    """Returns a function that runs `python -m ddkit ARGS...` in that environment, in an empty folder."""

    def run(*arguments: object, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(stranger), "-m", "ddkit", *map(str, arguments)]
        env = {**_clean(), **environment}
        if fresh:  # as a user's: a new interpreter, with as many threads as it likes
            del env["OMP_NUM_THREADS"]
        return (subprocess if fresh else processes).run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)

    return run


def test_the_installed_loss_is_listed_with_its_distribution_and_summary(ddkit: Ddkit) -> None:
    done = ddkit("list", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in json.loads(done.stdout)["components"] if row["distribution"] == "ddkit-second-moment"]
    assert (row["kind"], row["name"], row["version"], row["status"]) == ("loss", "second-moment", "0.1.0", "ok")
    assert row["summary"].startswith("Squared distance of class-wise second moments")


def test_without_installation_this_interpreter_does_not_know_it() -> None:
    from ddkit.components.registry import plugins

    assert "second-moment" not in {plugin.name for plugin in plugins()}


def test_distill_uses_it_by_name_and_the_manifest_names_its_distribution(ddkit: Ddkit, tmp_path: Path) -> None:
    flags = ["--losses", "second-moment,dm:0.5", "--ipc", 1, "--pipc", 4, "--evaluate", "none", "--out", "run", *SMALL_FLAGS[:2]]
    sets = ("--set", "network.width=8", "--set", "losses.second-moment.weight=0.25")
    done = ddkit("distill", *flags, *sets, "--json", fresh=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    used = json.loads((tmp_path / "run" / "manifest.json").read_text())["plugins"]
    expected = {"kind": "loss", "name": "second-moment", "distribution": "ddkit-second-moment", "version": "0.1.0"}
    assert expected in used
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["losses"]["second-moment"]
    assert first["raw"] > 0
    assert first["weighted"] == pytest.approx(0.25 * first["raw"])


def test_its_formula_agrees_with_a_plain_one_in_float64(imported: Callable[[str], Any]) -> None:
    moment_gap = imported("second-moment").moment_gap
    real, synthetic = normal(7, 5), normal(3, 5, seed=1).requires_grad_()
    a, b = real.numpy(), synthetic.detach().numpy()
    plain = sum((np.mean(a[:, j] ** 2) - np.mean(b[:, j] ** 2)) ** 2 for j in range(5))
    central = sum((np.var(a[:, j]) - np.var(b[:, j])) ** 2 for j in range(5))
    assert moment_gap(real, synthetic).item() == pytest.approx(plain, rel=1e-12)
    assert moment_gap(real, synthetic, central=True).item() == pytest.approx(central, rel=1e-12)
    assert plain != pytest.approx(central)
    assert torch.autograd.gradcheck(lambda x: moment_gap(real, x), (synthetic,))
    assert torch.autograd.gradcheck(lambda x: moment_gap(real, x, central=True), (synthetic,))


# All three


def test_the_examples_run_beside_dm_and_dkkt(ddkit: Ddkit, tmp_path: Path) -> None:
    flags = ["--ipc", 2, "--pipc", 4, "--evaluate", "none", "--out", "run", *SMALL_FLAGS]
    done = ddkit("distill", "--losses", ",".join(["dm", "dkkt", *(f"{name}:0.5" for name in NAMES)]), *flags)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line)["losses"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == {"dm", "dkkt-primal", "dkkt-stationarity", *NAMES} for line in lines)
    assert all(lines[0][name]["raw"] > 0 and lines[0][name]["raw"] != lines[-1][name]["raw"] for name in NAMES)


def test_a_network_that_an_example_cannot_use_is_refused_before_anything_is_trained(ddkit: Ddkit) -> None:
    done = ddkit("distill", "--losses", "gram-matching", "--model", "mlp", "--evaluate", "none", "--out", "run")
    assert (done.returncode, done.stdout) == (4, "")
    assert "no convolution" in " ".join(done.stderr.split())


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Returns a function that imports the module of an example from its folder."""

    def load(name: str) -> Any:
        monkeypatch.syspath_prepend(str(EXAMPLES / f"ddkit-{name}" / "src"))
        return importlib.import_module(f"ddkit_{name.replace('-', '_')}")

    return load


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_says_its_source_and_keeps_what_a_loss_has_to_keep(imported: Callable[[str], Any], name: str) -> None:
    module = imported(name)
    assert len(Path(module.__file__).read_text().splitlines()) < 60
    assert "arXiv" in (EXAMPLES / f"ddkit-{name}" / "README.md").read_text()
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)
    (loss,) = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, package.Loss)]
    suite = type("Example", (LossConformance,), {"component": loss})()
    for method in suite.checks().values():
        getattr(suite, method)()


# Packages as `ddkit new` writes them


def test_the_command_writes_beside_and_tells_how_to_go_on(cli: Callable[..., Any]) -> None:
    result = cli("new", "losses", "sharp-edge")
    assert result.code == 0, result.err
    assert Path("ddkit-sharp-edge/src/ddkit_sharp_edge/__init__.py").is_file()
    assert result.out.splitlines() == ["ddkit-sharp-edge", "  pip install -e ddkit-sharp-edge", "  ddkit check loss sharp-edge"]
    assert "class SharpEdge(ddkit.Loss):" in Path("ddkit-sharp-edge/src/ddkit_sharp_edge/__init__.py").read_text()


def test_every_generated_package_is_listed(ddkit: Ddkit) -> None:
    rows = json.loads(ddkit("list", "--json").stdout)["components"]
    mine = {row["kind"]: row for row in rows if row["name"].startswith("my-")}
    assert set(mine) == set(CHECKED)
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


def test_the_tests_of_every_generated_package_pass(stranger: Path, processes: Any, folder: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "forks.py", folder)
    (folder / "forked.py").write_text(FORKED)
    flags = ("-q", "-p", "no:cacheprovider", "-p", "forked", "--import-mode=importlib", "--junitxml=own.xml")
    command = [str(stranger), "-m", "pytest", *flags, *(f"ddkit-my-{kind}/tests" for kind in CHECKED)]
    done = processes.run(command, capture_output=True, text=True, check=False, cwd=folder, env=_clean())
    assert done.returncode == 0, done.stdout + done.stderr
    names = [case.attrib["classname"] for case in ElementTree.parse(folder / "own.xml").iter("testcase")]
    for kind in CHECKED:
        assert sum(name.endswith(f".TestMy{kind.title().replace('-', '')}") for name in names) >= 4


def test_a_run_uses_all_generated_packages_at_once(ddkit: Ddkit, tmp_path: Path) -> None:
    sets = ("--set", "steps=2", "--set", "train.epochs=1", "--set", "parametrization=my-parametrization")
    done = ddkit(
        "distill", "--dataset", "my-dataset", "--losses", "dm,my-loss:0.5", "--init", "my-initializer", "--augment",
        "my-augmenter", "--model", "my-model", "--evaluate", "my-evaluator", "--pipc", 5, "--out", "run", "--verbose", *sets,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    used = {(each["kind"], each["name"]) for each in json.loads((tmp_path / "run" / "manifest.json").read_text())["plugins"]}
    assert {(kind, f"my-{kind}") for kind in CHECKED if kind not in ("exporter", "observer")} <= used
    assert "step 1 of 2: total" in done.stderr, "the observer is called"
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["losses"]["my-loss"]["raw"] > 0


@pytest.mark.parametrize("kind", CHECKED)
def test_what_is_generated_has_no_gap_left(folder: Path, kind: str) -> None:
    package = folder / f"ddkit-my-{kind}"
    texts = {path.relative_to(package): path.read_text() for path in package.rglob("*") if path.suffix in (".py", ".toml", ".md")}
    assert {Path("pyproject.toml"), Path("README.md"), Path("tests/test_conformance.py")} < set(texts)
    assert not [path for path, text in texts.items() if "$" in text]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_sliced_distance_is_that_of_sorted_values_at_quantiles(imported: Callable[[str], Any], count: int) -> None:
    distance = imported("sliced-wasserstein").sliced_distance
    real, synthetic = normal(5, 3), normal(count, 3, seed=1).requires_grad_()
    directions = torch.nn.functional.normalize(normal(3, 4, seed=2), dim=0)
    total = 0.0
    for line in directions.T.tolist():
        ours = sorted(sum(a * b for a, b in zip(row, line, strict=True)) for row in synthetic.tolist())
        theirs = sorted(sum(a * b for a, b in zip(row, line, strict=True)) for row in real.tolist())
        wanted = np.quantile(theirs, [(i + 0.5) / count for i in range(count)], method="hazen")
        total += sum((a - b) ** 2 for a, b in zip(ours, wanted, strict=True)) / count
    assert float(distance(real, synthetic.detach(), directions)) == pytest.approx(total / 4, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: distance(real, x, directions), (synthetic,))


def test_a_gram_matrix_is_that_of_loops_over_places(imported: Callable[[str], Any]) -> None:
    gram, x = imported("gram-matching").gram, normal(2, 3, 2, 2)
    places = [x[n, :, i, j].tolist() for n in range(2) for i in range(2) for j in range(2)]
    for row, found in enumerate(gram(x).tolist()):
        assert found == pytest.approx([sum(place[row] * place[other] for place in places) / 8 for other in range(3)], rel=1e-12)
    assert torch.autograd.gradcheck(gram, (x.requires_grad_(),))
