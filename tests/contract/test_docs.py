"""The documentation: its Python runs, its commands parse, its links resolve, its tables agree with the code."""

from __future__ import annotations

import csv
import doctest
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import pytest
import torch

import ddkit
from ddkit import testing
from ddkit.cli import cli as command_line
from ddkit.components import observers, options, registry
from ddkit.components.kinds import BASES, DATA_KINDS, KINDS
from ddkit.recipes.tables import NAMED_TABLES, TABLES, OptimizerTable, Recipe, Table, own_keys
from ddkit.studies.study import PublishedOn, Study, SystemTable, parse_study
from ddkit.testing.suite import check as suite_check
from tests.conftest import SMALL, SMALL_FLAGS, Result, set_flags, write_image_folder

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMPONENTS = ROOT / "docs" / "reference" / "components"
CLI = Callable[..., Result]


class Block(NamedTuple):
    """A fenced block: its language, its text, the file that a marker before it names, and why a marker says that it is not run."""

    language: str
    text: str
    file: str | None
    not_run: str | None


FENCE = re.compile(r"(?:^<!-- (?:file: (\S+)|not run: ([^\n]+)) -->\n)?^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    return [Block(m[3], m[4], m[1], m[2]) for m in FENCE.finditer(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """Returns a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def _name(page: object) -> str | None:
    return page.relative_to(ROOT).as_posix() if isinstance(page, Path) else None


def _commands(page: Path) -> Iterator[str]:
    """Yields every `ddkit ...` command that a page shows, in blocks and in text."""
    for block in blocks(page):
        if block.language == "bash":
            lines = block.text.replace("\\\n", " ").splitlines()
            yield from (part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("ddkit"))
    yield from (" ".join(span.split()) for span in re.findall(r"`(ddkit [^`]*)`", prose(page)) if not span.endswith("..."))


COMMANDS = sorted({(page, command) for page in PAGES for command in _commands(page)})


def _context(command: str) -> tuple[str, click.Context]:
    """Returns (subcommand, its parsed context) of a command line; click raises where it does not parse."""
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "--traceback"]
    name, *arguments = words
    while "--plugin" in arguments:  # parsing it would import the file
        place = arguments.index("--plugin")
        written = {block.file for page in PAGES for block in blocks(page)}
        assert arguments[place + 1] in written or (ROOT / arguments[place + 1]).is_file(), "a file that a page has you write, or an example"
        del arguments[place : place + 2]
    found = command_line.commands[name]
    return name, found.make_context(name, [a for a in arguments if a not in ("--help", "-h")])


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=_name)
def test_commands_in_the_docs_parse(page: Path, command: str) -> None:
    if len(command.split()) == 2:  # the name of a command, or ddkit --help
        assert command.split()[1] in {*command_line.commands, "--help", "--version"}
        return
    name, context = _context(command)
    if name in ("distill", "train") and "--plugin" not in command:
        _check_names(context.params)


def _check_names(flags: dict[str, Any]) -> None:
    """Raises where --losses, --set, --recipe and so on name what there is not (components of docs/ examples aside)."""
    from ddkit.recipes.resolve import resolve

    made_on_the_page = {
        "centre",
        "class-mean",
    }
    words = {word for value in flags.values() for word in re.split(r"[,:]", str(value))}
    if words & made_on_the_page or "/" in str(flags.get("recipe") or "") or str(flags.get("recipe")).endswith(".toml"):
        return
    names = ("losses", "evaluators", "model", "sets", "ipc", "pipc", "dataset", "init", "augment")
    protocol = None if str(flags.get("protocol")).endswith(".toml") else flags.get("protocol")
    resolve(flags["recipe"], evaluation={"protocol": protocol}, **{name: flags[name] for name in names if flags.get(name)})


HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
TUTORIAL = [ROOT / "docs" / "tutorial" / f"{name}.md" for name in ("own-images-and-model", "a-loss")]
FOLLOWED = [*(page for page in HOW_TO if page.stem != "index"), *TUTORIAL]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in FOLLOWED and any(b.language == "python" for b in blocks(p))], ids=_name)
def test_python_in_the_docs_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, _name(page) or "", "exec", dont_inherit=True), namespace)


def _faster(words: list[str]) -> list[str]:
    """Returns a command of a page for a task with fewer steps, epochs and smaller networks."""
    if words[0] not in ("distill", "train", "evaluate") or "--resume" in words:
        return words
    without = ("width",) if any(word.startswith("python:") for word in words) else ("teacher.width",) if "--teacher" in words else ()
    tables = {"train": ("train", "teacher"), "evaluate": ("train", "teacher", "evaluators")}.get(words[0])  # others do nothing there
    small = {path: value for path, value in SMALL.items() if not path.endswith(without) and (tables is None or path.startswith(tables))}
    return [*words, *set_flags(small)]


LONG = ("a-loss", "begin-with-other-images", "continue-a-run")  # they take seconds each


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page.stem in LONG else ()) for page in FOLLOWED], ids=map(_name, FOLLOWED)
)
def test_a_task_works_from_the_first_line_of_its_page_to_the_last(cli: CLI, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(Path("photos"))
    network = ddkit.create("model", "convnet", {"norm": "batch"})(3, (12, 12), 3)
    torch.save(network.state_dict(), "checkpoint.pt")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks(page):
        if block.not_run:
            continue
        if block.file:
            Path(block.file).parent.mkdir(exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, _name(page) or "", "exec", dont_inherit=True), namespace)
        elif block.language == "bash":
            for line in block.text.splitlines():
                result = cli(*_faster(shlex.split(line)[1:]))
                assert result.code == 0, f"{line}\n{result.err}"
    sys.modules.pop("my_models", None)


def test_every_task_is_on_the_page_of_tasks() -> None:
    text = (ROOT / "docs" / "how-to" / "index.md").read_text(encoding="utf-8")
    titles = {page.name: page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in HOW_TO if page.stem != "index"}
    assert {name: title for title, name in re.findall(r"^- \[(.*)\]\((.*)\)$", text, re.MULTILINE)} == titles


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the usual renderers make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    named = set(re.findall(r"^::: (\S+)$", prose(page), re.MULTILINE))  # the site has a heading for each
    return named | {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if not path.startswith(("http:", "https:", "mailto:")):
            file = (page.parent / path) if path else page
            assert file.exists(), f"{target} does not exist"
            assert not anchor or anchor in _anchors(file), f"{target}: no such heading"


def test_toml_in_the_docs_is_toml() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "toml":
                tomllib.loads(block.text)


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _study_keys(title: str) -> set[str]:
    """Returns the keys of the table under a heading of docs/reference/components/study.md."""
    text = (COMPONENTS / "study.md").read_text(encoding="utf-8")
    section = text.partition(f"\n### {title}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (`[^|]*`) \| [^|]* \| [^|]* \|", section, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def test_keys_of_a_study_are_documented() -> None:
    tables = {"systems", "cells", "blends", "published_on"}
    assert _study_keys("Top keys") == {f.encode_name for f in msgspec.structs.fields(Study)} - tables
    assert _study_keys("`[systems.NAME]`") == {f.encode_name for f in msgspec.structs.fields(SystemTable)}
    assert _study_keys("`[published_on]`") == {f.encode_name for f in msgspec.structs.fields(PublishedOn)}


def test_the_example_of_a_study_is_one() -> None:
    example = next(block.text for block in blocks(COMPONENTS / "study.md") if block.file == "mine.toml")
    assert set(parse_study(tomllib.loads(example)).systems) == {"mild", "strong", "real"}


def test_generated_pages_agree_with_the_code() -> None:
    pages = _generator().pages()
    differing = [file.name for file, text in pages.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    assert differing == [], "run: python docs/generate.py"


def _figures() -> Iterator[dict[str, str]]:
    """Yields the rows of measured figures in docs/data."""
    for file in sorted((ROOT / "docs" / "data").glob("*.csv")):
        if file.stem != "methods":  # which has flags in the place of commands
            yield from csv.DictReader(file.read_text(encoding="utf-8").splitlines())


def test_every_measured_figure_is_a_percentage_with_a_command_that_parses_unless_its_experiment_is_not_kept() -> None:
    for row in _figures():
        assert 0 < float(row["accuracy"]) < 100
        assert row["command"] or "the experiment is not kept" in row["note"]
    for command in {row["command"] for row in _figures()} - {""}:
        _context(command)


def test_plots_in_the_docs_are_drawn_from_the_data() -> None:
    generator = _generator()
    differing = [file.name for file, (_, data) in generator.plots().items() if generator.drawn(file) != data]
    assert differing == [], "run: python docs/generate.py"


def test_a_changed_figure_would_be_noticed_in_tables_and_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = _generator()
    rows = generator._rows
    monkeypatch.setattr(generator, "_rows", lambda name: [row | {"accuracy": "99.9"} for row in rows(name)])
    for page in ("README.md", "docs/results.md", "docs/lab/table1.md"):
        assert "99.9" in generator._filled(ROOT / page)
    file, (_, data) = next(iter(generator.plots().items()))
    assert generator.drawn(file) != data


def test_figures_of_methods_with_few_real_images_stand_beside_real_images_with_labels_of_their_kind() -> None:
    same = {"ipc": 1, "pipc": 10, "sets": 1, "networks": 3, "std": 0.01, "stored_numbers": 3072.0, "protocol": "short", "steps": 60}
    figures = [
        same | {"system": system, "title": title, "labels": labels, "mean": mean, "state": state, "teacher": ""}
        for system, title, labels, mean, state in (
            ("random-real", "real", "hard", 0.15, "done"),
            ("random-real-soft", "real", "soft", 0.18, "done"),
            ("dm-dkkt", "DM + DKKT", "hard", 0.2, "partly"),
            ("datm", "DATM", "stored", 0.3, "done"),
            ("dm", "DM", "hard", None, "not run"),
        )
    ]
    rows = runpy.run_path(str(ROOT / "docs" / "zoo.py"))["rows"]({"figures": figures}, "a machine", "--dataset digits")
    found = [(row["method"], row["losses"], row["labels"], row["accuracy"], row["random"]) for row in rows[2:]]
    assert found == [("DM", "own,dkkt", "hard", "20.0", "15.0"), ("DATM", "own", "stored", "30.0", "18.0")]
    assert rows[2]["command"].endswith("--cells 1:10 --systems dm-dkkt --seeds 1")


def test_methods_with_few_real_images_have_a_table_and_plots_once_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = _generator()
    same = {
        "labels": "hard",
        "ipc": "1",
        "std": "1.0",
        "n": "1 x 3",
        "random": "15.0",
        "random_std": "1.1",
        "stored_numbers": "3072.0",
        "steps": "60",
    }
    rows = [
        same | {"method": "DM", "losses": losses, "pipc": pipc, "accuracy": accuracy}
        for losses, pipc, accuracy in (("own", "10", "20.0"), ("own,dkkt", "10", "22.5"), ("own", "50", "24.0"))
    ]
    monkeypatch.setattr(generator, "_rows", lambda name: rows if name == "practical-zoo" else [])
    table = generator._zoo("practical-zoo")
    assert "| 1 | 10 | DM | 20.0 ± 1.0 | 22.5 ± 1.0 | +2.5 | 15.0 ± 1.1 | 3,072 | 60 | 1 x 3 |" in table
    assert "| 1 | 50 | DM | 24.0 ± 1.0 | - | - | 15.0 ± 1.1 | 3,072 | 60 | 1 x 3 |" in table
    plots = {file.stem: found for file, found in generator.plots().items()}
    assert plots["zoo-pipc"][1] == {
        "DM, ipc 1": {"alone": [["10", "20.0", "1.0"], ["50", "24.0", "1.0"]], "with DKKT": [["10", "22.5", "1.0"]]}
    }
    assert plots["zoo-gain"][1] == {"ipc 1, 10 real images per class": {"DM": [2.5, 1.41]}}
    for draw, data in plots.values():
        assert draw(data).axes


def test_a_changed_option_flag_signature_or_docstring_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddkit_priors import TotalVariation

    generator, options_type = _generator(), options.options_type

    class More(TotalVariation):
        extra: int = ddkit.option(3)

    monkeypatch.setattr(options, "options_type", lambda found: options_type(More if found is TotalVariation else found))
    assert "`extra = 3`" in generator.pages()[COMPONENTS / "loss.md"]
    monkeypatch.setattr(command_line.commands["blend"].params[2], "help", "Another text.")
    assert "Another text." in generator.pages()[ROOT / "docs" / "reference" / "cli.md"]

    def check(self: Any, ipc: int, available: int, more: str = "x") -> None:
        """Raises for another reason."""

    monkeypatch.setattr(ddkit.Initializer, "check", check)
    text = generator.pages()[COMPONENTS / "initializer.md"]
    assert "**`check(ipc: int, available: int, more: str = x) -> None`**\n\nRaises for another reason." in text


def _public() -> Iterator[tuple[str, Any]]:
    """Yields the public names that are classes and functions, in full, with what they name."""
    for module in (ddkit, ddkit.nn, ddkit.data):
        for name in set(module.__all__) - {"__version__", "data", "nn", "hookimpl"}:
            yield f"{module.__name__}.{name}", getattr(module, name)


def test_every_public_name_has_an_example_that_holds(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base classes have theirs on the page of their kind, errors that of DdkitError."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "my-run")
    ddkit.distill(losses="dm", pipc=2, seed=1, sets=SMALL, out="other-run", device="cpu")
    known = {"ddkit": ddkit, "torch": torch, "Path": Path, "os": os, "sys": sys}
    runner, without = doctest.DocTestRunner(), set()
    for name, found in sorted(_public()):
        (test,) = doctest.DocTestFinder(recurse=False).find(found, name, module=False, globs=dict(known))
        without |= set() if test.examples else {found}
        assert runner.run(test).failed == 0, name
    assert without == {*BASES.values(), *ddkit.DdkitError.__subclasses__(), ddkit.ChildEnded}


def test_every_public_name_is_on_the_page_of_the_python_api() -> None:
    shown = re.findall(r"^::: (\S+)$", (COMPONENTS.parent / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted([*(name for name, _ in _public()), "ddkit.hookimpl"])


METHODS = [page for page in sorted((ROOT / "docs" / "methods").glob("*.md")) if page.stem != "index"]


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_the_page_of_a_method_has_its_parts_and_its_recipe_is_short_and_says_where_each_value_is_from(page: Path) -> None:
    titles = re.findall(r"^## (.+)$", prose(page), re.MULTILINE)
    parts = ["What it does", "Formula", "The paper's settings, and ours", "Checked against the public code", "What is missing", "Citation"]
    assert titles == parts
    (recipe,) = (Path(p.value) for p in registry.plugins() if (p.kind, p.name) == ("recipe", page.stem))
    lines = recipe.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    raw = tomllib.loads("\n".join(lines))
    set_here = raw.keys() - {"summary", "source", "rules", "notes"}
    noted = {path.split(".")[0] for path in raw["notes"]}
    assert noted >= set_here
    assert all(note.startswith(("paper: ", "ours: ")) for note in raw["notes"].values())


def _documented_keys(title: str) -> dict[str, str]:
    """Returns {key: default} of the table under a heading of docs/reference/recipes.md."""
    text = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    section = text.partition(f"\n### {title}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", section, re.MULTILINE)
    return {key: default.strip().strip("`") for key, default in rows}


def _shown(default: Any) -> str:
    if default is None:
        return "left out"
    return str(default).lower() if isinstance(default, bool) else str(list(default) if isinstance(default, tuple) else default)


OWN_TABLES: dict[str, type[Table]] = {
    **{f"`[{key}]`": kind for key, kind in TABLES.items()},
    **{f"`[{key}.NAME]`": kind for key, kind in NAMED_TABLES.items()},
}


@pytest.mark.parametrize(("title", "kind"), OWN_TABLES.items(), ids=str)
def test_recipe_tables_are_documented_with_their_defaults(title: str, kind: type[Table]) -> None:
    defaults = {f.encode_name: _default(f) for f in msgspec.structs.fields(kind)}
    assert _documented_keys(title) == {key: _shown(defaults[key]) for key in own_keys(kind)}


def _default(field: Any) -> Any:
    if field.required:
        return "required"
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def test_top_keys_of_a_recipe_are_documented_with_their_defaults() -> None:
    plain = {key: _shown(getattr(Recipe(), key)) for key in ("name", "summary", "source", "ipc", "pipc", "steps", "seed")}
    plain["notes"] = ""
    assert _documented_keys("Top keys") == {key: value or "empty" for key, value in plain.items()}
    assert set(Recipe.__struct_fields__) == {*plain, *TABLES, *NAMED_TABLES}
    assert OptimizerTable in NAMED_TABLES.values()


def _install(page: Path, folder: Path) -> list[str]:
    """Writes the packages of a page's file blocks to `folder` as if pip had installed them; returns their modules."""
    files = {block.file: block.text for block in blocks(page) if block.file}
    modules = [Path(file).stem for file in files if file.endswith(".py")]
    for file, text in files.items():
        if file.endswith(".py"):
            (folder / Path(file).name).write_text(text, encoding="utf-8")
        else:
            _write_metadata(tomllib.loads(text)["project"], folder)
    return modules


def _write_metadata(project: dict[str, Any], folder: Path) -> None:
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n".join(points))


@pytest.fixture
def documented_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs the packages of docs/tutorial/a-loss.md for one test."""
    modules = _install(ROOT / "docs" / "tutorial" / "a-loss.md", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (registry.plugins, registry.load_plugin):
        cached.cache_clear()
    yield
    for module in modules:
        sys.modules.pop(module, None)
    for cached in (registry.plugins, registry.load_plugin):
        cached.cache_clear()


@pytest.mark.usefixtures("documented_plugins")
def test_the_documented_loss_works_by_name(cli: CLI) -> None:
    listed = cli("list", "losses")
    assert "Distance of the class-mean images" in listed.out
    result = cli("distill", "--losses", "dm,class-mean:0.5", "--set", "losses.class-mean.power=1", "--pipc", 3, *SMALL_FLAGS)
    assert result.code == 0, result.err


@pytest.mark.usefixtures("documented_plugins")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "class-mean", "--set", "losses.class-mean.powr=1"], "has no key 'powr'. Did you mean 'power'?"),
        (["--losses", "class-mean", "--set", "losses.class-mean.power=0.5"], "power = 0.5 is not possible: expected float >= 1.0."),
        (["--losses", "clas-mean"], "There is no loss 'clas-mean'. Did you mean 'class-mean'?"),
    ],
)
def test_documented_errors_are_what_one_gets(cli: CLI, arguments: list[str], message: str) -> None:
    result = cli("distill", *arguments)
    assert message in " ".join(result.err.split())
    assert message in (ROOT / "docs" / "tutorial" / "a-loss.md").read_text(encoding="utf-8")


# The pages of kinds


OWN_PAGE = {kind: group for kind, (group, *_) in KINDS.items() if kind != "loss-group"}  # groups are on the page of recipes
MADE = [kind for kind in KINDS if kind not in DATA_KINDS]


def _lacking(kinds: Mapping[str, str], suites: Mapping[str, type[testing.Conformance]]) -> list[str]:
    """Returns what the pages of `kinds` (kind to entry-point group) lack, and the kinds of code without a suite."""
    found = []
    for kind, group in kinds.items():
        page = COMPONENTS / f"{kind}.md"
        if not page.is_file():
            found.append(f"{kind}: no page")
            continue
        text = page.read_text(encoding="utf-8")
        wanted = ["<!-- generated: facts -->", "<!-- generated: own -->", f"`{group}`", f'[project.entry-points."{group}"]', "## Example"]
        if kind in BASES:
            wanted += [f"<!-- generated: class {BASES[kind].__name__} -->"]
        if kind not in DATA_KINDS:
            wanted += ["<!-- generated: checks -->", "## What it may do, and may not"]
            found += [] if kind in suites else [f"{kind}: no suite"]
        wanted += [f"| `{check}` |" for check in (suites[kind].checks() if kind in suites else ())]
        found += [f"{kind}: {part}" for part in wanted if part not in text]
    return found


def test_every_kind_has_a_page_with_all_parts_and_a_suite() -> None:
    assert _lacking(OWN_PAGE, testing.SUITES) == []
    assert {page.stem for page in COMPONENTS.glob("*.md")} == {*OWN_PAGE, "index"}


def test_a_kind_without_a_page_suite_or_check_on_it_would_be_noticed() -> None:
    assert _lacking({**OWN_PAGE, "widget": "ddkit.widgets"}, testing.SUITES) == ["widget: no page"]
    suites = {kind: suite for kind, suite in testing.SUITES.items() if kind != "model"}
    assert _lacking(OWN_PAGE, suites) == ["model: no suite"]

    class More(testing.ModelConformance):
        @suite_check
        def test_something_new(self) -> None:
            """Is new."""

    assert _lacking(OWN_PAGE, {**testing.SUITES, "model": More}) == ["model: | `something-new` |"]


def test_every_hook_has_its_docstring_in_the_template_and_its_place_in_the_docs() -> None:
    page = (COMPONENTS / "observer.md").read_text(encoding="utf-8")
    for hook in observers.HOOKS:
        text = " ".join((getattr(observers, hook).__doc__ or "").split())
        places = [text.find(part) for part in ("Called:", "Receives:", "May:", "May not:", "Since:")]
        assert places == sorted(places)
        assert places[0] == 0
        assert f"\n### {hook}\n" in page
        assert f"- Since: {text.rpartition('Since: ')[2]}\n" in page
    specs = [name for name, value in vars(observers).items() if hasattr(value, "ddkit_spec")]
    assert sorted(specs) == sorted(observers.HOOKS)


def test_every_check_and_every_method_of_a_base_class_says_what_it_is() -> None:
    silent = [
        f"{kind} {check}"
        for kind, suite in testing.SUITES.items()
        for check, method in suite.checks().items()
        if not getattr(suite, method).__doc__
    ]
    silent += [
        f"{base.__name__}.{name}"
        for base in BASES.values()
        for name, member in vars(base).items()
        if callable(member) and (not name.startswith("_") or name == "__call__") and not member.__doc__
    ]
    assert silent == []


def _made_on(page: Path) -> tuple[str, str, Any]:
    """Returns (group, name, object) of the entry point that a page of a kind shows, from the code on that page."""
    (code,) = [block for block in blocks(page) if (block.file or "").endswith(".py")]
    (points,) = [
        tomllib.loads(b.text)["project"]["entry-points"] for b in blocks(page) if b.language == "toml" and "entry-points" in b.text
    ]
    ((group, named),) = points.items()
    ((name, value),) = named.items()
    module, _, attribute = value.partition(":")
    assert code.file == f"{module}.py"
    namespace: dict[str, Any] = {"__name__": module}
    exec(compile(code.text, str(code.file), "exec", dont_inherit=True), namespace)
    return group, name, namespace[attribute]


@pytest.mark.parametrize("kind", MADE)
def test_the_example_of_a_kind_passes_every_check_of_its_suite(kind: str) -> None:
    group, name, made = _made_on(COMPONENTS / f"{kind}.md")
    assert group == KINDS[kind].group
    assert registry.NAME.fullmatch(name)
    suite = type("Example", (testing.SUITES[kind],), {"component": made})()
    for method in suite.checks().values():
        getattr(suite, method)()


KIND_PAGES = [*COMPONENTS.glob("*.md"), COMPONENTS.parent / "plugins.md"]
WITH_FILES = [(page, command) for page, command in COMMANDS if page in KIND_PAGES and "--plugin" in command]


@pytest.fixture
def written_files(cli: CLI) -> None:
    """Writes the files of all pages of kinds to the folder in which `cli` runs commands."""
    for page in KIND_PAGES:
        for block in blocks(page):
            if block.file:
                file = Path(block.file)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize(("page", "command"), WITH_FILES, ids=lambda value: value.stem if isinstance(value, Path) else "")
@pytest.mark.usefixtures("written_files")
def test_the_command_with_the_example_of_a_kind_works(cli: CLI, page: Path, command: str) -> None:
    if "my-run" in command.split():
        assert cli("distill", "--losses", "dm", "--evaluate", "none", "--out", "my-run", *SMALL_FLAGS).code == 0
    result = cli(*shlex.split(command)[1:])
    assert result.code == 0, result.err
    if page.stem in ("plugins", "evaluator"):
        assert "nearest mean" in result.out


def test_every_kind_that_a_file_can_hold_shows_such_a_command() -> None:
    assert {page.stem for page, _ in WITH_FILES} == {*BASES, "plugins"}


OWN_IMAGES = ROOT / "docs" / "reference" / "images.md"


def test_the_commands_on_own_images_run_and_say_what_the_page_says(cli: CLI, caplog: pytest.LogCaptureFixture) -> None:
    drawing = next(block for block in blocks(OWN_IMAGES) if block.language == "python")
    exec(compile(drawing.text, OWN_IMAGES.name, "exec", dont_inherit=True), {})
    commands = [command for page, command in COMMANDS if page == OWN_IMAGES and "imagefolder:photos" in command]
    assert len(commands) == 3
    for command in commands:
        result = cli(*shlex.split(command)[1:], *SMALL_FLAGS)
        assert result.code == 0, result.err
        if "my-photos" in command:
            assert "1 of 20 images were resized to 64 x 96 pixels." in caplog.messages
    assert ddkit.load("my-photos").class_names == ["street cat", "собака"]
    assert ddkit.load("small-photos").images.shape[2:] == (24, 36)


@pytest.mark.usefixtures("written_files")
def test_the_recipe_on_its_page_is_one(cli: CLI) -> None:
    result = cli("distill", "--recipe", "my_recipes/gentle.toml", "--plan", "--json")
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["recipe"]["losses"]) == {"dm", "total-variation"}


def _first_column(page: Path, title: str) -> list[str]:
    """Returns the names in the first column of the table under a heading."""
    section = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([\w.]+)(?:\(.*?\)|\[.*?\])?`", cell)]


def test_everything_that_a_loss_may_ask_for_is_on_its_page() -> None:
    page = COMPONENTS / "loss.md"
    assert _first_column(page, "Everything in `ddkit.Requires`") == list(ddkit.Requires.__struct_fields__)
    assert _first_column(page, "Extra parameters") == list(ddkit.Parameter.__struct_fields__)
    members = {name for name in vars(ddkit.Step) if not name.startswith("_")} - {"for_loss"}  # the loop's
    names = ("images", "labels", "all_images", "all_labels", "class_slices", "size", "augmented", "embeddings", "class_gradients")
    real = {f"real.{name}" for name in names}
    assert set(_first_column(page, "Everything in `ddkit.Step`")) == members - {"real"} | real


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_tell_how_they_are_used(forks: Any, script: Path) -> None:
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = forks.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
