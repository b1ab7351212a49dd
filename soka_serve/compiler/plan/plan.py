"""What a build would do, from the manifest, config.json and safetensors headers alone.

`make_plan` collects the facts, `soka_serve.compiler.plan.text.render_plan` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from soka_serve.base.base import Base
from soka_serve.base.modules import BaseModules, ModelSize, name_patterns
from soka_serve.base.resolve import resolve_base
from soka_serve.base.target_modules import TargetModule, describe_not_adapted, resolve_targets
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.plan.comparisons import Comparison, compare_methods
from soka_serve.compiler.plan.decay import check_decay
from soka_serve.compiler.plan.estimate import MemoryEstimate, TrainingSetup
from soka_serve.compiler.plan.examples import DataPlan, mixes_rows, plan_data
from soka_serve.compiler.plan.given import settle_targets
from soka_serve.compiler.plan.modules import ModulePlan, plan_training
from soka_serve.compiler.plan.policies import PolicyRow, policies_for
from soka_serve.compiler.unread import unread_keys
from soka_serve.manifest.read import LoadedManifest
from soka_serve.manifest.rules import SERVED_PROJECTIONS
from soka_serve.manifest.schema import Manifest

_CONFIGS = Path(__file__).parents[2] / "builtin" / "configs"


STOPS = "a build would stop: "  # before the error, in `Plan.stages_problem`


@dataclass(frozen=True)
class StageStatus:
    """A stage of the build: what its result is filed under, and whether it is there already."""

    name: str
    key: str
    cached: bool
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything `soka-serve plan` shows. `bundled_config` is True when the hub's config was replaced by ours;
    `stages_problem` says why `stages` is None, where somebody asked. `not_adapted` names the modules of the base that
    stay as they are, each entry with its reason."""

    name: str
    manifest: str
    base: str
    bundled_config: bool
    has_weights: bool
    size: ModelSize
    base_dtype: str
    quantize: str
    method: str
    modules: tuple[ModulePlan, ...]
    parameters_min: int
    parameters_max: int
    adapter_bytes: int
    adapter_dtype: str
    comparisons: tuple[Comparison, ...]
    batch_tokens: int
    data: DataPlan
    stages: tuple[StageStatus, ...] | None
    stages_problem: str | None
    policies: tuple[PolicyRow, ...]
    notes: tuple[str, ...]
    not_adapted: tuple[str, ...]

    @property
    def memory(self) -> MemoryEstimate:
        """Estimated training memory of this manifest."""
        return self.comparisons[0].memory

    def with_stages(self, stages: Sequence[StageStatus] | str) -> Plan:
        """With what is cached and what would run, from `status.stage_statuses`, or why that is not known."""
        if isinstance(stages, str):
            return replace(self, stages=None, stages_problem=stages)
        return replace(self, stages=tuple(stages), stages_problem=None)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        value = asdict(self)
        for entry, comparison in zip(value["comparisons"], self.comparisons, strict=True):
            entry["memory"]["total"] = comparison.memory.total
        value["data"]["exact"] = self.data.exact
        return value


def make_plan(
    loaded: LoadedManifest,
    *,
    base: Base | None = None,
    policies: int | None = None,
) -> Plan:
    """Plan a build.

    Args:
        loaded: the manifest.
        base: its base, where the caller has opened it already; else it is resolved without weights (a hub that cannot
            be reached is replaced by the config inside the package, if there is one).
        policies: also list rules that give about so many trainable parameters.

    Raises:
        CheckpointError: the base's config or headers cannot be read, or it needs code of its own.
        PlanError: the rules do not fit the base.
        DataError: the data is there, but malformed, or a template names a column that it lacks.

    Data or a tokenizer that cannot be reached is no error here: the plan says so in `data.problem`.
    """
    manifest, train = loaded.manifest, loaded.manifest.train
    base = base or resolve_base(manifest.base, manifest_dir=loaded.directory, weights=False, name_key=loaded.name_key)
    base.check_adaptable()
    layout = base.layout
    targets = resolve_targets(manifest, layout.modules, layout.left_out, loaded.name_key)
    targets, _ = settle_targets(targets, manifest, loaded.directory, loaded.name_key)
    check_decay(manifest, targets, loaded.name_key)
    size, method = layout.size, METHODS[train.method]
    planned = plan_training(manifest, targets, method, size)
    bundled = base.directory.parent == _CONFIGS
    setting = _memory_setting(manifest, layout)
    comparisons = compare_methods(manifest, targets, planned, setting)
    return Plan(
        name=str(manifest.name),
        manifest=str(loaded.path),
        base=manifest.base.hub or manifest.base.path or f"builtin:{manifest.base.builtin}",
        bundled_config=bundled,
        has_weights=base.has_weights,
        size=size,
        base_dtype=setting.base_dtype,
        quantize=manifest.base.quantize,
        method=method.name,
        modules=planned.modules,
        parameters_min=planned.parameters_min,
        parameters_max=planned.parameters_max,
        adapter_bytes=comparisons[0].adapter_bytes,
        adapter_dtype=manifest.output.adapter_dtype,
        comparisons=comparisons,
        batch_tokens=setting.tokens,
        data=plan_data(manifest, loaded.directory, base, hub_down=bundled),
        stages=None,
        stages_problem=None,
        policies=() if policies is None else tuple(policies_for(layout.modules, policies)),
        notes=(*planned.notes, *_remarks(manifest, base, targets)),
        not_adapted=() if method.whole_model else tuple(describe_not_adapted(layout, targets)),
    )


def _memory_setting(manifest: Manifest, layout: BaseModules) -> TrainingSetup:
    """What the manifest says that training memory depends on."""
    train = manifest.train
    held = layout.size.dtype if manifest.base.dtype == "auto" else manifest.base.dtype
    in_bits = manifest.base.quantize != "none" and manifest.base.dtype == "auto"
    computed = "float32" if METHODS[train.method].whole_model else "bfloat16" if in_bits else held
    return TrainingSetup(
        size=layout.size,
        modules=layout.modules,
        tokens=train.batch_size * train.max_length,
        base_dtype=held,
        quantize=manifest.base.quantize,
        precision=computed if train.precision == "auto" else train.precision,
        gradient_checkpointing=train.gradient_checkpointing,
    )


def _remarks(manifest: Manifest, base: Base, targets: Sequence[TargetModule]) -> list[str]:
    """What people should know of the base before they build."""
    notes = unread_keys(manifest)
    others = [t.module.name for t in targets if t.module.projection not in SERVED_PROJECTIONS]
    if others and not METHODS[manifest.train.method].whole_model:
        notes.append(
            f"{len(others)} modules ({name_patterns(others)}) can be merged, but `soka-serve serve` does not serve "
            f"adapters on them; it serves {', '.join(SERVED_PROJECTIONS)}"
        )
    if (unused := base.layout.describe_unused()) is not None:
        notes.append(unused)
    if base.directory.parent == _CONFIGS:
        notes.append("the hub could not be reached: shapes come from the config inside the package")
    if manifest.train.packing and mixes_rows(base.config):
        notes.append(
            "train.packing: the base has convolutions or recurrent layers, which mix the examples of a row; `build` "
            "measures it before training, and refuses"
        )
    return notes
