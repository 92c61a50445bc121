"""The examples of strangers' plugins: installed from their folders, without network, and used by name."""

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

import numpy as np
import pytest
import torch

import ddkit as package
from ddkit.testing import LossConformance
from tests.conftest import CHECKOUT, SMALL_FLAGS
from tests.forks import HEAVY, forking

EXAMPLES = Path(__file__).parents[2] / "examples" / "third-party"
NAMES = ("gram-matching", "second-moment", "sliced-wasserstein")
Ddkit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the Python of a fresh environment in which the examples are installed from copies of their folders."""
    root = tmp_path_factory.mktemp("stranger")
    projects = [
        shutil.copytree(EXAMPLES / f"ddkit-{name}", root / name, ignore=shutil.ignore_patterns("__pycache__", "build", "dist"))
        for name in NAMES
    ]
    python = _environment(root / "venv")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", *map(str, projects)]
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
