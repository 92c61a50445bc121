"""The page around the parts of a report: one HTML file without a script that asks for nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence

from ddkit.run.report.charts import Html, text

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5c6570; --page: #ffffff; --card: #f5f6f8; --line: #d9dde2;
  --c0: #0b6cb8; --c1: #c8501b; --c2: #0a8763; --c3: #a6477f; --c4: #96700a; --c5: #4d5fc4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3acb6; --page: #14171a; --card: #1e2327; --line: #3a424a;
  --c0: #5cb3f0; --c1: #f5915c; --c2: #3fc79b; --c3: #e58fc0; --c4: #dfb546; --c5: #9fadf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 48rem; margin: .4rem 0; overflow-wrap: anywhere; }
.note, figcaption, .tile span { color: var(--soft); font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); gap: .75rem; margin: 1rem 0 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; overflow-wrap: anywhere; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; }
.images { display: flex; flex-wrap: wrap; gap: 1rem 1.25rem; }
figure { margin: 0; max-width: 100%; }
.images figcaption { width: 0; min-width: 100%; overflow-wrap: anywhere; margin-bottom: .15rem; }
.images img + img { margin-top: 2px; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.chart { background: var(--card); border-radius: .5rem; padding: .75rem; max-width: 30rem; }
.chart h3 { margin: 0 0 .25rem .25rem; }
svg { display: block; width: 100%; height: auto; font-size: 15px; }
svg text { fill: var(--ink); } svg .grid { stroke: var(--line); fill: none; }
.l0, .l1, .l2, .l3, .l4, .l5 { fill: none; stroke-width: 2; stroke-linejoin: round; }
.l0 { stroke: var(--c0); } .l1 { stroke: var(--c1); } .l2 { stroke: var(--c2); }
.l3 { stroke: var(--c3); } .l4 { stroke: var(--c4); } .l5 { stroke: var(--c5); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); }
.f3 { fill: var(--c3); } .f4 { fill: var(--c4); } .f5 { fill: var(--c5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .25rem; padding: 0; font-size: .875rem; }
.legend li { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.s0 { background: var(--c0); } .s1 { background: var(--c1); } .s2 { background: var(--c2); }
.s3 { background: var(--c3); } .s4 { background: var(--c4); } .s5 { background: var(--c5); }
.wide { overflow-x: auto; max-width: 100%; margin-top: .75rem; }
table { border-collapse: collapse; font-size: .9375rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
th { font-weight: 600; } tbody th { font-weight: 400; }
.film td, .film th { border: 0; padding: .15rem .3rem .15rem 0; vertical-align: middle; font-size: .875rem; }
.film thead th { color: var(--soft); text-align: center; white-space: nowrap; }
.film tbody th { max-width: 10rem; overflow-wrap: anywhere; }
.film img { margin: 0 auto; max-width: none; }
code, pre { font: .8125rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: .5rem; padding: 1rem; overflow-x: auto; margin: .5rem 0; }
summary { cursor: pointer; }
@media (max-width: 40rem) { .tile { padding: .6rem .75rem; } .tile b { font-size: 1.2rem; } table { font-size: .875rem; }
  th, td { padding-right: .6rem; } .film .between { display: none; } .film tbody th { max-width: 3.6rem; font-size: .75rem; } }
@media print { body { max-width: none; } .chart, .tile, figure, tr { break-inside: avoid; } }
"""
FACTS = ' class="facts"'  # a table of names and values, which may be long
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, summary: str, parts: Sequence[str]) -> str:
    """Returns the whole page; `title` and `summary` are plain text, `parts` HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text(title)}</h1>\n<p>{text(summary)}</p>\n" + "\n".join(part for part in parts if part) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Returns a part of the page under its heading, "" where there is nothing in it."""
    kept = [part for part in parts if part]
    return f"<section>\n<h2>{text(title)}</h2>\n" + "\n".join(kept) + "\n</section>" if kept else ""


def note(words: str) -> str:
    """Returns a paragraph of plain text in small print."""
    return f'<p class="note">{text(words)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of plain text that scrolls where it is too wide; the first cell of a row heads it."""
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = [f'<tr><th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows]
    return _wide(
        f"<table{'' if head else FACTS}>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{''.join(lines)}</tbody></table>", "table"
    )


def _wide(inside: str, what: str) -> str:
    return f'<div class="wide" tabindex="0" role="region" aria-label="{what}">{inside}</div>'


def film_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Returns a table of pictures: `head` are the steps, `rows` (plain text, HTML of each picture); where it is narrow, of four steps."""
    last = len(head) - 1
    always = {round(place * last / 3) for place in range(4)}  # a narrow page has room for four
    marks = ["" if place in always else ' class="between"' for place in range(len(head))]
    top = '<th scope="col">step</th>' + "".join(f'<th scope="col"{mark}>{text(name)}</th>' for mark, name in zip(marks, head, strict=True))
    lines = [
        f'<tr><th scope="row">{text(name)}</th>'
        + "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, cells, strict=True))
        + "</tr>"
        for name, cells in rows
    ]
    inside = f'<table class="film"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return _wide(inside, "film strip")


def chart(title: str, drawing: str, below: str = "") -> str:
    """Returns a chart in its frame; `title` is plain text, `drawing` and `below` are HTML."""
    return f'<figure class="chart"><h3>{text(title)}</h3>{drawing}{below}</figure>'


def time(words: str) -> Html:
    """Returns words that tell a time, as HTML: marked, so that two reports can be compared without."""
    return Html(f'<span class="time">{text(words)}</span>')
