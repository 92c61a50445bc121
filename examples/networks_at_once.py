"""Four ways to train ten networks on a small set, on the CPU: milliseconds of a network and epoch.

    python examples/networks_at_once.py --images 10

"in turn" and "processes" are the evaluator's (`workers`); "vmapped" is torch.func.vmap over stacked networks; "grouped" is one
network whose convolutions have a group for each of the ten. All are compiled, in bfloat16, without augmentation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import ddkit

ddkit.nn.tune_process()  # as the command does, before torch is imported

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call, stack_module_state, vmap  # noqa: E402

NETWORKS, WIDTH = 10, 128
INFO = ddkit.DataInfo(class_names=tuple("0123456789"), channels=3, size=(32, 32))


class Grouped(nn.Module):
    """The standard ConvNet ten times over, as one."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (3, WIDTH, WIDTH):
            convolution = nn.Conv2d(NETWORKS * channels, NETWORKS * WIDTH, 3, padding=1, groups=NETWORKS)
            layers += [convolution, nn.GroupNorm(NETWORKS * WIDTH, NETWORKS * WIDTH), nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.weight = nn.Parameter(torch.randn(NETWORKS, WIDTH * 16, 10) / 45)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x).unflatten(1, (NETWORKS, WIDTH)).transpose(0, 1).flatten(2)
        return torch.bmm(features, self.weight).flatten(0, 1)


def milliseconds(forward: Callable[[], Tensor], parameters: list[Tensor], labels: Tensor) -> float:
    """Returns the time of a step of all networks, divided by their number: the least of twenty."""
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    taken = []
    for _ in range(23):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward()
        nn.functional.cross_entropy(logits.float(), labels.repeat(NETWORKS)).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - began)
    return 1000 * min(taken[3:]) / NETWORKS


def vmapped(x: Tensor, labels: Tensor) -> float:
    model = ddkit.create("model", "convnet", data=INFO)
    networks = [ddkit.nn.build_network(model, INFO, 0, number) for number in range(NETWORKS)]
    stacked = {name: value.detach().requires_grad_() for name, value in stack_module_state(networks)[0].items()}
    forward = torch.compile(lambda parameters: vmap(lambda p: functional_call(networks[0], p, (x,)))(parameters).flatten(0, 1))
    return milliseconds(lambda: forward(stacked), list(stacked.values()), labels)


def grouped(x: Tensor, labels: Tensor) -> float:
    network = Grouped().to(memory_format=torch.channels_last)
    forward, images = torch.compile(network), x.repeat(1, NETWORKS, 1, 1).to(memory_format=torch.channels_last)
    return milliseconds(lambda: forward(images), list(network.parameters()), labels)


def evaluated(x: Tensor, labels: Tensor, workers: int) -> float:
    """Returns the time of a network and epoch in the evaluator: from the second network of each process to the last one."""
    epochs = max(20, 3000 // len(x))
    options = {"protocol": "dc-official", "epochs": epochs, "repeats": NETWORKS, "random_real": False, "compile": "always"}
    artifact = ddkit.Artifact(x, labels, {"class_names": list(INFO.class_names), "mean": [0.5] * 3, "std": [0.25] * 3})
    times: list[float] = []
    data = ddkit.data.EvaluationData(
        info=INFO, test_images=x[:10], test_labels=labels[:10], real_images=x[:0], real_labels=labels[:0], seed=0,
        device=torch.device("cpu"), report=lambda done, total: times.append(time.perf_counter()),
    )  # fmt: skip
    ddkit.create("evaluator", "accuracy", options | {"workers": workers, "precision": "bfloat16"}, data=INFO)(artifact, data, None)
    first = 2 * workers - 1
    return 1000 * (times[-1] - times[first]) / (len(times) - 1 - first) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10)
    count = parser.parse_args().images
    x, labels = torch.rand((count, *INFO.shape), generator=torch.Generator().manual_seed(0)), torch.arange(count) % 10
    found = {"in turn": evaluated(x, labels, 1), "processes": evaluated(x, labels, torch.get_num_threads())}
    found |= {"grouped": grouped(x, labels), "vmapped": vmapped(x, labels)}
    for name, value in found.items():
        print(f"{name:10} {value:7.1f} ms")


if __name__ == "__main__":
    main()
