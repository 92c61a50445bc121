"""The conformance suites of every kind but losses, which have a module of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from ddkit.components import registry
from ddkit.components.base import Augmenter, DataInfo, Evaluation, EvaluationData, InitContext, Parametrization
from ddkit.components.observers import HOOKS, Observers
from ddkit.data.images import Normalisation
from ddkit.nn.embedder import embed, features_of
from ddkit.nn.networks import build_network
from ddkit.recipes.tables import parse_recipe
from ddkit.run.artifact import Artifact
from ddkit.seeding import generator
from ddkit.testing.suite import Broken, Conformance, ShapeConformance, changed, check, info_of, noise, repeated
from ddkit.testing.world import CPU, untrained_teacher


class InitializerConformance(ShapeConformance):
    """Checks of an initializer."""

    kind = "initializer"

    def start(
        self, shape: tuple[int, int, int] = (1, 8, 8), rows: Sequence[int] = (2, 2, 2), real: Sequence[int] = (3, 4, 3)
    ) -> InitContext:
        """Returns what an initializer sees; without real images, and without a teacher, where it does not require them."""
        requires = self.make().requires
        real = real if requires.real else [0] * len(real)
        half = [0.5] * shape[0]
        teacher = untrained_teacher(info_of(shape, len(rows))) if requires.teacher else None
        return InitContext(
            labels=torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)), shape=shape,
            real_images=noise((sum(real), *shape), "real"), real_labels=torch.arange(len(real)).repeat_interleave(torch.tensor(real)),
            generator=lambda label: generator(0, "conformance", "class", label), class_names=info_of(shape, len(rows)).class_names,
            normalisation=Normalisation(half, half), teacher=teacher,
            features=None if teacher is None else lambda images: features_of(teacher.module, images),
        )  # fmt: skip

    def _made(self, start: InitContext) -> Tensor:
        images = self.make()(start)
        wanted = (len(start.labels), *start.shape)
        if not isinstance(images, Tensor) or tuple(images.shape) != wanted or images.dtype != torch.float32:
            what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else repr(images)
            raise Broken(f"The initializer '{self.label}' returns {what}, but must return float32 images of shape {wanted}.")
        if not bool(images.isfinite().all()):
            raise Broken(f"The initializer '{self.label}' returns images that are not finite.")
        return images

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._made(self.start(shape))

    @check
    def test_one_image_a_class(self) -> None:
        """It works with one image per class."""
        self._made(self.start(rows=(1, 1, 1)))

    @check
    def test_unbalanced_classes(self) -> None:
        """It works where classes have different numbers of images."""
        self._made(self.start(rows=(1, 3, 2), real=(5, 4, 2)))

    @check
    def test_same_seed_same_images(self) -> None:
        """The images are a function of the seed: draws come from `start.generator(label)`."""
        if not torch.equal(*repeated(lambda: self._made(self.start()))):
            raise Broken(
                f"The initializer '{self.label}' returns different images for the same seed. Draw from start.generator(label) only."
            )

    @check
    def test_a_class_does_not_depend_on_others(self) -> None:
        """A class that is made alone gets the same images, bit for bit."""
        start = self.start()
        rows, real = start.labels == 1, start.real_labels == 1
        alone = msgspec.structs.replace(
            start, labels=start.labels[rows], real_images=start.real_images[real], real_labels=start.real_labels[real]
        )
        if not torch.equal(self._made(start)[rows], self._made(alone)):
            raise Broken(
                f"The initializer '{self.label}' returns different images for a class that is made alone. Draw from start.generator(label)."
            )

    @check
    def test_inputs_are_unchanged(self) -> None:
        """Labels and real images are as before, also after the result is written to, and so is all global state."""
        start = self.start()
        tensors = {"labels": start.labels, "real images": start.real_images, "real labels": start.real_labels}
        with self.leaves(tensors, ", or returns a view of them. Return a copy"):
            self._made(start).add_(1)  # as an optimizer will


class ParametrizationConformance(ShapeConformance):
    """Checks of a parametrization. Images of its suite are of 12 x 12 pixels, and of 12 x 18."""

    kind = "parametrization"
    one, three, oblong = (1, 12, 12), (3, 12, 12), (3, 12, 18)

    def _encoded(self, shape: tuple[int, int, int] = (3, 12, 12), rows: int = 2) -> tuple[Parametrization, Tensor, dict[str, Tensor]]:
        """Returns the parametrization, rows that it makes of noise, and what all classes share."""
        makes: Parametrization = self.make(info_of(shape))
        makes.check(shape)
        shared = dict(makes.shared(shape))
        return makes, makes.encode(noise((rows * makes.per_row, *shape), "images"), shared), shared

    def holds_for(self, shape: tuple[int, int, int], rows: int = 2) -> None:
        makes, stored, shared = self._encoded(shape, rows)
        made, wanted = makes.decode(stored, shape, shared), (rows * makes.per_row, *shape)
        if len(stored) != rows or tuple(made.shape) != wanted or made.dtype != torch.float32 or not bool(made.isfinite().all()):
            found = f"{len(stored)} rows of {wanted[0]} images, and from these {tuple(made.shape)} {made.dtype}"
            raise Broken(f"The parametrization '{self.label}' makes {found}, but must make {rows} rows, and finite float32 {wanted}.")

    @check
    def test_one_row(self) -> None:
        """It works with a single row."""
        self.holds_for((1, 12, 12), rows=1)

    @check
    def test_it_keeps_to_the_budget(self) -> None:
        """The rows of a class have at most as many numbers as ipc images, and `images_per_class` is a multiple of `per_row`."""
        makes, stored, _ = self._encoded()
        count = makes.images_per_class(12)
        numbers = count // makes.per_row * stored[0].numel()
        if count < 1 or count % makes.per_row or numbers > 12 * 3 * 12 * 12:
            raise Broken(
                f"The parametrization '{self.label}' stores {numbers} numbers for {count} images, but 12 images have only {12 * 432}."
            )

    @check
    def test_a_row_depends_on_its_own_images_only(self) -> None:
        """A row that is encoded or decoded alone is the same as among others."""
        makes, stored, shared = self._encoded(rows=3)
        each, images = makes.per_row, noise((3 * makes.per_row, 3, 12, 12), "images")
        alone = makes.encode(images[each : 2 * each], shared)
        made = makes.decode(stored, (3, 12, 12), shared)
        if not torch.allclose(alone, stored[1:2], atol=1e-5) or not torch.allclose(
            makes.decode(stored[1:2], (3, 12, 12), shared), made[each : 2 * each], atol=1e-5
        ):
            raise Broken(
                f"The parametrization '{self.label}' gives a row or its images different values if other rows are present, so chunks "
                "would differ."
            )

    @check
    def test_encodes_near_images(self) -> None:
        """The images of the rows are nearer to those that were encoded than grey is."""
        makes, stored, shared = self._encoded()
        images = noise((2 * makes.per_row, 3, 12, 12), "images")
        far, grey = (float((images - other).square().mean()) for other in (makes.decode(stored, (3, 12, 12), shared), 0 * images))
        if far > grey:
            raise Broken(
                f"The parametrization '{self.label}' encodes images badly: the error is {far:.2f}, and {grey:.2f} for grey images."
            )

    @check
    def test_flags_as_declared(self) -> None:
        """`linear`: averages of rows make averages of images; `stores_images`: rows are images, and units of a channel do not matter."""
        makes, stored, shared = self._encoded()
        shape, other = (3, 12, 12), noise(tuple(stored.shape), "other rows")
        one, two = (makes.decode(each, shape, shared) for each in (stored, other))
        if makes.linear and not torch.allclose(makes.decode((stored + other) / 2, shape, shared), (one + two) / 2, atol=1e-5):
            raise Broken(
                f"The parametrization '{self.label}' declares linear, but the average of two rows does not make the average of their "
                "images."
            )
        if makes.stores_images and (
            tuple(stored.shape[1:]) != shape
            or not torch.allclose(makes.decode(stored * 0.3 + 0.5, shape, shared), one * 0.3 + 0.5, atol=1e-5)
        ):
            raise Broken(
                f"The parametrization '{self.label}' declares stores_images, but its rows are not images, or they change with the units "
                "of a channel."
            )

    @check
    def test_gradients_reach_every_number(self) -> None:
        """A finite gradient, not zero, reaches every stored number and what all classes share."""
        makes, stored, shared = self._encoded()
        leaves = [each.detach().clone().requires_grad_() for each in (stored, *shared.values())]
        made = makes.decode(leaves[0], (3, 12, 12), dict(zip(shared, leaves[1:], strict=True)))
        found = torch.autograd.grad((made * noise(tuple(made.shape), "gradient")).sum(), leaves, allow_unused=True)
        if any(each is None or not bool(each.isfinite().all()) or not bool(each.all()) for each in found):
            raise Broken(
                f"The parametrization '{self.label}' stores numbers that its images do not depend on, or has gradients that are not finite."
            )

    @check
    def test_inputs_are_unchanged(self) -> None:
        """Images, rows and what is shared are as before, and so is all global state."""
        makes, stored, shared = self._encoded()
        images = noise((2 * makes.per_row, 3, 12, 12), "images")
        with self.leaves({"images": images, "rows": stored, **shared}):
            makes.encode(images, shared)
            makes.decode(stored, (3, 12, 12), shared)


class AugmenterConformance(ShapeConformance):
    """Checks of an augmenter."""

    kind = "augmenter"

    def _drawn(self, shape: tuple[int, int, int] = (3, 8, 8), rows: int = 5) -> tuple[Augmenter, Tensor, dict[str, Tensor]]:
        """Returns the augmenter, images, and parameters for each of them."""
        augmenter: Augmenter = self.make(info_of(shape))
        return augmenter, noise((rows, *shape), "augmented"), augmenter.sample(generator(0, "conformance", "draw"), rows)

    def holds_for(self, shape: tuple[int, int, int], rows: int = 5) -> None:
        augmenter, x, drawn = self._drawn(shape, rows)
        found = augmenter.apply(x, drawn)
        if tuple(found.shape) != tuple(x.shape) or found.dtype != x.dtype or not bool(found.isfinite().all()):
            raise Broken(
                f"The augmenter '{self.label}' makes {tuple(found.shape)} from {tuple(x.shape)}, another type, or values that are not "
                "finite."
            )

    @check
    def test_one_image(self) -> None:
        """It works with a single image."""
        self.holds_for((1, 8, 8), rows=1)

    @check
    def test_parameters_have_a_row_each(self) -> None:
        """`sample` and `sample_batch` give tensors with a row for each group or image."""
        augmenter: Augmenter = self.make(info_of())
        for name, drawn in (("sample", augmenter.sample), ("sample_batch", augmenter.sample_batch)):
            for key, value in drawn(generator(0, "conformance", "draw"), 4).items():
                if not isinstance(value, Tensor) or len(value) != 4:
                    raise Broken(f"{name} of the augmenter '{self.label}' returns '{key}' without one row for each of 4 groups.")

    @check
    def test_same_seed_same_draw(self) -> None:
        """A draw is a function of the generator that is passed."""
        if changed(*repeated(lambda: self._drawn()[2])):
            raise Broken(
                f"The augmenter '{self.label}' draws different numbers from the same generator. Use only the generator that is passed to "
                "it."
            )

    @check
    def test_a_row_depends_on_its_own_parameters_only(self) -> None:
        """Row i of the result depends only on row i of the images and of the parameters, for every i."""
        augmenter, x, drawn = self._drawn()
        turned = torch.tensor([3, 1, 4, 0, 2])
        one = augmenter.apply(x, drawn)[turned]
        two = augmenter.apply(x[turned], {key: value[turned] for key, value in drawn.items()})
        if not torch.allclose(one, two, atol=1e-6):
            raise Broken(f"The augmenter '{self.label}' changes the result of a row that is moved. Row i must use row i of each parameter.")

    @check
    def test_rowwise_as_declared(self) -> None:
        """With `rowwise = True`, two batches in one call have the same result as in two calls."""
        augmenter, x, _ = self._drawn(rows=6)
        if not augmenter.rowwise:
            return
        batches = [augmenter.sample_batch(generator(0, "conformance", str(i)), 3) for i in range(2)]
        apart = torch.cat([augmenter.apply(part, drawn) for part, drawn in zip(x.split(3), batches, strict=True)])
        together = augmenter.apply(x, {key: torch.cat([drawn[key] for drawn in batches]) for key in batches[0]})
        if not torch.allclose(apart, together, atol=1e-6):
            raise Broken(f"The augmenter '{self.label}' declares rowwise, but gives two batches another result if they are in one call.")

    @check
    def test_gradients_pass(self) -> None:
        """A finite gradient, not zero, passes to the images."""
        augmenter, x, drawn = self._drawn((1, 8, 8), rows=8)
        (gradient,) = torch.autograd.grad(augmenter.apply(x.requires_grad_(), drawn).square().sum(), x, allow_unused=True)
        if gradient is None or not bool(gradient.any()) or not bool(gradient.isfinite().all()):
            raise Broken(f"No finite gradient passes through the augmenter '{self.label}': it must be differentiable in the images.")

    @check
    def test_inputs_are_unchanged(self) -> None:
        """Images and parameters are as before, and so is all global state: `apply` draws nothing."""
        augmenter, x, drawn = self._drawn()
        with self.leaves({"images": x, **drawn}):
            augmenter.apply(x, drawn)


class EvaluatorConformance(ShapeConformance):
    """Checks of an evaluator; give it `options` that make it quick."""

    kind = "evaluator"
    oblong = (3, 8, 12)

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._evaluated(*self._inputs(shape))

    def _inputs(self, shape: tuple[int, int, int] = (1, 8, 8)) -> tuple[Artifact, EvaluationData]:
        info = info_of(shape)
        labels = torch.arange(3)
        artifact = Artifact(
            torch.rand((3, *shape), generator=generator(0, "conformance", "set")), labels,
            {"class_names": list(info.class_names), "mean": [0.5] * shape[0], "std": [0.25] * shape[0], "ipc": 1, "pipc": 2, "seed": 0},
        )  # fmt: skip
        data = EvaluationData(
            info=info, test_images=torch.rand((9, *shape), generator=generator(0, "test")), test_labels=labels.repeat(3),
            real_images=torch.rand((6, *shape), generator=generator(0, "real")), real_labels=labels.repeat_interleave(2), seed=0,
            device=CPU, report=lambda done, total: None,
        )  # fmt: skip
        return artifact, data

    def _evaluated(self, artifact: Artifact, data: EvaluationData) -> Sequence[Evaluation]:
        evaluator = self.make(data.info)
        evaluator.check(data.info)
        rows: Sequence[Evaluation] = evaluator(artifact, data, untrained_teacher(data.info) if evaluator.requires.teacher else None)
        return rows

    @check
    def test_returns_rows_of_fractions(self) -> None:
        """It returns one `ddkit.Evaluation` or more, which take accuracies in 0..1 and hard or soft labels alone."""
        rows = self._evaluated(*self._inputs())
        if not rows or not all(isinstance(row, Evaluation) for row in rows):
            raise Broken(f"The evaluator '{self.label}' returns {rows!r}, but must return at least one ddkit.Evaluation.")

    @check
    def test_same_seed_same_result(self) -> None:
        """The accuracies are a function of set, data and seed."""
        one, two = repeated(lambda: [row.accuracy_mean for row in self._evaluated(*self._inputs())])
        if one != two:
            raise Broken(f"The evaluator '{self.label}' returns another accuracy for the same set and seed.")

    @check
    def test_inputs_are_unchanged(self) -> None:
        """The set and the real data are as before, and so is all global state."""
        artifact, data = self._inputs()
        tensors = {"set": artifact.images, "labels": artifact.labels, "test images": data.test_images, "real images": data.real_images}
        with self.leaves(tensors):
            self._evaluated(artifact, data)


class ModelConformance(ShapeConformance):
    """Checks of a model."""

    kind = "model"
    three, oblong = (3, 32, 32), (3, 16, 24)

    def _network(self, shape: tuple[int, int, int] = (1, 8, 8), purpose: str = "network") -> nn.Module:
        info = info_of(shape)
        return build_network(self.make(info), info, 0, purpose)

    def holds_for(self, shape: tuple[int, int, int], rows: int = 2) -> None:
        found = self._network(shape).eval()(noise((rows, *shape), "x").requires_grad_())
        if not isinstance(found, Tensor) or tuple(found.shape) != (rows, 3) or not bool(found.isfinite().all()):
            raise Broken(f"A network of the model '{self.label}' does not map {(rows, *shape)} to finite logits of shape {(rows, 3)}.")

    @check
    def test_one_image(self) -> None:
        """A network maps a single image to finite logits."""
        self.holds_for((1, 8, 8), rows=1)

    @check
    def test_draws_its_weights_from_the_default_generator(self) -> None:
        """The same state of torch's default generator gives the same weights, another state others."""
        states = [self._network(purpose=purpose).state_dict() for purpose in ("one", "one", "two")]
        if changed(states[0], states[1]):
            raise Broken(f"The model '{self.label}' makes other weights from the same state of torch's default generator.")
        if states[0] and not changed(states[0], states[2]):
            raise Broken(f"The model '{self.label}' makes the same weights in every call, but each network must be a new draw.")

    @check
    def test_features_have_a_row_an_image(self) -> None:
        """The features, those of `embed` or the input of the last linear layer, have shape (n, d)."""
        features = embed(self._network().eval(), noise((3, 1, 8, 8), "x"))
        if features.ndim != 2 or len(features) != 3:
            raise Broken(f"The features of the model '{self.label}' have shape {tuple(features.shape)}, not (3, d).")

    @check
    def test_gradients_reach_images_and_parameters(self) -> None:
        """The logits depend on the images and on every parameter."""
        network, x = self._network(), noise((2, 1, 8, 8), "x").requires_grad_()
        parts = torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()], allow_unused=True)
        if any(part is None for part in parts):
            raise Broken(f"The logits of the model '{self.label}' do not depend on all parameters, or not on the images.")

    @check
    def test_state_survives_save_and_load(self) -> None:
        """A state dict carries everything: a network that loads it gives the same logits."""
        one, two = (self._network(purpose=purpose).eval() for purpose in ("one", "two"))
        two.load_state_dict(one.state_dict())
        x = noise((2, 1, 8, 8), "x")
        if not torch.equal(one(x), two(x)):
            raise Broken(f"A network of the model '{self.label}' changes if its state dict is saved and loaded. Register every tensor.")


class DatasetConformance(Conformance):
    """Checks of a dataset. `component` may carry an argument, as in "imagefolder:PATH"."""

    kind = "dataset"
    most: ClassVar[int] = 20  # images that are opened
    directory: ClassVar[str | None] = None  # of datasets that download

    def make(self, info: DataInfo | None = None, **arguments: Any) -> Any:
        return super().make(info, directory=self.directory, **arguments)

    def prepare(self) -> None:
        self.make().labels("train")

    @check
    def test_labels_fit_the_class_names(self) -> None:
        """At least two class names, all different; labels (n,) int64 that fit them; every class has a training image."""
        dataset = self.make()
        names = list(dataset.class_names)
        if len(names) < 2 or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise Broken(f"The dataset '{self.label}' has the class names {names[:5]}, but needs at least two different names.")
        for split in ("train", "test"):
            labels = dataset.labels(split)
            if labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
                raise Broken(f"The labels of the dataset '{self.label}', split {split}, must be (n,) int64 with n at least 1.")
            if int(labels.min()) < 0 or int(labels.max()) >= len(names):
                raise Broken(f"The labels of the dataset '{self.label}', split {split}, are not all in 0..{len(names) - 1}.")
        if set(dataset.labels("train").tolist()) != set(range(len(names))):
            raise Broken(f"The dataset '{self.label}' has a class without a training image.")

    @check
    def test_images_are_of_the_documented_kind(self) -> None:
        """Images are (1 or 3, H, W), uint8 or float32 in 0..1, one for each index, in both splits."""
        dataset = self.make()
        for split in ("train", "test"):
            indices = list(range(min(self.most, len(dataset.labels(split)))))
            images = dataset.images(split, indices)
            if len(images) != len(indices):
                raise Broken(f"The dataset '{self.label}' returns {len(images)} images for {len(indices)} indices of the split {split}.")
            for image in images:
                if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype not in (torch.uint8, torch.float32):
                    found = f"{tuple(image.shape)} {image.dtype}"
                    raise Broken(f"An image of the dataset '{self.label}' is {found}, but must be (1 or 3, H, W) uint8 or float32.")
                if image.dtype == torch.float32 and not bool(((image >= 0) & (image <= 1)).all()):
                    raise Broken(f"A float image of the dataset '{self.label}' has values outside 0..1.")

    @check
    def test_images_come_in_the_order_asked_for(self) -> None:
        """Images come in the order of the indices."""
        dataset = self.make()
        indices = list(range(min(3, len(dataset.labels("train")))))
        forward, backward = dataset.images("train", indices), dataset.images("train", indices[::-1])
        if not all(torch.equal(one, other) for one, other in zip(forward, list(backward)[::-1], strict=True)):
            raise Broken(f"The dataset '{self.label}' does not return images in the order of the indices.")

    @check
    def test_the_same_every_time(self) -> None:
        """Opened again it has the same labels and the same fingerprint."""
        one, two = self.make(), self.make()
        same = [torch.equal(one.labels(split), two.labels(split)) for split in ("train", "test")]
        if one.fingerprint() != two.fingerprint() or not all(same):
            raise Broken(f"The dataset '{self.label}' has other labels or another fingerprint if it is opened again.")

    @check
    def test_sources_name_every_image(self) -> None:
        """`sources` gives one name an image, all different."""
        found = self.make().sources("train", [1, 0])
        if len(found) != 2 or len(set(found)) != 2:
            raise Broken(f"The dataset '{self.label}' returns the sources {found} for two images.")

    @check
    def test_files_are_there(self) -> None:
        """`files` gives the absolute path of a file for each image, in order, or None."""
        found = self.make().files("train", [1, 0])
        if found is not None and (len(found) != 2 or not all(Path(file).is_absolute() and Path(file).is_file() for file in found)):
            raise Broken(
                f"The dataset '{self.label}' returns the files {found} for two images, but each must be the absolute path of a file."
            )

    @check
    def test_global_random_state_is_untouched(self) -> None:
        """Opening it and reading images changes no global state."""
        self.make().images("train", [0])
        with self.leaves({}):
            dataset = self.make()
            dataset.labels("train")
            dataset.images("train", [0])


class ExporterConformance(Conformance):
    """Checks of an exporter."""

    kind = "exporter"

    def _set(self) -> Artifact:
        images = torch.rand((3, 3, 8, 8), generator=generator(0, "conformance", "set"))
        metadata = {"class_names": ["a", "b c", "ü"], "mean": [0.5] * 3, "std": [0.25] * 3, "ipc": 1}
        return Artifact(images, torch.arange(3), metadata)

    def _written(self, artifact: Artifact) -> dict[str, bytes]:
        """Returns the files that are written for a set, by path."""
        with tempfile.TemporaryDirectory() as folder:
            self.make()(artifact, folder)
            return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

    @check
    def test_writes_into_the_folder_and_changes_nothing(self) -> None:
        """At least one file is written into the folder, and neither the set nor global state is changed."""
        artifact = self._set()
        with self.leaves({"the images": artifact.images, "the labels": artifact.labels}):
            files = self._written(artifact)
        if not files:
            raise Broken(f"The exporter '{self.label}' has written no file into its folder.")

    @check
    def test_same_set_same_files(self) -> None:
        """The same set gives the same bytes."""
        if self._written(self._set()) != self._written(self._set()):
            raise Broken(f"The exporter '{self.label}' writes other bytes for the same set.")


class ObserverConformance(Conformance):
    """Checks of an observer: a module or object whose functions carry `@ddkit.hookimpl`."""

    kind = "observer"

    @property
    def label(self) -> str:
        return self.component if isinstance(self.component, str) else getattr(self.component, "__name__", repr(self.component))

    def make(self, info: DataInfo | None = None, **arguments: Any) -> Any:
        return registry.load("observer", self.component) if isinstance(self.component, str) else self.component

    def found(self) -> Any:
        return self.make()

    @check
    def test_is_of_its_kind(self) -> None:
        """It has at least one hook: a function of a hook's name, marked `@ddkit.hookimpl`, with arguments that the hook has."""
        observers = Observers([("checked", self.make())])
        if not any(observers.has(hook) for hook in HOOKS):
            raise Broken(f"The observer '{self.label}' has no hook: mark at least one of {', '.join(HOOKS)} with @ddkit.hookimpl.")

    test_options_survive_a_recipe = None  # type: ignore[assignment]  # an observer has no options

    @check
    def test_every_hook_can_be_called(self) -> None:
        """Each of its hooks takes what a run passes, also a record that is None, and raises nothing."""
        record = {"step": 0, "total": 1.0, "losses": {"dm": {"raw": 1.0, "weighted": 1.0}}, "seconds": 0.1}
        row = Evaluation(
            evaluator="accuracy", model="convnet", protocol="short", labels="hard", repeats=1, accuracy_mean=0.5, accuracy_std=None
        )
        images, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
        with tempfile.TemporaryDirectory() as folder:
            call = Observers([("checked", self.make())], strict=True).call
            call("run_started", recipe=parse_recipe({"losses": {"dm": {}}}), path=Path(folder), start=0)
            call("step_finished", index=0, steps=2, record=record)
            call("step_finished", index=1, steps=2, record=None)
            call("checkpoint_written", index=2, images=images, labels=labels, class_names=["a", "b", "c"])
            call("stage_started", stage="teacher", text="Training a teacher (convnet, 3 epochs on 12 images)", done=0, total=3)
            call("stage_progress", stage="teacher", done=1, total=3, part=0.0, values={"training accuracy": 0.5})
            call("stage_started", stage="evaluation", text="Evaluating: accuracy", done=0, total=0)
            call("stage_progress", stage="evaluation", done=1, total=3, part=0.5, values={})
            call("run_finished", path=Path(folder), evaluations=[row])
