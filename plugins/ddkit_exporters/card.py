"""The data set card: a README.md with YAML front matter that says what a set is, where it comes from and how good it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
from torch import Tensor

import ddkit
from ddkit import markdown

README = "README.md"
LEVELS = 255
FOLDED = 100  # classes; of more the table opens on a click
REAL_STARTS = ("real", "kmeans", "herding", "k-center", "multiplier", "mix")  # initializers that begin with real images
LOAD_SET = [
    "import ddkit",
    "",
    'synthetic = ddkit.load("synthetic.safetensors")',
    "images, labels = synthetic.images, synthetic.labels  # pixel units, 0 to 1, not clipped",
    "data = synthetic.as_dataset()  # a torch Dataset, normalised by the mean and std of the set",
]
LOAD_HUB = ["from datasets import load_dataset", "", 'data = load_dataset("imagefolder", data_dir=".", split="train")']


class Rounding(NamedTuple):
    """What 8 bits cost: errors in grey levels (1 / 255), `outside` of `values` values were clipped."""

    rounded: float
    clipped: float
    outside: int
    values: int


class Layout(NamedTuple):
    """What an exporter has written: how to load it, its files, the folder of each class, and what 8 bits cost."""

    load: Sequence[str]
    files: Sequence[Path] = ()
    folders: Sequence[str] = ()
    rounding: Rounding | None = None


class Card(ddkit.Exporter):
    """A data set card alone: README.md with YAML front matter, to put beside synthetic.safetensors.

    It says what the set is, where it comes from, how to load it, and its accuracies with those of random real images beside.
    The licence is left for you to fill in. The other exporters write such a card too.
    """

    def __call__(self, artifact: ddkit.Artifact, folder: str) -> None:
        write_card(artifact, folder, Layout(LOAD_SET))


def write_card(artifact: ddkit.Artifact, folder: str, layout: Layout) -> None:
    """Writes README.md into `folder`."""
    Path(folder, README).write_text(card(artifact, layout), encoding="utf-8")


def eight_bit(images: Tensor) -> tuple[Tensor, Rounding]:
    """Returns images in pixel units as uint8, clipped to 0..1 and rounded, and the largest errors in grey levels."""
    found = (images.double().clamp(0, 1) * LEVELS).round()
    errors = (images.double() * LEVELS - found).abs()
    outside = (images < 0) | (images > 1)
    rounded, clipped = (float(errors[mask].max()) if bool(mask.any()) else 0.0 for mask in (~outside, outside))
    return found.to(torch.uint8), Rounding(rounded, clipped, int(outside.sum()), images.numel())


def card(artifact: ddkit.Artifact, layout: Layout) -> str:
    """Returns the text of a card."""
    parts = [
        _front_matter(artifact, layout), f"# {markdown(_title(artifact))}", _summary(artifact), _loading(layout),
        _classes(artifact, layout), _eight_bits(layout), _made(artifact), _accuracy(artifact), _closeness(artifact),
        _licence(artifact), _files(artifact, layout), _recipe(artifact),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(artifact: ddkit.Artifact, layout: Layout) -> str:
    """Returns the YAML; strings are written as in JSON, which YAML reads."""
    count = len(artifact.labels)
    sizes = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    size = next((text for most, text in sizes if count < most), "n>1M")
    lines = [
        "license: unknown  # to be filled in", f"pretty_name: {json.dumps(_title(artifact))}", "task_categories:",
        "- image-classification", "size_categories:", f"- {size}", "tags:", "- dataset-distillation", "- synthetic", "- ddkit",
    ]  # fmt: skip
    if layout.folders:
        lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train", '    path: "train/**"']
    return "\n".join(["---", *lines, "---"])


def _source(artifact: ddkit.Artifact) -> str:
    """Returns the name of the source data, with the last part of the path of the user's own."""
    table = artifact.provenance.recipe.get("data", {})
    name = table.get("use", "") if isinstance(table, Mapping) else str(table)
    path = table.get("path", "") if isinstance(table, Mapping) else ""
    return f"{name} ({Path(str(path)).name})" if path else str(name)


def _title(artifact: ddkit.Artifact) -> str:
    ipc = artifact.metadata.get("ipc")
    return f"{_source(artifact) or 'Images'}, distilled" + (f": {ipc} image{'s' if ipc != 1 else ''} a class" if ipc else "")


def _summary(artifact: ddkit.Artifact) -> str:
    count, channels, height, width = artifact.images.shape
    low, high = float(artifact.images.min()), float(artifact.images.max())
    stored = len(artifact.stored_labels)
    grids = f" They are decoded from {stored} stored images, each a grid of {count // stored}." if stored < count else ""
    return (
        f"A synthetic training set of {count} images in {len(artifact.class_names)} classes, {height} x {width} pixels, "
        f"{channels} channel{'s' if channels > 1 else ''}.{grids} {_what_they_are(artifact)}\n\n"
        f"In pixel units (0 black, 1 white, not clipped) the values of the set lie in {low:.4g} to {high:.4g}. Networks should see them "
        f"normalised, (x - mean) / std a channel, with mean {_numbers(artifact.mean)} and std {_numbers(artifact.std)}; "
        "normalise test images in the same way."
    )


def _what_they_are(artifact: ddkit.Artifact) -> str:
    """Returns what the images are: optimised ones, unless the run took no step."""
    manifest = artifact.provenance.manifest
    if manifest.get("steps") == 0 and "blend" not in manifest:
        return (
            f"They are {_start(artifact) or 'the first images of a run'}, as a run of no steps took them: nothing was optimised. "
            "Each is labelled by its class alone."
        )
    return (
        "The images were optimised so that a network trained on them from scratch does well on real test images (dataset distillation), "
        "and each is labelled by its class alone."
    )


def _start(artifact: ddkit.Artifact) -> str:
    """Returns what the run began with in words, "" where that is not known."""
    table = artifact.provenance.recipe.get("initializer", {})
    name = table.get("use", "") if isinstance(table, Mapping) else str(table)
    if not name or "blend" in artifact.provenance.manifest:
        return ""
    kinds = {"noise": "noise", "file": "images of an earlier set or folder"}
    kind = kinds.get(str(name), "real images" if name in REAL_STARTS else "images")
    return f"{kind} (initializer {markdown(name)})"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _loading(layout: Layout) -> str:
    if not layout.load:
        return ""
    text = ["## Loading it", "", "```python", *layout.load, "```"]
    if layout.folders:
        text += [
            "",
            "With Hugging Face datasets (`label` is that of the table below, `class_name` its name):",
            "",
            "```python",
            *LOAD_HUB,
            "```",
        ]
    return "\n".join(text)


def _classes(artifact: ddkit.Artifact, layout: Layout) -> str:
    counts = artifact.labels.bincount(minlength=len(artifact.class_names)).tolist()
    head, line = ["label", "class", "images"], "|---|---|---|"
    rows = [[str(label), markdown(name), str(counts[label])] for label, name in enumerate(artifact.class_names)]
    if layout.folders:
        head, line = [*head, "folder"], line + "---|"
        rows = [
            [*row, markdown(f"train/{folder}") if count else "none"]
            for row, folder, count in zip(rows, layout.folders, counts, strict=True)
        ]
    table = [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]
    if len(rows) > FOLDED:
        table = [f"<details><summary>{len(rows):,} classes</summary>", "", *table, "", "</details>"]
    return "\n".join(["## Classes", "", *table])


def _eight_bits(layout: Layout) -> str:
    cost = layout.rounding
    if cost is None:
        return ""
    clipped = "No value lay outside 0..1, so nothing was clipped."
    if cost.outside:
        clipped = (
            f"{cost.outside:,} of {cost.values:,} values ({100 * cost.outside / cost.values:.2f} %) lay outside 0..1 and were clipped, the "
            f"farthest by {cost.clipped:.1f} levels ({cost.clipped / LEVELS:.4f})."
        )
    return (
        "## Eight bits\n\nThe files have 8 bits a value: the set was clipped to 0..1 and rounded to 256 grey levels, so they are not "
        f"exactly the set. Rounding changed a value by {cost.rounded:.3f} levels at most (one level is 1/255). {clipped} "
        "Accuracies below are those of the set itself; the exporter `npz` keeps it bit for bit."
    )


def _made(artifact: ddkit.Artifact) -> str:
    found, metadata = artifact.provenance, artifact.metadata
    accessible = metadata.get("pipc", found.recipe.get("pipc"))
    teacher, losses = found.manifest.get("teacher"), found.recipe.get("losses", {})
    weights = {label: table.get("weight", 1.0) for label, table in losses.items()}
    facts = {
        "source data": markdown(_source(artifact)),
        "accessible while distilling": "" if accessible is None else _access(accessible),
        "recipe": markdown(metadata.get("recipe") or found.recipe.get("name", "")),
        "losses and weights": ", ".join(f"{markdown(label)} {_figure(weight, '{:g}')}" for label, weight in weights.items()),
        "steps": markdown(found.manifest.get("steps", found.recipe.get("steps", ""))),
        "seed": markdown(metadata.get("seed", "")),
        "trained model (teacher)": f"yes, sha256 {markdown(teacher.get('sha256'))}" if isinstance(teacher, Mapping) else "",
        "device": markdown(found.manifest.get("device", "")),
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value]
    return "\n".join(["## How it was made", "", "| | |", "|---|---|", *rows]) if rows else ""


def _access(pipc: int | str) -> str:
    return "all training images" if pipc == "all" else f"{markdown(pipc)} real image{'s' if pipc != 1 else ''} of each class"


def _accuracy(artifact: ddkit.Artifact) -> str:
    rows = artifact.provenance.evaluations
    if not rows:
        return "## Accuracy\n\nNone is recorded. (`ddkit evaluate RUN` measures it.)"
    parts = [
        "## Accuracy\n\nOf networks trained from scratch on the set, after the last epoch, in %: mean ± sample standard deviation over n "
        "networks. Random real is the same with as many random real images of each class, or as many as stands beside it, drawn from the "
        "accessible ones. Figures under different protocols, or with hard and with soft labels, cannot be compared."
    ]
    for labels, title in (("hard", "Hard labels"), ("soft", "Soft labels (the teacher's probabilities)")):
        own = [row for row in rows if row.get("labels", "hard") == labels and row.get("accuracy_mean") is not None]
        parts += [f"### {title}\n\n{_table(own)}"] if own else []
    if len(parts) == 1:
        parts = ["## Accuracy\n\nNone is recorded. (`ddkit evaluate RUN` measures it.)"]
    return "\n\n".join([*parts, *filter(None, [_findings(rows)])])


def _findings(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns what evaluators say in words, those too that have no accuracy, "" where none does."""
    told = [(row, str(row.get("details", {}).get("summary", ""))) for row in rows]
    lines = [f"| {markdown(row.get('evaluator', ''))} | {markdown(words)} |" for row, words in told if words]
    return "\n".join(["### What else was found", "", "| evaluator | finding |", "|---|---|", *lines]) if lines else ""


def _closeness(artifact: ddkit.Artifact) -> str:
    """Returns how close the images are to real ones, with a warning where they are, or where nobody has looked."""
    start = _start(artifact)
    began = f"The set began with {start}." if start else ""
    row = next((row for row in artifact.provenance.evaluations if row.get("evaluator") == "memorisation"), None)
    if row is None:
        words = "How close its images are to real ones was not measured (`ddkit evaluate RUN --evaluate memorisation` does it)."
        words += " Do not claim that the set hides the images that it was made from." if "noise" not in start else ""
        return f"## Closeness to real images\n\n{' '.join(part for part in (began, words) if part)}"
    details = row.get("details", {})
    close, quantile = details.get("close", 0), details.get("quantile", 0.05)
    share = 100 * (1 - quantile) if isinstance(quantile, float) else "most"
    measured = (
        f"{markdown(close)} of {len(details.get('nearest', ()))} images are nearer to a real image that the run could see than "
        f"{_figure(share, '{:g}')} % of those are to each other."
    )
    warning = (
        f"**Warning: this set shows real images.** {measured} It does not hide the images that it was made from: "
        "publish it only where those may be published."
    )
    calm = f"{measured} That is no proof that the set protects them: distances of pixels find copies, and little more."
    return f"## Closeness to real images\n\n{' '.join(part for part in (warning if close else calm, began) if part)}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| trained on | model | protocol | tested on | n | accuracy | random real |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        told = [str(row.get(key, usual)) for key, usual in (("images", "synthetic"), ("model", ""), ("protocol", ""), ("split", "test"))]
        details = row.get("details", {})
        epochs, variant = (f"{details['epochs']} epochs" if details.get("epochs") else ""), str(details.get("variant") or "")
        told[2] = ", ".join(part for part in (told[2], "" if epochs and epochs in variant else epochs, variant) if part)
        figures = [_percent(row.get(f"{key}_mean"), row.get(f"{key}_std")) for key in ("accuracy", "random_real")]
        figures[1] += f" ({markdown(details['random_real'])})" if details.get("random_real") else ""
        lines.append(f"| {' | '.join([*map(markdown, [*told, row.get('repeats', '')]), *figures])} |")
    return "\n".join(lines)


def _percent(mean: Any, std: Any) -> str:
    if mean is None:
        return "not measured"
    return " ± ".join(_figure(100 * value if isinstance(value, float) else value, "{:.1f}") for value in (mean, std) if value is not None)


def _figure(value: Any, form: str) -> str:
    """Returns a number as `form` writes it; what else stands in its place in a file of a run, as text."""
    return form.format(value) if isinstance(value, int | float) else markdown(value)


def _licence(artifact: ddkit.Artifact) -> str:
    source = markdown(_source(artifact)) or "the source data"
    return (
        f"## Licence\n\n**To be filled in.** The set is derived from {source}, and its licence has to agree with that of these data. "
        "Replace this paragraph and the key `license` at the top of the file."
    )


def _files(artifact: ddkit.Artifact, layout: Layout) -> str:
    digests = {"synthetic.safetensors (the set that this was made from)": artifact.provenance.sha256}
    digests |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in layout.files}
    versions = artifact.provenance.manifest.get("versions", {})
    lines = [f"| {markdown(name)} | `{digest}` |" for name, digest in digests.items() if digest]
    parts = [["| file | sha256 |", "|---|---|", *lines]] if lines else []
    parts += (
        [["Made with " + ", ".join(f"{markdown(name)} {markdown(version)}" for name, version in versions.items()) + "."]]
        if versions
        else []
    )
    return "\n\n".join(["## Files and versions", *("\n".join(part) for part in parts)]) if parts else ""


def _recipe(artifact: ddkit.Artifact) -> str:
    """Returns the resolved recipe, of absolute paths the last part alone."""
    table = artifact.provenance.recipe
    if not table:
        return ""
    text = tomli_w.dumps(ddkit.without_folders(table)).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    note = "Of absolute paths the last part is shown. `ddkit distill --recipe FILE` makes the set from such a file."
    return f"## Recipe\n\n{note}\n\n{fence}toml\n{text}\n{fence}"
