"""Bad input: the documented exit code, one clear paragraph on stderr, nothing on stdout, nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ddkit.files import read_tensors, write_tensors
from tests.conftest import SMALL_FLAGS, Result, write_image_folder

Cli = Callable[..., Result]


class Case(NamedTuple):
    """A mistaken command: its arguments, its exit code, and words that the message must hold."""

    command: str
    code: int
    words: tuple[str, ...]


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
        "ruleset": "[losses.dm]\n[[rules]]\nwhen = {}\nset = {stepz = 1}\n",
        "optimizer": "[losses.dm]\n[optimizer.multipliers]\nlr = 0.1\n",
        "view": "[losses.dkkt-primal]\nviews = {raw = 1.0, blurry = 1.0}\n",
        "loss": "[losses.dmm]\n",
        "evaluator": "[losses.dm]\n[evaluators.acuracy]\n",
        "nolosses": "ipc = 1\n",
        "table": "data = 3\n[losses.dm]\n",
    }
    for name, text in recipes.items():
        (root / f"{name}.toml").write_text(text)
    (root / "binary.toml").write_bytes(b"\xff\xfe\x00")
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


def _write_arrays(root: Path) -> None:
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    np.savez(root / "negative.npz", x_train=x, y_train=y - 1)
    np.savez(root / "gap.npz", x_train=x, y_train=2 * y, x_test=x, y_test=2 * y)
    np.savez(root / "nolabels.npz", x_train=x)
    np.savez(root / "short.npz", x_train=x, y_train=y[:3])
    np.savez(root / "objects.npz", x_train=np.array([{}, {}], dtype=object), y_train=y[:2])


def _write_teachers(root: Path) -> None:
    import ddkit

    small = {"train.epochs": 1, "teacher.width": 8}
    teacher = ddkit.train(root / "digits.safetensors", dataset="digits", model="convnet", sets=small, device="cpu")
    tensors, record = teacher.module.state_dict(), {k: v for k, v in teacher.info.items() if k != "schema"}
    names = [*record["class_names"][:9], "owl", "yak"]
    write_tensors(root / "classes.safetensors", tensors, {**record, "class_names": names})
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
    for name in ("truncated", "swapped", "norecipe", "tornrecipe", "nocheckpoint", "badmanifest"):
        shutil.copytree(root / "run", root / name)
    (root / "truncated" / file.name).write_bytes(file.read_bytes()[:-50])
    (root / "swapped" / file.name).write_text("not tensors")
    (root / "norecipe" / "recipe.toml").unlink()
    (root / "tornrecipe" / "recipe.toml").write_text("ipc = \n")
    (root / "nocheckpoint" / "manifest.json").unlink()
    for checkpoint in (root / "nocheckpoint" / "checkpoints").iterdir():
        checkpoint.write_bytes(b"torn")
    (root / "badmanifest" / "manifest.json").write_text("{")
    tensors, record = read_tensors(file)
    write_tensors(root / "nolabels.safetensors", {"images": tensors["images"]}, record)
    write_tensors(root / "nometa.safetensors", tensors, {})
    write_tensors(root / "futureset.safetensors", tensors, {**record, "schema": 99})


D = "distill --losses dm --pipc 2"
CASES = [
    # flags whose own value is impossible
    Case("distill --losses dm:-1", 2, ("--losses dm:-1", "at least 0")),
    Case("distill --losses dm:nan", 2, ("finite",)),
    Case("distill --losses dm:inf", 2, ("finite",)),
    Case("distill --losses dm:much", 2, ("'much' is not a number",)),
    Case("distill --losses dm,dm", 2, ("'dm' is chosen twice",)),
    Case("distill --losses dkkt,dkkt-primal", 2, ("'dkkt-primal' is chosen twice",)),
    Case("distill --losses dm,", 2, ("a loss name is empty",)),
    Case(f"{D} --ipc 0", 2, ("--ipc", "0")),
    Case(f"{D} --ipc one", 2, ("--ipc", "one")),
    Case("distill --losses dm --pipc some", 2, ("--pipc", "'some' is neither a number nor 'all'")),
    Case("distill --losses dm --pipc -1", 2, ("--pipc", "negative")),
    Case(f"{D} --steps -1", 2, ("--steps", "-1")),
    Case(f"{D} --seed -1", 2, ("--seed", "-1")),
    Case(f"{D} --set steps", 2, ("--set steps", "PATH=VALUE")),
    Case(f"{D} --set =3", 2, ("PATH=VALUE",)),
    Case(f"{D} --protocol quick", 2, ("--protocol", "quick", "short")),
    Case(f"{D} --protocol shrt --plan", 2, ("Did you mean 'short'",)),
    Case(f"{D} --device cuda:77", 2, ("--device cuda:77", "no such device")),
    Case(f"{D} --device gpu", 2, ("--device gpu", "cuda")),
    Case(f"{D} --no-such-flag", 2, ("--no-such-flag", "ddkit distill --help")),
    Case("distil", 2, ("distil", "ddkit --help")),
    Case("distill --resume", 2, ("--resume", "--out")),
    Case("distill --resume --out THINGS/run --ipc 3", 2, ("--ipc", "cannot change")),
    Case("distill --resume --out THINGS/run --set steps=3", 2, ("--set", "cannot change")),
    Case("distill --resume --out THINGS/run --plan", 2, ("--plan",)),
    Case("distill --losses dm --augment dsa:strong --plan --pipc 2", 2, ("takes no argument after a colon", "strong")),
    Case("list lozzes", 2, ("no kind of component 'lozzes'",)),
    Case("info", 2, ("NAME",)),
    Case("train", 2, ("--out",)),
    Case("evaluate", 2, ("RUN|FILE",)),
    Case("evaluate THINGS/run --repeats 0", 2, ("--repeats",)),
    Case("evaluate THINGS/run --protocol quick", 2, ("--protocol", "quick")),
    # plugins that are not there
    Case("distill --losses dmm", 3, ("no loss 'dmm'", "Did you mean 'dm'", "ddkit list losses")),
    Case("distill --losses dkkt_primal", 3, ("Did you mean 'dkkt-primal'",)),
    Case("distill --losses ghost/dm", 3, ("ghost/dm",)),
    Case("distill --recipe THINGS/loss.toml", 3, ("'dmm'", "Did you mean 'dm'")),
    Case("distill --recipe THINGS/evaluator.toml", 3, ("'acuracy'", "Did you mean 'accuracy'")),
    Case(f"{D} --init noize", 3, ("no initializer 'noize'", "Did you mean 'noise'")),
    Case(f"{D} --augment dsaa", 3, ("no augmenter 'dsaa'", "Did you mean 'dsa'")),
    Case(f"{D} --evaluate acuracy", 3, ("no evaluator 'acuracy'", "Did you mean 'accuracy'")),
    Case(f"{D} --model convnett", 3, ("no model 'convnett'", "Did you mean 'convnet'")),
    Case(f"{D} --dataset digitz", 3, ("no dataset 'digitz'", "Did you mean 'digits'")),
    Case("info convnett", 3, ("Did you mean 'convnet'",)),
    Case("evaluate THINGS/run --model convnett", 3, ("no model 'convnett'",)),
    # recipes and --set
    Case("distill --recipe practicl", 4, ("no recipe 'practicl'", "--recipe ./practicl.toml")),
    Case("distill --recipe THINGS/gone.toml", 4, ("gone.toml", "does not exist")),
    Case("distill --recipe THINGS/torn.toml", 4, ("torn.toml", "TOML", "line 1")),
    Case("distill --recipe THINGS/twice.toml", 4, ("twice.toml", "TOML")),
    Case("distill --recipe THINGS/binary.toml", 4, ("binary.toml",)),
    Case("distill --recipe THINGS/empty/", 4, ("empty",)),
    Case("distill --recipe THINGS/nan.toml", 4, ("losses.dm.weight", "finite")),
    Case("distill --recipe THINGS/inf.toml", 4, ("losses.dm.weight", "finite")),
    Case("distill --recipe THINGS/negative.toml", 4, ("losses.dm.weight", "-0.5", ">= 0")),
    Case("distill --recipe THINGS/ipc0.toml", 4, ("ipc = 0", ">= 1")),
    Case("distill --recipe THINGS/pipc.toml", 4, ("pipc", "most")),
    Case("distill --recipe THINGS/key.toml", 4, ("no key 'stepz'", "Did you mean 'steps'")),
    Case("distill --recipe THINGS/tablekey.toml", 4, ("engine has no key 'log_evry'", "Did you mean 'log_every'")),
    Case("distill --recipe THINGS/option.toml --pipc 2", 4, ("dsa", "'scal'", "Did you mean 'scale'", "ddkit info dsa")),
    Case("distill --recipe THINGS/optionnan.toml --pipc 2", 4, ("augmenter.scale", "finite")),
    Case("distill --recipe THINGS/bounds.toml --pipc 2", 4, ("noise", "initializer.std", "-1.0", "> 0")),
    Case("distill --recipe THINGS/rules.toml", 4, ("rules is an array of tables",)),
    Case("distill --recipe THINGS/rule.toml", 4, ("rules[0].when", "ipc_least")),
    Case("distill --recipe THINGS/ruleset.toml", 4, ("'stepz'", "Did you mean 'steps'")),
    Case("distill --recipe THINGS/optimizer.toml --pipc 2", 4, ("optimizer.multipliers", "no parameter 'multipliers'", "images")),
    Case("distill --recipe THINGS/view.toml --pipc 2", 4, ("blurry",)),
    Case("distill --recipe THINGS/nolosses.toml --pipc 2", 4, ("no loss", "--losses")),
    Case("distill --recipe THINGS/table.toml", 4, ("data is a table", "3")),
    Case(f"{D} --set losses.dkkt.weight=1", 4, ("no loss labelled 'dkkt'",)),
    Case(f"{D} --set losses.dm.weigth=1", 4, ("'weigth'",)),
    Case(f"{D} --set losses.dm.weight=-1", 4, ("losses.dm.weight",)),
    Case(f"{D} --set losses.dm.weight=nan", 4, ("losses.dm.weight", "finite")),
    Case(f"{D} --set stepz=1", 4, ("Did you mean 'steps'",)),
    Case(f"{D} --set steps.more=1", 4, ("steps is a value, not a table",)),
    Case(f"{D} --set augmenter.use=3", 4, ("augmenter.use", "3")),
    Case(f"{D} --set network.width=0", 4, ("convnet", "network.width", ">= 1")),
    Case(f"{D} --set engine.precision=floot32", 4, ("engine.precision", "Did you mean 'float32'")),
    Case(f"{D} --set engine.compile=maybe", 4, ("engine.compile", "Choose from: auto, false, true")),
    Case(f"{D} --set engine.block=-1", 4, ("engine.block", "expected int >= 0", "It is a number, or one of: auto")),
    Case(f"{D} --set engine.chunk=atuo", 4, ("engine.chunk", "Did you mean 'auto'?")),
    Case(f"{D} --set optimizer.images.kind=rmsprop", 4, ("optimizer.images.kind", "Choose from: adam, sgd")),
    Case(f"{D} --set optimizer.images.lr=0", 4, ("optimizer.images.lr", "> 0")),
    # data
    Case("distill --losses dm --pipc 0", 4, ("pipc 0", "dm needs", "--pipc 1")),
    Case("distill --losses dm --pipc 5 --ipc 6", 4, ("'real' needs 6", "has 5", "--init noise")),
    Case("distill --losses dm --pipc all --ipc 500", 4, ("'real' needs 500",)),
    Case(f"{D} --dataset imagefolder:THINGS/gone", 4, ("gone", "does not exist")),
    Case(f"{D} --dataset imagefolder:THINGS/text.txt", 4, ("text.txt", "no folder")),
    Case(f"{D} --dataset imagefolder:THINGS/empty", 4, ("empty", "no class folders")),
    Case(f"{D} --dataset imagefolder:THINGS/hollow", 4, ("hollow/train/ant", "no image")),
    Case(f"{D} --dataset imagefolder:THINGS/corrupt", 4, ("corrupt/train/cat", "cannot be decoded")),
    Case(f"{D} --dataset imagefolder:THINGS/stranger", 4, ("class 'yak'",)),
    Case(f"{D} --dataset npz:THINGS/gone.npz", 4, ("gone.npz", "does not exist")),
    Case(f"{D} --dataset npz:THINGS/text.txt", 4, ("text.txt", "cannot be read")),
    Case(f"{D} --dataset npz:THINGS/negative.npz", 4, ("negative label",)),
    Case("distill --losses dm --pipc 1 --dataset npz:THINGS/gap.npz", 4, ("class '1'", "no training image")),
    Case(f"{D} --dataset npz:THINGS/nolabels.npz", 4, ("x_train and y_train",)),
    Case(f"{D} --dataset npz:THINGS/short.npz", 4, ("y_train", "one for each image")),
    Case(f"{D} --dataset npz:THINGS/objects.npz", 4, ("objects.npz", "plain arrays")),
    Case(f"{D} --dataset cifar10", 4, ("cifar10", "could not be downloaded", "digits", "imagefolder:PATH")),
    Case(f"{D} --dataset mnist --data-dir THINGS/text.txt", 4, ("mnist", "digits", "imagefolder:PATH")),
    # teachers
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/gone.safetensors", 4, ("gone.safetensors", "does not exist")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/text.safetensors", 4, ("text.safetensors", "safetensors")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/pickled.pt", 4, ("pickled.pt", "safetensors")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/empty", 4, ("empty",)),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/classes.safetensors", 4, ("11 classes", "'owl', 'yak'", "'9'")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/shape.safetensors", 4, ("(3, 32, 32)", "(1, 8, 8)")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/keys.safetensors", 4, ("classifier.weight", "head.weight")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/width.safetensors", 4, ("of another shape", "classifier.weight")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/notfinite.safetensors", 4, ("not finite",)),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/bare.safetensors", 4, ("bare state dict", "teacher.mean")),
    Case("distill --losses dkkt --pipc 2 --teacher THINGS/digits.safetensors --set teacher.std=[0.0]", 4, ("teacher.std", "positive")),
    Case(
        "distill --losses dkkt --pipc 2 --teacher THINGS/digits.safetensors --set teacher.mean=[0.5,0.5]", 4, ("teacher.mean", "2 values")
    ),
    # runs, artifacts and outputs
    Case(f"{D} --out THINGS/text.txt", 5, ("text.txt", "is a file")),
    Case(f"{D} --out THINGS/text.txt/below/it", 5, ("cannot be written",)),
    Case(f"{D} --out /proc/nothing", 5, ("/proc/nothing", "cannot be written")),
    Case(f"{D} --out {'x' * 300}", 5, ("cannot be written",)),
    Case(f"{D} --out THINGS/run", 5, ("already holds something", "--resume")),
    Case("distill --resume --out THINGS/gone", 5, ("gone", "no run directory")),
    Case("distill --resume --out THINGS/images", 5, ("images", "no run directory")),
    Case("distill --resume --out THINGS/tornrecipe", 5, ("recipe.toml", "is not the file that")),
    Case("distill --resume --out THINGS/nocheckpoint", 5, ("no readable checkpoint",)),
    Case("evaluate THINGS/gone", 5, ("gone", "does not exist")),
    Case("evaluate THINGS/images", 5, ("synthetic.safetensors", "does not exist")),
    Case("evaluate THINGS/truncated", 5, ("synthetic.safetensors", "is not the file that")),
    Case("evaluate THINGS/swapped", 5, ("synthetic.safetensors", "is not the file that")),
    Case("evaluate THINGS/norecipe", 5, ("no run directory",)),
    Case("evaluate THINGS/badmanifest --set evaluators.accuracy.epochs=1 --repeats 1", 5, ("manifest.json",)),
    Case("evaluate THINGS/nolabels.safetensors --dataset digits", 5, ("no tensors 'images' and 'labels'",)),
    Case("evaluate THINGS/nometa.safetensors --dataset digits", 5, ("class_names",)),
    Case("evaluate THINGS/futureset.safetensors --dataset digits", 5, ("schema 99",)),
    Case("evaluate THINGS/run/synthetic.safetensors", 4, ("--dataset",)),
    Case("evaluate THINGS/run --dataset imagefolder:THINGS/images", 4, ("classes", "'cat'")),
    Case("train --out THINGS/text.txt", 5, ("text.txt", "exists already")),
    Case("train --out THINGS/text.txt/below.safetensors", 5, ("cannot be written",)),
    Case("train --out new.safetensors --dataset imagefolder:THINGS/gone", 4, ("gone",)),
    Case("train --out new.safetensors --set train.epochs=0", 4, ("train.epochs",)),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every download fail at once, through a proxy that is not there."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def _tree(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): p.stat().st_size if p.is_file() else None for p in sorted(folder.rglob("*"))}


def _arguments(case: Case, things: Path) -> list[str]:
    return [word.replace("THINGS", str(things)) for word in case.command.split()]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.code}: {case.command[:90]}" for case in CASES])
def test_bad_input_is_told_in_one_paragraph_and_leaves_nothing_behind(case: Case, things: Path, cli: Cli) -> None:
    before = _tree(things)
    result = cli(*_arguments(case, things))
    text = " ".join(result.err.split())
    assert (result.code, result.out) == (case.code, ""), result.err
    for word in case.words:
        assert word in text
    paragraph = result.err.strip()
    assert paragraph.startswith("ddkit: ")
    assert not any(line.startswith("ddkit: ") for line in paragraph.splitlines()[1:])
    assert "\n\n" not in paragraph
    assert "Traceback" not in paragraph
    assert paragraph.endswith((".", "?", ")", "]")) or paragraph[-1].isalnum()
    assert _tree(Path.cwd()) == {}
    assert _tree(things) == before


def test_the_table_covers_every_documented_exit_code_of_bad_input() -> None:
    assert {case.code for case in CASES} == {2, 3, 4, 5}
    assert len({case.command for case in CASES}) == len(CASES) >= 45


def test_the_same_command_without_the_mistake_does_leave_something(cli: Cli) -> None:
    result = cli(*D.split(), *SMALL_FLAGS, "--evaluate", "none")
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


def test_an_out_folder_that_was_there_empty_is_empty_again_after_an_error(cli: Cli) -> None:
    Path("mine").mkdir()
    assert cli("distill", "--losses", "dm", "--pipc", 0, "--out", "mine").code == 4
    assert _tree(Path.cwd()) == {"mine": None}


def test_an_error_removes_only_the_folders_that_were_made_for_the_run(cli: Cli) -> None:
    Path("old").mkdir()
    assert cli("distill", "--losses", "dm", "--pipc", 0, "--out", "old/new/run").code == 4
    assert _tree(Path.cwd()) == {"old": None}


def test_a_downloaded_file_of_garbage_is_an_error_too(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    (folder / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    result = cli("distill", "--losses", "dm", "--pipc", 2, "--dataset", "cifar10", "--data-dir", folder)
    assert (result.code, result.out) == (4, "")
    assert "imagefolder:PATH" in " ".join(result.err.split())
