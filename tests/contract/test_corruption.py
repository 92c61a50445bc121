"""Damage to the files of a run, a set or a teacher is found: the documented exit code and the file's name, never a wrong result."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ddkit
from ddkit.api import resume
from ddkit.components.base import DataInfo
from ddkit.files import read_tensors, sha256, with_digest, write_json, write_tensors
from ddkit.nn.teacher import load_teacher
from ddkit.recipes.tables import TeacherTable
from ddkit.run.artifact import Artifact
from ddkit.run.directory import RunDirectory, save_set
from ddkit.run.manifest import file_entry, read_evaluations, read_manifest
from ddkit.run.metrics import append_metrics, read_metrics
from tests.conftest import Result

Cli = Callable[..., Result]
INFO = DataInfo(class_names=("a", "b"), channels=1, size=(4, 4))
RECIPE = {"name": "small", "steps": 4, "seed": 3, "losses": {"dm": {"weight": 0.5}}}


def _artifact(seed: int = 0) -> Artifact:
    images = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Artifact(images, torch.arange(2), {"class_names": ["a", "b"], "mean": [0.4], "std": [0.2], "ipc": 1, "pipc": 5, "seed": seed})


def _small_run(path: Path, seed: int = 0, *, finished: bool = True) -> Path:
    """Writes all files of a tiny run, as a run writes them."""
    directory = RunDirectory.claim(path)
    directory.write_recipe(RECIPE | {"seed": seed})
    for step in (2, 4):
        directory.write_checkpoint(step, {"images": torch.full((2, 1, 2, 2), float(step + seed))})
    append_metrics(directory.path, {"step": 0, "total": 0.25 + seed, "losses": {"dm": {"raw": 0.5, "weighted": 0.25}}, "seconds": 0.1})
    if finished:
        save_set(_artifact(seed), directory)
        row = {"evaluator": "accuracy", "model": "mlp", "protocol": "short", "labels": "hard", "repeats": 1, "accuracy_std": None}
        rows = [row | {"accuracy_mean": 0.5 + seed / 10}]
        (path / "evaluation.json").write_text(json.dumps({"schema": 1, "evaluations": rows}))
        directory.write_manifest({"seed": seed, "steps": 4, "seconds": 1.5, "plugins": [], "real_files": [0, 1]})
    return path


def _write_teacher(path: Path, seed: int = 0) -> Path:
    from ddkit.components import registry
    from ddkit.nn.networks import build_network

    model = registry.create("model", "convnet", {"width": 2, "depth": 1}, data=INFO, where="teacher")
    module = build_network(model, INFO, seed, "test")
    record = {"model": "convnet", "options": {"width": 2, "depth": 1}, "mean": [0.4], "std": [0.2]}
    write_tensors(path, module.state_dict(), record | {"class_names": ["a", "b"], "input_shape": [1, 4, 4]})
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the runs `run`, `other` and `cut` (not finished), and the files `set` and `teacher`."""
    root = tmp_path_factory.mktemp("small")
    _small_run(root / "run")
    _small_run(root / "other", seed=1)
    _small_run(root / "cut", finished=False)
    _artifact().save(root / "set.safetensors")
    _write_teacher(root / "teacher.safetensors")
    return root


# What each file says when it is read: compared before and after damage


def _read_set(path: Path) -> Any:
    found = ddkit.load(path)
    return found.images.tolist(), found.labels.tolist(), found.class_names, found.mean, found.std


def _read_recipe(run: Path) -> Any:
    return RunDirectory.existing(run).read_recipe()


def _read_rows(run: Path) -> Any:
    return read_evaluations(run)


def _read_manifest(run: Path) -> Any:
    found = read_manifest(run)
    return [found[key] for key in ("seed", "steps", "seconds", "plugins", "real_files", "files")]


def _read_teacher(path: Path) -> Any:
    found = load_teacher(TeacherTable(use=str(path), model="convnet"), INFO, torch.device("cpu"))
    weights = [value.tolist() for value in found.module.state_dict().values()]
    return found.mean, found.std, weights, found.logits(torch.ones(1, 1, 4, 4))[0, 0]


def _read_checkpoint(run: Path) -> Any:
    directory = RunDirectory.existing(run)
    directory.read_recipe()
    newest = directory.newest_checkpoint()
    if newest is None:
        raise ddkit.RunFilesError("step-00000004.safetensors")
    return newest[0], newest[1]["images"].tolist()


def _read_unfinished(run: Path) -> Any:
    """Returns what a run goes on with, its number of steps apart, which may be changed."""
    return RunDirectory.existing(run).read_recipe() | {"steps": 0}, _read_checkpoint(run)


READERS = {
    "set.safetensors": (_read_set, "", 5),
    "teacher.safetensors": (_read_teacher, "", 4),
    "run/synthetic.safetensors": (_read_set, "run", 5),
    "run/recipe.toml": (_read_recipe, "run", 5),
    "run/evaluation.json": (_read_rows, "run", 5),
    "run/manifest.json": (_read_manifest, "run", 5),
    "cut/recipe.toml": (_read_unfinished, "cut", 5),
}
SAME_WITH_SPACE = ("run/manifest.json", "cut/recipe.toml")  # they say the same without their last newline


def _outcome(small: Path, name: str) -> Any:
    """Returns ("read", what the file says) or ("refused", exit code, message)."""
    reader, target, _ = READERS[name]
    try:
        return "read", reader(small / (target or name))
    except ddkit.DdkitError as error:
        return "refused", error.exit_code, str(error)


def _refuses(small: Path, name: str, content: bytes) -> None:
    """Asserts that the file with `content` is refused with its exit code and name, and puts the file back."""
    path = small / name
    whole = path.read_bytes()
    assert content != whole
    try:
        path.write_bytes(content)
        outcome = _outcome(small, name)
    finally:
        path.write_bytes(whole)
    assert outcome[:2] == ("refused", READERS[name][2]), outcome
    assert path.name in outcome[2]


SOME = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])  # of the places where damage is tried


@pytest.mark.parametrize("name", READERS)
def test_a_whole_file_is_read_twice_alike(small: Path, name: str) -> None:
    assert _outcome(small, name)[0] == "read"
    assert _outcome(small, name) == _outcome(small, name)


@SOME
@pytest.mark.parametrize("name", READERS)
def test_a_file_cut_off_at_any_byte_is_refused(small: Path, name: str, every: int) -> None:
    whole = (small / name).read_bytes()
    end = len(whole.rstrip(b"\n")) if name in SAME_WITH_SPACE else len(whole)
    for length in (*range(0, end, every), end - 1):
        _refuses(small, name, whole[:length])


@pytest.mark.parametrize("name", READERS)
def test_a_file_with_something_after_its_end_is_refused(small: Path, name: str) -> None:
    whole = (small / name).read_bytes()
    _refuses(small, name, whole + (b"x" if name in SAME_WITH_SPACE else b"\n"))


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


@SOME
@pytest.mark.parametrize("name", READERS)
def test_flipped_bits_change_no_result(small: Path, name: str, every: int) -> None:
    """A flip is refused; in the few places that say nothing (white space, the word that there is a digest) the same is read."""
    path = small / name
    whole, before, draw = path.read_bytes(), _outcome(small, name), random.Random(0)
    try:
        for _ in range(150 // every):
            content = whole
            for bit in draw.sample(range(8 * len(whole)), draw.randint(1, 3)):
                content = _flipped(content, bit)
            path.write_bytes(content)
            outcome = _outcome(small, name)
            if outcome[0] == "refused":
                assert outcome[1] == READERS[name][2]
                assert path.name in outcome[2]
            else:
                assert outcome == before
    finally:
        path.write_bytes(whole)


@SOME
@pytest.mark.parametrize("name", ["set.safetensors", "teacher.safetensors", "run/synthetic.safetensors"])
def test_every_flipped_bit_of_the_tensors_is_refused(small: Path, name: str, every: int) -> None:
    whole = (small / name).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    step = every * max(1, 8 * (len(whole) - start) // 600)
    for bit in range(8 * start, 8 * len(whole), step):
        _refuses(small, name, _flipped(whole, bit))


@pytest.mark.parametrize("name", ["sealed", "digest"])
def test_tensors_whose_word_for_their_digest_is_damaged_too_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, {"name": "theirs"})
    content = path.read_bytes()
    changed = bytearray(content.replace(name.encode(), name.upper().encode(), 1))
    changed[-1] ^= 1  # of the last tensor
    path.write_bytes(bytes(changed))
    with pytest.raises(ValueError, match="is damaged"):
        read_tensors(path)


def test_without_its_digest_a_flipped_bit_of_the_tensors_would_be_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"x": torch.ones(3)}, path, {"ddkit": '{"schema": 1, "name": "theirs"}'})
    path.write_bytes(_flipped(path.read_bytes(), 8 * (path.stat().st_size - 2)))
    tensors, record = read_tensors(path)
    assert tensors["x"].tolist() != [1, 1, 1]
    assert record == {"schema": 1, "name": "theirs"}


def test_tensors_of_any_kind_are_read_back_with_their_digest(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "half": torch.ones(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]), "turned": torch.arange(6).view(2, 3).T,
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors, {"step": 1})
    found, record = read_tensors(tmp_path / "x.safetensors")
    assert record == {"schema": 1, "step": 1}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


# Checkpoints


@pytest.fixture
def cut(small: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small / "cut", tmp_path / "cut")


def _damages(whole: bytes) -> Iterator[bytes]:
    yield from (whole[:length] for length in range(0, len(whole), 3))
    start = 8 + int.from_bytes(whole[:8], "little")
    yield from (_flipped(whole, bit) for bit in range(8 * start, 8 * len(whole), 5))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_for_the_older_one(cut: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = cut / "checkpoints" / "step-00000004.safetensors"
    assert _read_checkpoint(cut)[0] == 4
    whole = newest.read_bytes()
    for content in _damages(whole):
        caplog.clear()
        newest.write_bytes(content)
        assert _read_checkpoint(cut) == (2, [[[[2.0, 2.0], [2.0, 2.0]]]] * 2)
        assert "step-00000004.safetensors" in caplog.text
        assert "an older one is used" in caplog.text


@pytest.mark.parametrize("source", ["cut/checkpoints/step-00000002.safetensors", "other/checkpoints/step-00000004.safetensors"])
def test_a_checkpoint_of_another_step_or_run_is_passed_over(small: Path, cut: Path, source: str, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copyfile(small / source, cut / "checkpoints" / "step-00000004.safetensors")
    assert _read_checkpoint(cut)[0] == 2
    assert "step-00000004.safetensors" in caplog.text


@pytest.mark.parametrize("change", ["another run's", "edited"])
def test_a_run_goes_on_with_its_own_recipe_alone(small: Path, cut: Path, change: str) -> None:
    text = (small / "other" / "recipe.toml").read_text() if change != "edited" else (cut / "recipe.toml").read_text()
    (cut / "recipe.toml").write_text(text.replace("weight = 0.5", "weight = 5.0") if change == "edited" else text)
    with pytest.raises(ddkit.RunFilesError, match=r"step-00000004.* belongs to another recipe than .*recipe.toml"):
        resume(cut)


def test_a_run_without_a_readable_checkpoint_is_refused(cut: Path) -> None:
    for file in (cut / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ddkit.RunFilesError, match=r"no readable checkpoint: .*step-00000004.* To start again: ddkit distill --recipe"):
        resume(cut)


def test_files_of_version_0_1_that_were_sealed_are_read_and_damage_is_found(small: Path, tmp_path: Path) -> None:
    run = shutil.copytree(small / "run", tmp_path / "run")
    line = f"# sha256 of the lines below: {sha256(run / 'recipe.toml')}\n"
    for recipe in (run / "recipe.toml", shutil.copytree(small / "cut", tmp_path / "cut") / "recipe.toml"):
        recipe.write_text(line + recipe.read_text())
    manifest = read_manifest(run) | {"sealed": True}
    manifest["files"]["recipe.toml"] = file_entry(run / "recipe.toml")
    write_json(run / "manifest.json", with_digest(manifest))
    assert _read_recipe(run) == RECIPE | {"seed": 0}
    assert _read_manifest(run)[:3] == [0, 4, 1.5]
    assert _read_checkpoint(tmp_path / "cut")[0] == 4
    write_json(run / "manifest.json", manifest)  # its digest is gone
    with pytest.raises(ddkit.RunFilesError, match=r"manifest\.json is damaged"):
        read_manifest(run)


# Files of another run


@pytest.mark.parametrize("name", ["synthetic.safetensors", "recipe.toml", "evaluation.json", "metrics.jsonl"])
@pytest.mark.parametrize("swapped", ["file", "manifest", "gone"])
def test_a_file_or_the_manifest_of_another_run_is_refused(small: Path, tmp_path: Path, name: str, swapped: str) -> None:
    run = shutil.copytree(small / "run", tmp_path / "run")
    reader = {"synthetic.safetensors": _read_set, "recipe.toml": _read_recipe, "evaluation.json": _read_rows}.get(name, read_metrics)
    if swapped == "gone":
        (run / name).unlink()
    else:
        other = "manifest.json" if swapped == "manifest" else name
        shutil.copyfile(small / "other" / other, run / other)
    said = "is missing" if swapped == "gone" else "not the file"
    with pytest.raises(ddkit.RunFilesError, match=rf"{said}|has no synthetic.safetensors"):
        reader(run)


def test_a_set_in_the_place_of_a_teacher_and_the_other_way_round(small: Path) -> None:
    with pytest.raises(ddkit.InputError, match=r"set.safetensors"):
        _read_teacher(small / "set.safetensors")
    with pytest.raises(ddkit.RunFilesError, match=r"teacher.safetensors is not a synthetic set"):
        _read_set(small / "teacher.safetensors")


# Through the commands


COMMANDS = {"evaluate": "evaluate RUN", "blend": "blend RUN RUN --out new", "resume": "distill --resume --out RUN", "report": "report RUN"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_a_run_with_a_flipped_bit_and_take_the_whole_one(
    cli: Cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    run = shutil.copytree(finished, tmp_path / "copy")
    words = COMMANDS[command].replace("RUN", str(run)).split()
    with monkeypatch.context() as patch:
        patch.setattr("ddkit.nn.training.fit", lambda *arguments, **named: pytest.fail("a network was trained"))
        own = {"evaluate": ["evaluation.json", "synthetic.safetensors"], "blend": ["synthetic.safetensors"], "resume": ["metrics.jsonl"]}
        own["report"] = ["synthetic.safetensors", "metrics.jsonl", "evaluation.json", "film.safetensors"]
        for name in ("recipe.toml", "manifest.json", *own[command]):
            whole = (run / name).read_bytes()
            for place in (len(whole) // 3, len(whole) - 4):
                (run / name).write_bytes(_flipped(whole, 8 * place))
                result = cli(*words)
                assert (result.code, result.out) == (5, ""), result
                assert name in result.err
                assert not Path("new").exists()
            (run / name).write_bytes(whole)
    result = cli(*words)
    assert result.code == 0, result.err
    assert ddkit.load(run).images.shape == (10, 1, 8, 8)


def test_a_damaged_teacher_in_the_cache_is_trained_again(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    small = ("--set", "steps=1", "--set", "train.epochs=1", "--set", "teacher.width=4")
    flags = ("--losses", "dkkt", "--pipc", 1, "--evaluate", "none", *small)
    assert cli("distill", *flags, "--out", "one").code == 0
    (teacher,) = (tmp_path / "cache" / "teachers").glob("*.safetensors")
    whole = teacher.read_bytes()
    teacher.write_bytes(_flipped(whole, 8 * len(whole) - 3))
    result = cli("distill", *flags, "--out", "two")
    assert result.code == 0, result.err
    assert f"{teacher.name} is damaged" in caplog.text
    assert teacher.read_bytes() == whole
    assert torch.equal(ddkit.load("one").images, ddkit.load("two").images)
