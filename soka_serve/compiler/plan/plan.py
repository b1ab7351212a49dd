"""What a build would do, from the manifest, config.json and safetensors headers alone.

`make_plan` collects the facts, `soka_serve.compiler.plan.text.render_plan` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from soka_serve.base.foreign_code import check_no_adapter, check_no_code
from soka_serve.base.modules import ModelSize, Module, dtype_bytes, name_patterns
from soka_serve.base.plain_weights import check_plain_weights
from soka_serve.base.read_modules import read_modules
from soka_serve.base.resolve import resolve_base
from soka_serve.base.targets import Target, budget_groups, describe_not_adapted, resolve_targets
from soka_serve.compiler.plan.estimate import Memory, estimate_memory, lokr_parameters, lora_parameters
from soka_serve.compiler.plan.examples import DataPlan, mixes_rows, plan_data
from soka_serve.compiler.plan.policies import PolicyRow, policies_for
from soka_serve.errors import PlanError
from soka_serve.io.json_files import read_json
from soka_serve.kron.shapes import FactorShape, balanced_shape, parallel_of
from soka_serve.manifest.read import LoadedManifest
from soka_serve.manifest.schema import SERVED_PROJECTIONS, Manifest, Prune, Train

_CONFIGS = Path(__file__).parents[2] / "builtin" / "configs"


@dataclass(frozen=True)
class StageStatus:
    """A stage of the build: what its result is filed under, and whether it is there already."""

    name: str
    key: str
    cached: bool
    reason: str = ""


@dataclass(frozen=True)
class ModulePlan:
    """One adapted module. Bounds are equal where nothing is left to the weights.

    `factor_shape` is (m, n, p, q); None for shape = "auto" and for the baselines. `trained_bytes_*` are those of the
    trained float32 factors, `weight_bytes` those of W as stored.
    """

    name: str
    layer: int | None
    out_features: int
    in_features: int
    dtype: str
    weight_bytes: int
    factor_shape: FactorShape | None
    shape_rule: str
    init: str
    policy: str
    rank_min: int
    rank_max: int
    parameters_min: int
    parameters_max: int
    rules: tuple[int, ...]

    @property
    def trained_bytes_max(self) -> int:
        """Most bytes of the trained factors, float32."""
        return 4 * self.parameters_max


@dataclass(frozen=True)
class Comparison:
    """A method over the same modules: what it trains, writes and needs."""

    name: str
    parameters_min: int
    parameters_max: int
    adapter_bytes: int
    memory: Memory


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
    def memory(self) -> Memory:
        """Estimated training memory of this manifest."""
        return self.comparisons[0].memory

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
    base_directory: Path | None = None,
    stages: Sequence[StageStatus] | str | None = None,
    policies: int | None = None,
) -> Plan:
    """Plan a build.

    Args:
        loaded: the manifest.
        base_directory: directory of the base, where the caller has it already; else it is resolved without weights (a
            hub that cannot be reached is replaced by the config inside the package, if there is one).
        stages: what is cached and what would run, from `status.stage_statuses`, or why that is not known.
        policies: also list rules that give about so many trainable parameters.

    Raises:
        CheckpointError: the base's config or headers cannot be read, or it needs code of its own.
        PlanError: the rules do not fit the base.
        DataError: the data is there, but malformed, or a template names a column that it lacks.

    Data or a tokenizer that cannot be reached is no error here: the plan says so in `data.problem`.
    """
    manifest, train = loaded.manifest, loaded.manifest.train
    directory = base_directory or resolve_base(manifest.base, manifest_dir=loaded.directory, weights=False)
    check_no_code(directory)
    check_no_adapter(directory)
    check_plain_weights(directory)
    base = read_modules(directory)
    modules = base.modules
    targets = resolve_targets(manifest, modules, base.left_out)
    size = base.size
    notes: list[str] = []
    if train.method == "soka":
        planned = plan_modules(manifest, targets, notes)
        low, high = total_parameters(manifest, targets, planned)
    else:
        planned = _plan_baseline(train, targets)
        low = high = size.parameters if train.method == "full" else sum(m.parameters_max for m in planned)
    others = [t.module.name for t in targets if t.module.projection not in SERVED_PROJECTIONS]
    if others and train.method != "full":
        notes.append(
            f"{len(others)} modules ({name_patterns(others)}) can be merged, but `soka-serve serve` does not serve "
            f"adapters on them; it serves {', '.join(SERVED_PROJECTIONS)}"
        )
    if (unused := base.describe_unused()) is not None:
        notes.append(unused)
    bundled = directory.parent == _CONFIGS
    if bundled:
        notes.append("the hub could not be reached: shapes come from the config inside the package")
    if train.packing and mixes_rows(read_json(directory / "config.json")):
        notes.append(
            "train.packing: the base has convolutions or recurrent layers, which mix the examples of a row; `build` "
            "measures it before training, and refuses"
        )
    base_dtype = size.dtype if manifest.base.dtype == "auto" else manifest.base.dtype
    comparisons = _compare(manifest, targets, modules, size, base_dtype, (low, high))
    return Plan(
        name=str(manifest.name),
        manifest=str(loaded.path),
        base=manifest.base.hub or manifest.base.path or f"builtin:{manifest.base.builtin}",
        bundled_config=bundled,
        has_weights=any(directory.glob("*.safetensors")),
        size=size,
        base_dtype=base_dtype,
        quantize=manifest.base.quantize,
        method=train.method,
        modules=tuple(planned),
        parameters_min=low,
        parameters_max=high,
        adapter_bytes=comparisons[0].adapter_bytes,
        adapter_dtype=manifest.output.adapter_dtype,
        comparisons=comparisons,
        batch_tokens=train.batch_size * train.max_length,
        data=plan_data(manifest, loaded.directory, directory, hub_down=bundled),
        stages=None if stages is None or isinstance(stages, str) else tuple(stages),
        stages_problem=stages if isinstance(stages, str) else None,
        policies=() if policies is None else tuple(policies_for(modules, policies)),
        notes=tuple(notes),
        not_adapted=() if train.method == "full" else tuple(describe_not_adapted(base, targets)),
    )


# --------------------------------------------------------------------------------------------------------- modules


def plan_modules(manifest: Manifest, targets: Sequence[Target], notes: list[str]) -> list[ModulePlan]:
    """Shapes, rank bounds and parameter bounds of every target; appends remarks to `notes`.

    Raises:
        PlanError: a budget that cannot pay for its `min` terms.
    """
    budgets = {t.module.name: group for group in budget_groups(manifest, targets).values() for t in group}
    problems = []
    for index, group in budget_groups(manifest, targets).items():
        policy = manifest.adapt[index].rank
        least = sum(
            _cost(t) * min(t.rule.rank.min, _shape(t).max_rank) for t in group if t.rule.rank.policy == "budget"
        )
        if policy.policy == "budget" and least > policy.parameters:
            problems.append(
                f"adapt[{index}].rank: {len(group)} modules with min = {policy.min} need {least:,} parameters; the "
                f"budget is {policy.parameters:,}"
            )
        cheapest = min(_cost(t) for t in group)
        if policy.policy == "budget" and not least and policy.parameters < cheapest:
            problems.append(
                f"adapt[{index}].rank: the budget of {policy.parameters:,} parameters does not buy one term; the "
                f"cheapest has {cheapest:,}"
            )
    if problems:
        raise PlanError("\n".join(problems), hint="Raise `parameters`, or lower `min`, or adapt fewer modules.")
    capped = [t for t in targets if t.rule.rank.policy == "fixed" and t.rule.rank.rank > _shape(t).max_rank]
    if capped:
        shape = _shape(capped[0])
        notes.append(
            f"{len(capped)} modules ask for more terms than their shape has, and get all of them (such as "
            f"{capped[0].module.name}: {shape.max_rank})"
        )
    if any(t.shape is None for t in targets):
        notes.append("shape = 'auto' is searched when the weights are read; it never costs more than the balanced one")
    train = manifest.train
    if train.prune is not None:
        notes.append("train.prune may drop terms while training: ranks and parameters are the most there can be")
    frozen = [key for key in ("left_lr", "right_lr", "sigma_lr") if getattr(train, key) == 0]
    if frozen:
        notes.append(f"{' and '.join(frozen)} = 0: those factors stay as they start, and count here all the same")
    if train.steps == 0 and (idle := [t for t in targets if t.rule.init != "delta"]):
        notes.append(
            f"steps = 0: {len(idle)} modules start at zero change (only init = 'delta' starts with one) and stay there"
        )
    return [_plan_module(t, budgets.get(t.module.name), train.prune) for t in targets]


def _shape(target: Target) -> FactorShape:
    """The factor shape, or for 'auto' the balanced one, which bounds it: 'auto' searches at equal parameters."""
    if target.shape is not None:
        return target.shape
    module = target.module
    return balanced_shape(module.out_features, module.in_features, tp=target.rule.tp, parallel=parallel_of(module.name))


def _cost(target: Target) -> int:
    return _shape(target).parameters(1)


def _plan_module(target: Target, group: Sequence[Target] | None, prune: Prune | None) -> ModulePlan:
    module, rule, policy, shape = target.module, target.rule, target.rule.rank, _shape(target)
    if policy.policy == "fixed":
        low = high = policy.rank
    elif policy.policy == "budget":
        others = sum(_cost(t) * policy.min for t in group or () if t is not target)
        low, high = policy.min, min(policy.max, (policy.parameters - others) // _cost(target))
    else:
        low, high = policy.min, policy.max
    if prune is not None:
        low = min(low, prune.min)
    low, high = min(low, shape.max_rank), min(high, shape.max_rank)
    fewest = shape.parameters(low)
    if target.shape is None and low:
        # At equal parameters another shape has fewer, larger terms: at worst one that costs just over half of them.
        fewest = max(fewest // 2, _cost(target))
    explicit = isinstance(rule.shape, tuple)
    return ModulePlan(
        name=module.name,
        layer=module.layer,
        out_features=module.out_features,
        in_features=module.in_features,
        dtype=module.dtype,
        weight_bytes=module.out_features * module.in_features * dtype_bytes(module.dtype),
        factor_shape=target.shape,
        shape_rule="explicit" if explicit else str(rule.shape),
        init=rule.init,
        policy=policy.policy,
        rank_min=low,
        rank_max=high,
        parameters_min=fewest,
        parameters_max=shape.parameters(high),
        rules=target.rules,
    )


def total_parameters(manifest: Manifest, targets: Sequence[Target], planned: Sequence[ModulePlan]) -> tuple[int, int]:
    """Fewest and most trainable parameters; a budget is spent to within its largest term, and never exceeded."""
    by_name = {m.name: m for m in planned}
    low = sum(m.parameters_min for m in planned if m.policy != "budget")
    high = sum(m.parameters_max for m in planned if m.policy != "budget")
    for index, group in budget_groups(manifest, targets).items():
        policy = manifest.adapt[index].rank
        if policy.policy != "budget":
            continue
        most = min(sum(by_name[t.module.name].parameters_max for t in group), policy.parameters)
        least = sum(by_name[t.module.name].parameters_min for t in group)
        high += most
        if manifest.train.prune is not None:
            low += least
            continue
        low += most if most < policy.parameters else max(least, most - max(_cost(t) for t in group) + 1)
    return low, high


def _plan_baseline(train: Train, targets: Sequence[Target]) -> list[ModulePlan]:
    """The targets as a PEFT baseline or full fine-tuning adapts them."""
    planned = []
    for target in targets:
        module = target.module
        count = _baseline_parameters(train.method, module, train.method_rank)
        rank = 0 if train.method == "full" else train.method_rank
        planned.append(
            ModulePlan(
                name=module.name,
                layer=module.layer,
                out_features=module.out_features,
                in_features=module.in_features,
                dtype=module.dtype,
                weight_bytes=module.out_features * module.in_features * dtype_bytes(module.dtype),
                factor_shape=None,
                shape_rule="",
                init=train.method,
                policy="fixed",
                rank_min=rank,
                rank_max=rank,
                parameters_min=count,
                parameters_max=count,
                rules=target.rules,
            )
        )
    return planned


def _baseline_parameters(method: str, module: Module, rank: int) -> int:
    if method == "full":
        return module.out_features * module.in_features
    return lokr_parameters(module, rank) if method == "lokr" else lora_parameters(module, rank)


def _compare(
    manifest: Manifest,
    targets: Sequence[Target],
    modules: Sequence[Module],
    size: ModelSize,
    base_dtype: str,
    own: tuple[int, int],
) -> tuple[Comparison, ...]:
    """This manifest first, then LoRA and PiSSA at ranks 1, 2, 8 and 16 over the same modules, then full fine-tuning."""
    train, width = manifest.train, dtype_bytes(manifest.output.adapter_dtype)

    def memory(method: Literal["soka", "lora", "pissa", "lokr", "full"], trained: int, initial: int = 0) -> Memory:
        return estimate_memory(
            size,
            modules,
            method=method,
            trained=trained,
            initial=initial,
            tokens=train.batch_size * train.max_length,
            base_dtype=base_dtype,
            quantize=manifest.base.quantize,
            precision=train.precision,
            gradient_checkpointing=train.gradient_checkpointing,
        )

    low, high = own
    merged = size.parameters * dtype_bytes(base_dtype)
    stored = high
    if train.method == "soka":
        # A delta of two sets of r terms has at most 2r: what is exported after init = weights, gradient or random.
        subtracted = high if any(t.rule.init in ("weights", "gradient", "random") for t in targets) else 0
        stored = high + subtracted
        first = Comparison("this manifest (soka)", low, high, stored * width, memory("soka", high, subtracted))
    else:
        stored = 2 * high if train.method == "pissa" else high
        size_bytes = merged if train.method == "full" else stored * 4
        first = Comparison(f"this manifest ({train.method})", low, high, size_bytes, memory(train.method, high))
    rows = [first]
    for rank in (1, 2, 8, 16):
        count = sum(lora_parameters(t.module, rank) for t in targets)
        rows.append(Comparison(f"LoRA r={rank}", count, count, count * 4, memory("lora", count)))
    for rank in (8, 16):
        count = sum(lora_parameters(t.module, rank) for t in targets)
        # PiSSA's delta, B A - B0 A0, is written as a LoRA of twice the rank.
        rows.append(Comparison(f"PiSSA r={rank}", count, count, 2 * count * 4, memory("pissa", count)))
    rows.append(Comparison("full fine-tuning", size.parameters, size.parameters, merged, memory("full", 0)))
    return tuple(rows)
