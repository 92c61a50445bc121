"""Discovery of plugins: strangers of every broken kind, what listing costs, and what list and info say."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit.cli import cli as command_line
from ddkit.components import registry
from ddkit.components.guard import shared_state
from ddkit.components.options import options_type
from ddkit.errors import FlagError, PluginError
from ddkit.recipes.resolve import select_losses
from tests.conftest import CHECKOUT, SMALL, SMALL_FLAGS, Result

Install = Callable[..., None]
FINE = '''
import ddkit

class Fine(ddkit.Loss):
    """Says that it is fine.

    And more.
    """

    def __call__(self, step):
        return step.images.square().mean()
'''
KINDS = (
    "loss", "loss-group", "initializer",
    "parametrization", "augmenter", "evaluator", "model", "dataset", "exporter", "recipe", "protocol", "study", "observer",
)  # fmt: skip


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Returns a function that installs a distribution: `install("dist", {"ddkit.losses": {"x": "module:Class"}}, module="source")`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), CHECKOUT]))
    before = set(sys.modules)

    def run(distribution: str, groups: dict[str, dict[str, str]], **modules: str) -> None:
        info = site / f"{distribution.replace('-', '_')}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n")
        text = "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items())
        (info / "entry_points.txt").write_text(text)
        for name, source in modules.items():
            (site / f"{name}.py").write_text(source)
        _forget()

    yield run
    monkeypatch.undo()
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(site)):
            del sys.modules[name]
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    registry.plugins.cache_clear()
    registry.load_plugin.cache_clear()


def _loss(install: Install, source: str, *, name: str = "odd", distribution: str = "odd-dist", module: str = "odd_module") -> None:
    install(distribution, {"ddkit.losses": {name: f"{module}:Fine"}}, **{module: source})


def _rows(cli: Callable[..., Result], *arguments: str) -> dict[str, dict[str, str]]:
    result = cli("list", *arguments, "--json")
    assert result.code == 0, result.err
    return {f"{row['kind']} {row['distribution']}/{row['name']}": row for row in json.loads(result.out)["components"]}


# A stranger that works


def test_a_strangers_loss_is_listed_loaded_described_and_run(install: Install, cli: Callable[..., Result]) -> None:
    _loss(install, FINE, name="fine")
    row = _rows(cli)["loss odd-dist/fine"]
    assert list(row.values()) == ["loss", "fine", "odd-dist", "2.5", "Says that it is fine.", "ok"]
    for others in (("--help",), ("distill", "--losses", "image-norm", "--plan")):
        assert cli(*others).code == 0
    assert "odd_module" not in sys.modules
    assert registry.load("loss", "fine") is registry.load("loss", "odd-dist/fine")
    assert "And more." in cli("info", "fine").out
    result = cli("distill", "--losses", "fine", "--pipc", 1, "--evaluate", "none", "--out", "run", *SMALL_FLAGS)
    assert result.code == 0, result.err


def test_a_class_that_a_module_only_imports_is_described_all_the_same(install: Install, cli: Callable[..., Result]) -> None:
    install("odd", {"ddkit.losses": {"fine": "front:Renamed"}}, front="from back import Fine as Renamed\n", back=FINE)
    row = _rows(cli)["loss odd/fine"]
    assert (row["status"], row["summary"]) == ("ok", "Says that it is fine.")


# Strangers that hurt in mid-run: exit code 1, and the message names the loss, its distribution and the command that helps

HURTING = {
    "raises": ("raise ValueError('of its own')", "raised ValueError: of its own"),
    "nan": ("return step.images.sum() * float('nan')", "became nan at step 0"),
    "detached": ("return step.images.detach().sum()", "requires_grad=False"),
    "a plain number": ("return 1.0", "but returned 1.0"),
    "writes to the images": ("with torch.no_grad(): step.images.mul_(2)\n        return step.images.sum()", "changes the images in place"),
    "writes to the real images": ("step.real.images.mul_(2); return step.images.sum()", "changes the real images in place"),
    "writes to what the next one uses": ("step.real.embeddings.mul_(0); return step.images.sum()", "changes the real images' embeddings "
    "in place"),
    "seeds torch": ("torch.manual_seed(0); return step.images.sum()", "random state of torch"),
    "draws from numpy": ("numpy.random.rand(); return step.images.sum()", "random state of numpy"),
    "draws from Python": ("random.random(); return step.images.sum()", "random state of Python"),
}  # fmt: skip


@pytest.mark.parametrize("how", HURTING)
def test_a_loss_that_hurts_in_mid_run_is_named_with_its_distribution_and_what_helps(
    install: Install, cli: Callable[..., Result], how: str
) -> None:
    body, cause = HURTING[how]
    source = FINE.replace("return step.images.square().mean()", body).replace("import ddkit", "import random\nimport ddkit, numpy, torch")
    _loss(install, source.replace("    def __call__", "    requires = ddkit.Requires(real=True, network=True)\n\n    def __call__"))
    flags = ("--pipc", 1, "--evaluate", "none", *SMALL_FLAGS)
    result = cli("distill", "--losses", "odd,image-norm", "--out", "run", *flags)
    message = " ".join(result.err.split())
    assert (result.code, result.out) == (1, ""), message
    for part in ("loss 'odd' (odd-dist 2.5) ", cause, "`ddkit check loss odd` shows more."):
        assert part in message
    assert "Traceback" not in message
    assert cli("distill", "--losses", "image-norm", "--out", "other", *flags).code == 0


# Strangers that do not: each is data for `list`, an error for whoever asks for it, and nothing for anyone else

PATCHING = """
import functools, torch

@functools.wraps(torch.manual_seed)
def seed(number):
    return torch.default_generator

torch.manual_seed = seed
torch.nn.functional.relu = print
"""
BROKEN = [
    ("import no_such_module_anywhere\n" + FINE, "ok", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ("raise SystemExit(7)\n" + FINE, "ok", "SystemExit: 7"),
    ("def broken(:\n", "SyntaxError in odd_module.py, line 1", "SyntaxError"),
    ("x = '\0'\n", "SyntaxError in odd_module.py", "null bytes"),
    ("import ddkit\n", "odd_module has no Fine", "has no attribute 'Fine'"),
    (FINE.replace("ddkit.Loss", "ddkit.Initializer"), "ok", "not a subclass of ddkit.Loss"),
    ("def Fine():\n    '''A function.'''\n", "ok", "not a subclass of ddkit.Loss"),
    (FINE + "    x: int = ddkit.option('one')\n", "ok", "has options that cannot be read: ValueError: Options(x='one')"),
    (FINE + "    x: 'Nowhere' = ddkit.option(1)\n", "ok", "has options that cannot be read: NameError"),
    (FINE + "    argument = 'size'\n", "ok", "has argument = 'size', but it must be None or one of its options"),
    (FINE + "    requires = 'real'\n", "ok", "has requires = 'real', but it must be a ddkit.Requires(...)"),
    (FINE + "    deviations = 1\n", "ok", "has deviations = 1, but it must be a mapping"),
    ("class Odd(BaseException):\n    pass\n\n\nraise Odd('at import')\n" + FINE, "ok", "Odd: at import"),
    ("import torch\ntorch.set_default_dtype(torch.float64)\n" + FINE, "ok", "when it is imported: the default dtype."),
    ("import torch\ntorch.set_num_threads(torch.get_num_threads() + 1)\n" + FINE, "ok", "when it is imported: the number of threads."),
    ("import torch\ntorch.manual_seed(1)\n" + FINE, "ok", "when it is imported: the random state of torch."),
    ("import numpy\nnumpy.random.seed(1)\n" + FINE, "ok", "when it is imported: the random state of numpy."),
    ("import torch\ntorch.Tensor.add = lambda a, b: a\n" + FINE, "ok", "when it is imported: torch.Tensor.add."),
    ("import torch\ntorch.nn.Conv2d.forward = lambda self, x: x\n" + FINE, "ok", "when it is imported: torch.nn.Conv2d.forward."),
    ("import os\nos.chdir('/')\n" + FINE, "ok", "when it is imported: the current folder."),
    ("class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n\n\nraise Mute\n" + FINE, "ok", "Mute, whose text cannot"),
    (FINE + "    x: complex = ddkit.option(1j)\n", "ok", "has options that cannot be read: TypeError"),
    (PATCHING + FINE, "ok", "when it is imported: torch.manual_seed, torch.nn.functional.relu."),
]  # fmt: skip


def shared() -> Any:
    """Returns what all code of a process shares."""
    functions = torch.Tensor.add, torch.manual_seed, torch.nn.functional.relu, torch.nn.Conv2d.forward
    return shared_state() | {"modules": 0}, functions, Path.cwd()


@pytest.mark.parametrize(("source", "status", "cause"), BROKEN, ids=[cause for _, _, cause in BROKEN])
def test_a_broken_plugin_is_data_for_list_and_an_error_only_for_its_user(
    install: Install, cli: Callable[..., Result], source: str, status: str, cause: str
) -> None:
    before = shared()
    _loss(install, source)
    install("good-dist", {"ddkit.losses": {"good": "good_module:Fine"}}, good_module=FINE)
    rows = _rows(cli)
    assert rows["loss odd-dist/odd"]["status"].startswith(status)
    assert rows["loss good-dist/good"]["status"] == rows["loss ddkit/dm"]["status"] == "ok"
    with pytest.raises(PluginError) as caught:
        registry.load("loss", "odd")
    for word in ("loss 'odd' of odd-dist 2.5", cause, "nstall"):
        assert word in str(caught.value)
    assert registry.load("loss", "good").__name__ == "Fine"
    assert cli("distill", "--losses", "good,dm", "--pipc", 1, "--plan").code == 0
    result = cli("distill", "--losses", "odd", "--pipc", 1, "--plan")
    assert (result.code, result.out) == (3, "")
    assert cause in " ".join(result.err.split())
    assert shared() == before, "what was changed is put back"


def test_a_plugin_whose_module_is_gone_is_data_for_list(install: Install, cli: Callable[..., Result]) -> None:
    install("odd-dist", {"ddkit.losses": {"odd": "gone.away:Fine", "none": "gone"}})
    rows = _rows(cli)
    assert rows["loss odd-dist/odd"]["status"] == "module gone.away not found"
    assert rows["loss odd-dist/none"]["status"] == "module gone not found"
    with pytest.raises(PluginError, match="No module named 'gone'"):
        registry.load("loss", "odd")


def test_the_first_partys_name_wins_and_the_stranger_is_reachable_by_its_distribution(install: Install, cli: Callable[..., Result]) -> None:
    _loss(install, FINE, name="dm")
    rows = _rows(cli)
    assert rows["loss ddkit/dm"]["status"] == "ok"
    assert rows["loss odd-dist/dm"]["status"] == "name taken (write odd-dist/dm)"
    assert registry.load("loss", "dm").__module__ == "ddkit_dm"
    assert registry.load("loss", "odd-dist/dm").__module__ == registry.load("loss", "Odd_Dist/dm").__module__ == "odd_module"
    flags = ["--pipc", 2, "--evaluate", "none", *SMALL_FLAGS]
    result = cli("distill", "--losses", "odd-dist/dm:0.5,dm:0.25", "--out", "run", *flags)
    assert result.code == 0, result.err
    used = {row["distribution"] for row in json.loads(Path("run/manifest.json").read_text())["plugins"] if row["kind"] == "loss"}
    assert used == {"ddkit", "odd-dist"}
    assert cli("distill", "--recipe", "run/recipe.toml", "--out", "again").code == 0
    assert Path("run/synthetic.safetensors").read_bytes() == Path("again/synthetic.safetensors").read_bytes()


def test_two_strangers_with_one_name_are_an_error_on_use_that_names_both(install: Install, cli: Callable[..., Result]) -> None:
    _loss(install, FINE, name="twin", distribution="one", module="one_module")
    _loss(install, FINE, name="twin", distribution="two", module="two_module")
    rows = _rows(cli)
    assert "write one/twin" in rows["loss one/twin"]["status"]
    assert "write two/twin" in rows["loss two/twin"]["status"]
    with pytest.raises(PluginError, match="one/twin or two/twin"):
        registry.load("loss", "twin")
    assert registry.load("loss", "two/twin").__module__ == "two_module"
    assert cli("distill", "--losses", "dm", "--pipc", 1, "--plan").code == 0
    result = cli("distill", "--losses", "twin", "--pipc", 1, "--plan")
    assert result.code == 3
    assert "one/twin or two/twin" in result.err


@pytest.mark.parametrize("name", ["Odd", "9lives", "odd_name", "odd.name"])
def test_a_bad_name_is_shown_and_refused(install: Install, cli: Callable[..., Result], name: str) -> None:
    _loss(install, FINE, name=name)
    assert _rows(cli)[f"loss odd-dist/{name}"]["status"].startswith("bad name")
    with pytest.raises(PluginError, match="lower-case letters, digits and hyphens"):
        registry.load("loss", name)


def test_ddkit_plugins_restricts_strangers_and_never_the_first_party(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    _loss(install, FINE, name="a", distribution="one", module="one_module")
    _loss(install, FINE, name="b", distribution="two-x", module="two_module")
    for value, expected in (("one", {"a"}), ("Two_X , nobody", {"b"}), ("one,two.x", {"a", "b"}), ("", set()), (",", set())):
        monkeypatch.setenv("DDKIT_PLUGINS", value)
        _forget()
        names = {p.name for p in registry.plugins() if p.kind == "loss"}
        assert names & {"a", "b"} == expected
        assert "dm" in names


# Recipes and observers of strangers


def test_a_strangers_recipes_are_found_without_importing_its_package(install: Install, cli: Callable[..., Result], tmp_path: Path) -> None:
    package = tmp_path / "site" / "odd_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "quick.toml").write_text("summary = 'Quick'\nsteps = 1\n[losses.image-norm]\n")
    (package / "torn.toml").write_text("summary = \n")
    install("odd-dist", {"ddkit.recipes": {"anything": "odd_package"}})
    rows = _rows(cli, "recipes")
    assert rows["recipe odd-dist/quick"]["summary"] == "Quick"
    assert rows["recipe odd-dist/torn"]["status"].startswith("TOMLDecodeError")
    assert rows["recipe ddkit/default"]["status"] == "ok"
    assert cli("distill", "--recipe", "quick", "--pipc", 1, "--plan").code == 0
    assert cli("distill", "--recipe", "torn", "--plan").code == 4


OBSERVER = '''
"""Writes down what it sees."""
import ddkit

SEEN = []

@ddkit.hookimpl
def run_started(path):
    SEEN.append("started")

@ddkit.hookimpl
def step_finished(index, steps):
    SEEN.append((index, steps))

@ddkit.hookimpl
def run_finished(path):
    SEEN.append("finished")
'''


def test_a_module_as_observer_sees_the_run(install: Install, cli: Callable[..., Result]) -> None:
    install("watching", {"ddkit.hooks": {"watcher": "watching_module"}}, watching_module=OBSERVER)
    row = _rows(cli, "observer")["observer watching/watcher"]
    assert (row["status"], row["summary"]) == ("ok", "Writes down what it sees.")
    result = cli("distill", "--losses", "dm", "--pipc", 2, "--evaluate", "none", "--out", "run", *SMALL_FLAGS)
    assert result.code == 0, result.err
    assert sys.modules["watching_module"].SEEN == ["started", (0, 2), (1, 2), "finished"]


@pytest.mark.parametrize("broken", ["import no_such_module_anywhere\n", OBSERVER.replace("SEEN.append", "no_such_name")])
def test_a_broken_observer_never_stops_a_run(
    install: Install, cli: Callable[..., Result], caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    install("bad", {"ddkit.hooks": {"bad": "bad_module"}}, bad_module=broken)
    install("watching", {"ddkit.hooks": {"watcher": "watching_module"}}, watching_module=OBSERVER)
    result = cli("distill", "--losses", "dm", "--pipc", 2, "--evaluate", "none", "--out", "run", *SMALL_FLAGS)
    assert result.code == 0, result.err
    assert "finished" in sys.modules["watching_module"].SEEN
    assert sum("bad" in record.message for record in caplog.records) == 1


def test_observers_of_one_name_both_see_the_run_and_one_twice_is_told(
    install: Install, cli: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        install(f"watching-{number}", {"ddkit.hooks": {"tensorboard": f"module_{number}"}}, **{f"module_{number}": OBSERVER})
    install("again", {"ddkit.hooks": {"again": "module_1"}})
    result = cli("distill", "--losses", "image-norm", "--evaluate", "none", "--out", "run", *SMALL_FLAGS)
    assert result.code == 0, result.err
    assert "finished" in sys.modules["module_1"].SEEN
    assert "finished" in sys.modules["module_2"].SEEN
    assert sum("cannot be used" in record.message for record in caplog.records) == 1


def test_an_observer_can_neither_end_a_run_nor_change_what_it_is_given(cli: Callable[..., Result], tmp_path: Path) -> None:
    kept: list[object] = []

    class Observer:
        def __init__(self, act: Callable[[dict[str, object]], object]) -> None:
            self.act = act

        @ddkit.hookimpl
        def step_finished(self, record: dict[str, object]) -> None:
            self.act(record)

        @ddkit.hookimpl
        def run_finished(self, evaluations: list[ddkit.Evaluation]) -> None:
            evaluations.clear()

    run = ddkit.distill(
        losses="image-norm", sets=SMALL, out=tmp_path / "run", observers=[Observer(sys.exit), Observer(dict.clear), Observer(kept.append)]
    )
    assert len(run.evaluations) == 1
    assert [bool(record) for record in kept] == [True, True]


@pytest.mark.parametrize("kind", ["augmenter", "model"])
def test_the_component_that_draws_globally_is_blamed_not_the_loss_that_uses_it(
    install: Install, cli: Callable[..., Result], kind: str
) -> None:
    sources = {
        "augmenter": "class Odd(ddkit.Augmenter):\n    'Odd.'\n\n    def sample(self, generator, groups):\n"
        "        return {'a': torch.rand(groups)}\n\n    def apply(self, x, parameters):\n        return x\n",
        "model": "class Odd(ddkit.Model):\n    'Odd.'\n\n    def __call__(self, channels, size, classes):\n        random.random()\n"
        "        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size[0] * size[1], classes))\n",
    }
    install("odd-dist", {f"ddkit.{kind}s": {"odd": "odd_module:Odd"}}, odd_module=f"import random\nimport ddkit, torch\n\n{sources[kind]}")
    flags = ("--augment", "odd") if kind == "augmenter" else ("--set", "network.model=odd")
    result = cli("distill", "--losses", "dm", "--pipc", 2, "--evaluate", "none", "--steps", 1, "--out", "run", *flags)
    assert result.code == 1
    assert f"The {kind} 'odd' (odd-dist 2.5) changes the global random state" in " ".join(result.err.split())


# What listing costs

SPY = """
import sys
from ddkit.cli import main
try:
    main()
finally:
    wanted = {"torch", "numpy", "sklearn", "torchvision", "ddkit_dm", "ddkit_models", "ddkit_datasets", "spy_module"}
    heavy = sorted(wanted & set(sys.modules))
    print("heavy:", *heavy, file=sys.stderr)
"""


def _imports(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", SPY, *arguments], capture_output=True, text=True, check=False, env=dict(os.environ))
    return next(line for line in done.stderr.splitlines() if line.startswith("heavy:"))


@pytest.mark.parametrize(
    "arguments", [("list",), ("list", "--json"), ("--help",), ("distill", "--help"), ("--version",), ("info", "default")]
)
def test_it_imports_no_plugin_and_neither_torch_nor_numpy(install: Install, arguments: tuple[str, ...]) -> None:
    install("spying", {"ddkit.losses": {"spy": "spy_module:Fine"}, "ddkit.hooks": {"spy": "spy_module"}}, spy_module=FINE)
    assert _imports(*arguments) == "heavy:"


@pytest.mark.parametrize("arguments", [("distill", "--losses", "dmm"), ("distill", "--set", "x=1"), ("distill", "--ipc", "0")])
def test_a_mistaken_flag_is_refused_before_torch_is_imported(arguments: tuple[str, ...]) -> None:
    assert _imports(*arguments) == "heavy:"


def test_the_import_check_can_fail(install: Install) -> None:
    _loss(install, "import ddkit_dm, ddkit_models\n" + FINE, name="spy", module="spy_module")
    found = set(_imports("info", "loss", "spy").split())
    assert {"spy_module", "ddkit_models", "ddkit_dm", "torch", "numpy"} <= found


def _seconds(*arguments: str) -> float:
    """Returns the processor time that Python takes: what an idle machine makes one wait, on a busy one too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


LIBRARIES = "import click, importlib.metadata, importlib.resources, msgspec, pluggy, tabulate"
TIMES = 3  # within half a second where the libraries take a sixth of one, as on the slowest machine that was measured


def _against_libraries(*arguments: str, times: int = 5) -> float:
    """Returns how many times as long Python takes as with the command's libraries alone: a slow machine slows both down."""
    times = [(_seconds(*arguments), _seconds("-c", LIBRARIES)) for _ in range(times)]
    return min(own for own, _ in times) / min(libraries for _, libraries in times)


@pytest.mark.parametrize("arguments", [("list",), ("--help",)])
def test_it_answers_in_little_more_time_than_its_libraries_take(arguments: tuple[str, ...]) -> None:
    assert _against_libraries("-m", "ddkit", *arguments) < TIMES


def test_the_time_check_can_fail() -> None:
    assert _against_libraries("-c", "import torch", times=1) > TIMES


# What list and info say


def test_the_listing_follows_its_schema(cli: Callable[..., Result]) -> None:
    result = cli("list", "--json")
    found = json.loads(result.out)
    assert set(found) == {"schema", "components"}
    assert found["schema"] == 1
    for row in found["components"]:
        assert list(row) == ["kind", "name", "distribution", "version", "summary", "status"]
        assert all(isinstance(value, str) for value in row.values())
        assert row["kind"] in KINDS
        if row["distribution"] == "ddkit":
            assert row["status"] == "ok"
            assert row["summary"]
    assert result.err == ""


@pytest.mark.parametrize(
    ("word", "kind"),
    [*((kind, kind) for kind in KINDS), ("losses", "loss"), ("loss-groups", "loss-group"), ("loss_groups", "loss-group"),
     *((f"{kind}s", kind) for kind in KINDS if kind not in ("loss", "loss-group")), ("Losses", "loss")],
)  # fmt: skip
def test_a_kind_is_said_in_singular_or_plural(word: str, kind: str) -> None:
    assert registry.parse_kind(word) == kind


def test_an_unknown_kind_is_refused_with_the_nearest(cli: Callable[..., Result]) -> None:
    with pytest.raises(FlagError, match="Did you mean 'loss'"):
        registry.parse_kind("lose")
    assert cli("list", "lozzes").code == 2
    assert {row["kind"] for row in _rows(cli, "losses").values()} == {"loss"}


@pytest.mark.usefixtures("forked_children")
def test_check_imports_each_in_another_process_and_says_which_fail(install: Install, cli: Callable[..., Result]) -> None:
    install(
        "odd-dist",
        {"ddkit.losses": {"bad": "bad_module:Fine", "dead": "dead_module:Fine", "fine": "fine_module:Fine", "wrong": "wrong_module:Fine"}},
        bad_module="import no_such_module_anywhere\n" + FINE,
        dead_module="import os\nos._exit(9)\n" + FINE,
        fine_module="print('noise')\n" + FINE,
        wrong_module=FINE + "    class Options(ddkit.Options):\n        power: Annotated[float, ddkit.Option('exponent', gt=0)] = 2.0\n",
    )
    status = {key: row["status"] for key, row in _rows(cli, "losses", "--check").items()}
    assert "no_such_module_anywhere" in status["loss odd-dist/bad"]
    assert "ended the process (exit 9)" in status["loss odd-dist/dead"]
    assert 'power: float = ddkit.option(2.0, "exponent", gt=0)' in status["loss odd-dist/wrong"]
    assert status["loss odd-dist/fine"] == status["loss ddkit/dm"] == status["loss ddkit/gm"] == "ok"
    assert "bad_module" not in sys.modules


FIRST_PARTY = [(p.kind, p.name) for p in registry.plugins() if p.first_party]


def flat(text: str) -> str:
    return " ".join(text.split())


def sections(page: str) -> dict[str, str]:
    """Returns the text under each heading of a page, in order."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


PAGE = ["Use", "Members", "Options", "Settings", "File", "Requirements", "See also"]


@pytest.mark.parametrize(("kind", "name"), FIRST_PARTY)
def test_info_describes_every_component_in_sections_in_order_with_options_and_commands_that_parse(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    page, facts = cli("info", kind, name), cli("info", kind, name, "--json")
    assert (page.code, facts.code, page.err) == (0, 0, ""), page.err + facts.err
    under = sections(page.out)
    assert page.out.startswith(f"# {kind.replace('-', ' ').capitalize()} `{name}`\n\n")
    assert list(under) == [title for title in PAGE if title in under]
    wrapped = [line for title in ("See also", "Requirements") for line in under.get(title, "").splitlines() if " " in line[2:]]
    assert max(map(len, wrapped)) <= 60
    commands = [line.split()[1:] for line in under["Use"].splitlines() if line.startswith("ddkit")]
    assert bool(commands) == (kind != "observer")
    for words in commands:
        assert command_line.commands[words[0]].make_context(words[0], words[1:]).params
    found = json.loads(facts.out)
    assert (found["schema"], found["kind"], found["name"], found["distribution"]) == (1, kind, name, "ddkit")
    if kind in ("recipe", "protocol", "study"):
        assert found["text"] == Path(registry.find(kind, name).value).read_text()
        noted = kind != "study" and "[notes]" in found["text"]
        assert flat(found["source" if noted else "text"]) in flat(page.out)
        return
    assert flat(found["description"].partition("\n\n")[0]) in flat(page.out)
    for option in found.get("options", []):
        assert set(option) == {"name", "type", "default", "bounds", "description"}
        default = "left out" if option["default"] is None else json.dumps(option["default"])
        assert f"`{option['name']} = {default}`" in flat(page.out)
    if kind == "loss-group":
        assert ", ".join(f"`{member}`" for member in found["members"]) in page.out
        return
    own = options_type(registry.load(kind, name)).__struct_fields__ if kind != "observer" else ()
    assert {option["name"] for option in found.get("options", [])} == set(own)


def test_info_tells_the_argument_after_a_colon_requirements_bounds_and_what_a_recipe_for_teachers_is_for(
    cli: Callable[..., Result],
) -> None:
    found = sections(cli("info", "dataset", "imagefolder").out)
    assert "ddkit distill --dataset imagefolder:PATH\n" in found["Use"]
    assert "--set data.OPTION=VALUE" in found["Use"]
    assert json.loads(cli("info", "dataset", "imagefolder", "--json").out)["argument"] == "path"
    assert "`real`: true" in cli("info", "loss", "dm").out
    assert "> 0" in cli("info", "noise").out
    assert "ddkit train --recipe teacher --out teacher.safetensors" in sections(cli("info", "recipe", "teacher").out)["Use"]


def test_groups_of_losses_stand_in_a_file_beside_recipes(install: Install, cli: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "site" / "odd_recipes"
    folder.mkdir()
    groups = {"both": ["dm", "total-variation"], "empty": [], "odd-dist-twice": ["dm", "ddkit/dm"]}
    (folder / "groups.toml").write_text("[groups]\n" + "".join(f"{name} = {json.dumps(names)}\n" for name, names in groups.items()))
    install("odd-dist", {"ddkit.recipes": {"odd": "odd_recipes"}})
    rows = {name: _rows(cli, "loss-groups")[f"loss-group odd-dist/{name}"] for name in groups}
    assert (rows["both"]["status"], rows["both"]["summary"]) == ("ok", "The losses dm and total-variation, used together.")
    chosen = select_losses("both:0.5", {}, {"dm": {"weight": 200.0}})
    assert chosen == {"dm": {"weight": 100.0}, "total-variation": {"weight": 0.5}}
    for name in ("empty", "odd-dist-twice"):
        assert "must be a list of different losses" in rows[name]["status"]
        assert cli("distill", "--losses", name, "--plan").code == 3
    (folder / "groups.toml").write_text("[groups")
    registry.plugins.cache_clear()
    assert "TOMLDecodeError" in _rows(cli, "loss-groups")["loss-group odd-dist/groups"]["status"]


@pytest.mark.parametrize(("name", "kind"), [("dm", "loss"), ("dkkt", "loss-group")])
def test_a_name_of_a_loss_and_of_a_recipe_means_the_loss_and_the_recipe_is_named(cli: Callable[..., Result], name: str, kind: str) -> None:
    assert cli("info", name).out == cli("info", kind, name).out
    assert f"`ddkit info recipe {name}` (the recipe of that name)" in flat(cli("info", name).out)
    assert json.loads(cli("info", name, "--json").out)["namesakes"] == ["recipe"]
    assert f"`ddkit info {kind} {name}` (the {kind} of that name)" in flat(cli("info", "recipe", name).out)
    assert json.loads(cli("info", "convnet", "--json").out)["namesakes"] == []


def test_info_of_an_unknown_name_says_what_to_type(cli: Callable[..., Result]) -> None:
    assert "Did you mean 'convnet'?" in cli("info", "convnett").err
    assert "Did you mean 'digits'?" in cli("info", "dataset", "digitz").err
    assert cli("info", "a", "b", "c").code == 2
