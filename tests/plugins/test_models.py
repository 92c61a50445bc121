"""Networks: shapes, names, options, features; weights that are a function of the seed and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ddkit_evaluators import split_options
from torch import Tensor, nn

import ddkit
from ddkit.errors import RunFailed
from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network, couples_samples, redraw, saved_bytes
from ddkit.seeding import derived_seed, drawn_from, generator
from ddkit.testing.suite import info_of, noise
from tests.conftest import SMALL, SMALL_FLAGS, Result


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
def test_depth_follows_the_shorter_side_and_is_recorded(size: tuple[int, int], depth: int) -> None:
    assert ddkit.create("model", "convnet", {}, data=data(size=size)).options.depth == depth


def test_a_depth_that_was_asked_for_is_recorded() -> None:
    assert ddkit.create("model", "convnet", {"depth": 1}, data=data(size=(32, 32))).options.depth == 1


def test_state_dict_of_the_public_convnet_loads_and_is_used() -> None:
    module, public = network("convnet", data(3, (32, 32), 10), width=128), _public_convnet()
    assert list(module.state_dict()) == list(public.state_dict())
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


def test_one_channel_padding_of_three_gives_the_public_features_on_28_pixels() -> None:
    info = data(1, (28, 28), 10)
    padded = network("convnet", info, width=128, one_channel_padding=3)
    assert padded.classifier.in_features == 2048  # type: ignore[union-attr]
    assert outputs(padded, info).shape == (2, 10)
    assert network("convnet", info, width=128).classifier.in_features == 128 * 9  # type: ignore[union-attr]
    colour = data(3, (28, 28), 10)
    assert network("convnet", colour, width=128, one_channel_padding=3).classifier.in_features == 128 * 9  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("size", "options"), [((1, 1), {}), ((1, 9), {}), ((8, 8), {"depth": 4}), ((4, 64), {"depth": 3, "norm": "layer"})]
)
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


def test_without_pooling_the_features_keep_the_image_size() -> None:
    assert embed(network(pooling="none", depth=1), torch.zeros(1, 3, 8, 8)).shape == (1, 8 * 64)


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
    with pytest.raises(RunFailed, match="neither a method embed nor a linear layer"):
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
    with pytest.raises(RuntimeError), drawn_from(0, "x"):  # also after an error
        torch.rand(3) @ torch.rand(4)
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


# The small-image networks of the literature


def built(name: str, shape: tuple[int, int, int] = (3, 32, 32), **options: Any) -> nn.Module:
    info = info_of(shape, 10)
    return build_network(ddkit.create("model", name, options, data=info), info, 0, "test")


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def test_parameters_are_those_of_the_published_layers() -> None:
    """Counted by hand from the descriptions, for CIFAR-10."""

    def conv(before: int, after: int, kernel: int) -> int:
        return before * after * kernel**2 + after

    def linear(before: int, after: int) -> int:
        return before * after + after

    assert parameters(built("lenet")) == conv(3, 6, 5) + conv(6, 16, 5) + linear(400, 120) + linear(120, 84) + linear(84, 10)
    alexnet = [(3, 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3)]
    assert parameters(built("alexnet")) == sum(conv(*each) for each in alexnet) + linear(192 * 16, 10)
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    vgg = sum(conv(one, two, 3) + 2 * two for one, two in pairwise(widths))
    assert parameters(built("vgg11")) == vgg + linear(512, 10)
    assert parameters(built("vgg11", norm="none")) == vgg - 2 * sum(widths[1:]) + linear(512, 10)
    assert parameters(built("resnet18")) == 11_173_962  # the figure known for the CIFAR variant


def test_resnet18_computes_what_torchvisions_does_with_the_small_stem() -> None:
    import torchvision.models

    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # type: ignore[assignment]
    ours = built("resnet18", norm="batch")
    values = list(ours.state_dict().values())
    keys = list(theirs.state_dict())
    theirs.load_state_dict(dict(zip(keys, values, strict=True)))  # both list the layers in the order of their use
    x = noise((2, 3, 32, 32), "x")
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


TINY = [(2, 2, 2), (1, 4, 3), (4, 5, 17)]
SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 28, 28), (3, 32, 32), (3, 9, 40), (3, 64, 48), (4, 16, 16)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in ("convnet", "mlp", "lenet", "alexnet", "vgg11", "resnet18") for shape in SHAPES]
    + [(name, shape) for name in ("convnet", "mlp") for shape in TINY],
)
def test_features_of_any_size_differ_from_image_to_image(name: str, shape: tuple[int, int, int]) -> None:
    module, x = built(name, shape, **({} if name in ("lenet", "alexnet") else {"width": 8})), noise((3, *shape), "x")
    features = embed(module, x)
    assert module(x).shape == (3, 10)
    torch.testing.assert_close(module.classifier(features), module(x))  # type: ignore[operator]
    assert float(features.detach().std(0).max()) > 1e-3  # normalising maps of one pixel would leave nothing


def test_normalising_maps_of_one_pixel_leaves_nothing_so_the_first_halvings_are_left_out() -> None:
    x = noise((2, 8, 1, 1), "x")
    assert float(nn.GroupNorm(8, 8)(x).detach().abs().max()) < 1e-4  # the negative control
    strides = [each.stride for each in built("resnet18", (1, 8, 8), width=8).modules() if isinstance(each, nn.Conv2d)]
    assert sum(each == (2, 2) for each in strides) == 4  # two stages, each with its shortcut
    poolings = [each for each in built("vgg11", (1, 8, 8), width=8).modules() if isinstance(each, nn.MaxPool2d)]
    assert len(poolings) == 3


def test_lenet_of_grey_28_pixels_pads_as_the_original() -> None:
    assert built("lenet", (1, 28, 28)).features[7].in_features == 400  # type: ignore[index, union-attr]
    with pytest.raises(ddkit.InputError, match=r"3 x 8 pixels are too small\. They must be at least 4 x 4"):
        built("lenet", (1, 3, 8))


@pytest.mark.parametrize(("name", "padding", "width"), [("alexnet", 4, 192 * 16), ("vgg11", 3, 64)])
def test_public_padding_makes_grey_28_pixels_those_of_32(name: str, padding: int, width: int) -> None:
    small = {"width": 8} if name == "vgg11" else {}
    assert built(name, (1, 28, 28), one_channel_padding=padding, **small).classifier.in_features == width  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_norm_decides_whether_the_images_of_a_batch_are_coupled(name: str) -> None:
    info = info_of((1, 8, 8))
    coupled = {norm: couples_samples(built(name, info.shape, width=8, norm=norm), info) for norm in ("instance", "none", "batch")}
    assert coupled == {"instance": False, "none": False, "batch": True}


def by_hand(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_convnet_norm_group_and_layer_normalise_what_they_say() -> None:
    x = noise((2, 3, 8, 8), "x")
    for norm, make in (
        ("group", lambda t: by_hand(t.view(2, 4, 2, 8, 8), (2, 3, 4)).view(2, 8, 8, 8)),
        ("layer", lambda t: by_hand(t, (1, 2, 3))),
    ):
        module = built("convnet", (3, 8, 8), width=8, depth=1, norm=norm)
        first = module.features[0](x)  # type: ignore[index, operator]
        torch.testing.assert_close(module.features[1](first), make(first))  # type: ignore[index, operator]
        assert not torch.allclose(module.features[1](first), by_hand(first, (2, 3)))  # type: ignore[index, operator]


def test_group_norm_of_a_width_that_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(ddkit.InputError, match="convnet: norm = group needs a number of channels that is a multiple of 4, not 6"):
        built("convnet", width=6, norm="group")


# Options of a list of models

WHERE = "evaluators.accuracy.model_options"


def split(names: str, **options: Any) -> dict[str, dict[str, Any]]:
    return split_options(names.split(","), options, WHERE)


def test_an_option_goes_to_the_models_that_have_it_and_a_table_of_a_models_name_to_that_alone() -> None:
    assert split("convnet,mlp,lenet", width=8, norm="batch") == {"convnet": {"width": 8, "norm": "batch"}, "mlp": {"width": 8}, "lenet": {}}
    assert split("convnet,mlp", width=8, mlp={"width": 4}) == {"convnet": {"width": 8}, "mlp": {"width": 4}}
    assert split("mlp", mlp={"width": 4}) == {"mlp": {"width": 4}}


def test_an_option_that_none_has_and_a_table_of_another_model_are_refused() -> None:
    with pytest.raises(ddkit.InputError, match=r"model_options\.widht: none of the models convnet, mlp.*mlp has depth, width"):
        split("convnet,mlp", widht=8)
    with pytest.raises(ddkit.InputError, match=r"model_options\.lenet: the models of this evaluation are convnet, mlp"):
        split("convnet,mlp", lenet={})


def test_options_of_one_model_are_checked_by_that_model() -> None:
    evaluator = ddkit.create("evaluator", "accuracy", {"model": "mlp", "model_options": {"norm": "batch"}})
    with pytest.raises(ddkit.InputError, match=r"mlp: .*has no key 'norm'"):
        evaluator.check(ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(8, 8)))


def test_a_model_that_the_images_are_too_small_for_is_told_before_the_run() -> None:
    evaluator = ddkit.create("evaluator", "accuracy", {"model": "mlp,lenet"})
    evaluator.check(ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(8, 8)))
    with pytest.raises(ddkit.InputError, match="lenet: images of 3 x 3 pixels are too small"):
        evaluator.check(ddkit.DataInfo(class_names=("a", "b"), channels=1, size=(3, 3)))


def test_the_cross_architecture_table_has_a_row_for_each_model(cli: Callable[..., Result]) -> None:
    assert cli("distill", "--losses", "dm", "--pipc", 3, "--out", "run", "--evaluate", "none", *SMALL_FLAGS).code == 0
    models = "convnet,mlp,lenet,resnet18,vgg11"
    short = [f"evaluators.accuracy.{part}" for part in ("epochs=1", "repeats=1", "model_options.width=4", "model_options.convnet.depth=1")]
    flags = [part for each in short for part in ("--set", each)]
    table = cli("evaluate", "run", "--evaluate", "accuracy", "--model", models, *flags)
    assert table.code == 0, table.err
    assert [line.split()[1] for line in table.out.splitlines()[2:]] == models.split(",")
    rows = json.loads(Path("run/evaluation.json").read_text())["evaluations"]
    assert [row["model"] for row in rows] == models.split(",")
