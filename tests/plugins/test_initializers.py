"""Initializers: what they choose, against slow references; grids; sets that are there already; the teacher's multipliers."""

from __future__ import annotations

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
from ddkit_initializers import coresets, crops
from PIL import Image
from torch import Tensor
from torch.nn import functional

import ddkit
from ddkit.api import resume
from ddkit.data import grid
from ddkit.testing import InitializerConformance
from tests.conftest import SMALL, SMALL_FLAGS, Result

CLI = Callable[..., Result]
CHOOSING = ["real", "kmeans", "herding", "k-center", "multiplier"]
SHORT: dict[str, Any] = {"losses": "dm", "evaluators": "none", "sets": SMALL, "ipc": 2, "pipc": 4}
DIGITS = [str(digit) for digit in range(10)]


def points(rows: int, columns: int = 3, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def begin(name: str, ipc: int, real: Sequence[int], **options: Any) -> tuple[Any, ddkit.InitContext]:
    """Returns an initializer, and what it sees of classes with so many real images of 1 x 8 x 8."""
    suite: Any = type("Suite", (InitializerConformance,), {"component": name, "options": options})()
    return suite.make(), suite.start(rows=[ipc] * len(real), real=real)


def chosen_rows(initializer: Any, start: ddkit.InitContext) -> list[int]:
    """Returns which real image each one is that the initializer gives."""
    return [int((start.real_images == image).flatten(1).all(1).nonzero()) for image in initializer(start)]


# herding, k-center, k-means


@pytest.mark.parametrize("count", [1, 4, 9])
def test_herding_takes_what_brings_the_mean_nearest(count: int) -> None:
    x, chosen = points(9), list[int]()
    for number in range(1, count + 1):
        means = {row: (x[row] + sum(x[each] for each in chosen)) / number for row in range(9) if row not in chosen}
        chosen.append(min(means, key=lambda row: np.linalg.norm(x.mean(0) - means[row])))
    assert coresets.herd(x, count) == chosen


@pytest.mark.parametrize("count", [1, 3, 7])
def test_k_center_begins_in_the_middle_and_always_takes_the_farthest(count: int) -> None:
    x = points(7)
    chosen = [min(range(7), key=lambda row: np.linalg.norm(x[row] - x.mean(0)))]
    while len(chosen) < count:
        nearest = {row: min(np.linalg.norm(x[row] - x[c]) for c in chosen) for row in range(7) if row not in chosen}
        chosen.append(max(nearest, key=lambda row: nearest[row]))
    assert coresets.farthest(x, count) == chosen


def test_kmeans_takes_the_member_nearest_to_each_centre() -> None:
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    offsets = np.array([[1.0, 0.0], [-0.5, 0.8], [0.1, -0.1], [-0.6, -0.7]])  # their mean is 0, and the third is nearest to it
    x = (centres[:, None] + offsets[None]).reshape(-1, 2)
    assert sorted(coresets.central(x, 3, 0, restarts=3)) == [2, 6, 10]


def test_equal_images_make_fewer_clusters_and_still_enough_different_rows() -> None:
    x = np.zeros((6, 2))
    x[5] = 1.0
    assert 5 in coresets.central(x, 4, 0, restarts=2)
    for chosen in (coresets.central(x, 4, 0, restarts=2), coresets.herd(x, 4), coresets.farthest(x, 4)):
        assert len(set(chosen)) == 4


@pytest.mark.parametrize("name", CHOOSING)
def test_chosen_images_are_different_real_ones_of_the_class_and_with_all_of_them_the_set_itself(name: str) -> None:
    initializer, start = begin(name, 2, [5, 4, 6])
    rows = chosen_rows(initializer, start)
    assert rows == sorted(set(rows))
    assert torch.equal(start.real_labels[rows], start.labels)
    initializer, whole = begin(name, 4, [4, 4])
    assert torch.equal(initializer(whole), whole.real_images)


@pytest.mark.parametrize("name", ["kmeans", "herding", "k-center"])
def test_features_of_the_teacher_are_what_is_compared_where_asked_for(name: str) -> None:
    initializer, start = begin(name, 3, [12, 12, 12], features="teacher")
    chosen = chosen_rows(initializer, start)
    assert start.features is not None
    features = start.features(start.real_images[:12]).detach().double().numpy()
    own = {"herding": coresets.herd, "k-center": coresets.farthest}
    if name in own:
        assert chosen[:3] == sorted(own[name](features, 3))
    assert chosen != chosen_rows(ddkit.create("initializer", name), start)


@pytest.mark.parametrize("features", ["pixels", "teacher"])
def test_the_teacher_is_there_only_where_it_is_required(features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[ddkit.InitContext]()
    original = coresets.Coreset.__call__
    monkeypatch.setattr(coresets.Coreset, "__call__", lambda self, start: seen.append(start) or original(self, start))
    sets = SMALL | {"initializer.features": features}
    run = ddkit.distill(losses="dm", init="herding", pipc=3, sets=sets, evaluators="none", out=tmp_path / "run")
    manifest = json.loads((run.path / "manifest.json").read_text())
    (start,) = seen
    assert list(start.class_names) == DIGITS
    assert {start.teacher is not None, start.features is not None, manifest["teacher"] is not None} == {features == "teacher"}
    assert start.teacher is None or start.normalisation.mean == start.teacher.mean, "images come in its units"


@pytest.mark.parametrize("name", [*CHOOSING, "mix"])
def test_too_few_images_are_an_error_that_names_the_class(name: str) -> None:
    initializer = ddkit.create("initializer", name)
    initializer.check(4, {"cat": 4, "dog": 9})
    with pytest.raises(ddkit.InputError, match=rf"The initializer '{name}' needs 4 accessible real images per class.*'cat' has 3.*--pipc"):
        initializer.check(4, {"cat": 3, "dog": 9})


# mix


def test_a_grid_shows_shrunken_images_row_by_row_and_fills_a_picture_whose_side_is_no_multiple() -> None:
    images = torch.randn((4, 3, 8, 6), generator=torch.Generator().manual_seed(0))
    shrunk = functional.interpolate(images, (4, 3), mode="bilinear", antialias=True)
    assert torch.equal(grid(images, 2), torch.cat([torch.cat([*shrunk[:2]], 2), torch.cat([*shrunk[2:]], 2)], 1))
    assert torch.equal(grid(images[:1], 1), images[0])
    picture = grid(torch.arange(9.0).view(9, 1, 1, 1).expand(9, 1, 7, 10), 3)
    assert picture.shape == (1, 7, 10)
    assert picture.round().unique().tolist() == list(range(9))


@pytest.mark.parametrize(("available", "twice"), [(8, False), (7, True)])
def test_no_image_stands_twice_where_there_are_enough(available: int, twice: bool) -> None:
    initializer, start = begin("mix", 2, [available])
    real = torch.arange(float(available)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    one, two = (set(picture.unique().tolist()) for picture in initializer(msgspec.structs.replace(start, real_images=real)))
    assert len(one) == len(two) == 4, "never twice in one picture"
    assert bool(one & two) is twice


def test_a_factor_that_images_have_no_room_for_is_an_error() -> None:
    initializer, start = begin("mix", 1, [81], factor=9)
    with pytest.raises(ddkit.InputError, match="images of 8 x 8 pixels are too small for 9"):
        initializer(start)


# multiplier


@pytest.mark.parametrize("seed", range(3))
def test_multipliers_are_the_nonnegative_least_squares_solution_which_is_also_nearest_in_angle(seed: int) -> None:
    from scipy.optimize import nnls

    g, theta = points(12, 30, seed), points(1, 30, seed + 10)[0]
    g *= np.logspace(-3, 1, 12)[:, None]  # gradients of very different lengths
    found = solve(g @ g.T, g @ theta, sweeps=2000)
    reference = nnls(g.T, theta)[0]
    assert 0 < (reference > 0).sum() < 12
    np.testing.assert_allclose(found.multipliers, reference, rtol=1e-4, atol=1e-6 * reference.max())
    np.testing.assert_allclose(found.shares, reference * np.linalg.norm(g, axis=1), rtol=1e-4, atol=1e-6)
    assert (found.slack[reference == 0] < 1e-5).all(), "none that is out would bring the sum nearer"
    draw = np.random.default_rng(0)
    others = [np.maximum(0, found.multipliers * (1 + draw.normal(size=12) * 0.1)) for _ in range(50)]
    cosines = [theta @ (g.T @ x) / np.linalg.norm(g.T @ x) for x in (found.multipliers, *others)]
    assert max(cosines) <= cosines[0] + 1e-9


def test_a_solver_that_is_stopped_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    g, theta = points(30, 40), points(1, 40, 5)[0]
    solve(g @ g.T, g @ theta, sweeps=1)
    assert "Raise initializer.sweeps" in caplog.text
    assert nonnegative_solution(np.zeros((2, 2)), np.array([1.0, -1.0]), sweeps=3)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("block", [1, 3, 7, 20])
def test_the_gram_matrix_is_the_same_in_blocks(block: int) -> None:
    g = torch.from_numpy(points(7, 5))
    gram, right = gram_matrix(lambda rows: g[rows.start : rows.stop], g[0], 7, block)
    np.testing.assert_allclose(gram, (g @ g.T).numpy(), rtol=1e-12)
    np.testing.assert_allclose(right, (g @ g[0]).numpy(), rtol=1e-12)


def test_images_with_the_highest_multipliers_or_shares_of_the_selected_parameters_are_chosen() -> None:
    initializer, start = begin("multiplier", 2, [6, 6, 6], parameters="classifier")
    start.real_images.mul_(torch.logspace(-1, 1, 6).repeat(3)[:, None, None, None])  # gradients of very different lengths
    assert start.teacher is not None
    classifier = start.teacher.module.requires_grad_(True).classifier
    rows = list[Tensor]()
    for image, label in zip(start.real_images, start.real_labels, strict=True):
        loss = functional.cross_entropy(start.teacher.module(image[None]), label[None])
        rows.append(-torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(classifier.parameters()))]))
    g, theta = torch.stack(rows), torch.cat([part.detach().flatten() for part in classifier.parameters()])
    names = ["classifier.weight", "classifier.bias"]
    torch.testing.assert_close(negative_gradients(start.teacher, names, start.real_images, start.real_labels), g)
    solution = solve((g @ g.T).double().numpy(), (g @ theta).double().numpy(), sweeps=2000)
    by_share = ddkit.create("initializer", "multiplier", {"parameters": "classifier", "rank": "share"})
    best = list[list[int]]()
    for score, rows_chosen in ((solution.multipliers, chosen_rows(initializer, start)), (solution.shares, chosen_rows(by_share, start))):
        ranked = [row for row in np.argsort(-score).tolist() if score[row] > 1e-6]
        best.append([row for label in range(3) for row in [row for row in ranked if row // 6 == label][:2]])
        assert set(best[-1]) <= set(rows_chosen)
    assert set(best[0]) != set(best[1])


@pytest.mark.parametrize(("candidates", "count"), [(2, 8), (6, 12), (100, 18)])
def test_candidates_bound_the_images_that_take_part_but_not_below_ipc(candidates: int, count: int) -> None:
    initializer, start = begin("multiplier", 4, [9, 9], candidates=candidates)
    assert len(initializer._candidates(start)) == count


# a set that is there


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of digits with two images per class."""
    return ddkit.distill(**SHORT, out=tmp_path_factory.mktemp("earlier") / "run").path


def continued(path: Path, out: Path, **given: Any) -> ddkit.Artifact:
    """Returns the set with which a run begins where `path` is there already."""
    return ddkit.load(ddkit.distill(**SHORT | {"steps": 0} | given, init=f"file:{path}", out=out).path)


@pytest.mark.parametrize("part", ["", "synthetic.safetensors"])
def test_a_run_or_its_file_is_continued_with_its_pixels_in_the_units_of_this_run(finished: Path, tmp_path: Path, part: str) -> None:
    earlier = ddkit.load(finished)
    for given, rows in (({}, slice(None)), ({"ipc": 1}, slice(None, None, 2)), ({"pipc": 7}, slice(None))):  # the first of each class
        now = continued(finished / part, tmp_path / str(given), **given)
        torch.testing.assert_close(now.images, earlier.images[rows], rtol=0, atol=1e-6)
        assert torch.equal(now.labels, earlier.labels[rows])
    assert now.mean != earlier.mean, "other accessible images, other statistics"


def test_a_run_goes_on_without_the_set_that_it_began_with(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "earlier")
    whole = continued(Path("earlier"), tmp_path / "whole", steps=3)
    continued(Path("earlier"), tmp_path / "begun", steps=1)
    assert f'path = "{tmp_path / "earlier"}"' in Path("begun/recipe.toml").read_text(), "absolute"
    shutil.rmtree("earlier")
    assert torch.equal(ddkit.load(resume(tmp_path / "begun", steps=3, device="cpu").path).images, whole.images)


def write_classes(root: Path, names: Sequence[str], *, shape: tuple[int, ...] = (8, 8), each: int = 2) -> Path:
    draw = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("inside", ["", "train"])
def test_class_folders_are_matched_by_name_and_taken_in_order(tmp_path: Path, inside: str) -> None:
    root = tmp_path / "images"
    write_classes(root / inside, [*reversed(DIGITS), "extra"])
    now = continued(root, tmp_path / "now", ipc=1)
    pixels = np.stack([np.array(Image.open(root / inside / digit / "0.png")) for digit in DIGITS])
    torch.testing.assert_close(now.images[:, 0], torch.tensor(pixels) / 255, rtol=0, atol=1e-6)


def test_other_sizes_and_channels_are_made_to_fit_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_classes(tmp_path / "images", DIGITS, shape=(12, 10, 3))
    assert continued(root, tmp_path / "now").images.shape == (20, 1, 8, 8)
    assert "20 of 20 images were converted to 1 channel and 8 x 8 pixels" in caplog.text


def test_a_set_that_cannot_be_continued_is_an_error_before_the_run(tmp_path: Path, cli: CLI) -> None:
    few = write_classes(tmp_path / "few", DIGITS, each=1)
    missing = write_classes(tmp_path / "missing", DIGITS[:8])
    (tmp_path / "text.safetensors").write_text("no")
    for path, code, words in (
        (tmp_path / "nothing", 4, "which does not exist"),
        (few, 4, "has too few images for ipc 2: '0' has 1"),
        (missing, 4, "has no class '8', '9'. Its classes are '0', '1'"),
        (tmp_path / "text.safetensors", 5, "text.safetensors"),
        ("", 4, "needs a path, as in --init file:PATH"),
    ):
        found = cli("distill", "--losses", "dm", "--ipc", 2, "--pipc", 4, "--init", f"file:{path}", "--out", "run", *SMALL_FLAGS)
        assert (found.code, found.out) == (code, ""), found.err
        assert words in " ".join(found.err.split())
        assert not Path("run").exists()


@pytest.mark.parametrize("name", ["herding", "multiplier", "mix"])
def test_no_step_at_all_evaluates_what_the_initializer_gives(name: str, cli: CLI) -> None:
    flags = ("--steps", 0, "--ipc", 2, "--pipc", 5, "--init", name, "--out", "run", "--json", *SMALL_FLAGS[2:])
    found = cli("distill", *flags)  # the losses of the default recipe, which ask for a teacher
    assert found.code == 0, found.err
    run = json.loads(found.out)
    assert run["steps"] == 0
    assert 0 <= run["evaluations"][0]["accuracy_mean"] <= 1
    assert ddkit.load("run").images.shape == (20, 1, 8, 8)


def test_noise_has_the_asked_for_deviation() -> None:
    start = ddkit.InitContext(
        labels=torch.arange(2).repeat_interleave(200), shape=(3, 4, 5), real_images=torch.zeros(0, 3, 4, 5),
        real_labels=torch.zeros(0, dtype=torch.int64), generator=lambda label: ddkit.generator(0, label),
    )  # fmt: skip
    images = ddkit.create("initializer", "noise", {"std": 0.1})(start)
    assert abs(float(images.std()) - 0.1) < 2e-3
    assert abs(float(images.mean())) < 2e-3


# typical crops


@pytest.mark.parametrize(("factor", "ipc"), [(1, 3), (2, 1)])
def test_typical_crops_are_those_that_a_slow_search_finds(factor: int, ipc: int) -> None:
    initializer, start = begin("typical-crops", ipc, [6, 5], factor=factor, crops=3, candidates=5)
    height, width = start.shape[1:]
    size = (height // factor, width // factor)
    found = initializer(start)
    for label in (0, 1):
        draws = start.generator(label)
        rows = (start.real_labels == label).nonzero().flatten()
        images = start.real_images[rows[torch.randperm(len(rows), generator=draws)[:5]]]
        numbers = torch.rand((3, len(images), 3), generator=draws, dtype=torch.float64)
        best: list[tuple[float, Tensor]] = []
        for image, own in zip(images, numbers.transpose(0, 1), strict=True):
            scored = []
            for each in own:
                part, canvas = crops.cropped(image, each, size, 0.08), torch.zeros(1, *start.shape)
                top, left = (height - size[0]) // 2, (width - size[1]) // 2
                canvas[0, :, top : top + size[0], left : left + size[1]] = part
                scored.append((-float(start.teacher.logits(canvas).log_softmax(1)[0, label]), part))
            best.append(min(scored, key=lambda pair: pair[0]))
        wanted = [part for _, part in sorted(best, key=lambda pair: pair[0])][: ipc * factor**2]
        for number, picture in enumerate(found[start.labels == label]):
            for cell, part in enumerate(wanted[number::ipc]):
                top, left = cell // factor * size[0], cell % factor * size[1]
                torch.testing.assert_close(picture[:, top : top + size[0], left : left + size[1]], part)


def test_a_crop_has_the_proportions_of_its_image_and_its_share_of_the_area() -> None:
    image = torch.arange(800.0).view(1, 20, 40)
    whole, quarter = torch.tensor([0.9999, 0.5, 0.5]), torch.tensor([0.0, 0.0, 0.9999])
    torch.testing.assert_close(crops.cropped(image, whole, (20, 40), 0.25), image)
    torch.testing.assert_close(crops.cropped(image, quarter, (10, 20), 0.25), image[:, :10, 20:])


def test_a_recipe_without_losses_makes_a_set_in_no_steps_and_is_refused_with_some(tmp_path: Path) -> None:
    with pytest.raises(ddkit.InputError, match="--steps 0"):
        ddkit.distill("rded", steps=1, out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    small = {path: value for path, value in SMALL.items() if path != "steps"} | {"teacher.width": 8}
    run = ddkit.distill("rded", ipc=1, pipc=6, sets=small, out=tmp_path / "run", device="cpu")
    made = ddkit.load(run.path)
    assert made.soft_labels is not None
    assert [row.labels for row in run.evaluations] == ["teacher"]
    assert resume(run.path).path == run.path
