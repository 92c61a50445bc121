"""Models of other libraries by name: `torchvision:resnet18`, `timm:resnet18`; made to fit small images, any channels, any classes."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import ddkit

log = logging.getLogger("ddkit")
SMALL = 64  # pixels; below, halving twice before the first block leaves too little
OURS = {  # arguments of the libraries' functions that ddkit gives itself, or that would load weights
    "model_name", "name", "num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
    "cache_dir", "weights", "progress", "features_only", "scriptable", "exportable", "no_jit",
}  # fmt: skip
_TOLD: set[tuple[Any, ...]] = set()


def small_stem(module: nn.Module) -> bool:
    """Makes a first 7x7 convolution of stride 2 one of 3x3 and stride 1, and leaves out the first max pooling; whether there was one.

    As the literature does for CIFAR. Networks that begin in another way stay as they are.
    """
    name, conv = _first(module, nn.Conv2d)
    if conv is None or conv.kernel_size != (7, 7) or conv.stride != (2, 2):
        return False
    _put(module, name, _like(conv, conv.in_channels, kernel_size=3, stride=1, padding=1))
    name, pooling = _first(module, nn.MaxPool2d)
    if pooling is not None:
        _put(module, name, nn.Identity())
    return True


def with_channels(module: nn.Module, channels: int) -> None:
    """Gives the first convolution, where it takes another number of channels, one that takes `channels`."""
    name, conv = _first(module, nn.Conv2d)
    if conv is not None and conv.in_channels != channels:
        _put(module, name, _like(conv, channels, kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding))


def without_dropout(module: nn.Module) -> None:
    """Sets every dropout probability to 0: dropout draws from the global generator, so that no run would repeat."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) or type(layer).__name__ == "StochasticDepth":
            layer.p = 0.0  # type: ignore[assignment]
        elif type(layer).__name__ == "DropPath":
            layer.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(layer, nn.MultiheadAttention):
            layer.dropout = 0.0


def _first(module: nn.Module, kind: type[Any]) -> tuple[str, Any]:
    return next(((name, layer) for name, layer in module.named_modules() if isinstance(layer, kind)), ("", None))


def _like(conv: nn.Conv2d, channels: int, **geometry: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, conv.out_channels, bias=conv.bias is not None, **geometry)


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


class Zoo(ddkit.Model):
    """Base of the models of another library: builds by name, fits to small images, loads weights from a local file if asked."""

    argument = "architecture"
    library: str

    architecture: str = ddkit.option("", "name of the model in the library")
    weights: str | None = ddkit.option(None, "safetensors file with a state dict; if left out, random weights")
    weights_sha256: str | None = ddkit.option(None, "sha256 of the weights file, filled in by ddkit")
    stem: Literal["auto", "small", "original"] = ddkit.option(
        "auto",
        "first layers: small replaces a 7x7/2 convolution by 3x3/1 and removes the max pooling, auto does so for images below 64 pixels",
    )
    kwargs: dict[str, Any] | None = ddkit.option(None, "arguments for the function of the library, e.g. kwargs.patch_size = 4")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.full_name = f"{self.library}:{self.architecture}"
        for key, value in (self.kwargs or {}).items():
            if key in OURS:
                raise ddkit.InputError(
                    f"{self.full_name}: {key} cannot be set, because ddkit sets it. Leave kwargs.{key} out. For weights, use weights = "
                    "FILE."
                )
            if isinstance(value, dict):
                raise ddkit.InputError(f"{self.full_name}: kwargs.{key} is a table, but must be a number, a text, true, false or a list.")
        self._fits: set[tuple[Any, ...]] = set()
        if self.weights is not None:
            self.weights = str(Path(self.weights).absolute())
        names = self.known()
        if not self.architecture:
            raise ddkit.InputError(
                f"{self.library} is a library of models. Name one of its models, for example --model {self.library}:resnet18."
            )
        if self.architecture not in names:
            near = [f"{self.library}:{each}" for each in difflib.get_close_matches(self.architecture, names, 3)]
            hint = f"Did you mean {' or '.join(near)}?" if near else f"For example: {', '.join(names[:8])}."
            raise ddkit.InputError(f"{self.library} has no classifier '{self.architecture}'. {hint}")

    @classmethod
    def resolve(cls, options: Any, data: ddkit.DataInfo) -> Mapping[str, Any]:
        digest = options.weights and hashlib.sha256(_existing(options.weights).read_bytes()).hexdigest()
        if options.weights_sha256 not in (None, digest):
            log.warning("The weights file %s has changed since this was recorded.", options.weights)
        return {"stem": _stem(options.stem, data.size), "weights_sha256": digest}

    def known(self) -> Sequence[str]:
        """Returns the names of the library's classifiers; raises PluginError where it is not installed."""
        raise NotImplementedError

    def build(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        """Returns the library's network with fresh weights, made with `kwargs`."""
        raise NotImplementedError

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        try:
            module = self.build(channels, size, classes)
        except ddkit.DdkitError:
            raise
        except Exception as error:  # the library's own checks of size and channels
            if self.kwargs:
                given = ", ".join(f"{key} = {value}" for key, value in self.kwargs.items())
                raise ddkit.InputError(f"{self.full_name} cannot be made with kwargs {given} ({_reason(error)}).") from error
            raise self._unfit(channels, size, error) from error
        if _stem(self.stem, size) == "small" and small_stem(module):
            self._say(
                (size,),
                f"for {size[0]} x {size[1]} pixels its first convolution is 3x3 with stride 1 instead of 7x7 with stride 2, and the first "
                f"max pooling is left out (--set {self.recipe_path}.stem=original keeps them)",
            )
        without_dropout(module)
        if self.weights is not None:
            self._load(module)
        if (channels, size) not in self._fits:  # whether images of this size get through it
            try:
                with torch.no_grad():
                    module.eval()(torch.zeros(1, channels, *size))
            except Exception as error:
                raise self._unfit(channels, size, error) from error
            module.train()
            self._fits.add((channels, size))
        return module

    def _unfit(self, channels: int, size: tuple[int, int], error: Exception) -> ddkit.InputError:
        return ddkit.InputError(
            f"{self.full_name} does not take images of {channels} x {size[0]} x {size[1]} (channels x height x width): "
            f"{_reason(error)}. ddkit's own convnet, resnet18, vgg11, alexnet and lenet are made for small images."
        )

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        assert self.weights is not None
        path = _existing(self.weights)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ddkit.InputError(f"The weights file {path} cannot be read as safetensors: {' '.join(str(error).split())}.") from None

    def _load(self, module: nn.Module) -> None:
        own = module.state_dict()
        fitting = {key: value for key, value in self._weights.items() if key in own and own[key].shape == value.shape}
        if not fitting:
            raise ddkit.InputError(f"No tensor of the weights file {self.weights} fits {self.full_name}, as names or shapes differ.")
        module.load_state_dict(fitting, strict=False)
        fresh = [key for key in own if key not in fitting]
        if fresh:
            shown = f"{', '.join(fresh[:5])}{' ...' if len(fresh) > 5 else ''}"
            self._say(
                ("weights", *fresh),
                f"{len(fresh)} of {len(own)} tensors are not in the weights file, or have another shape there, so they stay random: "
                f"{shown}",
            )

    def _say(self, key: tuple[Any, ...], what: str) -> None:
        """Warns once in a process."""
        if (self.full_name, *key) not in _TOLD:
            _TOLD.add((self.full_name, *key))
            log.warning("%s: %s.", self.full_name, what)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"


def _existing(weights: str) -> Path:
    path = Path(weights)
    if not path.is_file():
        raise ddkit.InputError(f"The weights file {path.absolute()} does not exist. ddkit downloads no weights.")
    return path


def _stem(stem: str, size: tuple[int, int]) -> str:
    return stem if stem != "auto" else "small" if min(size) < SMALL else "original"


class Torchvision(Zoo):
    """A classifier of torchvision by name, with fresh weights: `torchvision:resnet18`, fitted to small images.

    For images below 64 pixels a first 7x7 convolution of stride 2 becomes 3x3 with stride 1, and the first max pooling is left
    out. Channels and classes are those of the data. Dropout is removed, as it would draw from the global generator. Nothing is
    downloaded.
    """

    library = "torchvision"

    def known(self) -> Sequence[str]:
        from torchvision import models

        return models.list_models(module=models)

    def build(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        from torchvision import models

        name = self.architecture
        extra: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            extra = {"aux_logits": False, "init_weights": True}
        elif name.startswith("vit_"):
            extra = {"image_size": size[0]}
        elif name.startswith("maxvit"):
            extra = {"input_size": size}
        module: nn.Module = models.get_model(name, weights=None, num_classes=classes, **extra | (self.kwargs or {}))
        with_channels(module, channels)
        if not any(isinstance(layer, nn.Linear) for layer in module.modules()):
            module.embed = MethodType(_pooled_features, module)  # type: ignore[assignment]
        return module


def _pooled_features(module: Any, x: Tensor) -> Tensor:
    """Returns the mean over all pixels of what a network that ends in a convolution (SqueezeNet) gives to its classifier, (n, C)."""
    return functional.adaptive_avg_pool2d(module.features(x), 1).flatten(1)


class Timm(Zoo):
    """A classifier of timm by name, with fresh weights: `timm:resnet18`, fitted to small images; needs `pip install 'ddkit[timm]'`.

    For images below 64 pixels a first 7x7 convolution of stride 2 becomes 3x3 with stride 1, and the first max pooling is left
    out. Features are the pre-logits of timm. Nothing is downloaded.
    """

    library = "timm"

    def known(self) -> Sequence[str]:
        names: list[str] = _timm().list_models()
        return names

    def build(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        library, name = _timm(), self.architecture
        fixed = getattr(library.models.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False)
        extra: dict[str, Any] = {"img_size": size} if fixed else {}
        extra |= self.kwargs or {}
        module: nn.Module = library.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **extra)
        module.embed = MethodType(_pre_logits, module)  # type: ignore[assignment]
        return module


def _pre_logits(module: Any, x: Tensor) -> Tensor:
    return module.forward_head(module.forward_features(x), pre_logits=True).flatten(1)


def _timm() -> Any:
    try:
        import timm
        import timm.models
    except ImportError as error:
        raise ddkit.PluginError(
            f"The model 'timm' needs the library timm, which is not installed ({error}): pip install 'ddkit[timm]'. Or use a model of "
            "torchvision, which is installed: --model torchvision:resnet18."
        ) from None
    return timm
