"""Bad input: the documented exit code, one clear paragraph on stderr, nothing on stdout, nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ddkit.files import read_tensors, write_tensors
from tests.conftest import SMALL_FLAGS, Result, png_of, write_image_folder

Cli = Callable[..., Result]


class Case(NamedTuple):
    """A mistaken command: its arguments, its exit code, and the phrase with which its message begins.

    In both THINGS stands for the folder of the fixture, in the phrase ` ... ` for any words.
    """

    command: str
    code: int
    phrase: str


def _cases() -> list[Case]:
    """Returns the cases of bad_input.txt: a line `$ COMMAND`, a line `CODE PHRASE`; lines with # are headings."""
    lines = (Path(__file__).parent / "bad_input.txt").read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if line and not line.startswith("#")]
    pairs = list(zip(told[::2], told[1::2], strict=True))
    return [Case(command.removeprefix("$ "), int(answer.partition(" ")[0]), answer.partition(" ")[2]) for command, answer in pairs]


CASES = _cases()
SYSTEM = "[systems.a]\nbaseline = 'random-real'\n"


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of broken things that the cases name as THINGS/..."""
    root = tmp_path_factory.mktemp("things")
    _write_folders(root)
    _write_arrays(root)
    _write_teachers(root)
    _write_runs(root)
    recipes = {
        "nan": "[losses.dm]\nweight = nan\n",
        "inf": "[losses.dm]\nweight = inf\n",
        "negative": "[losses.dm]\nweight = -0.5\n",
        "ipc0": "ipc = 0\n[losses.dm]\n",
        "pipc": "pipc = 'most'\n[losses.dm]\n",
        "key": "stepz = 3\n[losses.dm]\n",
        "tablekey": "[engine]\nlog_evry = 3\n[losses.dm]\n",
        "option": "[augmenter]\nuse = 'dsa'\nscal = 2.0\n[losses.dm]\n",
        "optionnan": "[augmenter]\nuse = 'dsa'\nscale = nan\n[losses.dm]\n",
        "bounds": "[initializer]\nuse = 'noise'\nstd = -1.0\n[losses.dm]\n",
        "torn": "ipc = \n",
        "twice": "[losses.dm]\n[losses.dm]\n",
        "rules": "rules = 'none'\n[losses.dm]\n",
        "rule": "[losses.dm]\n[[rules]]\nwhen = {ipc_least = 3}\nset = {steps = 1}\n",
        "ruletype": "[losses.dm]\n[[rules]]\nwhen = {ipc_min = '3'}\nset = {}\n",
        "ruleloss": "[losses.dm]\n[[rules]]\nwhen = {}\nset = {'losses.dmm.weight' = 3}\n",
        "ruleset": "[losses.dm]\n[[rules]]\nwhen = {}\nset = {stepz = 1}\n",
        "optimizer": "[losses.dm]\n[optimizer.multipliers]\nlr = 0.1\n",
        "view": "[losses.dkkt-primal]\nviews = {raw = 1.0, blurry = 1.0}\n",
        "loss": "[losses.dmm]\n",
        "evaluator": "[losses.dm]\n[evaluators.acuracy]\n",
        "nolosses": "ipc = 1\n",
        "table": "data = 3\n[losses.dm]\n",
        "code": "[losses.dm]\n[network]\nmodel = 'python:os.system'\n",
        "yaml": "summary: !!python/object/apply:os.system [echo]\n",
        "deep": f"data.{'.'.join('a' * 99)} = 1\n[losses.dm]\n",
        "longnumber": f"ipc = {'9' * 5000}\n[losses.dm]\n",
        "future": "schema = 2\n[losses.dm]\n",
        "study": f"{SYSTEM}[[cells]]\nipc = 1\npipc = 2\n",
        "nosystems": "[[cells]]\nipc = 1\npipc = 2\n",
        "nocells": SYSTEM,
        "stranger-study": f"pictures = ['b']\n{SYSTEM}[[cells]]\nipc = 1\npipc = 2\n",
        "badrecipe-study": "[systems.a]\nrecipe = 'practicl'\n[[cells]]\nipc = 1\npipc = 2\n",
        "badcell": f"{SYSTEM}[[cells]]\nipc = 0\npipc = 2\n",
        "badsystem": f"{SYSTEM}picp = 1\n[[cells]]\nipc = 1\npipc = 2\n",
        "twocells": f"{SYSTEM}[[cells]]\nipc = 1\npipc = 2\n[[cells]]\nipc = 1\npipc = 2\n",
        "protocol-key": "epochs = 3\nbacth = 4\n",
        "protocol-bounds": "epochs = 3\nmix = 'cutmx'\n",
        "protocol-epochs": "lr = 0.1\n",
        "reserved": f"set = {{seed = 3}}\n{SYSTEM}[[cells]]\nipc = 1\npipc = 2\n",
    }
    for name, text in recipes.items():
        (root / f"{name}.toml").write_text(text)
    (root / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (root / "broken.py").write_text("import nothing_of_that_name\n")
    (root / "nothing.py").write_text("x = 1\n")
    return root


def _write_folders(root: Path) -> None:
    write_image_folder(root / "images")
    (root / "empty").mkdir()
    shutil.copytree(root / "images", root / "hollow")
    (root / "hollow" / "train" / "ant").mkdir()
    shutil.copytree(root / "images", root / "corrupt")
    for file in (root / "corrupt" / "train" / "cat").iterdir():
        file.write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    shutil.copytree(root / "images", root / "stranger")
    (root / "stranger" / "test" / "yak").mkdir()
    (root / "text.txt").write_text("hello\n")
    for name in ("case", "accents", "loop", "bomb", "notest", "bytes", "oneclass", "floats"):
        shutil.copytree(root / "images", root / name)
    for split in ("train", "test"):
        shutil.copytree(root / "images" / split / "cat", root / "case" / split / "Cat")
        shutil.copytree(root / "images" / split / "cat", root / "accents" / split / "b\u00e9b\u00e9")
        shutil.copytree(root / "images" / split / "cat", root / "accents" / split / "be\u0301be\u0301")
        for name in ("dog", "owl"):
            shutil.rmtree(root / "oneclass" / split / name)
    (root / "loop" / "train" / "round").symlink_to(root / "loop" / "train" / "round")
    (root / "bomb" / "train" / "owl" / "000.png").write_bytes(png_of(60_000, 60_000))
    (root / "floats" / "train" / "owl" / "000.png").unlink()
    for number in range(9):
        Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "floats" / "train" / "owl" / f"{number}.tif")
    shutil.rmtree(root / "notest" / "test")
    (root / "bytes" / "train" / "cat" / "000.png").rename(os.fsdecode(os.fsencode(root / "bytes" / "train" / "cat") + b"/\xff.png"))
    write_image_folder(root / "onepixel", size=(1, 1))


def _write_arrays(root: Path) -> None:
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    np.savez(root / "negative.npz", x_train=x, y_train=y - 1)
    np.savez(root / "gap.npz", x_train=x, y_train=2 * y, x_test=x, y_test=2 * y)
    np.savez(root / "nolabels.npz", x_train=x)
    np.savez(root / "notestlabels.npz", x_train=x, y_train=y, x_test=x)
    np.savez(root / "short.npz", x_train=x, y_train=y[:3])
    wide, images = np.arange(8) % 2, np.zeros((8, 8, 8), np.uint8)
    both: dict[str, Any] = {"x_train": images, "y_train": wide, "x_test": images, "y_test": wide}
    changes: dict[str, dict[str, Any]] = {
        "outofrange": {"y_train": wide * 900}, "testlabel": {"y_test": wide * 2}, "floatlabels": {"y_train": wide * 0.5},
        "nan": {"x_train": images * np.nan}, "beyond": {"x_train": images + 1.5}, "below": {"x_test": images - 0.5},
        "oneclass": {"y_train": wide * 0, "y_test": wide * 0}, "noimages": {"x_train": images[:0], "y_train": wide[:0]},
        "emptytest": {"x_test": images[:0], "y_test": wide[:0]}, "fivechannels": {"x_train": np.zeros((8, 8, 8, 5), np.uint8)},
        "flat": {"x_train": images[:, 0]}, "samename": {"class_names": np.array(["owl", "owl"])},
        "fewnames": {"class_names": np.array(["owl"])}, "bytenames": {"class_names": np.array([b"owl", b"\xff"])},
        "int64": {"x_train": images.astype(np.int64) + 300}, "scalar": {"x_train": np.uint8(3)},
        "onepixel": {"x_train": images[:, :1, :1], "x_test": images[:, :1, :1]},
    }  # fmt: skip
    for name, change in changes.items():
        np.savez(root / f"{name}.npz", **(both | change))
    (root / "torn.npz").write_bytes((root / "onepixel.npz").read_bytes()[:-30])
    np.savez(root / "objects.npz", x_train=np.array([{}, {}], dtype=object), y_train=y[:2])


def _write_teachers(root: Path) -> None:
    import ddkit

    small = {"train.epochs": 1, "teacher.width": 8}
    teacher = ddkit.train(root / "digits.safetensors", dataset="digits", model="convnet", sets=small, device="cpu")
    tensors, record = teacher.module.state_dict(), {k: v for k, v in teacher.info.items() if k != "schema"}
    names = [*record["class_names"][:9], "owl", "yak"]
    write_tensors(root / "classes.safetensors", tensors, {**record, "class_names": names})
    write_tensors(root / "order.safetensors", tensors, {**record, "class_names": record["class_names"][::-1]})
    write_tensors(root / "shape.safetensors", tensors, {**record, "input_shape": [3, 32, 32]})
    renamed = {key.replace("classifier", "head"): value for key, value in tensors.items()}
    write_tensors(root / "keys.safetensors", renamed, record)
    write_tensors(root / "width.safetensors", tensors, {**record, "options": {**record["options"], "width": 16}})
    write_tensors(root / "notfinite.safetensors", {**tensors, "classifier.bias": torch.full((10,), torch.nan)}, record)
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in tensors.items()}, root / "bare.safetensors")
    (root / "text.safetensors").write_text("I am not a teacher.\n")
    torch.save(tensors, root / "pickled.pt")


def _write_runs(root: Path) -> None:
    import ddkit

    sets = {"steps": 0, "evaluators.accuracy.epochs": 1}
    ddkit.distill(losses="dm", pipc=2, evaluators="none", sets=sets, device="cpu", out=root / "run")
    file = root / "run" / "synthetic.safetensors"
    ddkit.distill(losses="dm", pipc=2, evaluators="none", seed=1, sets=sets, device="cpu", out=root / "other")
    names = ("truncated", "swapped", "norecipe", "tornrecipe", "nocheckpoint", "badmanifest")
    for name in (*names, "nomanifest", "othermanifest", "flipped", "editedrecipe"):
        shutil.copytree(root / "run", root / name)
    (root / "truncated" / file.name).write_bytes(file.read_bytes()[:-50])
    (root / "swapped" / file.name).write_text("not tensors")
    (root / "norecipe" / "recipe.toml").unlink()
    (root / "tornrecipe" / "recipe.toml").write_text("ipc = \n")
    (root / "nocheckpoint" / "manifest.json").unlink()
    for checkpoint in (root / "nocheckpoint" / "checkpoints").iterdir():
        checkpoint.write_bytes(b"torn")
    (root / "badmanifest" / "manifest.json").write_text("{")
    (root / "nomanifest" / "manifest.json").unlink()
    shutil.copyfile(root / "other" / "manifest.json", root / "othermanifest" / "manifest.json")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    (root / "flipped" / file.name).write_bytes(content)
    (root / "flippedset.safetensors").write_bytes(content)
    recipe = root / "editedrecipe" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 0", "seed = 1"))
    (root / "editedrecipe" / "manifest.json").unlink()
    tensors, record = read_tensors(file)
    images, labels = tensors["images"], tensors["labels"]
    write_tensors(root / "notfiniteset.safetensors", {"images": images * torch.nan, "labels": labels}, record)
    write_tensors(root / "emptyset.safetensors", {"images": images[:0], "labels": labels[:0]}, record)
    write_tensors(root / "twice.safetensors", tensors, record | {"class_names": ["owl"] * 10})
    write_tensors(root / "outside.safetensors", {"images": images, "labels": labels + 1}, record)
    write_tensors(root / "zerostd.safetensors", tensors, record | {"std": [0.0]})
    write_tensors(root / "cats.safetensors", tensors, record | {"class_names": ["cat", *map(str, range(1, 10))]})
    write_tensors(root / "two.safetensors", {"images": images.repeat(2, 1, 1, 1), "labels": labels.repeat(2)}, record)
    write_tensors(root / "large.safetensors", {"images": images.repeat(1, 1, 2, 2), "labels": labels}, record)
    write_tensors(root / "nolabels.safetensors", {"images": tensors["images"]}, record)
    write_tensors(root / "nometa.safetensors", tensors, {})
    write_tensors(root / "futureset.safetensors", tensors, {**record, "schema": 99})


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every download fail at once, through a proxy that is not there."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def _tree(folder: Path) -> dict[str, int | None]:
    """Returns the size of every file below `folder`, None for folders; by os.walk, as Path.rglob took most of this module's time."""
    found: dict[str, int | None] = {}
    for at, folders, files in os.walk(folder):
        below = f"{at}/"[len(f"{folder}/") :]
        found |= {f"{below}{name}": None for name in folders} | {f"{below}{name}": os.lstat(f"{at}/{name}").st_size for name in files}
    return found


def _arguments(case: Case, things: Path) -> list[str]:
    return [word.replace("THINGS", str(things)) for word in case.command.split()]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it a failure to train a network, to distil a step, or to start a process."""

    def fail(*arguments: object, **named: object) -> None:
        raise AssertionError("work began before the input was checked")

    for name in (
        "ddkit.nn.training.fit",
        "ddkit.nn.automatic_teacher.fit",
        "ddkit.run.run.distill",
        "ddkit.engine.loop.Engine.start",
        "subprocess.Popen",
    ):
        monkeypatch.setattr(name, fail)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", CASES, ids=[f"{case.code}: {case.command[:90]}" for case in CASES])
def test_bad_input_is_told_in_one_paragraph_before_any_work_and_leaves_nothing_behind(case: Case, things: Path, cli: Cli) -> None:
    before = _tree(things)
    result = cli(*_arguments(case, things))
    assert (result.code, result.out) == (case.code, ""), result.err
    pattern = re.escape(case.phrase).replace(re.escape(" ... "), ".*").replace("THINGS", re.escape(str(things)))
    told = dropwhile(lambda line: line.startswith(("Reading ", "Making ")), result.err.splitlines())  # stages that were begun before
    assert re.match(f"ddkit: {pattern}", " ".join(" ".join(told).split())), result.err
    assert "\n\n" not in result.err.strip()
    assert _tree(Path.cwd()) == {}
    assert _tree(things) == before


def test_the_table_covers_every_command_and_every_documented_exit_code_of_bad_input() -> None:
    from ddkit.cli import cli as commands

    by_command = Counter(case.command.split()[0] for case in CASES)
    assert {case.code for case in CASES} == {2, 3, 4, 5}
    assert len({case.command for case in CASES}) == len(CASES) >= 80
    assert {name for name in commands.commands if by_command[name] < 5} == set()


@pytest.mark.usefixtures("no_work")
def test_work_that_begins_would_be_noticed(cli: Cli) -> None:
    with pytest.raises(AssertionError, match="work began"):
        cli("distill", "--losses", "dkkt", "--pipc", 2, *SMALL_FLAGS, "--set", "train.epochs=3")
    with pytest.raises(AssertionError, match="work began"):
        cli("distill", "--losses", "dm", "--pipc", 2, *SMALL_FLAGS)


def test_the_same_command_without_the_mistake_does_leave_something(cli: Cli) -> None:
    result = cli("distill", "--losses", "dm", "--pipc", 2, *SMALL_FLAGS, "--evaluate", "none")
    assert result.code == 0, result.err
    assert "runs/dm-digits-1/synthetic.safetensors" in _tree(Path.cwd())


def test_traceback_shows_where_an_error_comes_from(cli: Cli) -> None:
    result = cli("distill", "--losses", "dmm", "--traceback")
    assert result.code == 3
    assert "Traceback" in result.err
    assert "Did you mean 'dm'" in result.err


def test_no_arguments_at_all_show_the_help(cli: Cli) -> None:
    result = cli()
    assert result.code == 2
    assert "ddkit distill --losses dm,dkkt --ipc 10" in result.err


def test_an_error_removes_only_the_folders_that_were_made_for_the_run(cli: Cli) -> None:
    Path("old").mkdir()
    for out in ("old", "old/new/run"):
        assert cli("distill", "--losses", "dm", "--pipc", 0, "--out", out).code == 4
        assert _tree(Path.cwd()) == {"old": None}


def test_a_downloaded_file_of_garbage_is_an_error_too(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    (folder / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    result = cli("distill", "--losses", "dm", "--pipc", 2, "--dataset", "cifar10", "--data-dir", folder)
    assert (result.code, result.out) == (4, "")
    assert "imagefolder:PATH" in " ".join(result.err.split())


@pytest.mark.parametrize("place", ["train/cat/000.png", "train/cat", "train", "x.npz", "run/synthetic.safetensors", "recipe.toml"])
def test_what_may_not_be_read_is_told(things: Path, tmp_path: Path, cli: Cli, place: str) -> None:
    root = shutil.copytree(things / "images", tmp_path / "closed")
    shutil.copytree(things / "run", root / "run")
    shutil.copyfile(things / "emptytest.npz", root / "x.npz")
    (root / "recipe.toml").write_text("[losses.dm]\n")
    commands = {
        "x.npz": f"distill --losses dm --dataset npz:{root}/x.npz",
        "run/synthetic.safetensors": f"evaluate {root}/run",
        "recipe.toml": f"distill --recipe {root}/recipe.toml",
    }
    (root / place).chmod(0)
    if os.access(root / place, os.R_OK):
        pytest.skip("this user may read everything")
    try:
        result = cli(*commands.get(place, f"distill --losses dm --pipc all --dataset imagefolder:{root}").split())
    finally:
        (root / place).chmod(0o755)
    assert (result.code, result.out) == (5 if place.startswith("run") else 4, "")
    assert str(root / place) in result.err.replace("\n", " ")
    assert _tree(Path.cwd()) == {}
