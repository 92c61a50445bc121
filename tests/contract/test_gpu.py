"""What needs a GPU beside the table of tests/check_gpu.py, which runs these tests too: `make check-gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import ddkit
from ddkit.engine.loop import Engine
from ddkit.nn.compiling import Arithmetic
from ddkit.nn.device import products
from ddkit.nn.embedder import Embedder
from ddkit.nn.networks import build_network, redraw
from tests.check_gpu import COMPILED, engine_on
from tests.conftest import SMALL_FLAGS, Result
from tests.engine.test_fast_path import INFO, PLAIN, bank, draw, features_and_gradient, model, source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda")


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
    engine = engine_on(CUDA, "dm", arithmetic=COMPILED)
    draws = engine.source.draws
    start: Tensor = draws.normalisation.normalise(draws.real_images)
    own = Engine(bank(start, draws.real_labels.to(CUDA)), source(arithmetic=COMPILED, block=4, device=CUDA), engine.losses)
    for index in range(3):
        found = own.evaluate(index)
        own.bank.update(found.gradients)
        assert float(found.values["dm"]) < 1e-9
    torch.testing.assert_close(own.bank.images.detach(), start, rtol=0, atol=1e-4)


def test_a_run_on_the_gpu_evaluates_and_resumes(cli: Callable[..., Result], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = cli("distill", "--losses", "dm,dkkt", "--device", "cuda", "--out", run, *SMALL_FLAGS)
    assert result.code == 0, result.err
    result = cli("distill", "--resume", "--out", run, "--steps", 4, "--device", "cuda")
    assert result.code == 0, result.err
    assert bool(ddkit.load(run).images.isfinite().all())
