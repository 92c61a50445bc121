"""What needs a GPU (make check-gpu): the loop on CUDA equals that on the CPU, waits for nothing, and records CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import ddkit
from ddkit.engine.bank import Bank
from ddkit.engine.loop import Engine, Finiteness
from ddkit.nn.compiling import Arithmetic
from ddkit.nn.device import products
from ddkit.nn.embedder import Embedder
from ddkit.nn.networks import build_network, redraw
from tests.conftest import SMALL_FLAGS, Result
from tests.engine.test_fast_path import INFO, LOOP_LOSSES, PLAIN, bank, draw, features_and_gradient, model, source, terms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def engine_on(device: torch.device, *names: str, arithmetic: Arithmetic = PLAIN) -> Engine:
    module = build_network(model(norm="batch"), INFO, 0, "teacher").to(device)
    teacher = ddkit.nn.Teacher(module, mean=(0.5,) * 3, std=(0.25,) * 3)
    made = terms(*names)
    declared = {name: spec for term in made for name, spec in term.loss.requires.parameters.items()}
    labels = torch.arange(3).repeat_interleave(2)
    images: Bank = bank(torch.randn((6, *INFO.shape), generator=draw()).to(device), labels.to(device), 0.1, declared)
    engine = Engine(images, source(teacher=teacher, device=device, batch=4, arithmetic=arithmetic), made)
    engine.start()
    return engine


@pytest.mark.parametrize("name", LOOP_LOSSES)
def test_values_and_gradients_equal_those_of_the_cpu(name: str) -> None:
    with products(CUDA, "float32"):
        here, there = (engine_on(device, name).evaluate(3) for device in (CPU, CUDA))
    torch.testing.assert_close(there[0][name].cpu(), here[0][name], rtol=1e-3, atol=1e-5)
    for key, gradient in here[1].items():
        torch.testing.assert_close(there[1][key].cpu(), gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()) + 1e-7)


COMPILED = {
    "plain": PLAIN,
    "compiled": Arithmetic(compile=True, precision="bfloat16"),
    "graphs": Arithmetic(compile=True, precision="bfloat16", graphs=True),
}


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("name", LOOP_LOSSES)
def test_the_loop_never_waits_for_the_device(name: str, kind: str) -> None:
    engine = engine_on(CUDA, name, arithmetic=COMPILED[kind])
    guard = Finiteness(engine, 0, lambda index: None)
    for index in range(4):  # what is made once, compiled or recorded may wait
        engine.evaluate(index)
    with refusing_to_wait():
        for index in range(4, 7):
            found = engine.evaluate(index, measured=True)
            engine.bank.update(found.gradients)
            guard.note(index, found)
    guard.check(7)


def test_recorded_graphs_give_the_loop_of_the_compiled_code() -> None:
    compiled, graphs = (engine_on(CUDA, "dm", arithmetic=COMPILED[kind]) for kind in ("compiled", "graphs"))
    for index in range(6):
        (values, gradients), (other, others) = (engine.evaluate(index)[:2] for engine in (compiled, graphs))
        torch.testing.assert_close(other["dm"], values["dm"], rtol=1e-2, atol=1e-4)
        assert cosine_similarity(gradients["images"].flatten(), others["images"].flatten(), 0) > 0.99
        compiled.bank.update(gradients)
        graphs.bank.update(gradients)


def test_the_check_of_waiting_can_fail() -> None:
    with pytest.raises(RuntimeError), refusing_to_wait():
        float(torch.ones(1, device=CUDA))


@pytest.mark.parametrize(("precision", "graphs"), [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)])
def test_compiled_features_and_gradients_equal_plain_ones(precision: str, graphs: bool) -> None:
    module = build_network(model(), INFO, 0, "network").to(CUDA).requires_grad_(False)
    fast = Embedder(module, Arithmetic(compile=True, precision=precision, graphs=graphs), block=4)
    plain = Embedder(build_network(model(), INFO, 0, "network").to(CUDA).requires_grad_(False), PLAIN)
    x = torch.randn((7, *INFO.shape), generator=draw()).to(CUDA)
    for number in range(4):  # graphs are recorded in the first calls and replayed in the later ones
        for embedder in (fast, plain):
            redraw(embedder.module, model(), INFO, 0, "network", number)
        with products(CUDA, "float32"):
            found, right = (features_and_gradient(each, x) for each in (fast, plain))
        largest = (found[0] - right[0]).abs().max() / right[0].abs().max()
        assert float(largest) < (1e-4 if precision == "float32" else 0.02), number
        assert cosine_similarity(found[1].flatten(), right[1].flatten(), 0) > (0.9999 if precision == "float32" else 0.98), number


def test_a_set_that_equals_its_real_images_stays_there() -> None:
    engine = engine_on(CUDA, "dm", arithmetic=Arithmetic(compile=True, precision="bfloat16"))
    steps = engine.source
    start: Tensor = steps.normalisation.normalise(steps.real_images)
    own = Engine(bank(start, steps.real_labels.to(CUDA)), source(arithmetic=steps.arithmetic, block=4, device=CUDA), engine.losses)
    for index in range(3):
        values, gradients, _ = own.evaluate(index)
        own.bank.update(gradients)
        assert float(values["dm"]) < 1e-9
    torch.testing.assert_close(own.bank.images.detach(), start, rtol=0, atol=1e-4)


def test_a_run_on_the_gpu_evaluates_and_resumes(cli: Callable[..., Result], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = cli("distill", "--losses", "dm,dkkt", "--device", "cuda", "--out", run, *SMALL_FLAGS)
    assert result.code == 0, result.err
    result = cli("distill", "--resume", "--out", run, "--steps", 4, "--device", "cuda")
    assert result.code == 0, result.err
    assert bool(ddkit.load(run).images.isfinite().all())
