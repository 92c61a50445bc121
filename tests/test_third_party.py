"""The example of a stranger's plugin: installed from its folder, without network, and used by name."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL_FLAGS

PROJECT = Path(__file__).parent.parent / "examples" / "third-party" / "ddkit-second-moment"
Ddkit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the Python of a fresh environment in which the example is installed from a copy of its folder."""
    root = tmp_path_factory.mktemp("stranger")
    project = shutil.copytree(PROJECT, root / "project", ignore=shutil.ignore_patterns("__pycache__", "build", "dist"))
    python = _environment(root / "venv")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", str(project)]
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
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages(), *_user_site()}
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(ours)]
    (Path(inside) / "of_the_tests.pth").write_text("\n".join(lines) + "\n")
    return python


def _user_site() -> list[str]:
    return [site.getusersitepackages()] if site.ENABLE_USER_SITE else []


@pytest.fixture
def ddkit(stranger: Path, tmp_path: Path) -> Ddkit:
    """Returns a function that runs `python -m ddkit ARGS...` in that environment, in an empty folder."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("DDKIT_PLUGINS", "PYTHONPATH")}
        command = [str(stranger), "-m", "ddkit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**clean, **environment})

    return run


def _strangers(listing: str) -> list[dict[str, str]]:
    return [row for row in json.loads(listing)["components"] if row["distribution"] == "ddkit-second-moment"]


def test_the_installed_loss_is_listed_with_its_distribution_and_summary(ddkit: Ddkit) -> None:
    done = ddkit("list", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = _strangers(done.stdout)
    assert (row["kind"], row["name"], row["version"], row["status"]) == ("loss", "second-moment", "0.1.0", "ok")
    assert row["summary"].startswith("Squared distance of class-wise second moments")


def test_without_installation_this_interpreter_does_not_know_it() -> None:
    from ddkit.plugins import plugins

    assert "second-moment" not in {plugin.name for plugin in plugins()}


def test_distill_uses_it_by_name_and_the_manifest_names_its_distribution(ddkit: Ddkit, tmp_path: Path) -> None:
    flags = ["--losses", "second-moment,dm:0.5", "--ipc", 1, "--pipc", 4, "--evaluate", "none", "--out", "run", *SMALL_FLAGS[:2]]
    done = ddkit("distill", *flags, "--set", "network.width=8", "--set", "losses.second-moment.weight=0.25", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    used = json.loads((tmp_path / "run" / "manifest.json").read_text())["plugins"]
    expected = {"kind": "loss", "name": "second-moment", "distribution": "ddkit-second-moment", "version": "0.1.0"}
    assert expected in used
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["losses"]["second-moment"]
    assert first["raw"] > 0
    assert first["weighted"] == pytest.approx(0.25 * first["raw"])


def test_ddkit_plugins_empty_hides_it(ddkit: Ddkit) -> None:
    assert not _strangers(ddkit("list", "--json", DDKIT_PLUGINS="").stdout)
    done = ddkit("distill", "--losses", "second-moment", "--plan", DDKIT_PLUGINS="")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no loss 'second-moment'" in " ".join(done.stderr.split())


def test_ddkit_plugins_naming_it_shows_it_under_any_spelling(ddkit: Ddkit) -> None:
    assert _strangers(ddkit("list", "losses", "--json", DDKIT_PLUGINS="other, DDKit_Second.Moment").stdout)


def test_an_option_of_it_is_validated_like_any_other(ddkit: Ddkit) -> None:
    done = ddkit("distill", "--losses", "second-moment", "--pipc", 2, "--plan", "--set", "losses.second-moment.centrl=true")
    assert (done.returncode, done.stdout) == (4, "")
    assert "Did you mean 'central'?" in " ".join(done.stderr.split())


def test_its_formula_agrees_with_a_plain_one_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import numpy as np
    import torch

    monkeypatch.syspath_prepend(str(PROJECT / "src"))
    moment_gap = importlib.import_module("ddkit_second_moment").moment_gap
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    synthetic = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    a, b = real.numpy(), synthetic.detach().numpy()
    plain = sum((np.mean(a[:, j] ** 2) - np.mean(b[:, j] ** 2)) ** 2 for j in range(5))
    central = sum((np.var(a[:, j]) - np.var(b[:, j])) ** 2 for j in range(5))
    assert moment_gap(real, synthetic).item() == pytest.approx(plain, rel=1e-12)
    assert moment_gap(real, synthetic, central=True).item() == pytest.approx(central, rel=1e-12)
    assert plain != pytest.approx(central)
    assert torch.autograd.gradcheck(lambda x: moment_gap(real, x), (synthetic,))
    assert torch.autograd.gradcheck(lambda x: moment_gap(real, x, central=True), (synthetic,))
