"""What ddkit.nn has for losses: features of layers, and steps of SGD that are differentiated through."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ddkit
from ddkit.nn import layer_features, unrolled_sgd

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Twice(nn.Module):
    """Uses one activation, which works in place, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Linear(2 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm(self.first(x)))
        return self.last(self.act(hidden - 0.5).flatten(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Twice().double()


def test_features_of_layers_are_those_of_the_pass_by_class_and_by_name_also_of_one_that_is_used_twice() -> None:
    module, x = network(), normal(5, 1, 4, 4).requires_grad_()
    before = {name: value.clone() for name, value in module.named_buffers()}
    found = layer_features(module, x, nn.ReLU)
    hidden = functional.relu(functional.batch_norm(module.first(x), None, None, training=True))
    assert list(found) == ["act", "act:2"]
    torch.testing.assert_close(found["act"], hidden)
    torch.testing.assert_close(found["act:2"], functional.relu(hidden - 0.5))
    assert torch.autograd.grad(found["act:2"].sum(), x)[0].any()
    torch.testing.assert_close(layer_features(module, x, "nor*", inputs=True)["norm"], module.first(x))
    assert list(layer_features(module, x, (nn.Conv2d, nn.Linear))) == ["first", "last"]
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers()), "running statistics are left alone"
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


def test_features_under_other_weights_are_those_of_a_network_that_has_them() -> None:
    module, other, x = network(), network(), normal(2, 1, 4, 4)
    weights = {name: value.detach() + 0.1 for name, value in module.named_parameters()}
    other.load_state_dict(weights, strict=False)
    torch.testing.assert_close(layer_features(module, x, "last", weights=weights)["last"], other(x))
    assert not torch.allclose(layer_features(module, x, "last")["last"], other(x))


@pytest.mark.parametrize(("layers", "words"), [("lost", "Did you mean 'last'"), (nn.GELU, "a GELU")])
def test_a_layer_that_is_not_there_is_named(layers: str | type[nn.Module], words: str) -> None:
    with pytest.raises(ddkit.InputError, match=words):
        layer_features(network(), normal(2, 1, 4, 4), layers)


def gradients(constant_memory: bool, steps: int = 3) -> list[Tensor]:
    """Returns a loss of the weights after some steps, and its gradients by images, targets, rate and first weights."""
    module = network()
    images = [normal(4, 1, 4, 4, seed=number).requires_grad_() for number in range(steps)]
    targets = [normal(4, 3, seed=10 + number).softmax(1).requires_grad_() for number in range(steps)]
    rate = torch.tensor(0.1, dtype=F64, requires_grad=True)
    first = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    last = unrolled_sgd(module, first, zip(images, targets, strict=True), rate, constant_memory=constant_memory)
    value = torch.stack([(each - 0.5).square().sum() for each in last.values()]).sum()
    return [value.detach(), *torch.autograd.grad(value, [*images, *targets, rate, *first.values()])]


def test_unrolled_steps_are_those_of_torchs_sgd() -> None:
    module, images, labels = network(), normal(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    first = {name: value.detach().clone() for name, value in module.named_parameters()}
    found = unrolled_sgd(module, first, [(images, labels)] * 3, 0.1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
    for name, value in module.named_parameters():
        torch.testing.assert_close(found[name].detach(), value.detach())


def test_constant_memory_gives_the_same_gradients_by_everything() -> None:
    plain, again = gradients(False), gradients(True)
    assert all(each.any() for each in plain[1:4]), "the first batch too changes what comes after it"
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_gradients_through_steps_agree_with_finite_differences() -> None:
    module = network()
    first = {name: value.detach() for name, value in module.named_parameters()}

    def moved(images: Tensor, rate: Tensor) -> Tensor:
        made = unrolled_sgd(module, first, [(images, torch.tensor([0, 1]))] * 2, rate, constant_memory=True)
        return made["last.weight"].square().sum() + made["first.weight"].sum()

    given = (normal(2, 1, 4, 4).requires_grad_(), torch.tensor(0.1, dtype=F64, requires_grad=True))
    assert torch.autograd.gradcheck(moved, given)


class Kept:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()
        self.tensor = tensor.detach()


def kept_bytes(constant_memory: bool, steps: int) -> int:
    """Returns the bytes that the graph of the weights after some steps keeps."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        alive.add(kept := Kept(tensor))
        return kept

    module, images = network(), normal(64, 1, 4, 4).requires_grad_()
    first = {name: value.detach() for name, value in module.named_parameters()}
    batches = [(images, torch.arange(64) % 3)] * steps
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        last = unrolled_sgd(module, first, batches, 0.1, constant_memory=constant_memory)
    gc.collect()
    assert last["last.bias"].requires_grad
    return sum({each.storage.data_ptr(): each.storage.nbytes() for each in alive}.values())


def test_constant_memory_keeps_one_copy_of_the_weights_a_step_and_no_graph() -> None:
    weights = sum(value.numel() * 8 for value in network().parameters())
    assert kept_bytes(True, 6) - kept_bytes(True, 3) == 3 * weights
    assert kept_bytes(False, 6) - kept_bytes(False, 3) > 30 * weights
