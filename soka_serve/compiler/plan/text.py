"""A plan as text for people."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.plan.examples import DataPlan, RenderedExample
from soka_serve.compiler.plan.modules import ModulePlan
from soka_serve.compiler.plan.plan import STOPS, Plan
from soka_serve.compiler.plan.policies import PolicyRow
from soka_serve.errors import printable, printable_lines
from soka_serve.io.text import size as bytes_text
from soka_serve.io.text import table
from soka_serve.starts import ROWS

_LAYER = re.compile(r"(layers\.)\d+(?=\.)")
_MAX_CHARS = 700  # of one example's prompt, and of its completion

_DIM, _BOLD, _GREEN, _OFF = "\033[2m", "\033[1m", "\033[32m", "\033[0m"


def render_plan(plan: Plan, *, every: bool = False, color: bool | None = None) -> str:
    """Render a plan.

    Args:
        plan: what `make_plan` returned.
        every: a line per module instead of one per kind.
        color: ANSI colours; None asks whether stdout is a terminal.
    """
    paint = sys.stdout.isatty() if color is None else color
    counted = (
        " (with those that a rate of 0 leaves as they start, by default σ)" if METHODS[plan.method].kronecker else ""
    )
    sections = [
        _head(plan),
        _section("Modules", _modules(plan, every), paint),
        _section(f"Trainable parameters{counted}", _parameters(plan), paint),
        _section(f"GPU memory, estimated for {plan.batch_tokens:,} tokens a batch", _memory(plan), paint),
        _section("Data", _data(plan.data), paint),
    ]
    if plan.data.shown:
        sections.append(_section("Examples (the loss is taken over ⟦ ⟧)", _examples(plan.data.shown, paint), paint))
    if plan.stages is not None or plan.stages_problem:
        sections.append(_section("Stages", _stages(plan), paint))
    if plan.policies:
        sections.append(_section("Rules near the budget", _policies(plan.policies, plan), paint))
    return "\n\n".join(sections)


def _section(title: str, body: str, paint: bool) -> str:
    return f"{_BOLD}{title}{_OFF}\n{body}" if paint else f"{title}\n{body}"


def _head(plan: Plan) -> str:
    size = plan.size
    held = plan.base_dtype if plan.quantize == "none" else f"{plan.quantize} ({plan.base_dtype} elsewhere)"
    source = "headers" if plan.has_weights else "config"
    lines = [
        f"{plan.name}: {plan.method} on {printable(plan.base)}",
        f"  base    {size.parameters:,} parameters in {size.layers} layers, stored as {size.dtype} "
        f"({bytes_text(size.weight_bytes)}), held as {held}; read from its {source}",
        *(f"  note    {printable(note, _MAX_CHARS)}" for note in plan.notes),
        *(f"  not adapted: {printable(entry, _MAX_CHARS)}" for entry in plan.not_adapted),
    ]
    return "\n".join(lines)


def _modules(plan: Plan, every: bool) -> str:
    groups: list[list[ModulePlan]] = [[m] for m in plan.modules] if every else _group(plan.modules)
    header = ("module", "W (out x in)", "W bytes", "left ⊗ right", "init", "rank", "parameters", "bytes")
    rows = [header]
    for group in groups:
        first = group[0]
        count = len(group)
        each = f" ({_bounds(first.parameters_min, first.parameters_max)} each)" if count > 1 else ""
        total = _bounds(count * first.parameters_min, count * first.parameters_max)
        rows.append(
            (
                _group_name(group),
                f"{first.out_features}x{first.in_features}",
                bytes_text(count * first.weight_bytes),
                _shape(first),
                first.init,
                "-" if METHODS[plan.method].whole_model else _rank(first),
                total + each,
                bytes_text(count * first.trained_bytes_max),
            )
        )
    return _table(rows, right=(1, 2, 7))


def _group(modules: Iterable[ModulePlan]) -> list[list[ModulePlan]]:
    """Modules that differ in the layer only, together."""
    groups: dict[ModulePlan, list[ModulePlan]] = {}
    for m in modules:
        key = replace(m, name=_LAYER.sub(r"\1*", m.name), layer=None, rules=())
        groups.setdefault(key, []).append(m)
    return list(groups.values())


def _group_name(group: Sequence[ModulePlan]) -> str:
    first = group[0]
    if len(group) == 1:
        return first.name
    layers = _ranges(sorted(m.layer for m in group if m.layer is not None))
    return _LAYER.sub(lambda match: match[1] + layers, first.name) + f" ×{len(group)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Compress sorted numbers: [0, 1, 2, 5] is '0-2,5'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _shape(module: ModulePlan) -> str:
    if module.factor_shape is None:
        return module.shape_rule or "-"
    m, n, p, q = module.factor_shape
    return f"{m}x{n} ⊗ {p}x{q}"


def _rank(module: ModulePlan) -> str:
    bounds = _bounds(module.rank_min, module.rank_max)
    return bounds if module.policy == "fixed" else f"{bounds} ({module.policy})"


def _parameters(plan: Plan) -> str:
    rows = [("", "parameters", "of the base", "on disk")]
    for comparison in plan.comparisons:
        share = comparison.parameters_max / plan.size.parameters
        bound = "up to " if comparison.parameters_min != comparison.parameters_max else ""
        rows.append(
            (
                comparison.name,
                _bounds(comparison.parameters_min, comparison.parameters_max),
                f"{bound}{share:.3%}",
                f"{'<= ' if comparison is plan.comparisons[0] else ''}{bytes_text(comparison.adapter_bytes)}",
            )
        )
    text = _table(rows, right=(1, 2, 3))
    if METHODS[plan.method].kronecker and any(ROWS[m.init].stores_frozen for m in plan.modules):
        text += "\n  On disk an adapter holds trained minus initial terms, at most twice as many as are trained "
        text += f"({plan.adapter_dtype})."
    return text


def _memory(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = [("", "base", "trained", "activations", "logits", "other", "total")]
    for comparison in plan.comparisons:
        memory = comparison.memory
        parts = (memory.base, memory.trained, memory.activations, memory.logits, memory.overhead, memory.total)
        rows.append((comparison.name, *map(bytes_text, parts)))
    note = "\n  Estimated, not measured; formulas and assumptions: soka_serve/compiler/plan/estimate.py."
    return _table(rows, right=range(1, 7)) + note


def _data(data: DataPlan) -> str:
    lines = [f"  {printable_lines(data.source)}"]
    if data.problem:
        lines.append(f"  {printable_lines(data.problem)}")
    total = "an unknown number of" if data.examples is None else f"{data.examples:,}"
    if data.sampled:
        lines[0] += f": {total} training examples"
    for part in data.parts:
        share = part.used / sum(one.used for one in data.parts)
        lines.append(f"  {share:.1%} of an epoch: {part.used:,} of {part.examples:,} of {printable_lines(part.source)}")
    if data.encoded and data.tokens is not None and data.trained_tokens is not None:
        sample = "" if data.exact else f" (of the first {data.sampled:,}, which the figures here are about)"
        counts = {"dropped as too long": data.dropped, "truncated": data.truncated}
        counts |= {"split where a token would have joined prompt and completion": data.boundary}
        cut = [f"{count:,} {what}" for what, count in counts.items() if count]
        lines.append(
            f"  {data.tokens:,} tokens, {data.trained_tokens:,} of them trained on; longest {data.longest:,}{sample}"
        )
        lines.append(f"  {', '.join(cut) if cut else 'none dropped or truncated'}")
    if data.reading:
        lines.append(f"  {printable_lines(data.reading)}")
    about = "" if data.exact else "about "
    if data.rows is not None:
        lines.append(f"  {about}{data.rows:,} rows an epoch")
    if data.steps is not None:
        lines.append(f"  {data.steps:,} optimiser steps")
    return "\n".join(lines)


def _examples(shown: Sequence[RenderedExample], paint: bool) -> str:
    blocks = []
    for number, example in enumerate(shown, start=1):
        size = "" if example.tokens is None else f" ({example.tokens} tokens, {example.trained_tokens} trained)"
        text = "".join(_segment(s.text, s.trained, paint) for s in example.segments)
        body = "\n".join("  | " + line for line in text.split("\n"))
        blocks.append(f"  {number}{size}\n{body}")
    return "\n".join(blocks)


def _segment(text: str, trained: bool, paint: bool) -> str:
    text = printable_lines(text)
    if len(text) > _MAX_CHARS:
        half = _MAX_CHARS // 2
        text = f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"
    marked = f"⟦{text}⟧" if trained else text
    if not paint:
        return marked
    style = _GREEN if trained else _DIM
    # Colours end with each line, since the lines get a prefix.
    return "\n".join(f"{style}{line}{_OFF}" for line in marked.split("\n"))


def _stages(plan: Plan) -> str:
    if plan.stages_problem:
        cause = plan.stages_problem.removeprefix(STOPS)
        if plan.data.problem and cause in plan.data.problem:
            return "  not known: a build would stop, see Data"
        return f"  not known: {printable_lines(plan.stages_problem)}"
    rows = [
        (stage.name, "cached" if stage.cached else "runs", stage.key[:12], stage.reason) for stage in plan.stages or ()
    ]
    return _table(rows) if rows else "  nothing to do"


def _policies(policies: Sequence[PolicyRow], plan: Plan) -> str:
    names = tuple(dict.fromkeys(name for row in policies for name in row.projections))
    rows = [("projections", "layers", "policy", "parameters", "of the base")]
    for row in policies:
        projections = (
            "all" if len(row.projections) == len(names) else ",".join(p.removesuffix("_proj") for p in row.projections)
        )
        layers = "all" if row.layers == "all" else f"last {row.layers.strip('-')}"
        policy = "budget" if row.rank is None else f"fixed, rank {row.rank}"
        bound = "<= " if row.rank is None else ""
        rows.append(
            (projections, layers, policy, f"{bound}{row.parameters:,}", f"{row.parameters / plan.size.parameters:.4%}")
        )
    example = "\n".join("  " + line for line in policies[0].toml.split("\n"))
    return f"{_table(rows, right=(3, 4))}\n  The first as TOML:\n{example}"


# ---------------------------------------------------------------------------------------------------------- pieces


def _bounds(low: int, high: int) -> str:
    return f"{high:,}" if low == high else f"{low:,}-{high:,}"


def _table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    return "\n".join(f"  {line}" for line in table(rows, right=right))
