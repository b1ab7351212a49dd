"""The charts and heat maps of report.html, from spectra and the training log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from markupsafe import Markup

from soka_serve.compiler.report.charts import Mark, Series, chart, linear_axis, log_axis, term_axis, thin
from soka_serve.compiler.report.data import HistoryPoint
from soka_serve.io.text import count, percent, plain, span

if TYPE_CHECKING:
    from soka_serve.compiler.init.result import ModuleInit

_SHADES = 7  # steps of the colour ramps in the stylesheet: .c0 to .c6, .h0 to .h6
_LAYERS_PER_TABLE = 32
_MOST_DOTS = 60
_SPECTRUM_DEPTH = 1e-6  # what lies under a millionth of the strongest term is rounding, not spectrum


@dataclass(frozen=True)
class Panel:
    """A chart with a heading and a line of text."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map; `shade` counts from 0 (least) to 6."""

    text: str
    tooltip: str
    shade: int


HeatRow = tuple[str, list[HeatCell | None]]


@dataclass(frozen=True)
class HeatMap:
    """Projections down, layers across, cut into even tables of at most 32 layers."""

    title: str
    layers: list[str]
    rows: list[HeatRow]

    def tables(self) -> Iterator[tuple[list[str], list[HeatRow]]]:
        """(layers, rows) per table."""
        width = math.ceil(len(self.layers) / math.ceil(len(self.layers) / _LAYERS_PER_TABLE))
        for start in range(0, len(self.layers), width):
            part = slice(start, start + width)
            yield self.layers[part], [(name, cells[part]) for name, cells in self.rows]


class Placed(Protocol):
    """What has a place in a heat map."""

    @property
    def projection(self) -> str:
        """The row."""

    @property
    def layer(self) -> int | None:
        """The column; None: outside the layers."""


_P = TypeVar("_P", bound=Placed)


def _by_projection(modules: Sequence[_P]) -> dict[str, list[_P]]:
    groups: dict[str, list[_P]] = {}
    for module in modules:
        groups.setdefault(module.projection, []).append(module)
    return groups


def layer_span(modules: Sequence[ModuleInit]) -> tuple[int, int] | None:
    """First and last layer, or None when there is at most one."""
    layers = [m.layer for m in modules if m.layer is not None]
    return (min(layers), max(layers)) if layers and min(layers) < max(layers) else None


def _where(module: ModuleInit) -> str:
    return module.module if module.layer is None else f"layer {module.layer}"


def _shade(value: float, low: float, high: float) -> int:
    """The colour step of a value within low to high; the middle one when they are equal."""
    if not (math.isfinite(value) and high > low):
        return _SHADES // 2
    return round((_SHADES - 1) * min(1.0, max(0.0, (value - low) / (high - low))))


def spectra(modules: Sequence[ModuleInit]) -> list[Panel]:
    """One panel per projection, all on the same axes: energy share against term, a line per layer."""
    shares = {m.module: m.shares() for m in modules}
    drawable = [s for each in shares.values() for s in each if 0 < s < math.inf]
    if not drawable:
        return []
    top = max(drawable)
    y = log_axis((s for s in drawable if s >= _SPECTRUM_DEPTH * top), "share of energy", text=percent)
    x = term_axis(max(len(each) for each in shares.values()), "term")
    first, last = layer_span(modules) or (0, 0)
    panels = []
    for projection, group in _by_projection(modules).items():
        lines = []
        for m in group:
            own = shares[m.module]
            captured = m.captured_frac()
            text = f"{_where(m)}: rank {m.rank}" + ("" if captured is None else f", {percent(captured)} of the energy")
            marks = [Mark(m.rank, own[m.rank - 1], text)] if 1 <= m.rank <= len(own) else []
            points = [(float(k), share) for k, share in enumerate(own, start=1)]
            lines.append(Series(points, f"c{_shade(m.layer or 0, first, last)}", tooltip=text, marks=marks))
        ranks = [m.rank for m in group]
        captured_all = [c for m in group if (c := m.captured_frac()) is not None]
        note = f"rank {span(ranks)}" + (f", {span(captured_all, percent)} of the energy" if captured_all else "")
        kept = ranks[0] * math.sqrt(1 + 1 / ranks[0]) if len(set(ranks)) == 1 and ranks[0] > 0 else None
        summary = f"{projection}, {len(group)} weights: share of the energy per candidate term, falling. {note}"
        panels.append(Panel(projection, note, chart(lines, x, y, summary=summary, size=(260, 200), kept=kept)))
    return panels


def heat_maps(modules: Sequence[ModuleInit]) -> list[HeatMap]:
    if not modules:
        return []
    maps = [heat_map("Rank: terms per weight", modules, lambda m: float(m.rank), plain, log=True)]
    if any(m.captured_frac() is not None for m in modules):
        title = "Energy in the chosen terms, percent"
        maps.append(heat_map(title, modules, _captured_percent, lambda v: f"{v:.0f}" if v >= 10 else f"{v:.2g}"))
    return maps


def _captured_percent(module: ModuleInit) -> float | None:
    captured = module.captured_frac()
    return None if captured is None else 100 * captured


def heat_map(
    title: str,
    modules: Sequence[_P],
    value_of: Callable[[_P], float | None],
    text: Callable[[float], str],
    *,
    log: bool = False,
) -> HeatMap:
    """Modules that share a place (a mixture's experts) are averaged; their tooltip says how many they are."""

    def scale(value: float) -> float:
        return math.log1p(value) if log else value

    layers = sorted({m.layer for m in modules}, key=lambda layer: math.inf if layer is None else layer)
    places: dict[tuple[str, int | None], list[float]] = {}
    for m in modules:
        value = value_of(m)
        if value is not None and math.isfinite(value):
            places.setdefault((m.projection, m.layer), []).append(value)
    means = {place: sum(values) / len(values) for place, values in places.items()}
    low, high = min(map(scale, means.values()), default=0.0), max(map(scale, means.values()), default=0.0)
    rows: list[HeatRow] = []
    for projection in _by_projection(modules):
        cells: list[HeatCell | None] = []
        for layer in layers:
            mean = means.get((projection, layer))
            if mean is None:
                cells.append(None)
                continue
            values = places[projection, layer]
            where = "outside the layers" if layer is None else f"layer {layer}"
            several = f" (mean of {len(values)}, {span(values, text)})" if len(values) > 1 else ""
            tooltip = f"{projection}, {where}: {text(mean)}{several}"
            cells.append(HeatCell(text(mean), tooltip, _shade(scale(mean), low, high)))
        rows.append((projection, cells))
    return HeatMap(title, ["–" if layer is None else str(layer) for layer in layers], rows)


def curves(history: Sequence[HistoryPoint]) -> list[Panel]:
    """Loss, gradient norm, learning rate, regularisers and others over steps; what was never logged has no panel."""
    panels = []
    train, held_out = logged(history, "loss"), logged(history, "eval_loss")
    if train or held_out:
        series = [
            Series(train, "main", marks=_dots(train, "loss")),
            Series(held_out, "second", marks=_dots(held_out, "held-out loss", most=20)),
        ]
        note = "training data" + (" (line) and held-out data (orange)" if held_out else "")
        panels.append(_curve("Loss", note, series, "loss"))
    for field, title, note in (
        ("grad_norm", "Gradient norm", "before clipping"),
        ("learning_rate", "Learning rate", "set by the schedule"),
        ("eval_accuracy", "Accuracy", "of answers to held-out problems"),
    ):
        if points := logged(history, field):
            line = Series(points, "main", marks=_dots(points, title.lower()))
            panels.append(_curve(title, note, [line], title.lower()))
    for name in dict.fromkeys(name for point in history for name in point.regularisers):
        points = [(float(p.step), p.regularisers[name]) for p in history if name in p.regularisers]
        line = Series(points, "main", marks=_dots(points, name))
        panels.append(_curve(name, "of [train.regularise], before its number", [line], name))
    return panels


def logged(history: Sequence[HistoryPoint], field: str) -> list[tuple[float, float]]:
    return [(float(p.step), value) for p in history if (value := getattr(p, field)) is not None]


def _dots(points: Sequence[tuple[float, float]], name: str, *, most: int = _MOST_DOTS) -> list[Mark]:
    return [Mark(step, value, f"step {count(step)}: {name} {value:.4g}") for step, value in thin(points, most)]


def _curve(title: str, note: str, series: Sequence[Series], y_label: str, *, log: bool | None = None) -> Panel:
    """A chart over steps, on a log scale where the values span more than a factor of thirty."""
    values = [value for line in series for _, value in line.points if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    if log is None:
        log = title != "Learning rate" and len(positive) == len(values) > 0 and max(positive) > 30 * min(positive)
    y = log_axis(values, f"{y_label} (log scale)") if log else linear_axis(values, y_label, zero=True)
    x = linear_axis([step for line in series for step, _ in line.points], "optimiser step", zero=True)
    ends = ", ".join(
        f"from {plain(line.points[0][1])} at step {count(line.points[0][0])} to {plain(line.points[-1][1])} "
        f"at step {count(line.points[-1][0])}"
        for line in series
        if line.points
    )
    return Panel(title, note, chart(series, x, y, summary=f"{title} over optimiser steps, {ends}"))


def pruning(rank_over_time: Mapping[str, Sequence[tuple[int, int]]]) -> Panel | None:
    """Terms over steps, all modules together; None when no module's rank ever changed."""
    tracks = {module: sorted(track) for module, track in rank_over_time.items() if track}
    if not any(len({rank for _, rank in track}) > 1 for track in tracks.values()):
        return None
    changes: dict[int, int] = {}
    for track in tracks.values():
        previous = 0
        for step, rank in track:
            changes[step] = changes.get(step, 0) + rank - previous
            previous = rank
    total, points = 0, []
    for step in sorted(changes):
        total += changes[step]
        points.append((float(step), float(total)))
    note = f"all weights together, {count(points[0][1])} at first, {count(points[-1][1])} at the end"
    line = Series(points, "main", step=True, marks=_dots(points, "terms"))
    return _curve("Terms kept", note, [line], "terms", log=False)
