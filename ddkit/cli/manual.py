"""The page of a component, recipe or study as `ddkit info` shows it: in the order and manner of a manual page."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

WIDEST, INDENT = 100, "    "
USED = {  # the first command of each kind; NAME is the component's
    "loss": "ddkit distill --losses NAME",
    "loss-group": "ddkit distill --losses NAME",
    "initializer": "ddkit distill --init NAME",
    "augmenter": "ddkit distill --augment NAME",
    "evaluator": "ddkit distill --evaluate NAME",
    "model": "ddkit distill --model NAME",
    "dataset": "ddkit distill --dataset NAME",
    "exporter": "ddkit export my-run --to NAME --out exported",
}
MORE_USES = {
    "evaluator": ["ddkit evaluate RUN --evaluate NAME[,...]"],
    "model": ["ddkit train --model NAME --out FILE", "ddkit evaluate RUN --model NAME[,...]"],
    "dataset": ["ddkit train --dataset NAME --out FILE", "ddkit evaluate FILE --dataset NAME"],
}
PATHS = {  # where the options of a kind stand in a recipe
    "loss": ["losses.NAME"],
    "initializer": ["initializer"],
    "augmenter": ["augmenter", "views.VIEW"],
    "evaluator": ["evaluators.NAME"],
    "model": ["network", "teacher", "evaluators.accuracy.model_options"],
    "dataset": ["data"],
}
EXAMPLES = {
    "loss": "ddkit distill --losses NAME --ipc 1 --pipc 10",
    "loss-group": "ddkit distill --losses dm,NAME:0.5 --ipc 1 --pipc 10",
    "initializer": "ddkit distill --losses dm --ipc 10 --init NAME",
    "augmenter": "ddkit distill --losses dm --augment NAME",
    "evaluator": "ddkit evaluate my-run --evaluate NAME",
    "model": "ddkit evaluate my-run --model convnet,NAME",
    "dataset": "ddkit distill --losses dm --dataset NAME --ipc 1",
    "exporter": "ddkit export my-run --to NAME --out exported",
    "recipe": "ddkit distill --recipe NAME --plan",
    "study": "ddkit reproduce NAME --show",
}
ASKS = {
    "real": "real images that the run may use (--pipc)",
    "network": "the network of each step, or its features",
    "teacher": "a trained model (--teacher FILE, else one is trained)",
    "second_order": "second derivatives, through gradients by parameters of network or trained model; float32, not compiled",
    "views": "augmented views of the set, recipe tables [views.NAME]",
    "parameters": "parameters of the set beside its images, which are optimised too",
    "reduce": "the value can be computed for parts of the set, so that large sets fit",
}


def manual_page(facts: Mapping[str, Any], settings: str = "") -> str:
    """Returns the page; `facts` are those of `ddkit info --json`, `settings` is the table of a recipe's settings as text."""
    kind, name = facts["kind"], facts["name"]
    summary, description, source = _parts(facts)
    sections = {
        "NAME": _wrapped(f"{name} - {summary}"),
        "SYNOPSIS": _synopsis(facts),
        "DESCRIPTION": _wrapped(description),
        "LOSSES": ", ".join(facts.get("members", [])),
        "OPTIONS": _options(facts),
        "SETTINGS": settings,
        "FILE": facts.get("text", "").rstrip() if "text" in facts and not settings else "",
        "REQUIREMENTS": _requirements(facts.get("requires", {})),
        "EXAMPLE": _example(facts),
        "SOURCE": _wrapped(source),
        "SEE ALSO": _wrapped(", ".join(_see_also(facts, bool(settings)))),
    }
    title = f"{name}({kind})"
    made_by = f"{facts['distribution']} {facts['version']}".center(max(4, _width() - 2 * len(title)))
    parts = [f"{title}{made_by}{title}"]
    parts += [f"{head}\n{textwrap.indent(text, INDENT)}" for head, text in sections.items() if text]
    return "\n\n".join(parts)


def _width() -> int:
    return max(40, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def _parts(facts: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns summary, description and source."""
    if "text" in facts:
        table = tomllib.loads(facts["text"])
        summary = table.get("summary") or table.get("title") or f"a {facts['kind']}"
        return " ".join(str(summary).split()), "", " ".join(str(table.get("source", "")).split())
    text = facts["description"]
    found = re.search(r"(?:(?<=\. )|^)Source: (.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    source = " ".join(found[1].split()) if found else ""
    text = (text[: found.start()] + "\n\n" + text[found.end() :]).strip() if found else text
    summary, _, description = text.partition("\n\n")
    return " ".join(summary.split()), description.strip(), source


def _named(facts: Mapping[str, Any], command: str) -> str:
    """Returns a command with the name of the component in it, and the argument that it takes."""
    argument = facts.get("argument")
    return command.replace("NAME", f"{facts['name']}:{argument.upper()}" if argument else facts["name"])


def _commands(facts: Mapping[str, Any]) -> list[str]:
    """Returns the commands that use it."""
    kind = facts["kind"]
    if kind == "recipe":
        return ["ddkit distill --recipe NAME"] if "losses" in tomllib.loads(facts["text"]) else ["ddkit train --recipe NAME --out FILE"]
    if kind == "study":
        return ["ddkit reproduce NAME"]
    first = USED.get(kind)
    first = first and first.replace("my-run", "RUN").replace("exported", "DIR")
    return [] if first is None else [first + {"loss": "[:WEIGHT][,...]", "loss-group": "[:WEIGHT][,...]"}.get(kind, "")]


def _synopsis(facts: Mapping[str, Any]) -> str:
    kind = facts["kind"]
    lines = [*_commands(facts), *MORE_USES.get(kind, ())]
    if facts.get("options"):
        lines += [f"--set {path}.OPTION=VALUE".replace("NAME", facts["name"]) for path in PATHS.get(kind, ())]
        lines += ["--set OPTION=VALUE"] if kind == "exporter" else []
    return "\n".join(_named(facts, line) if "--set" not in line else line for line in lines) or "(at work wherever it is installed)"


def _options(facts: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for option in facts.get("options", []):
        bounds = f", {option['bounds']}" if option["bounds"] else ""
        lines += [f"{option['name']} = {json.dumps(option['default'], ensure_ascii=False)}    ({option['type']}{bounds})"]
        lines += [textwrap.indent(_wrapped(option["description"], len(INDENT)), INDENT)] if option["description"] else []
    return "\n".join(lines)


def _requirements(asked: Mapping[str, Any]) -> str:
    lines = []
    for key, value in asked.items():
        lines += [f"{key}={json.dumps(value)}", *([INDENT + ASKS[key]] if key in ASKS else [])]
    return "\n".join(lines)


def _example(facts: Mapping[str, Any]) -> str:
    command = EXAMPLES.get(facts["kind"], "")
    if facts["kind"] == "recipe" and "train" in _commands(facts)[0]:
        command = "ddkit train --recipe NAME --out teacher.safetensors"
    return _named(facts, command)


def _see_also(facts: Mapping[str, Any], settings: bool) -> list[str]:
    kind, name = facts["kind"], facts["name"]
    found = [f"ddkit info {other} {name} (the {other} of that name)" for other in facts["namesakes"]]
    found += [*(f"ddkit info {member}" for member in facts.get("members", ())), f"ddkit list {kind}"]
    if "text" in facts:
        return [*found, f"ddkit info {kind} {name} --json (key text: the file)"] if settings else found
    return [*found, f"ddkit check {kind} {name}"]


def _wrapped(text: str, less: int = 0) -> str:
    """Returns text in lines that fit; items of lists hang, and what is indented stays as it is."""
    width = _width() - len(INDENT) - less
    return "\n\n".join(_block(block, width) for block in text.split("\n\n")) if text else ""


def _block(block: str, width: int) -> str:
    if block.startswith(" "):
        return block
    items: list[str] = []
    for line in block.splitlines():
        if not items or line.startswith(("- ", "* ")):
            items.append(line)
        else:
            items[-1] += f" {line.strip()}"
    return "\n".join(_filled(item, width) for item in items)


def _filled(item: str, width: int) -> str:
    hanging: Sequence[str] = ("", "  ") if item.startswith(("- ", "* ")) else ("", "")
    return textwrap.fill(item, width, subsequent_indent=hanging[1], break_long_words=False, break_on_hyphens=False)
