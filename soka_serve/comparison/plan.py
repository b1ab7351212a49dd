"""Which runs a suite can have, and the key of each: for a method on a dataset (a cell) its sweep, and its results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from soka_serve.builtin.tasks import DEFAULT_COUNTS
from soka_serve.comparison.settings import Setting, manifest_of
from soka_serve.comparison.suite import Contender, DataSet, Suite
from soka_serve.compiler.keys import STAGE_VERSIONS, keyed_precision, training_versions
from soka_serve.compiler.methods import METHODS
from soka_serve.manifest.optimisers import OPTIMISERS
from soka_serve.manifest.schema import Manifest
from soka_serve.starts import STARTS

Stage = Literal["sweep", "final"]
Record = Mapping[str, Any]

RECORD_VERSION = 2
_KEY_DIGITS = 24


def is_key(text: str) -> bool:
    """Whether a text has the form of a run's key."""
    return re.fullmatch(rf"[0-9a-f]{{{_KEY_DIGITS}}}", text) is not None


@dataclass(frozen=True)
class RunSpec:
    """One run: method, dataset, setting, seed, and the key of its record."""

    method: str
    dataset: str
    stage: Stage
    setting: Setting
    seed: int
    key: str

    def dataset_of(self, suite: Suite) -> DataSet:
        """The dataset's table."""
        return next(d for d in suite.dataset if d.name == self.dataset)

    def describe(self) -> dict[str, Any]:
        """The fields that describe the run in its record."""
        found = {name: value for name, value in asdict(self).items() if name != "key"}
        return found | {"setting": dict(self.setting)}

    @staticmethod
    def failure(message: str) -> dict[str, Any]:
        """The record of a run that could not be measured."""
        return {"status": "failed", "error": message[:500]}

    def to_text(self) -> str:
        """For people: 'lora-r1 on math, learning_rate 0.002, seed 3 (final)'."""
        return f"{self.method} on {self.dataset}, {setting_text(self.setting)}, seed {self.seed} ({self.stage})"


def setting_text(setting: Setting) -> str:
    """For people: 'learning_rate 0.002, clip 1'."""
    return ", ".join(f"{axis} {value:g}" for axis, value in setting)


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run depends on, other than the suite: hashes of base and data, versions, the kind of device.

    `base` is of the base's weights, `papers` of its config and tokenizer. `data` has datasets by name, `other` the
    texts that nothing is trained on. `device` also tells CPUs apart that hold the base in different dtypes. `sources`
    has what methods start from besides the base, by what `finetuned` or `adapter` says; `packages` the versions of what
    some of the runs need (`packages_of`).
    """

    base: str
    papers: str
    data: Mapping[str, str]
    other: Mapping[str, str]
    versions: Mapping[str, str]
    device: str
    sources: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)


def packages_of(manifest: Manifest) -> list[str]:
    """Names, as pip has them, of the packages that this run's numbers depend on, and not every run's."""
    optimiser = OPTIMISERS[manifest.train.optimiser].pip
    return sorted({optimiser} - {""} | ({"bitsandbytes"} if manifest.base.quantize != "none" else set()))


@dataclass(frozen=True)
class Cell:
    """A method on a dataset."""

    suite: Suite
    contender: Contender
    dataset: DataSet
    inputs: RunInputs
    _specs: dict[tuple[Stage, Setting, int], RunSpec] = field(default_factory=dict, compare=False, repr=False)

    def spec(self, stage: Stage, setting: Setting, seed: int) -> RunSpec:
        """One of the cell's runs."""
        asked = (stage, setting, seed)
        if asked not in self._specs:
            key = self._key(stage, setting, seed)
            self._specs[asked] = RunSpec(self.contender.name, self.dataset.name, stage, setting, seed, key)
        return self._specs[asked]

    def takes(self, setting: Setting) -> bool:
        """Whether manifests take the values of a setting."""
        try:
            manifest_of(self.suite, self.contender, self.dataset, setting=setting, seed=0)
        except ValidationError:
            return False
        return True

    def _key(self, stage: Stage, setting: Setting, seed: int) -> str:
        """A hash of everything that determines the record."""
        suite, contender, dataset, inputs = self.suite, self.contender, self.dataset, self.inputs
        made = manifest_of(suite, contender, dataset, setting=setting, seed=seed)
        manifest = made.model_dump(mode="json", by_alias=True)
        # On these devices "auto" holds every base in float32.
        stored = "float32" if inputs.device in ("cpu", "cpu without AMX") else "bfloat16"
        manifest["train"]["precision"] = keyed_precision(made, stored)
        if not METHODS[contender.method].kronecker:  # the defaults when these keys began; nothing reads them
            manifest["train"]["sigma_lr"] = 1.0
            manifest["adapt"] = [rule | {"init": "weights", "scale": 0.003} for rule in manifest["adapt"]]
        protocol, final = suite.protocol, stage == "final"
        validation = protocol.validation
        apart = dataset.validation == "eval" and (dataset.test_seed is None or validation <= DEFAULT_COUNTS["test"])
        chosen_by = None if final and apart else validation
        facts = {
            "record": [
                RECORD_VERSION,
                STAGE_VERSIONS["init"],
                STAGE_VERSIONS["tune"],
                *training_versions(METHODS[contender.method], made.train),
                # Version 0 of these ran without them.
                *(["protect", 1] if "protect" in made.train.regularise.chosen else []),
                *(["pruned", 1] if made.train.prune is not None else []),
            ],
            "manifest": {name: manifest[name] for name in ("base", "adapt", "train")}
            | {"adapt": [_with_hashes(rule, inputs.sources) for rule in manifest["adapt"]]},
            "contender": [contender.method, contender.calibration_batches],
            "problems": [dataset.answers, dataset.validation, dataset.test_seed, protocol.test, chosen_by],
            "answers": [protocol.answered if final else protocol.choose_by, protocol.max_new_tokens],
            "stage": stage,
            "base": [inputs.base, inputs.papers],
            "data": inputs.data[dataset.name],
            # What is forgotten was measured from the start before, where that changes the base.
            **({"forgetting": 1} if final and suite.other and _moves_base(made) else {}),
            # Problems of builtin families were asked without the templates before.
            **({"templates": 1} if dataset.data.asks_by_template else {}),
            "other": [[o.name, inputs.other[o.name], o.examples] for o in suite.other if final],
            "versions": {**inputs.versions} | {package: inputs.packages[package] for package in packages_of(made)},
            "device": inputs.device,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]

    def finals(self, setting: Setting) -> list[RunSpec]:
        """The runs of the results."""
        return [self.spec("final", setting, seed) for seed in self.suite.protocol.seeds]


def _moves_base(made: Manifest) -> bool:
    """Whether factors change the base before they are trained."""
    return METHODS[made.train.method].kronecker and any(rule.start.moves_base for rule in made.adapt)


def _with_hashes(rule: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """A dumped rule with the hash of what it starts from in the place of its name."""
    named = {start.source for start in STARTS.values() if start.source and rule.get(start.source)}
    return {key: sources[value] if key in named else value for key, value in rule.items()}


def list_cells(suite: Suite, inputs: RunInputs) -> list[Cell]:
    """Every method on every one of its datasets."""
    return [Cell(suite, m, dataset, inputs) for m in suite.method for dataset in suite.datasets_of(m)]


def runs_per_cell(suite: Suite) -> tuple[int, int]:
    """Runs of the search and of the results, for a method on a dataset."""
    protocol = suite.protocol
    if suite.settings == 1:
        return 0, len(protocol.seeds)
    seeds = len(protocol.sweep_seeds)
    sweep = suite.settings * seeds if protocol.finalists is None else suite.settings + protocol.finalists * (seeds - 1)
    return sweep, len(protocol.seeds)
