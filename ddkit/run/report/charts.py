"""Charts as inline SVG: lines, bars and dots with error bars, drawn in the colours of the page around them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ddkit.errors import printable

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 14, 50  # margins of the plot
ROW = 52  # of a chart of dots
LONGEST = 48  # characters of a name in it
COLOURS = 6  # of the page, --c0 to --c5


class Line(NamedTuple):
    """A named line through (x, y) points."""

    name: str
    points: Sequence[tuple[float, float]]


class Dots(NamedTuple):
    """A row of dots: (value, half of its error bar or None) each, in the order of the colours."""

    name: str
    values: Sequence[tuple[float, float | None] | None]


class Axis(NamedTuple):
    """Maps values to places on the page, from `start` (the place of `low`) to `end` (that of `high`)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(each) for each in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


class Html(str):
    """What is HTML already, and is not escaped again."""


def text(value: object) -> str:
    """Returns `value` as text of an HTML page: escaped, control characters shown."""
    if isinstance(value, Html):
        return value
    return html.escape(printable(str(value)))


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


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns round values from low to high, about `most` of them at most."""
    raw = (high - low) / most
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= 0.75 * raw)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten from low to high, with 2 and 5 times them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 300 * low else (1,)
    skip = max(1, len(decades) // 6)
    return [factor * 10.0**power for power in decades[::skip] for factor in factors if low <= factor * 10.0**power <= high]


def line_chart(lines: Sequence[Line], *, x: str, y: str, log: bool = False, what: str) -> str:
    """Returns a chart of lines; `x` and `y` name the axes, `what` says what it shows.

    Values that cannot be drawn are left out: those that are not finite, or with `log` not positive.
    """
    kept = [Line(line.name, [point for point in line.points if can_be_drawn(point[1]) and (point[1] > 0 or not log)]) for line in lines]
    xs, ys = ([point[place] for line in kept for point in line.points] for place in (0, 1))
    if not xs:
        return '<p class="note">There is nothing to draw.</p>'
    across = Axis(*_widened(min(xs), max(xs), share=0.0), LEFT, WIDTH - RIGHT)
    up = Axis(*(_log_widened(min(ys), max(ys)) if log else _widened(min(ys), max(ys))), HEIGHT - BOTTOM, TOP, log)
    parts = [*_frame(across, up, x, y), *(_line(line, index, across, up) for index, line in enumerate(kept))]
    return _svg(parts, what)


def _line(line: Line, index: int, across: Axis, up: Axis) -> str:
    places = [(across.at(x), up.at(y)) for x, y in line.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    dash = f' stroke-dasharray="{2 + 2 * (index // COLOURS)} 3"' if index >= COLOURS else ""
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5" class="f{index % COLOURS}"/>' for x, y in places) if len(places) <= 12 else ""
    return f'<polyline points="{path}" class="l{index % COLOURS}"{dash}/>{dots}'


def bar_chart(edges: Sequence[float], counts: Sequence[int], *, x: str, y: str, what: str) -> str:
    """Returns a histogram: `counts[i]` values lie from edges[i] to edges[i + 1]."""
    across = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    up = Axis(0, max(*counts, 1) * 1.05, HEIGHT - BOTTOM, TOP)
    bars = [
        f'<rect x="{across.at(low) + 0.5:.1f}" y="{up.at(count)}" width="{max(1.0, across.at(high) - across.at(low) - 1):.1f}" '
        f'height="{HEIGHT - BOTTOM - up.at(count):.1f}" class="f0"/>'
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    return _svg([*_frame(across, up, x, y), *bars], what)


def dot_chart(rows: Sequence[Dots], *, x: str, what: str) -> str:
    """Returns a chart with a row of dots and error bars for each of `rows`, its name above it."""
    ends = [end for row in rows for pair in row.values if pair for end in (pair[0] - (pair[1] or 0), pair[0] + (pair[1] or 0))]
    if not ends:
        return '<p class="note">There is nothing to draw.</p>'
    height = TOP + ROW * len(rows) + BOTTOM
    across = Axis(*_widened(min(ends), max(ends), share=0.12), 14, WIDTH - 20)
    parts = _across(across, x, height, TOP)
    for number_, row in enumerate(rows):
        parts += _dots(row, TOP + ROW * number_, across)
    return _svg(parts, what, height)


def _dots(row: Dots, top: int, across: Axis) -> list[str]:
    name = row.name if len(row.name) <= LONGEST else f"{row.name[: LONGEST - 4]} ..."
    parts = [f'<text x="12" y="{top + 14}">{text(name)}</text>']
    for index, pair in enumerate(row.values):
        if pair is None:
            continue
        y, (mean, half) = top + 26 + 12 * index, pair
        if half:
            low, high = across.at(mean - half), across.at(mean + half)
            parts.append(f'<path d="M{low} {y - 3}v6m0-3H{high}m0-3v6" class="l{index}"/>')
        parts.append(f'<circle cx="{across.at(mean)}" cy="{y}" r="4" class="f{index}"/>')
    return parts


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    """Returns grid, ticks and names of both axes."""
    parts = _across(across, x, HEIGHT, TOP)
    for value in log_ticks(up.low, up.high) if up.log else ticks(up.low, up.high):
        place = up.at(value)
        parts.append(f'<path d="M{LEFT} {place}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 5}" text-anchor="end">{number(value)}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return [*parts, f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{text(y)}</text>']


def _across(across: Axis, name: str, height: float, top: float) -> list[str]:
    bottom, parts = height - BOTTOM, []
    for value in ticks(across.low, across.high):
        place = across.at(value)
        anchor = "end" if place > WIDTH - 20 else "middle"
        parts.append(f'<path d="M{place} {top}V{bottom}" class="grid"/>')
        parts.append(f'<text x="{place}" y="{bottom + 19}" text-anchor="{anchor}">{number(value)}</text>')
    return [*parts, f'<text x="{(across.start + across.end) / 2}" y="{bottom + 41}" text-anchor="middle">{text(name)}</text>']


def _widened(low: float, high: float, share: float = 0.05) -> tuple[float, float]:
    if high == low:
        return low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    return low - share * (high - low), high + share * (high - low)


def _log_widened(low: float, high: float) -> tuple[float, float]:
    return low / 1.2, high * 1.2


def _svg(parts: Sequence[str], what: str, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(what)}">{"".join(parts)}</svg>'


def legend(names: Sequence[str], shape: Callable[[int], str] = lambda index: f"s{index % COLOURS}") -> str:
    """Returns the names of what a chart shows, each beside its colour."""
    items = [f'<li><span class="swatch {shape(index)}"></span>{text(name)}</li>' for index, name in enumerate(names)]
    return f'<ul class="legend">{"".join(items)}</ul>'
