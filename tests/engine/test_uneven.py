"""Classes with numbers of their own: of synthetic images, and of real ones where a class has too few."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import ddkit
from ddkit.cli.common import IPC
from ddkit.components.figures import budget
from ddkit.data.real import repeated
from ddkit.recipes.tables import Recipe, parse_recipe
from tests.engine.runs import made, write_npz

NET: dict[str, Any] = {"width": 4, "depth": 1}
REAL = (9, 4, 2)  # images of each class


def table(data: Path, ipc: Any, **more: Any) -> dict[str, Any]:
    recipe = {"ipc": ipc, "pipc": "all", "data": {"use": f"npz:{data}"}, "losses": {"dm": {}}, "network": NET}
    return recipe | {"initializer": {"use": "real", "reuse": True}} | more


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("uneven") / "data.npz", REAL)


def test_each_class_has_its_own_number_and_equal_ones_are_the_plain_number(data: Path) -> None:
    setup, bank, _ = made(table(data, {"default": 2, "1": 5}))
    assert bank.labels.bincount().tolist() == [2, 5, 2]
    assert (setup.ipc, bank.stored_numbers) == ([2, 5, 2], 9 * 64)
    states = [made(table(data, ipc))[1].state() for ipc in (3, {"default": 3}, {"0": 3, "1": 3, "2": 3})]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    grid = {"parametrization": {"use": "grid", "factor": 2}}
    setup, bank, _ = made(table(data, {"default": 1, "2": 2}, **grid))
    assert (bank.labels.bincount().tolist(), bank.decoded_labels.bincount().tolist()) == ([1, 1, 2], [4, 4, 8])


def test_chunks_of_uneven_classes_give_the_gradients_of_the_whole(data: Path) -> None:
    found = []
    for chunk in (0, 1, 2):
        _, bank, engine = made(table(data, {"default": 2, "0": 4}, losses={"dm": {}, "gm": {}}, engine={"chunk": chunk}))
        engine.start()
        found.append(engine.evaluate(0))
        assert len(bank.labels) == 8
    for other in found[1:]:
        assert torch.allclose(found[0].gradients["images"], other.gradients["images"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["real", "kmeans", "herding", "k-center", "mix"])
def test_a_class_with_too_few_real_images_takes_them_again_every_second_time_mirrored(data: Path, name: str) -> None:
    setup, bank, _ = made(table(data, {"default": 2, "2": 5}, initializer={"use": name, "reuse": True}))
    own = bank.images[bank.labels == 2].detach()
    assert len(own) == 5
    if name != "mix":
        real = setup.normalisation.normalise(setup.real.images[setup.real.labels == 2])
        assert torch.equal(own, torch.cat([real, real.flip(3), real])[:5])
    with pytest.raises(ddkit.InputError, match=r"'2' has 2.*or --set initializer\.reuse=true"):
        made(table(data, {"default": 2, "2": 5}, initializer={"use": name}))


def test_classes_that_have_enough_are_not_touched() -> None:
    images, labels = torch.arange(24.0).view(6, 1, 2, 2), torch.tensor([0, 0, 0, 2, 2, 2])
    assert repeated(images, labels, [3, 9, 1])[0] is images
    again, of = repeated(images, labels, [3, 9, 4])
    assert (of.tolist(), torch.equal(again[:6], images), torch.equal(again[6], images[3].flip(2))) == ([0] * 3 + [2] * 4, True, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10", 10), ("10,tail=3", {"default": 10, "tail": 3}), ("a=b=2, c=1", {"a=b": 2, "c": 1}), ("default=4", 4)],
)
def test_the_flag_takes_numbers_by_class(text: str, expected: Any) -> None:
    assert IPC.parse(text) == expected


def test_rules_go_by_the_number_of_most_classes() -> None:
    from ddkit.recipes.resolve import resolve

    raw = {"losses": {"dm": {}}, "rules": [{"when": {"ipc_min": 5}, "set": {"steps": 7}}]}
    steps = [resolve(raw, ipc=ipc).steps for ipc in ({"default": 5, "a": 1}, {"default": 2, "a": 9}, {"a": 9, "b": 1})]
    assert steps == [7, Recipe().steps, 7]
    assert parse_recipe({"ipc": {"default": 5}}).ipc_of(["a", "b"]) == [5, 5]


def test_sets_with_the_same_numbers_by_class_are_blended_and_the_blend_has_them(data: Path, tmp_path: Path) -> None:
    for number, ipc in enumerate(({"default": 1, "2": 3}, {"default": 1, "2": 3}, {"default": 1})):
        ddkit.distill(table(data, ipc, steps=0, seed=number), evaluators="none", out=tmp_path / str(number))
    ddkit.blend(tmp_path / "0", tmp_path / "1", alpha=0.25, out=tmp_path / "blend")
    first, second, both = (ddkit.load(tmp_path / name) for name in ("0", "1", "blend"))
    torch.testing.assert_close(both.images, torch.lerp(first.images, second.images, 0.25))
    assert both.labels.bincount().tolist() == [1, 1, 3]
    assert both.stored_by_class == {"0": 64, "1": 64, "2": 192}
    assert sum(both.stored_by_class.values()) / 3 == both.stored_numbers
    assert budget(both.stored_numbers, both.stored_as_images, both.stored_by_class) == "64 to 192 (1 to 3 images)"
    assert tomllib.loads((tmp_path / "blend" / "recipe.toml").read_text())["ipc"] == {"0": 1, "1": 1, "2": 3}
    with pytest.raises(ddkit.InputError, match="The first set has 3 images of the class '2', but the second has 1"):
        ddkit.blend(tmp_path / "0", tmp_path / "2", out=tmp_path / "none")
