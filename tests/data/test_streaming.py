"""Images larger than data.memory: read from the disk where they are needed, with the same result, to the bit."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ddkit
from ddkit.data import loading
from ddkit.data.images import Normalisation, blocks, channel_statistics, give_back, memmap, on_disk, rows_of
from ddkit.data.loading import load_images
from ddkit.data.real import RealData, open_dataset
from ddkit.nn.training import Schedule, accuracy, fit
from ddkit.recipes.tables import DataTable
from tests.conftest import SMALL

SIDE, EACH = 64, 60  # 3 classes of 60 images of 3 x 64 x 64: 2.1 MiB
NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an image folder of 2.1 MiB once decoded, changed long ago; three images have another size."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, each in (("train", EACH), ("test", 5)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                side = SIDE - 10 if number == each - 1 else SIDE
                file = root / split / name / f"{number:03d}.bmp"
                Image.fromarray(random.integers(60 * label, 60 * label + 120, (side, SIDE, 3), dtype=np.uint8)).save(file)
                os.utime(file, (1_500_000_000, 1_500_000_000))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "FEW_IMAGES", 100)
    return tmp_path / "cache"


def opened(folder: Path, memory: int, **options: Any) -> ddkit.Dataset:
    return open_dataset(DataTable(use=f"imagefolder:{folder}", options=options, memory=memory))


def images_of(folder: Path, memory: int, **options: Any) -> Tensor:
    return RealData(opened(folder, memory, **options), "all", 0).images


# What is loaded


@pytest.mark.parametrize("cached", [True, False])
def test_streamed_images_are_the_same_and_lie_on_the_disk(
    pictures: Path, cache: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cached:
        monkeypatch.setattr(loading, "FEW_IMAGES", 1000)
    first, again = images_of(pictures, 1), images_of(pictures, 1)
    assert on_disk(first)
    assert on_disk(again)
    whole = images_of(pictures, 3)
    assert not on_disk(whole)
    assert torch.equal(first, whole)
    assert torch.equal(again, whole)
    assert len(list((cache / "images").glob("*"))) == 1 if cached else not (cache / "images").exists()
    assert not any(cache.glob("*ddkit-*")), "a file without a name"


def test_a_streamed_entry_is_used_by_runs_with_more_memory_and_the_other_way_round(
    pictures: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = images_of(pictures, 1).clone()
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    caplog.clear()
    assert torch.equal(images_of(pictures, 3), streamed)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == ["3 of 180 images were resized to 64 x 64 pixels."]
    assert on_disk(images_of(pictures, 1))


def test_sizes_come_from_the_headers_and_images_are_decoded_once_beside_the_first_block(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    dataset = opened(pictures, 1)
    images = dataset.images

    def counting(split: str, indices: Sequence[int]) -> Any:
        decoded.append(len(indices))
        return images(split, indices)

    monkeypatch.setattr(dataset, "images", counting)
    shapes = dataset.shapes("train", range(EACH))
    assert shapes is not None
    assert set(shapes) == {(3, 64, 64), (3, 54, 64)}
    assert decoded == []
    load_images(dataset, "train", range(3 * EACH), None)
    assert sum(decoded) == 16 + 3 * EACH


class Floats(ddkit.Dataset):
    """A stranger's data without shapes: floats of two sizes, or bytes and floats."""

    def __init__(self, *, some_bytes: bool = False) -> None:
        super().__init__()
        self.some_bytes, self.memory_mib = some_bytes, 1

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        made = [torch.full((1, 40 if index % 7 else 30, 40), index / 400) for index in indices]
        return [(each * 255).round().byte() if self.some_bytes and index % 2 else each for index, each in zip(indices, made, strict=True)]


@pytest.mark.parametrize("some_bytes", [False, True])
def test_floats_and_mixtures_are_streamed_as_floats(some_bytes: bool) -> None:
    dataset = Floats(some_bytes=some_bytes)
    streamed = load_images(dataset, "train", range(400), None)
    dataset.memory_mib = 64
    whole = load_images(dataset, "train", range(400), None)
    assert (on_disk(streamed), on_disk(whole)) == (True, False)
    assert streamed.dtype == torch.float32
    assert torch.equal(streamed, whole)


def test_large_images_that_are_small_once_resized_are_held(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(12):
        Image.fromarray(np.full((8, 8), number, np.uint8) if number > 3 else np.full((900, 900), number, np.uint8)).save(
            tmp_path / f"a/{number:02d}.png"
        )
    images = load_images(opened(tmp_path, 1, holdout=0.01), "train", range(11), None)
    assert not on_disk(images)
    assert images.shape == (11, 1, 8, 8)
    assert set(images[:, 0, 0, 0].tolist()) <= set(range(12))


def test_no_room_on_the_disk_is_an_error_that_says_what_helps(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LIMIT_BYTES", 1)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading, "_write", full)
    with pytest.raises(ddkit.InputError, match=r"180 images take 2 MiB, more than data\.memory, .*\(No space left on device\)\. Make room"):
        images_of(pictures, 1)


def test_a_cache_that_cannot_be_written_leaves_the_folder_for_temporary_files(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert on_disk(images_of(pictures, 1))


# What is done with them


def test_statistics_rows_and_training_agree_to_the_bit(pictures: Path) -> None:
    streamed, whole = images_of(pictures, 1), images_of(pictures, 3)
    assert channel_statistics(streamed) == channel_statistics(whole)
    norm = Normalisation(*channel_statistics(whole))
    lazy, eager = norm.lazily(streamed), norm.lazily(whole)
    assert isinstance(eager, Tensor)
    assert not isinstance(lazy, Tensor)
    mask, rows = torch.arange(180) % 7 == 0, torch.tensor([5, 170, 5])
    for index in (mask, rows, slice(3, 30, 4), 9):
        assert torch.equal(lazy[index], eager[index])
    assert torch.equal(torch.cat(list(lazy.split(50))), eager)
    assert (len(lazy), lazy.shape, lazy.to("cpu").device.type) == (180, eager.shape, "cpu")
    assert torch.equal(lazy.mean(0), eager.mean(0)), "as a whole it is a tensor, for initializers of strangers"
    assert torch.equal(torch.cat(list(blocks(streamed, 33))), whole)
    assert torch.equal(rows_of(streamed, rows), whole[rows])
    made = []
    for images in (lazy, eager):
        torch.manual_seed(0)
        module, labels = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 3)), torch.arange(3).repeat_interleave(60)
        fit(module, images, labels, Schedule(epochs=2, batch=50), augmenter=None, generator=torch.Generator().manual_seed(1))
        made.append((module[1].weight.detach(), accuracy(module, images, labels)))
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]


def test_initializers_take_from_the_disk_what_they_take_from_memory(pictures: Path) -> None:
    norm = Normalisation([0.4] * 3, [0.3] * 3)
    for name in ("real", "kmeans", "herding", "k-center", "mix"):
        made = []
        for memory in (1, 3):
            start = ddkit.InitContext(
                labels=torch.arange(3).repeat_interleave(2), shape=(3, SIDE, SIDE), real_labels=torch.arange(3).repeat_interleave(EACH),
                real_images=norm.lazily(images_of(pictures, memory)), generator=lambda label: ddkit.generator(0, label),
            )  # fmt: skip
            made.append(ddkit.create("initializer", name)(start))
        assert torch.equal(made[0], made[1]), name


def test_a_streamed_run_gives_the_same_set_and_figures(pictures: Path, tmp_path: Path, cache: Path) -> None:
    """Teacher, initializer, losses and every evaluator that looks at real images; 10 of 60 images per class and step."""
    found, flags = [], SMALL | {"data.batch": 10, "evaluators.accuracy.repeats": 1}
    for memory in (1, 64):
        run = ddkit.distill(
            losses="dm,dkkt", dataset=f"imagefolder:{pictures}", pipc="all", init="multiplier", evaluators="accuracy,memorisation,spectrum",
            sets=flags | {"data.memory": memory, "initializer.candidates": 5, "evaluators.accuracy.baselines": ["pipc-real", "class-mean"]},
            out=tmp_path / str(memory),
        )  # fmt: skip
        found.append((ddkit.load(run.path).images, run.evaluations))
        next((cache / "teachers").iterdir()).unlink()  # the second trains its own
    assert torch.equal(found[0][0], found[1][0])
    assert [row.details for row in found[0][1]] == [row.details for row in found[1][1]]


def test_evaluations_with_another_budget_are_of_the_same_data(pictures: Path, tmp_path: Path) -> None:
    sets = SMALL | {"data.memory": 1}
    run = ddkit.distill(losses="dm", dataset=f"imagefolder:{pictures}", pipc=5, evaluators="none", sets={"steps": 1}, out=tmp_path / "run")
    ddkit.evaluate(run.path, sets={k: v for k, v in sets.items() if k.startswith(("evaluators", "data"))}, evaluators="accuracy")
    assert (run.path / "evaluation.json").is_file()


MEASURED = """
import torch
torch.set_num_threads(1)
import ddkit
from ddkit.data.real import RealData
from ddkit.data.images import channel_statistics

class Noise(ddkit.Dataset):
    class_names = ["a", "b"]
    def labels(self, split):
        return torch.arange(500) % 2
    def images(self, split, indices):
        made = torch.empty((len(indices), 3, 128, 128), dtype=torch.uint8)
        for row, index in enumerate(indices):
            made[row] = index % 251
        return made

def resident():
    told = [line.split() for line in open("/proc/self/status")]
    return sum(int(words[1]) for words in told if words[0] in ("RssAnon:", "RssFile:", "RssShmem:")) / 1024

def most(memory):
    dataset = Noise()
    dataset.memory_mib = memory
    before = resident()
    real = RealData(dataset, "all", 0)
    grown = [resident() - before]
    channel_statistics(real.images)
    grown.append(resident() - before)
    for start in range(0, 500, 100):
        ddkit.data.NormalisedRows(real.images, ddkit.data.Normalisation([0.5] * 3, [0.2] * 3))[torch.arange(start, start + 100)]
        grown.append(resident() - before)
    return max(grown)
"""


AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**22)}  # what is freed goes back to the system at once


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures on Linux only")
def test_resident_memory_stays_below_the_images() -> None:
    code = MEASURED + "\nmost(8)\nprint(most(8), most(512))"  # the first warms up the allocator
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | AT_ONCE)
    streamed, held = map(float, done.stdout.split())
    size = 500 * 3 * 128 * 128 / 2**20
    assert streamed < 0.5 * size < held, "the control: with room for all of them they are held"


def test_a_mapped_tensor_outlives_its_file_and_does_not_write_it(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(range(8)))
    found = memmap(str(file), torch.uint8, (2, 1, 2, 2))
    assert on_disk(found)
    assert not on_disk(found.clone())
    found[0] = 9
    assert file.read_bytes() == bytes(range(8))
    file.unlink()
    assert found.flatten().tolist() == [9, 9, 9, 9, 4, 5, 6, 7]
    give_back(found)
    assert found.flatten().tolist() == list(range(8))
