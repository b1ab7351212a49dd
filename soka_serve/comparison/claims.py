"""The claims of a suite, tested on the results: true, false, or undecided while runs are missing or diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from soka_serve.comparison.stats import holm, interval, sign_flip
from soka_serve.comparison.suite import Claim, Suite

LEVEL = 0.05
MORE_IS_BETTER = {"accuracy"}  # of the metrics of claims

Place = tuple[str, str]  # method, dataset
Records = Mapping[Place, Mapping[int, Mapping[str, Any]]]
Runs = Mapping[Place, Mapping[int, Mapping[str, float]]]


def rises(record: Mapping[str, Any], name: str | None = None) -> list[float]:
    """How much the loss of each example that nothing was trained on has risen: of one text, or of all."""
    texts = record["other"].values() if name is None else (record["other"][name],)
    return [after - before for t in texts for before, after in zip(t["before"], t["after"], strict=True)]


def judge(suite: Suite, finals: Records, runs: Runs) -> list[dict[str, Any]]:
    """Every claim with its sign-flip test: the primary one at 5%, the others at 5% after Holm's correction.

    Args:
        suite: its claims.
        finals: records of the results, by method and dataset, then by seed.
        runs: the measures of those that did not fail.
    """
    rows = [_test(suite, claim, finals, runs) for claim in suite.claim]
    others = [i for i, claim in enumerate(suite.claim) if not claim.primary]
    corrected = dict(zip(others, holm([rows[i]["p"] for i in others]), strict=True))
    for i, row in enumerate(rows):
        row["p_corrected"] = corrected.get(i, row["p"])
        row["holds"] = None if row["p_corrected"] is None else row["p_corrected"] <= LEVEL
    return rows


def _test(suite: Suite, claim: Claim, finals: Records, runs: Runs) -> dict[str, Any]:
    row: dict[str, Any] = {**claim.model_dump(), "n": 0, "difference": None, "median": None, "better_in": 0, "p": None}
    names = [claim.dataset] if claim.dataset is not None else [d.name for d in suite.dataset]
    places = [(method, name) for name in names for method in (claim.candidate, claim.reference)]
    for method, name in places:
        row["undecided"] = _missing(suite, claim, method, name, finals, runs)
        if row["undecided"] is not None:
            return row
    differences = (
        _by_example(claim, names, finals) if claim.pairs == "examples" else _by_seed(suite, claim, names, runs)
    )
    sign = -1.0 if claim.metric in MORE_IS_BETTER else 1.0
    summary = interval(differences)
    if claim.pairs == "examples":
        row["by_seed"] = [round(difference, 5) for difference in _by_seed(suite, claim, names, runs)]
    return row | {
        "n": len(differences),
        "difference": None if summary is None else asdict(summary),
        "median": median(differences),
        "better_in": sum(sign * d < 0 for d in differences),
        "p": sign_flip([sign * d - claim.margin for d in differences]),
    }


def _missing(suite: Suite, claim: Claim, method: str, dataset: str, finals: Records, runs: Runs) -> str | None:
    """Why a claim cannot be decided; None if it can. Pairs are never left out."""
    records = finals.get((method, dataset), {})
    for status in ("failed", "diverged"):
        if count := sum(record["status"] == status for record in records.values()):
            return f"{count} runs of {method} on {dataset} {status}"
    if lacking := len(suite.protocol.seeds) - len(records):
        return f"{lacking} runs of {method} on {dataset} are missing"
    measured = runs[method, dataset].values()
    later = claim.metric == "steps_to_loss" and claim.margin > 0 and method == claim.candidate
    if later and (never := sum(not run["reached"] for run in measured)):
        return f"{never} runs of {method} on {dataset} never reach the loss, so that how much later is not known"
    if any(claim.metric not in run for run in measured):
        return f"{method} on {dataset} has no {claim.metric}"
    return None


def _by_seed(suite: Suite, claim: Claim, names: list[str], runs: Runs) -> list[float]:
    """Candidate minus reference, seed by seed; over several datasets the mean of the differences."""

    def value(method: str, seed: int) -> float:
        return math.fsum(runs[method, name][seed][claim.metric] for name in names) / len(names)

    return [value(claim.candidate, seed) - value(claim.reference, seed) for seed in suite.protocol.seeds]


def _by_example(claim: Claim, names: list[str], finals: Records) -> list[float]:
    """Candidate minus reference, example by example, each the mean over the seeds.

    What is forgotten is measured on the same examples whatever was trained on: each is one pair, with its mean over the
    datasets too.
    """

    def means(method: str, name: str) -> list[float]:
        records = finals[method, name].values()
        each = [rises(record) if claim.metric == "forgetting" else record["answer_loss"] for record in records]
        return [math.fsum(column) / len(column) for column in zip(*each, strict=True)]

    each = [
        [a - b for a, b in zip(means(claim.candidate, name), means(claim.reference, name), strict=True)]
        for name in names
    ]
    if claim.metric == "forgetting":
        return [math.fsum(column) / len(column) for column in zip(*each, strict=True)]
    return [difference for differences in each for difference in differences]
