"""Base classes of the named components: what a plugin author subclasses. Importing this module costs no torch."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec

from ddkit.components.options import Count, Field, Option, Requires, check_fields, declared, options_type, parse_options
from ddkit.errors import InputError, counted

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

# What components are given is made above this package, so it stands here by name alone: ddkit.Step, ddkit.nn.Teacher, ddkit.Artifact.
Step: TypeAlias = Any
Teacher: TypeAlias = Any
Artifact: TypeAlias = Any

Fraction = Annotated[float, Option(ge=0, le=1)]
Spread = Annotated[float, Option(ge=0)]


class DataInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the data before an image is used: `size` is (height, width) in pixels.

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

    `argument` names the option that `NAME:ARGUMENT` sets (`imagefolder:PATH`), None where there is none. `runs_code` says that this
    option names Python code, which a file may not have run unless the user allows it. `requires`, a ddkit.Requires or a method that
    returns one, is read once from each instance. `deviations` maps a check of the conformance suite that the component does not pass, on
    purpose, to the reason. ddkit fills in, for messages: `origin`, the distribution and version of a third party's component, and `advice`,
    the command that tells more of it, both "" for ddkit's own; `recipe_path`, the place of its table in the recipe (`losses.dm`).
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
                raise TypeError(f"{cls.__name__}: ddkit.{owner} has {name} already. Write {name}_; the option is still called {name}.")
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
        """Returns what keeps its gradients from being the same bit for bit on a `device` ("cpu", "cuda", "mps"), "" where nothing does.

        A run with `engine.deterministic` refuses, before it begins, a component that returns something. What a component does not
        tell, torch does when it gets there.
        """
        return ""


class Loss(Component):
    """A loss: `__call__(step)` returns a finite scalar attached to the graph of the synthetic set.

    It never calls backward, steps an optimizer, seeds globally, prints, or writes to the bank. `order_invariant` says that the
    order of samples within a class does not matter to it: a claim that its conformance suite checks.
    """

    order_invariant: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """Returns the value at a step: a finite scalar attached to the graph of `step.images` or of an extra parameter.

        Called once a step, or once for each chunk of classes. It may raise InputError where its options do not fit what the step
        holds; anything else that it raises ends the run with its name.
        """
        raise NotImplementedError

    def check(self, *, network: nn.Module | None, teacher: nn.Module | None) -> None:
        """Raises InputError where networks, or a teacher, of the run's kind do not suit it. Called before anything is trained.

        Both are untrained, and None if the loss does not require them.
        """

    def expert_draws(self) -> Collection[tuple[int, int, int | None]]:
        """Returns (span, first, last) of each `step.experts.draw` of a run, so that experts without these epochs are never trained."""
        return ()

    def initial(self, step: Step) -> Mapping[str, Tensor]:
        """Returns initial values, by name, of declared parameters that depend on the data ({}: those declared).

        Called once, before the first step of a new run.
        """
        return {}


class InitContext(msgspec.Struct, frozen=True, kw_only=True):
    """What an initializer sees. Images are normalised.

    labels: (n,) int64, ascending; shape: (C, H, W); real_images: (m, C, H, W) and real_labels: (m,), the accessible
    images, class by class (m = 0 without data); generator(label): the random generator of one class; class_names: of the
    data, in label order; normalisation: the run's, between pixel units and normalised ones. Where the initializer
    requires a teacher, teacher is that, and features(images) gives its features (n, d) of normalised images, without
    gradients and on the CPU; elsewhere both are None.

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

    `requires` may ask for `real` images and for the `teacher`, whose statistics then normalise the run's images. The images of a class
    depend on that class's labels and real images alone, unless `deviations` names "a-class-does-not-depend-on-others": in a run of
    several processes each then opens all accessible images, and keeps its share of the result.
    """

    @property
    def by_class(self) -> bool:
        """Whether a class that is made alone gets the same images."""
        return "a-class-does-not-depend-on-others" not in self.deviations

    def needed(self, ipc: int) -> int:
        """Returns how many accessible real images of each class it needs for `ipc` of them; by default none."""
        return 0

    @property
    def remedy(self) -> str:
        """What else helps where there are fewer, beside a larger --pipc."""
        return "lower --ipc, use --init noise, or --set initializer.reuse=true"

    def check(self, ipc: int, available: Mapping[str, int]) -> None:
        """Raises InputError where `available` images per class name cannot give `ipc` a class. Called before the run.

        By default where a class has fewer than `needed(ipc)`.
        """
        needed = self.needed(ipc)
        short = [f"'{each}' has {count}" for each, count in available.items() if count < needed]
        if short:
            wanted = f"{needed} accessible images a class for {counted(ipc, 'image')}"
            told = f"{', '.join(short[:5])}{f' and {len(short) - 5} more have too few' if len(short) > 5 else ''}"
            raise InputError(f"Initializer '{self.name}' needs {wanted}, but {told}. Raise --pipc, {self.remedy}.", "ipc")

    def __call__(self, start: InitContext) -> Tensor:
        """Returns (n, C, H, W) float32 normalised images, one for each of `start.labels`: finite, and no view of the real ones.

        Called once, before the first step of a new run.
        """
        raise NotImplementedError

    def soft_labels(self, start: InitContext) -> Tensor | None:
        """Returns what learned labels begin as, rows (n, K) of float32 in 0..1 for the images of a call with `start`; None: their classes.

        Called after the images were made, if labels are learned and labels.init is auto.
        """
        return None


class Parametrization(Component):
    """Makes the images of a set from what the set stores: rows of numbers, which are optimised, each of which gives `per_row` images.

    A row depends on its own images alone, and an image on its own row and on the tensors that all classes share. `stores_images` says
    that rows are images (C, H, W) and that it makes no difference in which units a channel is encoded and decoded: such a set is stored
    in pixel units unless it is whitened, any other in the units of the run. `linear` says that the images of an average of rows are the
    average of the images, so that two sets can be blended.
    """

    stores_images: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    @property
    def per_row(self) -> int:
        """The number of images that a row gives."""
        return 1

    def images_per_class(self, ipc: int) -> int:
        """Returns how many images of a class are made of at most the numbers of `ipc` images: a multiple of `per_row`."""
        return ipc * self.per_row

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises InputError if there are no such images of shape (C, H, W). Called before the run, and when a set is loaded."""

    def shared(self, shape: tuple[int, int, int]) -> Mapping[str, Tensor]:
        """Returns the first values of the tensors that all classes share, by name, float32; they are optimised and stored too."""
        return {}

    def encode(self, images: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Returns the rows (n / per_row, ...) of images (n, C, H, W), normalised: those whose images are nearest, by least squares.

        Called once, with what the initializer made; a run tells how far the images of the rows are from these.
        """
        raise NotImplementedError

    def decode(self, stored: Tensor, shape: tuple[int, int, int], shared: Mapping[str, Tensor]) -> Tensor:
        """Returns the images (n * per_row, *shape) of the rows `stored` (n, ...), differentiable in the rows and in what is shared."""
        raise NotImplementedError


class Augmenter(Component):
    """Random, differentiable image augmentation whose draw and application are apart.

    So a draw can be shared by a class's real and synthetic images (siamese augmentation). `rowwise` says that apply
    treats every row alone, so that several batches may be augmented in one call.
    """

    rowwise: ClassVar[bool] = False

    def sample(self, generator: Generator, groups: int) -> dict[str, Tensor]:
        """Returns parameters for `groups` groups by name, each tensor of first dimension `groups`, on the CPU.

        Draws from `generator` alone. A group is a class in a step, an image in a training batch.
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

    An evaluator that trains no network has no accuracy (None), and tells in `details`, under "summary" in a few words.

    `labels` says whose labels the networks learned: "hard" (the likeliest class), "stored" (the set's own probabilities) or "teacher" (what
    it says of each augmented batch; "soft" is its name in versions up to 0.2).
    `images` names what the networks were trained on: "synthetic", or a baseline; random real stands beside synthetic.
    `split` names what they were tested on: "test" or "held-out" (data.test of the recipe); ddkit fills it in.
    `details["variant"]` says in a few words what differs from the protocol; rows of another variant stand beside each other.
    `details["cached"]` says how many networks of the row's baseline came from the cache, where an earlier evaluation had put them.

    `stored_numbers` is the budget of the set: the numbers that it stores for a class, without labels, on average; `stored_as_images`, how
    many images of this size have as many. If classes differ, `details["stored_by_class"]` has the numbers of each. ddkit fills them in, for
    rows of the synthetic set; compare sets of the same budget alone.

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


class EvaluationData(msgspec.Struct, frozen=True, kw_only=True):
    """The real data an evaluator may use. Images are in pixel units, float32 in 0..1 or uint8.

    test_images (t, C, H, W), test_labels (t,): the test set, or held-out training images in its place; real_images
    (m, C, H, W), real_labels (m,): the accessible training images. `seed` is the run's; `device` where to compute;
    `report(done, total)` shows progress, `report_part(done, total, part)`, if there is one, also how much of the next is done, 0 to 1;
    `split` names what the test images are, "test" or "held-out". `spread` is None in a run of one process; see shared().

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
        """Returns what `work(some tasks)` gives for each task, JSON data: of several processes each does a share, and all get all."""
        return list(work(tasks)) if self.spread is None else self.spread(tasks, work)


class Evaluator(Component):
    """Judges a synthetic set as it was read back from its file.

    In a run of several processes the first alone calls it, unless it `shares` its work through EvaluationData.shared.
    """

    shares: ClassVar[bool] = False

    def check(self, info: DataInfo) -> None:
        """Raises DdkitError where the options cannot work with this data. Called before the run, and by `ddkit evaluate` first."""

    def work(self, data: EvaluationData) -> str:
        """Returns what a call with `data` will do, in a few words for the line at its start: "6 networks of convnet, 300 epochs each"."""
        return ""

    def operations(self, info: DataInfo, *, rows: int, real: int, tests: int) -> float:
        """Returns about how many floating-point operations it takes, for `ddkit distill --plan`; 0 where it does not tell.

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

    The module maps (n, C, H, W) to (n, classes) logits. Where it has a method `embed(x)`, that gives its features;
    elsewhere the input of its last linear layer does.
    """

    def __call__(self, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        """Returns a new network for images (channels, *size), size being (height, width) in pixels.

        Weights come from torch's default generator, which ddkit seeds for this call. Raises InputError where there is no such
        network for that size.
        """
        raise NotImplementedError


class Dataset(Component):
    """Labelled real images in two splits, "train" and "test"; labels are had without opening an image.

    `directory` is where a dataset that downloads keeps its files; one that says `takes_directory = False` is given none. `mirror` says
    whether a mirrored image keeps its class. `resized` counts the images that the dataset itself has resized so far, for ddkit to tell.
    `memory_mib`, which ddkit fills in, is what decoded images may take. Methods raise InputError where a file is missing or cannot be
    read, or there is no network.
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

        Floats of a synthetic set may lie a little outside. Sizes and channels may differ. Where they do not, they may be one
        new tensor (n, C, H, W), which saves a copy.
        """
        raise NotImplementedError

    def shapes(self, split: str, indices: Sequence[int]) -> Sequence[tuple[int, int, int]] | None:
        """Returns (C, H, W) of each of `indices` as `images` gives it, without decoding it, where all are uint8; else None.

        Asked for more images than memory may hold: without it they are decoded twice, first to learn their sizes.
        """
        return None

    def grey(self) -> bool:
        """Whether every training image is grey; asked if all accessible ones are, so that these alone do not decide a run's channels.

        By default True: then they do.
        """
        return True

    def files(self, split: str, indices: Sequence[int]) -> Sequence[str] | None:
        """Returns the absolute path of each image's file, or None.

        With it the decoded images, if they are many, are kept in ddkit's cache for as long as `decoding_key()` and the files' sizes, times
        and inodes stay the same.
        """
        return None

    def decoding_key(self) -> str:
        """Returns what decides the decoded pixels besides the files; by default all options."""
        return repr(self.options)

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        """Returns what the manifest lists for `indices`: file names, or the indices themselves."""
        return list(indices)

    def fingerprint(self) -> str:
        """Returns a key of the content of the training and test splits (a sha256), for the teacher cache."""
        raise NotImplementedError


class Exporter(Component):
    """Writes a synthetic set in a format that others read."""

    def __call__(self, artifact: Artifact, folder: str) -> None:
        """Writes one file or more into `folder`, which is there and empty; the same set gives the same bytes.

        Called by `ddkit export`; `artifact.provenance` has what the files of a run tell of the set. Raises InputError where the
        format cannot hold the set.
        """
        raise NotImplementedError
