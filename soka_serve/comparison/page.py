"""A comparison's results as one self-contained HTML page, in the style of report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from soka_serve.comparison.tables import METRIC_NAMES, claim_text, remarks, spread, tables
from soka_serve.compiler.report.charts import Axis, Mark, Series, chart, linear_axis, log_axis
from soka_serve.compiler.report.page import environment
from soka_serve.compiler.report.panels import Panel
from soka_serve.io.text import count

_COLOURS = 8  # .k0 to .k7 in the template

FOLDER = Path(__file__).parent  # of the template


def render_html(results: Mapping[str, Any]) -> str:
    """The whole page; error texts in it are escaped."""
    drawn = drawn_methods(results)
    context = {
        "results": results,
        "remarks": [text.replace("`", "").replace("**", "") for text in remarks(results)],
        "front": loss_chart(results, drawn),
        "primary": next((claim_text(claim) for claim in results["claims"] if claim["primary"]), None),
        "strips": strips(results, drawn),
        "legend": [(name, f"k{i}") for i, name in enumerate(drawn)],
        "losses": _curves(results, drawn, "loss_curve", "training loss"),
        "norms": _curves(results, drawn, "grad_norm_curve", "gradient norm"),
        "tables": tables(results),
        "errors": [(c["method"], c["dataset"], error) for c in results["cells"] for error in c["errors"]],
    }
    page = environment(FOLDER, autoescape=True).get_template("compare.html.jinja").render(context)
    return page.encode("utf-8", "replace").decode("utf-8")


def drawn_methods(results: Mapping[str, Any]) -> list[str]:
    """Methods whose curves are drawn, at most eight: those of the claims, else the first ones that have results."""
    there = [row["name"] for row in results["table"] if row["answer_loss"] is not None]
    claimed = {name for claim in results["claims"] for name in (claim["candidate"], claim["reference"])}
    return ([name for name in there if name in claimed] or there)[:_COLOURS]


def loss_chart(results: Mapping[str, Any], drawn: Sequence[str]) -> Markup | None:
    """Held-out loss against trained parameters, with the Pareto front; None without results."""
    rows = [row for row in results["table"] if row["answer_loss"] is not None]
    if not rows:
        return None
    points = {row["name"]: (row["trainable_parameters"], row["answer_loss"]["mean"]) for row in rows}
    x = log_axis([parameters for parameters, _ in points.values()], "trained parameters", text=count)
    y = linear_axis([loss for _, loss in points.values()], "held-out loss")
    front = sorted(points[row["name"]] for row in rows if row["pareto"])
    series = [Series(front, "front", tooltip="Pareto front", step=True)]
    for row in rows:
        name, (parameters, loss) = row["name"], points[row["name"]]
        text = f"{name}: {parameters:,.0f} parameters, held-out loss {spread(row['answer_loss'], '{:.4f}')}"
        series.append(Series((), _dot(name, drawn), marks=(Mark(parameters, loss, text, label=name),)))
    summary = f"Held-out loss against trained parameters of {len(rows)} methods, with the Pareto front"
    return chart(series, x, y, summary=summary, size=(900, 420))


def _dot(name: str, drawn: Sequence[str]) -> str:
    return f"dot k{drawn.index(name)}" if name in drawn else "dot other"


def strips(results: Mapping[str, Any], drawn: Sequence[str]) -> list[Panel]:
    """One panel per dataset: a row per method, a dot per seed, a bar at the median, in the primary claim's metric."""
    metric = next((claim["metric"] for claim in results["claims"] if claim["primary"]), "answer_loss")
    panels = []
    for dataset in dict.fromkeys(cell["dataset"] for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if cell["dataset"] == dataset and cell[metric] is not None]
        if not cells:
            continue
        values = [value for cell in cells for value in cell[metric]["values"].values()]
        room = 0.4 * ((max(values) - min(values)) or 1.0)  # for the names behind the dots
        x = linear_axis([min(values), max(values) + room], METRIC_NAMES[metric])
        y = Axis(0.0, len(cells) + 1.0, (), "")
        series = []
        for row, cell in enumerate(reversed(cells), start=1):
            name, found = cell["method"], cell[metric]
            last = max(found["values"], key=lambda seed: found["values"][seed])  # at whose dot the name stands
            marks = [
                Mark(value, row, f"{name}, seed {seed}: {value:g}", label=name if seed == last else "")
                for seed, value in found["values"].items()
            ]
            bar = [(found["median"], row - 0.35), (found["median"], row + 0.35)]
            series.append(Series(bar, _dot(name, drawn), tooltip=f"{name}: median {found['median']:g}", marks=marks))
        summary = f"{METRIC_NAMES[metric]} of every seed on {dataset}, {len(cells)} methods"
        panels.append(Panel(dataset, "", chart(series, x, y, summary=summary, size=(560, 60 + 24 * len(cells)))))
    return panels


def _curves(results: Mapping[str, Any], drawn: Sequence[str], key: str, label: str) -> list[Panel]:
    """One panel per dataset, a line per method."""
    panels = []
    for dataset in dict.fromkeys(cell["dataset"] for cell in results["cells"]):
        cells = {c["method"]: c for c in results["cells"] if c["dataset"] == dataset and c[key]}
        lines = [
            Series([(step, value) for step, value in cells[name][key]], f"k{drawn.index(name)}", tooltip=name)
            for name in drawn
            if name in cells
        ]
        if not lines:
            continue
        values = [value for line in lines for _, value in line.points]
        steps = [step for line in lines for step, _ in line.points]
        x, y = linear_axis(steps, "step", zero=True), log_axis(values, label)
        summary = f"{label} against step on {dataset}, {len(lines)} methods"
        panels.append(Panel(dataset, "", chart(lines, x, y, summary=summary, size=(380, 280))))
    return panels
