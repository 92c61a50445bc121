"""Protocols as files: their values, overrides and what a row says of them, mixing, own files, and repeating a figure."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from ddkit_evaluators import KEYS, Accuracy
from jsonschema import Draft202012Validator
from torch import nn
from torchvision.transforms import v2

import ddkit
from ddkit.components import registry
from ddkit.components.options import describe_options
from ddkit.nn.training import fit
from ddkit.recipes.protocols import Schedule
from ddkit.recipes.resolve import parse_toml
from tests.conftest import SMALL_FLAGS, Result, set_flags
from tests.contract.test_docs import blocks
from tests.plugins.test_cached import cached
from tests.plugins.test_evaluators import ROOT, artifact, evaluated, images, taught

CLI = Callable[..., Result]
FILES = {p.name: Path(p.value) for p in registry.plugins() if p.kind == "protocol" and p.first_party}
ROWS = Path(__file__).with_name("protocol_rows.json")  # what version 0.2.0 gave, when the protocols were in its code
WIDE = ddkit.Artifact(images(4, 7)[0].float() / 255, *artifact().as_dataset().tensors[1:], artifact().metadata)


@pytest.mark.parametrize(
    "asked", [{"protocol": "short", "repeats": None}, {"protocol": "dc-official"}, {"protocol": "dm-official", "repeats": 1}]
)
def test_protocols_that_were_code_give_the_same_rows(asked: dict[str, Any]) -> None:
    rows = evaluated(WIDE, **{"epochs": None} | asked)
    for row in rows:
        assert row.details.pop("confusion")  # which version 0.2.0 did not count
        assert (row.details.pop("variant"), row.details.pop("model_options")) == ("width 8", {"width": 8})  # nor name
    assert msgspec.to_builtins(rows) == json.loads(ROWS.read_text())[asked["protocol"]]


def test_protocols_that_were_code_have_the_values_that_they_had() -> None:
    found = {name: ddkit.nn.read_protocol(name) for name in ("dm-official", "dc-official", "short", "practical-sam")}
    of_schedule = {name: {key: getattr(each, key) for key in Schedule.__struct_fields__} for name, each in found.items()}
    same = msgspec.structs.asdict(Schedule(epochs=1000, batch=256, optimizer="sgd", lr=0.01, weight_decay=5e-4, schedule="step"))
    assert of_schedule == {
        "dm-official": same, "dc-official": same | {"epochs": 300}, "short": same | {"epochs": 300},
        "practical-sam": same | {"epochs": 5000, "lr": 0.1, "rho": 0.001},
    }  # fmt: skip
    assert [(each.augmenter, each.repeats, each.labels) for each in found.values()] == [
        ("dsa", 20, "auto"), ("none", 20, "auto"), ("dsa", 3, "auto"), ("dsa", 5, "auto"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_value_of_a_protocol_has_an_origin_and_the_schema_takes_it(name: str, cli: CLI) -> None:
    told = json.loads(cli("info", "protocol", name, "--json").out)
    assert [row["path"] for row in told["settings"] if row["origin"] not in ("paper", "ours")] == []
    schema = json.loads(cli("schema", "protocol", "--json").out)
    raw = parse_toml(FILES[name])
    assert list(Draft202012Validator(schema).iter_errors(raw)) == []
    assert [len(list(Draft202012Validator(schema).iter_errors(raw | each))) for each in ({"bacth": 3}, {"mix": "cutout"})] == [1, 1]


OTHERS: dict[str, Any] = {
    "epochs": 4, "batch": 3, "optimizer": "adamw", "lr": 0.02, "momentum": 0.5, "weight_decay": 0.1, "schedule": "cosine",
    "milestones": [0.25], "gamma": 0.5, "rho": 0.1, "ema": 0.5, "mix": "mixup", "mix_alpha": 0.5, "mix_share": 0.5, "augmenter": "none",
    "augmenter_options": {"operations": ["crop"]}, "temperature": 2.0,
}  # fmt: skip


def test_every_key_is_an_option_and_every_change_but_those_with_a_column_stands_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddkit.nn, "fit", lambda *given, **named: None)
    options = {option["name"]: option for option in describe_options(Accuracy)}
    assert {key for key in KEYS if options[key]["default"] is not None} == set()
    assert set(KEYS) - set(OTHERS) == {"model", "labels", "repeats"}
    for key, value in OTHERS.items():
        teacher, more = (taught(), {"labels": "soft"}) if key == "temperature" else (None, {})
        given = {"epochs": None, "repeats": 1, "random_real": False} | more | {key: value}
        (row,) = evaluated(None, None, teacher, **given)
        key = {"augmenter": "augment"}.get(key, key)
        assert row.details["variant"].startswith({"epochs": "4 epochs"}.get(key, key.replace("_", " "))), key
        assert list(row.details[key]) == value if isinstance(value, list) else row.details[key] == value
    (row,) = evaluated(epochs=None, repeats=1, random_real=False, lr=0.01, augment="dsa")
    assert row.details["variant"] == "width 8", "they are the protocol's"


def test_random_real_from_the_cache_is_that_of_every_value() -> None:
    given = {"model": "mlp", "cache": True, "epochs": 2, "batch": 2, "optimizer": "sgd", "schedule": "multi-step", "mix": "cutmix"}
    first = evaluated(**given)
    assert cached(evaluated(**given)) == [2], "the control"
    for key in set(OTHERS) - {"temperature"}:
        assert cached(evaluated(**given | {key: OTHERS[key]})) == [0], key
    assert evaluated(**given)[0].details["random_real_accuracies"] == first[0].details["random_real_accuracies"]


# Training


def rates(**schedule: Any) -> list[float]:
    """Returns the learning rate of every step, two an epoch."""
    found: list[float] = []
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    made = Schedule(batch=5, lr=0.1, **schedule)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[made.optimizer]
    with pytest.MonkeyPatch.context() as patch:
        step = kind.step
        patch.setattr(kind, "step", lambda self, *given: (found.append(self.param_groups[0]["lr"]), step(self, *given))[1])
        x, y = images(10, 0)
        fit(module, x.float() / 255, y, made, augmenter=None, generator=torch.Generator())
    return found


def test_multi_step_and_cosine_have_the_rates_of_their_formulas() -> None:
    found = rates(epochs=6, schedule="multi-step", milestones=(0.6667, 0.8333), gamma=0.5)
    assert found == pytest.approx([0.1] * 8 + [0.05] * 2 + [0.025] * 2)
    expected = 0.05 * (1 + torch.cos(torch.pi * torch.arange(8, dtype=torch.float64) / 8))
    assert rates(epochs=4, schedule="cosine", optimizer="adamw") == pytest.approx(expected.tolist())
    assert rates(epochs=4, schedule="step", gamma=0.3) == pytest.approx([0.1] * 4 + [0.03] * 4)


def seen(mix: str, seed: int = 0, share: float = 1.0, batch: int = 6, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the images of every batch and the gradient of the loss by its logits, which are 0: softmax less the labels that it had."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.weight.expand(len(x), 2) * 1.0
            if self.training:
                logits.register_hook(lambda gradient: found.append((x.clone(), 0.5 - gradient * len(x))))
            return logits

    schedule = Schedule(epochs=4, batch=batch, lr=1e-12, mix=mix, mix_share=share)  # type: ignore[arg-type]
    x, y = images(12, 0)
    fit(Zero(), x.float() / 255, y, schedule, augmenter=None, generator=torch.Generator().manual_seed(seed), **options)
    return found


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_mixing_is_torchvisions_with_draws_of_the_evaluations_generator(mix: str) -> None:
    before = torch.get_rng_state()
    found, again, other = seen(mix), seen(mix), seen(mix, seed=1)
    assert torch.equal(before, torch.get_rng_state()), "nothing is seeded globally"
    for (x, y), (same_x, same_y) in zip(found, again, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
    assert any(not torch.equal(x, each) for (x, _), (each, _) in zip(found, other, strict=True))
    generator = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    x, y = images(12, 0)
    order = torch.randperm(12, generator=generator)[:6]
    seed = int(torch.randint(2**62, (), generator=own))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = {"cutmix": v2.CutMix, "mixup": v2.MixUp}[mix](num_classes=2)(x[order].float() / 255, y[order])
    assert torch.equal(found[0][0], expected[0])
    torch.testing.assert_close(found[0][1], expected[1], atol=1e-6, rtol=0)


def test_a_share_of_the_batches_is_mixed_and_the_teacher_sees_them_mixed() -> None:
    whole = [bool(((y == 0) | (y == 1)).all()) for _, y in seen("mixup", share=0.5, batch=1)]
    assert seen("none")[0][1].unique().tolist() == [0.0, 1.0], "the control"
    assert len(whole) == 48
    plain, some = seen("none", batch=6), seen("mixup", share=0.5)
    assert 0 < sum(bool(((y - y.round()).abs() < 1e-6).all()) for _, y in some) < len(plain)
    asked: list[torch.Tensor] = []

    def targets(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        asked.append(x.clone())
        return torch.full((len(x), 2), 0.5)

    for x, (mixed, learned) in zip(asked, seen("cutmix", targets=targets), strict=False):
        assert torch.equal(x, mixed)
        assert (learned == 0.5).all()


# Own files


def test_the_own_protocol_of_the_docs_works_and_its_figures_can_be_had_without_the_file(cli: CLI) -> None:
    page = ROOT / "docs" / "reference" / "components" / "protocol.md"
    (file,) = [block for block in blocks(page) if block.file]
    text = file.text.replace("epochs = 100", "epochs = 3")
    Path("mine.toml").write_text(text)
    for line in next(block for block in blocks(page) if block.language == "bash" and "mine.toml" in block.text).text.splitlines():
        small = {"evaluators.accuracy.repeats": 1, "evaluators.accuracy.model_options.width": 8, "evaluators.accuracy.cache": False}
        few = [*SMALL_FLAGS, "--evaluate", "none"] if "distill" in line else set_flags(small)
        result = cli(*shlex.split(line)[1:], *few)
        assert result.code == 0, result.err
    assert "mine, lr 0.002" in result.out
    rows = json.loads(Path("my-run/evaluation.json").read_text())["evaluations"]
    assert [(row["protocol"], row["details"].get("variant")) for row in rows] == [("mine", "width 8"), ("mine", "lr 0.002, width 8")]
    recipe = tomllib.loads(Path("my-run/recipe.toml").read_text())
    assert [recipe["protocols"]["mine"][key] for key in ("optimizer", "mix", "mix_share")] == ["adamw", "cutmix", 0.5]
    Path("mine.toml").unlink()
    assert cli("evaluate", "my-run", "--protocol", "mine", *few).code == 0
    assert json.loads(Path("my-run/evaluation.json").read_text())["evaluations"] == rows[::-1]
    Path("mine.toml").write_text(text.replace("lr = 0.001", "lr = 0.002"))
    changed = cli("evaluate", "my-run", "--protocol", "./mine.toml", *few)
    assert "mine, lr 0.002" in changed.out
    assert json.loads(Path("my-run/evaluation.json").read_text())["evaluations"] == rows
    assert cli("distill", "--resume", "--out", "my-run", "--steps", 51).code == 0, "a run goes on from its checkpoint still"


def test_a_file_with_the_name_of_an_installed_protocol_says_what_it_changes(cli: CLI) -> None:
    text = FILES["short"].read_text().replace("lr = 0.01\n", "lr = 0.5\n")
    Path("short.toml").write_text(text)
    result = cli("distill", "--losses", "dm", "--pipc", 2, *SMALL_FLAGS, "--protocol", "./short.toml", "--out", "run")
    assert result.code == 0, result.err
    (row,) = json.loads(Path("run/evaluation.json").read_text())["evaluations"]
    assert (row["protocol"], row["details"]["variant"]) == ("short", "2 epochs, lr 0.5, width 8")
    assert json.loads(cli("evaluate", "run", "--json").out)["evaluations"] == [row], "without the file"
    inline = cli("distill", "--losses", "dm", "--pipc", 2, "--set", "protocols.short={epochs=300, lr=0.5}", "--plan", "--json")
    assert json.loads(inline.out)["recipe"]["protocols"]["short"]["usual"] == {"lr": 0.01, "repeats": 3}


def test_soft_labels_and_several_processes_and_ranking_take_a_protocol(forked_children: Any) -> None:
    plain = {"epochs": 3, "random_real": False}
    (row,) = evaluated(WIDE, None, taught(), **plain, protocol="rded")
    assert (row.labels, row.details["temperature"], row.details["variant"]) == ("teacher", 20.0, "3 epochs, width 8")
    one, two = (evaluated(WIDE, **plain, protocol="idc", augmenter="none", workers=workers)[0].details["accuracies"] for workers in (1, 2))
    assert one == two
    made = ddkit.create("evaluator", "ranking", {"protocol": "idc", "full": 1.0})
    assert made._accuracy(None, "none").training.mix == "cutmix"
