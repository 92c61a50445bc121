"""Experts: networks trained on real images, kept in a folder, and drawn from it by the steps of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ddkit
from ddkit.engine.loop import Engine
from ddkit.engine.losses import WeightedLoss
from ddkit.engine.step import Step
from ddkit.errors import InputError, RunFailed
from ddkit.files import read_tensors, write_json
from ddkit.nn.experts import Experts, Trajectory, untrained
from ddkit.nn.networks import build_network, network_tensors
from ddkit.nn.training import Schedule, fit
from ddkit.recipes.tables import ExpertsTable
from ddkit.seeding import generator
from tests.conftest import Result, content, set_flags
from tests.engine.runs import made, same, write_npz
from tests.factories import with_dropout

Cli = Callable[..., Result]
COUNT, EPOCHS, EVERY = 3, 4, 2
NETWORK = {"width": 4, "depth": 1}
SETS = {**{f"network.{key}": value for key, value in NETWORK.items()}, "train.batch": 8, "experts.precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"npz:{write_npz(tmp_path_factory.mktemp('data') / 'small.npz', [10] * 3)}"


def trained(out: Path, data: str, **changes: Any) -> Experts:
    sets = SETS | changes.pop("sets", {})
    given = {"experts": COUNT, "epochs": EPOCHS, "save_every": EVERY, "dataset": data, "pipc": 6} | changes
    return ddkit.train_experts(out, sets=sets, device="cpu", **given)


@pytest.fixture(scope="module")
def folder(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of experts; not to be changed."""
    out = tmp_path_factory.mktemp("experts") / "folder"
    trained(out, data)
    return out


def table(data: str, experts: Path | str, losses: tuple[str, ...] = ("dm",), **network: Any) -> dict[str, Any]:
    return {
        "ipc": 1, "pipc": 6, "steps": 4, "data": {"use": "npz", "path": data.removeprefix("npz:")}, "initializer": "noise",
        "network": NETWORK | {"source": "experts"} | network, "experts": {"use": str(experts)}, "losses": {name: {} for name in losses},
    }  # fmt: skip


# The folder


def test_an_expert_is_a_network_trained_by_the_book_with_its_weights_at_the_start_and_after_epochs(data: str, folder: Path) -> None:
    job, _, engine = made(table(data, folder))
    assert job.experts is not None
    assert (job.experts.count, list(job.experts.epochs)) == (COUNT, [0, 2, 4])
    manifest = json.loads((folder / "experts.json").read_text())
    dsa = ddkit.create("augmenter", "dsa", manifest["settings"]["train"]["options"], data=job.info)
    source = engine.source.draws
    images = source.normalisation.normalise(source.real_images)
    module = build_network(job.model, job.info, 0, "expert", 1)
    seen = [{name: value.clone() for name, value in network_tensors(module).items()}]
    fit(
        module, images, source.real_labels, Schedule(epochs=EPOCHS, batch=8, lr=0.1, schedule="one-cycle"),
        augmenter=dsa, generator=generator(0, "expert training", 1),
        report=lambda epoch, epochs: seen.append({name: value.clone() for name, value in network_tensors(module).items()}),
    )  # fmt: skip
    for row, epoch in enumerate(job.experts.epochs):
        assert same(job.experts.weights(1, row), seen[epoch]), f"epoch {epoch}"
    assert not same(job.experts.weights(0, 2), job.experts.weights(1, 2))
    assert [entry["accuracy"][0] for entry in manifest["experts"]] == [None] * COUNT
    assert all(0 <= accuracy <= 1 for entry in manifest["experts"] for accuracy in entry["accuracy"][1:])
    assert manifest["settings"]["data"] == {"use": "accessible", "sha256": job.real.digest(), "images": 18}


def test_bfloat16_rounds_the_same_weights(data: str, folder: Path, tmp_path: Path) -> None:
    half = trained(tmp_path / "half", data, experts=1, sets={"experts.precision": "bfloat16"})
    exact, _ = read_tensors(folder / "expert-0000.safetensors")
    assert half.weights(0, 2).keys() == exact.keys()
    assert same(half.weights(0, 2), {name: value[2].bfloat16().float() for name, value in exact.items()})


def test_networks_trained_side_by_side_have_the_same_bytes(data: str, folder: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trained(tmp_path / "two", data)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path / "two") == content(folder)


def test_a_training_that_was_cut_off_goes_on_and_gives_the_same_bytes(data: str, folder: Path, tmp_path: Path) -> None:
    class Kill:
        @ddkit.hookimpl
        def stage_progress(self, stage: str, done: int) -> None:
            if stage == "experts" and done == 2:
                raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt, match="Run the same command again"):
        trained(out, data, observers=[Kill()])
    left = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {"experts.json", "expert-0000.safetensors"} <= left.keys()
    assert "expert-0002.safetensors" not in left
    with pytest.raises(InputError, match="0 are finished, but the run needs at least 1"):
        made(table(data, out))
    trained(out, data)
    assert content(out) == content(folder)
    assert (out / "expert-0000.safetensors").stat().st_mtime_ns == left["expert-0000.safetensors"]


def test_more_experts_are_added_to_those_that_are_there(data: str, folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "more"))
    assert trained(out, data, experts=COUNT + 1).count == COUNT + 1
    kept = content(out)
    assert all(kept[name] == value for name, value in content(folder).items() if name != "experts.json")


def test_a_network_that_draws_is_trained_with_draws_of_its_own(data: str, tmp_path: Path) -> None:
    assert with_dropout.__module__ == "tests.factories"
    found = []
    for name in ("one", "two"):
        torch.manual_seed(len(name) + len(found))
        before = torch.get_rng_state()
        given = {"model": "python:tests.factories.with_dropout", "sets": {"train.batch": 8, "experts.precision": "float32"}}
        ddkit.train_experts(tmp_path / name, experts=2, epochs=1, dataset=data, pipc=6, device="cpu", **given)
        assert torch.equal(before, torch.get_rng_state())
        found.append(content(tmp_path / name))
    assert found[0] == found[1]


# Folders that do not fit


def damaged(folder: Path) -> None:
    file = folder / "expert-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")


def mixed(folder: Path) -> None:
    ddkit.train_experts(folder / "other", experts=2, epochs=1, dataset="digits", pipc=1, sets=SETS, device="cpu")
    (folder / "other" / "expert-0001.safetensors").replace(folder / "expert-0001.safetensors")


def edited(folder: Path) -> None:
    write_json(folder / "experts.json", json.loads((folder / "experts.json").read_text()) | {"mean": [0.0]})


UNFIT: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "nothing is there": (shutil.rmtree, {}, "there is no experts.json. `ddkit train --experts 20"),
    "another file": (lambda folder: (folder / "experts.json").write_text("[]"), {}, "experts.json cannot be used"),
    "an edited manifest": (edited, {}, "is damaged or was edited"),
    "a damaged file": (damaged, {}, "are damaged: "),
    "a missing file": (lambda folder: (folder / "expert-0002.safetensors").unlink(), {}, "expert-0002.safetensors is missing"),
    "files of two folders": (mixed, {}, "files of several folders are mixed"),
    "other images": (lambda folder: None, {"seed": 1}, "they are trained on other images"),
    "all images asked for": (lambda folder: None, {"experts.data": "all"}, "Use --set experts.data=accessible"),
    "another network": (lambda folder: None, {"network.width": 8}, "--set network.width=4"),
    "another model": (lambda folder: None, {"network.model": "mlp"}, "--set network.model=convnet"),
    "more than there are": (lambda folder: None, {"experts.count": 9}, "3 are finished, but the run needs 9"),
    "other epochs": (lambda folder: None, {"experts.epochs": 9}, "they have epochs = 4"),
    "an epoch beyond the last": (lambda folder: None, {"network.last": 9}, "trained for 4 epochs"),
    "no saved epoch between": (lambda folder: None, {"network.first": 3, "network.last": 3}, "have no saved epoch from 3 to 3"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_folder_that_does_not_fit_is_one_clear_error(cli: Cli, data: str, folder: Path, tmp_path: Path, name: str) -> None:
    spoil, sets, phrase = UNFIT[name]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    network = {f"network.{key}": value for key, value in NETWORK.items() if name != "another model"}
    given = network | {"network.source": "experts", "experts.use": str(copy)}
    command = ("distill", "--losses", "dm", "--dataset", data, "--pipc", 6, "--steps", 1, "--evaluate", "none", "--out", "run")
    if name == "nothing is there":  # the control, once: it fits
        assert cli(*command[:-1], "fits", *set_flags(given)).code == 0
    spoil(copy)
    result = cli(*command, *set_flags(given | sets))
    assert (result.code, result.out, Path("run").exists()) == (4, "", False)
    assert phrase in " ".join(result.err.split())


def test_the_command_refuses_what_it_cannot_do(cli: Cli, data: str, folder: Path) -> None:
    flags = ("train", "--dataset", data, "--pipc", 6, *set_flags(SETS))
    Path("full").mkdir()
    Path("full", "photo.jpg").write_text("mine")
    for code, phrase, *words in (
        (5, "contains other experts (epochs is 4 there and 10 here)", "--experts", 3, "--save-every", 2, "--out", folder),
        (5, "is not a folder of experts", "--experts", 3, "--out", "full"),
        (2, "--pipc has no effect: only --experts uses it", "--out", "teacher.safetensors"),
        (2, "--set network.inner_epochs has no effect", "--experts", 3, "--set", "network.inner_epochs=3", "--out", "new"),
        (4, "no trained weights would be saved", "--experts", 3, "--epochs", 2, "--save-every", 3, "--out", "new"),
        (1, "The training of expert 0 diverged", "--experts", 1, "--set", "train.lr=1e30", "--out", "new2"),
    ):
        result = cli(*flags, *words)
        assert (result.code, result.out) == (code, ""), result.err
        assert phrase in " ".join(result.err.split())
    assert not Path("new").exists()


# A run


class Watch(ddkit.Loss):
    """Keeps the network of each step and what it draws from the experts; weighs nothing."""

    requires = ddkit.Requires(network=True, experts=True)

    def __call__(self, step: Step) -> Tensor:
        network = {name: value.clone() for name, value in network_tensors(step.network).items()}
        self.__dict__.setdefault("seen", []).append((network, step.experts.draw(EVERY), step.experts.draw(first=EPOCHS)))
        return step.images.sum() * 0


def watched(recipe: dict[str, Any]) -> tuple[Experts, list[tuple[dict[str, Tensor], Trajectory, Trajectory]]]:
    job, bank, engine = made(recipe)
    watch = Watch()
    watching = Engine(bank, engine.source, [WeightedLoss("watch", watch, 1.0)])
    for index in range(8):
        watching.evaluate(index)
    assert job.experts is not None
    return job.experts, watch.__dict__["seen"]


def test_the_network_of_a_step_is_an_expert_at_one_of_the_epochs(data: str, folder: Path) -> None:
    experts, seen = watched(table(data, folder, first=2, last=4))
    allowed = [experts.weights(expert, row) for expert in range(COUNT) for row in (1, 2)]
    drawn = [next(number for number, each in enumerate(allowed) if same(each, network)) for network, *_ in seen]
    assert len(set(drawn)) > 2
    again = [network for network, *_ in watched(table(data, folder, first=2, last=4))[1]]
    assert all(same(one, two) for one, (two, *_) in zip(again, seen, strict=True))
    other = [network for network, *_ in watched(table(data, folder, first=2, last=4, renew_every=4))[1]]
    assert same(other[0], other[3])
    assert not same(other[0], other[4])
    fresh = network_tensors(made(table(data, folder, source="fresh"))[2].source.networks.at(0).module)
    assert not any(same(fresh, each) for each in allowed)


def test_the_network_of_a_step_lies_between_two_epochs_of_an_expert(data: str, folder: Path) -> None:
    experts, seen = watched(table(data, folder, first=2, last=4, interpolate=True))
    ends = [[torch.cat([each.flatten() for each in experts.weights(expert, row).values()]) for row in (1, 2)] for expert in range(COUNT)]
    shares = []
    for network, *_ in seen:
        point = torch.cat([each.flatten() for each in network.values()])
        for start, end in ends:
            share = float((point - start) @ (end - start) / (end - start).square().sum())
            if torch.allclose(point, start.lerp(end, share), atol=1e-5):
                shares.append(share)
    assert len(shares) == len(seen)
    assert all(0 <= share <= 1 for share in shares)
    assert len(set(shares)) == len(seen)


def test_a_loss_draws_weights_of_one_expert_at_two_epochs(data: str, folder: Path) -> None:
    experts, seen = watched(table(data, folder))
    for _, spanned, last in seen:
        assert spanned.epoch in (0, 2)
        assert same(spanned.start, experts.weights(spanned.expert, spanned.epoch // EVERY))
        assert same(spanned.end, experts.weights(spanned.expert, spanned.epoch // EVERY + 1))
        assert last.epoch == EPOCHS
        assert same(last.start, last.end)
    assert len({(spanned.expert, spanned.epoch) for _, spanned, _ in seen}) > 2
    assert [spanned[:2] for _, spanned, _ in watched(table(data, folder))[1]] == [spanned[:2] for _, spanned, _ in seen]


def test_a_loss_that_does_not_declare_experts_gets_an_error(data: str, folder: Path) -> None:
    class Undeclared(Watch):
        requires = ddkit.Requires(network=True)

    _, bank, engine = made(table(data, folder))
    with pytest.raises(RunFailed, match=r"uses step.experts, which it does not declare. Add experts=True"):
        Engine(bank, engine.source, [WeightedLoss("undeclared", Undeclared(), 1.0)]).evaluate(0)


def test_automatic_experts_are_trained_once_and_a_plan_trains_none(
    cli: Cli, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    sets = {**SETS, "network.source": "experts", "experts.count": 2, "experts.epochs": 2}
    command = ("distill", "--losses", "dm", "--dataset", data, "--pipc", 6, "--steps", 2, "--evaluate", "none", *set_flags(sets))
    planned = json.loads(cli(*command, "--plan", "--json").out)
    assert (planned["experts"], planned["experts_are_trained_first"]) == ("auto", True)
    assert planned["estimate"]["operations"]["experts"] > 0
    first, second = (cli(*command, "--out", name) for name in ("first", "second"))
    assert "Training 2 experts" in first.err
    assert "Training" not in second.err
    assert (second.code, content(Path("first"))["synthetic.safetensors"]) == (0, content(Path("second"))["synthetic.safetensors"])
    assert json.loads(cli(*command, "--plan", "--json").out)["estimate"]["operations"]["experts"] == 0
    kept = next((tmp_path / "cache" / "private" / "experts").iterdir())
    (kept / "expert-0001.safetensors").write_bytes(b"damaged")
    third = cli(*command, "--out", "third")
    assert "Training 2 experts" in third.err
    assert content(Path("first"))["synthetic.safetensors"] == content(Path("third"))["synthetic.safetensors"]
    assert "experts" in json.loads(Path("third", "manifest.json").read_text())


def test_the_images_are_normalised_as_the_experts_were_trained(data: str, folder: Path, tmp_path: Path) -> None:
    trained(tmp_path / "all", data, sets={"experts.data": "all"})
    recipe = table(data, tmp_path / "all")
    recipe["experts"]["data"] = "all"
    job, _, _ = made(recipe)
    assert job.experts is not None
    assert job.normalisation.mean == job.experts.normalisation.mean
    assert job.normalisation.mean != made(table(data, folder))[0].normalisation.mean


def test_epochs_that_nobody_saved_are_refused() -> None:
    info = ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(8, 8))
    model = ddkit.create("model", "mlp", data=info)
    found = untrained(model, info, ExpertsTable(count=2, epochs=9, save_every=4), ddkit.data.Normalisation([0.5], [0.5]))
    assert list(found.epochs) == [0, 4, 8]
    assert found.rows(1, None, span=0) == [(1, 1), (2, 2)]
    assert found.rows(0, None, span=8) == [(0, 2)]
    with pytest.raises(InputError, match="no saved epoch from 0 to 8 with a saved epoch 3 epochs later"):
        found.rows(0, None, span=3)
