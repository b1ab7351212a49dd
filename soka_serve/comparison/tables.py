"""A comparison's results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_METRIC_NAMES = {
    "accuracy": "accuracy, points",
    "steps_to_loss": "steps to the loss",
    "grad_norm_cv": "variation of the gradient norm",
}


def render_markdown(results: Mapping[str, Any]) -> str:
    """The tables of the results: methods, cells, tests, and what must be known to read them."""
    suite, state = results["suite"], results["progress"]
    lines = [f"# {suite['name']}", ""]
    if suite["description"]:
        lines += [suite["description"], ""]
    lines += [f"`{results['command']}`", "", *remarks(results), ""]
    lines += ["## Methods", "", *markdown_table(*method_rows(results)), ""]
    lines += ["## Methods by dataset", "", *markdown_table(*cell_rows(results)), ""]
    if results["claims"]:
        lines += ["## Paired tests", "", *markdown_table(*claim_rows(results)), ""]
    problems = [f"- {c['method']} on {c['dataset']}: {error}" for c in results["cells"] for error in c["errors"]]
    if problems:
        lines += ["## Runs that failed", "", *problems, ""]
    lines += [f"{state['done']} runs done, {state['left']} left, {state['failed']} failed.", ""]
    return "\n".join(lines)


def remarks(results: Mapping[str, Any]) -> list[str]:
    """How to read the numbers, in sentences."""
    protocol = results["protocol"]
    seeds = len(protocol["seeds"])
    said = [
        f"Mean over {seeds} seeds with 95% confidence intervals (Student's t, over seeds; those of "
        f"accuracies are cut at 0 and 100%). Every method has its own "
        f"learning rate, chosen on {protocol['validation']} validation problems with other seeds; accuracy is on "
        f"{protocol['test']} test problems that share none with those. Best is the best of {protocol['evaluations']} "
        "looks at the test problems during the run, and so flatters.",
        "A diverged run counts with accuracy 0; a failed one does not count and is named. A run that does not reach "
        "the target loss counts with one step more than it has. Steps are counted to the mean final training loss of "
        f"`{results['loss_reference']}` (running mean of {protocol['loss_window']} steps). Gradient norms are those "
        "before clipping, after warm-up. AdaLoRA's training loss includes its own penalty.",
    ]
    if not results["data_order_equal"]:
        said.append("**The methods did not see the same batches in the same order.**")
    unfinished = [row["name"] for row in results["table"] if not row["complete"]]
    if unfinished:
        said.append(f"Not finished, with fewer seeds or datasets than the others: {', '.join(unfinished)}.")
    edges = [f"{c['method']} on {c['dataset']}" for c in results["cells"] if c["best_rate_at_edge"]]
    if edges:
        said.append(f"The best learning rate is at the edge of the grid, after all extensions: {', '.join(edges)}.")
    return said


def method_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per method, over its datasets."""
    head = [
        "method", "datasets", "trained parameters", "adapter, kB", "accuracy, %", "best, %", "steps to the loss",
        "reached", "gradient norm", "its variation", "step, CPU ms", "peak, MB", "Pareto",
    ]  # fmt: skip
    rows = [
        [
            row["name"] + ("" if row["complete"] else " (unfinished)"),
            str(len(row["datasets"])),
            number(row["trainable_parameters"], "{:,.0f}"),
            number(row["adapter_bytes"], "{:,.0f}", 1e-3),
            percent(row["accuracy"]),
            percent(row["best_accuracy"]),
            spread(row["steps_to_loss"], "{:.0f}"),
            number(row["reached"], "{:.0%}"),
            number(row["grad_norm"], "{:.3g}"),
            spread(row["grad_norm_cv"], "{:.2f}"),
            number(row["step_cpu_s"], "{:.0f}", 1e3),
            number(row["peak_bytes"], "{:.0f}", 1e-6),
            "yes" if row["pareto"] else "",
        ]
        for row in results["table"]
    ]
    return head, rows


def cell_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per method and dataset."""
    head = [
        "method", "dataset", "rate", "seeds", "accuracy, %", "steps to the loss", "final loss", "gradient variation",
        "diverged",
    ]  # fmt: skip
    rows = [
        [
            cell["method"],
            cell["dataset"],
            number(cell["rate"], "{:g}") + (" (edge)" if cell["best_rate_at_edge"] else ""),
            str(len(cell["seeds"])),
            percent(cell["accuracy"]),
            spread(cell["steps_to_loss"], "{:.0f}"),
            number(cell["final_loss"], "{:.4f}"),
            spread(cell["grad_norm_cv"], "{:.2f}"),
            str(cell["diverged"] or ""),
        ]
        for cell in results["cells"]
    ]
    return head, rows


def claim_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per test."""
    head = [
        "measure", "candidate", "reference", "dataset", "pairs", "difference", "better in", "p", "p (Holm)", "verdict",
    ]  # fmt: skip
    rows = []
    for claim in results["claims"]:
        scale = 100 if claim["metric"] == "accuracy" else 1
        better = claim["wins"] if claim["more_is_better"] else claim["losses"]
        rows.append(
            [
                _METRIC_NAMES[claim["metric"]],
                claim["candidate"],
                claim["reference"],
                claim["dataset"],
                str(claim["pairs"]),
                spread(claim["difference"], "{:+.2f}", scale),
                f"{better} of {claim['pairs']}",
                number(claim["p"], "{:.3g}"),
                number(claim["p_holm"], "{:.3g}"),
                verdict(claim),
            ]
        )
    return head, rows


def verdict(claim: Mapping[str, Any]) -> str:
    """What a test says at the level of 5% after correction: better, worse, or no difference shown."""
    if claim["p_holm"] is None or claim["p_holm"] > 0.05:
        return "no difference shown"
    return "better" if (claim["difference"]["mean"] > 0) == claim["more_is_better"] else "worse"


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else form.format(value * scale)


def spread(value: Mapping[str, Any] | None, form: str, scale: float = 1.0) -> str:
    """'93.1 [91.0, 95.2]'; without an interval only the mean."""
    if value is None:
        return "–"
    mean = form.format(value["mean"] * scale)
    if value["low"] is None:
        return mean
    return f"{mean} [{form.format(value['low'] * scale)}, {form.format(value['high'] * scale)}]"


def percent(value: Mapping[str, Any] | None) -> str:
    """A share in percent; its interval, which knows no bounds, is cut at 0 and 100.

    >>> percent({"mean": 0.8, "low": 0.5, "high": 1.1})
    '80.0 [50.0, 100.0]'
    """
    if value is not None and value["low"] is not None:
        value = {**value, "low": max(value["low"], 0.0), "high": min(value["high"], 1.0)}
    return spread(value, "{:.1f}", 100)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
