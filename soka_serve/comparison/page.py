"""A comparison's results as one self-contained HTML page, in the style of report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from soka_serve.comparison.tables import cell_rows, claim_rows, method_rows, number, percent, remarks
from soka_serve.compiler.report.charts import Mark, Series, chart, linear_axis, log_axis
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
        "front": accuracy_chart(results, drawn),
        "legend": [(name, f"k{i}") for i, name in enumerate(drawn)],
        "losses": _curves(results, drawn, "loss_curve", "training loss"),
        "norms": _curves(results, drawn, "grad_norm_curve", "gradient norm"),
        "tables": [
            ("Methods", *method_rows(results)),
            ("Methods by dataset", *cell_rows(results)),
            *([("Paired tests", *claim_rows(results))] if results["claims"] else []),
        ],
        "errors": [(c["method"], c["dataset"], error) for c in results["cells"] for error in c["errors"]],
    }
    page = environment(FOLDER, autoescape=True).get_template("compare.html.jinja").render(context)
    return page.encode("utf-8", "replace").decode("utf-8")


def drawn_methods(results: Mapping[str, Any]) -> list[str]:
    """Methods whose curves are drawn, at most eight: those of the claims, else the first ones that have results."""
    there = [row["name"] for row in results["table"] if row["accuracy"] is not None]
    claimed = {name for claim in results["claims"] for name in (claim["candidate"], claim["reference"])}
    return ([name for name in there if name in claimed] or there)[:_COLOURS]


def accuracy_chart(results: Mapping[str, Any], drawn: Sequence[str]) -> Markup | None:
    """Accuracy against trained parameters, with the Pareto front; None without results."""
    rows = [row for row in results["table"] if row["accuracy"] is not None]
    if not rows:
        return None
    points = {row["name"]: (row["trainable_parameters"], 100 * row["accuracy"]["mean"]) for row in rows}
    x = log_axis([parameters for parameters, _ in points.values()], "trained parameters", text=count)
    y = linear_axis([0.0, 100.0], "accuracy, %", zero=True)
    front = sorted(points[row["name"]] for row in rows if row["pareto"])
    series = [Series(front, "front", tooltip="Pareto front", step=True)]
    for row in rows:
        name, (parameters, accuracy) = row["name"], points[row["name"]]
        text = f"{name}: {parameters:,.0f} parameters, {percent(row['accuracy'])}% right"
        css = f"dot k{drawn.index(name)}" if name in drawn else "dot other"
        series.append(Series((), css, marks=(Mark(parameters, accuracy, text, label=name),)))
    summary = f"Accuracy against trained parameters of {len(rows)} methods, with the Pareto front"
    return chart(series, x, y, summary=summary, size=(900, 420))


def _curves(results: Mapping[str, Any], drawn: Sequence[str], key: str, label: str) -> list[Panel]:
    """One panel per dataset, a line per method."""
    panels = []
    for dataset in dict.fromkeys(cell["dataset"] for cell in results["cells"]):
        cells = {c["method"]: c for c in results["cells"] if c["dataset"] == dataset and c[key]}
        lines = [
            Series(
                [(step, value) for step, value in cells[name][key]],
                f"k{drawn.index(name)}",
                tooltip=f"{name}, rate {number(cells[name]['rate'], '{:g}')}",
            )
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
