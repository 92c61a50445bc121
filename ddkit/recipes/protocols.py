"""A protocol: how the networks of an evaluation are trained, and how many, as data. Torch is not imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from ddkit.components.options import Option, check_fields, fields, parse_struct
from ddkit.errors import InputError

Part = Annotated[float, Option(gt=0, lt=1)]


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """How a network is trained: `momentum` is of sgd.

    The rate of "step" is multiplied by `gamma` after half of the epochs, that of "multi-step" after each of `milestones`, fractions of all
    epochs; "cosine" falls to 0 along half a cosine; "one-cycle" warms up over a fifth. `rho` above 0 is sharpness-aware minimisation
    (Foret et al., ICLR 2021): each update takes the gradient at the point that lies rho away from the weights along the gradient of the
    same batch. It needs two passes for each batch. With `ema` above 0 the network ends with an exponential moving average of its weights
    and running statistics, of that decay, in the place of the last ones.

    `mix` is CutMix (Yun et al., ICCV 2019) or MixUp (Zhang et al., ICLR 2018) of torchvision.transforms.v2 on the augmented batch, its
    strength drawn from Beta(mix_alpha, mix_alpha); `mix_share` is the probability that a batch is mixed.

    Examples:
        >>> schedule = ddkit.nn.Schedule(epochs=30, lr=0.1, schedule="cosine", mix="cutmix", mix_share=0.5)
        >>> schedule.momentum, schedule.passes
        (0.9, 1)
    """

    epochs: Annotated[int, Option("passes over the set", ge=1)]
    batch: Annotated[int, Option("images of a batch", ge=1)] = 256
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Option("learning rate, at its highest", gt=0)] = 0.01
    momentum: Annotated[float, Option("of sgd", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Option(ge=0)] = 5e-4
    schedule: Annotated[Literal["one-cycle", "constant", "step", "cosine", "multi-step"], Option("of the learning rate")] = "step"
    milestones: Annotated[tuple[Part, ...], Option("of multi-step: fractions of the epochs after which the rate falls")] = (0.5, 0.75)
    gamma: Annotated[float, Option("of step and multi-step: factor by which the rate falls", gt=0, le=1)] = 0.1
    rho: Annotated[float, Option("of sharpness-aware minimisation; 0: none", ge=0)] = 0.0
    ema: Annotated[float, Option("decay of an average of the weights, which is tested in their place; 0: none", ge=0, lt=1)] = 0.0
    mix: Annotated[Literal["none", "cutmix", "mixup"], Option("mixing of the images of a batch, and of their labels")] = "none"
    mix_alpha: Annotated[float, Option("of the Beta distribution of the strength of mixing", gt=0)] = 1.0
    mix_share: Annotated[float, Option("share of the batches that are mixed", ge=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def passes(self) -> int:
        """Forward and backward passes of a batch."""
        return 2 if self.rho else 1


class Values(Schedule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of a protocol that decide a figure. Every one may be overridden in the table of an evaluator."""

    lr: (
        Annotated[float, Option("learning rate, at its highest; stored: the step_size that the set has learned", gt=0)] | Literal["stored"]
    ) = 0.01  # type: ignore[assignment]
    model: Annotated[str, Option("network, or several separated by commas")] = "convnet"
    augmenter: Annotated[str, Option("augmenter of every batch")] = "dsa"
    augmenter_options: Annotated[dict[str, Any], Option("options of the augmenter")] = {}
    labels: Annotated[
        Literal["auto", "hard", "stored", "teacher"], Option("auto: those stored with the set, or else hard; teacher: its probabilities")
    ] = "auto"
    temperature: Annotated[float, Option("of the teacher's labels", gt=0)] = 1.0
    repeats: Annotated[int, Option("networks", ge=1)] = 5


class ProtocolFile(Values, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of a protocol file; `notes` say by key where a value comes from and why, as `ddkit info` shows it."""

    summary: str = ""
    source: str = ""
    notes: dict[str, str] = {}


class Protocol(Values, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A protocol as a run records it, under its name.

    `usual` has the values that the installed protocol of that name has, where they differ: such a figure is not that protocol's.

    Examples:
        >>> protocol = ddkit.nn.Protocol.of_file({"epochs": 100, "optimizer": "adamw", "lr": 0.001}, "mine")
        >>> protocol.name, protocol.epochs, protocol.schedule
        ('mine', 100, 'step')
    """

    name: str = ""
    source: str = ""
    usual: dict[str, Any] = {}

    @classmethod
    def of_file(cls, raw: Mapping[str, Any], name: str) -> Protocol:
        """Returns the protocol of a file's TOML data; raises InputError naming key and nearest key."""
        try:
            file = parse_struct(ProtocolFile, raw, "", whole="the file")
        except InputError as error:
            raise InputError(f"The protocol {name}: {error}", error.path) from None
        return cls(name=name, source=file.source, **{key: getattr(file, key) for key in fields(Values)})

    def called(self, name: str, usual: Protocol | None) -> Protocol:
        """Returns the same values under a name whose own protocol is `usual`; None: it has no other."""
        pairs = {key: (getattr(self, key), getattr(usual or self, key)) for key in fields(Values)}
        return msgspec.structs.replace(self, name=name, usual={key: its for key, (own, its) in pairs.items() if own != its})
