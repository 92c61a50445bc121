"""Scale-invariant parameter groups: found where they exist, only there, and left out of stationarity."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from ddkit_dkkt.invariance import THRESHOLD, scale_invariant_groups
from ddkit_dkkt.stationarity import Stationarity
from ddkit_models import ConvNet
from torch import Tensor, nn

import ddkit
from ddkit.engine.bank import Bank
from ddkit.engine.draws import StepSource
from ddkit.engine.loop import Engine
from ddkit.engine.losses import WeightedLoss

INFO = ddkit.DataInfo(class_names=("a", "b", "c"), channels=2, size=(8, 8))
CONVOLUTIONS = {"features.0", "features.4"}


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


def convnet(norm: str, *, seed: int = 0, depth: int = 2) -> nn.Module:
    """Returns a ConvNet whose gamma, beta and running statistics are not those of a fresh network."""
    options = ConvNet.Options(width=6, norm=norm, depth=depth)  # type: ignore[arg-type]
    network = ddkit.build_network(ConvNet(options), INFO, seed, "teacher")
    draw = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm | nn.BatchNorm2d):
            with torch.no_grad():
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=draw) + 0.5)
                layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=draw))
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(0.5 * torch.randn(layer.weight.shape, generator=draw))
            layer.running_var.copy_(torch.rand(layer.weight.shape, generator=draw) + 0.2)
    return network


def teacher(module: nn.Module) -> ddkit.Teacher:
    return ddkit.Teacher(module, mean=(0.5, 0.5), std=(0.25, 0.25))


def groups(module: nn.Module, **options: int) -> dict[str, float]:
    made = teacher(module)
    return scale_invariant_groups(made.exact_logits, made.parameters, INFO.shape, **options)


@pytest.mark.parametrize("seed", range(4))
def test_instance_norm_makes_convolutions_invariant_and_the_norms_that_feed_another_but_not_the_classifier(seed: int) -> None:
    assert set(groups(convnet("instance", seed=seed))) == CONVOLUTIONS | {"features.1"}


def test_the_norm_of_every_block_but_the_last_is_invariant_in_a_deeper_network() -> None:
    assert set(groups(convnet("instance", depth=3))) == {"features.0", "features.1", "features.4", "features.5", "features.8"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_evaluation_mode_batch_norm_and_no_norm_have_no_invariant_group(norm: str, seed: int) -> None:
    assert groups(convnet(norm, seed=seed)) == {}


def test_batch_norm_with_the_statistics_of_a_fresh_network_has_none_either() -> None:
    options = ConvNet.Options(width=6, norm="batch", depth=2)
    assert groups(ddkit.build_network(ConvNet(options), INFO, 0, "fresh")) == {}


def test_a_users_own_standardisation_is_found_by_what_it_does_not_by_its_type() -> None:
    assert set(groups(HandNormalised(standardised=True))) == {""}
    assert set(groups(HandNormalised(standardised=False))) == set()


@pytest.mark.parametrize(("norm", "invariant"), [("instance", True), ("batch", False), ("none", False)])
def test_what_is_found_agrees_with_scaling_the_weights_of_the_group(norm: str, invariant: bool) -> None:
    made, x = teacher(convnet(norm).double()), torch.randn(5, *INFO.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = made.parameters
    scaled = own | {name: 3 * own[name] for name in ("features.0.weight", "features.0.bias")}
    change = (made.exact_logits(x, own) - made.exact_logits(x, scaled)).abs().max()
    assert (float(change) < 1e-3) == invariant
    assert ("features.0" in groups(made.module)) == invariant


@pytest.mark.parametrize("seed", range(4))
def test_the_epsilon_of_the_normalisation_hides_no_group(seed: int) -> None:
    """Without scaling the group up, its |cosine| may lie above the threshold: what a plain test would miss."""
    found = groups(convnet("instance", seed=seed, depth=3))
    assert max(found.values()) > THRESHOLD


def test_groups_that_are_not_invariant_lie_far_above_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in ("instance", "batch", "none"):
        found = groups(convnet(norm))
        with monkeypatch.context() as patch:
            patch.setattr("ddkit_dkkt.invariance.CANDIDATE", 2.0)
            patch.setattr("ddkit_dkkt.invariance.THRESHOLD", 2.0)
            everything = groups(convnet(norm))
        assert min(value for name, value in everything.items() if name not in found) > 100 * THRESHOLD


def test_detection_leaves_the_teacher_and_the_global_generator_untouched() -> None:
    network = convnet("instance")
    before, state = {key: value.clone() for key, value in network.state_dict().items()}, torch.get_rng_state()
    groups(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


def stationarity_engine(module: nn.Module, loss: Stationarity) -> Engine:
    labels = torch.arange(3)
    images = torch.randn(3, *INFO.shape, generator=torch.Generator().manual_seed(0))
    bank = Bank(images, labels, loss.requires.parameters, {})
    source = StepSource(
        seed=0, info=INFO, normalisation=ddkit.Normalisation((0.5, 0.5), (0.25, 0.25)), real_images=torch.zeros(0, *INFO.shape),
        real_labels=torch.zeros(0, dtype=torch.int64), batch=1, augmenter=ddkit.create("augmenter", "none", {}, where="augmenter"),
        views={}, model=None, renew_every=1, teacher=teacher(module), device=torch.device("cpu"),
        arithmetic=ddkit.Arithmetic(compile=False, precision="float32"),
    )  # fmt: skip
    return Engine(bank, source, [WeightedLoss("dkkt-stationarity", loss, 1.0)])


def included(engine: Engine) -> set[str]:
    """Returns the parameters over which the first step measured a distance."""
    logged = engine.evaluate(0).logged
    return {name.split()[-1] for name in logged["dkkt-stationarity"] if name.startswith("distance")}


def loss_of(**options: object) -> Stationarity:
    return Stationarity(Stationarity.Options(**options))  # type: ignore[arg-type]


def test_stationarity_leaves_invariant_groups_out_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = stationarity_engine(convnet("instance"), loss_of())
    with caplog.at_level(logging.WARNING, "ddkit"):
        assert included(engine) == {"features.5.weight", "features.5.bias", "classifier.weight", "classifier.bias"}
        engine.evaluate(1)
        engine.evaluate(2)
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert all(layer in text for layer in ("features.0", "features.1", "features.4"))
    assert "features.5" not in text
    kept = sum(p.numel() for name, p in convnet("instance").named_parameters() if name.startswith(("features.5", "classifier")))
    total = sum(p.numel() for p in convnet("instance").parameters())
    assert f"{100 * kept / total:.1f} %" in text


@pytest.mark.parametrize(
    ("norm", "options"),
    [("instance", {"scale_invariant": "keep"}), ("batch", {}), ("none", {})],
    ids=["kept by option", "batch norm", "no norm"],
)
def test_stationarity_includes_every_parameter_in_silence(norm: str, options: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    network = convnet(norm)
    with caplog.at_level(logging.WARNING, "ddkit"):
        assert included(stationarity_engine(network, loss_of(**options))) == {name for name, _ in network.named_parameters()}
    assert not caplog.records


def test_leaving_out_warns_of_nothing_where_no_selected_parameter_is_invariant(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ddkit"):
        assert included(stationarity_engine(convnet("instance"), loss_of(parameters="classifier"))) == {
            "classifier.weight",
            "classifier.bias",
        }
    assert not caplog.records


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (lambda: convnet("instance"), {"parameters": "features.0.*"}),
        (lambda: nn.Sequential(HandNormalised(standardised=True), nn.LayerNorm(3, elementwise_affine=False)), {"parameters": "0.mixing"}),
    ],
    ids=["convnet", "the user's own"],
)
def test_a_teacher_whose_selected_parameters_are_all_invariant_is_refused(module: Callable[[], nn.Module], options: dict[str, str]) -> None:
    with pytest.raises(ddkit.InputError, match=r"every selected parameter .* scale-invariant"):
        stationarity_engine(module(), loss_of(**options)).evaluate(0)


def test_a_pattern_that_selects_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ddkit.InputError, match=r"selects; it has features.0.weight, .*classifier.bias"):
        stationarity_engine(convnet("none"), loss_of(parameters="layer*")).evaluate(0)


def test_kept_invariant_groups_hold_a_cosine_distance_of_one_and_that_is_why_they_are_left_out() -> None:
    engine = stationarity_engine(convnet("instance"), loss_of(scale_invariant="keep", distance="layer-cosine"))
    logged = engine.evaluate(0).logged
    distances = {name.split()[-1]: float(value) for name, value in logged["dkkt-stationarity"].items() if name.startswith("distance")}
    assert distances["features.0.weight"] == pytest.approx(1, abs=2e-4)
    assert distances["features.4.weight"] == pytest.approx(1, abs=2e-4)
    assert abs(distances["classifier.weight"] - 1) > 2e-3
