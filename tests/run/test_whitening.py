"""Whitened runs: networks see whitened images, what is stored and shown is plain, and a set carries the transform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddkit
from ddkit.data.real import RealData, open_dataset
from ddkit.data.whitening import whitening_of
from ddkit.files import read_tensors, write_tensors
from ddkit.recipes.tables import DataTable
from tests.conftest import SMALL, Result, content

Cli = Callable[..., Result]
WHITEN = {"data.whiten": True}
JUDGE = {"evaluators.accuracy.epochs": 1, "evaluators.accuracy.model_options": {"width": 4, "depth": 1}}


def distilled(out: Path | str, losses: str = "dm", **given: Any) -> ddkit.Artifact:
    sets = SMALL | {"steps": 2} | WHITEN | given.pop("sets", {})
    ddkit.distill(losses=losses, pipc=4, sets=sets, evaluators="none", out=out, device="cpu", **given)
    return ddkit.load(out)


@pytest.fixture(scope="module")
def whitened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a whitened run; not to be changed."""
    out = tmp_path_factory.mktemp("whitened") / "run"
    distilled(out)
    return out


def test_a_set_alone_is_whitened_by_the_accessible_images_and_its_pictures_are_plain(whitened: Path, tmp_path: Path) -> None:
    real = RealData(open_dataset(DataTable()), 4, 0)
    made = whitening_of(real.images, DataTable(whiten=True))
    start = distilled(tmp_path / "start", sets={"steps": 0})
    nearest = (start.images[:, None] - real.images[None]).abs().amax((2, 3, 4)).amin(1)
    assert float(nearest.max()) < 1e-5, "the first images are real ones, whitened and back"
    (tmp_path / "alone.safetensors").write_bytes((whitened / "synthetic.safetensors").read_bytes())
    found = ddkit.load(tmp_path / "alone.safetensors")
    seen = torch.stack([image for image, _ in found.as_dataset()])  # type: ignore[attr-defined]
    assert torch.equal(seen, made.whiten(found.images))
    state, _ = read_tensors(next((whitened / "checkpoints").glob("*2.safetensors")))
    torch.testing.assert_close(seen, state["bank.images"], atol=1e-4, rtol=0)
    assert found.metadata["whitening"]["sha256"] == made.digest


def test_exported_pictures_look_like_digits_and_what_networks_see_does_not(whitened: Path, cli: Cli) -> None:
    real = RealData(open_dataset(DataTable()), "all", 0)
    means = torch.stack([real.images[real.labels == label].flatten(1).mean(0) for label in range(10)])
    assert cli("export", whitened, "--to", "imagefolder", "--out", "pictures").code == 0
    files = sorted(Path("pictures/train").glob("*/*.png"))
    shown = torch.stack([torch.tensor(np.asarray(Image.open(file))) for file in files]).flatten(1) / 255
    labels = torch.tensor([int(file.parent.name) for file in files])

    def distance(images: torch.Tensor, labels: torch.Tensor) -> float:
        """Returns how far images are from the mean of the real ones of their class, root mean square."""
        return float((images.flatten(1) - means[labels]).square().mean().sqrt())

    usual = distance(real.images, real.labels)
    assert distance(shown, labels) < 1.2 * usual
    assert distance(ddkit.load(whitened).normalised, labels) > 2 * usual


@pytest.mark.parametrize("kind", ["grid", "fourier"])
def test_it_goes_with_parametrizations_and_is_the_same_in_chunks(kind: str, tmp_path: Path) -> None:
    found = [distilled(tmp_path / str(chunk), sets={"parametrization": kind, "engine.chunk": chunk}) for chunk in (0, 3)]
    torch.testing.assert_close(found[0].images, found[1].images, atol=1e-4, rtol=0)
    state, _ = read_tensors(next((tmp_path / "0" / "checkpoints").glob("*2.safetensors")))
    makes = ddkit.create("parametrization", kind)
    torch.testing.assert_close(found[0].normalised, makes.decode(state["bank.images"], (1, 8, 8), {}), atol=1e-4, rtol=0)


def test_it_goes_with_learned_labels(tmp_path: Path) -> None:
    found = distilled(tmp_path / "run", "feature-regression", sets={"labels.kind": "learned"})
    assert found.soft_labels is not None
    assert found.whitening is not None


def test_blends_exports_and_the_report_keep_it(whitened: Path, tmp_path: Path, cli: Cli) -> None:
    both = ddkit.load(ddkit.blend(whitened, whitened, out=tmp_path / "both").path)
    assert torch.equal(both.normalised, ddkit.load(whitened).normalised)
    for name in ("npz", "imagefolder"):
        assert cli("export", whitened, "--to", name, "--out", name).code == 0
        assert "whitened" in Path(name, "README.md").read_text(encoding="utf-8")
    with np.load("npz/synthetic.npz") as file:
        data = dict(file)
    rows = (data["x_train"] - data["whitening.centre"]).reshape(len(data["x_train"]), -1)
    vectors, gains = data["whitening.vectors"], data["whitening.gains"]
    inputs = gains[-1] * rows + (rows @ vectors.T * (gains[:-1] - gains[-1])) @ vectors
    np.testing.assert_allclose(inputs.reshape(data["x_train"].shape), both.normalised, atol=1e-4)
    assert ">whitened<" in (whitened / "report.html").read_text(encoding="utf-8")


def test_an_evaluation_whitens_test_and_random_real_images_and_keeps_these_apart_in_the_cache(
    whitened: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ddkit_evaluators.trainer as trainer

    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))
    tests = []
    original = trainer.Trainer.tested

    def spy(self: trainer.Trainer, kind: str, *given: Any) -> Any:
        tests.append((kind, self.tests[0][:5]))
        return original(self, kind, *given)

    monkeypatch.setattr(trainer.Trainer, "tested", spy)
    plain = distilled(tmp_path / "plain", sets={"data.whiten": False})
    found = ddkit.load(whitened)
    for artifact in (found, plain, found):
        ddkit.evaluate(artifact, dataset="digits", pipc=4, repeats=1, sets=JUDGE | {"evaluators.accuracy.workers": 1})
    kinds = ["synthetic", "random real"]
    assert [kind for kind, _ in tests] == [*kinds, *kinds, "synthetic"], "those of the third are in the cache"
    images = open_dataset(DataTable()).images("test", range(5))
    for number, artifact in ((1, found), (3, plain)):
        assert torch.equal(tests[number][1], artifact.normalisation.normalise(torch.stack(list(images))))


def test_a_teacher_of_other_images_is_refused_and_one_of_whitened_images_gives_its_transform(tmp_path: Path, cli: Cli) -> None:
    for name, sets in (("plain", {}), ("white", WHITEN)):
        ddkit.train(tmp_path / f"{name}.safetensors", sets={"train.epochs": 1, "teacher.width": 8, "teacher.depth": 1} | sets, device="cpu")
    found = distilled(tmp_path / "run", "dm,dkkt", teacher=str(tmp_path / "white.safetensors"))
    assert found.whitening is not None
    assert found.whitening.digest == ddkit.load(tmp_path / "run").metadata["whitening"]["sha256"]
    tensors, _ = read_tensors(tmp_path / "white.safetensors")
    assert torch.equal(tensors["whitening.vectors"], found.whitening.vectors)
    for name, flags, words in (("plain", ["--set", "data.whiten=true"], "plain images"), ("white", [], "data.whiten=true")):
        refused = cli("distill", "--losses", "dm,dkkt", *flags, "--teacher", tmp_path / f"{name}.safetensors", "--out", "no")
        assert (refused.code, refused.out, Path("no").exists()) == (4, "", False)
        assert words in " ".join(refused.err.split())
    soft = {**JUDGE, "evaluators.accuracy.labels": "teacher"}  # a teacher of an evaluation may be of either kind
    rows = ddkit.evaluate(tmp_path / "run", teacher=str(tmp_path / "plain.safetensors"), repeats=1, sets=soft)
    assert rows[0].labels == "teacher"


def test_experts_are_trained_on_whitened_images_and_their_folder_carries_the_transform(tmp_path: Path, cli: Cli) -> None:
    common = {"network.width": 4, "network.depth": 1}
    sets = common | {"train.batch": 8}
    trained = ddkit.train_experts(tmp_path / "experts", experts=1, epochs=1, pipc=4, sets=sets | WHITEN, device="cpu")
    before = content(tmp_path / "experts")
    again = ddkit.train_experts(tmp_path / "experts", experts=1, epochs=1, pipc=4, sets=sets | WHITEN, device="cpu")
    assert content(tmp_path / "experts") == before
    assert again.normalisation.same(trained.normalisation)
    given = {"network.source": "experts", "experts": str(tmp_path / "experts")}
    found = distilled(tmp_path / "run", sets=common | given)
    assert found.normalisation.same(trained.normalisation)
    with pytest.raises(ddkit.InputError, match=r"trained on whitened images.*data\.whiten=true"):
        distilled(tmp_path / "no", sets=common | given | {"data.whiten": False})
    (tmp_path / "experts" / "whitening.safetensors").unlink()
    with pytest.raises(ddkit.InputError, match=r"whitening\.safetensors"):
        distilled(tmp_path / "no", sets=common | given)


def of_others(folder: Path) -> None:
    """Writes digits as other projects publish them: whitened as kernel inducing points, as trajectory matching, plain, a grid, noise."""
    data = open_dataset(DataTable())
    labels = data.labels("train")
    images = torch.stack(list(data.images("train", range(len(labels)))))
    rows = torch.cat([(labels == label).nonzero().flatten()[:10] for label in range(10)])
    ways = {"kip": {}, "mtt": {"whiten_absolute": True}}
    found = {name: whitening_of(images, DataTable(whiten=True, whiten_eps=0.1, **way)).whiten(images[rows]) for name, way in ways.items()}
    plain = (images[rows] - 0.3) / 0.375
    parts = torch.nn.functional.interpolate(plain, (4, 4), mode="area")
    found |= {
        "plain": plain,
        "grid": torch.stack([ddkit.data.grid(each, 2) for each in parts.split(4)]),
        "uniform": plain.new_zeros(100, 1, 8, 8),
    }
    draw = torch.Generator().manual_seed(0)
    found["normal"] = torch.randn(100, 1, 8, 8, generator=draw)
    found["uniform"].uniform_(-1.7, 1.7, generator=draw)
    for name, tensor in found.items():
        torch.save({"images": tensor, "labels": torch.arange(len(tensor)) * 10 // len(tensor)}, folder / f"{name}.pt")


def test_a_whitened_set_of_others_is_imported_by_its_data_and_one_that_nobody_declared_is_warned_of(
    cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    of_others(Path())
    for name, flags in (("kip", []), ("mtt", ["--set", "data.whiten_absolute=true"])):
        made = cli("import", f"{name}.pt", "--whitened", "--dataset", "digits", *flags, "--out", name)
        assert (made.code, "look whitened" in caplog.text) == (0, False), made.err
        theirs, plain = (torch.load(f"{each}.pt", weights_only=True)["images"] for each in (name, "plain"))
        torch.testing.assert_close(ddkit.load(name).normalised, theirs, atol=1e-4, rtol=0)
        torch.testing.assert_close(ddkit.load(name).images, plain * 0.375 + 0.3, atol=1e-4, rtol=0)
    assert cli("export", "kip", "--to", "npz", "--out", "exported").code == 0
    assert cli("import", "exported/synthetic.npz", "--out", "again").code == 0
    assert torch.equal(ddkit.load("again").normalised, ddkit.load("kip").normalised)
    assert cli("import", "kip.pt", "--whitened", "--dataset", "digits", "--grid", 2, "--out", "of-grid").code == 0
    makes = ddkit.create("parametrization", "grid")
    theirs = torch.load("kip.pt", weights_only=True)["images"]
    torch.testing.assert_close(ddkit.load("of-grid").normalised, makes.decode(theirs, (1, 8, 8), {}), atol=1e-4, rtol=0)
    usual: dict[str, Any] = {"pixels": "normalised", "mean": [0.3], "std": [0.375]}
    for name in ("kip", "mtt", "plain", "grid", "uniform", "normal"):
        caplog.clear()
        ddkit.import_file(f"{name}.pt", f"undeclared-{name}", **usual)
        assert ("look whitened" in caplog.text) == (name in ("kip", "mtt")), name
    caplog.clear()
    ddkit.import_file("kip.pt", "no-word", whitened=False, **usual)
    assert "whitened" not in caplog.text


def test_flags_of_whitening_that_cannot_be_are_refused(cli: Cli) -> None:
    of_others(Path())
    data = ["--whitened", "--dataset", "digits"]
    for flags, code in (
        (["--whitened"], 4), (["--dataset", "digits"], 2), ([*data, "--pixels", "unit"], 2), ([*data, "--mean", "0.3", "--std", "0.3"], 2),
        ([*data, "--set", "data.batch=3"], 2), ([*data, "--set", "data.whiten_eps=0"], 4), (["--whitened", "--dataset", "nosuch"], 3),
        (["--whitened", "--dataset", "imagefolder:nowhere"], 4),
    ):  # fmt: skip
        refused = cli("import", "kip.pt", *flags, "--out", "no")
        assert (refused.code, refused.out, Path("no").exists()) == (code, "", False), (flags, refused.err)
    torch.save({"images": torch.randn(4, 3, 8, 8), "labels": torch.arange(4)}, "colour.pt")
    assert "(1, 8, 8)" in cli("import", "colour.pt", *data, "--out", "no").err


def test_a_teacher_of_others_that_saw_whitened_images_is_imported_by_their_data(cli: Cli) -> None:
    info = ddkit.DataInfo(class_names=tuple("0123456789"), channels=1, size=(8, 8))
    model = ddkit.create("model", "convnet", {"width": 4, "depth": 1}, data=info)
    torch.save(ddkit.nn.build_network(model, info, 0, "theirs").state_dict(), "theirs.pt")
    flags = ["--whitened", "--dataset", "digits", "--classes", 10, "--set", "teacher.width=4", "--set", "teacher.depth=1"]
    assert cli("import", "theirs.pt", *flags, "--size", 16, "--out", "no").code == 2
    assert cli("import", "theirs.pt", *flags, "--size", 8, "--out", "theirs.safetensors").code == 0
    data = open_dataset(DataTable())
    images = torch.stack(list(data.images("train", range(len(data.labels("train"))))))
    wanted = whitening_of(images, DataTable(whiten=True, whiten_eps=0.1))
    assert torch.equal(read_tensors(Path("theirs.safetensors"))[0]["whitening.vectors"], wanted.vectors)


def test_a_plan_tells_of_it_and_bad_values_and_files_are_errors(whitened: Path, tmp_path: Path, cli: Cli) -> None:
    made = ddkit.api.plan(losses="dm", pipc=4, sets=SMALL | WHITEN, evaluators="none", device="cpu")  # type: ignore[attr-defined]
    assert made["whitening"]["sha256"] == ddkit.load(whitened).metadata["whitening"]["sha256"]
    for flags in (["data.whiten=yes"], ["data.whiten=true", "data.whiten_eps=0"], ["data.whiten_eps=0.1"], ["data.whiten_absolute=true"]):
        refused = cli("distill", "--losses", "dm", *(part for each in flags for part in ("--set", each)), "--out", "no")
        assert (refused.code, refused.out, Path("no").exists()) == (4, "", False)
        assert "data.whiten" in refused.err
    assert cli("evaluate", whitened, "--set", "data.whiten=false").code == 2
    tensors, record = read_tensors(whitened / "synthetic.safetensors")
    write_tensors(tmp_path / "bad.safetensors", tensors | {"whitening.gains": -tensors["whitening.gains"]}, record)
    with pytest.raises(ddkit.RunFilesError, match="whitening"):
        ddkit.load(tmp_path / "bad.safetensors")
