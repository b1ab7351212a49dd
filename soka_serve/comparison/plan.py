"""Which runs a suite has, the key of each, which come next, and which learning rate its sweeps choose.

A suite has no state of its own: everything follows from its text and its records, so it may be killed at any time. Per
method and dataset (a cell): the sweep over the rates, further rates while the best one is at the edge of the grid, and
then the seeds at the chosen rate.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from soka_serve.comparison.suite import Contender, DataSet, Suite, manifest_of

Stage = Literal["sweep", "final"]
Record = Mapping[str, Any]

RECORD_VERSION = 1
_KEY_DIGITS = 24


def is_key(text: str) -> bool:
    """Whether a text has the form of a run's key."""
    return re.fullmatch(rf"[0-9a-f]{{{_KEY_DIGITS}}}", text) is not None


@dataclass(frozen=True)
class RunSpec:
    """One run: method, dataset, learning rate, seed, and the key of its record."""

    method: str
    dataset: str
    stage: Stage
    rate: float
    seed: int
    key: str

    def dataset_of(self, suite: Suite) -> DataSet:
        """The dataset's table."""
        return next(d for d in suite.dataset if d.name == self.dataset)

    def describe(self) -> dict[str, Any]:
        """The fields that describe the run in its record."""
        return {name: value for name, value in asdict(self).items() if name != "key"}

    @staticmethod
    def failure(message: str) -> dict[str, Any]:
        """The record of a run that could not be measured."""
        return {"status": "failed", "error": message[:500]}

    def to_text(self) -> str:
        """For people: 'lora-r1 on math, rate 0.002, seed 3'."""
        return f"{self.method} on {self.dataset}, rate {self.rate:g}, seed {self.seed} ({self.stage})"


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run depends on, other than the suite: hashes of base and data, versions, the kind of device."""

    base: str
    data: Mapping[str, str]
    versions: Mapping[str, str]
    device: str


@dataclass(frozen=True)
class Choice:
    """The rate that the sweep of a cell chose. `rate` is None as long as it is not decided, or if every run failed.

    `at_edge`: the best rate is the smallest or largest that was tried, after all extensions.
    """

    rates: tuple[float, ...]
    scores: Mapping[float, float]
    rate: float | None
    at_edge: bool
    failed: bool = False


def score_of(record: Record) -> float | None:
    """The score that decides a sweep: the share of right answers; 0 of a diverged run, None of a failed one."""
    if record["status"] == "failed":
        return None
    return float(record["correct"] / record["problems"]) if record["status"] == "done" else 0.0


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


@dataclass(frozen=True)
class Cell:
    """A method on a dataset."""

    suite: Suite
    contender: Contender
    dataset: DataSet
    inputs: RunInputs
    _specs: dict[tuple[Stage, float, int], RunSpec] = field(default_factory=dict, compare=False, repr=False)

    def spec(self, stage: Stage, rate: float, seed: int) -> RunSpec:
        """One of the cell's runs."""
        asked = (stage, rate, seed)
        if asked not in self._specs:
            key = self._key(stage, rate, seed)
            self._specs[asked] = RunSpec(self.contender.name, self.dataset.name, stage, rate, seed, key)
        return self._specs[asked]

    def _key(self, stage: Stage, rate: float, seed: int) -> str:
        """A hash of everything that determines the record."""
        suite, contender, dataset, inputs = self.suite, self.contender, self.dataset, self.inputs
        manifest = manifest_of(suite, contender, dataset, rate=rate, seed=seed).model_dump(mode="json", by_alias=True)
        protocol = suite.protocol
        facts = {
            "record": RECORD_VERSION,
            "manifest": {name: manifest[name] for name in ("base", "adapt", "train")},
            "contender": contender.model_dump(mode="json", exclude={"name", "rates", "datasets", "priority", "adapt"}),
            "answers": dataset.answers,
            "stage": stage,
            "problems": [protocol.test, protocol.validation if stage == "sweep" else None, protocol.max_new_tokens],
            "evaluations": protocol.evaluations if stage == "final" else 1,
            "base": inputs.base,
            "data": inputs.data[dataset.name],
            "versions": dict(inputs.versions),
            "device": inputs.device,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]

    def choose(self, records: Mapping[str, Record]) -> tuple[Choice, list[RunSpec]]:
        """The choice as far as the sweep has come, and the sweep runs that it still needs."""
        rates = self.contender.rates
        extensions = 0
        while True:
            runs = {rate: [self.spec("sweep", rate, s) for s in self.suite.protocol.sweep_seeds] for rate in rates}
            missing = [run for rate in rates for run in runs[rate] if run.key not in records]
            if missing:
                return Choice(rates, {}, None, False), missing
            ranked: list[tuple[float, float, float]] = []
            for rate in rates:
                found = [(score_of(records[run.key]), _last_loss(records[run.key])) for run in runs[rate]]
                known = [(score, loss) for score, loss in found if score is not None]
                if known:
                    count = len(known)
                    # Equal accuracy: the lower training loss decides, then the smaller rate.
                    ranked.append((sum(s for s, _ in known) / count, -sum(x for _, x in known) / count, -rate))
            scores = {-rate: score for score, _, rate in ranked}
            if not ranked:
                return Choice(rates, scores, None, False, failed=True), []
            best = -max(ranked)[2]
            edge = best in (rates[0], rates[-1])
            if not edge or extensions == self.suite.protocol.extensions or len(rates) == 1:
                # A suite with a single rate has been told which one to take.
                return Choice(rates, scores, best, edge and len(rates) > 1), []
            rates, extensions = extend(rates, best), extensions + 1

    def finals(self, rate: float) -> list[RunSpec]:
        """The runs of the results."""
        return [self.spec("final", rate, seed) for seed in self.suite.protocol.seeds]


def _last_loss(record: Record) -> float:
    """Mean training loss of the last tenth of the steps; infinite for a run that did not get there."""
    losses = record.get("loss") or []
    if record["status"] != "done" or not losses:
        return math.inf
    tail = losses[-max(len(losses) // 10, 1) :]
    return float(sum(tail) / len(tail))


def list_cells(suite: Suite, inputs: RunInputs) -> list[Cell]:
    """Every method on every one of its datasets."""
    return [Cell(suite, m, dataset, inputs) for m in suite.method for dataset in suite.datasets_of(m)]


def next_runs(cells: Sequence[Cell], records: Mapping[str, Record]) -> list[RunSpec]:
    """The runs that can start now, the most informative first; empty when the suite is finished.

    Order: priority, then sweeps before results, then seed by seed over all cells, so that a suite that is stopped has
    something about every method.
    """
    found: list[tuple[tuple[int, int, int], RunSpec]] = []
    seen: set[str] = set()
    for cell in cells:
        choice, missing = cell.choose(records)
        seeds = cell.suite.protocol.seeds
        if choice.rate is not None:
            missing = [run for run in cell.finals(choice.rate) if run.key not in records]
        for run in missing:
            if run.key not in seen:
                seen.add(run.key)
                place = 0 if run.stage == "sweep" else 1 + seeds.index(run.seed)
                found.append(((cell.contender.priority, min(place, 1), place), run))
    return [run for _, run in sorted(found, key=lambda item: item[0])]


def count_runs(suite: Suite) -> int:
    """Runs of a suite whose grids need no extension."""
    protocol = suite.protocol
    per_cell = [len(m.rates) * len(protocol.sweep_seeds) + len(protocol.seeds) for m in suite.method]
    return sum(n * len(suite.datasets_of(m)) for n, m in zip(per_cell, suite.method, strict=True))
