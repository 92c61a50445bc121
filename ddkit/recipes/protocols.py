"""A protocol: how the networks of an evaluation are trained, and how many, as data. Torch is not imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from ddkit.components.options import Option, check_fields, fields, parse_struct
from ddkit.errors import InputError

Part = Annotated[float, Option(gt=0, lt=1)]


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """How a network is trained. `momentum` is for the optimizer sgd only.

    With the schedule "step" the learning rate is multiplied by `gamma` after half of the epochs, with "multi-step" after each of the
    `milestones` (fractions of all epochs). "cosine" falls to 0 along half a cosine, "one-cycle" warms up for a fifth of the epochs. `rho`
    above 0 is sharpness-aware minimisation (Foret et al., ICLR 2021): each update uses the gradient at the weights moved by rho along the
    gradient of the same batch. It needs two passes per batch. With `ema` above 0 the final network has the exponential moving average of
    the weights and running statistics with that decay, instead of the last ones.

    `mix` applies CutMix (Yun et al., ICCV 2019) or MixUp (Zhang et al., ICLR 2018) of torchvision.transforms.v2 to the augmented batch. Its
    strength is drawn from Beta(mix_alpha, mix_alpha), and `mix_share` is the probability that a batch is mixed.

    Examples:
        >>> schedule = ddkit.nn.Schedule(epochs=30, lr=0.1, schedule="cosine", mix="cutmix", mix_share=0.5)
        >>> schedule.momentum, schedule.passes
        (0.9, 1)
    """

    epochs: Annotated[int, Option("passes over the set", ge=1)]
    batch: Annotated[int, Option("images per batch", ge=1)] = 256
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Option("optimizer of the networks")] = "sgd"
    lr: Annotated[float, Option("highest learning rate", gt=0)] = 0.01
    momentum: Annotated[float, Option("momentum, for the optimizer sgd only", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Option("weight decay", ge=0)] = 5e-4
    schedule: Annotated[Literal["one-cycle", "constant", "step", "cosine", "multi-step"], Option("schedule of the learning rate")] = "step"
    milestones: Annotated[
        tuple[Part, ...], Option("fractions of the epochs after which the learning rate falls, for the schedule multi-step only")
    ] = (0.5, 0.75)
    gamma: Annotated[float, Option("factor by which the learning rate falls, for the schedules step and multi-step only", gt=0, le=1)] = 0.1
    rho: Annotated[float, Option("radius of sharpness-aware minimisation, 0 for none", ge=0)] = 0.0
    ema: Annotated[
        float, Option("decay of the moving average of the weights, which is tested instead of the last weights, 0 for none", ge=0, lt=1)
    ] = 0.0
    mix: Annotated[Literal["none", "cutmix", "mixup"], Option("mixing of the images and labels of a batch")] = "none"
    mix_alpha: Annotated[float, Option("parameter of the Beta distribution from which the strength of mixing is drawn", gt=0)] = 1.0
    mix_share: Annotated[float, Option("share of the batches that are mixed", ge=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Schedule:
        """Returns the schedule in a table that has more, e.g. in a protocol or [train]; of keys that it lacks, the defaults."""
        return cls(**{key: values[key] for key in cls.__struct_fields__ if key in values})

    @property
    def passes(self) -> int:
        """Forward and backward passes of a batch."""
        return 2 if self.rho else 1


class Values(Schedule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of a protocol that decide a figure. Every one may be overridden in the table of an evaluator."""

    lr: (
        Annotated[float, Option("highest learning rate, or stored for the learning rate that was learned with the set", gt=0)]
        | Literal["stored"]
    ) = 0.01  # type: ignore[assignment]
    model: Annotated[str, Option("architecture of the networks, or several separated by commas")] = "convnet"
    augmenter: Annotated[str, Option("augmenter of each batch")] = "dsa"
    augmenter_options: Annotated[dict[str, Any], Option("options of the augmenter")] = {}
    labels: Annotated[
        Literal["auto", "hard", "stored", "teacher"],
        Option(
            "labels that networks learn: hard, stored (with the set), teacher (its probabilities), or auto (stored if the set has "
            "labels, and else hard)"
        ),
    ] = "auto"
    temperature: Annotated[float, Option("temperature of the teacher's labels", gt=0)] = 1.0
    repeats: Annotated[int, Option("number of networks", ge=1)] = 5


class ProtocolFile(Values, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of a protocol file; `notes` say by key where a value comes from and why, as `ddkit info` shows it."""

    summary: str = ""
    source: str = ""
    notes: dict[str, str] = {}


class Protocol(Values, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A protocol with its name, as a run records it.

    `usual` has the values of the installed protocol of that name that differ from these. A figure with other values is marked as such.

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
