"""Base classes of the named components: what a plugin author subclasses. Importing this module costs no torch."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec

from ddkit.components.figures import evaluation_table
from ddkit.components.options import Count, Field, Option, Requires, check_fields, declared, options_type, parse_options
from ddkit.errors import InputError
from ddkit.text import counted, few

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

# What components are given is made above this package, so it stands here by name alone: ddkit.Step, ddkit.nn.Teacher, ddkit.Artifact.
Step: TypeAlias = Any
Teacher: TypeAlias = Any
Artifact: TypeAlias = Any

Fraction = Annotated[float, Option(ge=0, le=1)]
Spread = Annotated[float, Option(ge=0)]


class DataInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the data that are known before an image is opened. `size` is (height, width) in pixels.

    Examples:
        >>> info = ddkit.DataInfo(class_names=("cat", "dog"), channels=3, size=(32, 48))
        >>> info.classes, info.shape
        (2, (3, 32, 48))
    """

    class_names: tuple[str, ...]
    channels: Count
    size: tuple[Count, Count]
    mirror: bool = True  # whether a mirrored image is still one of its class

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.size)


class RequiresMethod:
    """A method `requires(self)`: read from an instance it is what the method returns, called once; behind super() it is the method."""

    def __init__(self, method: Callable[[Any], Any]) -> None:
        self.method = method

    def __get__(self, made: Any, owner: type) -> Any:
        if made is None:
            return self
        if inspect.getattr_static(type(made), "requires") is not self:
            return types.MethodType(self.method, made)
        made.__dict__["requires"] = self.method(made)
        return made.__dict__["requires"]


def _taken(kind: type, name: str) -> str:
    """Returns the class of ddkit's that has something else called `name` than a plain value, "" if there is none."""
    for owner in kind.__mro__[1:]:
        value = vars(owner).get(name)
        ours = owner.__module__ == __name__
        if ours and (
            name in ("name", "origin", "advice", "recipe_path", "directory", "requires") or callable(value) or hasattr(value, "__get__")
        ):
            return owner.__name__
    return ""


class Component:
    """Base of every named component. Its options are typed fields of the class, validated before it is built; see ddkit.option.

    `argument` names the option that `NAME:ARGUMENT` sets (`imagefolder:PATH`), or is None. `runs_code` says that this option names
    Python code, which runs from a file only if the user allows it. `requires`, a ddkit.Requires or a method that returns one, is read
    once from each instance. `deviations` maps the name of a check that the component breaks on purpose to the reason. ddkit fills in,
    for messages: `origin`, the distribution and version of a third-party component, `advice`, the command that says more about it, both
    "" for components of ddkit, and `recipe_path`, the place of its table in the recipe (`losses.dm`).
    """

    argument: ClassVar[str | None] = None
    runs_code: ClassVar[bool] = False
    deviations: ClassVar[Mapping[str, str]] = {}
    requires: Any = Requires()
    origin: str = ""
    advice: str = ""
    _left_shared_state: bool = False  # whether it left what all code shares as it was, when it was called first

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name, value in list(vars(cls).items()):
            if isinstance(value, Field) and (owner := _taken(cls, name)):
                raise TypeError(
                    f"{cls.__name__}: the name {name} is taken by ddkit.{owner}. Write {name}_ in the class. In recipes the option is "
                    f"still called {name}."
                )
        if inspect.isfunction(vars(cls).get("requires")):
            cls.requires = RequiresMethod(vars(cls)["requires"])

    def __init__(self, *, name: str | None = None, **options: Any) -> None:
        self.name = name or type(self).__name__
        self.recipe_path = self.name
        values = parse_options(options_type(type(self)), options, self.name, self.name)
        for attribute in declared(type(self)):
            setattr(self, attribute, getattr(values, attribute.removesuffix("_")))

    @property
    def options(self) -> Any:
        """The options as they are recorded: their values now, which __init__ may have changed."""
        attributes = declared(type(self))
        return options_type(type(self))(**{name.removesuffix("_"): getattr(self, name) for name in attributes})

    @classmethod
    def resolve(cls, options: Any, data: DataInfo) -> Mapping[str, Any]:
        """Returns the options that the data decide, by name: those that `options.NAME` leaves open; the resolved recipe records them."""
        return {}

    def nondeterministic(self, device: str) -> str:
        """Returns why its gradients are not the same bit for bit on a `device` ("cpu", "cuda", "mps"), "" if they are the same.

        A run with `engine.deterministic` refuses, before it begins, a component that returns a reason. Without one, torch refuses such
        an operation when it is called.
        """
        return ""


class Loss(Component):
    """A loss: `__call__(step)` returns a finite scalar tensor that depends on the synthetic images.

    It never calls backward, steps an optimizer, seeds globally, prints, or writes to the bank. `order_invariant` declares that the
    order of samples within a class does not matter, which its conformance suite checks.
    """

    order_invariant: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """Returns the value at a step: a finite scalar attached to the graph of `step.images` or of an extra parameter.

        Called once a step, or once for each chunk of classes. It may raise InputError where its options do not fit what the step
        holds; anything else that it raises ends the run with its name.
        """
        raise NotImplementedError

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        """Raises InputError if the network or teacher of the run does not suit the loss. Called before anything is trained.

        Both are untrained, and None if the loss does not require them.
        """

    def expert_draws(self) -> Collection[tuple[int, int, int | None]]:
        """Returns (span, first, last) of each `step.experts.draw` of a run, so that experts with these epochs are trained."""
        return ()

    def initial(self, step: Step) -> Mapping[str, Tensor]:
        """Returns initial values, by name, of declared parameters that depend on the data; {} for the declared values.

        Called once, before the first step of a new run.
        """
        return {}


class InitContext(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs of an initializer. Images are normalised.

    `labels` (n,) are int64 and ascending, `shape` is (C, H, W). `real_images` (m, C, H, W) with `real_labels` (m,) are the accessible
    images, class by class (m = 0 without data). `generator(label)` is the random generator of one class. `class_names` are those of the
    data, in label order. `normalisation` is that of the run, between pixel units and normalised ones. If the initializer requires a
    teacher, `teacher` is that, and `features(images)` returns its features (n, d) of normalised images, without gradients and on the CPU.
    Else both are None.

    Examples:
        >>> class Middle(ddkit.Initializer):
        ...     '''Every class begins with the mean of its real images.'''
        ...     requires = ddkit.Requires(real=True)
        ...     def __call__(self, context: ddkit.InitContext) -> torch.Tensor:
        ...         means = [context.real_images[context.real_labels == label].mean(0) for label in context.labels]
        ...         return torch.stack(means)
    """

    labels: Any
    shape: tuple[int, int, int]
    real_images: Any
    real_labels: Any
    generator: Callable[[int], Any]
    class_names: tuple[str, ...] = ()
    normalisation: Any = None
    teacher: Any = None
    features: Callable[[Any], Any] | None = None


class Initializer(Component):
    """Returns the first synthetic images for labels.

    `requires` may declare `real` images and the `teacher`, whose statistics then normalise the run's images. The images of a class
    depend only on the labels and real images of that class, unless `deviations` names "a-class-does-not-depend-on-others": in a run of
    several processes each of them then opens all accessible images, and keeps its share of the result.
    """

    @property
    def by_class(self) -> bool:
        """Whether a class has the same images if it is made alone."""
        return "a-class-does-not-depend-on-others" not in self.deviations

    def needed(self, ipc: int) -> int:
        """Returns the accessible real images per class that it needs to make `ipc` images; by default 0."""
        return 0

    @property
    def remedy(self) -> str:
        """Advice, besides a larger --pipc, if there are fewer."""
        return "lower --ipc, use --init noise, or --set initializer.reuse=true"

    def check(self, ipc: int, available: Mapping[str, int]) -> None:
        """Raises InputError if the `available` images by class name are too few for `ipc` images. Called before the run.

        By default if a class has fewer than `needed(ipc)`.
        """
        needed = self.needed(ipc)
        short = [f"'{each}' has {count}" for each, count in available.items() if count < needed]
        if short:
            wanted = f"{needed} accessible real images per class to make {counted(ipc, 'image')}"
            raise InputError(f"The initializer '{self.name}' needs {wanted}, but {few(short)}. Raise --pipc, {self.remedy}.", "ipc")

    def __call__(self, start: InitContext) -> Tensor:
        """Returns (n, C, H, W) float32 normalised images, one for each of `start.labels`: finite, and no view of the real ones.

        Called once, before the first step of a new run.
        """
        raise NotImplementedError

    def soft_labels(self, start: InitContext) -> Tensor | None:
        """Returns the initial learned labels, rows (n, K) of float32 in 0..1 for the images of a call with `start`; None for the classes.

        Called after the images were made, if labels are learned and labels.init is auto.
        """
        return None


class Parametrization(Component):
    """Makes the images of a set from stored rows of numbers, which are optimised; each row makes `per_row` images.

    A row depends only on its own images, and an image only on its own row and on the tensors that all classes share. `stores_images`
    declares that rows are images (C, H, W) and that the units of a channel make no difference to encoding and decoding: such a set is
    stored in pixel units unless it is whitened, any other in the units of the run. `linear` declares that the images of an average of rows
    are the average of the images, so that two sets can be blended.
    """

    stores_images: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    @property
    def per_row(self) -> int:
        """The number of images that a row makes."""
        return 1

    def images_per_class(self, ipc: int) -> int:
        """Returns the number of images per class that can be made from the numbers of `ipc` images: a multiple of `per_row`."""
        return ipc * self.per_row

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises InputError if it cannot make images of shape (C, H, W). Called before the run, and when a set is loaded."""

    def shared(self, shape: tuple[int, int, int]) -> Mapping[str, Tensor]:
        """Returns the first values of the tensors that all classes share, by name, float32; they are optimised and stored too."""
        return {}

    def encode(self, images: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Returns the rows (n / per_row, ...) of images (n, C, H, W), normalised: those whose images are nearest, by least squares.

        Called once, with the images of the initializer; a run shows how far the decoded rows are from these.
        """
        raise NotImplementedError

    def decode(self, stored: Tensor, shape: tuple[int, int, int], shared: Mapping[str, Tensor]) -> Tensor:
        """Returns the images (n * per_row, *shape) of the rows `stored` (n, ...), differentiable in the rows and the shared tensors."""
        raise NotImplementedError


class Augmenter(Component):
    """Random, differentiable image augmentation, with separate methods to draw and to apply.

    So the real and synthetic images of a class can share a draw (siamese augmentation). `rowwise` declares that `apply`
    treats every row alone, so that several batches may be augmented in one call.
    """

    rowwise: ClassVar[bool] = False

    def sample(self, generator: Generator, groups: int) -> dict[str, Tensor]:
        """Returns parameters for `groups` groups by name, each tensor of first dimension `groups`, on the CPU.

        Draws from `generator` only. A group is a class in a step, and an image in a training batch.
        """
        raise NotImplementedError

    def sample_batch(self, generator: Generator, rows: int) -> dict[str, Tensor]:
        """Returns parameters per image for a training batch of `rows` images (default: a group per image)."""
        return self.sample(generator, rows)

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns x (n, C, H, W), normalised, augmented: of the same shape and type, differentiable in x.

        Row i uses row i of each parameter tensor. Draws nothing.
        """
        raise NotImplementedError


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One row of an evaluation. Accuracies are fractions; std is the sample standard deviation, None for one repeat.

    An evaluator that trains no network has no accuracy (None), but results in `details`, with a few words under "summary".

    `labels` names the labels that the networks learned: "hard" (the likeliest class), "stored" (the set's own probabilities) or "teacher"
    (the teacher's probabilities of each augmented batch; "soft" is its name in versions up to 0.2).
    `images` names the images that the networks were trained on: "synthetic", or a baseline. Random real is in the row of synthetic.
    `split` names the images that they were tested on: "test" or "held-out" (data.test of the recipe); ddkit fills it in.
    `details["variant"]` lists the changes to the protocol in a few words; rows of different variants are kept side by side.
    `details["cached"]` is the number of networks of the row's baseline that an earlier evaluation had put into the cache.

    `stored_numbers` is the budget of the set: the numbers that it stores per class, without labels, on average. `stored_as_images` is the
    number of images with as many numbers. If classes differ, `details["stored_by_class"]` has the numbers of each. ddkit fills them in for
    rows of the synthetic set. Only compare sets of the same budget.

    Examples:
        >>> row = ddkit.evaluate("my-run", model="mlp", sets={"evaluators.accuracy.epochs": 1, "evaluators.accuracy.repeats": 2})[0]
        >>> row.model, row.protocol, row.repeats, 0 <= row.accuracy_mean <= 1
        ('mlp', 'short', 2, True)
    """

    evaluator: str
    model: str
    protocol: str
    labels: Literal["hard", "stored", "teacher", "soft"]
    repeats: Annotated[int, Option(ge=0)]
    accuracy_mean: Fraction | None
    accuracy_std: Spread | None
    random_real_mean: Fraction | None = None
    random_real_std: Spread | None = None
    details: dict[str, Any] = {}
    images: str = "synthetic"
    split: str = "test"
    stored_numbers: float | None = None
    stored_as_images: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.labels == "soft":
            msgspec.structs.force_setattr(self, "labels", "teacher")

    def _repr_html_(self) -> str:
        """Returns a table of the row, which a notebook shows."""
        return evaluation_table([self], "html")


class EvaluationData(msgspec.Struct, frozen=True, kw_only=True):
    """The real data that an evaluator may use. Images are in pixel units, float32 in 0..1 or uint8.

    `test_images` (t, C, H, W) and `test_labels` (t,) are the test set, or held-out training images. `real_images` (m, C, H, W) and
    `real_labels` (m,) are the accessible training images. `seed` and `device` are those of the run. `report(done, total)` shows progress,
    and `report_part(done, total, part)`, if it is not None, also the part of the next that is done, 0 to 1. `split` names the test images,
    "test" or "held-out". `spread` is None in a run of one process, see shared().

    Examples:
        >>> class Brightness(ddkit.Evaluator):
        ...     '''Mean pixel of the set and of the real images.'''
        ...     def __call__(self, artifact: ddkit.Artifact, data: ddkit.data.EvaluationData) -> list[ddkit.Evaluation]:
        ...         real = ddkit.data.to_unit(data.real_images).mean().item()
        ...         summary = {"summary": f"{artifact.images.mean():.2f}, real {real:.2f}"}
        ...         nothing = {"accuracy_mean": None, "accuracy_std": None, "repeats": 0, "labels": "hard"}
        ...         return [ddkit.Evaluation(evaluator="brightness", model="-", protocol="-", details=summary, **nothing)]
    """

    info: DataInfo
    test_images: Any
    test_labels: Any
    real_images: Any
    real_labels: Any
    seed: int
    device: Any
    report: Callable[[int, int], None]
    split: str = "test"
    spread: Callable[..., list[Any]] | None = None
    report_part: Callable[[int, int, float], None] | None = None

    def shared(self, tasks: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
        """Returns the JSON result of `work(some tasks)` for each task. Each process does a share, and all processes get all results."""
        return list(work(tasks)) if self.spread is None else self.spread(tasks, work)


class Evaluator(Component):
    """Evaluates a synthetic set that was read back from its file.

    In a run of several processes only the first calls it, unless it `shares` its work through EvaluationData.shared.
    """

    shares: ClassVar[bool] = False

    def check(self, info: DataInfo) -> None:
        """Raises DdkitError if the options cannot work with this data. Called before the run, and first by `ddkit evaluate`."""

    def work(self, data: EvaluationData) -> str:
        """Returns a few words about a call with `data`, for the line at its start: "6 networks of convnet, 300 epochs each"."""
        return ""

    def operations(self, info: DataInfo, *, rows: int, real: int, tests: int) -> float:
        """Returns an estimate of its floating-point operations, for `ddkit distill --plan`; 0 if unknown.

        `rows` are the images of the set, `real` the accessible ones, `tests` the test images.
        """
        return 0.0

    def __call__(self, artifact: Artifact, data: EvaluationData, teacher: Teacher | None) -> Sequence[Evaluation]:
        """Returns one row or more; accuracies are fractions in 0..1. `teacher` is None unless it is required, or one was given.

        Called at the end of a run and by `ddkit evaluate`. Every draw is keyed by `data.seed`.
        """
        raise NotImplementedError


class Model(Component):
    """A factory of classifiers: `__call__(channels, size, classes)` returns a freshly initialised nn.Module.

    The module maps (n, C, H, W) to (n, classes) logits. If it has a method `embed(x)`, that returns its features;
    else the features are the input of its last linear layer.
    """

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        """Returns a new network for images (channels, *size), size being (height, width) in pixels.

        Weights come from torch's default generator, which ddkit seeds for this call. Raises InputError where there is no such
        network for that size.
        """
        raise NotImplementedError


class Dataset(Component):
    """Labelled real images in two splits, "train" and "test". Labels are read without opening an image.

    `directory` is the folder of downloaded files; a dataset with `takes_directory = False` gets none. `mirror` declares
    whether a mirrored image has the same class. `resized` counts the images that the dataset itself has resized so far, for a warning.
    `memory_mib`, filled in by ddkit, is the memory for decoded images in MiB. Methods raise InputError if a file is missing or cannot be
    read, or if there is no network.
    """

    takes_directory: ClassVar[bool] = True
    mirror: bool = True
    resized: int = 0
    memory_mib: int = 2048

    def __init__(self, *, name: str | None = None, directory: str | None = None, **options: Any) -> None:
        super().__init__(name=name, **options)
        self.directory = directory

    @property
    def class_names(self) -> Sequence[str]:
        """Class names in label order: at least two, all different."""
        raise NotImplementedError

    def labels(self, split: str) -> Tensor:
        """Returns (n,) int64 labels of a split, in 0..K-1; opens no image."""
        raise NotImplementedError

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor] | Tensor:
        """Returns the images (C, H, W) of `indices` in their order, uint8 or float32 in 0..1, C being 1 or 3; opens no other.

        Floats of a synthetic set may be slightly outside. Sizes and channels may differ. If they do not, the images may be one
        new tensor (n, C, H, W), which saves a copy.
        """
        raise NotImplementedError

    def shapes(self, split: str, indices: Sequence[int]) -> Sequence[tuple[int, int, int]] | None:
        """Returns (C, H, W) of the images at `indices` without decoding them, if all are uint8; else None.

        Called if the images exceed the memory. Without it they are decoded twice, first for their sizes.
        """
        return None

    def grey(self) -> bool:
        """Whether every training image is grey. Called if all accessible images are grey, as the run needs the channels of all.

        By default True.
        """
        return True

    def files(self, split: str, indices: Sequence[int]) -> Sequence[str] | None:
        """Returns the absolute path of each image's file, or None.

        With these paths many decoded images are kept in ddkit's cache, as long as `decoding_key()` and the sizes, times
        and inodes of the files stay the same.
        """
        return None

    def decoding_key(self) -> str:
        """Returns the values, besides the files, that decide the decoded pixels; by default all options."""
        return repr(self.options)

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        """Returns the entries for `indices` in the manifest: file names, or the indices themselves."""
        return list(indices)

    def fingerprint(self) -> str:
        """Returns a key of the content of the training and test splits (a sha256), for the teacher cache."""
        raise NotImplementedError


class Exporter(Component):
    """Writes a synthetic set in a format that other programs read."""

    def __call__(self, artifact: Artifact, folder: str) -> None:
        """Writes one file or more into `folder`, which is there and empty; the same set gives the same bytes.

        Called by `ddkit export`. `artifact.provenance` has the facts about the set from the files of its run. Raises InputError if
        the format cannot store the set.
        """
        raise NotImplementedError
