"""Which modules of the base a manifest adapts, and by which rule.

`resolve_targets` lays the manifest's `[[adapt]]` rules over the modules that `soka_serve.base.read_modules` lists. A
module that several rules match takes each key from the last rule that sets it, so that a later rule changes only what
it names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from soka_serve.base.modules import BaseModules, Module, ModuleExclusion
from soka_serve.errors import PlanError
from soka_serve.io.warn_once import warn
from soka_serve.kron.shapes import FactorShape, balanced_shape, check_shape, parallel_of
from soka_serve.manifest.across import training_misfits
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.problems import dotted
from soka_serve.manifest.rules import Adapt, misfits
from soka_serve.manifest.schema import Manifest
from soka_serve.regularisers import REGULARISERS, Constraint
from soka_serve.starts import STARTS

logger = logging.getLogger(__name__)

_NOT_A_PROJECTION = {
    "lm_head": "the output head is not adapted: its vocabulary dimension is split by every serving engine",
    "embed_tokens": "the embedding is a table, not a linear projection",
}


@dataclass(frozen=True)
class TargetModule:
    """A module that is adapted, with the rule that holds for it after the cascade.

    `rules` are the indices of the `[[adapt]]` rules that matched, in order. `shape` is None for shape = 'auto', which
    only the weights can decide.
    """

    module: Module
    rule: Adapt
    rules: tuple[int, ...]
    shape: FactorShape | None


# ---------------------------------------------------------------------------------------------- rules over modules


def parse_layers(layers: str | Sequence[int], count: int) -> frozenset[int]:
    """Turn a rule's `layers` into layer numbers of a model with `count` layers.

    >>> sorted(parse_layers("-2-", 8))
    [6, 7]
    >>> sorted(parse_layers("2-4", 8))
    [2, 3, 4]

    Raises:
        PlanError: a layer outside 0 .. count − 1, a range that runs backwards, or text that is not a range.
    """
    last = count - 1
    if not isinstance(layers, str):
        outside = [layer for layer in layers if not 0 <= layer <= last]
        if outside:
            raise PlanError(f"layers {outside} are outside the model's 0-{last}")
        return frozenset(layers)
    if layers == "all":
        return frozenset(range(count))
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", layers):
        first, end = int(match[1]), int(match[2] or match[1])
        if first > end:
            raise PlanError(f"layers '{layers}' runs backwards; write '{end}-{first}'")
        if end > last:
            raise PlanError(f"layers '{layers}' is outside the model's 0-{last}")
        return frozenset(range(first, end + 1))
    if match := re.fullmatch(r"(\d+)-", layers):
        if int(match[1]) > last:
            raise PlanError(f"layers '{layers}' is outside the model's 0-{last}")
        return frozenset(range(int(match[1]), count))
    if match := re.fullmatch(r"-(\d+)-", layers):
        wanted = int(match[1])
        if not 1 <= wanted <= count:
            raise PlanError(f"layers '{layers}' asks for the last {wanted} layers; the model has {count}")
        return frozenset(range(count - wanted, count))
    raise PlanError(f"layers '{layers}': expected 'all', '0-15', '4-' (from 4 on), '-4-' (the last four), or a list")


def matches(pattern: str, module: Module) -> bool:
    """Whether a rule's pattern matches: a plain name the last component, one with '.', '*', '?', '[' the full name."""
    return _matches_name(pattern, module.name)


def _matches_name(pattern: str, name: str) -> bool:
    if any(char in pattern for char in ".*?["):
        return fnmatchcase(name, pattern)
    return name.rpartition(".")[2] == pattern


def _explain_no_match(pattern: str, modules: Sequence[Module], left_out: Sequence[ModuleExclusion]) -> str:
    """Say why a pattern matches nothing, with the nearest names."""
    word = pattern.rsplit(".", 1)[-1]
    for entry in left_out:
        if names := [name for name in entry.names if _matches_name(pattern, name)]:
            return f"'{pattern}' cannot be adapted: {ModuleExclusion(tuple(names), entry.reason).to_text()}"
    for name, reason in _NOT_A_PROJECTION.items():
        if name in pattern:
            return f"'{pattern}' cannot be adapted: {reason}"
    if "norm" in word:
        return f"'{pattern}' cannot be adapted: a norm is a vector, not a linear projection"
    projections = list(dict.fromkeys(m.projection for m in modules))
    if any(char in pattern for char in ".*?["):
        suffixed = [m.name for m in modules if m.name.endswith("." + pattern)]
        if suffixed:
            return f"'{pattern}' matches no module (patterns with a dot match full names); did you mean '*.{pattern}'?"
        near = get_close_matches(pattern, [m.name for m in modules], n=1, cutoff=0.6)
        if not near:
            near = get_close_matches(word, projections, n=1, cutoff=0.5)
    else:
        near = get_close_matches(pattern, projections, n=1, cutoff=0.5)
    tip = f"; did you mean '{near[0]}'?" if near else ""
    return f"'{pattern}' matches no module{tip} (the base has {', '.join(projections)})"


def resolve_targets(
    manifest: Manifest,
    modules: Sequence[Module],
    left_out: Sequence[ModuleExclusion] = (),
    name_key: Callable[[TomlPath], str] = dotted,
) -> list[TargetModule]:
    """Lay the manifest's rules over the base's modules.

    Args:
        manifest: the manifest.
        modules: what can be adapted of the base.
        left_out: what cannot, to say why a pattern matches nothing.
        name_key: what messages call a key of the manifest, such as `LoadedManifest.name_key`.

    Returns:
        One `TargetModule` per adapted module, in the order of `modules`.

    Raises:
        PlanError: everything that does not fit, in one error: patterns that match nothing, layers that are not there,
            shapes that do not divide or have too few terms, `init = 'delta'` without `finetuned`, `weighting` of
            nothing, nothing left enabled.
    """
    matched, problems = _match_rules(manifest.adapt, modules, left_out, name_key)
    chosen_rules = {name: cascade([manifest.adapt[i] for i in hits]) for name, hits in matched.items() if hits}
    enabled = [m for m in modules if m.name in chosen_rules and chosen_rules[m.name].enabled]
    if not enabled and not problems:
        problems.append(f"{name_key(('adapt',))}: no module is left enabled; there is nothing to train")
    targets = []
    failures: dict[tuple[TomlPath, str], list[str]] = {}  # key, message -> modules: 32 layers, one line
    for module in enabled:
        rule, hits_of = chosen_rules[module.name], tuple(matched[module.name])
        if rule.start.source and not rule.source:
            index = _setter(manifest, hits_of, "init")
            message = f"{rule.init!r} needs `{rule.start.source}`, {rule.start.source_is}"
            failures.setdefault((("adapt", index, "init"), message), []).append(module.name)
        found = list(misfits(rule.start, dict(rule)))
        found += [("weighting", problem)] if (problem := _weighting_problem(rule)) else []
        for key, message in found:
            setter = _setter(manifest, hits_of, key)
            failures.setdefault((("adapt", setter, key), message), []).append(module.name)
        for place, message in training_misfits(rule, manifest.train) if manifest.train.method == "soka" else ():
            failures.setdefault((place, message), []).append(module.name)
        try:
            target = TargetModule(module, rule, hits_of, _resolve_shape(module, rule))
            targets.append(target)
            for place, message in () if rule.start.given else beyond_shape(manifest, target):
                failures.setdefault((place, message), []).append(module.name)
        except PlanError as error:
            index = _setter(manifest, hits_of, "tp" if rule.tp > 1 and not isinstance(rule.shape, tuple) else "shape")
            message = error.message.replace(module.name, module.projection)
            failures.setdefault((("adapt", index, "shape"), message), []).append(module.name)
    for (place, message), names in failures.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problems.append(f"{name_key(place)}: {message} ({names[0]}{more})")
    if problems:
        raise PlanError("\n".join(problems), hint="`soka-serve inspect BASE` lists a base's modules and shapes.")
    _warn_unused(manifest, targets)
    return targets


def beyond_shape(manifest: Manifest, target: TargetModule) -> Iterator[tuple[TomlPath, str]]:
    """What the manifest asks of a target that its factor shape, where that is known, has too few terms for.

    Yields:
        The key, and why.
    """
    rule, shape, train = target.rule, target.shape, manifest.train
    if shape is None or train.method != "soka":
        return
    most, has = shape.max_rank, f"the factor shape {list(shape)} has {shape.max_rank}"
    if rule.start.cuts and rule.rank.policy == "fixed" and rule.rank.rank >= most:
        taken = f"{rule.start.written} takes {rule.rank.rank} terms off the weight"
        place = ("adapt", _setter(manifest, target.rules, "rank"), "rank")
        yield place, f"{taken}; {has}: nothing would be left; lower the rank, or choose another shape or start"
    if rule.extra_terms > most:
        place = ("adapt", _setter(manifest, target.rules, "extra_terms"), "extra_terms")
        yield place, f"expected at most as many terms as there can be; got {rule.extra_terms}, and {has}"
    for name, count in train.regularise.chosen.items():
        if isinstance(row := REGULARISERS[name], Constraint) and (problem := row.misfit(shape, int(count))):
            yield ("train", "regularise", name), problem


def _match_rules(
    rules: Sequence[Adapt],
    modules: Sequence[Module],
    left_out: Sequence[ModuleExclusion],
    name_key: Callable[[TomlPath], str],
) -> tuple[dict[str, list[int]], list[str]]:
    """By module name the indices of the rules that match it, and what is wrong with their patterns and layers."""
    problems: list[str] = []
    count = 1 + max((m.layer for m in modules if m.layer is not None), default=-1)
    matched: dict[str, list[int]] = {m.name: [] for m in modules}
    for index, rule in enumerate(rules):
        try:
            layers = parse_layers(rule.layers, count)
        except PlanError as error:
            problems.append(f"{name_key(('adapt', index, 'layers'))}: {error.message}")
            layers = frozenset(range(count))
        chosen = {m.name for pattern in rule.modules for m in modules if matches(pattern, m)}
        for pattern in rule.modules:
            if not any(matches(pattern, m) for m in modules):
                key = name_key(("adapt", index, "modules"))
                problems.append(f"{key}: {_explain_no_match(pattern, modules, left_out)}")
        hits = [m for m in modules if m.name in chosen and m.layer in layers]
        if chosen and not hits:
            problems.append(f"{name_key(('adapt', index))}: matches no module in layers {rule.layers!r}")
        for module in hits:
            matched[module.name].append(index)
    return matched, problems


def describe_not_adapted(base: BaseModules, targets: Sequence[TargetModule]) -> list[str]:
    """What of a base stays as it is: modules that no rule can adapt, and those that no rule of the manifest does.

    Args:
        base: the base.
        targets: what is adapted; empty to hear of what cannot be only.

    Returns:
        A line per reason: names, with '*' for layers, and the reason.
    """
    lines = [entry.to_text() for entry in base.left_out]
    adapted = {target.module.name for target in targets}
    if targets and (others := tuple(m.name for m in base.modules if m.name not in adapted)):
        lines.insert(0, ModuleExclusion(others, "no rule adapts them").to_text())
    return lines


def cascade(rules: Sequence[Adapt]) -> Adapt:
    """One rule that takes each key from the last of `rules` that sets it."""
    values = {key: getattr(rule, key) for rule in rules for key in sorted(rule.model_fields_set)}
    return Adapt().model_copy(update=values)


def _weighting_problem(rule: Adapt) -> str | None:
    if rule.weighting != "both":
        return None
    if rule.shape == "auto":
        return "'both' needs a factor shape that is known beforehand; shape is 'auto'"
    if rule.start.needs_gradient or not rule.batches:
        given = "" if rule.start.needs_gradient else " and no calibration_batches"
        return f"'both' weights a decomposition by calibration batches; there is none with {rule.start.written}{given}"
    return None


def _resolve_shape(module: Module, rule: Adapt) -> FactorShape | None:
    parallel = parallel_of(module.name)
    size = (module.out_features, module.in_features)
    if isinstance(rule.shape, tuple):
        return check_shape(FactorShape(*rule.shape), *size, module=module.name, tp=rule.tp, parallel=parallel)
    # For 'auto' too: it says now, not after hours of reading weights, that no shape can be.
    balanced = balanced_shape(*size, tp=rule.tp, parallel=parallel)
    return None if rule.shape == "auto" else balanced


def _setter(manifest: Manifest, indices: Sequence[int], key: str) -> int:
    """Index of the rule whose `key` holds: the last that sets it, else the last that matched."""
    return next((i for i in reversed(indices) if key in manifest.adapt[i].model_fields_set), indices[-1])


def budget_groups(manifest: Manifest, targets: Sequence[TargetModule]) -> dict[int, list[TargetModule]]:
    """Targets with a budget policy by the index of the rule whose budget they share.

    Two rules that each set a budget have a budget each.
    """
    groups: dict[int, list[TargetModule]] = {}
    for target in targets:
        if target.rule.rank.policy == "budget":
            groups.setdefault(_setter(manifest, target.rules, "rank"), []).append(target)
    return groups


def _warn_unused(manifest: Manifest, targets: Sequence[TargetModule]) -> None:
    """Log rules and keys that have no effect, since nothing is ignored silently."""
    used = {index for target in targets for index in target.rules}
    for index, rule in enumerate(manifest.adapt):
        mine = [t for t in targets if index in t.rules]
        if rule.enabled and index not in used:
            warn(logger, "adapt[%d] has no effect: later rules disable every module it matches", index)
        for start in STARTS.values():
            if (key := start.source) and getattr(rule, key) and mine and all(t.rule.start.source != key for t in mine):
                warn(logger, "adapt[%d].%s has no effect: init is not '%s'", index, key, start.name)
        if rule.calibration_batches and mine and all(t.rule.start.unweighed for t in mine):
            warn(logger, "adapt[%d].calibration_batches has no effect: init is '%s'", index, mine[0].rule.init)
