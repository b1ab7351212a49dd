"""Line charts as inline SVG: colours come from the page's CSS, for light, dark and paper alike.

Drawn by hand and not by matplotlib, for three reasons: the page's stylesheet can recolour it, points carry tooltips
without a script, and 224 spectra of 64 points take 0.2 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from soka_serve.io.text import plain

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 16.0, 24.0, 36.0
_MOST_POINTS = 600  # more than a chart has pixels; longer series are thinned


@dataclass(frozen=True)
class Mark:
    """A dot with a tooltip and, where there is one, a label beside it, in data coordinates."""

    x: float
    y: float
    tooltip: str
    label: str = ""


@dataclass(frozen=True)
class Series:
    """One line. `css` names its classes in the page's stylesheet; `step` holds each value until the next one."""

    points: Sequence[Point]
    css: str
    tooltip: str = ""
    marks: Sequence[Mark] = ()
    step: bool = False


@dataclass(frozen=True)
class Axis:
    """Data range, scale and ticks of one axis. `low` < `high`; both are positive on a log scale."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Whether `value` can be drawn: finite and, but for rounding, within the range."""
        return math.isfinite(value) and (not self.log or value > 0) and -1e-9 <= self.place(value) <= 1 + 1e-9


def linear_axis(
    values: Iterable[float], label: str, *, zero: bool = False, text: Callable[[float], str] = plain
) -> Axis:
    """A linear axis over the finite values, from 0 when `zero`; three to six round ticks."""
    low, high = _bounds(values)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # ticks between would be one and the same number
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple((k * step, text(k * step)) for k in range(first, last + 1)), label)


def log_axis(values: Iterable[float], label: str, *, text: Callable[[float], str] = plain) -> Axis:
    """A log axis over the positive finite values, at most nine decades deep; ticks at decades, or at 1, 2, 5."""
    low, high = _bounds(v for v in values if v > 0)
    if low <= 0:
        low, high = 0.1, 1.0
    low = max(low, high * 1e-9)
    low, high = (low / 1.15, high * 1.15) if high / low < 1e8 else (low, high)
    decades = math.log10(high / low)
    digits = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    every = 1 if decades <= 5 else 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [d * 10.0**k for k in powers if k % every == 0 for d in digits]
    ticks = [t for t in ticks if low <= t <= high] or [low, high]
    return Axis(low, high, tuple((t, text(t)) for t in ticks), label, log=True)


def term_axis(terms: int, label: str) -> Axis:
    """A log axis for the term index, 1 to `terms`, with ticks at powers of two."""
    ticks = [1 << k for k in range(max(terms, 1).bit_length())]
    ticks = ticks[:: 1 + len(ticks) // 9]
    return Axis(0.88, max(terms, 2) * 1.06, tuple((float(t), str(t)) for t in ticks), label, log=True)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` of the points, evenly spaced, both ends kept."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(k * step)] for k in range(most)]


@dataclass(frozen=True)
class _Plot:
    """The picture of a chart: its axes, and its size in CSS pixels."""

    x: Axis
    y: Axis
    width: int
    height: int

    @property
    def right(self) -> float:
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM

    def across(self, value: float) -> float:
        return _LEFT + self.x.place(value) * (self.right - _LEFT)

    def down(self, value: float) -> float:
        return self.bottom - self.y.place(value) * (self.bottom - _TOP)

    def holds(self, x: float, y: float) -> bool:
        return self.x.holds(x) and self.y.holds(y)


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    summary: str,
    size: tuple[int, int] = (340, 220),
    kept: float | None = None,
) -> Markup:
    """An `<svg>` line chart. Points outside the axes or not finite are left out, and break their line.

    Args:
        series: lines, drawn in this order.
        x, y: the axes.
        summary: what the chart shows, for readers who do not see it (aria-label).
        size: width and height in CSS pixels; the picture scales with its container.
        kept: shade the plot up to this x.
    """
    plot = _Plot(x, y, *size)
    parts = [f'<svg class="chart" viewBox="0 0 {plot.width} {plot.height}" role="img" aria-label="{escape(summary)}">']
    if kept is not None:
        right = min(plot.across(kept), plot.right)
        parts.append(
            f'<rect class="kept" x="{_LEFT:.1f}" y="{_TOP:.1f}" width="{right - _LEFT:.1f}" '
            f'height="{plot.bottom - _TOP:.1f}"/>'
        )
    parts += _axes(plot)
    for line in series:
        parts += _line(line, plot)
    parts.append("</svg>")
    return Markup("".join(parts))


def _axes(plot: _Plot) -> Iterator[str]:
    """Grid lines, ticks, and the names of the axes."""
    for value, label in plot.y.ticks:
        if plot.y.holds(value):
            at = plot.down(value)
            yield f'<path class="grid" d="M{_LEFT:.1f} {at:.1f}H{plot.right:.1f}"/>'
            yield f'<text class="tick" x="{_LEFT - 6:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{label}</text>'
    for value, label in plot.x.ticks:
        if plot.x.holds(value):
            at = plot.across(value)
            yield f'<path class="axis" d="M{at:.1f} {plot.bottom:.1f}v4"/>'
            yield f'<text class="tick" x="{at:.1f}" y="{plot.bottom + 15:.1f}" text-anchor="middle">{label}</text>'
    yield f'<path class="axis" d="M{_LEFT:.1f} {plot.bottom:.1f}H{plot.right:.1f}"/>'
    yield f'<text class="name" x="4" y="12">{escape(plot.y.label)}</text>'
    yield (
        f'<text class="name" x="{plot.right:.1f}" y="{plot.height - 5:.1f}" text-anchor="end">'
        f"{escape(plot.x.label)}</text>"
    )


def _line(line: Series, plot: _Plot) -> Iterator[str]:
    """One series: its stroke, then its marks, then their labels; nothing where no point can be drawn."""
    path = _path(line, plot)
    marks = [(m, plot.across(m.x), plot.down(m.y)) for m in line.marks if plot.holds(m.x, m.y)]
    if not path and not marks:
        return
    yield f'<g class="{escape(line.css)}">'
    if line.tooltip:
        yield f"<title>{escape(line.tooltip)}</title>"
    if path:
        yield f'<path class="line" d="{path}"/>'
    for mark, x, y in marks:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(mark.tooltip)}</title></circle>'
    for mark, x, y in marks:
        if mark.label:
            yield f'<text class="label" x="{x + 6:.1f}" y="{y + 3.5:.1f}">{escape(mark.label)}</text>'
    yield "</g>"


def _path(line: Series, plot: _Plot) -> str:
    """The `d` of a line; a point that cannot be drawn ends one stroke, and the next one begins another."""
    runs: list[list[Point]] = [[]]
    for x, y in thin(line.points, _MOST_POINTS):
        if plot.holds(x, y):
            runs[-1].append((plot.across(x), plot.down(y)))
        elif runs[-1]:
            runs.append([])
    strokes = []
    for run in runs:
        if len(run) == 1:  # a lone point: a stroke of no length shows as a dot, thanks to its round caps
            strokes.append(f"M{run[0][0]:.1f} {run[0][1]:.1f}h0")
        elif run and line.step:
            corners = "".join(f"H{x:.1f}V{y:.1f}" for x, y in run[1:])
            strokes.append(f"M{run[0][0]:.1f} {run[0][1]:.1f}{corners}")
        elif run:
            strokes.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run))
    return "".join(strokes)


def _bounds(values: Iterable[float]) -> Point:
    """The smallest and largest finite value; (0, 0) when there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)
