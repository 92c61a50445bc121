"""Files of a run whose digests are right, of another shape than ddkit writes: every command ends well or with an error of ddkit's."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddkit
from ddkit.api import resume
from ddkit.files import json_bytes, read_json, read_tensors, read_with_digest, with_digest, write_json, write_tensors
from ddkit.nn.teacher import load_teacher
from ddkit.recipes.tables import TeacherTable
from ddkit.run.directory import RunDirectory
from ddkit.run.manifest import file_entry, read_manifest

Mutation = tuple[tuple[Any, ...], Any]
DELETED = object()
NESTED: Any = []
for _ in range(900):
    NESTED = [NESTED]
VALUES = [DELETED, None, True, "text", "\ud800", 7, -1, 0.5, 2**63, 10**40, 1e300, -1e300, float("inf"), NESTED]
VALUES += [[], {}, [None], {"x": None}]

ROW = {
    "evaluator": "accuracy", "model": "convnet", "protocol": "short", "labels": "hard", "repeats": 2, "accuracy_mean": 0.5,
    "accuracy_std": 0.1, "random_real_mean": 0.4, "random_real_std": None, "images": "synthetic", "split": "test",
    "details": {"accuracies": [0.4, 0.6], "epochs": 3, "variant": "3 epochs", "summary": "words", "close": 1, "temperature": 1.0},
}  # fmt: skip


TEACHER = {"path": "t", "sha256": "0" * 64, "test_accuracy": None, "accessible_accuracy": 0.5, "accessible_images": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yields a folder with the finished runs `run`, which took four steps, and `blend`; evaluating one of them trains nothing."""
    root = tmp_path_factory.mktemp("runs")
    labels = np.arange(8) % 2
    images = np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8)
    np.savez(root / "two.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    sets = {"steps": 4, "network.width": 4, "engine.checkpoint_every": 2, "engine.log_every": 1, "optimizer.images.kind": "adam"}
    ddkit.distill(losses="dm", dataset=f"npz:{root / 'two.npz'}", pipc=2, sets=sets, evaluators="none", out=root / "run", device="cpu")
    ddkit.blend(root / "run", root / "run", out=root / "blend")
    for name in ("run", "blend"):
        directory = RunDirectory(root / name)
        directory.rewrite("evaluation.json", json_bytes({"schema": 1, "evaluations": [ROW, {**ROW, "labels": "soft"}]}))
        manifest = read_manifest(directory.path) | {"teacher": TEACHER, "warnings": ["a"], "processes": {"count": 2}}
        write_json(root / name / "manifest.json", with_digest({key: value for key, value in manifest.items() if key != "digest"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddkit.run.evaluation.judged", lambda *arguments, **named: [ddkit.Evaluation(**ROW)])
        yield root


def mutations(value: Any, where: tuple[Any, ...] = ()) -> Iterator[Mutation]:
    """Yields every field of JSON data, at any depth, with every value that it may be exchanged for."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from (((*where, key), other) for other in VALUES)
        yield from mutations(inner, (*where, key))


def mutated(value: Any, mutation: Mutation) -> Any:
    path, other = mutation
    found = inner = json.loads(json.dumps(value))
    for key in path[:-1]:
        inner = inner[key]
    if other is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = other
    return found


def text_of(value: Any) -> bytes:
    return json.dumps(value).replace("Infinity", "1e999").encode()  # a number as any other, to those who do not look


def ends_well(*commands: Callable[[], object]) -> list[str]:
    """Calls each of `commands`; returns the outcomes: "done", or what an error of ddkit's own says."""
    outcomes = []
    for command in commands:
        try:
            command()
            outcomes.append("done")
        except ddkit.DdkitError as error:
            outcomes.append(f"{error.exit_code} {error}")
    return outcomes


def all_commands(run: Path) -> list[str]:
    shutil.rmtree(run.parent / "new", ignore_errors=True)
    return ends_well(
        lambda: resume(run, device="cpu"),
        lambda: ddkit.report(run, out=run.parent / "new.html") and (run.parent / "new.html").unlink(),
        lambda: ddkit.export(run, "card", run.parent / "new"),
        lambda: ddkit.evaluate(run, device="cpu"),
    )


def fuzz(runs: Path, tmp_path: Path, most: int) -> dict[str, int]:
    """Mutates the JSON files of both runs, each field `most` times at most in all; returns how many commands ended how."""
    counts: dict[str, int] = {}
    for name in ("run", "blend"):
        for file in ("manifest.json", "evaluation.json", "metrics.jsonl"):
            original = runs / name / file
            if not original.is_file():
                continue
            run = shutil.copytree(runs / name, tmp_path / f"{name}-{file}" / "run")
            lines = [json.loads(line) for line in original.read_text().splitlines()] if file.endswith("l") else read_json(original)
            manifest = read_with_digest(runs / name / "manifest.json")
            content = manifest if file == "manifest.json" else lines
            every = list(mutations(content))
            for mutation in random.Random(0).sample(every, min(most, len(every))):
                _restore(run, runs / name)
                _write(run, file, mutated(content, mutation), manifest)
                for outcome in all_commands(run):
                    kind = outcome[:2].strip() if outcome != "done" else outcome
                    counts[kind] = counts.get(kind, 0) + 1
                    assert kind == "done" or (file in outcome and kind == "5") or mutation[1] is DELETED or "details" in mutation[0], (
                        name, file, mutation, outcome,
                    )  # fmt: skip
    return counts


def _restore(run: Path, original: Path) -> None:
    """Undoes what the last evaluation wrote."""
    for name in ("evaluation.json", "recipe.toml", "report.html"):
        if (original / name).exists():
            shutil.copyfile(original / name, run / name)


def _write(run: Path, file: str, content: Any, manifest: dict[str, Any]) -> None:
    """Writes the changed content of a file, and the manifest that lists it as it is now."""
    try:
        if file != "manifest.json":
            lines = b"".join(text_of(line) + b"\n" for line in content) if file.endswith("l") else text_of(content)
            (run / file).write_bytes(lines)
            content = manifest | {"files": manifest["files"] | {file: file_entry(run / file)}}
        (run / "manifest.json").write_bytes(text_of(with_digest(content)))
    except RecursionError:  # nested too deep to be written
        return


def test_fields_of_other_kinds_end_in_errors_of_ddkits_own(runs: Path, tmp_path: Path) -> None:
    counts = fuzz(runs, tmp_path, 8)
    assert counts["5"] > 20
    assert counts["done"] > 20


@pytest.mark.slow
def test_every_field_of_every_other_kind_ends_so(runs: Path, tmp_path: Path) -> None:
    fuzz(runs, tmp_path, 10**6)


def test_an_evaluation_without_details_is_refused_before_it_is_evaluated(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(runs / "run", tmp_path / "run")
    manifest = read_with_digest(run / "manifest.json")
    _write(run, "evaluation.json", {"schema": 1, "evaluations": [{**ROW, "details": None}]}, manifest)
    monkeypatch.setattr("ddkit.run.evaluation.judged", lambda *arguments, **named: pytest.fail("it trains"))
    with pytest.raises(ddkit.RunFilesError, match=r"evaluation\.json .*Expected `object`, got `null` - at `\$\.evaluations\[0\]\.details`"):
        ddkit.evaluate(run, device="cpu")


def test_evaluations_of_another_schema_are_refused(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "run", tmp_path / "run")
    _write(run, "evaluation.json", {"schema": 2, "evaluations": [ROW]}, read_with_digest(run / "manifest.json"))
    with pytest.raises(ddkit.RunFilesError, match=r"evaluation\.json has schema 2, but this version of ddkit reads schema 1"):
        ddkit.compare([run])


def test_fields_that_ddkit_does_not_know_are_kept(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "run", tmp_path / "run")
    manifest = read_with_digest(run / "manifest.json") | {"of_tomorrow": {"x": 1}}
    _write(run, "evaluation.json", {"schema": 1, "evaluations": [{**ROW, "model": "mlp", "of_tomorrow": 2}]}, manifest)
    ddkit.evaluate(run, device="cpu")
    assert read_json(run / "evaluation.json")["evaluations"][0]["of_tomorrow"] == 2
    assert read_json(run / "manifest.json")["of_tomorrow"] == {"x": 1}


def test_a_kept_evaluation_of_a_study_is_read_with_its_figures_or_refused(tmp_path: Path) -> None:
    from ddkit.recipes.resolve import resolve
    from ddkit.studies.grid import Evaluating, Task, kept_file, kept_row
    from ddkit.studies.study import Cell

    asked = Evaluating(protocol="short", labels="hard", images="synthetic", networks=None, teacher="")
    task = Task(Cell(1, 1, "one"), 0, resolve("dm"), tmp_path / "one", asked, "one")
    task.path.mkdir()
    (task.path / "manifest.json").touch()
    content = {"schema": 1, "row": ROW}
    read = 0
    for mutation in mutations(content):
        with suppress(RecursionError):  # nested too deep to be written
            kept_file(task).write_bytes(text_of(with_digest(mutated(content, mutation))))
        with suppress(ddkit.RunFilesError):
            row = kept_row(task)
            assert row is not None
            assert all(isinstance(value, float | int) for value in (row["accuracy_mean"], *row["details"]["accuracies"]))
            assert row["details"]["accuracies"]
            read += 1
    assert 0 < read < len(list(mutations(content)))


def test_a_teacher_of_another_kind_is_refused_or_gives_logits(tmp_path: Path) -> None:
    info = ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(4, 4))
    options = {"width": 2, "depth": 1}
    module = ddkit.nn.build_network(ddkit.create("model", "convnet", options, data=info), info, 0, "test")
    record = {"model": "convnet", "options": options, "mean": [0.4], "std": [0.2], "class_names": ["a", "b"], "input_shape": [1, 4, 4]}
    variants = [*hostile_tensors(module.state_dict(), record)]
    variants += [(module.state_dict(), mutated(record, mutation)) for mutation in mutations(record)]
    outcomes = []
    for tensors, changed in variants:
        with suppress(ValueError, RecursionError):  # what cannot be written
            write_tensors(tmp_path / "t.safetensors", tensors, changed)
            table = TeacherTable(use=str(tmp_path / "t.safetensors"), model="convnet")
            outcomes += ends_well(lambda table=table: load_teacher(table, info, torch.device("cpu")).logits(torch.ones(2, 1, 4, 4)))  # type: ignore[misc]
    assert sum(outcome.startswith("4") for outcome in outcomes) > 200
    assert "done" in outcomes


# Tensors


def hostile_tensors(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Yields variants of a file of tensors in which one tensor, or one field of the metadata, is another."""
    for name, tensor in tensors.items():
        yield {key: value for key, value in tensors.items() if key != name}, record
        changed = [
            tensor.double(), tensor.to(torch.int8), tensor.to(torch.complex64), tensor.bool(), tensor.flatten(), tensor[None],
            tensor.reshape(-1)[:0], tensor.reshape(-1)[:1].clone(), torch.tensor(3), torch.full_like(tensor, -5),
            torch.cat([tensor.reshape(-1)] * 2),
        ]  # fmt: skip
        changed += [torch.full_like(tensor, value) for value in (float("nan"), float("inf"), 1e38)] if tensor.is_floating_point() else []
        yield from ((tensors | {name: other}, record) for other in changed)
    for key in record:
        for value in (None, True, "text", 7, -1, 0.5, [], {}, [None], {"x": None}):
            yield tensors, record | {key: value}


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["checkpoint", "film", "set"])
def test_tensors_of_other_kinds_end_so_too(runs: Path, tmp_path: Path, name: str, every: int) -> None:
    run = shutil.copytree(runs / "run", tmp_path / "run")
    file = run / {"checkpoint": "checkpoints/step-00000002.safetensors", "film": "film.safetensors", "set": "synthetic.safetensors"}[name]
    manifest = read_with_digest(run / "manifest.json")
    outcomes = []
    for tensors, record in list(hostile_tensors(*read_tensors(file)))[::every]:
        write_tensors(file, tensors, {key: value for key, value in record.items() if key != "schema"})
        if name == "checkpoint":
            (run / "manifest.json").unlink(missing_ok=True)
            for later in (run / "checkpoints").glob("*-0000000[34]*"):
                later.unlink()
            outcomes += ends_well(lambda: resume(run, device="cpu"))
            continue
        _restore(run, runs / "run")
        write_json(run / "manifest.json", with_digest(manifest | {"files": manifest["files"] | {file.name: file_entry(file)}}))
        outcomes += all_commands(run) if name == "set" else ends_well(lambda: ddkit.report(run))
    assert sum(outcome.startswith("5") for outcome in outcomes) > 20 // every
    assert "done" in outcomes
