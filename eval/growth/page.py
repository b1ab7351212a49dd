"""The page of what `eval/growth/bench.py` has found: a chart with the fitted exponents for every series."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from soka_serve.comparison.page import FOLDER
from soka_serve.compiler.report.charts import Axis, Mark, Series, chart, log_axis
from soka_serve.compiler.report.page import environment
from soka_serve.io.text import count

Point = dict[str, Any]

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>How cost grows · soka-serve</title>
<style>
:root {
  --page: #f6f7f8; --card: #ffffff; --ink: #1b2430; --muted: #5b6673; --line: #dde2e7; --grid: #e9edf0;
  --k0: #1f6fb2; --k1: #c4570c; --k2: #0b8f8a;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #12161b; --card: #1b2128; --ink: #e6eaee; --muted: #9aa6b2; --line: #313a44; --grid: #28303a;
    --k0: #6bb5f0; --k1: #f2a25c; --k2: #5fd0c8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; }
h2 { font-size: 18px; line-height: 1.3; margin: 0; }
p { margin: 0 0 10px; max-width: 90ch; }
code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
.quiet { color: var(--muted); font-size: 14px; }
.studies { display: grid; gap: 18px; margin: 18px 0; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px;
  min-width: 0; }
section.wide { grid-column: 1 / -1; }
.panels { display: grid; gap: 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 14px; }
.chart { display: block; width: 100%; max-width: 520px; height: auto; overflow: visible; margin: 6px 0; }
.chart text { font-size: 11px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--grid); }
.chart .axis { stroke: var(--muted); stroke-opacity: .6; }
.chart .line { fill: none; stroke: currentColor; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.chart .arithmetic .line { stroke-dasharray: 2 5; stroke-width: 1.4; }
.chart circle { fill: currentColor; stroke: var(--card); stroke-width: 1.2; }
{% for k in range(3) %}
.k{{ k }} { color: var(--k{{ k }}); }
{% endfor %}
.legend { padding: 0; margin: 4px 0 6px; list-style: none; }
.legend i { display: inline-block; width: 14px; height: 4px; margin-right: 6px; background: currentColor;
  vertical-align: middle; }
.legend span { color: var(--ink); }
footer { color: var(--muted); font-size: 13px; padding-bottom: 40px; }
</style>
</head>
<body>
<header>
<h1>How cost grows</h1>
<p>Each chart shows a cost against one size, both on logarithmic axes, and the exponent b of cost = a · x<sup>b</sup>,
fitted by least squares, ± its standard error. Dotted: what arithmetic says, through the last point. It counts
multiply-adds, or layers; where it and the line part, something else costs time.</p>
<p class="quiet">Times are processor time of one call on {{ record.hardware.cpu }}, {{ record.threads }} thread(s), the
best of at least {{ least }} calls.{% if record.small %} Tiny sizes (--small): these figures mean nothing.{% endif %}
</p>
</header>
<main class="studies">
{% for name, study, panels in studies %}
<section id="{{ name }}"{% if panels | length > 1 %} class="wide"{% endif %}>
<h2>{{ study.title }}</h2>
<p class="quiet">{{ study.fixed | pairs }}</p>
<div class="panels">
{% for panel in panels %}
<figure>
<figcaption>
<ul class="legend">
{% for css, title, fit in panel.legend %}
<li class="{{ css }}"><i></i><span>{{ title }}: {{ fit }}</span></li>
{% endfor %}
</ul>
</figcaption>
{{ panel.svg }}
<p class="quiet">Expected: {{ panel.theory }}</p>
</figure>
{% endfor %}
</div>
</section>
{% endfor %}
</main>
<footer>
<p><code>{{ record.command }}</code></p>
<p>{{ record.versions | pairs }}</p>
</footer>
</body>
</html>
"""


class Line(NamedTuple):
    """One curve: the key of its values in the points, its name, and what arithmetic says, up to a factor."""

    key: str
    name: str
    work: Callable[..., float] | None = None


class Panel(NamedTuple):
    """One chart: what it shows, how its values are written, what to expect and why, and its curves."""

    quantity: str
    text: Callable[[float], str]
    theory: str
    lines: tuple[Line, ...]

    def told(self, point: Point) -> str:
        """The values of one point in words."""
        return ", ".join(f"{line.name} {self.text(point[line.key])}" for line in self.lines)


def render(record: dict[str, Any], panels_of: Mapping[str, Sequence[Panel]], least_calls: int) -> str:
    """The whole page; `panels_of` has the charts of every series."""
    studies = []
    for name, found in record["series"].items():
        panels = zip(panels_of[name], found["charts"], strict=True)
        drawn = [
            {"svg": draw(panel, found, fits["fits"]), "legend": legend(panel, fits["fits"]), "theory": panel.theory}
            for panel, fits in panels
        ]
        studies.append((name, found, drawn))
    jinja = environment(FOLDER, autoescape=True)
    jinja.filters["pairs"] = lambda mapping: ", ".join(f"{key} {value}" for key, value in mapping.items())
    return jinja.from_string(PAGE).render(record=record, studies=studies, least=least_calls)


def legend(panel: Panel, fits: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Colour, name and fit of every curve."""
    rows = []
    for number, line in enumerate(panel.lines):
        fit = fits[line.key]
        if "no_fit" in fit:
            text = f"no fit, {fit['no_fit']}"
        else:
            text = f"b = {fit['exponent']:.2f} ± {fit['standard_error']:.2f}"
        if line.work is not None:
            text += f" (arithmetic {fit['arithmetic_exponent']:.2f})"
        rows.append((f"k{number}", line.name, text))
    return rows


def draw(panel: Panel, found: dict[str, Any], fits: dict[str, dict[str, Any]]) -> Markup:
    """One chart."""
    varies, points = found["varies"], found["points"]
    xs = [float(point[varies]) for point in points]
    curves = []
    for number, line in enumerate(panel.lines):
        ys = [point[line.key] for point in points]
        if line.work is not None:
            work = fits[line.key]["arithmetic"]
            dotted = [(x, ys[-1] * w / work[-1]) for x, w in zip(xs, work, strict=True)]
            curves.append(Series(dotted, f"arithmetic k{number}", tooltip=f"{line.name}: arithmetic"))
        pairs = list(zip(xs, ys, strict=True))
        marks = [Mark(x, y, f"{line.name}, {varies} {x:g}: {panel.text(y)}") for x, y in pairs]
        curves.append(Series(pairs, f"k{number}", tooltip=line.name, marks=marks))
    x_axis = Axis(min(xs) / 1.15, max(xs) * 1.15, tuple((x, count(x)) for x in xs), varies, log=True)
    text = f"{panel.quantity} against {varies}, {len(panel.lines)} curves"
    return chart(curves, x_axis, y_axis(curves, panel), summary=text, size=(440, 270))


def y_axis(curves: Sequence[Series], panel: Panel) -> Axis:
    """A log axis at least a decade deep, so that noise on a flat curve does not look like growth."""
    values = [y for curve in curves for _, y in curve.points if y > 0]
    middle = math.sqrt(min(values) * max(values))
    return log_axis([*values, middle / math.sqrt(10), middle * math.sqrt(10)], panel.quantity, text=panel.text)
