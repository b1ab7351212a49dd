"""The page of what `eval/growth/bench.py` has found: a chart with the fitted exponents for every series."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from eval.page import render_page
from soka_serve.compiler.report.charts import Axis, Mark, Series, chart, log_axis
from soka_serve.io.text import count

Point = dict[str, Any]

BODY = """
.studies { display: grid; gap: 18px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.studies section { margin: 0; min-width: 0; } section.wide { grid-column: 1 / -1; }
.chart { max-width: 520px; }
.chart .arithmetic .line { stroke-dasharray: 2 5; stroke-width: 1.4; }
</style></head>
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


class Curve(NamedTuple):
    """One curve: the key of its values in the points, its name, and what arithmetic says, up to a factor."""

    key: str
    name: str
    work: Callable[..., float] | None = None


class Panel(NamedTuple):
    """One chart: what it shows, how its values are written, what to expect and why, and its curves."""

    quantity: str
    text: Callable[[float], str]
    theory: str
    lines: tuple[Curve, ...]

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
    filters = {"pairs": lambda mapping: ", ".join(f"{key} {value}" for key, value in mapping.items())}
    return render_page("How cost grows · soka-serve", BODY, filters, record=record, studies=studies, least=least_calls)


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
