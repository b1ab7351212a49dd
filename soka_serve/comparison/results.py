"""Summarise the records of a comparison: per cell, per method, and paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from soka_serve.comparison.plan import Cell, Record
from soka_serve.comparison.records import keys_of
from soka_serve.comparison.stats import (
    PairedTest,
    coefficient_of_variation,
    holm,
    interval,
    paired_test,
    pareto_front,
    running_mean,
    steps_to,
)
from soka_serve.comparison.suite import Suite
from soka_serve.comparison.sweep import RateChoice, choose_rate
from soka_serve.compiler.report.charts import thin

CURVE_POINTS = 50

# What is tested, and whether more is better.
METRICS = {"accuracy": True, "steps_to_loss": False, "grad_norm_cv": False}


def summarise(suite: Suite, cells: Sequence[Cell], records: Mapping[str, Record]) -> dict[str, Any]:
    """All results, as JSON values."""
    chosen = {(c.contender.name, c.dataset.name): choose_rate(c, records)[0] for c in cells}
    finals = {
        place: _finals(cell, chosen[place], records)
        for cell in cells
        for place in [(cell.contender.name, cell.dataset.name)]
    }
    targets = {d.name: _target_loss(suite, finals.get((suite.loss_reference or "", d.name), {})) for d in suite.dataset}
    per_cell = []
    runs: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for cell in cells:
        place = (cell.contender.name, cell.dataset.name)
        target = targets[cell.dataset.name]
        runs[place] = {seed: measures(suite, r, target) for seed, r in finals[place].items() if r["status"] != "failed"}
        per_cell.append(_cell(cell, chosen[place], finals[place], runs[place], records))
    table = [_method(suite, m.name, per_cell, runs) for m in suite.method]
    measured = [row for row in table if row["accuracy"] is not None]
    front = pareto_front([(row["trainable_parameters"], row["accuracy"]["mean"]) for row in measured])
    for row, best in zip(measured, front, strict=True):
        row["pareto"] = best
    return {
        "loss_targets": targets,
        "table": table,
        "cells": per_cell,
        "claims": _claims(suite, runs),
        "data_order_equal": _same_order(finals),
        "runs": [_compact(records[key]) for key in keys_of(cells, records) if key in records],
    }


def _finals(cell: Cell, choice: RateChoice, records: Mapping[str, Record]) -> dict[int, Record]:
    """Records of the result runs by seed, as far as they are there."""
    if choice.rate is None:
        return {}
    return {run.seed: records[run.key] for run in cell.finals(choice.rate) if run.key in records}


def _target_loss(suite: Suite, reference: Mapping[int, Record]) -> float | None:
    """The training loss that steps are counted to: where the reference ends, on average over its seeds."""
    window = suite.protocol.loss_window
    ends = [running_mean(r["loss"], window)[-1] for r in reference.values() if _whole(r) and len(r["loss"]) >= window]
    return math.fsum(ends) / len(ends) if ends else None


def _whole(record: Record) -> bool:
    return bool(record["status"] == "done")


def measures(suite: Suite, record: Record, target: float | None) -> dict[str, float]:
    """The numbers of one run that are averaged and tested; what a run does not have is left out.

    A run that never reaches the target loss counts with one step more than it has. A diverged run has accuracy 0.
    """
    recipe: Any = suite.train
    steps, window = recipe.steps, suite.protocol.loss_window
    found: dict[str, float] = {
        "accuracy": record["correct"] / record["problems"] if _whole(record) else 0.0,
        "best_accuracy": record["best_correct"] / record["problems"],
        "trainable_parameters": record["trainable_parameters"],
    }
    if target is not None:
        reached = steps_to(record["loss"], target, window) if _whole(record) else None
        found["steps_to_loss"] = steps + 1 if reached is None else reached
        found["reached"] = float(reached is not None)
    norms = record["grad_norm"][math.ceil(recipe.warmup_frac * steps) :]
    if norms and all(map(math.isfinite, norms)):
        found["grad_norm"] = math.fsum(norms) / len(norms)
        variation = coefficient_of_variation(norms)
        if variation is not None:
            found["grad_norm_cv"] = variation
    if _whole(record) and len(record["loss"]) >= window:
        found["final_loss"] = running_mean(record["loss"], window)[-1]
    for name in ("adapter_bytes", "step_cpu_s", "step_wall_s", "peak_bytes"):
        if record.get(name) is not None:
            found[name] = record[name]
    return found


def _cell(
    cell: Cell,
    choice: RateChoice,
    finals: Mapping[int, Record],
    runs: Mapping[int, Mapping[str, float]],
    records: Mapping[str, Record],
) -> dict[str, Any]:
    sweeps = [
        records[key]
        for rate in choice.rates
        for seed in cell.suite.protocol.sweep_seeds
        if (key := cell.spec("sweep", rate, seed).key) in records
    ]
    everything = [*sweeps, *finals.values()]
    return {
        "method": cell.contender.name,
        "dataset": cell.dataset.name,
        "rates": list(choice.rates),
        "validation_accuracy": {f"{rate:g}": score for rate, score in sorted(choice.scores.items())},
        "rate": choice.rate,
        "best_rate_at_edge": choice.at_edge,
        "seeds": sorted(finals),
        "diverged": sum(r["status"] == "diverged" for r in finals.values()),
        "diverged_in_sweep": sum(r["status"] == "diverged" for r in sweeps),
        "errors": sorted({r["error"] for r in everything if r["status"] == "failed"}),
        **_averages(list(runs.values())),
        "loss_curve": _mean_curve([r["loss"] for r in finals.values() if _whole(r)], cell.suite.protocol.loss_window),
        "grad_norm_curve": _mean_curve(
            [r["grad_norm"] for r in finals.values() if _whole(r)], cell.suite.protocol.loss_window
        ),
    }


def _averages(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean with interval of accuracies and of what is tested; plain means of the rest."""
    found: dict[str, Any] = {}
    for name in ("accuracy", "best_accuracy", "steps_to_loss", "grad_norm_cv"):
        summary = interval([run[name] for run in runs if name in run])
        found[name] = None if summary is None else _rounded(asdict(summary))
    for name in (
        "trainable_parameters", "adapter_bytes", "reached", "final_loss", "grad_norm", "step_cpu_s", "step_wall_s",
        "peak_bytes",
    ):  # fmt: skip
        values = [run[name] for run in runs if name in run]
        found[name] = float(f"{math.fsum(values) / len(values):.6g}") if values else None
    return found


def _rounded(value: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in value.items()}


def _mean_curve(curves: Sequence[Sequence[float]], window: int) -> list[list[float]]:
    """(step, running mean) averaged over the seeds, at most 50 points."""
    smooth = [running_mean(curve, window) for curve in curves if len(curve) >= window]
    if not smooth:
        return []
    length = min(map(len, smooth))
    points = [(float(i + window), math.fsum(c[i] for c in smooth) / len(smooth)) for i in range(length)]
    return [[step, float(f"{value:.5g}")] for step, value in thin(points, CURVE_POINTS)]


def _method(
    suite: Suite,
    name: str,
    per_cell: Sequence[Mapping[str, Any]],
    runs: Mapping[tuple[str, str], Mapping[int, Mapping[str, float]]],
) -> dict[str, Any]:
    """A method over its datasets: seed by seed the mean over the datasets, then mean and interval over the seeds."""
    mine = [c for c in per_cell if c["method"] == name]
    there = [runs[name, c["dataset"]] for c in mine if runs[name, c["dataset"]]]
    complete = len(there) == len(mine)
    seeds = [s for s in suite.protocol.seeds if there and all(s in cell for cell in there)]
    by_seed = []
    for seed in seeds:
        keys = set.intersection(*(set(cell[seed]) for cell in there))
        by_seed.append({key: math.fsum(cell[seed][key] for cell in there) / len(there) for key in keys})
    return {
        "name": name,
        "method": suite.contender(name).method,
        "datasets": [c["dataset"] for c in mine if runs[name, c["dataset"]]],
        "complete": complete and len(seeds) == len(suite.protocol.seeds),
        **_averages(by_seed),
        "diverged": sum(c["diverged"] for c in mine),
        "best_rate_at_edge": [c["dataset"] for c in mine if c["best_rate_at_edge"]],
        "errors": sorted({error for c in mine for error in c["errors"]}),
        "pareto": False,
    }


Runs = Mapping[tuple[str, str], Mapping[int, Mapping[str, float]]]


def _claims(suite: Suite, runs: Runs) -> list[dict[str, Any]]:
    """Paired tests of every claim, per dataset and over all; Holm's correction within metric and kind."""
    rows: list[dict[str, Any]] = []
    tests: list[PairedTest] = []
    for metric, more in METRICS.items():
        for claim in suite.claim:
            for reference in claim.references:
                for dataset in [*[d.name for d in suite.dataset], None]:
                    test = _test(suite, runs, metric, claim.candidate, reference, dataset)
                    if test is not None:
                        rows.append(
                            {
                                "metric": metric,
                                "more_is_better": more,
                                "candidate": claim.candidate,
                                "reference": reference,
                                "dataset": dataset or "all",
                            }
                        )
                        tests.append(test)
    families: dict[tuple[str, bool], list[int]] = {}
    for i, row in enumerate(rows):
        families.setdefault((row["metric"], row["dataset"] == "all"), []).append(i)
    for members in families.values():
        for i, p in zip(members, holm([tests[i].p for i in members]), strict=True):
            tests[i] = replace(tests[i], p_holm=p)
    return [row | _flat(test) for row, test in zip(rows, tests, strict=True)]


def _flat(test: PairedTest) -> dict[str, Any]:
    value = asdict(test)
    value["difference"] = _rounded(value["difference"])
    return _rounded(value)


def _test(
    suite: Suite, runs: Runs, metric: str, candidate: str, reference: str, dataset: str | None
) -> PairedTest | None:
    names = [dataset] if dataset is not None else [d.name for d in suite.dataset]
    pairs = [
        (a[metric], b[metric])
        for name in names
        for seed in suite.protocol.seeds
        for a, b in [(runs.get((candidate, name), {}).get(seed, {}), runs.get((reference, name), {}).get(seed, {}))]
        if metric in a and metric in b
    ]
    return paired_test([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def _same_order(finals: Mapping[tuple[str, str], Mapping[int, Record]]) -> bool:
    """Whether all methods saw the same batches in the same order, per dataset and seed."""
    seen: dict[tuple[str, int], set[str]] = {}
    for (_, dataset), by_seed in finals.items():
        for seed, record in by_seed.items():
            if _whole(record):
                seen.setdefault((dataset, seed), set()).add(record["batches_sha256"])
    return all(len(hashes) == 1 for hashes in seen.values())


def _compact(record: Record) -> dict[str, Any]:
    """A record as results hold it: curves of at most 50 points, gradient norms left to the cell's mean curve."""
    found = {k: v for k, v in record.items() if k not in ("loss", "grad_norm")}
    if record.get("loss"):
        points = [(float(step), loss) for step, loss in enumerate(record["loss"], start=1)]
        found["loss"] = [list(point) for point in thin(points, CURVE_POINTS)]
    return found
