"""The folder of experts: their settings and files, written, read and checked.

It has a file of each expert, its weights of all saved epochs one after the other, and `experts.json`, which tells what they are
and lists the files with their sha256. Each file carries the digest of the same settings, so that files of two folders are not mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from safetensors import safe_open
from torch import Tensor, nn

from ddkit.components import registry
from ddkit.components.base import DataInfo, Model
from ddkit.components.options import written_options
from ddkit.data.images import Normalisation
from ddkit.data.loading import fingerprint
from ddkit.data.real import RealData
from ddkit.data.whitening import Whitening, whitening_key
from ddkit.errors import InputError, RunFilesError
from ddkit.files import SCHEMA, json_digest, read_tensors, read_with_digest, sha256, with_digest, write_json, write_tensors
from ddkit.nn.experts import COUNT, EPOCHS, SAVE_EVERY, Experts, saved_epochs
from ddkit.nn.networks import build_network, network_tensors
from ddkit.recipes.tables import ExpertsTable, Recipe

MANIFEST = "experts.json"
WHITENING = "whitening.safetensors"
TRAINED = "ddkit train --experts"


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
            "would be saved. Lower experts.save_every, or raise experts.epochs.",
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
    epochs = saved_epochs(settings.epochs, settings.save_every)
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


def file_of(number: int) -> str:
    return f"expert-{number:04d}.safetensors"


def write_expert(folder: Path, settings: Settings, number: int, weights: dict[str, Tensor], accuracy: list[float | None]) -> None:
    record = {"settings": settings.digest, "expert": number, "accuracy": accuracy}
    write_tensors(folder / file_of(number), weights, record)


def recorded_accuracy(path: Path, settings: Settings) -> list[float | None] | None:
    """Returns the accuracies of the file of an expert; None if it is not there, damaged, or not of these settings."""
    try:
        record = read_tensors(path)[1]
        return msgspec.convert(record["accuracy"], list[float | None]) if record.get("settings") == settings.digest else None
    except (ValueError, KeyError):
        return None


def write_manifest(folder: Path, settings: Settings, norm: Normalisation, accuracies: Sequence[list[float | None] | None]) -> None:
    """Writes the manifest of a folder whose first experts are finished, with their accuracies by epoch."""
    named = {file_of(number): accuracy for number, accuracy in enumerate(accuracies)}
    entries = [{"file": name, "sha256": sha256(folder / name), "accuracy": accuracy} for name, accuracy in named.items()]
    content = {"schema": SCHEMA, "settings": msgspec.to_builtins(settings), "mean": list(norm.mean), "std": list(norm.std)}
    if norm.whitening is not None:
        write_tensors(folder / WHITENING, norm.whitening.tensors, {"settings": settings.digest})
        content["whitening"] = sha256(folder / WHITENING)
    write_json(folder / MANIFEST, with_digest({**content, "experts": entries}))
