"""The files of a study, for programs, papers and pages: its charts, its table for LaTeX, its figures as CSV, and its page, report.html."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ddkit.files import json_bytes
from ddkit.run.report import page
from ddkit.run.report.charts import Chart, accuracies, dots
from ddkit.studies.results import Figure, Report, report_json, report_table, table_of
from ddkit.text import printable

MOST_LINES = 12  # in a chart; more systems are rows of one
LATEX = {"\N{PLUS-MINUS SIGN}": r"$\pm$"}  # characters that tabulate does not replace
PAGE = Path(__file__).with_name("study.html")


def report_csv(report: Report) -> str:
    """Returns a line of names and one line for each figure. Accuracies are fractions, and unknown values are empty cells."""
    names = [name for name in Figure.__struct_fields__ if name not in ("spectrum", "warnings")]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*names, "difference", "state"])
    for figure in report.figures:
        lines.writerow([*(getattr(figure, name) for name in names), figure.difference, figure.state])
    return text.getvalue()


def report_latex(report: Report) -> str:
    """Returns the table with systems as columns, a tabular of the package booktabs, with the notes as comments."""
    from tabulate import tabulate

    header, rows, notes = table_of(report, pivot=True)
    cells = [[" ".join(printable(cell).split()) for cell in row] for row in (header, *rows)]
    aligned = ["right", "right", *["left"] * (len(header) - 2)]
    text = tabulate(cells[1:], cells[0], tablefmt="latex_booktabs", disable_numparse=True, colalign=aligned)
    for letter, command in LATEX.items():
        text = text.replace(letter, command)
    comments = [f"% {' '.join(printable(note).split())}" for note in ["Needs \\usepackage{booktabs}.", *notes]]
    return "\n".join([*comments, text, ""])


def report_page(report: Report) -> bytes:
    """Returns one HTML page that needs no other file: charts, images, table and notes."""
    header, rows, notes = table_of(report)
    first = header.index("system")
    header, *rows = [[line[first], *line[:first], *line[first + 1 :]] for line in (header, *rows)]
    pictures = [
        (Path(file).stem, f"data:image/png;base64,{base64.b64encode(Path(file).read_bytes()).decode()}") for file in report.pictures
    ]
    explained = "Error bars: one sample standard deviation over all networks of all sets."
    explained += " Dashed, with crosses: published." if any(figure.published is not None for figure in report.figures) else ""
    shown = {
        "title": report.study, "summary": report.summary, "source": report.source, "charts_": list(report_charts(report)),
        "explained": explained, "pictures": pictures, "header": header, "rows": rows, "notes": notes,
    }  # fmt: skip
    return page(PAGE, shown)


def report_charts(report: Report) -> Iterator[Chart]:
    """Yields the accuracies over ipc for each pipc, over pipc for each ipc, over alpha, and those of cells that are in none of these.

    Systems with other labels stand in other charts, as they are not to be compared.
    """
    known = [figure for figure in report.figures if figure.mean is not None or figure.published is not None]
    for labels in dict.fromkeys(figure.labels for figure in known):
        of, end = ("", "") if labels == "hard" else (f", {labels} labels", f"-{labels}")
        plain = [figure for figure in known if figure.labels == labels and figure.alpha is None]
        drawn: set[tuple[int, int | str]] = set()
        for axis, other, x in (("ipc", "pipc", "images per class (ipc)"), ("pipc", "ipc", "real images per class (pipc)")):
            for value in dict.fromkeys(getattr(figure, other) for figure in plain):
                own = [figure for figure in plain if getattr(figure, other) == value]
                if len({getattr(figure, axis) for figure in own}) > 1 and len({figure.name for figure in own}) <= MOST_LINES:
                    drawn |= {(figure.ipc, figure.pipc) for figure in own}
                    yield _lines(f"{axis}-{other}{value}{end}", f"Accuracy over {axis}, {other} {value}{of}", axis, x, own)
        for cell in dict.fromkeys((figure.ipc, figure.pipc) for figure in plain):
            if cell not in drawn:
                what, own = f"Accuracy, ipc {cell[0]}, pipc {cell[1]}{of}", [each for each in plain if (each.ipc, each.pipc) == cell]
                rows = [(each.row, [_pair(each.mean, each.std), _pair(each.published, each.published_std)]) for each in own]
                legend = ["measured", "published"][: 2 if any(each.published is not None for each in own) else 1]
                yield dots(f"accuracy-ipc{cell[0]}-pipc{cell[1]}{end}", what, rows, legend)._replace(title=what)
        blends = [figure for figure in known if figure.labels == labels and figure.alpha is not None]
        for cell in dict.fromkeys((figure.ipc, figure.pipc) for figure in blends):
            own = [figure for figure in blends if (figure.ipc, figure.pipc) == cell]
            title = f"Accuracy over alpha, ipc {cell[0]}, pipc {cell[1]}{of}"
            yield _lines(f"alpha-ipc{cell[0]}-pipc{cell[1]}{end}", title, "alpha", "alpha", own)


def _lines(file: str, title: str, axis: str, x: str, figures: Sequence[Figure]) -> Chart:
    lines: dict[str, dict[float | str, Any]] = {}
    published: dict[str, dict[float | str, Any]] = {}
    for figure in figures:
        for table, pair in ((lines, _pair(figure.mean, figure.std)), (published, _pair(figure.published, figure.published_std))):
            own = table.setdefault(figure.name, {})
            own |= {} if pair is None else {getattr(figure, axis): pair}
    return accuracies(file, title, title, x, lines, published)


def _pair(mean: float | None, std: float | None) -> tuple[float, float | None] | None:
    return None if mean is None else (100 * mean, None if std is None else 100 * std)


FILES: dict[str, Callable[[Report], bytes]] = {
    "report.json": lambda report: json_bytes(report_json(report)),
    "report.md": lambda report: f"{report_table(report, 'pipe')}\n".encode(),
    "report.csv": lambda report: report_csv(report).encode(),
    "report.tex": lambda report: report_latex(report).encode(),
    "report.html": report_page,
}  # in the folder of a study
