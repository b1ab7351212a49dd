"""Summarise the records of a comparison: per cell, per method, and the claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from soka_serve.comparison.claims import judge, rises
from soka_serve.comparison.plan import Cell, Record
from soka_serve.comparison.records import keys_of
from soka_serve.comparison.settings import Setting
from soka_serve.comparison.stats import interval, noise, pareto_front, running_mean, steps_to
from soka_serve.comparison.suite import Suite
from soka_serve.comparison.sweep import Choice, choose, seeds_that_agree, sweep_keys
from soka_serve.compiler.report.charts import thin

CURVE_POINTS = 50

SPREAD = ("answer_loss", "accuracy", "forgetting", "steps_to_loss", "grad_noise")
"""What is given with interval, median and every seed's value."""
RECORDED = ("trainable_parameters", "adapter_bytes", "step_cpu_s", "step_wall_s", "training_peak_bytes")
MEANS = (*RECORDED, "reached", "final_loss", "grad_norm")
"""What is given as a mean."""

Place = tuple[str, str]  # method, dataset
Finals = Mapping[Place, Mapping[int, Record]]


def summarise(suite: Suite, cells: Sequence[Cell], records: Mapping[str, Record]) -> dict[str, Any]:
    """All results, as JSON values."""
    places = {(cell.contender.name, cell.dataset.name): cell for cell in cells}
    chosen = {place: choose(cell, records)[0] for place, cell in places.items()}
    finals = {place: _finals(cell, chosen[place], records) for place, cell in places.items()}
    runs = {
        place: {
            seed: measures(cell, chosen[place].setting or (), r)
            for seed, r in finals[place].items()
            if r["status"] != "failed"
        }
        for place, cell in places.items()
    }
    per_cell = [_cell(cell, chosen[p], finals[p], runs[p], records) for p, cell in places.items()]
    table = [_method(suite, m.name, per_cell, runs) for m in suite.method]
    measured = [row for row in table if row["answer_loss"] is not None]
    front = pareto_front([(row["trainable_parameters"], -row["answer_loss"]["mean"]) for row in measured])
    for row, best in zip(measured, front, strict=True):
        row["pareto"] = best
    made = [record for by_seed in finals.values() for record in by_seed.values() if record["status"] != "failed"]
    others = [record for record in made if record["claims_sha256"] != suite.claims_sha256]
    return {
        "settings_per_method": suite.settings,
        "effort_equal": len({cell["settings"] for cell in per_cell}) == 1,
        "table": table,
        "cells": per_cell,
        "claims": judge(suite, finals, runs),
        "claims_changed_after": sum(_suite_of(record, suite) == suite.name for record in others),
        "made_for": Counter(name for record in others if (name := _suite_of(record, suite)) != suite.name),
        "results": len(made),
        "data_order_equal": _same_order(finals),
        "processors": sorted({record["cpu"] for record in made if record.get("cpu")}),
        "runs": [_compact(records[key]) for key in keys_of(cells, records) if key in records],
    }


def _suite_of(record: Record, suite: Suite) -> str:
    """The suite that a record was made for: this one, where the record is too old to say."""
    return str(record.get("suite", suite.name))


def _finals(cell: Cell, choice: Choice, records: Mapping[str, Record]) -> dict[int, Record]:
    """Records of the result runs by seed, as far as they are there."""
    if choice.setting is None:
        return {}
    return {run.seed: records[run.key] for run in cell.finals(choice.setting) if run.key in records}


def _whole(record: Record) -> bool:
    return bool(record["status"] == "done")


def measures(cell: Cell, setting: Setting, record: Record) -> dict[str, float]:
    """The numbers of one run that are averaged and tested; what a run does not have is left out.

    A run that never reaches the smallest target loss counts with one step more than it has. A diverged run has accuracy
    0, and no loss.

    Args:
        cell: the run's.
        setting: the run's, as the cell's grid has it.
        record: the run's; another suite may have made it, under names and axes of its own.
    """
    suite, dataset = cell.suite, cell.dataset
    recipe: Any = suite.train
    window = suite.protocol.loss_window
    found: dict[str, float] = {}
    if suite.protocol.answered != 0:
        found["accuracy"] = record["correct"] / record["answered"] if _whole(record) else 0.0
    if dataset.loss_targets:
        reached = steps_to(record["loss"], dataset.loss_targets[0], window) if _whole(record) else None
        found["steps_to_loss"] = recipe.steps + 1 if reached is None else reached
        found["reached"] = float(reached is not None)
    norms = record["grad_norm"][math.ceil(_warmup_frac(cell, setting) * recipe.steps) :]
    if norms and all(map(math.isfinite, norms)):
        found["grad_norm"] = math.fsum(norms) / len(norms)
        if (spread := noise(norms)) is not None:
            found["grad_noise"] = spread
    if _whole(record):
        found["answer_loss"] = math.fsum(record["answer_loss"]) / len(record["answer_loss"])
        if len(record["loss"]) >= window:
            found["final_loss"] = running_mean(record["loss"], window)[-1]
        if record["other"]:
            found["forgetting"] = math.fsum(rises(record)) / len(rises(record))
    return found | {name: record[name] for name in RECORDED if record.get(name) is not None}


def _warmup_frac(cell: Cell, setting: Setting) -> float:
    """The share of a run's steps that warmed up, which a grid may have searched."""
    recipe, key_of = cell.suite.train.model_dump(), cell.contender.key_of
    return next((value for axis, value in setting if key_of(axis) == "train.warmup_frac"), float(recipe["warmup_frac"]))


def _cell(
    cell: Cell,
    choice: Choice,
    finals: Mapping[int, Record],
    runs: Mapping[int, Mapping[str, float]],
    records: Mapping[str, Record],
) -> dict[str, Any]:
    """A method on a dataset."""
    sweeps = [records[key] for key in sweep_keys(cell, choice) if key in records]
    counted = [record for record in finals.values() if record["status"] != "failed"]
    done = [record for record in counted if _whole(record)]
    window, steps = cell.suite.protocol.loss_window, cell.suite.train.model_dump()["steps"]
    reached = {
        target: [(steps_to(r["loss"], target, window) if _whole(r) else None) or steps + 1 for r in counted]
        for target in cell.dataset.loss_targets
    }
    searched = choice.setting is not None and bool(choice.finalists)
    return {
        "method": cell.contender.name,
        "dataset": cell.dataset.name,
        "settings": len(choice.scores) or int(choice.setting is not None),
        "tried": [{**dict(s), "score": score and score[0]} for s, score in choice.scores.items()],
        "setting": None if choice.setting is None else dict(choice.setting),
        **({"train": cell.contender.words} if cell.contender.words else {}),
        "at_border": list(choice.border),
        "sweep_seeds_that_agree": seeds_that_agree(cell, choice, records) if searched else None,
        "seeds": sorted(finals),
        "diverged": sum(r["status"] == "diverged" for r in finals.values()),
        "diverged_in_sweep": sum(r["status"] == "diverged" for r in sweeps),
        "errors": sorted({r["error"] for r in (*sweeps, *finals.values()) if r["status"] == "failed"}),
        **_averages(runs),
        "median_steps_to": {f"{t:g}": median(found) for t, found in reached.items() if found},
        "forgetting_of": {
            name: _mean([rise for record in done for rise in rises(record, name)])
            for name in (done[0]["other"] if done else ())
        },
        "loss_curve": _mean_curve([r["loss"] for r in done], window),
        "grad_norm_curve": _mean_curve([r["grad_norm"] for r in done], window),
    }


def _averages(runs: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Mean with interval, median and values of what is tested; plain means of the rest."""
    found: dict[str, Any] = {}
    for name in SPREAD:
        values = {str(seed): run[name] for seed, run in runs.items() if name in run}
        summary = interval(list(values.values()))
        if summary is not None:
            found[name] = _rounded({**asdict(summary), "median": median(list(values.values()))})
            found[name]["values"] = _rounded(values)
        else:
            found[name] = None
    return found | {name: _mean([run[name] for run in runs.values() if name in run]) for name in MEANS}


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def _mean(values: Sequence[float]) -> float | None:
    return _six(math.fsum(values) / len(values)) if values else None


def _rounded(value: dict[str, Any]) -> dict[str, Any]:
    return {k: _six(v) if isinstance(v, float) else v for k, v in value.items()}


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
    runs: Mapping[Place, Mapping[int, Mapping[str, float]]],
) -> dict[str, Any]:
    """A method over its datasets: seed by seed the mean over the datasets, then mean and interval over the seeds."""
    mine = [c for c in per_cell if c["method"] == name]
    there = [runs[name, c["dataset"]] for c in mine if runs[name, c["dataset"]]]
    seeds = [s for s in suite.protocol.seeds if there and all(s in cell for cell in there)]
    by_seed = {}
    for seed in seeds:
        keys = set.intersection(*(set(cell[seed]) for cell in there))
        by_seed[seed] = {key: math.fsum(cell[seed][key] for cell in there) / len(there) for key in keys}
    return {
        "name": name,
        "method": suite.contender(name).method,
        "datasets": [c["dataset"] for c in mine if runs[name, c["dataset"]]],
        "complete": len(there) == len(mine) and len(seeds) == len(suite.protocol.seeds),
        **_averages(by_seed),
        "diverged": sum(c["diverged"] for c in mine),
        "pareto": False,
    }


def _same_order(finals: Finals) -> bool:
    """Whether all methods saw the same batches in the same order, per dataset and seed."""
    seen: dict[tuple[str, int], set[str]] = {}
    for (_, dataset), by_seed in finals.items():
        for seed, record in by_seed.items():
            if _whole(record):
                seen.setdefault((dataset, seed), set()).add(record["batches_sha256"])
    return all(len(hashes) == 1 for hashes in seen.values())


def _compact(record: Record) -> dict[str, Any]:
    """A record as results hold it, without what is measured per step and per example (the records' file has that)."""
    return {k: v for k, v in record.items() if k not in ("loss", "grad_norm", "answer_loss", "other")}
