"""Which learning rate a sweep chooses: the best of the grid, which grows while the best one is at its edge.

A sweep has no state of its own: everything follows from the suite and its records, so it may be killed at any time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from soka_serve.comparison.plan import Cell, Record, RunSpec


@dataclass(frozen=True)
class RateChoice:
    """The rate that the sweep of a cell chose. `rate` is None as long as it is not decided, or if every run failed.

    `at_edge`: the best rate is the smallest or largest that was tried, after all extensions.
    """

    rates: tuple[float, ...]
    scores: Mapping[float, float]
    rate: float | None
    at_edge: bool
    failed: bool = False


def choose_rate(cell: Cell, records: Mapping[str, Record]) -> tuple[RateChoice, list[RunSpec]]:
    """The choice as far as a cell's sweep has come, and the sweep runs that it still needs."""
    rates = cell.contender.rates
    extensions = 0
    while True:
        runs = {rate: [cell.spec("sweep", rate, s) for s in cell.suite.protocol.sweep_seeds] for rate in rates}
        missing = [run for rate in rates for run in runs[rate] if run.key not in records]
        if missing:
            return RateChoice(rates, {}, None, False), missing
        ranked: list[tuple[float, float, float]] = []
        for rate in rates:
            found = [(_score(records[run.key]), _last_loss(records[run.key])) for run in runs[rate]]
            known = [(score, loss) for score, loss in found if score is not None]
            if known:
                count = len(known)
                # Equal accuracy: the lower training loss decides, then the smaller rate.
                ranked.append((sum(s for s, _ in known) / count, -sum(x for _, x in known) / count, -rate))
        scores = {-rate: score for score, _, rate in ranked}
        if not ranked:
            return RateChoice(rates, scores, None, False, failed=True), []
        best = -max(ranked)[2]
        edge = best in (rates[0], rates[-1])
        if not edge or extensions == cell.suite.protocol.extensions or len(rates) == 1:
            # A suite with a single rate has been told which one to take.
            return RateChoice(rates, scores, best, edge and len(rates) > 1), []
        rates, extensions = extend(rates, best), extensions + 1


def _score(record: Record) -> float | None:
    """The score that decides a sweep: the share of right answers; 0 of a diverged run, None of a failed one."""
    if record["status"] == "failed":
        return None
    return float(record["correct"] / record["problems"]) if record["status"] == "done" else 0.0


def _last_loss(record: Record) -> float:
    """Mean training loss of the last tenth of the steps; infinite for a run that did not get there."""
    losses = record.get("loss") or []
    if record["status"] != "done" or not losses:
        return math.inf
    tail = losses[-max(len(losses) // 10, 1) :]
    return float(sum(tail) / len(tail))


def extend(rates: tuple[float, ...], best: float) -> tuple[float, ...]:
    """The grid with one more rate beyond the edge where the best one is; as it is when that is inside.

    >>> extend((1.0, 2.0, 4.0), 4.0), extend((1.0, 2.0, 4.0), 1.0), extend((1.0, 2.0, 4.0), 2.0)
    ((1.0, 2.0, 4.0, 8.0), (0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0))
    """
    if best == rates[-1]:
        return (*rates, float(f"{rates[-1] ** 2 / rates[-2]:.6g}"))
    if best == rates[0]:
        return (float(f"{rates[0] ** 2 / rates[1]:.6g}"), *rates)
    return rates
