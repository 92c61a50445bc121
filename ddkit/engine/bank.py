"""The synthetic set while it is being optimised: what is stored of its images, extra parameters, their optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ddkit.components.base import Parametrization
from ddkit.components.guard import blamed
from ddkit.components.options import Parameter
from ddkit.errors import InputError
from ddkit.recipes.tables import OptimizerTable


class Bank:
    """Synthetic parameters: `images`, the rows that the parametrization makes images of, and the `parameters` that losses declared.

    `labels` (n,) int64 of the rows are grouped by ascending class. All parameters are leaves that require gradients; those that all
    classes share to make images are among them. `decoded` and `decoded_labels` are the images that losses see, and `rows` and
    parameters per sample are of these. In a run of several processes a bank holds the rows of this one's classes: `size` is the number of
    images in the whole set, `start` that of those before this bank's.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        declared: Mapping[str, Parameter],
        settings: Mapping[str, OptimizerTable],
        *,
        parametrization: Parametrization | None = None,
        shape: tuple[int, int, int] | None = None,
        start: int = 0,
        size: int | None = None,
    ) -> None:
        """`shape` is that of the images that are made; without `parametrization` they are the rows. `start` and `size` count rows.

        `size` None: these are all.
        """
        self.labels = labels
        self.parametrization = parametrization
        self.per_row = 1 if parametrization is None else parametrization.per_row
        self.start = start * self.per_row
        self.size = (len(labels) if size is None else size) * self.per_row
        self.decoded_labels = labels if self.per_row == 1 else labels.repeat_interleave(self.per_row)
        self.host_labels = self.decoded_labels.cpu()
        self._ends = [0, *torch.bincount(self.host_labels).cumsum(0).tolist()]
        self._shape = shape or (0, 0, 0)
        shared = {} if parametrization is None else parametrization.shared(self._shape)
        self.shared = tuple(shared)
        own = {name: Parameter(shape=tuple(value.shape), per="set") for name, value in shared.items()}
        if twice := own.keys() & {*declared, "images"}:
            raise InputError(
                f"The parametrization and a loss both have a parameter '{min(twice)}'. Use another parametrization or another loss."
            )
        self.declared = dict(sorted({**declared, **own}.items()))
        self.images = images.detach().clone().requires_grad_()
        self.parameters = {}
        for name, spec in self.declared.items():
            sides = (len(self.host_labels), *spec.shape) if spec.per == "sample" else spec.shape
            self.parameters[name] = torch.full(sides, spec.init, dtype=images.dtype, device=images.device).requires_grad_()
        for name, value in shared.items():
            self.fill(name, value)
        for name in settings:
            if name not in self.tensors():
                known = ", ".join(self.tensors())
                raise InputError(f"optimizer.{name}: this run has no parameter '{name}'. Its parameters are {known}.", f"optimizer.{name}")
        self.optimizers = {name: self._optimizer(name, tensor, settings) for name, tensor in self.tensors().items()}

    def _optimizer(self, name: str, tensor: Tensor, settings: Mapping[str, OptimizerTable]) -> torch.optim.Optimizer:
        setting = settings.get(name) or self._usual(name)
        rising = name in self.declared and self.declared[name].direction == "max"
        if setting.kind == "sgd":
            return torch.optim.SGD([tensor], lr=setting.lr, momentum=setting.momentum, maximize=rising)
        return torch.optim.Adam([tensor], lr=setting.lr, betas=setting.betas, maximize=rising)

    def _usual(self, name: str) -> OptimizerTable:
        """Returns the optimizer of a parameter that the recipe says nothing of."""
        return OptimizerTable(lr=self.declared[name].lr) if name in self.declared else OptimizerTable()

    def tensors(self) -> dict[str, Tensor]:
        """Returns every optimised tensor by name."""
        return {"images": self.images, **self.parameters}

    def kept(self, name: str) -> list[Tensor]:
        """Returns the tensor of a parameter, and those that its optimizer keeps for it."""
        tensor = self.tensors()[name]
        state = self.optimizers[name].state.get(tensor, {}).values()
        return [tensor, *(value for value in state if isinstance(value, Tensor) and value.ndim)]  # the count of updates is a scalar

    @property
    def stored_numbers(self) -> int:
        """How many numbers the whole set stores of its images, with those that all classes share."""
        rows = self.size // self.per_row * math.prod(self.images.shape[1:])
        return rows + sum(self.parameters[name].numel() for name in self.shared)

    def decoded(self, rows: slice) -> Tensor:
        """Returns the images (n, C, H, W) of `rows`, which are whole classes, as losses see them: normalised."""
        stored = self.images[rows.start // self.per_row : rows.stop // self.per_row]
        if self.parametrization is None:
            return stored
        with blamed("parametrization", self.parametrization):
            return self.parametrization.decode(stored, self._shape, {name: self.parameters[name] for name in self.shared})

    def rows(self, classes: range | None) -> slice:
        """Returns the rows of `classes` (None: all)."""
        if classes is None:
            return slice(0, len(self.host_labels))
        last = len(self._ends) - 1
        return slice(self._ends[min(classes.start, last)], self._ends[min(classes.stop, last)])

    def fill(self, name: str, value: Tensor) -> None:
        """Sets an extra parameter to initial values computed by its loss."""
        with torch.no_grad():
            self.parameters[name].copy_(value)
        self.project()

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Takes one step of each optimizer along `gradients`, then projects onto the constraints."""
        for name, tensor in self.tensors().items():
            tensor.grad = gradients[name]
            try:
                self.optimizers[name].step()
            except RuntimeError as error:
                if "overflow" not in str(error):
                    raise
                tensor.detach().fill_(math.nan)  # torch refuses a step that is larger than float32 holds: it is no finite one
            tensor.grad = None
        self.project()

    def project(self) -> None:
        """Puts every parameter back inside its declared constraint."""
        with torch.no_grad():
            for name, spec in self.declared.items():
                if spec.constraint == "nonnegative":
                    self.parameters[name].clamp_(min=0)
                elif spec.constraint == "simplex":
                    self.parameters[name].copy_(on_simplex(self.parameters[name]))

    def smaller_rate(self, name: str) -> str:
        """Returns the --set that makes the learning rate of a parameter ten times smaller, and at most its default."""
        rate = min(self.optimizers[name].param_groups[0]["lr"] / 10, self._usual(name).lr)
        return f"--set optimizer.{name}.lr={rate:g}"

    def state(self) -> dict[str, Tensor]:
        """Returns copies of all that an exact continuation needs, as tensors by name."""
        state = {f"bank.{name}": tensor for name, tensor in self.tensors().items()} | {"labels": self.labels}
        for name, optimizer in self.optimizers.items():
            for key, value in optimizer.state.get(self.tensors()[name], {}).items():
                if value is not None:
                    state[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        return {key: value.detach().clone() for key, value in state.items()}

    def is_rowwise(self, key: str) -> bool:
        """Whether the tensor `key` of state() has a row for each row or each image of the set."""
        kind, _, name = key.partition(".")
        if kind == "optimizer":
            name, _, kept = name.rpartition(".")
            if kept == "step":
                return False
        elif kind != "bank":
            return key == "labels"
        return name == "images" or (name in self.declared and self.declared[name].per == "sample")

    def own_part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns this bank's rows of the state of a bank of the whole set; raises ValueError where that is none."""
        stored = self.size // self.per_row
        found = dict(state)
        for key, value in state.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{key} has values that are not finite")
            if self.is_rowwise(key):
                if value.ndim == 0 or len(value) not in (stored, self.size):
                    raise ValueError(f"{key} has the shape {tuple(value.shape)}, but the set has {stored} rows")
                first = self.start * len(value) // self.size
                found[key] = value[first : first + len(self.host_labels) * len(value) // self.size]
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from what state() returned; raises KeyError or ValueError where it is that of another bank."""
        kept: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors().items():
            check_like(name, state[f"bank.{name}"], tensor)
            prefix = f"optimizer.{name}."
            kept[name] = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            adam = isinstance(self.optimizers[name], torch.optim.Adam)
            wanted = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
            if kept[name] and kept[name].keys() != wanted:  # before its first step it has none
                raise ValueError(f"{prefix}* are {', '.join(sorted(kept[name]))}, but the optimizer needs {', '.join(sorted(wanted))}")
            for key, value in kept[name].items():
                if key != "step":
                    check_like(prefix + key, value, tensor)
                elif value.numel() != 1 or not value.is_floating_point() or float(value) < 1:
                    raise ValueError(f"{prefix}step is not a number of steps")
        for name, tensor in self.tensors().items():
            with torch.no_grad():
                tensor.copy_(state[f"bank.{name}"])
            own = {key: value.clone() if key == "step" else value.clone().to(tensor.device) for key, value in kept[name].items()}
            self.optimizers[name].state[tensor].clear()
            self.optimizers[name].state[tensor].update(own)


def on_simplex(values: Tensor) -> Tensor:
    """Returns the nearest probabilities (..., K) of values (..., K): at least 0, their sum 1; probabilities are returned unchanged.

    Source: Duchi et al., Efficient Projections onto the l1-Ball, ICML 2008, Figure 1.

    >>> on_simplex(torch.tensor([[0.75, 0.75, -1.0], [0.0, 1.0, 0.0]])).tolist()
    [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]
    """
    falling = values.sort(dim=-1, descending=True).values
    excess = (falling.cumsum(-1) - 1) / torch.arange(1, values.shape[-1] + 1, device=values.device)
    kept = (falling > excess).sum(-1, keepdim=True).clamp_min(1)  # 0 for values that are not finite
    return (values - excess.gather(-1, kept - 1)).clamp_min(0)


def check_like(name: str, value: Tensor, other: Tensor) -> None:
    """Raises ValueError if `value` has another shape or type than `other`."""
    if (value.shape, value.dtype) != (other.shape, other.dtype):
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not {other.dtype} {tuple(other.shape)}")
