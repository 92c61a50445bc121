"""Gradients by parameters, differentiated again by passes of first order, are those of double backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import ddkit
from ddkit.engine.draws import class_slices
from ddkit.nn.compiling import Arithmetic, native_bfloat16
from ddkit.nn.device import differentiable_attention
from ddkit.nn.networks import build_network
from ddkit.nn.second_order import ClassGradients, SecondOrder, no_forward_mode
from ddkit.run.resolved import resolved
from ddkit.testing.suite import info_of
from tests.engine.runs import made, write_npz

PLAIN = Arithmetic(compile=False, precision="float32")
INFO = info_of((3, 16, 16), 5)
Logits = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def network(norm: str, **options: Any) -> nn.Module:
    made = ddkit.create("model", "convnet", {"width": 8, "norm": norm} | options, data=INFO)
    return build_network(made, INFO, 0, "test").double().eval().requires_grad_(False)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)  # zero at first, so that nothing before it had a gradient
    return vit.double().eval().requires_grad_(False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{norm: lambda norm=norm: network(norm) for norm in ("batch", "instance", "group", "layer", "none")},  # type: ignore[misc]
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5).double().eval().requires_grad_(False),
    "transformer": transformer,
}


def double_backward(module: nn.Module) -> Logits:
    return lambda x, parameters: torch.func.functional_call(module, dict(parameters), (x,))


def gradients(module: nn.Module, logits: Logits, chosen: str = "", more: bool = False) -> list[Tensor]:
    """Returns a loss of the weighted gradient by parameters, and its gradients by images and weights."""
    x = torch.randn((7, *INFO.shape), generator=torch.Generator().manual_seed(1), dtype=next(module.parameters()).dtype).requires_grad_()
    weights = torch.linspace(0.5, 1.5, 7, dtype=x.dtype).requires_grad_()
    parameters = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}
    wanted = [value for name, value in parameters.items() if name.startswith(chosen)]
    viewed = 1.5 * x
    found = logits(viewed, parameters)
    loss = (weights * functional.cross_entropy(found, torch.arange(7) % 5, reduction="none")).sum()
    pairs = list(zip(torch.autograd.grad(loss, wanted, create_graph=True), wanted, strict=True))
    value = functional.cross_entropy(found, torch.arange(7) % 5) + torch.stack([(g + p.detach()).square().sum() for g, p in pairs]).sum()
    if more:  # a second gradient of the same logits, one by the images, and one that nobody differentiates
        others = torch.autograd.grad(found.square().sum(), wanted, create_graph=True)
        (by_images,) = torch.autograd.grad(found.logsumexp(1).sum(), viewed, create_graph=True)
        plain = torch.autograd.grad(found.sum(), wanted, retain_graph=True)
        value = value + torch.stack([(a * b.detach()).sum() for a, b in zip(others, plain, strict=True)]).sum() + by_images.square().sum()
    return [value.detach(), *torch.autograd.grad(value, (x, weights))]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_double_backward(name: str) -> None:
    module = NETWORKS[name]()
    with differentiable_attention(True):
        wanted = gradients(module, double_backward(module))
        twice = gradients(module, SecondOrder(module, PLAIN, block=3))
    for found, expected in zip(twice, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    assert no_forward_mode(module.float(), INFO) == ""


@pytest.mark.parametrize("block", [0, 1, 3])
@pytest.mark.parametrize("chosen", ["", "classifier"])
def test_several_gradients_of_the_same_logits_and_some_parameters_alone(block: int, chosen: str) -> None:
    module = network("batch")
    wanted = gradients(module, double_backward(module), chosen, more=True)
    found = gradients(module, SecondOrder(module, PLAIN, block=block), chosen, more=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * float(other.abs().max()))


def test_a_step_takes_one_pass_for_the_logits_and_one_in_forward_mode_for_all_its_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network("batch")
    twice = SecondOrder(module, PLAIN)
    counts = {"forward": 0, "forward_along": 0, "logits": 0}

    def counted(name: str) -> None:
        original = getattr(twice, name)

        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(twice, name, call)

    for name in ("forward", "forward_along"):
        counted(name)
    gradients(module, twice)
    assert counts == {"forward": 1, "forward_along": 1, "logits": 0}


def by_a_loop(module: nn.Module, x: Tensor, labels: Tensor, label: int) -> list[Tensor]:
    """Returns the gradients of the mean cross-entropy of one class, by plain operations and with a graph."""
    loss = functional.cross_entropy(module(x[labels == label]), labels[labels == label])
    return list(torch.autograd.grad(loss, list(module.parameters()), create_graph=True))


def image_gradient(gradients: Sequence[Sequence[Tensor]], x: Tensor) -> Tensor:
    return torch.autograd.grad(torch.stack([(g + 1).square().sum() for each in gradients for g in each]).sum(), x)[0]


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("blocks", [(0, 0), (1, 4), (3, 2)])
def test_gradients_by_class_are_those_of_a_loop_over_classes_of_unequal_sizes(norm: str, blocks: tuple[int, int]) -> None:
    module = network(norm).train().requires_grad_(True)
    labels = torch.tensor([0, 0, 0, 2, 2, 4])  # classes 1 and 3 have no images
    x = torch.randn((6, *INFO.shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    fast, plain = ClassGradients(module, PLAIN, blocks=blocks), ClassGradients(module)
    slices = class_slices(labels)
    expected = {label: by_a_loop(module.eval(), x, labels, label) for label in (0, 2, 4)}
    module.train()
    for found, tolerance in ((fast(x, labels, slices, real=False), 1e-9), (plain(x, labels, slices, real=False), 0.0)):
        assert found.keys() == expected.keys()
        for label, wanted in expected.items():
            for one, other in zip(found[label], wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-12 if tolerance else 0.0)
        one, other = image_gradient(list(found.values()), x), image_gradient([by_a_loop(module.eval(), x, labels, k) for k in expected], x)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
        module.train()
    for one, other in zip(fast(x.detach(), labels, slices, real=True)[2], expected[2], strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-12)
    assert module.training


def test_weights_that_change_in_place_reach_the_gradients_by_class() -> None:
    module = network("instance").requires_grad_(True)
    labels = torch.zeros(2, dtype=torch.int64)
    x = torch.randn((2, *INFO.shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = ClassGradients(module, PLAIN)
    before = fast(x, labels, class_slices(labels), real=True)[0]
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    after = fast(x, labels, class_slices(labels), real=True)[0]
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(after[0], by_a_loop(module, x, labels, 0)[0].detach(), rtol=1e-9, atol=1e-12)


class _Cube(torch.autograd.Function):
    """Has a backward pass that can be differentiated, and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Cube.apply(x)
        return found


class Centred(nn.Module):
    """Couples the images of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def own(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), layer, nn.Linear(8, 5)).eval()


def test_what_forward_mode_cannot_take_or_the_batch_couples_is_found() -> None:
    assert "jvp" in no_forward_mode(own(Cube()), INFO)
    assert "image by image" in no_forward_mode(own(Centred()), INFO)
    assert no_forward_mode(own(nn.Tanh()), INFO) == ""


def long_run(tmp_path: Path, **more: Any) -> dict[str, Any]:
    file = tmp_path / "data.npz"
    if not file.exists():
        write_npz(file, (4, 4, 4))
    return {
        "ipc": 2, "pipc": 4, "steps": 3, "data": {"use": f"npz:{file}"}, "train": {"epochs": 1},
        "teacher": {"model": "convnet", "norm": "batch"}, "losses": {"dkkt-primal": {}, "dkkt-stationarity": {}},
    } | more  # fmt: skip


def test_the_teacher_is_compiled_if_its_work_pays_it_back_or_it_is_asked_for(tmp_path: Path) -> None:
    setups = {steps: made(long_run(tmp_path, steps=steps))[0] for steps in (3, 10**9)}
    assert [setup.decided.compiled for setup in setups.values()] == [set(), {"teacher"}]
    again = made(long_run(tmp_path, engine={"compile": True}))[0]
    assert again.decided.compiled == {"teacher"}
    assert resolved(again).engine.compile is True


def matching(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Returns gradient matching with classes of unequal size: the first has two real images, the others four."""
    file = write_npz(tmp_path / "unequal.npz", (2, 4, 4))
    table = {"width": 8, "norm": more.pop("norm", "instance"), "inner_epochs": 1, "renew_every": 2}
    return {"ipc": 2, "pipc": "all", "steps": 3, "data": {"use": f"npz:{file}"}, "network": table, "losses": {"gm": {}}} | more


def test_gradients_by_class_are_compiled_if_their_work_pays_it_back_and_the_network_can_be(tmp_path: Path) -> None:
    setups = {steps: made(matching(tmp_path, steps=steps))[0] for steps in (3, 10**9)}
    assert [setup.decided.compiled for setup in setups.values()] == [set(), {"gradients"}]
    assert made(matching(tmp_path, engine={"compile": True}))[0].decided.gradient_blocks == (2, 4)
    both = made(matching(tmp_path, steps=10**9, losses={"gm": {}, "dm": {}}))[0]
    assert both.decided.compiled == {"gradients", "network"}
    assert made(matching(tmp_path, norm="batch", steps=10**9))[0].decided.compiled == set()
    with pytest.raises(ddkit.InputError, match="batch norm"):
        made(matching(tmp_path, norm="batch", engine={"compile": True}))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", *(["bfloat16"] if native_bfloat16(torch.device("cpu")) else [])])
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("run", [long_run, matching])
def test_a_compiled_step_has_the_gradients_of_the_plain_one(
    tmp_path: Path, run: Callable[..., dict[str, Any]], precision: str, chunk: int
) -> None:
    plain = made(run(tmp_path, engine={"compile": False, "chunk": chunk}))[2].evaluate(0)
    fast = made(run(tmp_path, engine={"compile": True, "precision": precision, "chunk": chunk}))[2].evaluate(0)
    least = 1 - 1e-6 if precision == "float32" else 0.98
    assert plain.gradients.keys() == fast.gradients.keys() == {"images", *(["multipliers"] if run is long_run else [])}
    for name, expected in plain.gradients.items():
        assert float(functional.cosine_similarity(fast.gradients[name].flatten(), expected.flatten(), dim=0)) > least
    for label, value in plain.values.items():
        torch.testing.assert_close(fast.values[label], value, rtol=1e-5 if precision == "float32" else 0.02, atol=1e-6)
