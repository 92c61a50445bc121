"""Evaluators: `accuracy`, under the protocols of the field's public code."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec
import torch

import ddkit
from ddkit_evaluators.cached import CachedAccuracies
from ddkit_evaluators.trainer import MOST_CONFUSED, Result, SoftLabels, Task, Trainer, augmenter_of, fields_of, real_counts, trained_in_turn
from ddkit_evaluators.workers import threads_of, trained_apart

log = logging.getLogger("ddkit")
Labels = Literal["hard", "stored", "teacher"]


# The keys of a protocol that decide a figure, in the order of the words for what is changed; each is an option of the evaluator too.
KEYS = [key for key in ddkit.nn.Protocol.__struct_fields__ if key not in ("name", "source", "usual")]


class Plan(NamedTuple):
    """How networks are computed, in how many processes at a time, and in how many threads a process trains them; 0: all it has."""

    arithmetic: ddkit.nn.Arithmetic
    workers: int
    threads: int = 0


# On 2 CPU cores, two processes of one thread each train small batches faster than one of two threads, and larger ones hardly
# (docs/explanation/performance.md). A process costs some seconds and some hundred MiB.
SMALL_BATCH, FEW_NETWORKS, MOST_WORKERS = 64, 4, 4
# Operations of a step below which threads wait for one another more than they work, if the code is not compiled: 10 images of 32 pixels or
# 100 of 8 pixels and convnet's 128 channels are 4e9 and 3e9. On a busy machine two threads then take 5 to 19 times as long as one.
SMALL_STEP = 5e9
UNEVEN = 1.5  # how many times as many test images a class has as another, for the accuracy to be told class by class


@ddkit.overriding(ddkit.nn.Protocol, KEYS, "if left out, as in the protocol")
class Accuracy(ddkit.Evaluator):
    """Test accuracy, after the last epoch, of networks trained on the set, and of networks trained on random real images.

    The protocol "short" is dm-official with 300 instead of 1,000 epochs and 3 instead of 20 networks. It is for a first look, not for a
    comparison with published figures. Each row names the labels that networks learned: hard, stored (with the set), or the teacher's
    probabilities of each augmented batch. If the networks of the set learn the teacher's labels, those of random real and baselines do too.
    Else they learn hard labels. With the teacher's labels, networks are trained one after another in one process.
    """

    shares = True

    protocol: str | ddkit.nn.Protocol = ddkit.option(
        "short", "name or file of the protocol, which says how networks are trained and tested"
    )
    model_options: dict[str, Any] = ddkit.option(
        dict(), "options for all models that have them; a table with a model's name has options for that model only"
    )
    augmenter: str | None = ddkit.option(None, "augmenter of each batch; if left out, as in the protocol")
    augmenter_options: dict[str, Any] | None = ddkit.option(
        None, "options of the augmenter; if left out, as in the protocol, and none for another augmenter"
    )
    labels: Literal["auto", "hard", "stored", "teacher", "soft", "both"] | None = ddkit.option(
        None,
        "labels that networks learn: hard, stored (with the set), teacher (also called soft), both (a row for hard, a row for teacher), "
        "or auto (stored if the set has labels, and else hard); if left out, as in the protocol",
    )
    synthetic: bool = ddkit.option(True, "whether the set is evaluated; if false, only the baselines are")
    random_real: bool = ddkit.option(True, "whether random real images are evaluated too")
    baselines: tuple[Literal["pipc-real", "class-mean"], ...] = ddkit.option(
        (), "further rows: pipc-real for all accessible real images, class-mean for means of real images"
    )
    augment: str = ddkit.option("auto", "older name of the option augmenter, or auto for that option")
    precision: Literal["auto", "float32", "bfloat16"] = ddkit.option("auto", "precision of compiled networks")
    compile: Literal["auto", "always", "never"] = ddkit.option(
        "auto", "whether networks are compiled, or auto to compile only if it saves time"
    )
    workers: int | Literal["auto"] = ddkit.option("auto", "number of processes that train networks at the same time", ge=1)
    cache: bool = ddkit.option(True, "whether accuracies of random real images and baselines from earlier evaluations are used again")

    def requires(self) -> ddkit.Requires:
        needed = stored_with_a_set(lr=self.training.lr, labels=self._labels)
        return ddkit.Requires(teacher=self._labels in ("teacher", "soft", "both"), real=not self.synthetic, parameters=needed)

    @cached_property
    def own(self) -> ddkit.nn.Protocol:
        """The protocol as it is, without the options that override it."""
        return ddkit.nn.read_protocol(self.protocol) if isinstance(self.protocol, str) else self.protocol

    @cached_property
    def training(self) -> ddkit.nn.Protocol:
        """The protocol with the options that override it."""
        given = {key: getattr(self, key) for key in KEYS if key != "labels"} | {"augmenter": self._augmenter}
        given = {key: value for key, value in given.items() if value is not None}
        if given.get("augmenter", self.own.augmenter) != self.own.augmenter:
            given = {"augmenter_options": {}} | given
        return ddkit.nn.Protocol(**fields_of(self.own) | given)

    @property
    def _augmenter(self) -> str | None:
        return self.augmenter if self.augment == "auto" else self.augment

    @property
    def _labels(self) -> str:
        return self.labels or self.own.labels

    def check(self, info: ddkit.DataInfo) -> None:
        if not self.synthetic and not self.baselines:
            path = f"{self.recipe_path}.synthetic"
            raise ddkit.InputError(
                f"{path} is false and there are no baselines, so nothing is left to evaluate. Add a baseline to "
                f"{self.recipe_path}.baselines.",
                path,
            )
        self._modules(info)  # an image too small for a network is an error before the run
        augmenter_of(self.training, info, f"{self.recipe_path}.augmenter_options")

    @cached_property
    def _options_of_models(self) -> dict[str, dict[str, Any]]:
        """The options that are given, by the model's name."""
        names = [name.strip() for name in self.training.model.split(",")]
        return split_options(names, self.model_options, f"{self.recipe_path}.model_options")

    def _models(self, info: ddkit.DataInfo) -> dict[str, ddkit.Model]:
        where, options = f"{self.recipe_path}.model_options", self._options_of_models.items()
        return {name: ddkit.create("model", name, given, data=info, where=where) for name, given in options}

    def _modules(self, info: ddkit.DataInfo) -> list[torch.nn.Module]:
        return [ddkit.nn.build_network(model, info, 0, "evaluate", "probe") for model in self._models(info).values()]

    def work(self, data: ddkit.data.EvaluationData) -> str:
        networks = " and ".join([f"{self.training.repeats} on {kind} images" for kind in self._kinds(data)])
        names = ", ".join(self._models(data.info))
        return f"{names}: {networks}, {self.training.epochs} epoch{'s' if self.training.epochs != 1 else ''} each"

    def __call__(
        self, artifact: ddkit.Artifact, data: ddkit.data.EvaluationData, teacher: ddkit.nn.Teacher | None
    ) -> list[ddkit.Evaluation]:
        kinds, path = self._label_kinds(artifact), f"{self.recipe_path}.labels"
        if "teacher" in kinds and teacher is None:
            raise ddkit.InputError(f"{path} = {self._labels} needs a teacher. Add --teacher FILE.", path)
        self._training_on(artifact)  # an unusable step size is an error before networks are trained
        counts, words = real_counts(artifact, data.real_labels)
        if self.random_real and len(data.real_images) and sum(counts) < int(artifact.stored_counts.sum()):
            log.warning(
                "There are fewer accessible real images than the set has images, so random real has %s. Use a larger --pipc, if there "
                "are more.",
                words,
            )
        rounds = [(name, model, labels) for name, model in self._models(data.info).items() for labels in kinds]
        rows: list[ddkit.Evaluation] = []
        for number, (name, model, labels) in enumerate(rounds):
            soft = SoftLabels(teacher, artifact, self.training.temperature) if teacher is not None and labels == "teacher" else None
            rows += self._evaluations(name, model, artifact, _round(data, number, len(rounds)), labels, soft)
        return rows

    def _label_kinds(self, artifact: ddkit.Artifact) -> list[Labels]:
        """Returns whose labels networks learn, in the order of the rows."""
        if self._labels == "auto":
            return ["hard" if artifact.soft_labels is None else "stored"]
        found: dict[str, list[Labels]] = {"hard": ["hard"], "stored": ["stored"], "both": ["hard", "teacher"]}
        return found.get(self._labels, ["teacher"])

    def _training_on(self, artifact: ddkit.Artifact) -> ddkit.nn.Protocol:
        """Returns how a network is trained on this set, with its own learning rate if `lr` says so."""
        if self.training.lr != "stored":
            return self.training
        path, found = f"{self.recipe_path}.lr", artifact.parameters.get("step_size")
        if found is None or found.numel() != 1:
            raise ddkit.InputError(f"{path} = stored, but this set has no learned learning rate (step_size). Use a number.", path)
        if not float(found) > 0:
            raise ddkit.InputError(
                f"{path} = stored, but the step_size of this set is {float(found):g}. A learning rate must be above 0.", path
            )
        return ddkit.nn.Protocol(**fields_of(self.training) | {"lr": float(found)})

    def operations(self, info: ddkit.DataInfo, *, rows: int, real: int, tests: int) -> float:
        """Returns the operations of all networks' training and testing, all kinds of images and labels counted."""
        schedule, own = self.training, self.synthetic
        kinds = [rows] * own + [min(rows, real)] * (own and self.random_real and real > 0)
        kinds += [real if name == "pipc-real" else min(rows, real) for name in self.baselines if real]
        networks = schedule.repeats * (2 if self._labels == "both" else 1)
        epochs = schedule.epochs * schedule.passes
        modules = self._modules(info)
        each = [ddkit.nn.training_flops(module, info, images=count, epochs=epochs, tests=tests) for module in modules for count in kinds]
        return networks * sum(each)

    def plan(
        self, info: ddkit.DataInfo, device: torch.device, *, rows: int, tests: int, networks: int, model: ddkit.Model | None = None
    ) -> Plan:
        """Returns how `networks` networks are computed on `rows` images and `tests` test images, all of them counted.

        `model`: None is the first of the option. Depends on no timing.
        """
        model, schedule = model or next(iter(self._models(info).values())), self.training
        module = ddkit.nn.build_network(model, info, 0, "evaluate", "probe")
        work = networks * ddkit.nn.training_flops(module, info, images=rows, epochs=schedule.epochs * schedule.passes, tests=tests)
        step_work = ddkit.nn.training_flops(module, info, images=min(rows, schedule.batch), epochs=schedule.passes)
        compile_ = self.compile if self.compile == "auto" else self.compile == "always"
        arithmetic = ddkit.nn.decide_arithmetic(compile_, self.precision, device, work=work, step_work=step_work)
        threads = 1 if device.type == "cpu" and not arithmetic.compile and step_work < SMALL_STEP else 0
        if self.workers == "auto":
            batch = min(rows, schedule.batch)
            alone = device.type != "cpu" or not arithmetic.compile or batch > SMALL_BATCH or networks < FEW_NETWORKS
            return Plan(arithmetic, 1 if alone else min(torch.get_num_threads(), MOST_WORKERS), threads)
        if self.workers > 1 and device.type != "cpu":
            raise ddkit.InputError(
                f"{self.recipe_path}.workers = {self.workers}: networks are only trained in several processes on the CPU, not on {device}. "
                "Use auto, or --device cpu.",
                f"{self.recipe_path}.workers",
            )
        return Plan(arithmetic, min(self.workers, networks), threads)

    def _kinds(self, data: ddkit.data.EvaluationData) -> list[str]:
        """Returns what networks are trained on: the set itself, then what stands beside it."""
        own = ["synthetic", *(["random real"] if self.random_real else [])] if self.synthetic else []
        if len(data.real_images):
            return [*own, *dict.fromkeys(self.baselines)]
        if self.baselines:
            log.warning("The baselines are left out, because there are no accessible real images.")
        return own[:1]

    def _evaluations(
        self,
        name: str,
        model: ddkit.Model,
        artifact: ddkit.Artifact,
        data: ddkit.data.EvaluationData,
        labels: Labels,
        soft: SoftLabels | None,
    ) -> list[ddkit.Evaluation]:
        """Returns the row of the set, and one of each baseline; how they are computed is decided on the set, also where it has no row."""
        kinds, repeats = self._kinds(data), self.training.repeats
        networks = repeats * (1 + (self.random_real and len(data.real_images) > 0))
        plan = self.plan(data.info, data.device, rows=len(artifact.labels), tests=len(data.test_labels), networks=networks, model=model)
        on_disk = ddkit.data.on_disk(data.real_images) or ddkit.data.on_disk(data.test_images)  # too large to be copied for other processes
        workers = plan.workers if soft is None and not on_disk else 1
        protocol, stored = self._training_on(artifact), labels == "stored"
        trainer = Trainer(name, model, artifact, data, protocol, plan.arithmetic, soft, stored=stored, threads=plan.threads)
        tasks = [(kind, repeat) for kind in kinds for repeat in range(repeats)]
        cache = CachedAccuracies(trainer, wanted=self.cache)

        def train(some: Sequence[Task]) -> list[Result]:
            return trained_apart(trainer, some, workers, cache.keep) if workers > 1 else trained_in_turn(trainer, some, cache.keep)

        shared = data.shared(tasks, lambda some: cache.or_trained(some, threads_of(workers), train))
        found = [Result(*each) for each in shared]
        hits = data.shared(tasks, lambda some: [float(task in cache.found) for task in some])  # other processes look up their own
        cached = Counter(kind for (kind, _), hit in zip(tasks, hits, strict=True) if hit)
        by_kind = {kind: found[number * repeats : (number + 1) * repeats] for number, kind in enumerate(kinds)}
        self._warn_of_diverged(by_kind, trainer.schedule.lr)
        real = by_kind.pop("random real", [])
        facts: dict[str, Any] = {"precision": plan.arithmetic.precision, "compiled": trainer.compiled, "workers": workers}
        facts |= self._changed(soft, name, model)
        if soft is not None:
            facts |= {"temperature": soft.temperature, "teacher": soft.teacher.sha256}
        facts |= {"lr": protocol.lr} if self.training.lr == "stored" else {}
        counts, words = real_counts(artifact, data.real_labels)
        beside_words = ", ".join(filter(None, [words, "hard labels" if stored else ""]))
        beside = {"random_real_images": counts} | ({"random_real": beside_words} if beside_words else {}) if real else {}
        fewer = {"summary": words} if sum(counts) < int(artifact.stored_counts.sum()) else {}
        own: dict[str, dict[str, Any]] = {"synthetic": beside, "class-mean": fewer}
        rows = []
        for kind, results in by_kind.items():
            of_real = real if kind == "synthetic" else []
            made, drawn = ([each.accuracy for each in some] for some in (results, of_real))
            known = cached["random real" if kind == "synthetic" else kind]
            figures = {"epochs": self.training.epochs, "accuracies": made, "random_real_accuracies": drawn}
            row = ddkit.Evaluation(
                evaluator=self.name, model=name, protocol=self.own.name, labels=labels if soft or kind == "synthetic" else "hard",
                images=kind,
                repeats=repeats, accuracy_mean=sum(made) / len(made), accuracy_std=_std(made),
                random_real_mean=sum(drawn) / len(drawn) if drawn else None, random_real_std=_std(drawn),
                details=figures | facts | own.get(kind, {}) | ({"cached": known} if known else {})
                | by_class(data.info.class_names, results, of_real),
            )  # fmt: skip
            rows.append(row)
        return rows

    def _warn_of_diverged(self, results: Mapping[str, Sequence[Result]], lr: float) -> None:
        """Warns of networks without finite weights, by what they were trained on, with a rate that may help: at most the protocol's."""
        smaller = min([lr / 10, *([self.own.lr] if isinstance(self.own.lr, float) else [])])
        for kind, made in results.items():
            if diverged := sum(not each.finite for each in made):
                log.warning(
                    "The training of %d of %d networks on %s images diverged: their weights are not finite, so their accuracy means "
                    "nothing. Use a smaller learning rate: --set %s.lr=%g",
                    diverged, len(made), kind, self.recipe_path, smaller,
                )  # fmt: skip

    def _changed(self, soft: SoftLabels | None, name: str, model: ddkit.Model) -> dict[str, Any]:
        """The values that are not the protocol's, e.g. {"epochs": 100, "variant": "100 epochs"}; {} if it is used unchanged.

        Model, labels and repeats of a row stand in it in any case, and a temperature is of soft labels alone. Options of the model are
        named where they are given, and are not its defaults.
        """
        told = {"model", "labels", "repeats", *(["temperature"] if soft is None else [])}
        usual = fields_of(self.own) | self.own.usual
        changed = {key: getattr(self.training, key) for key in KEYS if key not in told and getattr(self.training, key) != usual[key]}
        changed = {"augment" if key == "augmenter" else key: value for key, value in changed.items()}  # as rows of 0.1 call it
        count = f"{self.training.epochs} epoch{'s' if self.training.epochs != 1 else ''}"
        words = [count if key == "epochs" else f"{key.replace('_', ' ')} {_words(value)}" for key, value in changed.items()]
        usual_options = {field.name: field.default for field in msgspec.structs.fields(type(model.options))}
        options = {key: value for key, value in self._options_of_models[name].items() if usual_options.get(key) != value}
        words += [f"{key.replace('_', ' ')} {_words(value)}" for key, value in options.items()]
        return changed | ({"model_options": options} if options else {}) | ({"variant": ", ".join(words)} if words else {})


def stored_with_a_set(lr: float | str, labels: str = "auto") -> dict[str, ddkit.Parameter]:
    """Returns the parameters that a set needs to have where its own learning rate or its own labels are to be used."""
    own = {"step_size": lr, "soft_labels": labels}
    return {name: ddkit.Parameter(per="set") for name, value in own.items() if value == "stored"}


def _words(value: Any) -> str:
    """Returns a value of a protocol as a row says it: "0.5 0.75" for a list, "compose 2" for a table."""
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_words(item)}" for key, item in value.items()) or "none"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _round(data: ddkit.data.EvaluationData, number: int, of: int) -> ddkit.data.EvaluationData:
    """Returns the data for one of several rounds of as many networks each, which reports what all of them have done."""

    def report(done: int, total: int) -> None:
        data.report(number * total + done, of * total)

    def report_part(done: int, total: int, part: float) -> None:
        assert data.report_part is not None
        data.report_part(number * total + done, of * total, part)

    return ddkit.data.EvaluationData(**fields_of(data) | {"report": report, "report_part": report_part if data.report_part else None})


def _std(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation, None for fewer than two values."""
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else None


def by_class(class_names: Sequence[str], results: Sequence[Result], real: Sequence[Result]) -> dict[str, Any]:
    """Returns what a row says of classes: `confusion` (K, K), the counts of all networks, if there are not too many classes.

    Of more classes it has `class_accuracies`: of each class the test images and the mean accuracy. If the test split is uneven it has these
    too, and the balanced accuracy, the mean of those of the classes. Each figure has that of networks on random `real` images beside it.
    """
    every = torch.tensor([each.counts for each in results])
    found: dict[str, Any] = {"confusion": every.sum(0).tolist()} if len(class_names) <= MOST_CONFUSED else {}
    tests = every[0].sum(1).tolist()
    uneven = max(tests) >= UNEVEN * min(tests)
    if not uneven and found:
        return found
    known = {"accuracy": results, "random_real": real} if real else {"accuracy": results}
    for key, each in known.items() if uneven else ():
        values = [one.balanced() for one in each]
        name = "balanced" if key == "accuracy" else f"{key}_balanced"
        found |= {f"{name}_mean": sum(values) / len(values), f"{name}_std": _std(values)}
    means = {key: [_mean(column) for column in zip(*(one.class_accuracies() for one in each), strict=True)] for key, each in known.items()}
    found["class_accuracies"] = {
        name: {"test_images": tests[label], **{key: values[label] for key, values in means.items()}}
        for label, name in enumerate(class_names)
    }
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def split_options(names: Sequence[str], options: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Returns the options of each model by its name.

    A table under a model's name holds options of that model alone, and wins; any other option goes to the models that have it.
    Raises InputError for an option that none of several models has (of one model it is passed on, and refused there), and for a
    table of a model that is not in the list. `where` is the recipe path, for messages.
    """
    own = {name: options[name] for name in names if isinstance(options.get(name), Mapping)}
    shared = {key: value for key, value in options.items() if key not in own}
    if len(names) == 1:
        return {names[0]: {**shared, **own.get(names[0], {})}}
    known = {name: set(ddkit.create("model", name).options.__struct_fields__) for name in names}
    for key, value in shared.items():
        if not any(key in fields for fields in known.values()):
            have = "; ".join(f"{name} has {', '.join(sorted(fields)) or 'none'}" for name, fields in known.items())
            what = f"none of the models {', '.join(known)} has this option ({have})."
            if isinstance(value, Mapping):
                what = f"the models of this evaluation are {', '.join(known)}. Name one of them, or remove the table."
            raise ddkit.InputError(f"{where}.{key}: {what}", f"{where}.{key}")
    return {name: {key: value for key, value in shared.items() if key in known[name]} | dict(own.get(name, {})) for name in names}
