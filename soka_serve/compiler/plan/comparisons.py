"""The manifest's method and others over the same modules: parameters, bytes on disk, training memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from soka_serve.base.modules import dtype_bytes
from soka_serve.base.target_modules import TargetModule
from soka_serve.compiler.methods import FULL, LORA, METHODS, PISSA, Method
from soka_serve.compiler.plan.estimate import MemoryEstimate, TrainingSetup, estimate_memory
from soka_serve.compiler.plan.modules import TrainingPlan
from soka_serve.manifest.schema import Manifest

# Ranks of the methods that every plan compares with.
_REFERENCES = ((LORA, (1, 2, 8, 16)), (PISSA, (8, 16)))


@dataclass(frozen=True)
class Comparison:
    """A method over the same modules: what it trains, writes and needs."""

    name: str
    parameters_min: int
    parameters_max: int
    adapter_bytes: int
    memory: MemoryEstimate


def compare_methods(
    manifest: Manifest, targets: Sequence[TargetModule], planned: TrainingPlan, setting: TrainingSetup
) -> tuple[Comparison, ...]:
    """This manifest first, then LoRA and PiSSA at some ranks over the same modules, then full fine-tuning."""
    rows = [_own(manifest, targets, planned, setting)]
    for method, ranks in _REFERENCES:
        for rank in ranks:
            count = sum(method.parameters(t.module, rank) for t in targets)
            rows.append(_row(f"{method.label} r={rank}", method, (count, count), setting))
    whole = setting.size.parameters
    rows.append(_row(FULL.label, FULL, (whole, whole), setting))
    return tuple(rows)


def _own(
    manifest: Manifest, targets: Sequence[TargetModule], planned: TrainingPlan, setting: TrainingSetup
) -> Comparison:
    method = METHODS[manifest.train.method]
    low, high = planned.parameters_min, planned.parameters_max
    name = f"this manifest ({method.name})"
    if not method.kronecker:
        return _row(name, method, (low, high), setting)
    # A delta of two sets of r terms has at most 2r: what is exported, in full, where the start is subtracted. It has r
    # where the two share a factor.
    plain = max(high - planned.formed_trained, 0)
    subtracted = plain if any(t.rule.start.stores_frozen for t in targets) else 0
    served = plain + (subtracted if manifest.output.adapter_terms != "trained" else 0) + planned.formed_stored
    stored = served * dtype_bytes(manifest.output.adapter_dtype)
    frozen = subtracted + planned.formed_frozen
    return Comparison(name, low, high, stored, estimate_memory(setting, trained=high, frozen=frozen))


def _row(name: str, method: Method, parameters: tuple[int, int], setting: TrainingSetup) -> Comparison:
    """A method that stores float32, or the whole model in the base's dtype."""
    low, high = parameters
    if method.whole_model:
        stored = setting.size.parameters * dtype_bytes(setting.base_dtype)
        return Comparison(name, low, high, stored, estimate_memory(setting, trained=None))
    return Comparison(name, low, high, method.stored_parameters(high) * 4, estimate_memory(setting, trained=high))
