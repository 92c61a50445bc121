"""Loading: what is opened, what it costs, and that the cache of decoded images never shows."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddkit_datasets import decoding
from ddkit_datasets.arrays import holdout
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import ddkit
from ddkit.components.base import Dataset
from ddkit.data import loading
from ddkit.data.loading import fingerprint, load_images
from ddkit.data.real import RealData, class_indices, open_dataset
from ddkit.files import write_tensors
from ddkit.recipes.tables import DataTable
from ddkit.seeding import generator

LONG_AGO_NS = 1_500_000_000 * 10**9
NAMES = ("cat", "dog", "owl")


def opened(folder: Path, **options: Any) -> Dataset:
    return open_dataset(DataTable(use=f"imagefolder:{folder}", options=options))


def write_old(path: Path, pixels: Any, modified_ns: int = LONG_AGO_NS) -> Path:
    """Writes an image that was last changed long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    os.utime(path, ns=(modified_ns, modified_ns))
    return path


def write_classes(root: Path, *, each: int, test: int = 2, size: tuple[int, int] = (6, 5)) -> Path:
    """Writes `each` training and `test` test images of random colours for every class, all of one file size (bmp)."""
    random = np.random.default_rng(0)
    for split, count in (("train", each), ("test", test)):
        for name in NAMES:
            for number in range(count):
                write_old(root / split / name / f"{number:03d}.bmp", random.integers(0, 256, (*size, 3)))
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of the image cache, which does not exist yet; 32 images are enough to be kept."""
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "FEW_IMAGES", 32)
    return tmp_path / "cache/images"


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    """Returns an image folder of three classes of 12 old training images, and 11 to test."""
    return write_classes(tmp_path / "data", each=12, test=11)


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the list of image files that are opened from now on."""
    return _recorded(monkeypatch, Image, "open")


def _recorded(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Returns a list that gets the first argument of every further call of a function."""
    calls: list[str] = []
    original = getattr(owner, name)

    def recording(first: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(str(first))
        return original(first, *arguments, **named)

    monkeypatch.setattr(owner, name, recording)
    return calls


def everything(folder: Path, **options: Any) -> Tensor:
    return RealData(opened(folder, **options), "all", 0).images


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


# Cost


def test_what_is_opened_and_looked_at_does_not_grow_with_the_folder(
    tmp_path: Path, cache: Path, opens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = _recorded(monkeypatch, os, "stat")
    seen = []
    for each in (5, 60):
        folder = write_classes(tmp_path / str(each), each=each)
        opens.clear()
        looks.clear()
        RealData(opened(folder), 4, 0)
        seen.append((len(opens), len(set(opens)), len([name for name in looks if str(folder) in name])))
    assert seen[0] == seen[1]
    assert seen[0][:2] == (12, 12)
    # negative control: with all images accessible, both counts see the larger folder
    opens.clear()
    looks.clear()
    RealData(opened(folder), "all", 0)
    assert len(opens) == 180
    assert len(looks) > 180


def test_neither_torchvision_nor_scikit_learn_is_imported_for_data_on_this_machine(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.zeros((4, 5, 5), np.uint8), y_train=np.array([0, 1, 0, 1]))
    code = """if True:
        import sys
        from ddkit.data.real import RealData, open_dataset
        from ddkit.recipes.tables import DataTable
        def heavy(use):
            RealData(open_dataset(DataTable(use=use)), 1, 0)
            return ",".join(name for name in ("sklearn", "torchvision") if name in sys.modules)
        print("found", *[f"[{heavy(use)}]" for use in sys.argv[1:]])
        import sklearn
        print(f"[{heavy('digits')}]")  # shows that the check can fail"""
    uses = [f"imagefolder:{folder}", f"npz:{tmp_path / 'a.npz'}", "digits"]
    done = subprocess.run([sys.executable, "-c", code, *uses], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["found", "[]", "[]", "[]", "[sklearn]"]


# The same as ever


def obvious_accessible(labels: Tensor, classes: int, pipc: int | str, seed: int) -> list[int]:
    chosen: list[int] = []
    for label in range(classes):
        rows = [row for row, found in enumerate(labels.tolist()) if found == label]
        if pipc != "all" and int(pipc) < len(rows):
            order = torch.randperm(len(rows), generator=generator(seed, "accessible", label)).tolist()
            rows = sorted(rows[place] for place in order[: int(pipc)])
        chosen += rows
    return chosen


@given(
    labels=st.lists(st.integers(0, 4), max_size=60),
    pipc=st.one_of(st.just("all"), st.integers(0, 12)),
    seed=st.integers(0, 3),
)
def test_accessible_rows_are_those_of_the_obvious_version(labels: list[int], pipc: int | str, seed: int) -> None:
    rows = torch.tensor(labels, dtype=torch.int64)
    part = slice(None if pipc == "all" else int(pipc))
    assert class_indices(rows, 5, seed, part) == obvious_accessible(rows, 5, pipc, seed)


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), share=st.floats(0.05, 0.95), seed=st.integers(0, 3))
def test_held_out_rows_are_those_of_the_obvious_version(labels: list[int], share: float, seed: int) -> None:
    kept: list[int] = []
    for label in sorted(set(labels)):
        rows = [row for row, found in enumerate(labels) if found == label]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + label)).tolist()
        kept += [rows[place] for place in order[count:]]
    found = holdout(torch.tensor(labels), share, seed)
    assert found[0].tolist() == sorted(kept)
    assert found[1].tolist() == sorted(set(range(len(labels))) - set(kept))


@pytest.mark.parametrize("whole", [False, True], ids=["train and test", "one folder"])
def test_files_labels_and_fingerprint_are_those_of_a_walk_with_pathlib(folder: Path, whole: bool) -> None:
    (folder / "train/cat/.hidden.bmp").write_bytes(b"x")
    (folder / "train/cat/UPPER.PNG").write_bytes(b"not opened")
    (folder / "train/cat/no_suffix").write_bytes(b"x")
    (folder / "train/cat/folder.png").mkdir()
    dataset = opened(folder / "train" if whole else folder)
    base = folder / "train" if whole else folder
    found = {}
    for split in ("train", "test"):
        root = folder / ("train" if whole else split)
        files = [f for label in NAMES for f in sorted((root / label).iterdir()) if f.is_file() and f.suffix.lower() in (".bmp", ".png")]
        found[split] = [file for file in files if not file.name.startswith(".")]
    if whole:
        kept, held = holdout(torch.tensor([NAMES.index(file.parent.name) for file in found["train"]]), 0.2, 0)
        found = {"train": [found["train"][i] for i in kept.tolist()], "test": [found["train"][i] for i in held.tolist()]}
    digest = hashlib.sha256(b"(2, None, None, 16)")
    for split, files in found.items():
        labels = [NAMES.index(file.parent.name) for file in files]
        assert dataset.sources(split, range(len(files))) == [file.relative_to(base).as_posix() for file in files]
        assert dataset.labels(split).dtype == torch.int64
        assert dataset.labels(split).tolist() == labels
        for file, label in zip(files, labels, strict=True):
            digest.update(f"{split} {label} {file.relative_to(base).as_posix()}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    assert dataset.fingerprint() == digest.hexdigest()


def test_links_are_followed_and_broken_ones_are_refused_when_they_are_read(tmp_path: Path, folder: Path) -> None:
    target = write_old(tmp_path / "elsewhere/x.png", np.full((6, 5, 3), 77))
    (folder / "train/cat/zz.png").symlink_to(target)
    (folder / "train/cat/broken.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "train/yak").symlink_to(target.parent, target_is_directory=True)
    dataset = opened(folder)
    assert list(dataset.class_names) == [*NAMES, "yak"]
    assert torch.bincount(dataset.labels("train")).tolist() == [14, 12, 12, 1]
    place = {source: index for index, source in enumerate(dataset.sources("train", range(39)))}
    assert (torch.stack(list(dataset.images("train", [place["train/cat/zz.png"], place["train/yak/x.png"]]))) == 77).all()
    assert not (torch.stack(list(dataset.images("train", [0]))) == 77).all()
    with pytest.raises(ddkit.InputError, match=r"broken\.png"):
        dataset.images("train", [place["train/cat/broken.png"]])


# Decoding


def obvious_images(files: Sequence[Path]) -> list[Tensor]:
    arrays = [np.array(Image.open(file)) for file in files]
    return [torch.from_numpy(array).permute(2, 0, 1) if array.ndim == 3 else torch.from_numpy(array)[None] for array in arrays]


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "threads"])
@pytest.mark.parametrize("odd", [(), (3,), (21, 25)], ids=["uniform", "early", "late"])
def test_decoded_images_are_those_of_the_obvious_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: Sequence[int], threads: bool
) -> None:
    monkeypatch.setattr(decoding, "SMALL_PIXELS", 0 if threads else 10**9)
    random = np.random.default_rng(0)
    shapes = [(7, 4) if number in odd else (6, 5, 3) for number in range(40)]
    files = [write_old(tmp_path / f"{number}.png", random.integers(0, 256, shape)) for number, shape in enumerate(shapes)]
    found = decoding.decode_images([str(file) for file in files], decoding.Decoding())
    assert isinstance(found, Tensor) != bool(odd)
    assert len(found) == 40
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, obvious_images(files), strict=True))
    next(iter(found)).zero_()  # none is read-only, which torch would warn of


# The cache of decoded images


def test_second_load_opens_no_image_and_gives_the_same(folder: Path, opens: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_old(folder / "train/dog/004.bmp", np.full((9, 5, 3), 99))
    for split, count, read in (("train", 36, lambda: everything(folder)), ("test", 33, lambda: RealData(opened(folder), 1, 0).test_set[0])):
        first = read().clone()
        opens.clear()
        second = read()
        assert len(opens) == (0 if split == "train" else 3), "too few accessible images to keep"
        assert torch.equal(first, second)
        assert (len(second), second.dtype) == (count, torch.uint8)
    # negative control: another cache has to open them
    monkeypatch.setenv("DDKIT_CACHE", str(folder.parent / "other"))
    opens.clear()
    everything(folder)
    assert len(opens) == 36


CHANGES: dict[str, Callable[[Path], object]] = {
    "later": lambda file: write_old(file, np.full((6, 5, 3), 99), LONG_AGO_NS + 1),
    "other size": lambda file: os.utime(write_old(file.with_suffix(".png"), np.full((6, 5, 3), 99)).replace(file), ns=(LONG_AGO_NS,) * 2),
    "same time and size, in place": lambda file: write_old(file, np.full((6, 5, 3), 99)),
    "same time and size, unpacked over it": lambda file: write_old(file.parents[1] / "new.bmp", np.full((6, 5, 3), 99)).replace(file),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_file_gives_fresh_pixels(folder: Path, opens: list[str], change: Callable[[Path], object]) -> None:
    stale = everything(folder).clone()
    change(folder / "train/dog/004.bmp")
    opens.clear()
    fresh = everything(folder)
    assert (fresh[16] == 99).all()
    assert torch.equal(fresh[torch.arange(36) != 16], stale[torch.arange(36) != 16])
    everything(folder)
    assert len(opens) == 36, "and what is unchanged is not opened again"


def test_a_file_changed_a_moment_ago_is_not_cached(folder: Path, cache: Path) -> None:
    now = time.time_ns()
    write_old(folder / "train/dog/004.bmp", np.full((6, 5, 3), 99), now)
    everything(folder)
    assert entries(cache) == []
    write_old(folder / "train/dog/004.bmp", np.full((6, 5, 3), 7), now)  # in the same tick of a coarse clock
    assert (everything(folder)[16] == 7).all()


def test_what_decides_the_pixels_makes_entries_of_its_own(folder: Path, cache: Path, opens: list[str]) -> None:
    found = [
        everything(folder),
        everything(folder, size=[3, 4]),
        RealData(opened(folder), 11, 0).images,
        RealData(opened(folder), 11, 1).images,
        RealData(opened(folder), "all", 0, (1, 6, 5)).images,
    ]
    assert [tuple(images.shape) for images in found] == [(36, 3, 6, 5), (36, 3, 3, 4), (33, 3, 6, 5), (33, 3, 6, 5), (36, 1, 6, 5)]
    assert len(entries(cache)) == 5
    opens.clear()
    everything(folder, holdout=0.3)  # an option that decides no pixel
    assert opens == []
    assert torch.equal(everything(folder, size=[3, 4]), found[1])
    (folder / "train/cat/000.bmp").rename(folder / "train/cat/zzz.bmp")
    assert torch.equal(everything(folder)[11], found[0][0])
    write_old(folder / "train/cat/zzzz.bmp", np.full((6, 5, 3), 1))
    assert len(everything(folder)) == 37
    assert len(entries(cache)) == 7


def test_writing_into_loaded_images_changes_no_later_load(folder: Path, cache: Path) -> None:
    first = everything(folder).clone()
    content = entries(cache)[0].read_bytes()
    everything(folder).fill_(7)
    assert torch.equal(everything(folder), first)
    assert entries(cache)[0].read_bytes() == content


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "exchanged": lambda file: file.write_bytes(bytes(file.stat().st_size)),  # all is right but the pixels
    "gone": lambda file: file.unlink(),
    "no record": lambda file: loading.mark_of(file).unlink(),
    "empty record": lambda file: loading.mark_of(file).write_text(""),
    "wrong record": lambda file: loading.mark_of(file).write_text('{"stamp": [], "bytes": 1, "shape": "?", "resized": null}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_decoded_again_and_replaced(
    folder: Path, cache: Path, opens: list[str], damage: Callable[[Path], object]
) -> None:
    first = everything(folder).clone()
    damage(entries(cache)[0])
    opens.clear()
    for _ in range(2):
        assert torch.equal(everything(folder), first)
        assert len(opens) == 36, "the second time the entry is whole again"


def test_an_entry_that_is_a_folder_is_in_nobodys_way(folder: Path, cache: Path) -> None:
    first = everything(folder).clone()
    (file,) = entries(cache)
    file.unlink()
    file.mkdir()
    assert torch.equal(everything(folder), first)


def _full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading, "_write", fail)


def _no_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("DDKIT_CACHE", str(folder / "train/cat/000.bmp/cache"))


def _refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", fail)


@pytest.mark.parametrize("spoil", [_full_disk, _no_folder, _refused])
def test_a_cache_that_cannot_be_written_fails_no_run(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoil: Callable[..., None]
) -> None:
    expected = torch.stack(obvious_images([folder / str(name) for name in opened(folder).sources("train", range(36))]))
    spoil(monkeypatch, folder)
    with caplog.at_level(logging.INFO, "ddkit"):
        for _ in range(2):
            assert torch.equal(everything(folder), expected)
    assert entries(cache) == []
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    assert "could not be cached" in caplog.text


def test_a_tensor_file_that_cannot_be_written_is_an_error_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    write_tensors(tmp_path / "a", {"x": torch.ones(3)}, {})
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(ddkit.RunFilesError, match=r"a cannot be written: .*No space left"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(3)}, {})
    assert load_file(tmp_path / "a")["x"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_least_recently_used_entries_make_room(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, opens: list[str]) -> None:
    made = {}
    for age, size in ((30, 4), (20, 5), (10, 6)):
        before = set(entries(cache))
        everything(folder, size=[size, 8])
        (made[size],) = set(entries(cache)) - before
        os.utime(loading.mark_of(made[size]), (time.time() - age, time.time() - age))
    opens.clear()
    everything(folder, size=[4, 8])  # used again
    assert opens == []
    total = sum(file.stat().st_size for file in entries(cache))
    monkeypatch.setattr(loading, "LIMIT_BYTES", total)
    everything(folder, size=[4, 8])  # a hit writes nothing, so nothing goes
    assert set(entries(cache)) == set(made.values())
    everything(folder, size=[5, 9])
    assert made[5] not in entries(cache)
    assert made[4] in entries(cache)
    assert sum(file.stat().st_size for file in entries(cache)) <= total


def test_few_images_and_more_than_the_whole_cache_holds_are_not_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, encoded = 36 * 3 * 6 * 5, sum(file.stat().st_size for file in folder.glob("train/*/*"))
    few, limit = (("FEW_IMAGES", 37), ("FEW_BYTES", encoded)), ("LIMIT_BYTES", decoded)
    for changes, count in (((limit,), 1), ((("LIMIT_BYTES", decoded - 1),), 0), (few, 1), ((few[0], ("FEW_BYTES", encoded + 1)), 0)):
        with monkeypatch.context() as patch:
            for name, value in changes:
                patch.setattr(loading, name, value)
            everything(folder)
        assert len(entries(cache)) == count, "the newest stays"
        shutil.rmtree(cache, ignore_errors=True)


class Stranger(ddkit.Dataset):
    """A third party's data: 40 images, of which `values` tell the pixels."""

    shade: int = ddkit.option(1)

    has_files = True
    asked = 0

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        self.asked += len(indices)
        return [torch.full((1, 4, 4), index / 64 * self.shade) for index in indices]

    def files(self, split: str, indices: Sequence[int]) -> Sequence[str] | None:
        return [f"{self.directory}/{index}" for index in indices] if self.has_files else None


def test_any_data_set_with_files_is_cached_and_without_them_none(cache: Path, tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / str(index)).touch()
        os.utime(tmp_path / str(index), ns=(LONG_AGO_NS, LONG_AGO_NS))
    stranger = Stranger(directory=str(tmp_path))
    for _ in range(2):
        images = load_images(stranger, "train", range(40), None)
        assert images[:, 0, 0, 0].tolist() == [index / 64 for index in range(40)]
    assert stranger.asked == 40
    assert load_images(Stranger(shade=2, directory=str(tmp_path)), "train", range(32), None).max() == 31 / 32
    assert len(entries(cache)) == 2
    stranger.has_files = False
    load_images(stranger, "train", range(40), None)
    assert stranger.asked == 80


# The fingerprint of all files


def test_a_fingerprint_is_computed_once_for_unchanged_files(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = opened(folder).fingerprint()
    assert fingerprint(opened(folder)) == right
    with monkeypatch.context() as patch:
        patch.setattr(type(opened(folder)), "fingerprint", lambda self: pytest.fail("the files were read again"))
        assert fingerprint(opened(folder)) == right
    write_old(folder / "train/cat/000.bmp", np.zeros((6, 5, 3)), LONG_AGO_NS + 10**9)
    assert fingerprint(opened(folder)) == opened(folder).fingerprint() != right
