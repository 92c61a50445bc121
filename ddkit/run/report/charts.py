"""The charts of a report: what each shows, as data, and its drawing by matplotlib for the page and as files for a paper."""

from __future__ import annotations

import io
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor

from ddkit.errors import printable

WIDTH, HEIGHT = 420, 280  # points, which are pixels of a wide page
LEFT, RIGHT, TOP, BOTTOM = 88, 14, 14, 50  # margins of the plot
ROW = 52  # height of a row of Dots
LONGEST = 48  # characters of a name there
BINS = 20  # of a histogram
INK, GRID = "#1c2127", "#d9dde2"
COLOURS = ("#0b6cb8", "#c8501b", "#0a8763", "#a6477f", "#96700a", "#4d5fc4")
ON_THE_PAGE = {INK: "currentColor", GRID: "var(--line)"} | {colour: f"var(--c{index})" for index, colour in enumerate(COLOURS)}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 15, "text.color": INK, "axes.labelcolor": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 2,
    "lines.markersize": 5, "errorbar.capsize": 3, "legend.fontsize": 12, "legend.frameon": False, "svg.fonttype": "none",
    "pdf.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip
_MATPLOTLIB = threading.Lock()  # its settings and fonts are those of the process


def number(value: float) -> str:
    """Returns a number for a label: "0.25", "1,200", "3e-05"."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3g}"


def can_be_drawn(value: float) -> bool:
    """Whether a value is finite, and so small that differences and multiples of such values are too."""
    return abs(value) < 1e100


def wants_log(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis suits: all positive, over more than a factor of 20."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """What a chart shows: `file` is its name as a file, `what` says it in words, `x` and `y` name the axes."""

    file: str
    title: str
    what: str
    x: str
    y: str = ""
    height = HEIGHT

    @property
    def legend(self) -> list[str]:
        """The names of what is shown, in the order of the colours; [] where there is one thing, which needs none."""
        return []

    def draw(self, axes: Any) -> None:
        """Draws into matplotlib's axes."""


class Curves(Chart, frozen=True, kw_only=True):
    """Named lines through (x, y) points, whose values can be drawn and with `log` are positive."""

    lines: Mapping[str, Sequence[tuple[float, float]]]
    log: bool = False

    @property
    def legend(self) -> list[str]:
        return list(self.lines) if len(self.lines) > 1 else []

    def draw(self, axes: Any) -> None:
        for index, (name, points) in enumerate(self.lines.items()):
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": "o" if len(points) <= 12 else ""}
            style |= {} if index < len(COLOURS) else {"dashes": (2 * (index // len(COLOURS)), 2)}
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)
        axes.margins(x=0)
        if self.log:
            from matplotlib.ticker import LogLocator, NullLocator

            values = [value for points in self.lines.values() for _, value in points]
            axes.set_yscale("log")
            axes.set_ylim(min(values) / 1.2, max(values) * 1.2)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,), numticks=7))
            axes.yaxis.set_minor_locator(NullLocator())


class Histogram(Chart, frozen=True, kw_only=True):
    """How many of `values` (n,), finite floats, lie in each of BINS equal parts of their range."""

    values: Tensor

    def draw(self, axes: Any) -> None:
        low, high = float(self.values.min()), float(self.values.max())
        if low == high:
            low, high = low - max(0.5, abs(low) / 10), high + max(0.5, abs(high) / 10)
        counts = torch.histc(self.values, BINS, low, high)
        edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
        axes.bar(edges[:-1].tolist(), counts.tolist(), width=0.9 * (high - low) / BINS, align="edge", color=COLOURS[0])
        axes.set_xlim(low, high)


class Dots(Chart, frozen=True, kw_only=True):
    """Rows (name, (value, half of its error bar or None) or None for each of `series`)."""

    rows: Sequence[tuple[str, Sequence[tuple[float, float | None] | None]]]
    series: Sequence[str]

    @property
    def height(self) -> int:  # type: ignore[override]
        return TOP + ROW * len(self.rows) + BOTTOM

    @property
    def legend(self) -> list[str]:
        return list(self.series)

    def draw(self, axes: Any) -> None:
        for index, name in enumerate(self.series):
            found = [(*pair, ROW * row + 26 + 12 * index) for row, (_, pairs) in enumerate(self.rows) if (pair := pairs[index])]
            bars = [half or math.nan for _, half, _ in found]
            style = {"fmt": "o", "color": COLOURS[index], "markersize": 8, "label": name}
            axes.errorbar([value for value, _, _ in found], [y for _, _, y in found], xerr=bars, **style)
        for row, (name, _) in enumerate(self.rows):
            told = name if len(name) <= LONGEST else f"{name[: LONGEST - 4]} ..."
            axes.text(0, ROW * row + 14, printable(told), transform=axes.get_yaxis_transform(), parse_math=False)
        axes.margins(x=0.12)
        axes.set_ylim(ROW * len(self.rows), 0)
        axes.set_yticks([])


def svg(chart: Chart) -> str:
    """Returns a chart as an <svg> for the page, in the colours of the page around it and without words that were not escaped."""
    from markupsafe import Markup

    with _figure(chart) as figure:
        drawn = _saved(figure, "svg", dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode()
    used = set(re.findall(r"#(\w+)", drawn))  # the page has several charts, and an id only once
    drawn = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", drawn)
    for colour, role in ON_THE_PAGE.items():
        drawn = drawn.replace(colour, role)
    head = Markup('<svg role="img" aria-label="{}" ').format(printable(chart.what))
    return head + Markup(drawn.partition("<svg ")[2])


def files(chart: Chart) -> dict[str, bytes]:
    """Returns a chart as files for a paper and a talk: {"losses.pdf": bytes, "losses.png": bytes}."""
    with _figure(chart) as figure:
        if chart.legend:
            for words in figure.axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2).get_texts():
                words.set_parse_math(False)
                words.set_text(printable(words.get_text()))
        return {
            f"{chart.file}.pdf": _saved(figure, "pdf", {"CreationDate": None}, bbox_inches="tight"),
            f"{chart.file}.png": _saved(figure, "png", {}, bbox_inches="tight", facecolor="white"),
        }


def _saved(figure: Any, form: str, metadata: Mapping[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata=metadata, **options)
    return buffer.getvalue()


@contextmanager
def _figure(chart: Chart) -> Iterator[Any]:
    """Yields a chart as matplotlib's figure, under settings that are neither the user's nor left behind."""
    import matplotlib
    from matplotlib.figure import Figure

    with _MATPLOTLIB, matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not: the page has other fonts
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(STYLE | {"svg.hashsalt": chart.file})
        width, height = WIDTH, chart.height
        figure = Figure(figsize=(width / 72, height / 72))
        left = LEFT if chart.y else RIGHT
        axes = figure.add_axes((left / width, BOTTOM / height, (width - left - RIGHT) / width, (height - TOP - BOTTOM) / height))
        chart.draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: number(value))
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y, rotation_mode="anchor")
        axes.yaxis.set_label_coords(18 / width, 0.5 + (BOTTOM - TOP) / 2 / height, transform=figure.transFigure)
        yield figure
