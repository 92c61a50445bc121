"""The conformance suites of initializers, augmenters, evaluators, models, datasets, exporters and observers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddkit import plugins
from ddkit.artifact import Artifact
from ddkit.components import Augmenter, DataInfo, Evaluation, EvaluationData, Start
from ddkit.hookspecs import HOOKS, Observers
from ddkit.networks import build_network, embed
from ddkit.randomness import generator
from ddkit.teacher import Teacher
from ddkit.testing.suite import Broken, Conformance, ShapeConformance, changed, check, copies, global_state_is_kept
from ddkit.testing.world import CPU


def info_of(shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3) -> DataInfo:
    return DataInfo(class_names=tuple(f"class {i}" for i in range(classes)), channels=shape[0], size=shape[1:])


def _images(shape: tuple[int, ...], *purpose: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, "conformance", *purpose))


class InitializerConformance(ShapeConformance):
    """Checks of an initializer."""

    kind = "initializer"

    def start(self, shape: tuple[int, int, int] = (1, 8, 8), rows: Sequence[int] = (2, 2, 2), real: Sequence[int] = (3, 4, 3)) -> Start:
        """Returns what an initializer sees; without real images where it does not require them."""
        real = real if self.make().requires.real else [0] * len(real)
        return Start(
            labels=torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)), shape=shape,
            real_images=_images((sum(real), *shape), "real"), real_labels=torch.arange(len(real)).repeat_interleave(torch.tensor(real)),
            generator=lambda label: generator(0, "conformance", "class", label),
        )  # fmt: skip

    def _made(self, start: Start) -> Tensor:
        images = self.make()(start)
        wanted = (len(start.labels), *start.shape)
        if not isinstance(images, Tensor) or tuple(images.shape) != wanted or images.dtype != torch.float32:
            what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else repr(images)
            raise Broken(f"The initializer '{self.label}' returns {what}; it has to be float32 images of shape {wanted}.")
        if not bool(images.isfinite().all()):
            raise Broken(f"The initializer '{self.label}' returns images that are not finite.")
        return images

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._made(self.start(shape))

    @check
    def test_one_image_a_class(self) -> None:
        self._made(self.start(rows=(1, 1, 1)))

    @check
    def test_unbalanced_classes(self) -> None:
        self._made(self.start(rows=(1, 3, 2), real=(5, 4, 2)))

    @check
    def test_same_seed_same_images(self) -> None:
        torch.manual_seed(1)
        one = self._made(self.start())
        torch.manual_seed(2)
        if not torch.equal(one, self._made(self.start())):
            raise Broken(f"The initializer '{self.label}' gives other images for the same seed. Draw from start.generator(label) only.")

    @check
    def test_a_class_does_not_depend_on_others(self) -> None:
        start = self.start()
        whole = self._made(start)
        rows, real = start.labels == 1, start.real_labels == 1
        alone = Start(
            labels=start.labels[rows], shape=start.shape, real_images=start.real_images[real], real_labels=start.real_labels[real],
            generator=start.generator,
        )  # fmt: skip
        if not torch.equal(whole[rows], self._made(alone)):
            raise Broken(
                f"The initializer '{self.label}' gives a class other images when it is made alone: draw from start.generator(label)."
            )

    @check
    def test_inputs_are_unchanged(self) -> None:
        start = self.start()
        tensors = {"labels": start.labels, "real images": start.real_images, "real labels": start.real_labels}
        before = copies(tensors)
        with global_state_is_kept(f"The initializer '{self.label}'"):
            images = self._made(start)
        images.add_(1)  # as an optimizer will
        moved = changed(before, tensors)
        if moved:
            raise Broken(f"The initializer '{self.label}' changes {', '.join(moved)}, or returns a view of them: return a copy.")


class AugmenterConformance(ShapeConformance):
    """Checks of an augmenter."""

    kind = "augmenter"

    def _applied(self, shape: tuple[int, int, int], rows: int = 5) -> Tensor:
        augmenter: Augmenter = self.make(info_of(shape))
        x = _images((rows, *shape), "augmented")
        found = augmenter.apply(x, augmenter.sample(generator(0, "conformance", "draw"), rows))
        if tuple(found.shape) != tuple(x.shape) or found.dtype != x.dtype or not bool(found.isfinite().all()):
            raise Broken(
                f"The augmenter '{self.label}' makes {tuple(found.shape)} of {tuple(x.shape)}, another type, or values not finite."
            )
        return found

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._applied(shape)

    @check
    def test_one_image(self) -> None:
        self._applied((1, 8, 8), rows=1)

    @check
    def test_parameters_have_a_row_each(self) -> None:
        augmenter: Augmenter = self.make(info_of())
        for name, drawn in (("sample", augmenter.sample), ("sample_batch", augmenter.sample_batch)):
            for key, value in drawn(generator(0, "conformance", "draw"), 4).items():
                if not isinstance(value, Tensor) or len(value) != 4:
                    raise Broken(f"{name} of the augmenter '{self.label}' gives '{key}' without a row for each of 4 groups.")

    @check
    def test_same_seed_same_draw(self) -> None:
        augmenter: Augmenter = self.make(info_of())
        draws = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            draws.append(augmenter.sample(generator(0, "conformance", "draw"), 4))
        if changed(draws[0], draws[1]):
            raise Broken(f"The augmenter '{self.label}' draws otherwise from the same generator. Use the generator that it is given.")

    @check
    def test_a_row_depends_on_its_own_parameters_only(self) -> None:
        augmenter: Augmenter = self.make(info_of((3, 8, 8)))
        x = _images((5, 3, 8, 8), "augmented")
        drawn = augmenter.sample(generator(0, "conformance", "draw"), 5)
        turned = torch.tensor([3, 1, 4, 0, 2])
        one = augmenter.apply(x, drawn)[turned]
        two = augmenter.apply(x[turned], {key: value[turned] for key, value in drawn.items()})
        if not torch.allclose(one, two, atol=1e-6):
            raise Broken(f"The augmenter '{self.label}' gives a row another result in another place: row i uses row i of each parameter.")

    @check
    def test_rowwise_as_declared(self) -> None:
        augmenter: Augmenter = self.make(info_of((3, 8, 8)))
        if not augmenter.rowwise:
            return
        x = _images((6, 3, 8, 8), "augmented")
        batches = [augmenter.sample_batch(generator(0, "conformance", str(i)), 3) for i in range(2)]
        apart = torch.cat([augmenter.apply(part, drawn) for part, drawn in zip(x.split(3), batches, strict=True)])
        together = augmenter.apply(x, {key: torch.cat([drawn[key] for drawn in batches]) for key in batches[0]})
        if not torch.allclose(apart, together, atol=1e-6):
            raise Broken(f"The augmenter '{self.label}' says rowwise and treats two batches otherwise in one call.")

    @check
    def test_gradients_pass(self) -> None:
        augmenter: Augmenter = self.make(info_of((1, 8, 8)))
        x = _images((8, 1, 8, 8), "augmented").requires_grad_()
        found = augmenter.apply(x, augmenter.sample(generator(0, "conformance", "draw"), 8))
        (gradient,) = torch.autograd.grad(found.square().sum(), x, allow_unused=True)
        if gradient is None or not bool(gradient.any()) or not bool(gradient.isfinite().all()):
            raise Broken(f"No finite gradient passes through the augmenter '{self.label}': it has to be differentiable in the images.")

    @check
    def test_inputs_are_unchanged(self) -> None:
        augmenter: Augmenter = self.make(info_of())
        x, drawn = _images((4, 1, 8, 8), "augmented"), augmenter.sample(generator(0, "conformance", "draw"), 4)
        tensors = {"images": x, **drawn}
        before = copies(tensors)
        with global_state_is_kept(f"The augmenter '{self.label}'"):
            augmenter.apply(x, drawn)
        if changed(before, tensors):
            raise Broken(f"The augmenter '{self.label}' changes its input: {', '.join(changed(before, tensors))}.")


class EvaluatorConformance(ShapeConformance):
    """Checks of an evaluator; give it `options` that make it quick."""

    kind = "evaluator"
    oblong = (3, 8, 12)

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._evaluated(shape)

    def _evaluated(self, shape: tuple[int, int, int] = (1, 8, 8)) -> tuple[Sequence[Evaluation], dict[str, Tensor]]:
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
        evaluator = self.make(info)
        evaluator.check(info)
        module = build_network(plugins.create("model", "convnet", {"width": 4}, data=info), info, 0, "conformance")
        teacher = Teacher(module, mean=(0.5,) * shape[0], std=(0.25,) * shape[0]) if evaluator.requires.teacher else None
        tensors = {"set": artifact.images, "labels": artifact.labels, "test images": data.test_images, "real images": data.real_images}
        return evaluator(artifact, data, teacher), tensors

    @check
    def test_returns_rows_of_fractions(self) -> None:
        rows, _ = self._evaluated()
        if not rows or not all(isinstance(row, Evaluation) for row in rows):
            raise Broken(f"The evaluator '{self.label}' returns {rows!r}; it has to be at least one ddkit.Evaluation.")
        for row in rows:
            for value in (row.accuracy_mean, row.random_real_mean):
                if value is not None and not 0 <= value <= 1:
                    raise Broken(f"The evaluator '{self.label}' gives an accuracy of {value}; accuracies are fractions of 1.")
            if row.labels not in ("hard", "soft"):
                raise Broken(f"The evaluator '{self.label}' gives labels = {row.labels!r}; it is 'hard' or 'soft'.")

    @check
    def test_same_seed_same_result(self) -> None:
        torch.manual_seed(1)
        one, _ = self._evaluated()
        torch.manual_seed(2)
        two, _ = self._evaluated()
        if [row.accuracy_mean for row in one] != [row.accuracy_mean for row in two]:
            raise Broken(f"The evaluator '{self.label}' gives another accuracy for the same set and seed.")

    @check
    def test_inputs_are_unchanged(self) -> None:
        with global_state_is_kept(f"The evaluator '{self.label}'"):
            _, tensors = self._evaluated()
        _, fresh = self._evaluated()
        if changed(copies(fresh), tensors):
            raise Broken(f"The evaluator '{self.label}' changes {', '.join(changed(copies(fresh), tensors))}.")


class ModelConformance(ShapeConformance):
    """Checks of a model."""

    kind = "model"
    three, oblong = (3, 32, 32), (3, 16, 24)

    def holds_for(self, shape: tuple[int, int, int]) -> None:
        self._logits(shape)

    def _network(self, shape: tuple[int, int, int], purpose: str = "network") -> nn.Module:
        info = info_of(shape)
        return build_network(self.make(info), info, 0, purpose)

    def _logits(self, shape: tuple[int, int, int], rows: int = 2) -> Tensor:
        found = self._network(shape).eval()(_images((rows, *shape), "x").requires_grad_())
        if not isinstance(found, Tensor) or tuple(found.shape) != (rows, 3) or not bool(found.isfinite().all()):
            raise Broken(f"A network of the model '{self.label}' does not map {(rows, *shape)} to finite logits of shape {(rows, 3)}.")
        return found

    @check
    def test_one_image(self) -> None:
        self._logits((1, 8, 8), rows=1)

    @check
    def test_draws_its_weights_from_the_default_generator(self) -> None:
        states = [self._network((1, 8, 8), purpose).state_dict() for purpose in ("one", "one", "two")]
        if changed(states[0], states[1]):
            raise Broken(f"The model '{self.label}' gives other weights for the same state of torch's default generator.")
        if states[0] and not changed(states[0], states[2]):
            raise Broken(f"The model '{self.label}' gives the same weights for every draw; each network has to be a fresh one.")

    @check
    def test_features_have_a_row_an_image(self) -> None:
        features = embed(self._network((1, 8, 8)).eval(), _images((3, 1, 8, 8), "x"))
        if features.ndim != 2 or len(features) != 3:
            raise Broken(f"The features of the model '{self.label}' have shape {tuple(features.shape)}, not (3, d).")

    @check
    def test_gradients_reach_images_and_parameters(self) -> None:
        network, x = self._network((1, 8, 8)), _images((2, 1, 8, 8), "x").requires_grad_()
        wanted = [x, *network.parameters()]
        parts = torch.autograd.grad(network(x).square().sum(), wanted, allow_unused=True)
        if parts[0] is None or any(part is None for part in parts[1:]):
            raise Broken(f"A network of the model '{self.label}' has parameters, or an input, that its logits do not depend on.")

    @check
    def test_state_survives_save_and_load(self) -> None:
        one, two = self._network((1, 8, 8), "one").eval(), self._network((1, 8, 8), "two").eval()
        two.load_state_dict(one.state_dict())
        x = _images((2, 1, 8, 8), "x")
        if not torch.equal(one(x), two(x)):
            raise Broken(f"A network of the model '{self.label}' is another one after its state dict was loaded: register every tensor.")


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
        dataset = self.make()
        names = list(dataset.class_names)
        if len(names) < 2 or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise Broken(f"The dataset '{self.label}' has the class names {names[:5]}; they have to be at least two different words.")
        for split in ("train", "test"):
            labels = dataset.labels(split)
            if labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
                raise Broken(f"The labels of the dataset '{self.label}', split {split}, have to be (n,) int64, n at least 1.")
            if int(labels.min()) < 0 or int(labels.max()) >= len(names):
                raise Broken(f"The labels of the dataset '{self.label}', split {split}, are not all in 0..{len(names) - 1}.")
        if set(dataset.labels("train").tolist()) != set(range(len(names))):
            raise Broken(f"The dataset '{self.label}' has a class without a training image.")

    @check
    def test_images_are_of_the_documented_kind(self) -> None:
        for split in ("train", "test"):
            self._check_images(split)

    def _check_images(self, split: str) -> None:
        dataset = self.make()
        indices = list(range(min(self.most, len(dataset.labels(split)))))
        images = dataset.images(split, indices)
        if len(images) != len(indices):
            raise Broken(f"The dataset '{self.label}' gives {len(images)} images for {len(indices)} indices, split {split}.")
        for image in images:
            if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype not in (torch.uint8, torch.float32):
                raise Broken(
                    f"An image of the dataset '{self.label}' is {tuple(image.shape)} {image.dtype}, not (1 or 3, H, W) uint8 or float32."
                )
            if image.dtype == torch.float32 and not bool(((image >= 0) & (image <= 1)).all()):
                raise Broken(f"A float image of the dataset '{self.label}' has values outside 0..1.")

    @check
    def test_images_come_in_the_order_asked_for(self) -> None:
        dataset = self.make()
        count = min(3, len(dataset.labels("train")))
        forward = dataset.images("train", list(range(count)))
        backward = dataset.images("train", list(range(count))[::-1])
        if not all(torch.equal(one, other) for one, other in zip(forward, list(backward)[::-1], strict=True)):
            raise Broken(f"The dataset '{self.label}' does not give images in the order of the indices.")

    @check
    def test_the_same_every_time(self) -> None:
        one, two = self.make(), self.make()
        same = [torch.equal(one.labels(split), two.labels(split)) for split in ("train", "test")]
        if one.fingerprint() != two.fingerprint() or not all(same):
            raise Broken(f"The dataset '{self.label}' is another one when it is opened again (labels or fingerprint).")

    @check
    def test_sources_name_every_image(self) -> None:
        dataset = self.make()
        found = dataset.sources("train", [1, 0])
        if len(found) != 2 or len(set(found)) != 2:
            raise Broken(f"The dataset '{self.label}' gives the sources {found} for two images.")

    @check
    def test_global_random_state_is_untouched(self) -> None:
        self.make().images("train", [0])
        with global_state_is_kept(f"The dataset '{self.label}'"):
            dataset = self.make()
            dataset.labels("train")
            dataset.images("train", [0])


class ExporterConformance(Conformance):
    """Checks of an exporter."""

    kind = "exporter"

    def _set(self) -> Artifact:
        images = torch.rand((3, 3, 8, 8), generator=generator(0, "conformance", "set"))
        metadata: Mapping[str, Any] = {"class_names": ["a", "b c", "ü"], "mean": [0.5] * 3, "std": [0.25] * 3, "ipc": 1}
        return Artifact(images, torch.arange(3), dict(metadata))

    @check
    def test_writes_into_the_folder_and_changes_nothing(self) -> None:
        found = self._set()
        tensors = {"images": found.images, "labels": found.labels}
        before = copies(tensors)
        with tempfile.TemporaryDirectory() as folder, global_state_is_kept(f"The exporter '{self.label}'"):
            self.make()(found, folder)
            if not any(path.is_file() for path in Path(folder).rglob("*")):
                raise Broken(f"The exporter '{self.label}' wrote no file into the folder that it was given.")
        if changed(before, tensors):
            raise Broken(f"The exporter '{self.label}' changes the set.")

    @check
    def test_same_set_same_files(self) -> None:
        written = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                self.make()(self._set(), folder)
                written.append({str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()})
        if written[0] != written[1]:
            raise Broken(f"The exporter '{self.label}' writes other bytes for the same set.")


class ObserverConformance(Conformance):
    """Checks of an observer: a module or object whose functions carry `@ddkit.hookimpl`."""

    kind = "observer"

    @property
    def label(self) -> str:
        return self.component if isinstance(self.component, str) else getattr(self.component, "__name__", repr(self.component))

    def make(self, info: DataInfo | None = None, **arguments: Any) -> Any:
        return plugins.load("observer", self.component) if isinstance(self.component, str) else self.component

    @check
    def test_is_of_its_kind_and_api(self) -> None:
        observers = Observers([("checked", self.make())])
        if not any(observers.has(hook) for hook in HOOKS):
            raise Broken(f"The observer '{self.label}' has no hook: mark at least one of {', '.join(HOOKS)} with @ddkit.hookimpl.")

    @check
    def test_options_survive_a_recipe(self) -> None:
        """Observers have no options."""

    @check
    def test_every_hook_can_be_called(self) -> None:
        from ddkit.recipe import parse_recipe

        observer = self.make()
        record = {"step": 0, "total": 1.0, "losses": {"dm": {"raw": 1.0, "weighted": 1.0}}, "seconds": 0.1}
        row = Evaluation(
            evaluator="accuracy", model="convnet", protocol="short", labels="hard", repeats=1, accuracy_mean=0.5, accuracy_std=None
        )
        with tempfile.TemporaryDirectory() as folder:
            observers = Observers([("checked", observer)], strict=True)
            observers.call("run_started", recipe=parse_recipe({"losses": {"dm": {}}}), path=Path(folder), start=0)
            observers.call("step_finished", index=0, steps=2, record=record)
            observers.call("step_finished", index=1, steps=2, record=None)
            observers.call(
                "checkpoint_written", index=2, images=torch.rand(3, 1, 8, 8), labels=torch.arange(3), class_names=["a", "b", "c"]
            )
            observers.call("stage_progress", stage="evaluation", done=1, total=3)
            observers.call("run_finished", path=Path(folder), evaluations=[row])
