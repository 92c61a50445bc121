"""The parts of a report, each made from what the files of a run say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ddkit.data.pictures import radial_spectrum
from ddkit.run.artifact import Artifact
from ddkit.run.manifest import SET
from ddkit.run.report.charts import (
    Dots,
    Line,
    bar_chart,
    can_be_drawn,
    dot_chart,
    legend,
    line_chart,
    number,
    text,
    wants_log,
)
from ddkit.run.report.page import chart, film_table, note, section, table
from ddkit.run.report.pictures import picture, pictures, sides
from ddkit.run.shares import shares, typical_shares
from ddkit.run.snapshots import Film, eight_bits

MOST_CLASSES, MOST_IMAGES, MOST_A_CLASS = 50, 200, 10  # shown of the set
FILM_ROWS, FILM_COLUMNS = 10, 7
BINS = 20  # of the histogram of a parameter


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a run say: `facts` is the manifest, `recipe` its TOML data, {} without one."""

    artifact: Artifact
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any] = {}
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    film: Film | None = None


def head(files: Files) -> tuple[str, str, str]:
    """Returns title and summary as plain text, and the tiles with the figures that matter as HTML."""
    artifact, recipe = files.artifact, files.recipe
    count, channels, height, width = artifact.stored_images.shape
    ipc, data = artifact.metadata.get("ipc"), recipe.get("data", {})
    source = _source(data) if isinstance(data, Mapping) else data
    name = artifact.metadata.get("recipe") or recipe.get("name") or ("blend" if "blend" in files.facts else "synthetic set")
    title = f"{name}{f' on {source}' if source else ''}" + (f", {ipc} image{'s' if ipc != 1 else ''} a class" if ipc else "")
    pipc = artifact.metadata.get("pipc")
    tiles = [("images", f"{count:,}", f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}")]
    tiles += [("classes", str(len(artifact.class_names)), "" if pipc is None else f"{pipc} real images of each accessible")]
    tiles += [("steps", f"{files.facts['steps']:,}", "updates of the set")] if files.facts.get("steps") else []
    own = [row for labels in ("hard", "soft") for row in _rows(files, labels) if row.get("images", "synthetic") == "synthetic"]
    row = next(iter(own), None)  # a baseline's is no figure of this set
    if row is not None:
        beside = f"random real {_random_real(row)}; " if row.get("random_real_mean") is not None else ""
        tiles += [
            ("accuracy", _percent(row, "accuracy"), f"{beside}{_named(row)}, {row.get('labels', 'hard')} labels, n = {row['repeats']}")
        ]
    usual = "The average of two synthetic sets." if "blend" in files.facts else "A synthetic training set, made by dataset distillation."
    summary = str(recipe.get("summary", "")) or usual
    return title, summary, f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _source(data: Mapping[str, Any]) -> str:
    """Returns the name of the real data, with the last part of the path of the user's own."""
    name, path = data.get("use", ""), data.get("path")
    return f"{name} ({Path(path).name})" if path else str(name)


def _tile(name: str, value: str, beside: str) -> str:
    return f'<div class="tile"><span>{text(name)}</span><b>{text(value)}</b><span>{text(beside)}</span></div>'


# The images


def images(files: Files) -> str:
    """Returns the images of the set, class by class."""
    artifact = files.artifact
    labels = artifact.stored_labels.unique().tolist()
    shown = labels[:MOST_CLASSES]
    each = max(1, min(MOST_A_CLASS, MOST_IMAGES // len(shown)))
    pixels = {label: eight_bits(artifact.stored_images[artifact.stored_labels == label][:each]) for label in shown}
    cell = _cell(max(len(rows) for rows in pixels.values()))
    figures = []
    for label, rows in pixels.items():
        name = _name(artifact, label)
        figures.append(_figure(pictures([rows], f"Synthetic images of class {text(name)}", cell=cell), name))
    outside = ((artifact.stored_images < 0) | (artifact.stored_images > 1)).float().mean()
    words = [f"Shown in 8 bits: {100 * float(outside):.1f} % of the values lie outside 0..1 and are clipped here."]
    most = int(artifact.stored_labels.bincount().max())
    words += [f"The first {each} of {most} images of each class."] if each < most else []
    words += [f"The first {len(shown)} of {len(labels)} classes."] if len(shown) < len(labels) else []
    words += ["Reduced to fit the page."] if sides(artifact.stored_images, cell)[0] < artifact.stored_images.shape[2] else []
    return section("Images", f'<div class="images">{"".join(figures)}</div>', note(" ".join(words)))


def _cell(most: int) -> int:
    """Returns about how many pixels the longer side of an image has on the page, where a class has `most` of them."""
    return 160 if most == 1 else 112 if most <= 3 else 72


def _figure(drawing: str, caption: str) -> str:
    return f"<figure><figcaption>{text(caption)}</figcaption>{drawing}</figure>"


def _name(artifact: Artifact, label: int) -> str:
    return artifact.class_names[label] or "(no name)"


def start_and_end(files: Files) -> str:
    """Returns the images of the start above those of the end, class by class, "" where the start was not kept."""
    film = files.film
    if film is None or len(film.rows) == 0 or int(film.steps[0]) != 0 or not _trained(files):
        return ""
    tiles = _above_each_other(files, film, [film.images[0], _end(files, film)], "at the start above, the same at the end below")
    return section("Start and end", note("Above: before the first step. Below: the finished set."), tiles)


def short_name(path: Path) -> str:
    """Returns the name of a run, or of a file that is alone."""
    return path.parent.name if path.name == SET else path.name


def parts_of_blend(files: Files) -> str:
    """Returns the images of both sets of a blend around their average, class by class, "" where they were not kept."""
    film, blend = files.film, files.facts.get("blend")
    if film is None or len(film.rows) == 0 or len(film.steps) != 2 or not isinstance(blend, Mapping):
        return ""
    first, second = (short_name(Path(part["path"])) for part in blend["parts"])
    words = f"Above: the first set, {first}. In the middle: the blend. Below: the second, {second}, whose share is alpha {blend['alpha']}."
    told = "of the first set above, of the blend in the middle, of the second set below"
    tiles = _above_each_other(files, film, [film.images[0], _end(files, film), film.images[1]], told)
    return section("The two sets and their blend", note(words), tiles)


def _trained(files: Files) -> bool:
    """Whether a film is one of updates: a blend has had none, and its film holds its two sets."""
    return bool(files.facts.get("steps")) and "blend" not in files.facts


def _end(files: Files, film: Film) -> Tensor:
    return eight_bits(files.artifact.stored_images[film.rows])


def _above_each_other(files: Files, film: Film, layers: Sequence[Tensor], told: str) -> str:
    """Returns a figure for each class with its images in each of the layers (m, C, H, W), which have the rows of the film."""
    owners = files.artifact.stored_labels[film.rows]
    shown = owners.unique().tolist()[:MOST_CLASSES]
    most = max(1, min(MOST_A_CLASS, MOST_IMAGES // len(shown)))
    cell, figures = _cell(min(most, int(owners.bincount().max()))), []
    for label in shown:
        rows, name = (owners == label).nonzero().flatten()[:most], _name(files.artifact, label)
        alt = f"class {text(name)}: {len(rows)} {told}"
        figures.append(_figure(pictures([layer[rows] for layer in layers], alt, cell=cell), name))
    return f'<div class="images">{"".join(figures)}</div>'


def strip(files: Files) -> str:
    """Returns one image of each class at some steps, "" where none was kept."""
    film, artifact, last = files.film, files.artifact, files.facts.get("steps", 0)
    if film is None or len(film.rows) == 0 or not _trained(files):
        return ""
    kept = [place for place, step in enumerate(film.steps.tolist()) if step < last]
    while len(kept) > FILM_COLUMNS - 1:  # of the first steps, which are close together, some can go
        del kept[1]
    owners, end = artifact.stored_labels[film.rows], _end(files, film)
    rows = []
    for label in owners.unique().tolist()[:FILM_ROWS]:
        row, name = int((owners == label).nonzero()[0, 0]), _name(artifact, label)
        frames = [(film.images[place, row], f"step {int(film.steps[place])}") for place in kept] + [(end[row], f"step {last}")]
        rows.append((name, [picture([image[None]], f"class {text(name)}, {when}", cell=72) for image, when in frames]))
    steps = [f"{int(step):,}" for step in [*film.steps[kept], last]]
    return section("Film strip", note("The first image of a class after so many updates."), film_table(steps, rows))


# The losses and the parameters


def losses(files: Files) -> str:
    """Returns the curves of every term, raw, and of all of them weighted."""
    lines = [line for line in files.metrics if isinstance(line.get("losses"), Mapping)]
    labels = list(dict.fromkeys(label for line in lines for label in line["losses"]))
    if not labels:
        return ""
    terms = {
        kind: {label: [(line["step"], line["losses"][label][kind]) for line in lines if label in line["losses"]] for label in labels}
        for kind in ("raw", "weighted")
    }
    total = Line("total", [(line["step"], line["total"]) for line in lines])
    together = [total] + [Line(label, points) for label, points in terms["weighted"].items()]
    charts = [_curves("Weighted, and their total", together if len(labels) > 1 else [total], "weighted")]
    charts += [_curves(f"{label}, raw", [Line(label, terms["raw"][label])], "raw", known=False) for label in labels]
    rows = [
        [label, *(number(points[label][place][1]) for points in (terms["raw"], terms["weighted"]) for place in (0, -1))] for label in labels
    ]
    first, last = lines[0]["step"], lines[-1]["step"]
    columns = ["loss", f"raw, step {first}", f"raw, step {last}", f"weighted, step {first}", f"weighted, step {last}"]
    typical = typical_shares(lines)
    if typical:
        charts.insert(1, _shares(lines, labels))
        rows = [[*row, f"{100 * typical.get(row[0], 0.0):.1f} %"] for row in rows]
        columns.append("share of the gradient, median")
    figures = table(columns, rows)
    return section("Losses", f'<div class="charts">{"".join(charts)}</div>', figures)


def _shares(lines: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """Returns the chart of the losses' shares of the gradient on the images: of the norms of their weighted gradients."""
    found = [(line["step"], own) for line in lines if (own := shares(line))]
    curves = [Line(label, [(step, 100 * own[label]) for step, own in found if label in own]) for label in labels]
    what = "Shares of the gradient on the images"
    drawing = line_chart(curves, x="step", y="% of the sum of norms", log=False, what=f"{what}: {', '.join(labels)} over the steps")
    return chart(what, drawing, legend(labels))


def _curves(title: str, lines: Sequence[Line], y: str, *, known: bool = True) -> str:
    values = [value for line in lines for _, value in line.points]
    log = wants_log([value for value in values if can_be_drawn(value)])
    names = ", ".join(line.name for line in lines)
    drawing = line_chart(lines, x="step", y=f"{y}{' (log scale)' if log else ''}", log=log, what=f"{title}: {names} over the steps")
    return chart(title, drawing, legend([line.name for line in lines]) if known and len(lines) > 1 else "")


def parameters(files: Files) -> str:
    """Returns the distribution of every extra parameter of the set: the multipliers of DKKT are one."""
    found = {name: value.flatten().double() for name, value in files.artifact.parameters.items() if value.is_floating_point()}
    kept = {name: value for name, value in found.items() if value.numel() and can_be_drawn(float(value.abs().max()))}
    rows = [[name, *_spread(value)] for name, value in kept.items()]
    charts = "".join(_histogram(name, value) for name, value in kept.items())
    figures = table(["parameter", "values", "smallest", "median", "largest", "exactly 0"], rows) if rows else ""
    return section("Parameters beside the images", f'<div class="charts">{charts}</div>' if charts else "", figures)


def _spread(value: Tensor) -> list[str]:
    """Returns how many values, the smallest, median and largest, and the share that is exactly 0."""
    zero = float((value == 0).double().mean())
    return [f"{value.numel():,}", *(number(float(each)) for each in (value.min(), value.median(), value.max())), f"{100 * zero:.1f} %"]


def _histogram(name: str, values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - max(0.5, abs(low) / 10), high + max(0.5, abs(high) / 10)
    edges = [low + (high - low) * index / BINS for index in range(BINS + 1)]
    places = ((values - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    counts = torch.bincount(places, minlength=BINS).tolist()
    return chart(name, bar_chart(edges, counts, x="value", y="how many", what=f"Histogram of {name}"))


# Spectra


def spectrum_bins(height: int, width: int) -> int:
    """Returns the bands of the spectra of such images, 0 where they are too small to have one."""
    return min(16, min(height, width) // 2) if min(height, width) >= 4 else 0


def spectra(files: Files) -> str:
    """Returns the radial spectrum of the set beside that of the real images, where it was kept."""
    height, width = files.artifact.images.shape[-2:]
    bins = spectrum_bins(height, width)
    if not bins:
        return ""
    frequencies, shares = radial_spectrum(files.artifact.images, bins)
    shown = {"synthetic": shares}
    real = files.facts.get("real_spectrum")
    if isinstance(real, list) and len(real) == bins:
        shown["real"] = real
    empty = [not any(values) for values in zip(*shown.values(), strict=True)]  # small images have no frequency in the lowest band
    lines = [
        Line(name, [(f, share) for f, share, left_out in zip(frequencies, values, empty, strict=True) if not left_out])
        for name, values in shown.items()
    ]  # fmt: skip
    log = wants_log([value for line in lines for _, value in line.points if value > 0])
    drawing = line_chart(
        lines, x="cycles per pixel", y=f"share of the power{' (log scale)' if log else ''}", log=log, what="Radial spectra"
    )
    words = "The share of the images' power, without their mean, in bands of spatial frequency; above 0.25 lies fine detail, and noise."
    words += " Real: accessible images, 1,000 at most." if len(lines) > 1 else ""
    return section(
        "Spectra", note(words), f'<div class="charts">{chart("Radial spectrum", drawing, legend([line.name for line in lines]))}</div>'
    )


# Evaluation


def _rows(files: Files, labels: str) -> list[Mapping[str, Any]]:
    return [row for row in files.evaluations if row.get("labels", "hard") == labels and isinstance(row.get("accuracy_mean"), float | int)]


def _named(row: Mapping[str, Any]) -> str:
    parts = [row.get("model", ""), row.get("protocol", "")]
    details = row.get("details", {})
    epochs, variant = (f"{details['epochs']} epochs" if details.get("epochs") else ""), str(details.get("variant") or "")
    parts += ["" if epochs and epochs in variant else epochs, variant]  # where the epochs are not the protocol's, the variant tells them
    parts += [str(row["images"])] if row.get("images", "synthetic") != "synthetic" else []
    parts += [str(row["split"])] if row.get("split", "test") != "test" else []
    return ", ".join(str(part) for part in parts if part)


def _percent(row: Mapping[str, Any], key: str) -> str:
    mean, std = row.get(f"{key}_mean"), row.get(f"{key}_std")
    if mean is None:
        return "-"
    told = f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"
    return f"{told} %".replace(" ", "\u00a0")


def _random_real(row: Mapping[str, Any]) -> str:
    """Returns the accuracy of the random real images, and how many they are if that is not as many as the set has."""
    said = row.get("details", {}).get("random_real")
    return _percent(row, "random_real") + (f" ({said})" if said else "")


def evaluation(files: Files) -> str:
    """Returns accuracies with random real beside, hard and soft labels apart."""
    parts = []
    for labels, title in (("hard", "Hard labels"), ("soft", "Soft labels: the teacher's probabilities")):
        rows = _rows(files, labels)
        if rows:
            parts += [f"<h3>{text(title)}</h3>", f'<div class="charts">{_dots(rows, title)}</div>', _figures(rows)]
    words = (
        "Networks trained from scratch on the set, after the last epoch: mean ± sample standard deviation over n networks, which the error "
        "bars show. Random real: as many random real images of each class, or as many as stands beside, drawn anew for each network from "
        "the accessible ones, under the same protocol. Figures under different protocols, or with hard and with soft labels, cannot be "
        "compared."
    )
    parts = [note(words), *parts] if parts else []
    return section("Evaluation", _ceiling(files), *([*parts, *_findings(files)] or [note("None is recorded.")]))


def _ceiling(files: Files) -> str:
    """Returns how good the teacher and networks of all accessible images are, beside which accuracies may be read; "" if not known."""
    facts = files.facts.get("teacher")
    facts = facts if isinstance(facts, Mapping) else {}
    count = facts.get("accessible_images")
    rows = [("the test images, as recorded when it was trained", "test_accuracy"), (f"{count} accessible images", "accessible_accuracy")]
    known = [f"{100 * facts[key]:.1f} % of {what}" for what, key in rows if isinstance(facts.get(key), float | int)]
    told = [f"the teacher is right on {' and '.join(known)}"] if known else []
    told += [
        f"networks trained on all accessible images reach {_percent(row, 'accuracy')} ({_named(row)})"
        for row in _rows(files, "hard") if row.get("images") == "pipc-real"
    ]  # fmt: skip
    return note(f"A ceiling: {'; '.join(told)}.") if told else ""


def _findings(files: Files) -> list[str]:
    """Returns what evaluators say in words, those too that train no network and have no accuracy."""
    told = [(row, str(row.get("details", {}).get("summary", ""))) for row in files.evaluations]
    rows = [[str(row.get("evaluator", "")), "" if row.get("model") == "-" else _named(row), words] for row, words in told if words]
    if not rows:
        return []
    close = any(row.get("evaluator") == "memorisation" and row.get("details", {}).get("close") for row in files.evaluations)
    warning = "Images of this set are close to real ones: it does not hide the images that it was made from."
    return ["<h3>What else was found</h3>", f"<p><b>{warning}</b></p>" if close else "", table(["evaluator", "network", "finding"], rows)]


def _dots(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    dots = [Dots(_named(row), [_pair(row, "accuracy"), _pair(row, "random_real")]) for row in rows]
    drawing = dot_chart(dots, x="accuracy in %", what=f"{title}: accuracies with error bars")
    return chart("Accuracy", drawing, legend(["trained on the set", "random real"]))


def _pair(row: Mapping[str, Any], key: str) -> tuple[float, float | None] | None:
    mean, std = row.get(f"{key}_mean"), row.get(f"{key}_std")
    return None if mean is None else (100 * mean, None if std is None else 100 * std)


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        mean, real = row["accuracy_mean"], row.get("random_real_mean")
        more = "-" if real is None else f"{100 * (mean - real):+.1f}"
        told = [
            str(row.get("evaluator", "")),
            _named(row),
            str(row.get("repeats", "")),
            _percent(row, "accuracy"),
            _random_real(row),
        ]
        lines.append([*told, more])
    return table(["evaluator", "network and protocol", "n", "accuracy", "random real", "difference"], lines)


SECTIONS = (images, parts_of_blend, start_and_end, strip, losses, parameters, spectra, evaluation)
