"""Networks: shapes, names, options, features; weights that are a function of the seed and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ddkit_models import depth_for
from torch import Tensor, nn

import ddkit
from ddkit.errors import RunFailed
from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network, couples_samples, redraw, saved_bytes
from ddkit.seeding import derived_seed, drawn_from, generator
from tests.conftest import SMALL

# The state dict of ConvNet (3 blocks of 128, instance norm, average pooling) of the public DatasetCondensation code.
PUBLIC_SHAPES = {
    "features.0.weight": (128, 3, 3, 3),
    "features.0.bias": (128,),
    "features.1.weight": (128,),
    "features.1.bias": (128,),
    "features.4.weight": (128, 128, 3, 3),
    "features.4.bias": (128,),
    "features.5.weight": (128,),
    "features.5.bias": (128,),
    "features.8.weight": (128, 128, 3, 3),
    "features.8.bias": (128,),
    "features.9.weight": (128,),
    "features.9.bias": (128,),
    "classifier.weight": (10, 2048),
    "classifier.bias": (10,),
}


def data(channels: int = 3, size: tuple[int, int] = (8, 8), classes: int = 3) -> ddkit.DataInfo:
    return ddkit.DataInfo(class_names=tuple(f"class {i}" for i in range(classes)), channels=channels, size=size)


def network(name: str = "convnet", info: ddkit.DataInfo | None = None, seed: int = 0, **options: Any) -> nn.Module:
    info = info or data()
    return build_network(ddkit.create("model", name, {"width": 8} | options, data=info), info, seed, "test")


def outputs(module: nn.Module, info: ddkit.DataInfo, rows: int = 2) -> Tensor:
    result: Tensor = module(torch.randn((rows, *info.shape), generator=torch.Generator().manual_seed(0)))
    return result


@pytest.mark.parametrize(
    ("size", "depth"),
    [((8, 8), 2), ((16, 16), 2), ((28, 28), 3), ((32, 32), 3), ((64, 64), 4), ((128, 128), 5), ((224, 224), 6),
     ((32, 64), 3), ((64, 32), 3), ((8, 100), 2), ((4, 4), 2), ((3, 3), 1), ((2, 2), 1)],
)  # fmt: skip
def test_depth_follows_the_shorter_side(size: tuple[int, int], depth: int) -> None:
    assert depth_for(size) == depth


def test_depth_is_recorded_in_the_resolved_options() -> None:
    assert ddkit.create("model", "convnet", {}, data=data(size=(32, 32))).options.depth == 3
    assert ddkit.create("model", "convnet", {"depth": 1}, data=data(size=(32, 32))).options.depth == 1


def test_state_dict_of_the_public_convnet_loads_and_is_used() -> None:
    info = data(3, (32, 32), 10)
    module = network("convnet", info, width=128)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == PUBLIC_SHAPES
    assert list(module.state_dict()) == list(PUBLIC_SHAPES)
    public = _public_convnet()
    module.load_state_dict(public.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), public(x))


def _public_convnet() -> nn.Module:
    """Returns the public architecture written out: convolution, GroupNorm(128, 128), ReLU, average pooling, three times."""
    layers: list[nn.Module] = []
    for channels in (3, 128, 128):
        layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128), nn.ReLU(), nn.AvgPool2d(2, 2)]

    class Public(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Linear(2048, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x).flatten(1))

    with drawn_from(1, "public"):
        return Public()


def test_group_norm_of_the_convnet_normalises_each_image_and_channel() -> None:
    norms = [layer for layer in network().modules() if isinstance(layer, nn.GroupNorm)]
    assert all(layer.num_groups == layer.num_channels for layer in norms)


def test_one_channel_padding_of_three_gives_the_public_features_on_28_pixels() -> None:
    info = data(1, (28, 28), 10)
    padded = network("convnet", info, width=128, one_channel_padding=3)
    assert padded.classifier.in_features == 2048  # type: ignore[union-attr]
    assert outputs(padded, info).shape == (2, 10)
    assert network("convnet", info, width=128).classifier.in_features == 128 * 9  # type: ignore[union-attr]
    colour = data(3, (28, 28), 10)
    assert network("convnet", colour, width=128, one_channel_padding=3).classifier.in_features == 128 * 9  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 28, 28), (1, 9, 13), (4, 5, 17), (3, 33, 8), (2, 2, 2), (1, 4, 3)])
@pytest.mark.parametrize("model", ["convnet", "mlp"])
def test_any_size_and_channel_count(model: str, shape: tuple[int, int, int]) -> None:
    info = data(shape[0], shape[1:], classes=5)
    module = network(model, info)
    assert outputs(module, info).shape == (2, 5)
    assert embed(module, torch.zeros(2, *shape)).shape[0] == 2


@pytest.mark.parametrize(("size", "options"), [((1, 1), {}), ((1, 9), {}), ((8, 8), {"depth": 4}), ((4, 64), {"depth": 3})])
def test_image_too_small_for_the_poolings_is_an_error_that_says_so(size: tuple[int, int], options: dict[str, Any]) -> None:
    with pytest.raises(ddkit.InputError, match=f"{size[0]} x {size[1]} pixels are too small.*smaller depth"):
        network("convnet", data(3, size), **options)


def kinds(module: nn.Module) -> set[type[nn.Module]]:
    return {type(layer) for layer in module.modules()}


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({"norm": "batch"}, nn.BatchNorm2d, nn.GroupNorm),
        ({"norm": "none"}, nn.Conv2d, nn.GroupNorm),
        ({"pooling": "max"}, nn.MaxPool2d, nn.AvgPool2d),
        ({"pooling": "none"}, nn.Conv2d, nn.AvgPool2d),
        ({"activation": "sigmoid"}, nn.Sigmoid, nn.ReLU),
        ({"activation": "leaky-relu"}, nn.LeakyReLU, nn.ReLU),
    ],
)
def test_option_changes_the_layers(options: dict[str, Any], present: type[nn.Module], absent: type[nn.Module]) -> None:
    module = network(**options)
    assert present in kinds(module)
    assert absent not in kinds(module)
    assert outputs(module, data()).shape == (2, 3)


def test_batch_norm_keeps_the_public_layer_numbers() -> None:
    names = list(network(norm="batch").state_dict())
    assert "features.1.running_mean" in names
    assert "features.5.running_var" in names


def test_without_pooling_the_features_keep_the_image_size() -> None:
    assert embed(network(pooling="none", depth=1), torch.zeros(1, 3, 8, 8)).shape == (1, 8 * 64)


@pytest.mark.parametrize("model", ["convnet", "mlp"])
def test_logits_are_the_classifier_of_the_embedding(model: str) -> None:
    module, x = network(model), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.classifier(embed(module, x)), module(x))  # type: ignore[operator]


def test_mlp_has_the_asked_for_layers() -> None:
    module = network("mlp", depth=3, width=16)
    widths = [(layer.in_features, layer.out_features) for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert widths == [(192, 16), (16, 16), (16, 16), (16, 3)]


class Plain(nn.Module):
    """A stranger's model without embed()."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).relu())


def test_model_without_embed_is_embedded_by_the_input_of_its_last_linear_layer() -> None:
    module, x = Plain(), torch.randn(4, 3, 2, 2, requires_grad=True)
    features = embed(module, x)
    torch.testing.assert_close(features, module.first(x.flatten(1)).relu())
    assert torch.autograd.grad(features.sum(), x)[0].abs().sum() > 0
    assert not module.last._forward_pre_hooks  # the hook is gone


def test_model_without_embed_or_linear_layer_is_an_error() -> None:
    with pytest.raises(RunFailed, match="neither an embed method nor a linear layer"):
        embed(nn.Sequential(nn.Conv2d(3, 2, 1)), torch.zeros(1, 3, 2, 2))


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_network_is_a_function_of_seed_and_purpose() -> None:
    info, model = data(), ddkit.create("model", "convnet", {"width": 8})
    first, again = (build_network(model, info, 3, "network", 7).state_dict() for _ in range(2))
    assert equal(first, again)
    assert not equal(first, build_network(model, info, 3, "network", 8).state_dict())
    assert not equal(first, build_network(model, info, 4, "network", 7).state_dict())


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}])
def test_redrawing_in_place_equals_a_fresh_build_and_keeps_the_storage(options: dict[str, Any]) -> None:
    info, model = data(), ddkit.create("model", "convnet", {"width": 8} | options)
    module = build_network(model, info, 0, "network", 0)
    outputs(module, info)  # moves running statistics
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict(keep_vars=True).items()}
    redraw(module, model, info, 0, "network", 1)
    assert equal(module.state_dict(), build_network(model, info, 0, "network", 1).state_dict())
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict(keep_vars=True).items()} == before


def test_building_and_redrawing_leave_the_global_generator_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    info, model = data(), ddkit.create("model", "convnet", {"width": 8})
    redraw(build_network(model, info, 0, "a"), model, info, 0, "b")
    couples_samples(build_network(model, info, 0, "a"), info)
    assert torch.equal(torch.get_rng_state(), before)
    model(3, (8, 8), 3)
    assert not torch.equal(torch.get_rng_state(), before)  # the check sees a draw where there is one


def test_a_run_neither_uses_nor_moves_the_global_generator(tmp_path: Any) -> None:
    sets = SMALL | {"losses.dm.weight": 1.0}
    states = []
    for number, seed in enumerate((1, 2)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run = ddkit.distill(losses="dm", ipc=1, pipc=3, sets=sets, out=tmp_path / f"run {number}")
        assert torch.equal(torch.get_rng_state(), before)
        states.append((run.path / "synthetic.safetensors").read_bytes())
    assert states[0] == states[1]


def test_default_generator_is_restored_even_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), drawn_from(0, "x"):
        torch.rand(3) @ torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_purposes_do_not_collide() -> None:
    purposes: list[tuple[str | int, ...]] = [("a", "b"), ("ab",), ("a", 1), ("a", 11), ("a", 1, 1), ()]
    seeds = {derived_seed(seed, *purpose) for seed in (0, 1) for purpose in purposes}
    assert len(seeds) == 2 * len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))


@pytest.mark.parametrize(
    ("options", "training", "coupled"),
    [({}, True, False), ({"norm": "none"}, True, False), ({"norm": "batch"}, True, True), ({"norm": "batch"}, False, False)],
)
def test_batch_norm_in_training_couples_the_images_of_a_batch(options: dict[str, Any], training: bool, coupled: bool) -> None:
    info = data(size=(16, 16))
    module = network(info=info, **options).train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert couples_samples(module, info) is coupled
    assert equal(module.state_dict(), before)


def test_saved_bytes_grow_with_the_width_and_not_with_the_parameters() -> None:
    info = data(size=(16, 16))
    narrow, wide = (saved_bytes(network(info=info, width=width, norm="none"), info) for width in (8, 16))
    assert narrow > 4 * 8 * 16 * 16  # at least the first block's activations
    assert 1.5 < wide / narrow < 2  # the input, saved once, does not grow; the weights would grow fourfold
