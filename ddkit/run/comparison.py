"""Several runs beside each other: their figures under the same evaluation, what they cost, and their images.

`compare` reads the files of the runs and computes nothing. It refuses what cannot be compared, and says what differs beside the method.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch

from ddkit.components import registry
from ddkit.components.figures import budgets_differ
from ddkit.data.pictures import eight_bits
from ddkit.errors import FlagError, RunFilesError
from ddkit.files import check_out, check_writable, folders_of, path_part, write_atomic
from ddkit.recipes.protocols import Protocol
from ddkit.recipes.settings import flattened
from ddkit.run.artifact import Artifact, load
from ddkit.run.directory import RunDirectory
from ddkit.run.listing import is_run_folder, method_of, run_folders
from ddkit.run.manifest import MANIFEST, RECIPE, read_evaluations, read_manifest
from ddkit.run.report import check_figures, write_figures
from ddkit.run.report.charts import COLUMNS, Chart, accuracies, dots, files, rows_of_images
from ddkit.text import counted, doubles, printable

MOST_COMMANDS = 2  # in an error, of which a long one would be cut
FORMATS = (".png", ".pdf")  # of a picture
ELSEWHERE = ("dir", "memory", "batch", "test", "held_out", "class_order", "whiten", "whiten_eps", "whiten_absolute")  # no other data


class ComparedSet(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one set. `name` is the path as it was given, `title` the name that was chosen for it, "" if none was.

    `method` is the recipe, or the losses of the recipe `default` ("DM + DKKT"), `ipc` the images of the largest class, `pipc` the
    accessible real images per class. `stored_numbers` and `stored_as_images` are its budget per class, as in Evaluation. `labels` is
    "hard", or the kind of the soft labels. `seconds` are those of distillation on `device`, without training a teacher. None: its files do
    not record it.
    """

    name: str
    title: str = ""
    method: str
    ipc: int
    pipc: int | str | None
    steps: int | None
    seed: int | None
    labels: str
    stored_numbers: float
    stored_as_images: float
    seconds: float | None
    device: str | None


class ComparedRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one set: fractions, with sample standard deviations over `repeats` networks; None for a set that has none.

    `random_real` says how many random real images there are if not as many as the set has, e.g. "1 per class, while the set shows 4".
    """

    name: str
    repeats: int | None = None
    accuracy_mean: float | None = None
    accuracy_std: float | None = None
    random_real_mean: float | None = None
    random_real_std: float | None = None
    random_real: str = ""


class ComparedEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Figures that can be compared: one row a set, of networks `model` trained under `protocol` (with what differs from it)."""

    model: str
    protocol: str
    labels: str
    split: str
    rows: list[ComparedRow]

    def __str__(self) -> str:
        split = "the test split" if self.split == "test" else self.split
        return f"{self.model}, protocol {self.protocol}, {self.labels} labels, tested on {split}"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The sets, the evaluations that all runs among them have, and `notes`: sentences on what differs beside the method."""

    sets: list[ComparedSet]
    evaluations: list[ComparedEvaluation]
    notes: list[str]


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a set. `recipe` is {} for a file, and for a folder that no recipe made; then there are no `rows` either."""

    name: str
    artifact: Artifact
    facts: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []

    @property
    def data(self) -> dict[str, Any]:
        """The recipe's data without its place."""
        return {key: value for key, value in self.recipe.get("data", {}).items() if key not in (*ELSEWHERE, "path")}

    @property
    def dataset(self) -> str:
        """The data as --dataset names them."""
        data = self.recipe["data"]
        return f"{data['use']}:{data['path']}" if data.get("path") else str(data["use"])

    @property
    def by_key(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """The rows of the set by what has to be the same to compare them; of those that differ in repeats the one of most."""
        rows = [row for row in self.rows if row["images"] == "synthetic" and row["accuracy_mean"] is not None]
        return {self._key(row): row for row in sorted(rows, key=lambda row: row["repeats"])}

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        held_out = (self.recipe.get("seed"), self.recipe["data"].get("held_out")) if row["split"] != "test" else ()
        return (row["model"], row["protocol"], row["labels"], row["split"], _variant(row), row["details"].get("temperature"), *held_out)


def compare(
    targets: Sequence[str | Path], *, titles: Sequence[str] | None = None, out: str | Path | None = None, figures: str | Path | None = None
) -> Comparison:
    """Compares runs, files of sets, and the runs inside folders; `out` and `figures` draw them too.

    `titles` are the names of the sets in charts, one for each set in order; by default these are the paths and methods. Sets with the same
    title are one line of a chart over ipc or pipc. `out` is a new .png or .pdf file with their images; `figures` is a new or empty folder
    for charts of images and accuracies as PDF and PNG files. Raises FlagError for fewer than two sets, and for another number of titles;
    RunFilesError for sets with different data, classes or image sizes, and for runs that have no evaluation in common, with the same model,
    protocol, labels and test split.

    Examples:
        >>> compared = ddkit.compare(["my-run", "other-run"])
        >>> len(compared.sets), compared.evaluations[0].protocol
        (2, 'short, 2 epochs, width 8')
    """
    picture = None if out is None else Path(out)
    if picture is not None:
        if picture.suffix not in FORMATS:
            raise FlagError(
                f"--out {printable(str(out))}: the name of a picture must end in {' or '.join(FORMATS)}, for example "
                f"{picture.stem or 'sets'}.png."
            )
        check_out(picture)
        if picture.exists():
            raise RunFilesError(f"--out {picture} exists already. Name a new file.")
    if figures is not None:
        check_figures(Path(figures))
    found, notes = _opened(targets)
    names = [each.name for each in found]
    if titles is not None:
        titles = [title.strip() if isinstance(title, str) else "" for title in ([] if isinstance(titles, str) else titles)]
        if len(titles) != len(names) or not all(titles):
            raise FlagError(f"--titles must give each of the {len(names)} sets a name, in this order: {_cut(', '.join(names))}.")
        if "random real" in titles:
            raise FlagError("--titles: 'random real' is the baseline in the charts. Choose another name.")
    notes += _checked_data(found)
    evaluations = _evaluations(found)
    sets = [_described(each, title) for each, title in zip(found, titles or [""] * len(found), strict=True)]
    warned = [f"{each.name}: {warning}" for each in found for warning in each.facts.get("warnings", ())]
    notes += [*_differences(sets), *_unevaluated(found, evaluations), *warned]
    made = Comparison(sets=sets, evaluations=evaluations, notes=notes)
    short = [Path(each.name).name for each in sets]
    names = short if len(set(short)) == len(short) else [each.name for each in sets]
    titles = [each.title or f"{name} ({each.method})" for name, each in zip(names, sets, strict=True)]
    shown = [_first_images(each.artifact, found[0], max(one.ipc for one in sets)) for each in found]
    images = rows_of_images("sets", "Images of the sets", list(zip(titles, shown, strict=True)))
    with ExitStack() as after:
        if picture is not None:
            after.enter_context(folders_of(picture))
            check_writable(picture)
        if figures is not None:
            write_figures(Path(figures), [images, *_charts(evaluations, titles), *_over(sets, evaluations)])
        if picture is not None:
            write_atomic(picture, files(images)[f"sets{picture.suffix}"])
    return made


def _opened(targets: Sequence[str | Path]) -> tuple[list[_Found], list[str]]:
    """Returns the sets, those in a folder of runs in its place, and notes on the runs of folders that are left out."""
    found, notes = [], []
    for target in map(str, targets):
        folder = Path(target)
        if not folder.is_dir() or is_run_folder(folder):
            found.append(_open(target))
            continue
        before = len(found)
        for path in run_folders(folder):
            if not (path / MANIFEST).exists():
                remedy = f"`ddkit distill --out {shlex.quote(str(path))} --resume` finishes it."
                notes.append(f"{path} is left out, because it is not finished. {remedy}")
                continue
            try:
                found.append(_open(str(path)))
            except (RunFilesError, OSError) as error:
                notes.append(f"{path} is left out: {error}")
        if any(each.by_key for each in found[before:]):
            own, found[before:] = found[before:], []
            for each in own:
                if each.by_key or not each.recipe:
                    found.append(each)
                else:
                    remedy = f"`ddkit evaluate {shlex.quote(each.name)}` does it."
                    notes.append(f"{each.name} is left out, because no network was trained on its set. {remedy}")
        if len(found) == before:
            what = " ".join(["is not a run directory and contains no finished run. Name runs, or a folder of runs.", *notes])
            raise RunFilesError(f"{target} {what}")
    for path in doubles([Path(each.name).resolve() for each in found]):
        raise FlagError(f"The set {path} is named twice. Name each set once.")
    if not found:
        raise FlagError("There is nothing to compare. Name at least two runs.")
    if len(found) == 1:
        what = " ".join(["cannot be compared, as no other run is named. Name at least two runs.", *notes])
        raise FlagError(f"{printable(found[0].name)} {what}")
    return found, notes


def _open(name: str) -> _Found:
    artifact, path = load(name), Path(name)
    if not (path / MANIFEST).is_file():
        return _Found(name=name, artifact=artifact)
    run = RunDirectory(path)
    facts = read_manifest(path)
    if not (path / RECIPE).is_file():
        return _Found(name=name, artifact=artifact, facts=facts)
    return _Found(name=name, artifact=artifact, facts=facts, recipe=run.read_recipe(), rows=read_evaluations(path))


def _checked_data(found: Sequence[_Found]) -> list[str]:
    """Raises RunFilesError if sets are of other data, classes or image sizes; returns a note if their data are called alike elsewhere."""
    first, notes = found[0], []
    for each in found[1:]:
        kinds = {
            "images": [" x ".join(map(str, one.artifact.shape)) for one in (first, each)],
            "classes": [", ".join(sorted(one.artifact.class_names)) for one in (first, each)],
        }
        for what, (one, other) in kinds.items():
            if one != other:
                raise _incomparable(first, each, f"their {what} differ: {_cut(one)} and {_cut(other)}")
    runs = [each for each in found if each.recipe]
    for each in runs[1:]:
        paths = [one.recipe["data"].get("path") for one in (runs[0], each)]
        places = [Path(str(path)).resolve() for path in paths]
        moved = places[0] != places[1] and places[0].name == places[1].name and not all(place.exists() for place in places)
        if runs[0].data != each.data or (places[0] != places[1] and not moved):
            raise _incomparable(runs[0], each, f"their data differ: {runs[0].dataset} and {each.dataset}")
        notes += (
            [f"The data of {runs[0].name} were at {paths[0]}, those of {each.name} at {paths[1]}. They are assumed to be the same."]
            if moved
            else []
        )
    return notes


def _incomparable(first: _Found, other: _Found, why: str) -> RunFilesError:
    return RunFilesError(f"{first.name} and {other.name} cannot be compared: {why}. Leave one of them out.")


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _variant(row: Mapping[str, Any]) -> str:
    return str(row["details"].get("variant") or "")


def _evaluations(found: Sequence[_Found]) -> list[ComparedEvaluation]:
    """Returns the evaluations that all runs have; raises RunFilesError, with the commands that help, if there is none."""
    runs = [each for each in found if each.recipe]
    rows = {each.name: each.by_key for each in runs}
    common = [key for key in rows[runs[0].name] if all(key in rows[each.name] for each in runs)] if runs else []
    if runs and not common:
        raise _nothing_in_common(runs)
    made = []
    for key in common:
        row = rows[runs[0].name][key]
        protocol = ", ".join(filter(None, (row["protocol"], _variant(row))))
        fields = ComparedRow.__struct_fields__
        figures = []
        for each in found:
            own = rows.get(each.name, {}).get(key, {})
            own = own | {"random_real": own.get("details", {}).get("random_real", "")}  # a file has no figures
            figures.append({name: value for name, value in own.items() if name in fields})
        compared = [ComparedRow(**known | {"name": each.name}) for each, known in zip(found, figures, strict=True)]
        made.append(ComparedEvaluation(model=row["model"], protocol=protocol, labels=row["labels"], split=row["split"], rows=compared))
    return made


def _nothing_in_common(runs: Sequence[_Found]) -> RunFilesError:
    """Returns the error that says what each run has, and the commands that add an evaluation which all of them can have."""
    installed = {plugin.name for plugin in registry.plugins() if plugin.kind == "protocol"}
    choices = [(run, row) for run in runs for row in run.by_key.values() if row["protocol"] in installed]
    choices.sort(key=lambda choice: (choice[1]["labels"] == "teacher", bool(_variant(choice[1])), choice[1]["evaluator"] != "accuracy"))
    own: dict[str, list[str]] = {}
    for run in runs:
        own.setdefault("; ".join(_told(row) for row in run.by_key.values()) or "none", []).append(run.name)
    has = [
        f"{' and '.join([first, *([counted(len(others), 'other')] if others else [])])}: {told}"
        for told, (first, *others) in sorted(own.items(), key=lambda item: len(item[1]))
    ]
    lacking = list(runs)
    helps = [f"ddkit evaluate {shlex.quote(run.name)} --evaluate accuracy --protocol short --model convnet" for run in runs]
    if choices:
        owner, row = choices[0]
        if len({run._key(row) for run in runs}) > 1:  # held-out images are others for each seed
            row = row | {"split": "test"}
        if row["labels"] == "stored" and any(run.artifact.soft_labels is None for run in runs):
            row = row | {"labels": "hard"}
        lacking = [run for run in runs if run._key(row) not in run.by_key]
        helps = [_command(run, row, owner) for run in lacking]
    adds = "This command adds one" if len(helps) == 1 else "These commands add one"
    rest = [run.name for run in lacking[MOST_COMMANDS:]]
    more = f" (do the same for {_cut(', '.join(rest))})" if rest else ""
    told = f"The runs have no evaluation in common: {_cut('. '.join(has), 400).rstrip('. ')}. {adds}"
    return RunFilesError(f"{told}{more}: {' && '.join(helps[:MOST_COMMANDS])}")


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {', '.join(filter(None, (row['protocol'], _variant(row))))}, {row['labels']} labels, {row['split']} split"


def _command(run: _Found, row: Mapping[str, Any], owner: _Found) -> str:
    """Returns the command that evaluates `run` as the `row` of `owner` says, whatever its own recipe changes of the protocol."""
    label = "accuracy"
    protocol = owner.recipe.get("protocols", {}).get(row["protocol"], {})
    told = {"augmenter" if key == "augment" else key: value for key, value in row["details"].items()}
    changed = {key: told[key] for key in Protocol.__struct_fields__ if key in told and (key == "epochs" or _variant(row))}
    own = run.recipe.get("evaluators", {}).get(label, {})
    sets = {key: changed.get(key, protocol.get(key)) for key in Protocol.__struct_fields__ if key in own or key in changed}
    sets = {key: value for key, value in sets.items() if key not in ("model", "labels", "repeats") and value is not None}
    kept = {key: value for key, value in sets.items() if own.get(key, protocol.get(key)) != value}
    if (options := row["details"].get("model_options", {})) != own.get("model_options", {}):
        kept["model_options"] = options
    split = {"data": {"test": row["split"]}} if run.recipe["data"].get("test", "test") != row["split"] else {}
    values = flattened({"evaluators": {label: {**kept, "labels": row["labels"]}}} | split)
    flags = [shlex.quote(f"{path}={value if isinstance(value, str) else json.dumps(value)}") for path, value in values]
    words = ["ddkit evaluate", shlex.quote(run.name), "--evaluate", label, "--protocol", row["protocol"], "--model", row["model"]]
    return " ".join([*words, *(f"--set {flag}" for flag in flags)])


def _described(found: _Found, title: str) -> ComparedSet:
    artifact, recipe, facts = found.artifact, found.recipe, found.facts
    soft = str(artifact.metadata.get("labels", "soft"))
    return ComparedSet(
        name=found.name, title=title, method=method_of(recipe, facts, artifact.metadata.get("recipe", "")),
        pipc=artifact.metadata.get("pipc"),
        ipc=int(artifact.metadata.get("ipc") or artifact.row_labels.bincount().max()),
        steps=facts.get("steps"), seed=artifact.metadata.get("seed"), labels="hard" if artifact.soft_labels is None else soft,
        stored_numbers=artifact.stored_numbers, stored_as_images=artifact.stored_as_images,
        seconds=facts.get("seconds") if recipe else None, device=facts.get("device"),
    )  # fmt: skip


def _differences(sets: Sequence[ComparedSet]) -> Iterator[str]:
    """Yields a sentence for whatever beside the method may explain a difference."""
    if budgets_differ(each.stored_numbers for each in sets):
        known = ", ".join(f"{each.name} {each.stored_numbers:,.6g}" for each in sets)
        yield f"Budgets differ: {known} numbers stored per class. A larger budget alone can make a set better."
    for what, field, so in (
        ("Accessible real images", "pipc", "per class. More real images alone can make a set better"),
        ("Devices", "device", "so the seconds cannot be compared"),
    ):
        values = {each.name: getattr(each, field) for each in sets if getattr(each, field) is not None}
        if len(set(values.values())) > 1:
            yield f"{what} differ: {', '.join(f'{name} {known}' for name, known in values.items())} {so}."


def _unevaluated(found: Sequence[_Found], evaluations: Sequence[ComparedEvaluation]) -> Iterator[str]:
    """Yields a sentence for each set without a recipe, whose figures nothing records."""
    run = next((each for each in found if each.recipe), None)
    for each in found:
        if not each.recipe:
            how = f" --dataset {shlex.quote(run.dataset)}" if run else " --dataset NAME"
            if run and evaluations:
                row = next(iter(run.by_key.values()))
                how += f" --protocol {row['protocol']} --model {row['model']}"
            yield f"{each.name} has no stored figures, as no recipe made it. `ddkit evaluate {shlex.quote(each.name)}{how}` prints them."


def _first_images(artifact: Artifact, first: _Found, most: int) -> list[tuple[str, torch.Tensor | None]]:
    """Returns the first images, at most `most`, of each of the first classes, in the order of the first set, as (name, (C, H, W) uint8)."""
    names = first.artifact.class_names[:COLUMNS]
    each = min(most, max(1, COLUMNS // len(names)))
    found: list[tuple[str, torch.Tensor | None]] = []
    for name in names:
        own = artifact.stored_images[artifact.stored_labels == artifact.class_names.index(name)][:each]
        found += [(name, image) for image in eight_bits(own)] + [(name, None)] * (each - len(own))
    return found


def _charts(evaluations: Sequence[ComparedEvaluation], titles: Sequence[str]) -> Iterator[Chart]:
    for each in evaluations:
        rows = []
        for title, row in zip(titles, each.rows, strict=True):
            pairs = [(row.accuracy_mean, row.accuracy_std), (row.random_real_mean, row.random_real_std)]
            rows.append((title, [None if mean is None else (100 * mean, std and 100 * std) for mean, std in pairs]))
        chart = dots(f"accuracy-{path_part(each.model)}", str(each), rows, ["trained on the set", "random real"])
        yield chart._replace(x=f"accuracy in %, {each.model}")


def _over(sets: Sequence[ComparedSet], evaluations: Sequence[ComparedEvaluation]) -> Iterator[Chart]:
    """Yields the accuracies of each method over ipc, and over pipc, as far as the sets differ in it; sets that are alike are one point."""
    for each in evaluations:
        for axis, other, x in (("ipc", "pipc", "images per class (ipc)"), ("pipc", "ipc", "accessible real images per class (pipc)")):
            known = [(one, row) for one, row in zip(sets, each.rows, strict=True) if row.repeats and getattr(one, axis) is not None]
            if len({getattr(one, axis) for one, _ in known}) < 2:
                continue
            several = len({getattr(one, other) for one, _ in known}) > 1
            lines: dict[str, dict[float | str, list[tuple[int, float, float | None]]]] = {}
            for key, name in (("accuracy", ""), ("random_real", "random real")):
                for one, row in known:
                    mean, std = getattr(row, f"{key}_mean"), getattr(row, f"{key}_std")
                    if mean is not None:
                        line = (name or one.title or one.method) + (f", {other} {getattr(one, other)}" if several else "")
                        lines.setdefault(line, {}).setdefault(getattr(one, axis), []).append((row.repeats or 1, mean, std))
            drawn = {name: {value: _pooled(parts) for value, parts in line.items()} for name, line in lines.items()}
            yield accuracies(f"{axis}-{path_part(each.model)}", f"Accuracy over {axis}", str(each), x, drawn)


def _pooled(parts: Sequence[tuple[int, float, float | None]]) -> tuple[float, float | None]:
    """Returns mean and sample standard deviation in percent of several samples (n, mean, std) as of one."""
    count = sum(n for n, _, _ in parts)
    mean = sum(n * own for n, own, _ in parts) / count
    squares = sum((n - 1) * (std or 0.0) ** 2 + n * (own - mean) ** 2 for n, own, std in parts)
    return 100 * mean, 100 * (squares / (count - 1)) ** 0.5 if count > 1 else None
