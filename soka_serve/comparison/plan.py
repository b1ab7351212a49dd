"""Which runs a suite can have, and the key of each: for a method on a dataset (a cell) its sweep, and its results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
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

    def finals(self, rate: float) -> list[RunSpec]:
        """The runs of the results."""
        return [self.spec("final", rate, seed) for seed in self.suite.protocol.seeds]


def list_cells(suite: Suite, inputs: RunInputs) -> list[Cell]:
    """Every method on every one of its datasets."""
    return [Cell(suite, m, dataset, inputs) for m in suite.method for dataset in suite.datasets_of(m)]


def count_runs(suite: Suite) -> int:
    """Runs of a suite whose grids need no extension."""
    protocol = suite.protocol
    per_cell = [len(m.rates) * len(protocol.sweep_seeds) + len(protocol.seeds) for m in suite.method]
    return sum(n * len(suite.datasets_of(m)) for n, m in zip(per_cell, suite.method, strict=True))
