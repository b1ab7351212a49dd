"""A comparison's results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METRIC_NAMES = {
    "answer_loss": "held-out loss",
    "accuracy": "accuracy",
    "steps_to_loss": "steps to the loss",
    "forgetting": "forgetting",
    "grad_noise": "gradient noise",
}
_VERDICTS = {True: "true", False: "false", None: "undecided"}


def render_markdown(results: Mapping[str, Any]) -> str:
    """The tables of the results: claims, methods, cells, and what must be known to read them."""
    suite, state = results["suite"], results["progress"]
    lines = [f"# {suite['name']}", ""]
    if suite["description"]:
        lines += [suite["description"], ""]
    lines += [f"`{results['command']}`", "", *remarks(results), ""]
    for title, head, rows in tables(results):
        lines += [f"## {title}", "", *markdown_table(head, rows), ""]
    problems = [f"- {c['method']} on {c['dataset']}: {error}" for c in results["cells"] for error in c["errors"]]
    if problems:
        lines += ["## Runs that failed", "", *problems, ""]
    lines += [f"{state['done']} runs done, {state['left']} left, {state['failed']} failed.", ""]
    return "\n".join(lines)


def tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of every table."""
    found = [("Methods", *method_rows(results)), ("Methods by dataset", *cell_rows(results))]
    return [("Claims", *claim_rows(results)), *found] if results["claims"] else found


def remarks(results: Mapping[str, Any]) -> list[str]:
    """How to read the numbers, in sentences."""
    protocol = results["protocol"]
    said = [
        f"Mean over {len(protocol['seeds'])} seeds with 95% confidence intervals (Student's t, over seeds; those of "
        f"accuracies are cut at 0 and 100%). {_chosen(results)} Results are on {protocol['test']} test problems that "
        f"share none with {protocol['validation']} validation problems.",
        "Held-out loss: nats per token of the right answer. Forgetting: rise of that loss on text that nothing was "
        "trained on. Steps to the loss: first step at which the running mean of "
        f"{protocol['loss_window']} training losses is at most the suite's smallest target; a run that does not get "
        "there counts with one step more than it has. Gradient noise: standard deviation of the logarithm of the norm "
        "before clipping, after warm-up, around its trend. A diverged run has accuracy 0 and no loss; a failed one "
        "does not count and is named. AdaLoRA's training loss includes its own penalty.",
    ]
    if results["claims"]:
        said.append(
            "Claims: one-sided sign-flip tests at 5%, the primary one as it is, the others after Holm's correction. "
            "False means that the results do not show it."
        )
        if any(claim["pairs"] == "examples" for claim in results["claims"]):
            said.append(
                "Where pairs are examples, p and interval speak for further examples with these seeds; of other seeds "
                "the differences seed by seed tell."
            )
    if changed := results["claims_changed_after"]:
        said.append(f"**The claims are not those of {changed} of {results['results']} results: they were changed.**")
    if made_for := results.get("made_for"):
        said.append(
            f"{sum(made_for.values())} of {results['results']} results were made for another suite, with other "
            f"claims: {', '.join(made_for)}."
        )
    if not results["effort_equal"]:
        said.append("**Not every method was tried with as many settings** (see the table by dataset).")
    if not results["data_order_equal"]:
        said.append("**The methods did not see the same batches in the same order.**")
    if len(processors := results.get("processors", ())) > 1:
        said.append(
            f"**Runs were made on different processors** ({'; '.join(processors)}): times do not compare, and in half "
            "precision losses differ a little, too."
        )
    unfinished = [row["name"] for row in results["table"] if not row["complete"]]
    if unfinished:
        said.append(f"Not finished, with fewer seeds or datasets than the others: {', '.join(unfinished)}.")
    borders = [
        f"{c['method']} on {c['dataset']} ({', '.join(c['at_border'])})" for c in results["cells"] if c["at_border"]
    ]
    if borders:
        said.append(f"**The best value is the smallest or largest that was tried**: {'; '.join(borders)}.")
    return said


def _chosen(results: Mapping[str, Any]) -> str:
    """How settings were found."""
    protocol, settings = results["protocol"], results["settings_per_method"]
    if settings == 1:
        return "Every method has the middle of its grid: nothing was searched."
    return (
        f"The setting of every method was chosen among {settings}, by coordinate search, by the "
        f"{protocol['choose_by']} on the validation problems with {len(protocol['sweep_seeds'])} other seeds"
        f"{_finalists(protocol)}."
    )


def _finalists(protocol: Mapping[str, Any]) -> str:
    kept = protocol.get("finalists")
    return f" (the first for every setting, the rest for the best {kept})" if kept else ""


def method_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per method, over its datasets."""
    head = [
        "method", "datasets", "trained parameters", "stored, kB", "held-out loss", "accuracy, %", "forgetting",
        "steps to the loss", "reached", "gradient noise", "step, CPU ms", "peak, MB", "Pareto",
    ]  # fmt: skip
    rows = [
        [
            row["name"] + ("" if row["complete"] else " (unfinished)"),
            str(len(row["datasets"])),
            number(row["trainable_parameters"], "{:,.0f}"),
            number(row["adapter_bytes"], "{:,.0f}", 1e-3),
            spread(row["answer_loss"], "{:.4f}"),
            percent(row["accuracy"]),
            spread(row["forgetting"], "{:+.4f}"),
            spread(row["steps_to_loss"], "{:.0f}"),
            number(row["reached"], "{:.0%}"),
            spread(row["grad_noise"], "{:.3f}"),
            number(row["step_cpu_s"], "{:.0f}", 1e3),
            number(row["training_peak_bytes"], "{:.0f}", 1e-6),
            "yes" if row["pareto"] else "",
        ]
        for row in results["table"]
    ]
    return head, rows


def cell_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per method and dataset."""
    head = [
        "method", "dataset", "settings", "chosen", "sweep seeds that agree", "seeds", "held-out loss", "its median",
        "accuracy, %", "forgetting", "median steps to", "final loss", "gradient noise", "diverged",
    ]  # fmt: skip
    rows = [
        [
            cell["method"],
            cell["dataset"],
            str(cell["settings"]),
            _setting(cell),
            number(cell["sweep_seeds_that_agree"], f"{{}} of {len(results['protocol']['sweep_seeds'])}"),
            str(len(cell["seeds"])),
            spread(cell["answer_loss"], "{:.4f}"),
            number(cell["answer_loss"] and cell["answer_loss"]["median"], "{:.4f}"),
            percent(cell["accuracy"]),
            _each(cell["forgetting_of"], "{:+.4f}"),
            _each(cell["median_steps_to"], "{:g}"),
            number(cell["final_loss"], "{:.4f}"),
            spread(cell["grad_noise"], "{:.3f}"),
            str(cell["diverged"] or ""),
        ]
        for cell in results["cells"]
    ]
    return head, rows


def _setting(cell: Mapping[str, Any]) -> str:
    """'learning_rate 0.002, clip 1 (border), optimiser adafactor'."""
    marks = dict.fromkeys(cell["at_border"], " (border)")
    found = [f"{axis} {value:g}{marks.get(axis, '')}" for axis, value in (cell["setting"] or {}).items()]
    return ", ".join([*found, *(f"{key} {word}" for key, word in cell.get("train", {}).items())]) or "–"


def _each(values: Mapping[str, float], form: str) -> str:
    return "; ".join(f"{name}: {form.format(value)}" for name, value in values.items()) or "–"


def claim_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per claim."""
    head = ["claim", "on", "pairs", "difference", "median", "better in", "p", "p (Holm)", "verdict", "seed by seed"]
    rows = [
        [
            claim_text(claim),
            claim["dataset"] or "all",
            f"{claim['n']} {claim['pairs']}",
            spread(claim["difference"], "{:+.4f}"),
            number(claim["median"], "{:+.4f}"),
            f"{claim['better_in']} of {claim['n']}",
            number(claim["p"], "{:.3g}"),
            "primary" if claim["primary"] else number(claim["p_corrected"], "{:.3g}"),
            _VERDICTS[claim["holds"]] + (f": {claim['undecided']}" if claim["undecided"] else ""),
            ", ".join(f"{difference:+.4f}" for difference in claim.get("by_seed", ())) or "–",
        ]
        for claim in results["claims"]
    ]
    return head, rows


def claim_text(claim: Mapping[str, Any]) -> str:
    """'soka-r1 is no worse than lora-r2 in held-out loss (margin 0.01)'."""
    relation = "better than" if claim["relation"] == "better" else "no worse than"
    margin = f" (margin {claim['margin']:g})" if claim["margin"] else ""
    return f"{claim['candidate']} is {relation} {claim['reference']} in {METRIC_NAMES[claim['metric']]}{margin}"


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
