"""The small-image networks of the literature: their layers and sizes, small images, and norms."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from ddkit_models import halvings
from torch import Tensor, nn

import ddkit
from ddkit.nn.embedder import embed
from ddkit.nn.networks import build_network, couples_samples
from ddkit.testing.samples import info_of, noise

NEW = ["lenet", "alexnet", "vgg11", "resnet18"]


def network(name: str, shape: tuple[int, int, int] = (3, 32, 32), **options: Any) -> nn.Module:
    info = info_of(shape, 10)
    return build_network(ddkit.create("model", name, options, data=info), info, 0, "test")


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def conv(before: int, after: int, kernel: int) -> int:
    return before * after * kernel**2 + after


def linear(before: int, after: int) -> int:
    return before * after + after


def test_parameters_are_those_of_the_published_layers() -> None:
    """Counted by hand from the descriptions, for CIFAR-10."""
    assert parameters(network("lenet")) == conv(3, 6, 5) + conv(6, 16, 5) + linear(400, 120) + linear(120, 84) + linear(84, 10)
    alexnet = [(3, 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3)]
    assert parameters(network("alexnet")) == sum(conv(*each) for each in alexnet) + linear(192 * 16, 10)
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    vgg = sum(conv(one, two, 3) + 2 * two for one, two in pairwise(widths))
    assert parameters(network("vgg11")) == vgg + linear(512, 10)
    assert parameters(network("vgg11", norm="none")) == vgg - 2 * sum(widths[1:]) + linear(512, 10)
    assert parameters(network("resnet18")) == 11_173_962  # the figure known for the CIFAR variant


def test_resnet18_computes_what_torchvisions_does_with_the_small_stem() -> None:
    import torchvision.models

    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # type: ignore[assignment]
    ours = network("resnet18", norm="batch")
    values = list(ours.state_dict().values())
    keys = list(theirs.state_dict())
    theirs.load_state_dict(dict(zip(keys, values, strict=True)))  # both list the layers in the order of their use
    x = noise((2, 3, 32, 32), "x")
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 28, 28), (3, 32, 32), (3, 9, 40), (3, 64, 48), (4, 16, 16)])
@pytest.mark.parametrize("name", NEW)
def test_features_of_any_size_differ_from_image_to_image(name: str, shape: tuple[int, int, int]) -> None:
    small: dict[str, Any] = {"width": 8} if name in ("vgg11", "resnet18") else {}
    module, x = network(name, shape, **small), noise((3, *shape), "x")
    features = embed(module, x)
    assert module(x).shape == (3, 10)
    torch.testing.assert_close(module.classifier(features), module(x))  # type: ignore[operator]
    assert float(features.detach().std(0).max()) > 1e-3  # normalising maps of one pixel would leave nothing


def test_normalising_maps_of_one_pixel_leaves_nothing_so_the_first_halvings_are_left_out() -> None:
    x = noise((2, 8, 1, 1), "x")
    assert float(nn.GroupNorm(8, 8)(x).detach().abs().max()) < 1e-4  # the negative control
    strides = [each.stride for each in network("resnet18", (1, 8, 8), width=8).modules() if isinstance(each, nn.Conv2d)]
    assert sum(each == (2, 2) for each in strides) == 4  # two stages, each with its shortcut
    poolings = [each for each in network("vgg11", (1, 8, 8), width=8).modules() if isinstance(each, nn.MaxPool2d)]
    assert len(poolings) == 3


@pytest.mark.parametrize(
    ("size", "most", "least", "expected"), [((32, 32), 5, 1, 5), ((7, 99), 5, 1, 2), ((1, 1), 5, 1, 0), ((8, 8), 3, 2, 2)]
)
def test_halvings_follow_the_shorter_side(size: tuple[int, int], most: int, least: int, expected: int) -> None:
    assert halvings(size, most, least=least) == expected


def test_lenet_of_grey_28_pixels_pads_as_the_original() -> None:
    assert network("lenet", (1, 28, 28)).features[7].in_features == 400  # type: ignore[index, union-attr]
    with pytest.raises(ddkit.InputError, match="3 x 8 pixels are too small; the least is 4 x 4"):
        network("lenet", (1, 3, 8))


@pytest.mark.parametrize(("name", "padding", "width"), [("alexnet", 4, 192 * 16), ("vgg11", 3, 64)])
def test_public_padding_makes_grey_28_pixels_those_of_32(name: str, padding: int, width: int) -> None:
    small = {"width": 8} if name == "vgg11" else {}
    assert network(name, (1, 28, 28), one_channel_padding=padding, **small).classifier.in_features == width  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_norm_decides_whether_the_images_of_a_batch_are_coupled(name: str) -> None:
    info = info_of((1, 8, 8))
    coupled = {norm: couples_samples(network(name, info.shape, width=8, norm=norm), info) for norm in ("instance", "none", "batch")}
    assert coupled == {"instance": False, "none": False, "batch": True}


def by_hand(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_convnet_norm_group_and_layer_normalise_what_they_say() -> None:
    x = noise((2, 3, 8, 8), "x")
    for norm, make in (
        ("group", lambda t: by_hand(t.view(2, 4, 2, 8, 8), (2, 3, 4)).view(2, 8, 8, 8)),
        ("layer", lambda t: by_hand(t, (1, 2, 3))),
    ):
        module = network("convnet", (3, 8, 8), width=8, depth=1, norm=norm)
        first = module.features[0](x)  # type: ignore[index, operator]
        torch.testing.assert_close(module.features[1](first), make(first))  # type: ignore[index, operator]
        assert not torch.allclose(module.features[1](first), by_hand(first, (2, 3)))  # type: ignore[index, operator]


def test_group_norm_of_a_width_that_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(ddkit.InputError, match="convnet: norm = group needs a width that is a multiple of 4, not 6"):
        network("convnet", width=6, norm="group")


@pytest.mark.parametrize("size", [(1, 1), (4, 64)])
def test_layer_norm_of_images_that_are_too_small_is_the_usual_error(size: tuple[int, int]) -> None:
    with pytest.raises(ddkit.InputError, match="too small"):
        network("convnet", (3, *size), depth=3, norm="layer", width=8)
