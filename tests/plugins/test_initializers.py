"""Initializers: what they choose, against slow references; grids; sets that are there already; the teacher's multipliers."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from ddkit_dkkt.selection import gram_matrix, negative_gradients, nonnegative_solution, solve
from ddkit_initializers.coresets import central, farthest, herd
from PIL import Image
from torch import Tensor
from torch.nn import functional

import ddkit
from ddkit import grid
from ddkit.api import resume
from ddkit.data.images import Normalisation
from ddkit.nn.networks import embed, features_of
from ddkit.testing.samples import info_of
from ddkit.testing.world import untrained_teacher
from tests.conftest import SMALL, SMALL_FLAGS, Result

CLI = Callable[..., Result]
CHOOSING = ["real", "kmeans", "herding", "k-center", "multiplier"]


def points(rows: int, columns: int = 3, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def start(
    ipc: int, counts: Sequence[int], *, shape: tuple[int, int, int] = (1, 8, 8), teacher: bool = True, seed: int = 0
) -> ddkit.InitContext:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    guide = untrained_teacher(info_of(shape, len(counts))) if teacher else None
    return ddkit.InitContext(
        labels=torch.arange(len(counts)).repeat_interleave(ipc), shape=shape, real_labels=labels,
        real_images=torch.randn((len(labels), *shape), generator=torch.Generator().manual_seed(1)),
        generator=lambda label: ddkit.generator(seed, "initializer", label), class_names=info_of(shape, len(counts)).class_names,
        normalisation=Normalisation([0.5] * shape[0], [0.25] * shape[0]), teacher=guide,
        features=None if guide is None else lambda images: features_of(guide.module, images),
    )  # fmt: skip


def rows_of(begin: ddkit.InitContext, images: Tensor) -> list[int]:
    """Returns which real image each of `images` is."""
    return [int((begin.real_images == image).flatten(1).all(1).nonzero()) for image in images]


# herding, k-center, k-means


@pytest.mark.parametrize("count", [1, 4, 9])
def test_herding_is_the_greedy_mean_of_the_definition(count: int) -> None:
    x, chosen = points(9), list[int]()
    for number in range(1, count + 1):
        errors = {
            row: np.linalg.norm(x.mean(0) - (x[row] + sum((x[each] for each in chosen), np.zeros(3))) / number)
            for row in range(9)
            if row not in chosen
        }
        chosen.append(min(errors, key=lambda row: errors[row]))
    assert herd(x, count) == chosen


def test_herding_follows_the_mean_better_than_a_random_choice() -> None:
    x = points(60, 5)
    error = np.linalg.norm(x[herd(x, 6)].mean(0) - x.mean(0))
    others = [np.linalg.norm(x[np.random.default_rng(seed).permutation(60)[:6]].mean(0) - x.mean(0)) for seed in range(20)]
    assert error < min(others)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_k_center_always_takes_the_farthest(count: int) -> None:
    x = points(7)
    chosen = [min(range(7), key=lambda row: np.linalg.norm(x[row] - x.mean(0)))]
    while len(chosen) < count:
        chosen.append(
            max((row for row in range(7) if row not in chosen), key=lambda row: min(np.linalg.norm(x[row] - x[c]) for c in chosen))
        )
    assert farthest(x, count) == chosen


def test_k_center_is_within_twice_the_best_radius() -> None:
    x = points(9, 2)

    def radius(chosen: Sequence[int]) -> float:
        return float(max(min(np.linalg.norm(row - x[c]) for c in chosen) for row in x))

    best = min(radius(chosen) for chosen in itertools.combinations(range(9), 3))
    assert best < radius(farthest(x, 3)) + 1e-12 <= 2 * best + 1e-12


def test_kmeans_takes_the_member_nearest_to_each_centre() -> None:
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    offsets = np.array([[1.0, 0.0], [-0.5, 0.8], [0.1, -0.1], [-0.6, -0.7]])  # their mean is 0, and the third is nearest to it
    x = (centres[:, None] + offsets[None]).reshape(-1, 2)
    assert sorted(central(x, 3, 0, restarts=3)) == [2, 6, 10]


def test_equal_images_make_fewer_clusters_and_still_enough_different_rows() -> None:
    x = np.zeros((6, 2))
    x[5] = 1.0
    chosen = central(x, 4, 0, restarts=2)
    assert len(set(chosen)) == 4
    assert 5 in chosen
    assert len(set(herd(x, 4))) == len(set(farthest(x, 4))) == 4


@pytest.mark.parametrize("name", CHOOSING)
def test_chosen_images_are_different_real_ones_of_the_class_and_with_all_of_them_the_set_itself(name: str) -> None:
    begin = start(2, [5, 4, 6])
    rows = rows_of(begin, ddkit.create("initializer", name)(begin))
    assert len(set(rows)) == 6
    assert torch.equal(begin.real_labels[rows], begin.labels)
    assert rows == sorted(rows)
    whole = start(4, [4, 4])
    assert torch.equal(ddkit.create("initializer", name)(whole), whole.real_images)


@pytest.mark.parametrize("name", ["kmeans", "herding", "k-center"])
def test_features_of_the_teacher_are_what_is_compared_where_asked_for(name: str) -> None:
    begin = start(3, [12, 12])
    initializer = ddkit.create("initializer", name, {"features": "teacher"})
    assert initializer.requires == ddkit.Requires(real=True, teacher=True)
    assert ddkit.create("initializer", name).requires == ddkit.Requires(real=True)
    chosen = rows_of(begin, initializer(begin))
    features = embed(begin.teacher.module, begin.real_images[:12]).detach().double().numpy()
    own = {"herding": herd, "k-center": farthest}
    if name in own:
        assert chosen[:3] == sorted(own[name](features, 3))
    assert chosen != rows_of(begin, ddkit.create("initializer", name)(begin))


@pytest.mark.parametrize("name", [*CHOOSING, "mix"])
def test_too_few_images_are_told_with_the_class(name: str) -> None:
    initializer = ddkit.create("initializer", name)
    initializer.check(4, {"cat": 4, "dog": 9})
    with pytest.raises(ddkit.InputError, match=rf"Initializer '{name}' needs 4 accessible images a class.*'cat' has 3.*--pipc"):
        initializer.check(4, {"cat": 3, "dog": 9})


# mix


def test_a_grid_shows_shrunken_images_row_by_row() -> None:
    images = torch.stack([torch.full((3, 8, 6), float(value)) for value in range(4)])
    images[3, :, :, 3:] = 9.0
    picture = grid(images, 2)
    assert picture.shape == (3, 8, 6)
    assert [float(picture[0, y, x]) for y, x in ((0, 0), (0, 5), (7, 0))] == [0.0, 1.0, 2.0]
    shrunk = functional.interpolate(images[3:], (4, 3), mode="bilinear", antialias=True)[0]
    assert torch.equal(picture[:, 4:, 3:], shrunk)
    assert torch.equal(grid(images[:1], 1), images[0])


def test_cells_fill_a_picture_whose_side_is_no_multiple() -> None:
    picture = grid(torch.arange(9.0).view(9, 1, 1, 1).expand(9, 1, 7, 10), 3)
    assert sorted(picture.round().unique().tolist()) == list(map(float, range(9)))


@pytest.mark.parametrize(("available", "twice"), [(8, False), (7, True)])
def test_no_image_stands_twice_where_there_are_enough(available: int, twice: bool) -> None:
    begin = start(2, [available], shape=(1, 8, 8))
    begin = msgspec.structs.replace(begin, real_images=torch.arange(float(available)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8))
    pictures = ddkit.create("initializer", "mix")(begin)
    used = [picture.unique().tolist() for picture in pictures]
    assert all(len(values) == 4 for values in used)  # never twice in one picture
    assert bool(set(used[0]) & set(used[1])) is twice


def test_a_factor_that_images_have_no_room_for_is_an_error() -> None:
    with pytest.raises(ddkit.InputError, match="images of 8 x 8 pixels have no room for 9"):
        ddkit.create("initializer", "mix", {"factor": 9})(start(1, [81]))


# multiplier


@pytest.mark.parametrize("seed", range(3))
def test_multipliers_are_the_nonnegative_least_squares_solution(seed: int) -> None:
    from scipy.optimize import nnls

    g, theta = points(12, 30, seed), points(1, 30, seed + 10)[0]
    g *= np.logspace(-3, 1, 12)[:, None]  # gradients of very different lengths
    found = solve(g @ g.T, g @ theta, sweeps=2000)
    reference = nnls(g.T, theta)[0]
    assert 0 < (reference > 0).sum() < 12
    np.testing.assert_allclose(found.multipliers, reference, rtol=1e-4, atol=1e-6 * reference.max())
    np.testing.assert_allclose(found.shares, reference * np.linalg.norm(g, axis=1), rtol=1e-4, atol=1e-6)
    assert (found.slack[reference == 0] < 1e-5).all()  # none that is out would bring the sum nearer


def test_they_are_also_nearest_in_angle() -> None:
    g, theta = points(8, 20), points(1, 20, 5)[0]

    def cosine(x: Any) -> float:
        return float(theta @ (g.T @ x) / np.linalg.norm(theta) / np.linalg.norm(g.T @ x))

    best = solve(g @ g.T, g @ theta, sweeps=2000).multipliers
    draw = np.random.default_rng(0)
    assert all(cosine(np.maximum(0, best + draw.normal(size=8) * 0.1 * best.max())) <= cosine(best) + 1e-9 for _ in range(50))


def test_a_solver_that_is_stopped_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    g, theta = points(30, 40), points(1, 40, 5)[0]
    solve(g @ g.T, g @ theta, sweeps=1)
    assert "raise initializer.sweeps" in caplog.text
    assert nonnegative_solution(np.zeros((2, 2)), np.array([1.0, -1.0]), sweeps=3)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("block", [1, 3, 7, 20])
def test_the_gram_matrix_is_the_same_in_blocks(block: int) -> None:
    g = torch.from_numpy(points(7, 5))
    gram, right = gram_matrix(lambda rows: g[rows.start : rows.stop], g[0], 7, block)
    np.testing.assert_allclose(gram, (g @ g.T).numpy(), rtol=1e-12)
    np.testing.assert_allclose(right, (g @ g[0]).numpy(), rtol=1e-12)


def test_gradients_are_those_of_each_image_alone() -> None:
    begin = start(1, [2, 1])
    teacher = begin.teacher
    names = [name for name, _ in teacher.module.named_parameters()]
    found = negative_gradients(teacher, names, begin.real_images, begin.real_labels)
    module = teacher.module.requires_grad_(True)
    for row in range(3):
        loss = functional.cross_entropy(module(begin.real_images[row : row + 1]), begin.real_labels[row : row + 1])
        parts = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(found[row], -torch.cat([part.flatten() for part in parts]))


def test_images_with_the_highest_multipliers_are_chosen() -> None:
    begin = start(2, [6, 6, 6])
    teacher, names = begin.teacher, ["classifier.weight", "classifier.bias"]
    g = negative_gradients(teacher, names, begin.real_images, begin.real_labels).double().numpy()
    theta = torch.cat([teacher.parameters[name].flatten() for name in names]).double().numpy()
    found = solve(g @ g.T, g @ theta, sweeps=2000)
    for rank, score in (("multiplier", found.multipliers), ("share", found.shares)):
        chosen = rows_of(begin, ddkit.create("initializer", "multiplier", {"parameters": "classifier", "rank": rank})(begin))
        for label in range(3):
            own, wanted = range(6 * label, 6 * label + 6), chosen[2 * label : 2 * label + 2]
            positive = [row for row in own if score[row] > 1e-6]
            best = sorted(positive, key=lambda row: -score[row])[:2]
            assert set(best) <= set(wanted)


def test_candidates_bound_the_images_that_take_part_but_not_below_ipc() -> None:
    begin = start(4, [9, 9])
    few = ddkit.create("initializer", "multiplier", {"candidates": 2})
    assert len(few._candidates(begin)) == 8
    assert len(ddkit.create("initializer", "multiplier", {"candidates": 6})._candidates(begin)) == 12
    assert few(begin).shape == (8, 1, 8, 8)


# a set that is there


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of digits with two images a class."""
    path = tmp_path_factory.mktemp("earlier") / "run"
    ddkit.distill(losses="dm", ipc=2, pipc=4, sets=SMALL, evaluators="none", out=path)
    return path


def continued(path: Path, out: Path, **given: Any) -> ddkit.Artifact:
    ddkit.distill(losses="dm", init=f"file:{path}", steps=0, evaluators="none", sets=SMALL, out=out, **({"ipc": 2, "pipc": 4} | given))
    return ddkit.load(out)


@pytest.mark.parametrize("part", ["", "synthetic.safetensors"])
def test_a_run_or_its_file_is_continued_as_it_is(finished: Path, tmp_path: Path, part: str) -> None:
    earlier, now = ddkit.load(finished), continued(finished / part, tmp_path / "now")
    torch.testing.assert_close(now.images, earlier.images, rtol=0, atol=1e-6)
    assert torch.equal(now.labels, earlier.labels)
    fewer = continued(finished / part, tmp_path / "fewer", ipc=1)
    torch.testing.assert_close(fewer.images, earlier.images[::2], rtol=0, atol=1e-6)  # the first of each class


def test_it_is_in_the_units_of_this_run(finished: Path, tmp_path: Path) -> None:
    """Other accessible images, other statistics: the pixels stay what they are."""
    now = continued(finished, tmp_path / "now", pipc=7)
    assert now.mean != ddkit.load(finished).mean
    torch.testing.assert_close(now.images, ddkit.load(finished).images, rtol=0, atol=1e-6)


def test_the_resolved_recipe_holds_an_absolute_path(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    continued(Path("run"), tmp_path / "now")
    assert f'path = "{finished}"' in (tmp_path / "now" / "recipe.toml").read_text()


def test_a_run_goes_on_without_the_set_that_it_began_with(finished: Path, tmp_path: Path) -> None:
    earlier = shutil.copytree(finished, tmp_path / "earlier")
    given: dict[str, Any] = {"losses": "dm", "init": f"file:{earlier}", "ipc": 2, "pipc": 4, "evaluators": "none", "sets": SMALL}
    whole = ddkit.distill(**given, steps=3, out=tmp_path / "whole")
    begun = ddkit.distill(**given, steps=1, out=tmp_path / "begun")
    shutil.rmtree(earlier)
    assert torch.equal(ddkit.load(resume(begun.path, steps=3, device="cpu").path).images, ddkit.load(whole.path).images)
    with pytest.raises(ddkit.InputError, match="there is no such file or folder"):
        ddkit.distill(**given, steps=1, out=tmp_path / "new")


def write_classes(root: Path, names: Sequence[str], *, size: tuple[int, int] = (8, 8), each: int = 2, mode: str = "L") -> Path:
    draw = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(each):
            shape = size if mode == "L" else (*size, 3)
            Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8), mode=None).save(root / name / f"{number}.png")
    return root


DIGITS = [str(digit) for digit in range(10)]


@pytest.mark.parametrize("inside", ["", "train"])
def test_class_folders_are_matched_by_name_and_taken_in_order(tmp_path: Path, inside: str) -> None:
    root = tmp_path / "images"
    write_classes(root / inside, [*reversed(DIGITS), "extra"])
    now = continued(root, tmp_path / "now", ipc=1)
    for digit in range(10):
        pixels = np.array(Image.open(root / inside / str(digit) / "0.png"))
        torch.testing.assert_close(now.images[digit, 0], torch.tensor(pixels) / 255, rtol=0, atol=1e-6)


def test_other_sizes_and_channels_are_made_to_fit_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_classes(tmp_path / "images", DIGITS, size=(12, 10), mode="RGB")
    assert continued(root, tmp_path / "now").images.shape == (20, 1, 8, 8)
    assert "20 of 20 images were made to fit: 1 channel, 8 x 8 pixels" in caplog.text


def test_what_cannot_be_continued_is_told_before_the_run(finished: Path, tmp_path: Path, cli: CLI) -> None:
    few = write_classes(tmp_path / "few", DIGITS, each=1)
    missing = write_classes(tmp_path / "missing", DIGITS[:8])
    (tmp_path / "text.safetensors").write_text("no")
    for path, code, message in (
        (tmp_path / "nothing", 4, "there is no such file or folder"),
        (few, 4, "has too few images for ipc 2: '0' has 1"),
        (missing, 4, "has no class '8', '9'; it has '0', '1'"),
        (tmp_path / "text.safetensors", 5, "text.safetensors"),
        ("", 4, "needs a path: --init file:PATH"),
    ):
        found = cli("distill", "--losses", "dm", "--ipc", 2, "--pipc", 4, "--init", f"file:{path}", "--out", "run", *SMALL_FLAGS)
        assert (found.code, found.out) == (code, ""), found.err
        assert message in " ".join(found.err.split())
        assert not Path("run").exists()


# coreset baselines, and who has a teacher


@pytest.mark.parametrize("name", ["herding", "multiplier", "mix"])
def test_no_step_at_all_evaluates_what_the_initializer_gives(name: str, cli: CLI) -> None:
    flags = ("--steps", 0, "--ipc", 2, "--pipc", 5, "--init", name, "--out", "run", "--json", *SMALL_FLAGS[2:])
    found = cli("distill", *flags)  # the losses of the default recipe, which ask for a teacher
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["steps"] == 0
    assert 0 <= told["evaluations"][0]["accuracy_mean"] <= 1
    assert ddkit.load("run").images.shape == (20, 1, 8, 8)


def test_the_teacher_is_there_only_where_it_is_required(tmp_path: Path) -> None:
    seen: dict[str, ddkit.InitContext] = {}
    for name, sets in (("herding", {}), ("herding", {"initializer.features": "teacher"})):
        key = str(sets.get("initializer.features"))
        initializer = ddkit.create("initializer", name, {"features": sets.get("initializer.features", "pixels")})
        original = type(initializer).__call__

        def spy(self: Any, begin: ddkit.InitContext, key: str = key, original: Any = original) -> Any:
            seen[key] = begin
            return original(self, begin)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(initializer), "__call__", spy)
            given = SMALL | sets
            ddkit.distill(losses="dm", init=name, pipc=3, sets=given, evaluators="none", out=tmp_path / key)
    assert seen["None"].teacher is None
    assert seen["None"].features is None
    assert seen["teacher"].teacher is not None
    assert seen["teacher"].normalisation.mean == seen["teacher"].teacher.mean  # images come in its units
    assert seen["None"].class_names == tuple(DIGITS)
    manifest = json.loads((tmp_path / "teacher" / "manifest.json").read_text())
    assert manifest["teacher"] is not None
