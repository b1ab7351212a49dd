"""What a build measured besides, as the report shows it: charts of spectra over layers, counts of intruders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from soka_serve.compiler.report.charts import Mark, Series, chart, linear_axis
from soka_serve.compiler.report.panels import HeatMap, Panel, heat_map
from soka_serve.io.text import count, plain

_TITLES = {"effective_rank": "effective rank", "nuclear_norm": "nuclear norm"}
_WHO = {"base": "main", "adapted": "second"}  # classes of the page's colours


@dataclass(frozen=True)
class Counted:
    """A module and its number of intruder dimensions."""

    module: str
    layer: int | None
    count: int

    @property
    def projection(self) -> str:
        """The last part of the name."""
        return self.module.rpartition(".")[2]


def intruder_map(measured: Mapping[str, Any]) -> tuple[str, HeatMap | None] | None:
    """A sentence on intruder dimensions, and where they are, if there are any; None where none were counted."""
    rows = [Counted(**row) for row in measured.get("intruders", ())]
    if not rows:
        return None
    some = sum(row.count > 0 for row in rows)
    text = f"{count(sum(row.count for row in rows))} in {count(some)} of {count(len(rows))} modules"
    return text, heat_map("Intruder dimensions", rows, lambda row: float(row.count), plain) if some else None


def spectrum_panels(measured: Mapping[str, Any]) -> list[Panel]:
    """Effective rank and nuclear norm over layers: of hidden states, and of gradients; or none."""
    spectra = measured.get("spectra")
    if spectra is None:
        return []
    panels = []
    for key, title in _TITLES.items():
        hidden = {who: [(float(at), layer[key]) for at, layer in enumerate(spectra["hidden"][who])] for who in _WHO}
        note = "base (line) and adapted (orange), 0 is the embedding"
        panels.append(_panel(f"Hidden states: {title}", note, hidden, title))
    for key, title in _TITLES.items():
        means = _layer_means(spectra["gradients"], key)
        panels.append(
            _panel(f"First gradients: {title}", "mean over the layer's adapted weights", {"base": means}, title)
        )
    return panels


def _panel(title: str, note: str, lines: Mapping[str, Sequence[tuple[float, float]]], label: str) -> Panel:
    series = [
        Series(points, _WHO[who], marks=[Mark(x, y, f"layer {x:.0f}: {label} {y:.4g}, {who}") for x, y in points])
        for who, points in lines.items()
    ]
    values = [value for points in lines.values() for _, value in points]
    y = linear_axis(values, label, zero=True)
    x = linear_axis([at for points in lines.values() for at, _ in points], "layer")
    x = replace(x, ticks=tuple(tick for tick in x.ticks if tick[0].is_integer()))
    ends = "; ".join(
        f"{who} from {plain(p[0][1])} at layer {p[0][0]:.0f} to {plain(p[-1][1])} at layer {p[-1][0]:.0f}"
        for who, p in lines.items()
        if p
    )
    return Panel(title, note, chart(series, x, y, summary=f"{title} over layers: {ends}"))


def _layer_means(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(layer, mean of a key over the layer's modules); modules outside the layers are left out."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["layer"] is not None:
            found.setdefault(row["layer"], []).append(row[key])
    return [(float(layer), sum(values) / len(values)) for layer, values in sorted(found.items())]
