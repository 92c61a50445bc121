"""The charts of a report: what each shows, as data, and its drawing by matplotlib for the page and as files for a paper."""

from __future__ import annotations

import io
import logging
import math
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddkit.files import path_part
from ddkit.run.report.pictures import colours
from ddkit.text import printable

WIDTH, HEIGHT = 420, 280  # points, which are pixels of a wide page
LEFT, RIGHT, TOP, BOTTOM = 88, 14, 14, 50  # margins of the plot
ROW = 52  # height of a row of Dots
LONGEST = 48  # characters of a name there
LINE, SHORT = 26, 12  # height of a line for a class, and characters of its name there
NAMES = 124  # margin that such names need
COLUMNS = 10  # images in a row of them
BINS = 20  # of a histogram
SMOOTH = 24  # points from which on a curve is smoothed
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


class Chart(NamedTuple):
    """What a chart shows: `file` is its name as a file, `what` says it in words, `x` and `y` name the axes.

    `draw` draws it into matplotlib's axes; `legend` are the names of what is drawn in the order of the colours, none of one thing.
    """

    file: str
    title: str
    what: str
    draw: Callable[[Any], None]
    x: str
    y: str = ""
    legend: Sequence[str] = ()
    height: int = HEIGHT
    left: int = LEFT  # margin
    ticks: Sequence[str] = ()  # words for 0, 1, ... at the axis of x instead of numbers


def curves(
    file: str, title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str = "step", y: str, may_log: bool = True
) -> Chart:
    """Returns a chart of named lines through (x, y) points; values that cannot be drawn are left out.

    A line of at least SMOOTH points is smoothed, and faint as it is. The axis is logarithmic where that suits: all values are positive,
    over more than a factor of 20.
    """
    kept = {name: [point for point in points if can_be_drawn(point[1])] for name, points in lines.items()}
    values = [value for points in kept.values() for _, value in points]
    log = may_log and bool(values) and min(values) > 0 and max(values) > 20 * min(values)

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(kept.items()):
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": "o" if len(points) <= 12 else ""}
            style |= {} if index < len(COLOURS) else {"dashes": (2 * (index // len(COLOURS)), 2)}
            xs, ys = [x for x, _ in points], [y for _, y in points]
            if len(points) >= SMOOTH:
                axes.plot(xs, ys, color=style["color"], alpha=0.3, linewidth=1)
                ys = smoothed(ys)
            axes.plot(xs, ys, label=name, **style)
        axes.margins(x=0)
        if log:
            from matplotlib.ticker import LogLocator, NullLocator

            axes.set_yscale("log")
            axes.set_ylim(min(values) / 1.2, max(values) * 1.2)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,), numticks=7))
            axes.yaxis.set_minor_locator(NullLocator())

    what = f"{title}: {', '.join(lines)} over {x}"
    return Chart(file, title, what, draw, x, f"{y} (log scale)" if log else y, list(lines) if len(lines) > 1 else ())


def smoothed(values: Sequence[float]) -> list[float]:
    """Returns the mean of each value and its neighbours: up to a twelfth of all at each side, at both ends fewer and equally many."""
    last = len(values) - 1
    reach = [min(place, last - place, len(values) // 12) for place in range(len(values))]
    return [statistics.fmean(values[place - wide : place + wide + 1]) for place, wide in enumerate(reach)]


def histogram(name: str, values: Tensor) -> Chart:
    """Returns how many of `values` (n,), float64 that can be drawn, lie in each of BINS equal parts of their range."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - max(0.5, abs(low) / 10), high + max(0.5, abs(high) / 10)
    counts = torch.histc(values, BINS, low, high).tolist()

    def draw(axes: Any) -> None:
        width = (high - low) / BINS
        axes.bar([low + width * index for index in range(BINS)], counts, width=0.9 * width, align="edge", color=COLOURS[0])
        axes.set_xlim(low, high)

    return Chart(f"parameter-{path_part(name)}", name, f"Histogram of {name}", draw, "value", "how many")


def dots(
    file: str,
    what: str,
    rows: Sequence[tuple[str, Sequence[tuple[float, float | None] | None]]],
    legend: Sequence[str],
    ceilings: Mapping[str, float] = MappingProxyType({}),
) -> Chart:
    """Returns a chart of rows (name, (percent, half of its error bar or None) or None for each name of the legend).

    `ceilings` are percentages by name, each an upright line.
    """

    def draw(axes: Any) -> None:
        for index, name in enumerate(legend):
            found = [(*pair, ROW * row + 26 + 12 * index) for row, (_, pairs) in enumerate(rows) if (pair := pairs[index])]
            bars = [half or math.nan for _, half, _ in found]
            style = {"fmt": "o", "color": COLOURS[index], "markersize": 8, "label": name}
            axes.errorbar([value for value, _, _ in found], [y for _, _, y in found], xerr=bars, **style)
        for index, (name, percent) in enumerate(ceilings.items(), start=len(legend)):
            axes.axvline(percent, color=COLOURS[index % len(COLOURS)], linestyle="--", label=name)
        for row, (name, _) in enumerate(rows):
            told = name if len(name) <= LONGEST else f"{name[: LONGEST - 4]} ..."
            axes.text(0, ROW * row + 14, printable(told), transform=axes.get_yaxis_transform(), parse_math=False)
        axes.margins(x=0.12)
        axes.set_ylim(ROW * len(rows), 0)
        axes.set_yticks([])

    shown, height = [*legend, *ceilings], TOP + ROW * len(rows) + BOTTOM
    return Chart(file, "Accuracy", what, draw, "accuracy in %", legend=shown, height=height, left=RIGHT)


def accuracies(
    file: str,
    title: str,
    what: str,
    x: str,
    lines: Mapping[str, Mapping[float | str, tuple[float, float | None]]],
    published: Mapping[str, Mapping[float | str, tuple[float, float | None]]] = MappingProxyType({}),
) -> Chart:
    """Returns a chart of accuracies with error bars: by the name of a line and the value of `x`, (percent, half of its error bar or None).

    The values, numbers in their order and words behind them, are evenly spaced; those of several lines stand a little apart. `published`
    are dashed lines in the colours of those of the same names.
    """
    every = [*lines.values(), *published.values()]
    values = sorted({value for line in every for value in line}, key=lambda value: (isinstance(value, str), value))

    def draw(axes: Any) -> None:
        for index, (name, line) in enumerate(lines.items()):
            measured = "o-" if index < len(COLOURS) else "s-"
            for part, style, label in ((line, measured, name), (published.get(name, {}), "x--", None)):
                known = [value for value in values if value in part]
                places = [values.index(value) + 0.04 * (index - (len(lines) - 1) / 2) for value in known]
                bars = [part[value][1] or math.nan for value in known]
                colour = COLOURS[index % len(COLOURS)]
                axes.errorbar(places, [part[value][0] for value in known], yerr=bars, color=colour, fmt=style, label=label)
        axes.set_xlim(-0.3, len(values) - 0.7)

    ticks = [value if isinstance(value, str) else number(value) for value in values]
    return Chart(file, title, what, draw, x, "accuracy in %", list(lines), ticks=ticks)


def bars(file: str, title: str, what: str, rows: Sequence[tuple[str, float, float | None]], legend: Sequence[str]) -> Chart:
    """Returns a chart of rows (name, percent as a bar, percent as a dot or None), for the two names of the legend."""

    def draw(axes: Any) -> None:
        axes.barh(range(len(rows)), [percent for _, percent, _ in rows], color=COLOURS[0], height=0.7)
        beside = [(percent, row) for row, (_, _, percent) in enumerate(rows) if percent is not None]
        axes.plot([percent for percent, _ in beside], [row for _, row in beside], "o", color=COLOURS[1], markersize=8)
        for row, (name, _, _) in enumerate(rows):
            _name_line(axes, row, name)
        axes.set_xlim(0, 100)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks([])

    shown = legend if any(percent is not None for _, _, percent in rows) else ()
    return Chart(file, title, what, draw, "accuracy in %", legend=shown, height=TOP + LINE * len(rows) + BOTTOM, left=NAMES)


def _name_line(axes: Any, y: float, name: str) -> None:
    """Writes the name of a class, which is cut if it is long, left of its line at `y`."""
    axes.text(-0.02, y, _short(name), transform=axes.get_yaxis_transform(), ha="right", va="center", parse_math=False)


def _short(name: str) -> str:
    return printable(name if len(name) <= SHORT else f"{name[: SHORT - 2]} \N{HORIZONTAL ELLIPSIS}")


def confusion(file: str, of: str, what: str, counts: Sequence[Sequence[int]], names: Sequence[str]) -> Chart:
    """Returns a picture of `counts` (K, K) by class and found class: a darker field is a larger share of a row; `of` ends the title."""
    side = len(counts)

    def draw(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        for row, own in enumerate(counts):
            for column, count in enumerate(own):
                share = count / max(1, sum(own))
                axes.add_patch(Rectangle((column, row), 1, 1, facecolor=COLOURS[row != column], alpha=share, linewidth=0))
                if side <= 12 and share >= 0.005:
                    axes.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", ha="center", va="center")
            _name_line(axes, row + 0.5, names[row])
        axes.set_xlim(0, side)
        axes.set_ylim(side, 0)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])

    x, height = "predicted classes, in the order of the classes, in %", TOP + LINE * side + BOTTOM
    return Chart(file, f"Predicted classes for each class of the test images{of}", what, draw, x, height=height, left=NAMES)


def rows_of_images(file: str, what: str, rows: Sequence[tuple[str, Sequence[tuple[str, Tensor | None]]]]) -> Chart:
    """Returns a chart of rows of images, each (name or "", its images as (label, (C, H, W) uint8 or None)).

    A label stands above an image unless the image at its left, or the one above it, has the same.
    """
    across = max(len(row) for _, row in rows)
    side = (WIDTH - 2 * RIGHT) / across
    tall = 0.94 * side * next(image.shape[1] / image.shape[2] for _, row in rows for _, image in row if image is not None)
    above: list[list[str]] = [[label for label, _ in row] for _, row in rows]
    labelled = [not number or above[number] != above[number - 1] for number in range(len(rows))]
    heights = [(20 if name else 4) + (12 if labels else 0) + tall for (name, _), labels in zip(rows, labelled, strict=True)]

    def draw(axes: Any) -> None:
        bottom = 0.0
        for (name, row), labels, height in zip(rows, labelled, heights, strict=True):
            bottom += height
            top = bottom - tall
            told = name if len(name) <= LONGEST else f"... {name[4 - LONGEST :]}"
            axes.text(0, top - (18 if labels else 5), printable(told), fontsize=11, parse_math=False)
            for column, (label, image) in enumerate(row):
                left, right = column * side, (column + 0.94) * side
                if labels and (column == 0 or label != row[column - 1][0]):
                    axes.text(left, top - 4, _short(label), fontsize=6, parse_math=False)
                if image is not None:
                    pixels = colours(image[None])[0].permute(1, 2, 0).numpy()
                    axes.imshow(pixels, extent=(left, right, bottom, top), interpolation="nearest")
        axes.set_aspect("auto")
        axes.set_xlim(0, across * side)
        axes.set_ylim(sum(heights), 0)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])

    return Chart(file, what, what, draw, "", height=TOP + round(sum(heights)) + BOTTOM, left=RIGHT)


def svg(chart: Chart) -> str:
    """Returns a chart as an <svg> for the page, in the colours of the page around it and without words that were not escaped."""
    from markupsafe import Markup

    with _figure(chart) as figure:
        drawn = _saved(figure, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode()
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
            f"{chart.file}.pdf": _saved(figure, format="pdf", metadata={"CreationDate": None}, bbox_inches="tight"),
            f"{chart.file}.png": _saved(figure, format="png", bbox_inches="tight", facecolor="white"),
        }


def _saved(figure: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps back what matplotlib says of letters that its font has not, as the page has other fonts, and of a home that it cannot write."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _figure(chart: Chart) -> Iterator[Any]:
    """Yields a chart as matplotlib's figure, under settings that are neither the user's nor left behind."""
    with _MATPLOTLIB, _silence(), ExitStack() as after:
        import matplotlib
        from matplotlib.figure import Figure

        after.enter_context(matplotlib.rc_context())
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(STYLE | {"svg.hashsalt": chart.file})
        width, height = WIDTH, chart.height
        figure = Figure(figsize=(width / 72, height / 72))
        across, tall = (width - chart.left - RIGHT) / width, (height - TOP - BOTTOM) / height
        axes = figure.add_axes((chart.left / width, BOTTOM / height, across, tall))
        chart.draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: number(value))
        if chart.ticks:
            axes.set_xticks(range(len(chart.ticks)), chart.ticks)
        else:
            axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y, rotation_mode="anchor")
        axes.yaxis.set_label_coords(18 / width, 0.5 + (BOTTOM - TOP) / 2 / height, transform=figure.transFigure)
        yield figure
