"""`ddkit cite`: the BibTeX of a recipe, a recipe file and a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import ddkit
from ddkit.components import registry
from ddkit.recipes.citations import ARXIV
from tests.conftest import Result

RECIPES = sorted(p.name for p in registry.plugins() if p.kind == "recipe" and p.first_party)
ENTRY = re.compile(r"@(\w+)\{([^,{}\s]+),\n(?:  \w+ = \{.+\},\n)+\}")


def test_a_recipe_cites_its_paper_its_parts_and_ddkit(cli: Callable[..., Result]) -> None:
    told = cli("cite", "m3d")
    assert (told.code, told.err) == (0, "")
    parts = told.out.strip().split("\n\n")
    assert parts[0].startswith("% ddkit itself\n@software{ddkit,\n")
    assert parts[1].startswith("% the recipe m3d, the loss mmd\n@inproceedings{zhang2024-2312.15927,\n")
    assert "author = {Zhang, Hansong and Li, Shikun and" in parts[1]
    asked = json.loads(cli("cite", "m3d", "--json").out)["citations"]
    assert [f"% {', '.join(each['used_for'])}\n{each['bibtex']}" for each in asked] == parts
    assert asked[1]["key"] == "zhang2024-2312.15927"


@pytest.mark.parametrize("name", RECIPES)
def test_every_paper_of_an_own_recipe_is_in_the_list(name: str) -> None:
    found = ddkit.cite(name)
    assert all(ENTRY.fullmatch(each.bibtex) for each in found)
    assert [each.key for each in found if each.bibtex.startswith("@misc{arxiv-")] == [], "add it to CITATION.cff"
    source = next(Path(p.value).read_text() for p in registry.plugins() if (p.kind, p.name) == ("recipe", name))
    for number in ARXIV.findall(re.search(r'^source = "(.*)"', source, re.MULTILINE)[1]):  # type: ignore[index]
        assert any(f"eprint = {{{number}}}" in each.bibtex and f"the recipe {name}" in each.used_for for each in found)


def test_the_source_of_a_third_party_is_cited_in_its_own_words(cli: Callable[..., Result]) -> None:
    Path("mine.toml").write_text('name = "my @method"\nsource = "Doe & Roe, 100 % {better}, 2031"\n[losses.centre]\n[losses.dm]\n')
    text = '"""A loss.\n\n    Source: Poe, arXiv 3101.00001.\n    """\n    def __call__(self, step):\n        return step.images.sum()\n'
    Path("centre.py").write_text(f"import ddkit\n\nclass Centre(ddkit.Loss):\n    {text}")
    told = cli("cite", "mine.toml", "--plugin", "centre.py")
    assert told.code == 0
    entries = [part.partition("\n")[2] for part in told.out.strip().split("\n\n")]
    assert all(ENTRY.fullmatch(entry) for entry in entries)
    assert entries[1] == "@misc{recipe-my-method,\n  note = {Doe \\& Roe, 100 \\% better, 2031},\n}"
    assert "@misc{arxiv-3101.00001,\n  note = {Poe, arXiv 3101.00001.}," in told.out
    assert "% the loss dm\n" in told.out


def test_a_run_cites_what_its_recipe_uses(cli: Callable[..., Result], finished: Path) -> None:
    told = cli("cite", finished)
    assert told.code == 0
    assert "the loss dm" in told.out
    assert "dkkt" not in told.out
