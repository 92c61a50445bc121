"""Experts: networks trained on real images, whose weights at the start and after every few epochs are kept in a folder.

The folder has a file of each expert, its weights of all saved epochs one after the other, and `experts.json`, which tells what they are
and lists the files with their sha256. Each file carries the digest of the same settings, so that files of two folders are not mixed.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ddkit.cache import make_folder, private_folder
from ddkit.components import registry
from ddkit.components.base import DataInfo, Model
from ddkit.components.observers import Observers, Report
from ddkit.components.options import written_options
from ddkit.data.images import Normalisation, NormalisedRows
from ddkit.data.loading import fingerprint, load_images
from ddkit.data.real import RealData
from ddkit.data.whitening import Whitening, normalisation_of, whitening_key
from ddkit.distributed import ALONE, Ranks
from ddkit.errors import NEWS, InputError, RunFailed, RunFilesError
from ddkit.files import SCHEMA, json_digest, path_part, read_tensors, read_with_digest, sha256, with_digest, write_json, write_tensors
from ddkit.nn.compiling import compiled, decide_arithmetic
from ddkit.nn.device import products
from ddkit.nn.networks import build_network, network_tensors, redraw, training_flops
from ddkit.nn.teacher import all_finite
from ddkit.nn.training import BatchAccuracy, fit
from ddkit.recipes.protocols import Schedule
from ddkit.recipes.tables import DataTable, ExpertsTable, Recipe, TrainTable
from ddkit.seeding import drawn_from, generator
from ddkit.text import counted

log = logging.getLogger("ddkit")
MANIFEST = "experts.json"
WHITENING = "whitening.safetensors"
COUNT, EPOCHS, SAVE_EVERY = 20, 10, 1  # of experts that are trained, if the recipe leaves them open
TRAINED = "ddkit train --experts"


class Trajectory(NamedTuple):
    """Weights and buffers by name of one expert after `epoch` epochs, and `span` epochs later: float32, on the run's device."""

    expert: int
    epoch: int
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]


@dataclass(eq=False, kw_only=True)
class Experts:
    """The experts of a run: `count` networks that were `trained` for so many epochs, with their weights at 0 and every `save_every`.

    `weights(expert, row)` reads those of epoch `epochs[row]`, by name, in float32 on the CPU. `normalisation` is that of the images which
    they are trained on, `digest` a sha256 of all of them.
    """

    count: int
    trained: int
    save_every: int
    normalisation: Normalisation
    weights: Callable[[int, int], dict[str, Tensor]]
    accuracy: Sequence[float | None] = ()  # on the batches of each saved epoch, as they were learned from, the mean of all experts
    digest: str = ""
    path: str = ""

    @property
    def epochs(self) -> range:
        """The saved epochs, ascending from 0."""
        return _saved(self.trained, self.save_every)

    def rows(self, first: int, last: int | None, span: int = 0, where: str = "network") -> list[tuple[int, int]]:
        """Returns the rows of the saved epochs t from `first` to `last` (None: the end), each with the row of t + span.

        Raises InputError if there is none, whose path is in the table `where` that asks for them.
        """
        row_of = {epoch: row for row, epoch in enumerate(self.epochs)}
        end = self.epochs[-1] if last is None else last
        if end > self.trained:
            raise InputError(
                f"The experts are trained for {self.trained} epochs, so they have no weights of epoch {end}. Train them longer (--set "
                f"experts.epochs={end + span}), or use earlier epochs.",
                f"{where}.last",
            )
        found = [(row, row_of[epoch + span]) for epoch, row in row_of.items() if first <= epoch <= end and epoch + span in row_of]
        if not found:
            later = f" with a saved epoch {span} epochs later" if span else ""
            raise InputError(
                f"The experts have no saved epoch from {first} to {end}{later}. Saved are the epochs 0 to {self.epochs[-1]} in steps of "
                f"{self.save_every}. Choose other epochs, train longer (experts.epochs), or save more often (experts.save_every).",
                f"{where}.first",
            )
        return found

    def drawn(self, draw: torch.Generator, *, span: int = 0, first: int = 0, last: int | None = None) -> Trajectory:
        """Returns the weights of one expert at one of its saved epochs and `span` epochs later, both drawn evenly from `draw`."""
        rows = self.rows(first, last, span)
        expert = int(torch.randint(self.count, (), generator=draw))
        row, later = rows[int(torch.randint(len(rows), (), generator=draw))]
        start = self.weights(expert, row)
        return Trajectory(expert, self.epochs[row], start, self.weights(expert, later) if span else start)

    def between(self, draw: torch.Generator, first: int, last: int | None) -> dict[str, Tensor]:
        """Returns weights at a point, drawn evenly, of the line between those of one expert at the epochs `first` and `last`."""
        ends = self.drawn(draw, span=self.span(first, last), first=first, last=first)
        share = float(torch.rand((), generator=draw))
        return {name: start.lerp(ends.end[name], share) if start.is_floating_point() else start for name, start in ends.start.items()}

    def span(self, first: int, last: int | None) -> int:
        """Returns the epochs from `first` to `last` (None: the end)."""
        return (self.epochs[-1] if last is None else last) - first


def untrained(model: Model, info: DataInfo, table: ExpertsTable, normalisation: Normalisation) -> Experts:
    """Returns fresh networks in the place of experts: for the checks of a plan, and of losses."""
    return Experts(
        count=table.count or COUNT, trained=table.epochs or EPOCHS, save_every=table.save_every or SAVE_EVERY, normalisation=normalisation,
        weights=lambda expert, row: network_tensors(build_network(model, info, 0, "untrained expert", expert, row)),
    )  # fmt: skip


def _saved(epochs: int, every: int) -> range:
    return range(0, epochs + 1, every)


# What is in the folder


class _Data(msgspec.Struct, forbid_unknown_fields=True):
    use: str
    sha256: str
    images: int


class Settings(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """All that decides the weights of an expert, by its number; `units` are mean and std of a teacher, if it is trained in those.

    `whiten` says how its images are whitened, {} if they are not: `whiten` as in whitening_key, or the `sha256` of the teacher's.
    """

    data: _Data
    class_names: list[str]
    input_shape: tuple[int, int, int]
    units: tuple[list[float], list[float]] | None
    model: str
    options: dict[str, Any]
    train: dict[str, Any]
    epochs: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    save_every: Annotated[int, msgspec.Meta(ge=1)]
    precision: str
    seed: int
    whiten: dict[str, Any] = {}

    @property
    def digest(self) -> str:
        return json_digest(msgspec.to_builtins(self))


class _File(msgspec.Struct, forbid_unknown_fields=True):
    file: Annotated[str, msgspec.Meta(pattern=r"^expert-\d{4,}\.safetensors$")]
    sha256: str
    accuracy: list[float | None]  # None: before training


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    schema: int
    settings: Settings
    mean: list[float]
    std: list[float]
    experts: list[_File]
    whitening: str | None = None  # the sha256 of its file


def settings_of(recipe: Recipe, real: RealData, model: Model, *, units: Normalisation | None = None, seed: int = 0) -> Settings:
    """Returns the settings of the experts that `recipe` asks for; `units`: the statistics of its teacher, if it distils with one."""
    table, train, info = recipe.experts, recipe.train, real.info
    everything = table.data == "all"
    if not everything and recipe.pipc == 0:
        raise InputError(
            "With pipc 0 there are no images to train experts on. Set --pipc to at least 1, or --set experts.data=all.", "pipc"
        )
    if (table.save_every or SAVE_EVERY) > (table.epochs or EPOCHS):
        raise InputError(
            f"experts.save_every = {table.save_every} is larger than experts.epochs ({table.epochs or EPOCHS}), so no trained weights "
            "would be "
            "saved. Lower experts.save_every, or raise experts.epochs.",
            "experts.save_every",
        )
    augmenter = registry.options_of("augmenter", train.augmenter, train.options, "train", info)
    training = train.recorded | {"options": written_options(augmenter)}
    del training["epochs"]
    found = Settings(
        data=_Data(
            table.data, fingerprint(real.dataset) if everything else real.digest(),
            len(real.dataset.labels("train") if everything else real.labels),
        ),
        class_names=list(info.class_names), input_shape=info.shape, units=None if units is None else (list(units.mean), list(units.std)),
        model=registry.split_name(recipe.network.model)[0], options=written_options(model.options), train=training,
        epochs=table.epochs or EPOCHS, save_every=table.save_every or SAVE_EVERY, precision=table.precision, seed=seed,
        whiten={"sha256": units.whitening.digest} if units and units.whitening else {} if units else whitening_key(recipe.data),
    )  # fmt: skip
    return msgspec.json.decode(msgspec.json.encode(found), type=Settings)  # as a manifest gives them back, to be compared


# Use


def experts_of(
    recipe: Recipe,
    real: RealData,
    model: Model,
    device: torch.device,
    watchers: Observers,
    *,
    units: Normalisation | None = None,
    ranks: Ranks = ALONE,
    train_it: bool = True,
) -> Experts | None:
    """Returns the experts of the recipe's folder, or automatic ones: from the cache, where they are trained on first use.

    Returns None if they are not in the cache and not to be trained (`train_it`). `units`: as in settings_of. Of several processes the
    first trains them, and the others read them. Raises InputError where a folder does not fit the run.
    """
    wanted, table = settings_of(recipe, real, model, units=units), recipe.experts
    if table.use != "auto":
        return open_experts(Path(table.use), table, wanted, model)
    table = msgspec.structs.replace(table, count=table.count or COUNT)
    if not ranks.is_main:
        told = ranks.broadcast(None)
        return None if told is None else open_experts(Path(told), table, wanted, model)
    folder = private_folder("experts") / f"{path_part(wanted.model)}-{wanted.digest[:24]}"
    found = None
    try:
        found = open_experts(folder, table, wanted, model)
    except InputError as error:
        log.info("No experts in the cache can be used. %s", error)
    if found is None and train_it:
        log.warning("The run needs experts. %d are trained, and kept for later runs.", table.count, extra=NEWS)
        train_experts(make_folder(folder), wanted, table.count or COUNT, real, model, device, watchers, units or recipe.data)
        found = open_experts(folder, table, wanted, model)
    ranks.broadcast(None if found is None else str(folder))  # the others wait for this
    return found


def open_experts(folder: Path, table: ExpertsTable, wanted: Settings, model: Model) -> Experts:
    """Returns the experts of a folder; raises InputError where it is damaged, mixed, unfinished, or of another model or other data."""
    manifest = _read_manifest(folder)
    settings, count = manifest.settings, table.count or len(manifest.experts)
    _check_fit(folder, table, manifest, wanted)
    if not 0 < count <= len(manifest.experts):
        raise InputError(
            f"The experts {folder}: {len(manifest.experts)} are finished, but the run needs {count or 'at least 1'}. Use fewer (--set "
            f"experts.count=...), or continue their training with {TRAINED}.",
            "experts.count",
        )
    epochs = _saved(settings.epochs, settings.save_every)
    shapes = {name: (len(epochs), *value.shape) for name, value in network_tensors(_probe(model, settings)).items()}
    for entry in manifest.experts[:count]:
        _check_file(folder / entry.file, entry.sha256, settings.digest, shapes)

    def weights(expert: int, row: int) -> dict[str, Tensor]:
        path = folder / manifest.experts[expert].file
        try:
            with safe_open(str(path), framework="pt") as stream:
                found = {name: stream.get_slice(name)[row : row + 1][0] for name in shapes}
        except Exception as error:  # the file was removed or exchanged during the run; the parser has errors of its own
            raise RunFilesError(f"The experts {folder}: {path.name} can no longer be read ({error}).") from None
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}

    try:
        norm = Normalisation(manifest.mean, manifest.std, _whitening_in(folder, manifest))
    except ValueError as error:
        raise InputError(f"The experts {folder} cannot be used: {error}.", "experts.use") from None
    rows = list(zip(*(entry.accuracy for entry in manifest.experts[:count]), strict=False))
    accuracy = [None if None in row else sum(filter(None, row)) / count for row in rows]
    digest = hashlib.sha256("".join(entry.sha256 for entry in manifest.experts[:count]).encode()).hexdigest()
    return Experts(
        count=count, trained=settings.epochs, save_every=settings.save_every, normalisation=norm, weights=weights, accuracy=accuracy,
        digest=digest, path=str(folder.absolute()),
    )  # fmt: skip


def _probe(model: Model, settings: Settings) -> nn.Module:
    channels, height, width = settings.input_shape
    return build_network(model, DataInfo(class_names=tuple(settings.class_names), channels=channels, size=(height, width)), 0, "probe")


def _read_manifest(folder: Path) -> _Manifest:
    """Returns the manifest of a folder of experts; raises InputError where there is none, or it is damaged."""
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"The experts {folder}: there is no {MANIFEST}. `{TRAINED} {COUNT} --out FOLDER` makes such a folder.", "experts.use"
        )
    try:
        found = msgspec.convert(read_with_digest(folder / MANIFEST), _Manifest)
        if found.schema != SCHEMA:
            raise ValueError(f"its schema is {found.schema}, but this version of ddkit reads schema {SCHEMA}")
    except (RunFilesError, ValueError) as error:
        raise InputError(f"The experts {folder}: {MANIFEST} cannot be used ({str(error).rstrip('.')}).", "experts.use") from None
    return found


def _check_fit(folder: Path, table: ExpertsTable, manifest: _Manifest, wanted: Settings) -> None:
    """Raises InputError, with the setting that helps, where the experts of a folder are not those of this run's data and network."""

    theirs = manifest.settings

    def refuse(what: str, helps: str, path: str = "experts.use") -> None:
        raise InputError(f"The experts {folder} do not fit this run: {what}. {helps}", path)

    if theirs.data.use != wanted.data.use:
        refuse(
            f"they are trained on {theirs.data.use} images, but experts.data is {table.data}",
            f"Use --set experts.data={theirs.data.use}",
        )
    if (theirs.class_names, theirs.input_shape) != (wanted.class_names, wanted.input_shape) or theirs.data != wanted.data:
        same = "dataset, pipc and seed" if wanted.data.use == "accessible" else "dataset"
        refuse("they are trained on other images", f"Use the same {same}, or train experts on these images with {TRAINED}.")
    if (theirs.model, theirs.options) != (wanted.model, wanted.options):
        keys = sorted(key for key in {*theirs.options, *wanted.options} if theirs.options.get(key) != wanted.options.get(key))
        sets = " ".join([f"--set network.model={theirs.model}", *(f"--set network.{key}={theirs.options.get(key)}" for key in keys)])
        refuse("their network is not that of [network]", f"To use their network: {sets}", "network.model")
    if bool(wanted.whiten) != bool(theirs.whiten):
        what = "whitened" if theirs.whiten else "plain"
        refuse(f"they are trained on {what} images", f"Use --set data.whiten={str(bool(theirs.whiten)).lower()}.", "data.whiten")
    if wanted.units not in (None, (manifest.mean, manifest.std)) or (wanted.units and wanted.whiten != theirs.whiten):
        refuse("they and the teacher normalise images differently", "Use --set experts.use=auto to train fitting ones.")
    for key in ("epochs", "save_every"):
        asked = getattr(table, key)
        if asked is not None and asked != getattr(theirs, key):
            refuse(f"they have {key} = {getattr(theirs, key)}", f"Leave experts.{key} out, or use that value.", f"experts.{key}")


def _whitening_in(folder: Path, manifest: _Manifest) -> Whitening | None:
    """Returns the whitening of a folder's images; raises ValueError where its file is not that of the manifest."""
    if not manifest.settings.whiten:
        return None
    path = folder / WHITENING
    if not path.is_file() or sha256(path) != manifest.whitening:
        raise ValueError(f"{WHITENING} is not the file that {MANIFEST} lists")
    return Whitening.taken(read_tensors(path)[0], manifest.settings.input_shape)


def _check_file(path: Path, known: str, digest: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError where the file of an expert is missing, damaged, of another set of experts, or does not fit the network."""
    helps = f"Run {TRAINED} with the same --out again to restore them."
    try:
        if sha256(path) != known:
            record = read_tensors(path)[1]
            if record.get("settings") != digest:
                raise ValueError(f"{path.name} belongs to other experts, so files of several folders are mixed")
            raise ValueError(f"{path.name} is not the file that {MANIFEST} lists")
        with safe_open(str(path), framework="pt") as stream:
            found = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
        if found != shapes:
            raise ValueError(f"the tensors of {path.name} do not fit the network")
    except FileNotFoundError:
        raise InputError(f"The experts {path.parent}: {path.name} is missing. {helps}", "experts.use") from None
    except Exception as error:  # the parser has errors of its own
        raise InputError(f"The experts {path.parent} are damaged: {str(error).rstrip('.')}. {helps}", "experts.use") from None


# Training


def train_experts(
    folder: Path, settings: Settings, count: int, real: RealData, model: Model, device: torch.device, watchers: Observers,
    units: Normalisation | DataTable,
) -> None:  # fmt: skip
    """Trains `count` experts into a folder; those that are there already, whole and with the same settings, stay as they are.

    `units` is the normalisation of a teacher, or the table that says whether the images are whitened.

    On a CPU that need not compile, as many are trained side by side as there are threads, each by one: their bytes do not depend on it.
    Raises RunFailed where a training diverges.
    """
    info, seed = real.info, settings.seed
    there = [_accuracy_of(folder / _name(number), settings) for number in range(count)]
    left = [number for number, accuracy in enumerate(there) if accuracy is None]
    if settings.data.use == "all":
        labels = real.dataset.labels("train")
        reading = watchers.begin("reading", f"Reading all {len(labels):,} images of the training split, for experts", total=len(labels))
        pixels = load_images(real.dataset, "train", range(len(labels)), info.shape, reading)
    else:
        pixels, labels = real.all_images(), real.labels
    norm = normalisation_of(pixels, units) if isinstance(units, DataTable) else units
    images, labels = norm.lazily(pixels).to(device), labels.to(device)
    if left and not (folder / MANIFEST).exists():
        _write_manifest(folder, settings, norm, [])  # so that it can go on after a kill
    module = build_network(model, info, seed, "expert", 0).to(device).eval()
    work = training_flops(module, info, images=len(images), epochs=settings.epochs) * len(left)
    made = decide_arithmetic("auto", "auto", device, work=work)
    threads = torch.get_num_threads()
    workers = 1 if made.compile or device.type != "cpu" or _draws(module, images) else min(threads, max(1, len(left)))
    forward = compiled(module, wanted=made.compile)
    building = threading.Lock()

    def train_one(number: int, tell: Callable[[int, float], None]) -> None:
        """Trains one expert and writes its file; all that is drawn is a function of seed and number."""
        own = module
        with building:  # torch draws fresh weights from its one global generator
            if workers > 1:
                own = build_network(model, info, seed, "expert", number)
            else:
                redraw(module, model, info, seed, "expert", number)
        with nullcontext() if workers > 1 else drawn_from(seed, "expert's own draws", number):
            trained = _fit(own, images, labels, settings, info, number, tell, {
                "forward": forward if workers == 1 else None, "precision": made.dtype, "channels_last": made.compile,
            })  # fmt: skip
        _write_expert(folder, settings, number, *trained)

    epochs = counted(settings.epochs, "epoch")
    text = f"Training {count} experts ({settings.model}, {epochs} on {len(labels):,} images)"
    report = watchers.begin("experts", text, done=count - len(left), total=count)
    alone = made.compile or device.type != "cpu"
    try:
        torch.set_num_threads(threads if alone else 1)
        with products(device, made.precision):
            _side_by_side(left, train_one, workers, partial(_told, report, count - len(left), count))
    finally:
        torch.set_num_threads(threads)
    entries = []
    for number in range(count):
        accuracy = there[number] or _accuracy_of(folder / _name(number), settings) or []
        entries.append({"file": _name(number), "sha256": sha256(folder / _name(number)), "accuracy": accuracy})
    _write_manifest(folder, settings, norm, entries)


def check_folder(folder: Path, settings: Settings) -> None:
    """Raises RunFilesError where experts with these settings cannot be trained into a folder: it holds others, or something else."""
    if not (folder / MANIFEST).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFilesError(f"--out {folder} exists already and is not a folder of experts. Name a new or empty folder.")
        return
    try:
        theirs = msgspec.to_builtins(_read_manifest(folder).settings)
    except InputError as error:
        raise RunFilesError(f"--out: {error}") from None
    ours = msgspec.to_builtins(settings)
    unlike = [
        f"{key} is {theirs.get(key)} there and {ours.get(key)} here" if key != "data" else "they are trained on other images"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    ]
    if unlike:
        raise RunFilesError(f"--out {folder} contains other experts ({'; '.join(unlike)}). Name a new folder, or use the same settings.")


def _told(report: Report, before: int, count: int, reached: float) -> None:
    """Reports that `reached` of the experts that are trained now are done, parts counted, beside those `before`."""
    report(before + int(reached), count, part=reached - int(reached))


def _side_by_side(
    numbers: Sequence[int], train_one: Callable[[int, Callable[[int, float], None]], None], workers: int, tell: Callable[[float], None]
) -> None:
    """Calls `train_one` for each number, in `workers` threads; an error or an interruption ends all of them within a batch."""
    parts: dict[int, float] = {}
    stop = threading.Event()

    def reached(number: int, part: float) -> None:
        if stop.is_set():
            raise RunFailed("The training of another expert failed.")
        parts[number] = part
        if workers == 1:
            tell(sum(parts.values()))

    if workers == 1:
        for number in numbers:
            train_one(number, reached)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(train_one, number, reached) for number in numbers}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                for each in done:
                    each.result()
                tell(sum(parts.values()))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _draws(module: nn.Module, images: Tensor | NormalisedRows) -> bool:
    """Whether a forward pass in training mode draws from torch's global generator, as dropout does: then threads would share it."""
    with drawn_from(0, "probe"), torch.no_grad():
        before = torch.get_rng_state()
        module.train()(images[:2])
        return not torch.equal(before, torch.get_rng_state())


def _fit(
    module: nn.Module, images: Tensor | NormalisedRows, labels: Tensor, settings: Settings, info: DataInfo, number: int,
    tell: Callable[[int, float], None], how: Mapping[str, Any],
) -> tuple[dict[str, Tensor], list[float | None]]:  # fmt: skip
    """Returns the weights (saved epochs, ...) of `module` by name, and the accuracy on the batches of each of these epochs (None: at 0).

    The module is trained in place.
    """
    epochs, dtype = _saved(settings.epochs, settings.save_every), getattr(torch, settings.precision)
    kept = {
        name: torch.empty((len(epochs), *value.shape), dtype=dtype if value.is_floating_point() else value.dtype)
        for name, value in network_tensors(module).items()
    }
    accuracy: list[float | None] = []
    own = BatchAccuracy(images.device)
    batches = settings.epochs * -(-len(labels) // settings.train["batch"])
    done = 0

    def save(epoch: int, _: int = 0) -> None:
        right = own.taken()
        if epoch in epochs:
            for name, value in network_tensors(module).items():
                kept[name][epochs.index(epoch)] = value.to(kept[name].dtype)
            accuracy.append(right)

    def count(logits: Tensor, labels: Tensor) -> None:
        nonlocal done
        own(logits, labels)
        done += 1
        tell(number, done / batches)

    save(0)
    schedule = Schedule.of({"epochs": settings.epochs, **settings.train})
    augmenter = registry.create("augmenter", settings.train["augmenter"], settings.train["options"], data=info, where="train")
    fit(
        module, images, labels, schedule, augmenter=augmenter,
        generator=generator(settings.seed, "expert training", number), report=save, on_batch=count, **how,
    )  # fmt: skip
    if not all_finite(kept):
        raise RunFailed(
            f"The training of expert {number} diverged: its weights are not finite. They are not saved. Use a smaller learning rate "
            f"(--set train.lr={min(schedule.lr / 10, TrainTable().lr):g}), or another schedule or optimizer."
        )
    return kept, accuracy


def _name(number: int) -> str:
    return f"expert-{number:04d}.safetensors"


def _write_expert(folder: Path, settings: Settings, number: int, weights: dict[str, Tensor], accuracy: list[float | None]) -> None:
    record = {"settings": settings.digest, "expert": number, "accuracy": accuracy}
    write_tensors(folder / _name(number), weights, record)


def _accuracy_of(path: Path, settings: Settings) -> list[float | None] | None:
    """Returns the accuracies of the file of an expert; None if it is not there, damaged, or not of these settings."""
    try:
        record = read_tensors(path)[1]
        return msgspec.convert(record["accuracy"], list[float | None]) if record.get("settings") == settings.digest else None
    except (ValueError, KeyError):
        return None


def _write_manifest(folder: Path, settings: Settings, norm: Normalisation, entries: Sequence[Mapping[str, Any]]) -> None:
    content = {"schema": SCHEMA, "settings": msgspec.to_builtins(settings), "mean": list(norm.mean), "std": list(norm.std)}
    if norm.whitening is not None:
        write_tensors(folder / WHITENING, norm.whitening.tensors, {"settings": settings.digest})
        content["whitening"] = sha256(folder / WHITENING)
    write_json(folder / MANIFEST, with_digest({**content, "experts": list(entries)}))
