"""Which rank policies give about so many trainable parameters on a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from soka_serve.base.modules import Module
from soka_serve.errors import PlanError
from soka_serve.kron.shapes import balanced_shape

# Shown even when others come closer: what people usually adapt.
USUAL_SETS = (
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True)
class PolicyRow:
    """One way to spend a budget: `parameters` (exact for a fixed rank, the most for a budget) and the rule's TOML."""

    projections: tuple[str, ...]
    layers: str
    policy: str
    rank: int | None
    parameters: int
    toml: str


def policies_for(modules: Sequence[Module], parameters: int = 990_000, *, closest: int = 4) -> list[PolicyRow]:
    """List rules whose trainable parameters come closest to `parameters` without exceeding it, balanced shapes.

    For every set of projections: the largest fixed rank on all layers, or, where rank 1 is already too much, rank 1 on
    as many of the last layers as fit. Listed are the usual sets, the `closest` totals on all layers and half as many
    on the last layers, by what they spend; the budget policy, which spends all but less than one term, comes last.

    Raises:
        PlanError: the budget is smaller than one term of every module.
    """
    layers = sorted({m.layer for m in modules if m.layer is not None})
    names = tuple(dict.fromkeys(m.projection for m in modules))
    cost: dict[tuple[str, int | None], int] = {}
    for m in modules:  # a layer may have several of one name, as in self- and cross-attention
        key = (m.projection, m.layer)
        cost[key] = cost.get(key, 0) + balanced_shape(m.out_features, m.in_features).parameters(1)
    if parameters < min(cost.values()):
        raise PlanError(f"{parameters} parameters are less than the cheapest term has ({min(cost.values())})")
    rows = []
    for size in range(1, len(names) + 1):
        for chosen in combinations(names, size):
            per_layer = [sum(cost.get((name, layer), 0) for name in chosen) for layer in layers]
            rank = parameters // sum(per_layer)
            if rank:
                rows.append(_fixed(chosen, "all", rank, rank * sum(per_layer)))
                continue
            fitting = next(n for n in range(len(layers) - 1, -1, -1) if sum(per_layer[len(layers) - n :]) <= parameters)
            if fitting and sum(per_layer[-fitting:]):
                rows.append(_fixed(chosen, f"-{fitting}-", 1, sum(per_layer[len(layers) - fitting :])))
    rows.sort(key=lambda row: (-row.parameters, len(row.projections)))
    usual = [row for row in rows if row.projections in {*USUAL_SETS, names}]
    best = [*_distinct(rows, everywhere=True)[:closest], *_distinct(rows, everywhere=False)[: closest // 2]]
    shown = sorted({*usual, *best}, key=lambda row: (-row.parameters, len(row.projections), row.projections))
    toml = f'[[adapt]]\ninit = "weights"\nrank = {{ policy = "budget", parameters = {parameters} }}'
    return [*shown, PolicyRow(names, "all", "budget", None, parameters, toml)]


def _distinct(rows: Sequence[PolicyRow], *, everywhere: bool) -> list[PolicyRow]:
    """The rows on all layers, or on some, one per total: q,k,v,gate and q,k,v,up cost the same."""
    first: dict[int, PolicyRow] = {}
    for row in rows:
        if (row.layers == "all") == everywhere:
            first.setdefault(row.parameters, row)
    return list(first.values())


def _fixed(projections: tuple[str, ...], layers: str, rank: int, parameters: int) -> PolicyRow:
    listed = ", ".join(f'"{name}"' for name in projections)
    lines = ["[[adapt]]", f"modules = [{listed}]"]
    if layers != "all":
        lines.append(f'layers = "{layers}"')
    lines.append(f'rank = {{ policy = "fixed", rank = {rank} }}')
    return PolicyRow(projections, layers, "fixed", rank, parameters, "\n".join(lines))
