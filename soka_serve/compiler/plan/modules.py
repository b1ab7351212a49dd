"""What training adapts and how much of it: every target's shape, rank and parameters, and the totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soka_serve.base.modules import ModelSize, Module, dtype_bytes
from soka_serve.base.target_modules import TargetModule, budget_groups
from soka_serve.compiler.methods import Method
from soka_serve.errors import PlanError
from soka_serve.kron.shapes import FactorShape, balanced_shape, parallel_of
from soka_serve.manifest.schema import Manifest, Prune
from soka_serve.starts import STARTS, names_of
from soka_serve.trained import PARTS


@dataclass(frozen=True)
class ModulePlan:
    """One adapted module. Bounds are equal where nothing is left to the weights.

    `factor_shape` is (m, n, p, q); None for shape = "auto" and for methods without Kronecker factors.
    `trained_bytes_max` are those of the trained float32 factors, `weight_bytes` those of W as stored.
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
class TrainingPlan:
    """The targets with their bounds, the bounds of the trainable parameters in all, and remarks for people.

    Of modules of which not everything is trained (`Form`): `formed_trained`, `formed_frozen` and `formed_stored` are
    the most values that are trained, that lie beside them in training, and that the finished adapter holds.
    """

    modules: tuple[ModulePlan, ...]
    parameters_min: int
    parameters_max: int
    notes: tuple[str, ...] = ()
    formed_trained: int = 0
    formed_frozen: int = 0
    formed_stored: int = 0


def plan_training(manifest: Manifest, targets: Sequence[TargetModule], method: Method, size: ModelSize) -> TrainingPlan:
    """Shapes, ranks and parameters of every target, and the totals.

    Args:
        manifest: its rules, and its [train] but for the method.
        targets: what the rules adapt.
        method: what is trained.
        size: the base's.

    Raises:
        PlanError: a budget that cannot pay for its `min` terms.
    """
    if method.kronecker:
        return _plan_kronecker(manifest, targets)
    rank = manifest.train.method_rank
    planned = tuple(_plan_ranked(target, method, rank if method.ranked else 0) for target in targets)
    total = size.parameters if method.whole_model else sum(m.parameters_max for m in planned)
    return TrainingPlan(planned, total, total)


def _plan_kronecker(manifest: Manifest, targets: Sequence[TargetModule]) -> TrainingPlan:
    _check_budgets(manifest, targets)
    budgets = {t.module.name: group for group in budget_groups(manifest, targets).values() for t in group}
    planned = tuple(_plan_module(t, budgets.get(t.module.name), manifest.train.prune) for t in targets)
    formed = [(t, m) for t, m in zip(targets, planned, strict=True) if t.rule.form.choices]
    whole = manifest.output.adapter_terms != "trained"
    frozen = stored = 0
    for target, module in formed:
        form, shape, subtracted = target.rule.form, _shape(target), target.rule.start.stores_frozen
        values = shape.parameters(module.rank_max)
        frozen += values * (2 if subtracted else 1) - form.trained_factors(module.rank_max, shape)
        stored += shape.parameters(form.served(module.rank_max, subtracted=subtracted and whole))
    return TrainingPlan(
        planned,
        *_total_parameters(manifest, targets, planned),
        notes=tuple(_remarks(manifest, targets)),
        formed_trained=sum(module.parameters_max for _, module in formed),
        formed_frozen=frozen,
        formed_stored=stored,
    )


def _check_budgets(manifest: Manifest, targets: Sequence[TargetModule]) -> None:
    """Raise PlanError for budgets that cannot pay for their `min` terms, or for any term."""
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


def _remarks(manifest: Manifest, targets: Sequence[TargetModule]) -> list[str]:
    """What people should know of the rules and of [train] before they build."""
    notes: list[str] = []
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
    frozen = [
        f"{part}_lr"
        for part in PARTS
        if getattr(train, f"{part}_lr") == 0 and any(part not in t.rule.form.frozen for t in targets)
    ]
    if frozen:
        notes.append(f"{' and '.join(frozen)} = 0: those factors stay as they start, and count here all the same")
    if train.steps == 0 and (idle := [t for t in targets if not t.rule.start.moves_base]):
        changing = names_of(start for start in STARTS.values() if start.moves_base)
        notes.append(
            f"steps = 0: {len(idle)} modules start at zero change (only init = {changing} starts with one) and stay "
            "there"
        )
    return notes


def _shape(target: TargetModule) -> FactorShape:
    """The factor shape, or for 'auto' the balanced one, which bounds it: 'auto' searches at equal parameters."""
    if target.shape is not None:
        return target.shape
    module = target.module
    return balanced_shape(module.out_features, module.in_features, tp=target.rule.tp, parallel=parallel_of(module.name))


def _cost(target: TargetModule) -> int:
    return target.rule.form.parameters(1, _shape(target))


def _plan_module(target: TargetModule, group: Sequence[TargetModule] | None, prune: Prune | None) -> ModulePlan:
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
    fewest = rule.form.parameters(low, shape)
    if target.shape is None and low:
        # At equal parameters another shape has fewer, larger terms: at worst one that costs just over half of them.
        fewest = max(fewest // 2, _cost(target))
    explicit = isinstance(rule.shape, tuple)
    return ModulePlan(
        **_base_columns(module),
        factor_shape=target.shape,
        shape_rule="explicit" if explicit else str(rule.shape),
        init=rule.start.name,
        policy=policy.policy,
        rank_min=low,
        rank_max=high,
        parameters_min=fewest,
        parameters_max=rule.form.parameters(high, shape),
        rules=target.rules,
    )


def _total_parameters(
    manifest: Manifest, targets: Sequence[TargetModule], planned: Sequence[ModulePlan]
) -> tuple[int, int]:
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


def _plan_ranked(target: TargetModule, method: Method, rank: int) -> ModulePlan:
    """A target as a method without Kronecker factors adapts it; rank 0 for methods that take none."""
    count = method.parameters(target.module, rank)
    return ModulePlan(
        **_base_columns(target.module),
        factor_shape=None,
        shape_rule="",
        init=method.name,
        policy="fixed",
        rank_min=rank,
        rank_max=rank,
        parameters_min=count,
        parameters_max=count,
        rules=target.rules,
    )


def _base_columns(module: Module) -> dict[str, Any]:
    """The fields of a ModulePlan that the base gives."""
    return {
        "name": module.name,
        "layer": module.layer,
        "out_features": module.out_features,
        "in_features": module.in_features,
        "dtype": module.dtype,
        "weight_bytes": module.out_features * module.in_features * dtype_bytes(module.dtype),
    }
