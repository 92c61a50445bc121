"""The data set card: a README.md with YAML front matter that says what a set is, where it comes from and how good it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
from torch import Tensor

import ddkit

README = "README.md"
LEVELS = 255
FOLDED = 100  # classes; of more the table opens on a click
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))  # of Hugging Face
LOAD_SET = [
    "import ddkit",
    "",
    'synthetic = ddkit.load("synthetic.safetensors")',
    "images, labels = synthetic.images, synthetic.labels  # pixel units, 0 to 1, not clipped",
    "data = synthetic.as_dataset()  # a torch Dataset, as networks should see it: normalised, or whitened",
]


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
    """A dataset card only: README.md with YAML front matter, for the folder of synthetic.safetensors.

    It describes the set, its origin, how to load it, and its accuracies compared with those of random real images.
    Fill in the licence yourself. The other exporters write such a card too.
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
    found, source, start = artifact.provenance, _source(artifact), _start(artifact)
    count, channels, height, width = artifact.images.shape
    ipc = artifact.metadata.get("ipc")
    files = {"synthetic.safetensors (the set from which this was made)": found.sha256}
    files |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in layout.files}
    recipe = tomli_w.dumps(ddkit.data.without_folders(found.recipe)).rstrip() if found.recipe else ""
    text: str = _template().render(
        title=f"{source or 'Images'}, distilled" + (f": {ipc} image{'s' if ipc != 1 else ''} per class" if ipc else ""),
        source=source,
        size=next((text for most, text in SIZES if count < most), "n>1M"),
        count=count,
        makes=artifact.parametrization.name if artifact.parametrization else "",
        numbers=artifact.stored_numbers,
        as_images=artifact.stored_as_images,
        channels=channels,
        height=height,
        width=width,
        low=float(artifact.images.min()),
        high=float(artifact.images.max()),
        mean=", ".join(f"{value:.6g}" for value in artifact.mean),
        std=", ".join(f"{value:.6g}" for value in artifact.std),
        whitened=artifact.whitening is not None,
        optimised=found.manifest.get("steps") != 0 or _is_derived(artifact),
        start=start,
        labels="" if artifact.soft_labels is None else artifact.metadata.get("labels", "soft"),
        load=layout.load,
        folders=layout.folders,
        folded=FOLDED,
        classes=_classes(artifact, layout),
        rounding=layout.rounding,
        made=_made(artifact),
        accuracies=_accuracies(found.evaluations),
        findings=[(row.get("evaluator", ""), words) for row in found.evaluations if (words := row.get("details", {}).get("summary"))],
        closeness=_closeness(found.evaluations),
        files=[(name, digest) for name, digest in files.items() if digest],
        versions=", ".join(f"{name} {version}" for name, version in found.manifest.get("versions", {}).items()),
        recipe=recipe,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
    )
    return text.rstrip("\n") + "\n"


@cache
def _template() -> Any:
    """Returns the template card.md, every value of which is shown as plain text on a Markdown page; `as_is` excepts one."""
    import jinja2
    from markupsafe import Markup

    made = jinja2.Environment(
        autoescape=True, loader=jinja2.PackageLoader(__package__, ""), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(ddkit.markdown(value)),
    )  # fmt: skip
    made.filters |= {"as_is": Markup, "json": lambda value: Markup(json.dumps(value))}
    return made.get_template("card.md")


def _source(artifact: ddkit.Artifact) -> str:
    """Returns the name of the source data, with the last part of the path of the user's own; "" of a joined set, which has several."""
    if "join" in artifact.provenance.manifest:
        return ""
    table = artifact.provenance.recipe.get("data", {})
    name = table.get("use", "")
    return f"{name} ({Path(table['path']).name})" if table.get("path") else name


def _is_derived(artifact: ddkit.Artifact) -> bool:
    """Whether the set is made of others: no steps of its own tell how."""
    return bool({"blend", "join", "split"} & set(artifact.provenance.manifest))


def _parts(artifact: ddkit.Artifact) -> str:
    """Returns in words the sets that a set is made of, "" if it is made of none."""
    tables = [artifact.provenance.manifest.get(kind, {}) for kind in ("join", "split")]
    parts = [part for table in tables for part in table.get("parts", [])]
    return "; ".join(
        f"{part.get('images', 0)} images of {len(part.get('class_names', []))} classes, sha256 {part['sha256'][:12]}" for part in parts
    )


def _start(artifact: ddkit.Artifact) -> str:
    """Returns what the run began with in words, "" where that is not known."""
    table = artifact.provenance.recipe.get("initializer", {})
    name = table.get("use", "")
    if not name or _is_derived(artifact):
        return ""
    kinds = {"noise": "noise", "file": "images of an earlier set or folder"}
    return f"{kinds.get(name) or _taken(name, table)} (initializer {name})"


def _taken(name: str, table: Mapping[str, Any]) -> str:
    """Returns in words what an initializer with the table of a recipe begins with, as far as this machine can tell."""
    options = {key: value for key, value in table.items() if key not in ("use", "reuse")}
    try:
        needs_real = ddkit.create("initializer", name, options).requires.real
    except ddkit.DdkitError:  # it is not installed here, or has other options by now
        return "images of its own, perhaps real ones"
    return "real images" if needs_real else "images"


def _classes(artifact: ddkit.Artifact, layout: Layout) -> list[list[Any]]:
    """Returns (label, name, images) of every class, and its folder where there are some."""
    counts = artifact.labels.bincount(minlength=len(artifact.class_names)).tolist()
    rows: list[list[Any]] = [[label, name, counts[label]] for label, name in enumerate(artifact.class_names)]
    if layout.folders:
        return [[*row, f"train/{folder}" if row[2] else "none"] for row, folder in zip(rows, layout.folders, strict=True)]
    return rows


def _made(artifact: ddkit.Artifact) -> list[tuple[str, Any]]:
    """Returns the rows (name, value) of what is known of how the set was made."""
    found, metadata = artifact.provenance, artifact.metadata
    pipc = metadata.get("pipc", found.recipe.get("pipc", ""))
    teacher, losses = found.manifest.get("teacher"), found.recipe.get("losses", {})
    accessible = "all training images" if pipc == "all" else f"{pipc} real image{'s' if pipc != 1 else ''} of each class"
    facts = {
        "source data": _source(artifact),
        "accessible while distilling": accessible if pipc != "" else "",
        "recipe": metadata.get("recipe") or found.recipe.get("name", ""),
        "whitening": "" if artifact.whitening is None else f"ZCA, {len(artifact.whitening.vectors):,} directions",
        "losses and weights": ", ".join(f"{label} {_figure(table.get('weight', 1.0), '{:g}')}" for label, table in losses.items()),
        "made of": _parts(artifact),
        "steps": "" if _is_derived(artifact) else found.manifest.get("steps", found.recipe.get("steps", "")),
        "seed": metadata.get("seed", ""),
        "trained model (teacher)": f"yes, sha256 {teacher.get('sha256')}" if isinstance(teacher, Mapping) else "",
        "device": found.manifest.get("device", ""),
    }
    return [(name, value) for name, value in facts.items() if value != ""]


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[list[Any]]]]:
    """Returns (title, rows) of accuracies, rows of different labels apart."""
    groups = []
    titles = {"hard": "Hard labels", "stored": "Labels stored with the set", "teacher": "The teacher's labels of each augmented batch"}
    for labels, title in titles.items():
        lines = []
        for row in rows:
            if row.get("labels", "hard") != labels or row.get("accuracy_mean") is None:
                continue
            details = row.get("details", {})
            epochs = f"{details['epochs']} epoch{'s' if details['epochs'] != 1 else ''}" if details.get("epochs") else ""
            variant = str(details.get("variant") or "")
            told = [str(row.get("protocol", "")), "" if epochs and epochs in variant else epochs, variant]
            protocol = ", ".join(part for part in told if part)
            real = _percent(row, "random_real") + (f" ({details['random_real']})" if details.get("random_real") else "")
            images, split = row.get("images", "synthetic"), row.get("split", "test")
            lines.append([images, row.get("model", ""), protocol, split, row.get("repeats", ""), _percent(row, "accuracy"), real])
        groups += [(title, lines)] if lines else []
    return groups


def _closeness(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns how many of the images are close to real ones, {} where nobody has looked."""
    details = next((row.get("details", {}) for row in rows if row.get("evaluator") == "memorisation"), None)
    if details is None:
        return {}
    quantile = details.get("quantile", 0.05)
    share = f"{100 * (1 - quantile):g}" if isinstance(quantile, float) else "most"
    return {"close": details.get("close", 0), "images": len(details.get("nearest", ())), "share": share}


def _percent(row: Mapping[str, Any], key: str) -> str:
    mean, std = row.get(f"{key}_mean"), row.get(f"{key}_std")
    if mean is None:
        return "not measured"
    return " ± ".join(_figure(100 * value if isinstance(value, float) else value, "{:.1f}") for value in (mean, std) if value is not None)


def _figure(value: Any, form: str) -> str:
    """Returns a number as `form` writes it; what else stands in its place in a file of a run, as text."""
    return form.format(value) if isinstance(value, int | float) else str(value)
