"""What the sections of a report show, as data for its template: pictures, charts and rows, from what the files of a run say."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import tomli_w
import torch
from torch import Tensor

from ddkit.data.pictures import eight_bits, radial_spectrum
from ddkit.files import path_part, without_folders
from ddkit.recipes.tables import NetworkTable, own_keys
from ddkit.run.artifact import Artifact
from ddkit.run.doubts import shares, typical_shares
from ddkit.run.listing import method_title
from ddkit.run.manifest import DERIVED, SET
from ddkit.run.report.charts import COLUMNS, Chart, bars, can_be_drawn, confusion, curves, dots, histogram, number, rows_of_images
from ddkit.run.report.pictures import Picture, picture, pictures, sides
from ddkit.run.snapshots import Film
from ddkit.text import counted

MOST_CLASSES, MOST_IMAGES, MOST_A_CLASS = 50, 200, 10  # shown of the set
FILM_ROWS, FILM_COLUMNS = 10, 7
MOST_CONFUSIONS = 3  # pictures of confusion, of the first networks
MOST_ROWS = 20  # of images, in a figure
MOST_BARS = 30  # classes in a chart of their accuracies
LABELS = {"hard": "Hard labels", "stored": "Labels stored with the set", "teacher": "The teacher's labels of each augmented batch"}
FOLDERS = re.compile(r"(?<![\w.~/])(?:/[^\s/:'\",]+)+/(?=[^\s/])")  # of an absolute path in a message, as far as its last part
USUAL = {  # summary of a set of which its recipe tells none, by what it is made of
    "": "A synthetic training set, made by dataset distillation.", "blend": "The average of two synthetic sets.",
    "join": "Synthetic sets that were joined.", "split": "Some classes of a synthetic set.",
}  # fmt: skip
Found = dict[str, Any] | None  # what a section shows, None where it has nothing


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a run say: `facts` is the manifest, `recipe` its TOML data, {} without one."""

    artifact: Artifact
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any] = {}
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    film: Film | None = None

    @property
    def blend(self) -> Mapping[str, Any]:
        """What a blend says of its two sets, {} for any other run."""
        found: Mapping[str, Any] = self.facts.get("blend", {})
        return found

    @property
    def end(self) -> Tensor:
        """The images of the finished set that are in the film."""
        assert self.film is not None
        return eight_bits(self.artifact.stored_images[self.film.rows])

    def name(self, label: int) -> str:
        return self.artifact.class_names[label] or "(no name)"


def contents(files: Files) -> dict[str, Any]:
    """Returns by name all that the template page.html shows."""
    return {
        **head(files), "images": images(files), "layers": layers(files), "film": film(files), "losses": losses(files),
        "parameters": parameters(files), "spectrum": spectrum(files), "evaluation": evaluation(files), "made": made(files),
        "recipe": tomli_w.dumps(without_folders(dict(files.recipe))) if files.recipe else "",
    }  # fmt: skip


def head(files: Files) -> dict[str, Any]:
    """Returns title, summary, the tiles (name, value, words beside) with the figures that matter, and what was warned of."""
    artifact, recipe = files.artifact, files.recipe
    count, channels, height, width = artifact.stored_images.shape
    ipc, pipc, data = artifact.metadata.get("ipc"), artifact.metadata.get("pipc"), recipe.get("data", {})
    source = Path(data["path"]).name if data.get("path") else data.get("use", "")
    derived = next((kind for kind in DERIVED if kind in files.facts), "")
    source = "" if derived == "join" else source  # it has several
    title = derived.capitalize() or method_title(recipe) or artifact.metadata.get("recipe") or "Synthetic set"
    title += (f" on {source}" if source else "") + (f", {counted(ipc, 'image')} per class" if ipc else "")
    counts = artifact.stored_labels.bincount(minlength=len(artifact.class_names)).tolist()
    uneven = f"; {min(counts)} to {max(counts)} per class" if len(set(counts)) > 1 else ""
    tiles = _results(files)
    tiles += [("images", f"{count:,}", f"{height} x {width} pixels, {counted(channels, 'channel')}{uneven}")]
    tiles += [("classes", str(len(artifact.class_names)), "" if pipc is None else f"{pipc} real images of each accessible")]
    images_a_class = len(artifact.images) / len(artifact.class_names)
    by_class = artifact.stored_by_class.values()
    told = f"numbers stored per class, as many as {artifact.stored_as_images:.3g} images of this size have"
    told += f", on average: {min(by_class):,.6g} to {max(by_class):,.6g}" if len(set(by_class)) > 1 else ""
    told += f"; {artifact.parametrization.name} makes {images_a_class:.3g} of them" if artifact.parametrization else ""
    tiles += [("budget", f"{artifact.stored_numbers:,.6g}", told)]
    tiles += [("steps", f"{files.facts['steps']:,}", "updates of the set")] if files.facts.get("steps") else []
    network = NetworkTable(**{key: value for key, value in recipe.get("network", {}).items() if key in own_keys(NetworkTable)})
    tiles += [("networks", str(network.pool), network.sentence)] if network.sentence else []
    if artifact.whitening is not None:
        directions = len(artifact.whitening.vectors)
        tiles += [
            ("whitened", f"{directions:,}", "directions of the ZCA of the images that networks see; the images here are not whitened")
        ]
    tiles += [("labels", str(artifact.metadata.get("labels", "soft")), _of_labels(artifact))] if artifact.soft_labels is not None else []
    warned = [FOLDERS.sub("", message) for message in files.facts.get("warnings", [])]
    return {"title": title, "summary": str(recipe.get("summary", "")) or USUAL[derived], "tiles": tiles, "warned": warned}


def _results(files: Files) -> list[tuple[str, str, str]]:
    """Returns the tiles of the set's first accuracy and of its ceilings: the accuracy of the teacher and of the full data."""
    tiles = []
    own = [row for labels in LABELS for row in _rows(files, labels) if row["images"] == "synthetic"]
    for row in own[:1]:  # a baseline's is no figure of this set
        beside = f"random real {_random_real(row)}; " if row.get("random_real_mean") is not None else ""
        told = f"{beside}{_named(row)}, {row.get('labels', 'hard')} labels, n = {row['repeats']}"
        tiles.append(("accuracy", _percent(row, "accuracy"), told))
    ceilings = [f"{name} {percent:.1f}\u00a0%" for name, percent in _ceilings(files).items()]
    if own and ceilings:
        name, _, percent = ceilings[0].rpartition(" ")
        tiles.append(("ceiling", percent, ", ".join([f"accuracy of {name}", *ceilings[1:]])))
    return tiles


def _of_labels(artifact: Artifact) -> str:
    """Returns in words how far the stored labels of a set are from hard ones."""
    assert artifact.soft_labels is not None
    classes = artifact.row_labels.repeat_interleave(len(artifact.labels) // len(artifact.row_labels))
    kept, share = int((artifact.labels == classes).sum()), float(artifact.soft_labels.gather(1, classes[:, None]).mean())
    return f"probability of an image's own class {share:.2f} on average, the largest for {kept:,} of {len(classes):,}"


def images(files: Files) -> dict[str, Any]:
    """Returns the images of the set, class by class."""
    artifact = files.artifact
    labels = artifact.stored_labels.unique().tolist()
    shown = labels[:MOST_CLASSES]
    each = max(1, min(MOST_A_CLASS, MOST_IMAGES // len(shown)))
    pixels = {label: eight_bits(artifact.stored_images[artifact.stored_labels == label][:each]) for label in shown}
    wide = max(len(rows) for rows in pixels.values())
    cell = _cell(wide)
    names = {label: files.name(label) for label in shown}
    outside = ((artifact.stored_images < 0) | (artifact.stored_images > 1)).float().mean()
    most = int(artifact.stored_labels.bincount().max())
    words = [f"Shown in 8 bits: {100 * float(outside):.1f} % of the values are outside 0..1 and clipped here."]
    words += [f"The first {each} of {most} images of each class."] if each < most else []
    words += [f"The first {len(shown)} of {len(labels)} classes."] if len(shown) < len(labels) else []
    words += ["Reduced to fit the page."] if sides(artifact.stored_images, cell)[0] < artifact.stored_images.shape[2] else []
    figures = [(names[label], pictures([rows], f"Synthetic images of class {names[label]}", cell=cell)) for label, rows in pixels.items()]
    cells = [[(names[label], image) for image in rows] + [("", None)] * (wide - len(rows)) for label, rows in pixels.items()]
    beside = COLUMNS // wide  # classes in a row of the figure
    drawn = [("", [cell for own in cells[place : place + beside] for cell in own]) for place in range(0, len(cells), beside)]
    return {"figures": figures, "words": " ".join(words), "charts": [rows_of_images("images", "Images of the set", drawn[:MOST_ROWS])]}


def _cell(most: int) -> int:
    """Returns about how many pixels the longer side of an image has on the page, where a class has `most` of them."""
    return 160 if most == 1 else 112 if most <= 3 else 72


def layers(files: Files) -> Found:
    """Returns the images of the start above those of the end, or those of a blend between its two sets, None where they were not kept."""
    film = files.film
    if film is None or len(film.rows) == 0:
        return None
    if files.blend and len(film.steps) == 2:
        first, second = (short_name(Path(part["path"])) for part in files.blend["parts"])
        title, words = "The two sets and their blend", f"The share of the second set, {second}, is alpha {files.blend['alpha']}."
        shown = {f"first: {first}": film.images[0], "blend": files.end, f"second: {second}": film.images[1]}
    elif files.facts.get("steps") and not files.blend and int(film.steps[0]) == 0:
        title, words = "Before and after", f"The same images before the first step, and after {files.facts['steps']:,}."
        shown = {"before": film.images[0], "after": files.end}
    else:
        return None
    owners = files.artifact.stored_labels[film.rows]
    labels = owners.unique().tolist()[:MOST_CLASSES]
    most = max(1, min(MOST_A_CLASS, MOST_IMAGES // len(labels)))
    cell = _cell(min(most, int(owners.bincount().max())))
    figures = []
    for label in labels:
        rows, name = (owners == label).nonzero().flatten()[:most], files.name(label)
        figures.append((name, [(when, pictures([layer[rows]], f"class {name}, {when}", cell=cell)) for when, layer in shown.items()]))
    few = torch.cat([(owners == label).nonzero().flatten()[: max(1, COLUMNS // len(labels))] for label in labels[:COLUMNS]]).tolist()
    drawn = [(when, [(files.name(int(owners[row])), layer[row]) for row in few]) for when, layer in shown.items()]
    return {"title": title, "words": words, "figures": figures, "charts": [rows_of_images("before-after", title, drawn)]}


def short_name(path: Path) -> str:
    """Returns the name of a run, or of a file that is alone."""
    return path.parent.name if path.name == SET else path.name


def film(files: Files) -> Found:
    """Returns one image of each class at some steps; `always`: which of them a narrow page shows, which has room for four.

    `frames` are those of the animated picture, with up to ten images of each class, `columns` beside each other.
    """
    film, artifact, last = files.film, files.artifact, files.facts.get("steps", 0)
    if film is None or len(film.rows) == 0 or not last or files.blend:
        return None
    kept = [place for place, step in enumerate(film.steps.tolist()) if step < last]
    while len(kept) > FILM_COLUMNS - 1:  # of the first steps, which are close together, some can go
        del kept[1]
    owners, end = artifact.stored_labels[film.rows], files.end
    steps = [*film.steps[kept].tolist(), last]
    layers = [*film.images[kept], end]
    rows: list[tuple[str, list[Picture]]] = []
    drawn = []
    for label in owners.unique().tolist()[:FILM_ROWS]:
        row, name = int((owners == label).nonzero()[0, 0]), files.name(label)
        drawn.append((name, [(f"step {step:,}", images[row]) for step, images in zip(steps, layers, strict=True)]))
        rows.append((name, [picture([image[None]], f"class {name}, {step}", cell=72) for step, image in drawn[-1][1]]))
    wide = min(COLUMNS, int(owners.bincount().max()))
    moving = torch.cat([(owners == label).nonzero().flatten()[:wide] for label in owners.unique()])
    return {
        "steps": steps, "rows": rows, "always": {round(place * (len(steps) - 1) / 3) for place in range(4)},
        "charts": [rows_of_images("strip", "The first image of a class after so many updates", drawn)],
        "frames": [(f"step {step:,}", images[moving]) for step, images in zip(steps, layers, strict=True)],
        "columns": wide if wide > 1 else COLUMNS,
    }  # fmt: skip


def losses(files: Files) -> Found:
    """Returns the curves of every loss, raw, and of all of them weighted, and their first and last values."""
    lines = [line for line in files.metrics if isinstance(line.get("losses"), Mapping)]
    labels = list(dict.fromkeys(label for line in lines for label in line["losses"]))
    if not labels:
        return None
    raw, weighted = (
        {label: [(line["step"], line["losses"][label][kind]) for line in lines if label in line["losses"]] for label in labels}
        for kind in ("raw", "weighted")
    )
    total = {"total": [(line["step"], line["total"]) for line in lines]}
    charts = [curves("losses", "Weighted, and their total", total | weighted if len(labels) > 1 else total, y="weighted")]
    first, last = lines[0]["step"], lines[-1]["step"]
    columns = ["loss", f"raw, step {first}", f"raw, step {last}", f"weighted, step {first}", f"weighted, step {last}"]
    rows = [[label, *(number(points[label][place][1]) for points in (raw, weighted) for place in (0, -1))] for label in labels]
    typical = typical_shares(lines)
    if typical:
        found = [(line["step"], own) for line in lines if (own := shares(line))]
        lines_of = {label: [(step, 100 * own[label]) for step, own in found if label in own] for label in labels}
        charts.append(curves("shares", "Shares of the gradient on the images", lines_of, y="% of the sum of norms", may_log=False))
        columns.append("share of the gradient, median")
        rows = [[*row, f"{100 * typical.get(row[0], 0.0):.1f} %"] for row in rows]
    charts += [curves(f"loss-{path_part(label)}", f"{label}, raw", {label: raw[label]}, y="raw") for label in labels]
    return {"charts": charts, "columns": columns, "rows": rows}


def parameters(files: Files) -> Found:
    """Returns the distribution of every extra parameter of the set: the multipliers of DKKT are one."""
    charts, rows = [], []
    for name, value in files.artifact.parameters.items():
        if not value.is_floating_point() or not value.numel() or not can_be_drawn(float(value.abs().max())):
            continue
        values = value.flatten().double()
        charts.append(histogram(name, values))
        ends = [number(float(each)) for each in (values.min(), values.median(), values.max())]
        rows.append([name, f"{len(values):,}", *ends, f"{100 * float((values == 0).double().mean()):.1f} %"])
    return {"charts": charts, "rows": rows} if rows else None


def spectrum_bins(height: int, width: int) -> int:
    """Returns the bands of the spectra of such images, 0 where they are too small to have one."""
    return min(16, min(height, width) // 2) if min(height, width) >= 4 else 0


def spectrum(files: Files) -> Found:
    """Returns the radial spectrum of the set beside that of the real images, where it was kept."""
    bins = spectrum_bins(*files.artifact.images.shape[-2:])
    if not bins:
        return None
    frequencies, synthetic = radial_spectrum(files.artifact.images, bins)
    shown = {"synthetic": synthetic}
    if len(real := files.facts.get("real_spectrum", [])) == bins:
        shown["real"] = real
    kept = [place for place in range(bins) if any(values[place] for values in shown.values())]  # small images have no lowest frequency
    lines = {name: [(frequencies[place], values[place]) for place in kept] for name, values in shown.items()}
    return {"charts": [curves("spectrum", "Radial spectrum", lines, x="cycles per pixel", y="share of the power")], "real": "real" in shown}


def _rows(files: Files, labels: str) -> list[Mapping[str, Any]]:
    return [row for row in files.evaluations if row["labels"] == labels and row["accuracy_mean"] is not None]


def _named(row: Mapping[str, Any]) -> str:
    """Returns "convnet, standard, 300 epochs", with the images and the split where they are not the usual ones."""
    details = row["details"]
    epochs = counted(details["epochs"], "epoch") if details.get("epochs") else ""
    variant = str(details.get("variant") or "")  # tells the epochs where they are not the protocol's
    parts = [row["model"], row["protocol"], "" if epochs and epochs in variant else epochs, variant]
    parts += [row[key] for key, usual in (("images", "synthetic"), ("split", "test")) if row.get(key, usual) != usual]
    return ", ".join(str(part) for part in parts if part)


def _pair(row: Mapping[str, Any], key: str) -> tuple[float, float | None] | None:
    """Returns (mean, sample standard deviation or None) in percent, None where it was not measured."""
    mean, std = row.get(f"{key}_mean"), row.get(f"{key}_std")
    return None if mean is None else (100 * mean, None if std is None else 100 * std)


def _percent(row: Mapping[str, Any], key: str) -> str:
    found = _pair(row, key)
    if found is None:
        return "-"
    mean, std = found
    return (f"{mean:.1f} %" if std is None else f"{mean:.1f} ± {std:.1f} %").replace(" ", "\u00a0")


def _random_real(row: Mapping[str, Any]) -> str:
    """Returns the accuracy of the random real images, and how many they are if that is not as many as the set has."""
    said = row["details"].get("random_real")
    return _percent(row, "random_real") + (f" ({said})" if said else "")


def evaluation(files: Files) -> dict[str, Any]:
    """Returns accuracies with random real beside, rows of different labels apart, a ceiling, and what evaluators say in words."""
    groups = []
    for labels, title in LABELS.items():
        found = _rows(files, labels)
        lines, shown = [], []
        for row in found:
            pairs = [_pair(row, "accuracy"), _pair(row, "random_real")]
            shown.append((_named(row), pairs))
            difference = "-" if pairs[1] is None else f"{100 * (row['accuracy_mean'] - row['random_real_mean']):+.1f}"
            lines.append([row["evaluator"], _named(row), row["repeats"], _percent(row, "accuracy"), _random_real(row), difference])
        what, legend = f"{title}: accuracies with error bars", ["trained on the set", "random real"]
        chart = dots(f"accuracy-{labels}", what, shown, legend, _ceilings(files))
        of = {row["model"]: f": {row['model']}" if len({each["model"] for each in found}) > 1 else "" for row in found}
        names = files.artifact.class_names
        pictures_ = [
            confusion(f"confusion-{labels}-{path_part(row['model'])}", of[row["model"]], f"Confusion: {_named(row)}", counts, names)
            for row in found if row["images"] == "synthetic" and _fits(counts := row["details"].get("confusion"), files)
        ]  # fmt: skip
        classes = [
            [name, _named(row), each["test_images"], *(_share(each.get(key)) for key in ("accuracy", "random_real"))]
            for row in found for name, each in row["details"].get("class_accuracies", {}).items()
        ]  # fmt: skip
        charts = [chart, *_class_charts(files, labels, found, of), *pictures_[:MOST_CONFUSIONS]]
        groups += [{"title": title, "charts": charts, "rows": lines, "classes": classes}] if found else []
    findings = [
        [row["evaluator"], "" if row["model"] == "-" else _named(row), words]
        for row in files.evaluations if (words := str(row["details"].get("summary", "")))
    ]  # fmt: skip
    findings += [
        [row["evaluator"], _named(row), f"{known} of {row['repeats']} networks of the baseline come from the cache of an earlier "
         "evaluation."]
        for row in files.evaluations if (known := row["details"].get("cached"))
    ]  # fmt: skip
    findings += [
        [row["evaluator"], _named(row), f"The test split is uneven: balanced accuracy {_percent(row['details'], 'balanced')}, random real "
         f"{_percent(row['details'], 'random_real_balanced')}."]
        for row in files.evaluations if row["details"].get("balanced_mean") is not None
    ]  # fmt: skip
    close = any(row["evaluator"] == "memorisation" and row["details"].get("close") for row in files.evaluations)
    return {"ceiling": _ceiling(files), "groups": groups, "findings": findings, "close": close}


def _class_charts(files: Files, labels: str, rows: Sequence[Mapping[str, Any]], of: Mapping[str, str]) -> list[Chart]:
    """Returns the chart of the accuracy of each class of the first network trained on the set; of many classes the best and the worst.

    `of` ends the title by the name of a network.
    """
    for row in rows:
        lines = _by_class(row, files) if row["images"] == "synthetic" else []
        if lines:
            title, half = "Accuracy of each class", MOST_BARS // 2
            if len(lines) > MOST_BARS:
                title = f"Accuracy of the {half} best and {half} worst of {len(lines)} classes"
                ordered = sorted(lines, key=lambda line: -line[1])
                lines = ordered[:half] + ordered[-half:]
            legend = ["trained on the set", "random real"]
            return [bars(f"classes-{labels}", title + of[row["model"]], f"{title}: {_named(row)}", lines, legend)]
    return []


def _by_class(row: Mapping[str, Any], files: Files) -> list[tuple[str, float, float | None]]:
    """Returns (name, accuracy in percent, that of random real images or None) of each class, [] if the row does not say them."""
    counts, names = row["details"].get("confusion"), files.artifact.class_names
    known = row["details"].get("class_accuracies", {})
    if not known and _fits(counts, files):
        known = {name: {"accuracy": own[label] / sum(own)} for label, (name, own) in enumerate(zip(names, counts, strict=True)) if sum(own)}
    pairs = [(name, each["accuracy"], each.get("random_real")) for name, each in known.items() if each["accuracy"] is not None]
    return [(name, 100 * own, None if real is None else 100 * real) for name, own, real in pairs]


def _fits(counts: Any, files: Files) -> bool:
    """Whether `counts` are those of every class by every class."""
    return isinstance(counts, list) and [len(row) for row in counts] == [len(files.artifact.class_names)] * len(counts) != []


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}\u00a0%"


def _ceiling(files: Files) -> str:
    """Returns how good the teacher and networks of all accessible images are, beside which accuracies may be read; "" if not known."""
    facts = files.facts.get("teacher") or {}
    count = facts.get("accessible_images")
    rows = [("the test images, as recorded when it was trained", "test_accuracy"), (f"{count} accessible images", "accessible_accuracy")]
    known = [f"{100 * facts[key]:.1f} % of {what}" for what, key in rows if facts.get(key) is not None]
    told = [f"the teacher is correct on {' and '.join(known)}"] if known else []
    told += [f"networks trained on {_whole(files)} reach {_percent(row, 'accuracy')} ({_named(row)})" for row in _of_whole(files)]
    return "; ".join(told)


def _ceilings(files: Files) -> dict[str, float]:
    """Returns the accuracies in percent that no set is expected to exceed, as far as they are known: of the teacher, of all real images."""
    teacher = (files.facts.get("teacher") or {}).get("test_accuracy")
    return ({} if teacher is None else {"the teacher": 100 * teacher}) | {
        _whole(files): 100 * row["accuracy_mean"] for row in _of_whole(files)[:1]
    }


def _of_whole(files: Files) -> list[Mapping[str, Any]]:
    return [row for row in _rows(files, "hard") if row.get("images") == "pipc-real"]


def _whole(files: Files) -> str:
    return "the full data" if files.artifact.metadata.get("pipc") == "all" else "all accessible images"


def made(files: Files) -> dict[str, Any]:
    """Returns times, device, versions and plugins; `time` is the only one that differs between two runs that are the same."""
    facts = files.facts
    times = [(line["step"], line["seconds"]) for line in files.metrics if "seconds" in line]
    pace = [(late - early) / (last - first) for (first, early), (last, late) in pairwise(times) if late > early]
    a_step = f", {1000 * statistics.median(pace):.1f} ms a step" if pace else ""
    name = files.artifact.metadata.get("recipe") or files.recipe.get("name")
    rows = [["recipe", name]] if name else []
    rows += [[key, str(facts[key])] for key in ("device", "threads", "seed") if facts.get(key) is not None]
    teacher = facts.get("teacher")
    rows += [["trained model (teacher)", f"sha256 {teacher['sha256']}"]] if teacher else []
    if files.blend:
        rows.append(["blend", f"alpha {files.blend['alpha']} of {_parts(files.blend)}"])
    rows += [[kind, f"of {_parts(facts[kind])}"] for kind in ("join", "split") if kind in facts]
    rows += [["accessible real images", f"{len(facts['real_files']):,}"]] if facts.get("real_files") else []
    rows += [["versions", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())]]
    plugins = [[plugin.get(key, "") for key in ("kind", "name", "distribution", "version")] for plugin in facts.get("plugins", [])]
    return {"time": f"{facts.get('seconds', 0.0):,.1f} s{a_step}" if facts.get("steps") else "", "rows": rows, "plugins": plugins}


def _parts(derived: Mapping[str, Any]) -> str:
    """Returns in words of which sets a set is made."""
    return " and ".join(f"{short_name(Path(part['path']))} (sha256 {part['sha256'][:12]})" for part in derived["parts"])
