"""Writes what the code and docs/data can write: reference/cli.md, the marked parts of all pages and of the README, and the plots.

It also writes ddkit/recipes/citations.bib, the papers of CITATION.cff as `ddkit cite` prints them.

`python docs/generate.py`. In docs/reference/ and docs/methods/ what is between `<!-- generated: WHAT -->` and `<!-- end -->` is written
anew; the prose around it is written by hand.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from matplotlib.figure import Figure
from PIL import Image

import ddkit
from ddkit import testing
from ddkit.cli import cli
from ddkit.cli.manual import facts, page
from ddkit.components import base, observers, registry
from ddkit.components.kinds import BASES, CHECKED, KINDS
from ddkit.recipes.citations import ENTRIES
from ddkit.recipes.resolve import resolve
from ddkit.run import artifact

DOCS = Path(__file__).parent
PAGES = {"loss-group": "loss"}  # the kinds that are described on another kind's page
LEFT_OUT = ("Settings", "File", "See also")  # the sections of `ddkit info` that the pages of kinds do not repeat
REFERENCE = DOCS / "reference"
METHODS = DOCS / "methods"
IMAGES = DOCS / "images" / "methods"
MARKED = re.compile(r"(<!-- generated: ([\w-]+)(?: ([\w-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
CLI_HEAD = """# Commands

Every command with its arguments and flags, as its `--help` shows them. stdout is data, stderr is progress and messages;
what they mean to a script is in [output and exit codes](exit-codes.md).

This page is written by `python docs/generate.py`; a test compares it with the code.
"""
NEEDS_NO_NAME = {
    "recipe": "`--recipe NAME`",
    "observer": "installed is enough",
}


def pages() -> dict[Path, str]:
    """Returns the text of every page that is generated, by its file."""
    marked = [DOCS.parent / "README.md", *DOCS.rglob("*.md")]
    return {page: _filled(page) for page in sorted(marked)} | _badges() | {ENTRIES: _bibtex(), REFERENCE / "cli.md": _commands()}


def _ours(kind: str) -> list[registry.Plugin]:
    """Returns the first-party components on the page of a kind."""
    return [p for p in registry.plugins() if PAGES.get(p.kind, p.kind) == kind and p.first_party]


def _component(plugin: registry.Plugin) -> str:
    """Returns the section of one component, as `ddkit info` shows it; of recipes, protocols and studies without settings and files."""
    _, text, *sections = _prose(page(facts(plugin), 120)).replace("\n\n", "\n\n## ", 1).split("\n\n## ")
    kept = [section.partition("\n\n") for section in sections]
    bodies = [f"**{title}**\n\n{body}" for title, _, body in kept if title not in LEFT_OUT]
    return "\n\n".join([f"### `{plugin.name}`", text, *bodies])


def _prose(text: str) -> str:
    """Returns a docstring as Markdown, its examples as code."""
    plain, _, examples = text.partition("\n\nExamples:\n")
    code = f"\n\n```python-console\n{inspect.cleandoc(examples)}\n```" if examples else ""
    return re.sub(r"(?<!`)\*(?!\*)", r"\*", plain) + code


def _cell(value: Any) -> str:
    return str(value or "").replace("|", "\\|").replace("\n", " ")


def _commands() -> str:
    """Returns the page of all commands."""
    context = click.Context(cli, info_name="ddkit", help_option_names=[])  # click keeps the option of the first context
    parts = [CLI_HEAD]
    for name, command in sorted(cli.commands.items()):
        inside = click.Context(command, info_name=name, parent=context, max_content_width=110, terminal_width=110)
        parts.append(f"## {name}\n\n```text\n{command.get_help(inside)}\n```\n")
    return "\n".join(parts)


def _list(_: str) -> str:
    """Returns the tables of all first-party components, by kind."""
    parts = []
    for kind in KINDS:
        rows = [
            f"| [`{p.name}`]({PAGES.get(kind, kind)}.md#{p.name}) | {_cell(registry.status(p)[1])} |"
            for p in registry.plugins()
            if p.kind == kind and p.first_party
        ]
        if rows:
            parts.append("\n".join([f"## {_plural(kind)}\n", "| name | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _plural(kind: str) -> str:
    return {"loss": "Losses", "study": "Studies"}.get(kind, f"{kind.replace('-', ' ').capitalize()}s")


# The pages of kinds


def _filled(page: Path) -> str:
    """Returns a page with its marked parts as the code has them."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]](match[3] or page.stem)}\n\n{match[4]}"

    return MARKED.sub(fill, page.read_text(encoding="utf-8"))


def _facts(kind: str) -> str:
    """Returns the table at the head of a kind's page."""
    base = BASES.get(kind)
    uses, paths = KINDS[kind].uses, [f"`{path}`" for path in KINDS[kind].paths]
    chosen = f"`{uses[0].removeprefix('ddkit distill ')}`" if uses else NEEDS_NO_NAME[kind]
    options = " or ".join(filter(None, [", ".join(paths[:-1]), *paths[-1:]]))
    rows = {
        "base class": f"`ddkit.{base.__name__}`" if base else "functions marked `@ddkit.hookimpl`" if kind == "observer" else "none: TOML",
        "entry-point group": f"`{KINDS[kind].group}`",
        "chosen by": chosen,
        "options in a recipe": options if kind != "exporter" else "none, but `--set OPTION=VALUE` of `export`",
        "conformance suite": f"`ddkit.testing.{testing.SUITES[kind].__name__}`, `ddkit check {kind} NAME`"
        if kind in testing.SUITES
        else "",
        "a package to begin with": f"`ddkit new {kind} my-{kind}`" if kind in CHECKED else "",
        "what is installed": f"`ddkit list {kind}`",
        "write one": "[base class](#the-base-class), [example](#example), [checks](#what-ddkit-check-tests)"
        if base
        else "[example](#example)",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)])


def _reference(name: str) -> str:
    """Returns what a public class says of itself: docstring, attributes, fields, methods with their signatures."""
    found = next(getattr(module, name) for module in (ddkit, ddkit.data, base, artifact) if hasattr(module, name))
    parts = [_prose(inspect.getdoc(found) or "")]
    if issubclass(found, msgspec.Struct):
        fields = [f"{field.name}: {_type(found, field.name)}{_field_default(field)}" for field in msgspec.structs.fields(found)]
        parts.append("Fields: " + ", ".join(f"`{field}`" for field in fields) + ".")
    else:
        values = {key: getattr(found, key) for key in inspect.get_annotations(found) if not key.startswith("_")}
        shown = [f"`{key} = {_value(value)}`" for key, value in values.items()]
        parts += ["Attributes of the class: " + ", ".join(shown) + "."] if shown else []
    parts += [part for key, member in vars(found).items() if (part := _member(key, member))]
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    if inspect.isclass(value):
        return value.__name__
    return f"{type(value).__name__}()" if isinstance(value, msgspec.Struct) else repr(value)


def _type(found: type, name: str) -> str:
    return str(found.__annotations__[name])


def _field_default(field: Any) -> str:
    if field.required:
        return ""
    return f" = {field.default if field.default is not msgspec.NODEFAULT else field.default_factory()!r}"


def _member(name: str, member: Any) -> str:
    """Returns signature and docstring of a method or property that is public and documented, else ""."""
    plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    text = inspect.getdoc(plain.fget if isinstance(plain, property) else plain) if not isinstance(plain, type) else None
    if isinstance(plain, property) and not name.startswith("_"):
        return f"**`{name} -> {plain.fget.__annotations__['return']}`** (a property)" + (f"\n\n{_prose(text)}" if text else "")
    if not inspect.isfunction(plain) or not text or (name.startswith("_") and name != "__call__"):
        return ""
    return f"**`{name}{_signature(plain)}`**\n\n{_prose(text)}"


def _signature(function: Any) -> str:
    """Returns the arguments, without self, and the result of a function as its source has them."""
    signature = inspect.signature(function)
    kept = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    return str(signature.replace(parameters=kept)).replace("'", "")


def _checks(kind: str) -> str:
    """Returns the table of the checks of a kind's suite."""
    suite = testing.SUITES[kind]
    rows = [f"| `{name}` | {_cell(' '.join(str(getattr(suite, method).__doc__).split()))} |" for name, method in suite.checks().items()]
    return "\n".join(["| check | what has to hold |", "|---|---|", *rows])


def _own(kind: str) -> str:
    """Returns what comes with ddkit of a kind: a table, and a section for each component."""
    rows = [f"| [`{p.name}`](#{p.name}) | {_cell(registry.status(p)[1])} |" for p in _ours(kind)]
    return "\n\n".join(["\n".join(["| name | what it is |", "|---|---|", *rows]), *map(_component, _ours(kind))]) if rows else "None."


def _hooks(_: str) -> str:
    """Returns what every hook says of itself, in the order of a run."""
    parts = []
    for hook in observers.HOOKS:
        function = getattr(observers, hook)
        text = " ".join((inspect.getdoc(function) or "").split())
        answers = re.findall(r"(Called|Receives|May|May not|Since): (.*?)(?= (?:Receives|May|May not|Since): |$)", text)
        parts.append("\n".join([f"### {hook}\n\n`{hook}{_signature(function)}`\n", *(f"- {key}: {value}" for key, value in answers)]))
    return "\n\n".join(parts)


def _kinds(_: str) -> str:
    """Returns the table of all kinds."""
    rows = []
    for kind in KINDS:
        base = BASES.get(kind)
        suite = testing.SUITES.get(kind)
        cells = [
            f"[{kind}](components/{PAGES.get(kind, kind)}.md)",
            f"`ddkit.{base.__name__}`" if base else "",
            f"`{KINDS[kind].group}`",
        ]
        rows.append(f"| {' | '.join([*cells, f'`{suite.__name__}`' if suite else ''])} |")
    return "\n".join(["| kind | base class | entry-point group | suite in `ddkit.testing` |", "|---|---|---|---|", *rows])


def _api(_: str) -> str:
    """Returns the table of all public names, each with its first line, and for each the directive by which the site shows all of it."""
    parts = []
    for module in (ddkit, ddkit.nn, ddkit.data):
        groups: dict[str, list[tuple[str, Any]]] = {"functions": [], "classes that plugins inherit from": [], "classes": [], "errors": []}
        for name in sorted(set(module.__all__) - {"__version__", "data", "nn"}):
            found = getattr(module, name)
            error = inspect.isclass(found) and issubclass(found, Exception)
            inherited = found in BASES.values()
            group = "errors" if error else list(groups)[1] if inherited else "classes" if inspect.isclass(found) else "functions"
            groups[group].append((f"{module.__name__}.{name}", found))
        parts += [_named(f"`{module.__name__}`: {group}", names) for group, names in groups.items() if names]
    return "\n\n".join(parts)


def _named(title: str, names: list[tuple[str, Any]]) -> str:
    rows = [f"| [`{name}`](#{name}) | {_cell((inspect.getdoc(found) or '').partition(chr(10))[0])} |" for name, found in names]
    shown = ["\n".join([f"::: {name}", *_limits(found)]) for name, found in names]
    return "\n\n".join([f"## {title}", "\n".join(["| name | what it is |", "|---|---|", *rows]), *shown])


def _limits(found: Any) -> list[str]:
    """Returns what follows the directive of a base class: its methods and an example are on the page of its kind."""
    kinds = [kind for kind, base in BASES.items() if base is found]
    return [
        f"    options: {{ members: false }}\n\nIts methods and an example: [{kind}](components/{kind}.md#the-base-class)." for kind in kinds
    ]


# The pages of methods: the recipe, docs/data/methods.csv and CITATION.cff, one row, file and reference a method


def _figures() -> dict[str, dict[str, str]]:
    """Returns the published and measured figures of every method, by the name of its recipe, in the order of the file."""
    with (DOCS / "data" / "methods.csv").open(encoding="utf-8") as file:
        return {row["recipe"]: row for row in csv.DictReader(file)}


def _needs(name: str) -> str:
    """Returns what a recipe needs beside images and fresh networks, as its tables and losses say."""
    recipe = resolve(name)
    losses = [registry.create("loss", recipe.loss_name(label), table.options) for label, table in recipe.losses.items()]
    initializer = registry.create("initializer", recipe.initializer.use, recipe.initializer.options)
    needs = {
        "networks trained on the set": recipe.network.trained_on == "synthetic",
        "networks trained on real images": recipe.network.trained_on == "real"
        or recipe.network.source == "experts"
        or any(loss.requires.experts for loss in losses),
        "a trained model": any(each.requires.teacher for each in (initializer, *losses)),
        "second derivatives": any(loss.requires.second_order for loss in losses),
        f"the parametrization {recipe.parametrization.use}": recipe.parametrization.use != "pixels",
        "whitened images": recipe.data.whiten,
        f"{recipe.own_labels.kind} labels": recipe.own_labels.kind != "hard",
    }
    return ", ".join(need for need, wanted in needs.items() if wanted) or "fresh networks alone"


def _accuracy(row: dict[str, str], of: str) -> str:
    return _plus_minus(row[of], row[f"{of}_std"]) or "-"


def _share(row: dict[str, str]) -> str:
    """Returns how much of the published gain over random real images ours is, in percent."""
    if not row["ours"] or not row["published_1"]:
        return "-"
    ours, random, published = (float(row[key]) for key in ("ours", "random", "published_1"))
    return f"{100 * (ours - random) / (published - random):.0f} %" if published > random else "-"


def _published(row: dict[str, str]) -> str:
    return " / ".join(row[f"published_{ipc}"] or "-" for ipc in (1, 10, 50))


def _command(row: dict[str, str]) -> str:
    dataset = "" if "--dataset" in row["flags"] else "--dataset imagefolder:cifar "
    return f"ddkit distill --recipe {row['recipe']} {dataset}--ipc 1 {row['flags']}".strip()


def _references() -> dict[str, dict[str, Any]]:
    """Returns papers of CITATION.cff by number at arXiv or OpenReview: title, year, url, authors as "Zhao, Bo", where it appeared or ""."""
    found = {}
    for text in (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8").split("\n  - type:")[1:]:
        people, rest = text.split("    year:")
        names = re.findall(r'- (?:family-names|name): "?([^"\n]+)"?(?:\n +given-names: "?([^"\n]+)"?)?', people)
        fields = {key: re.search(rf'{key}: "?([^"\n]+)"?', text) for key in ("title", "year", "collection-title", "url")}
        found[re.search(r"(?:arXiv:|forum\?id=)([\w.]+)", rest)[1]] = {  # type: ignore[index]
            "authors": [", ".join(filter(None, pair)) for pair in names],
            **{key: match[1] if match else "" for key, match in fields.items()},
        }
    return found


def _bibtex() -> str:
    """Returns citations.bib: ddkit's entry, then one of each paper."""
    head = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    title, version = (re.search(rf'^{key}: "?([^"\n]+)"?', head, re.MULTILINE)[1] for key in ("title", "version"))  # type: ignore[index]
    entries = [("software", "ddkit", {"title": title, "author": "{The ddkit authors}", "version": version})]
    for number, each in _references().items():
        last = re.sub("[^a-z]", "", each["authors"][0].partition(",")[0].split()[0].lower())
        authors = " and ".join(each["authors"]).replace(" et al.", " and others")
        fields = {"title": f"{{{each['title']}}}", "author": authors, "booktitle": each["collection-title"], "year": each["year"]}
        fields |= {"eprint": number, "archiveprefix": "arXiv" if "arxiv" in each["url"] else "OpenReview", "url": each["url"]}
        entries.append(("inproceedings" if each["collection-title"] else "misc", f"{last}{each['year']}-{number}", fields))
    lines = [(kind, key, "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items() if value)) for kind, key, fields in entries]
    return "\n\n".join(f"@{kind}{{{key},\n{own}}}" for kind, key, own in lines) + "\n"


def _paper(name: str) -> tuple[str, str]:
    """Returns a recipe's paper as CITATION.cff has it, in words and as a link."""
    found = re.search(r"(arXiv |forum\?id=)([\w.]+\w)", resolve(name).source)
    assert found, name
    paper, on_arxiv = _references()[found[2]], found[1] == "arXiv "  # if it is not there, add it
    names = [author.partition(",")[0] for author in paper["authors"]]
    words = f"{', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]}, {paper['title']}, {paper['year']}"
    return f"{words}, {'arXiv' if on_arxiv else 'at'}", f"[{found[2] if on_arxiv else 'OpenReview'}]({paper['url']})"


def _methods(_: str) -> str:
    """Returns the table of all methods."""
    head = "method | paper | needs | published, ipc 1 / 10 / 50 | random real, ipc 1 | ours, ipc 1 | share of the gain | command of ours"
    rows = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for name, row in _figures().items():
        link = f"[`{name}`]({name}.md)" if (METHODS / f"{name}.md").is_file() else f"`{name}`"
        measured = [_accuracy(row, "random"), _accuracy(row, "ours"), _share(row), f"`{_command(row)}`" if row["ours"] else "-"]
        rows.append(f"| {' | '.join([link, _paper(name)[1], _needs(name), _published(row), *measured])} |")
    return "\n".join(rows)


def _order(_: str) -> str:
    """Returns the methods by their published figures at ipc 1, each with its place here, and what the two orders have in common."""
    both = {name: row for name, row in _figures().items() if row["ours"] and row["published_1"]}
    published, here = (sorted(both, key=lambda name: -float(both[name][of])) for of in ("published_1", "ours"))
    moved = {name: here.index(name) - place for place, name in enumerate(published)}
    agreement = 1 - 6 * sum(by**2 for by in moved.values()) / (len(moved) * (len(moved) ** 2 - 1))
    rows = [
        f"| `{name}` | {published.index(name) + 1} | {here.index(name) + 1} | {'differs' if abs(by) > len(moved) / 4 else ''} |"
        for name, by in moved.items()
    ]
    table = ["| method | place in the papers | place here | |", "|---|---|---|---|", *rows]
    return "\n".join([f"Spearman's rank correlation of the two orders of {len(moved)} methods is {agreement:.2f}.", "", *table])


def _gallery(_: str) -> str:
    """Returns the pictures of all methods, one below the other."""
    pictures = {
        name: f"![Ten images made by {name}](../images/methods/{name}.png)" for name in _figures() if (IMAGES / f"{name}.png").is_file()
    }
    return _table(["method", "one image of each class"], [[f"`{name}`", picture] for name, picture in pictures.items()])


def _method(name: str) -> str:
    """Returns the head of a method's page: its facts, the command of the measured run, and its picture."""
    row, recipe = _figures()[name], resolve(name)
    losses = [f"[`{recipe.loss_name(label)}`](../reference/components/loss.md#{recipe.loss_name(label)})" for label in recipe.losses]
    facts = {
        "paper": " ".join(_paper(name)),
        "recipe": f"`ddkit info recipe {name}`: every setting with its origin",
        "losses": ", ".join(losses) or "none: nothing is optimised",
        "needs": _needs(name),
        "published, CIFAR-10, ipc 1 / 10 / 50": f"{_published(row)} %".replace("- / - / - %", "none"),
    }
    made = []
    if row["step_1_10"]:
        facts["seconds per step"] = f"{row['step_1_10']} at ipc 1 with 10 real images per class, {row['step_10_50']} at ipc 10 with 50"
    if row["ours"]:
        share = f": {_share(row)} of the published gain over random real images" if row["published_1"] else ""
        facts["ours, ipc 1"] = f"{_accuracy(row, 'ours')} %, {row['sets']}{share}"
        facts["random real, ipc 1"] = f"{_accuracy(row, 'random')} %, under the same protocol"
    if (IMAGES / f"{name}.png").is_file():
        picture = f"![Ten images made by {name}, one of each class of CIFAR-10](../images/methods/{name}.png)"
        made = ["", "```bash", _command(row), "```", "", picture]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), *made])


def _citation(name: str) -> str:
    return f"{' '.join(_paper(name))}. It is in [CITATION.cff](../../CITATION.cff)."


# Results: docs/data/results.csv, one row a measured figure; docs/data/practical-zoo.csv has the same columns, and `losses`

SHOWN = {
    "ipc": "ipc", "pipc": "pipc", "dataset": "data", "method": "method", "labels": "labels", "published": "published",
    "accuracy": "accuracy, %", "std_of_sets": "std of sets", "means": "means of the sets",
    "high_frequency": "power above 0.25 cycles a pixel, %", "n": "n", "tested_on": "tested on", "protocol": "protocol", "steps": "steps",
    "teacher": "teacher", "machine": "machine", "note": "note",
}  # fmt: skip
PIVOTS = {  # the experiments of a table with a column a method, and the heads of its columns
    "paper": (
        ("practical-table1",),
        {"DM": "DM", "DM*": "DM\\*", "DSV (noise)": "DSV from noise", "DSV (real)": "DSV from real", "DM + DKKT (practical)": "DM + DKKT"},
    ),
    "practical-plus": (
        ("practical-table1", "practical-plus"),
        {
            "random real images": "random real",
            "class means": "class means",
            "DM + DKKT (practical)": "DM + DKKT (`practical`)",
            "practical-plus, one image in one": "`practical-plus`, one image in one",
            "practical-plus": "`practical-plus`",
            "all accessible real images": "all accessible real",
        },
    ),
}


def _rows(name: str) -> list[dict[str, str]]:
    """Returns the rows of docs/data/NAME.csv, each with "n"; none if there is no such file."""
    file = DOCS / "data" / f"{name}.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as text:
        return [row | {"n": f"{row['sets']} x {row['networks']}" if row["sets"] else ""} for row in csv.DictReader(text)]


def _plus_minus(value: str, std: str) -> str:
    return f"{value} ± {std}" if std else value


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) or '-' for cell in line)} |" for line in lines)


def _experiment(name: str) -> str:
    """Returns all rows of an experiment; what is the same in all of them stands in a sentence below."""
    rows = [
        row | {"accuracy": _plus_minus(row["accuracy"], row["std"]), "published": _plus_minus(row["published"], row["published_std"])}
        for row in _rows("results")
        if row["experiment"] == name
    ]
    values = {key: {row[key] for row in rows} for key in SHOWN}
    columns = [key for key in SHOWN if key in ("method", "accuracy") or len(values[key]) > 1]
    same = [f"{SHOWN[key]} {value}" for key in SHOWN if key not in columns and (value := next(iter(values[key])))]
    return f"{_table([SHOWN[key] for key in columns], [[row[key] for key in columns] for row in rows])}\n\nIn all rows: {'; '.join(same)}."


def _pivot(name: str) -> str:
    """Returns a row a cell and a column a method: measured, and published in brackets."""
    experiments, columns = PIVOTS[name]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in _rows("results"):
        if row["experiment"] in experiments:
            published = f" ({row['published']})" if row["published"] else ""
            cells.setdefault((row["ipc"], row["pipc"]), {})[row["method"]] = _plus_minus(row["accuracy"], row["std"]) + published
    kept = {cell: found for cell, found in cells.items() if any(method in found for method in columns)}
    ordered = sorted(kept.items(), key=lambda item: (int(item[0][0]), item[0][1] == "all", item[0][1]))
    return _table(["ipc", "pipc", *columns.values()], [[*cell, *(found.get(method, "") for method in columns)] for cell, found in ordered])


README = {  # the methods of the README's table, by their names in results.csv
    "DM": "distribution matching (DM): recipe `dm`",
    "DM + DKKT (practical)": "DM and deep support vectors (DKKT): recipe `practical`",
    "practical-plus": "both, feature regression, twenty images in the numbers of one: recipe `practical-plus`",
}


def _readme(_: str) -> str:
    """Returns the README's four rows: one image per class of CIFAR-10, from 50 real ones or from all."""
    found = {(row["method"], row["ipc"], row["pipc"]): row for row in _rows("results") if row["experiment"] in PIVOTS["practical-plus"][0]}
    measured = {name: _plus_minus(row["accuracy"], row["std"]) for (name, *cell), row in found.items() if cell == ["1", "50"]}
    rows = [
        [title, "50", measured[name], measured["random real images"], found[name, "1", "50"]["published"]] for name, title in README.items()
    ]
    idm = _figures()["idm"]
    name = "[IDM](docs/methods/idm.md), for which all images are needed: recipe `idm`"
    rows.append([name, "all 5,000", _accuracy(idm, "ours"), _accuracy(idm, "random"), idm["published_1"]])
    return _table(["method", "real images per class", "accuracy, %", "random real, %", "published, %"], rows)


def _zoo_rows(name: str) -> list[tuple[str, dict[str, str]]]:
    """Returns the rows of docs/data/NAME.csv, a study of methods, with their methods, and what labels networks learn if not always hard."""
    rows = _rows(name)
    several = {row["method"] for row in rows if row["labels"] == "stored"}
    return [(row["method"] + f", {row['labels']} labels" * (row["labels"] != "hard" or row["method"] in several), row) for row in rows]


def _badges() -> dict[Path, str]:
    """Returns the README's badges by file, with what pyproject.toml says."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = {"licence": project["license"], "python": project["requires-python"].removeprefix(">=") + " or newer"}
    return {DOCS / "images" / f"{name}.svg": _badge(name, text) for name, text in texts.items()}


def _badge(name: str, text: str) -> str:
    left, right = 12 + 7 * len(name), 12 + 7 * len(text)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" aria-label="{name}: {text}">'
        f'<rect width="{left}" height="20" fill="#555"/><rect x="{left}" width="{right}" height="20" fill="#2a6f97"/>'
        f'<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f'<text x="{left / 2}" y="14">{name}</text><text x="{left + right / 2}" y="14">{text}</text></g></svg>\n'
    )


def _pairs(name: str) -> dict[tuple[str, str], dict[str, dict[bool, dict[str, str]]]]:
    """Returns the rows of a study of methods, docs/data/NAME.csv, by (ipc, pipc), method, and whether DKKT is among the losses."""
    found: dict[tuple[str, str], dict[str, dict[bool, dict[str, str]]]] = {}
    for method, row in _zoo_rows(name):
        found.setdefault((row["ipc"], row["pipc"]), {}).setdefault(method, {})["dkkt" in row["losses"]] = row
    return found


def _gain(pair: dict[bool, dict[str, str]]) -> list[float] | None:
    """Returns [what DKKT adds, in points, and the root of the sum of both variances]; None if a row is missing."""
    if len(pair) < 2:
        return None
    spread = sum(float(row["std"] or 0) ** 2 for row in pair.values()) ** 0.5
    return [round(float(pair[True]["accuracy"]) - float(pair[False]["accuracy"]), 2), round(spread, 2)]


def _zoo(name: str) -> str:
    """Returns the tables of every method alone and with DKKT, of hard labels and of probabilities apart."""
    tables: dict[bool, list[list[str]]] = {True: [], False: []}
    for cell, methods in _pairs(name).items():
        for method, pair in methods.items():
            gain = _gain(pair)
            first = next(iter(pair.values()))
            both = [_plus_minus(pair[each]["accuracy"], pair[each]["std"]) if each in pair else "" for each in (False, True)]
            random = _plus_minus(first["random"], first["random_std"])
            numbers = f"{float(first['stored_numbers']):,.6g}" if first["stored_numbers"] else ""
            steps = " and ".join(dict.fromkeys(pair[each]["steps"] for each in (False, True) if each in pair))  # alone and with DKKT
            line = [*cell, method, *both, f"{gain[0]:+.1f}" if gain else "", random, numbers, steps, first["n"]]
            tables[first["labels"] == "hard"].append(line)
    if not any(tables.values()):
        return "Not measured yet."
    head = ["ipc", "pipc", "method", "alone", "with DKKT", "gain", "random real", "stored numbers per class", "steps", "n"]
    said = {
        True: "Networks learn from hard labels:",
        False: "Networks learn from probabilities, the set's own or the teacher's:",
    }
    shown = [f"{said[hard]}\n\n{_table(head, rows)}" for hard, rows in tables.items() if rows]
    return "\n\n".join(shown)


def _draw_curves(data: dict[str, dict[str, list[list[str]]]]) -> Figure:
    """Returns accuracy against the real images per class: a panel each title, with a line each name of points [pipc, accuracy, std]."""
    across = min(len(data), 5)
    down = -(-len(data) // across)
    figure = Figure(figsize=(2.4 * across + 2, 2.6 * down + 0.6), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    pipcs = {point[0] for lines in data.values() for line in lines.values() for point in line}
    ticks = sorted(pipcs, key=lambda pipc: float("inf") if pipc == "all" else float(pipc))
    known: dict[str, Any] = {}
    for axes, (title, lines) in zip(panels, data.items(), strict=False):
        for name, line in lines.items():
            x, y, error = zip(*((ticks.index(pipc), float(mean), float(std)) for pipc, mean, std in line), strict=True)
            number = [*known, name].index(name)
            known.setdefault(name, axes.errorbar(x, y, error, color=f"C{number}", marker="osD^vPX*"[number % 8], capsize=3))
        axes.set_title(title, fontsize="medium")
        own = sorted({ticks.index(pipc) for line in lines.values() for pipc, _, _ in line})
        axes.set_xticks(own, [ticks[place] for place in own])
        axes.grid(alpha=0.3)
    for axes in panels[len(data) :]:
        axes.set_axis_off()
    figure.supxlabel("real images per class")
    figure.supylabel("test accuracy, %")
    figure.legend(known.values(), known.keys(), loc="outside right upper")
    return figure


def _draw_gains(data: dict[str, dict[str, list[float]]]) -> Figure:
    """Returns what DKKT adds to each method: a panel each cell, a bar each method, with a line for the spread unless there is none."""
    names = list(dict.fromkeys(name for gains in sorted(data.values(), key=len, reverse=True) for name in gains))
    figure = Figure(figsize=(2.6 * len(data) + 2, 1.2 + 0.25 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(data), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (cell, gains) in zip(panels, data.items(), strict=True):
        places = [names.index(name) for name in gains]
        axes.barh(places, [gain for gain, _ in gains.values()], xerr=[spread or float("nan") for _, spread in gains.values()], capsize=2)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(cell.replace(", ", "\n"), fontsize="medium")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel("gain by DKKT, points")
    return figure


def _curves(rows: list[tuple[str, str, dict[str, str]]]) -> dict[str, dict[str, list[list[str]]]]:
    """Returns the data of _draw_curves of rows with (title of the panel, name of the line)."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    for title, name, row in rows:
        found.setdefault(title, {}).setdefault(name, []).append([row["pipc"], row["accuracy"], row["std"] or "0"])
    return found


def plots() -> dict[Path, tuple[Callable[[Any], Figure], Any]]:
    """Returns the function that draws each plot and its data, by its file; plots without data are left out."""
    lines = ("DM", "DM*", "DSV (noise)", "DSV (real)", "DM + DKKT (practical)", "practical-plus")
    results = [row for row in _rows("results") if row["experiment"] in PIVOTS["practical-plus"][0]]
    measured = [(f"ipc {row['ipc']}", row["method"], row) for row in results if row["method"] in lines and row["ipc"] != "50"]
    zoo = [
        (f"{method}, ipc {row['ipc']}", "with DKKT" if "dkkt" in row["losses"] else "alone", row)
        for method, row in _zoo_rows("practical-zoo")
    ]
    gains = {
        f"ipc {ipc}, {pipc} real images per class": {name: gain for name, pair in methods.items() if (gain := _gain(pair))}
        for (ipc, pipc), methods in _pairs("practical-zoo").items()
    }
    found: dict[str, tuple[Callable[[Any], Figure], Any]] = {
        "results.png": (_draw_curves, _curves(measured)),
        "zoo-pipc.png": (
            _draw_curves,
            {title: lines for title, lines in _curves(zoo).items() if len(lines) > 1 < max(map(len, lines.values()))},
        ),
        "zoo-gain.png": (_draw_gains, {cell: bars for cell, bars in gains.items() if bars}),
    }
    return {DOCS / "images" / name: (draw, data) for name, (draw, data) in found.items() if data}


def drawn(file: Path) -> Any:
    """Returns the data that a plot was drawn from, as its file has them; None if there is no such file."""
    return json.loads(Image.open(file).text["data"]) if file.is_file() else None  # type: ignore[attr-defined]


PARTS: dict[str, Callable[[str], str]] = {
    "facts": _facts, "class": _reference, "checks": _checks, "own": _own, "hooks": _hooks, "kinds": _kinds, "api": _api, "list": _list,
    "methods": _methods, "order": _order, "method": _method, "citation": _citation,
    "gallery": _gallery, "figures": _experiment, "pivot": _pivot, "readme": _readme, "zoo": _zoo,
}  # fmt: skip


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
    for file, (draw, data) in plots().items():
        if drawn(file) != data:
            draw(data).savefig(file, dpi=120, metadata={"Software": None, "data": json.dumps(data)})
