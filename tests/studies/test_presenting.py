"""A study as others take it up: its table in other forms, its charts and its page, all without empty columns and with words escaped."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from ddkit.studies.presenting import report_charts, report_csv, report_latex, report_page
from ddkit.studies.results import Figure, Report, report_table
from tests.run.test_report import Page, check_self_contained


def report(*figures: dict[str, Any], **changes: Any) -> Report:
    usual = {"ipc": 1, "pipc": 10, "system": "dm", "title": "DM", "protocol": "short", "labels": "hard", "steps": 9, "wanted": 2}
    usual |= {"mean": 0.25, "std": 0.01, "sets": 2, "networks": 3, "dataset": "digits"}
    known: dict[str, Any] = {"study": "s", "summary": "a", "source": "", "split": "test", "published_on": None, "pictures": []}
    return Report(figures=[Figure(**usual | each) for each in figures], **known | changes)


TWO = ({}, {"system": "b", "title": "B & <i>_%", "mean": None, "sets": 0}, {"ipc": 10, "images_in_one": 4, "mean": 0.5})


def test_a_table_has_no_empty_columns_and_names_a_set_of_several_images_in_one_in_its_row() -> None:
    plain = report_table(report(*TWO)).splitlines()
    assert plain[0].split() == ["ipc", "pipc", "system", "measured", "n", "protocol", "steps"]
    assert "DM, 4 images in one  50.0" in plain[4]
    assert "published" in report_table(report({"published": 0.2})).splitlines()[0]


def test_with_pivot_systems_are_columns_and_what_they_do_not_share_is_said_below() -> None:
    lines = report_table(report(*TWO, {"system": "c", "title": "C", "published": 0.3, "steps": 5, "std": None}), pivot=True).splitlines()
    assert lines[0].split("  ")[-3].strip() == "C, published"
    assert [line.split() for line in lines[2:4]] == [
        ["1", "10", "25.0", "\N{PLUS-MINUS SIGN}", "1.0", "30.00", "25.0"], ["10", "10", "50.0", "\N{PLUS-MINUS SIGN}", "1.0", "-", "-"],
    ]  # fmt: skip
    assert "Steps: 9 (DM), 5 (C)." in lines
    assert "n: 2 x 3." in lines
    assert "Images in each stored one: 1 (DM at ipc 1, pipc 10; C), 4 (DM at ipc 10, pipc 10)." in lines


def test_latex_is_a_tabular_of_booktabs_whose_letters_are_escaped_and_whose_notes_are_comments() -> None:
    bad = "\\input{x} $_{ # % \n \\end{tabular}"
    lines = report_latex(report({}, {"system": "b", "title": bad, "failed": bad, "mean": 0.3})).splitlines()
    table = [line for line in lines if not line.startswith("%")]
    assert [table[place] for place in (1, 3, 5, 6)] == [r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]
    assert r"\textbackslash{}input\{x\} \$\_\{ \# \% \textbackslash{}end\{tabular\}" in table[2]
    assert r"25.0 $\pm$ 1.0" in table[4]


def test_csv_has_a_line_a_figure_with_fractions() -> None:
    title = 'a "b", c\nd'
    rows = list(csv.DictReader(io.StringIO(report_csv(report({"title": title, "published": 0.2}, {"mean": None, "sets": 0})))))
    assert [(row["title"], row["mean"], row["state"]) for row in rows] == [(title, "0.25", "done"), ("DM", "", "not run")]
    assert float(rows[0]["difference"]) == pytest.approx(0.05)


def test_charts_are_over_ipc_and_pipc_and_else_of_a_cell_and_labels_are_never_mixed() -> None:
    cells = [{"ipc": ipc, "pipc": pipc} for ipc, pipc in ((1, 10), (10, 10), (1, "all"))]
    soft = {"labels": "soft", "mean": 0.4}
    blend = {"alpha": 0.5, "ipc": 3, "mean": 0.3}
    charts = list(report_charts(report(*cells, {"ipc": 50, "pipc": 50}, soft, blend, blend | {"alpha": 1.0})))
    names = ["ipc-pipc10", "pipc-ipc1", "accuracy-ipc50-pipc50", "alpha-ipc3-pipc10", "accuracy-ipc1-pipc10-soft"]
    assert [chart.file for chart in charts] == names
    assert [list(chart.ticks) for chart in charts[:2]] == [["1", "10"], ["10", "all"]]
    assert list(charts[2].legend) == ["measured"]
    assert list(report_charts(report({"mean": None, "sets": 0}))) == []
    many = [{"ipc": ipc, "system": f"s{number}", "title": f"S{number}"} for ipc in (1, 10) for number in range(13)]
    assert [chart.file for chart in report_charts(report(*many))] == ["accuracy-ipc1-pipc10", "accuracy-ipc10-pipc10"]


def test_the_page_is_whole_and_its_words_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"x")
    bad = "<script>alert(1)</script>"
    shown = report(
        {"title": bad, "published": 0.2}, {"ipc": 10, "failed": bad}, summary=bad, source=bad, pictures=[str(tmp_path / "p.png")]
    )
    content = report_page(shown).decode()
    page = Page(content)
    check_self_contained(page)
    assert (page.tags["script"], page.tags["figure"], page.text.count(bad) >= 4) == (0, 1, True)
    assert "Dashed, with crosses: published." in page.text
