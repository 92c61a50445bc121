"""Exporters: what is written reads back without ddkit, exactly where exactness is promised; the card says what was lost."""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddkit_exporters import folder_names
from ddkit_exporters.card import Layout, card, eight_bit
from PIL import Image

import ddkit
from ddkit.components import registry
from ddkit.run import exporting
from ddkit.run.artifact import Artifact, Provenance
from ddkit.run.manifest import read_manifest
from tests.conftest import SMALL, Result

Cli = Callable[..., Result]
ODD = ["a/b", "..", "test", "my train", "Cat", "cat", "CON", "", "<script>|`x`", "line\nbreak\x1b[31m", "ü 中", ".hidden", "x" * 300,
       "a%2Fb"]  # fmt: skip
OWN = sorted(p.name for p in registry.plugins() if p.kind == "exporter" and p.first_party)


def a_set(names: list[str], *, ipc: int = 2, channels: int = 3, spread: float = 1.6) -> Artifact:
    """Returns a set whose values lie in about -0.3 to 1.3, so that some are clipped in 8 bits."""
    labels = torch.arange(len(names)).repeat_interleave(ipc)
    images = torch.rand((len(labels), channels, 9, 8), generator=torch.Generator().manual_seed(0)) * spread - (spread - 1) / 2
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    return Artifact(images, labels, {"class_names": names, "mean": mean, "std": std, "ipc": ipc, "pipc": 5, "seed": 0})


def exported(artifact: Artifact, exporter: str, out: Path) -> Path:
    """Returns the folder that an exporter wrote from a file of the set."""
    artifact.save(out.parent / "set.safetensors")
    return ddkit.export(out.parent / "set.safetensors", exporter, out)


def card_of(run: Path, out: Path) -> str:
    return (ddkit.export(run, "card", out) / "README.md").read_text()


def part(text: str, heading: str) -> str:
    return text.partition(heading)[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run with a row of hard labels and one of soft labels."""
    path = tmp_path_factory.mktemp("exported") / "run"
    ddkit.distill(losses="dm", ipc=2, pipc=3, sets=SMALL, out=path, device="cpu")
    ddkit.evaluate(path, sets={"evaluators.accuracy.labels": "soft", "teacher.width": 8, "train.epochs": 1}, device="cpu")
    return path


# npz


def test_npz_holds_the_floats_bit_for_bit_and_reads_without_pickle(tmp_path: Path) -> None:
    made = a_set(["b", "a", "ü c"])
    made = ddkit.Artifact(made.stored_images, made.labels, made.metadata, {"soft_labels": torch.rand(6, 3).softmax(1)})
    out = exported(made, "npz", tmp_path / "out")
    with np.load(out / "synthetic.npz", allow_pickle=False) as data:
        assert {name: data[name].dtype.str for name in ("x_train", "y_train", "mean", "std")} == {
            "x_train": "<f4", "y_train": "<i8", "mean": "<f4", "std": "<f4",
        }  # fmt: skip
        assert data["x_train"].tobytes() == made.images.numpy().tobytes()
        assert data["y_train"].tolist() == made.labels.tolist()
        assert data["soft_labels"].tobytes() == made.parameters["soft_labels"].numpy().tobytes()
        assert data["class_names"].tolist() == ["b", "a", "ü c"]
        assert torch.equal(torch.from_numpy((data["x_train"] - data["mean"].reshape(1, -1, 1, 1)) / data["std"].reshape(1, -1, 1, 1)),
                           made.normalised)  # fmt: skip


def test_npz_is_a_data_set_of_ddkit_with_the_same_floats(tmp_path: Path) -> None:
    made = a_set(["b", "a", "c"], ipc=5)
    assert float(made.images.min()) < 0 < 1 < float(made.images.max())
    out = exported(made, "npz", tmp_path / "out")
    data = ddkit.create("dataset", f"npz:{out / 'synthetic.npz'}")
    assert list(data.class_names) == ["b", "a", "c"]
    kept = [row for row in range(15) if any(torch.equal(made.images[row], image) for image in data.splits["train"][0])]
    assert len(kept) == 12  # a fifth of each class is held out
    assert torch.equal(data.splits["train"][0], made.images[kept])
    assert torch.equal(data.splits["train"][1], made.labels[kept])


# imagefolder


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_are_within_half_a_grey_level_except_where_clipped(tmp_path: Path, channels: int) -> None:
    made = a_set(["b", "a"], channels=channels)
    out = exported(made, "imagefolder", tmp_path / "out")
    rows = [json.loads(line) for line in (out / "train" / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == made.labels.tolist()
    assert [row["file_name"] for row in rows] == ["b/0001.png", "b/0002.png", "a/0001.png", "a/0002.png"]
    for row, image in zip(rows, made.images, strict=True):
        with Image.open(out / "train" / row["file_name"]) as picture:
            assert picture.mode == ("L" if channels == 1 else "RGB")
            pixels = torch.from_numpy(np.array(picture)).view(9, 8, channels).permute(2, 0, 1).double()
        inside = (image >= 0) & (image <= 1)
        assert float((pixels - image.double() * 255)[inside].abs().max()) <= 0.5
        assert torch.equal(pixels[~inside], image[~inside].clamp(0, 1).double() * 255)
        assert bool((~inside).any())
    levels = a_set(["a", "b"], channels=channels)
    levels.images = levels.stored = (levels.images.clamp(0, 1) * 255).round() / 255  # nothing is lost of these
    again = exported(levels, "imagefolder", tmp_path / "levels")
    kept = ddkit.create("dataset", f"imagefolder:{again}").images("train", range(4))
    assert torch.equal(torch.stack([image.float() / 255 for image in kept]), levels.images)
    assert "nothing was clipped" in (again / "README.md").read_text()


def test_torchvision_reads_the_folders(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    made = a_set(ODD)
    out = exported(made, "imagefolder", tmp_path / "out")
    data = ImageFolder(str(out / "train"))
    table = json.loads((out / "classes.json").read_text())
    label_of = {row["folder"]: row["label"] for row in table}
    assert [row["name"] for row in table] == ODD
    assert len(data) == 2 * len(ODD)
    assert sorted(data.classes) == sorted(label_of)
    for index in range(len(data)):
        picture, target = data[index]
        rows = made.images[made.labels == label_of[data.classes[target]]]
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert any(torch.equal(pixels, eight_bit(row[None])[0][0]) for row in rows)


READ_BY_HUGGING_FACE = """
import json, sys
import numpy as np
from datasets import load_dataset
data = load_dataset("imagefolder", data_dir=sys.argv[1], split="train", cache_dir=sys.argv[2])
rows = [[row["label"], row["class_name"], np.array(row["image"]).tolist()] for row in data]
print(json.dumps({"features": sorted(data.features), "rows": rows}))
"""


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="Hugging Face datasets is not installed")
@pytest.mark.parametrize(("names", "channels"), [(ODD, 3), (["1", "0"], 1)])
def test_hugging_face_reads_the_folders_with_names_counts_and_pixels(tmp_path: Path, names: list[str], channels: int) -> None:
    made = a_set(names, channels=channels)
    out = exported(made, "imagefolder", tmp_path / "out")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", READ_BY_HUGGING_FACE, str(out), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["features"] == ["class_name", "image", "label"]
    assert [row[:2] for row in found["rows"]] == [[label, names[label]] for label in made.labels.tolist()]
    pixels = eight_bit(made.images)[0]
    for (_, _, image), wanted in zip(found["rows"], pixels, strict=True):
        assert torch.equal(torch.tensor(image, dtype=torch.uint8), wanted[0] if channels == 1 else wanted.permute(1, 2, 0))


def test_odd_class_names_become_safe_folders_that_differ() -> None:
    found = folder_names(ODD)
    assert found[:9] == ["a%2Fb", "%2E%2E", "%74est", "my %74rain", "Cat", "cat~5", "%43ON", "%", "%3Cscript%3E%7C%60x%60"]
    assert found[9:12] == ["line%0Abreak%1B%5B31m", "ü 中", "%2Ehidden"]
    assert len(found[12].encode()) <= 200
    assert found[13] == "a%252Fb"
    assert len({name.casefold() for name in found}) == len(ODD)
    for name in found:
        assert name not in (".", "..")
        assert not set('/\\:*?"<>|\n\x1b\0') & set(name)


@pytest.mark.parametrize("name", ["train", "x-test", "2 val", "!test", "dev.1"])
def test_no_folder_is_taken_for_a_split(name: str) -> None:
    separators = "-._ 0-9"  # as Hugging Face's datasets tells the words of a path apart
    pattern = rf"(^|.*[{separators}])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)([{separators}].*)?$"
    assert re.match(pattern, folder_names([name])[0]) is None
    assert re.match(pattern, "x-test") is not None
    assert folder_names(["trainer", "contest", "Test", "valley"]) == ["trainer", "contest", "Test", "valley"]


def test_a_set_of_four_channels_has_no_png(tmp_path: Path) -> None:
    made = a_set(["a", "b"], channels=3)
    made.images = made.stored = torch.rand(4, 4, 5, 5)
    made.metadata |= {"mean": [0.5] * 4, "std": [0.2] * 4}
    for name in ("imagefolder", "png"):
        with pytest.raises(ddkit.InputError, match="1 or 3 channels, but this set has 4"):
            exported(made, name, tmp_path / name)
        assert not (tmp_path / name).exists()
    assert exported(made, "npz", tmp_path / "npz").is_dir()


# png


def test_the_sheet_is_the_picture_of_the_set(tmp_path: Path, run: Path) -> None:
    ddkit.export(run, "png", tmp_path / "all")
    assert (tmp_path / "all" / "sheet.png").read_bytes() == (run / "preview.png").read_bytes()
    ddkit.export(run, "png", tmp_path / "one", options={"columns": 1})
    with Image.open(tmp_path / "all" / "sheet.png") as wide, Image.open(tmp_path / "one" / "sheet.png") as narrow:
        assert narrow.width == 640, "a picture is at least so wide"
        assert narrow.height > wide.height


# The card


@pytest.mark.parametrize("name", OWN)
def test_every_exporter_writes_a_card(tmp_path: Path, run: Path, name: str) -> None:
    text = (ddkit.export(run, name, tmp_path / "out") / "README.md").read_text()
    assert text.startswith("---\nlicense: unknown")
    assert "**To be filled in.**" in text
    assert f"`{hashlib.sha256((run / 'synthetic.safetensors').read_bytes()).hexdigest()}`" in text
    assert re.search(rf"Made with python .*ddkit {re.escape(ddkit.__version__)}, torch ", text)
    assert "\n# digits, distilled: 2 images per class\n" in text
    assert "[losses.dm]" in text
    assert ("## Eight bits" in text) == (name in ("imagefolder", "png"))


def test_its_accuracies_are_those_recorded_hard_and_soft_apart_random_real_beside(tmp_path: Path, run: Path) -> None:
    text = card_of(run, tmp_path / "out")
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert [row["labels"] for row in rows] == ["hard", "teacher"]
    hard, soft = text.partition("### Hard labels")[2].split("### The teacher's labels")
    for row, part in zip(rows, (hard, soft), strict=True):
        told = [f"{100 * row[f'{key}_mean']:.1f} ± {100 * row[f'{key}_std']:.1f}" for key in ("accuracy", "random_real")]
        assert f"| synthetic | convnet | short, 2 epochs, width 8 | test | 2 | {told[0]} | {told[1]} |" in part
        assert part.partition("## Licence")[0].count("| synthetic |") == 1


def test_the_card_of_a_file_says_that_nothing_was_measured(tmp_path: Path) -> None:
    text = (exported(a_set(["a", "b"]), "card", tmp_path / "out") / "README.md").read_text()
    assert ("None is recorded." in text, "## Recipe" in text) == (True, False)


def test_the_card_warns_where_a_set_stayed_close_to_real_images(tmp_path: Path, run: Path, cli: Cli) -> None:
    before = part(card_of(run, tmp_path / "before"), "## Closeness to real images")
    assert "The set began with real images (initializer real). The distance of its images to real images was not measured" in before
    assert "Do not claim that the set hides the images that it was made from." in before
    copy = shutil.copytree(run, tmp_path / "copy")
    assert cli("evaluate", copy, "--evaluate", "memorisation,spectrum").code == 0
    text = card_of(copy, tmp_path / "after")
    close = next(row["details"]["close"] for row in json.loads((copy / "evaluation.json").read_text())["evaluations"]
                 if row["evaluator"] == "memorisation")  # fmt: skip
    assert close > 0
    found = part(text, "## Closeness to real images")
    assert "**Warning: this set shows real images.**" in found
    assert f"{close} of 20 images are nearer to an accessible real image than 95 % of these are to each other." in found
    table = part(text, "## Accuracy")
    assert table.count("not measured") == 0  # rows without an accuracy are no rows of accuracies
    assert f"| memorisation | {close} of 20 images are close to a real one |" in table


@pytest.mark.parametrize(
    ("init", "steps", "phrases"),
    [
        ("noise", 2, ["The set began with noise (initializer noise).", "0 of 10 images are nearer", "does not prove that the set protects",
                      "The images were optimised"]),
        ("herding", 0, ["They are real images (initializer herding), from a run without steps, so nothing was optimised.",
                        "10 of 10 images are nearer", "**Warning: this set shows real images.**"]),
    ],
)  # fmt: skip
def test_the_card_says_what_images_began_as_and_how_close_they_stayed(tmp_path: Path, init: str, steps: int, phrases: list[str]) -> None:
    path = tmp_path / "run"
    ddkit.distill(losses="dm", init=init, pipc=5, evaluators="memorisation", sets=SMALL | {"steps": steps}, out=path, device="cpu")
    text = card_of(path, tmp_path / "out")
    assert [phrase for phrase in phrases if phrase not in text] == []
    assert ("Warning" in text) == (steps == 0)


@pytest.mark.parametrize(("use", "begun"), [("typical-crops", "real images"), ("noise", "noise"), ("of-theirs", "perhaps real ones")])
def test_the_card_says_of_any_initializer_whether_it_begins_with_real_images(use: str, begun: str) -> None:
    made = a_set(["a", "b"])
    made.provenance = Provenance(recipe={"initializer": {"use": use}})
    assert f"{begun} (initializer {use})" in card(made, Layout(load=[]))


def test_the_card_measures_what_eight_bits_cost(tmp_path: Path) -> None:
    made = a_set(["a", "b"])
    made.images[0, 0, 0, 0] = 1 + 100 / 255
    made.images[1, 0, 0, 0] = -0.5 / 255 * 3
    _, cost = eight_bit(made.images)
    assert cost.rounded == pytest.approx(0.5, abs=0.02)
    assert cost.clipped == pytest.approx(max(100, float((-made.images.min()) * 255)), abs=0.01)
    assert cost.outside == int(((made.images < 0) | (made.images > 1)).sum())
    text = (exported(made, "imagefolder", tmp_path / "out") / "README.md").read_text()
    assert f"{cost.outside:,} of {cost.values:,} values" in text
    assert f"farthest by {cost.clipped:.1f} levels" in text


def test_the_code_of_the_cards_loads_the_set(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ddkit.load(run)
    for name, variable in (("npz", "inputs"), ("imagefolder", "data"), ("card", "data")):
        out = ddkit.export(run, name, tmp_path / name)
        if name == "card":
            shutil.copyfile(run / "synthetic.safetensors", out / "synthetic.safetensors")
        monkeypatch.chdir(out)
        code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        assert code is not None
        assert len([line for line in code[1].splitlines() if line.strip()]) <= 5
        namespace: dict[str, Any] = {}
        exec(code[1], namespace)
        loaded = namespace[variable]
        inputs = torch.as_tensor(loaded) if name == "npz" else torch.stack([pair[0] for pair in loaded])
        assert inputs.shape == made.images.shape
        pixels = inputs * torch.tensor(made.std).view(-1, 1, 1) + torch.tensor(made.mean).view(-1, 1, 1)
        wanted = made.images.clamp(0, 1) if name == "imagefolder" else made.images
        assert float((pixels - wanted).abs().max()) < (0.0025 if name == "imagefolder" else 1e-5)


def test_class_names_break_neither_the_tables_nor_the_page(tmp_path: Path) -> None:
    out = exported(a_set(ODD), "imagefolder", tmp_path / "out")
    text = (out / "README.md").read_text(encoding="utf-8")
    table = part(text, "## Classes").strip().splitlines()
    assert len(table) == 2 + len(ODD)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    assert "<script>" not in text
    assert "\x1b" not in text


HOSTILE = "\n\n---\n# h <img src=x> <!-- [a](http://b.example) ![c](d) | e | `f` ``` https://g.example www.h.example i@j.example"


def _replaced(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, copy) for every leaf and every key in nested dicts and lists, the copy with hostile text in that place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(value, dict):
            yield (*path, f"{key} itself"), {(HOSTILE if other == key else other): each for other, each in value.items()}
        for where, changed in [((*path, key), HOSTILE), *_replaced(item, (*path, key))]:
            copied = copy.copy(value)
            copied[key] = changed
            yield where, copied


def _marks(text: str) -> Counter[str]:
    """Returns how many headings, rows, cells, links and pieces of HTML or code a Markdown page has, and what GitHub would make links of."""
    tokens = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    found = Counter(token.type for top in tokens for token in (top, *(top.children or [])) if "ddkit" not in token.content)
    prose = "\n".join(token.content for token in tokens if token.type == "inline")
    found["autolink"] = len(re.findall(r"://|www\.|@", prose))
    return Counter({kind: number for kind, number in found.items() if kind not in ("text", "softbreak", "text_special")})


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_no_word_of_a_run_is_more_than_text_on_its_card(run: Path, every: int) -> None:
    made, layout = ddkit.load(run), Layout(("code",), folders=[f"folder-{number}" for number in range(10)])
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    rows += [rows[0] | {"evaluator": "memorisation", "details": {"summary": "1 of 10", "close": 1, "quantile": 0.05, "nearest": [1]}}]
    told = {
        "metadata": {key: made.metadata[key] for key in ("recipe", "seed", "pipc", "ipc")}, "evaluations": rows, "recipe":
        tomllib.loads((run / "recipe.toml").read_text()), "manifest": read_manifest(run) | {"teacher": {"sha256": "12"}},
    }  # fmt: skip

    def page(told: dict[str, Any]) -> str:
        artifact = Artifact(made.images, made.labels, made.metadata | told["metadata"])
        parts = {key: told[key] for key in ("evaluations", "recipe", "manifest")}
        artifact.provenance = Provenance(sha256="34", **parts)
        front, text = card(artifact, layout).removeprefix("---\n").split("\n---\n", 1)
        assert len(front.splitlines()) == 15
        return text.partition("\n## Recipe")[0]

    usual, seen = _marks(page(told)), 0
    shown = {"losses", "data", "name", "initializer"}
    for path, changed in list(_replaced(told))[::every]:
        if path[0] == "recipe" and (len(path) < 2 or str(path[1]).split()[0] not in shown):
            continue  # the rest stands in a block of code
        try:
            text = page(changed)
        except (AttributeError, TypeError, KeyError):
            continue  # no dict or list where there must be one, which is refused when the files are read
        extra = {
            kind: n
            for kind, n in (_marks(text) - usual).items()
            if kind.startswith(("html", "link", "image", "code", "fence", "auto", "hr"))
        }
        assert not extra, (path, extra)
        assert _marks(text)["heading_open"] <= usual["heading_open"] + 1, path
        seen += "&lt;img src=x&gt;" in text
    assert seen > 25 // every
    assert _marks(page(told) + HOSTILE) - usual, "what is not escaped would be seen"


def test_no_folder_of_this_machine_is_told(tmp_path: Path, image_folder: Path) -> None:
    ddkit.distill(dataset=f"imagefolder:{image_folder}", losses="dm", pipc=2, evaluators="none", sets={"steps": 1, "network.width": 4},
                  out=tmp_path / "run", device="cpu")  # fmt: skip
    text = card_of(tmp_path / "run", tmp_path / "out")
    assert "imagefolder (images)" in text
    assert str(tmp_path) not in text
    assert str(tmp_path) in (tmp_path / "run" / "recipe.toml").read_text()


# The command


def test_the_command_tells_every_file_with_its_sha256(cli: Cli, run: Path) -> None:
    result = cli("export", run, "--to", "npz", "--out", "new/out", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["schema"], told["exporter"], told["out"]) == (1, "npz", "new/out")
    assert {entry["name"] for entry in told["files"]} == {"README.md", "synthetic.npz"} == {file.name for file in Path("new/out").iterdir()}
    for entry in told["files"]:
        content = Path("new/out", entry["name"]).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))


def test_the_command_lists_the_first_files_and_counts_the_others(cli: Cli, run: Path) -> None:
    result = cli("export", run, "--to", "imagefolder", "--out", "out")
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 13
    assert "in 11 more files" in result.out  # README, classes, metadata and 20 images


def test_what_is_no_set_is_refused(cli: Cli, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "evaluation.json").write_text("{}")
    damaged = cli("export", copy, "--to", "npz", "--out", "out")
    assert (damaged.code, damaged.out) == (5, "")
    assert "evaluation.json is not the file" in " ".join(damaged.err.split())
    assert not Path("out").exists()


def test_a_disk_that_is_full_leaves_nothing_and_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((os, "replace"), (Path, "write_text"), (np, "savez")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(ddkit.RunFilesError, match=r"--out .*out cannot be written: No space left on device"):
                ddkit.export(run, "npz", tmp_path / "a" / "out")
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ddkit.RunFilesError):
            ddkit.export(run, "npz", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert exporting.export(run, "npz", tmp_path / "out") == tmp_path / "out"


EXPORTERS_OF_OTHERS = '''
from pathlib import Path
import ddkit


class Raises(ddkit.Exporter):
    """Writes half of it."""

    def __call__(self, artifact, folder):
        Path(folder, "half").write_text("x")
        raise ValueError("no more")


class Told(ddkit.Exporter):
    """Writes what it is told, or nothing."""

    argument = "word"
    word: str = ddkit.option("")

    def __call__(self, artifact, folder):
        if self.word:
            Path(folder, "word").write_text(f"{self.word} {artifact.provenance.manifest['steps']}")
'''


def test_an_exporter_of_a_plugin_file_is_blamed_by_name_and_may_take_an_argument(cli: Cli, run: Path) -> None:
    Path("mine.py").write_text(EXPORTERS_OF_OTHERS)
    for name, message in (("raises", "raised ValueError: no more"), ("told", "has written no file")):
        result = cli("export", run, "--plugin", "mine.py", "--to", name, "--out", "out")
        assert (result.code, result.out) == (1, "")
        told = " ".join(result.err.split())
        assert f"exporter '{name}' (mine.py" in told
        assert message in told
        assert not Path("out").exists()
    assert cli("export", run, "--plugin", "mine.py", "--to", "told:hello", "--out", "out").code == 0
    assert Path("out/word").read_text() == "hello 2"
