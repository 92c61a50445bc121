"""The parts of a report that tell what made a run: times, device, versions, plugins, recipe."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w

from ddkit.files import without_folders
from ddkit.run.report.charts import text
from ddkit.run.report.page import note, section, table, time
from ddkit.run.report.sections import Files, short_name

FOLDERS = re.compile(r"(?<![\w.~/])(?:/[^\s/:'\",]+)+/(?=[^\s/])")  # of an absolute path in a message, as far as its last part


def making(files: Files) -> str:
    """Returns times, device, versions and plugins."""
    facts = files.facts
    seconds, steps = facts.get("seconds", 0.0), facts.get("steps", 0)
    rows: list[list[str]] = []
    if steps:
        rows.append(["distillation", time(f"{seconds:,.1f} s{_a_step(files)}")])
    rows += [[key, str(facts[key])] for key in ("device", "threads", "seed") if facts.get(key) is not None]
    teacher = facts.get("teacher")
    rows += [["trained model (teacher)", f"sha256 {teacher['sha256']}"]] if isinstance(teacher, Mapping) else []
    rows += _blend(facts)
    rows += [["accessible real images", f"{len(facts['real_files']):,}"]] if facts.get("real_files") else []
    rows += [["warned of", FOLDERS.sub("", message)] for message in facts.get("warnings", [])]
    rows += [["versions", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())]]
    parts = [table([], rows)]
    used = [[p.get("kind", ""), p.get("name", ""), p.get("distribution", ""), p.get("version", "")] for p in facts.get("plugins", [])]
    parts += ["<h3>Plugins</h3>", table(["kind", "name", "from", "version"], used)] if used else []
    return section("Time and environment", *parts)


def _a_step(files: Files) -> str:
    """Returns the median time of a step, from the times of the logged ones, "" where there are too few."""
    times = [(line["step"], line["seconds"]) for line in files.metrics if "seconds" in line]
    pace = [(late - early) / (last - first) for (first, early), (last, late) in pairwise(times) if late > early]
    return f", {1000 * statistics.median(pace):.1f} ms a step" if pace else ""


def _blend(facts: Mapping[str, Any]) -> list[list[str]]:
    blend = facts.get("blend")
    if not isinstance(blend, Mapping):
        return []
    parts = [f"{short_name(Path(part['path']))} (sha256 {part['sha256'][:12]})" for part in blend.get("parts", [])]
    return [["blend", f"alpha {blend.get('alpha')} of {' and '.join(parts)}"]]


def recipe(files: Files) -> str:
    """Returns the resolved recipe as it is written, without the user's folders."""
    if not files.recipe:
        return ""
    words = "Resolved: every setting, also those that were decided by themselves. Of absolute paths the last part is shown. "
    words += "ddkit distill --recipe FILE repeats the run."
    told = text(tomli_w.dumps(without_folders(dict(files.recipe))))
    return section("Recipe", note(words), f"<details><summary>recipe.toml</summary><pre>{told}</pre></details>")


SECTIONS = (making, recipe)
