"""Scale-invariant parameter groups: found where they exist, only there, and left out of stationarity."""

from __future__ import annotations

import logging

import pytest
import torch
from ddkit_dkkt.invariance import THRESHOLD, module_groups, scale_invariant_groups
from ddkit_dkkt.stationarity import included_parameters
from torch import Tensor, nn

import ddkit
from ddkit.testing.world import Setting, World

SETTING = Setting(channels=2, size=(8, 8), rows=(1, 1, 1))
SHAPE = SETTING.info.shape
INVARIANT = {"features.0", "features.1", "features.4"}  # the convolutions, and the norm that feeds another; not the last norm


class HandNormalised(nn.Module):
    """A network whose layer types tell nothing: a matrix used as a convolution, its output standardised by hand."""

    def __init__(self, *, standardised: bool) -> None:
        super().__init__()
        self.standardised = standardised
        self.mixing = nn.Parameter(torch.randn(6, 2 * 9, generator=torch.Generator().manual_seed(3)))
        self.head = nn.Bilinear(6 * 16, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 3, padding=1)
        found = torch.einsum("oi,nip->nop", self.mixing, patches)
        if self.standardised:
            found = (found - found.mean(2, keepdim=True)) / (found.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        pooled = nn.functional.avg_pool2d(found.relu().unflatten(2, (8, 8)), 2).flatten(1)
        result: Tensor = self.head(pooled, pooled.new_ones(len(pooled), 1))
        return result


def teacher(norm: str | nn.Module, *, seed: int = 0, depth: int = 2, fresh: bool = False) -> ddkit.nn.Teacher:
    """Returns a module, or a ConvNet whose gamma, beta and running statistics are (unless `fresh`) not those of a new network."""
    if isinstance(norm, nn.Module):
        return ddkit.nn.Teacher(norm, mean=(0.5, 0.5), std=(0.25, 0.25))
    model = ddkit.create("model", "convnet", {"width": 6, "norm": norm, "depth": depth}, data=SETTING.info)
    network = ddkit.nn.build_network(model, SETTING.info, seed, "teacher")
    draw = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm | nn.BatchNorm2d) and not fresh:
            for values in (values for values in layer.state_dict().values() if values.is_floating_point()):
                values.uniform_(0.3, 1.3, generator=draw)
    return teacher(network)


def groups(made: ddkit.nn.Teacher) -> dict[str, float]:
    return scale_invariant_groups(made.exact_logits, made.parameters, SHAPE)


@pytest.mark.parametrize("seed", range(4))
def test_instance_norm_makes_every_group_invariant_but_the_last_norm_and_the_classifier(seed: int) -> None:
    assert set(groups(teacher("instance", seed=seed))) == INVARIANT
    deeper = groups(teacher("instance", seed=seed, depth=3))
    assert set(deeper) == INVARIANT | {"features.5", "features.8"}
    assert max(deeper.values()) > THRESHOLD, "the normalisation's epsilon, which hides a group unless it is scaled up"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_batch_norm_in_evaluation_mode_and_no_norm_have_no_invariant_group(norm: str, seed: int) -> None:
    assert groups(teacher(norm, seed=seed)) == groups(teacher(norm, seed=seed, fresh=True)) == {}


@pytest.mark.parametrize(("standardised", "expected"), [(True, {""}), (False, set())])
def test_a_users_own_standardisation_is_found_by_what_it_does_not_by_its_type(standardised: bool, expected: set[str]) -> None:
    assert set(groups(teacher(HandNormalised(standardised=standardised)))) == expected


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_found_are_the_groups_whose_scaling_changes_no_output_and_others_lie_far_above_the_threshold(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x = teacher(norm), torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = {name: value.double() for name, value in made.parameters.items()}
    unmoved = set()
    for group, names in module_groups(list(own)).items():
        change = (made.exact_logits(x, own) - made.exact_logits(x, own | {name: 3 * own[name] for name in names})).abs().max()
        unmoved |= {group} if float(change) < 1e-3 else set()
    found = groups(made)
    assert set(found) == unmoved
    for limit in ("CANDIDATE", "THRESHOLD"):
        monkeypatch.setattr(f"ddkit_dkkt.invariance.{limit}", 2.0)
    assert min(value for name, value in groups(made).items() if name not in found) > 100 * THRESHOLD


def test_detection_leaves_the_teacher_and_the_global_generator_untouched() -> None:
    made = teacher("instance")
    before, state = {key: value.clone() for key, value in made.module.state_dict().items()}, torch.get_rng_state()
    groups(made)
    assert all(torch.equal(value, before[key]) for key, value in made.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in made.module.parameters())


@pytest.mark.parametrize(
    ("norm", "which", "skip", "kept"),
    [
        ("instance", "all", True, ("features.5.", "classifier.")),
        ("instance", "classifier", True, ("classifier.",)),
        ("instance", "all", False, ("",)),
        ("batch", "all", True, ("",)),
        ("none", "all", True, ("",)),
    ],
)
def test_selected_parameters_are_included_but_for_invariant_groups_which_a_warning_names(
    norm: str, which: str, skip: bool, kept: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    made = teacher(norm)
    sizes = {name: value.numel() for name, value in made.parameters.items()}
    with caplog.at_level(logging.WARNING, "ddkit"):
        assert included_parameters(made, SHAPE, which, skip=skip, who="it") == [name for name in sizes if name.startswith(kept)]
    if "features.5." not in kept:
        assert not caplog.records, "nothing that was selected is left out"
        return
    (text,) = caplog.messages
    assert {layer for layer in module_groups(list(sizes)) if layer in text} == INVARIANT
    assert f"{100 * sum(sizes[name] for name in sizes if name.startswith(kept)) / sum(sizes.values()):.1f} %" in text


@pytest.mark.parametrize(
    ("made", "which", "words"),
    [
        (teacher("instance"), "features.0.*", r"every selected parameter .* scale-invariant"),
        (teacher(nn.Sequential(HandNormalised(standardised=True))), "0.mixing", r"every selected parameter .* scale-invariant"),
        (teacher("none"), "layer*", r"selects. It has features.0.weight, .*classifier.bias"),
    ],
    ids=["convnet", "the user's own", "a pattern that selects nothing"],
)
def test_a_selection_of_which_nothing_is_left_is_refused(made: ddkit.nn.Teacher, which: str, words: str) -> None:
    with pytest.raises(ddkit.InputError, match=words):
        included_parameters(made, SHAPE, which, skip=True, who="it")


@pytest.mark.parametrize(
    ("options", "kept", "warnings"),
    [({}, ("features.5.", "classifier."), 1), ({"parameters": "classifier"}, ("classifier.",), 0), ({"scale_invariant": "keep"}, ("",), 0)],
    ids=str,
)
def test_the_loss_measures_the_included_parameters_and_says_so_once(
    options: dict[str, str], kept: tuple[str, ...], warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = teacher("instance")
    monkeypatch.setattr("ddkit.testing.world.untrained_teacher", lambda *_: made)
    with caplog.at_level(logging.WARNING, "ddkit"):
        engine = World(ddkit.create("loss", "dkkt-stationarity", options), SETTING).engine()
        logged = [engine.evaluate(index).logged["checked"] for index in range(3)][-1]
    measured = {name.split()[-1] for name in logged if name.startswith("distance")}
    assert measured == {name for name in made.parameters if name.startswith(kept)}
    assert len(caplog.records) == warnings
    if kept == ("",):  # why invariant groups are left out otherwise
        distances = {name: float(value) for name, value in logged.items()}
        assert distances["distance default features.0.weight"] == pytest.approx(1, abs=2e-4)
        assert distances["distance default features.4.weight"] == pytest.approx(1, abs=2e-4)
        assert abs(distances["distance default classifier.weight"] - 1) > 2e-3
