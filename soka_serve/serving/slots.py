"""How many values of a SoKA adapter a GPU's slot must hold, alone or in a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Mapping

from soka_serve.kron.shapes import FactorShape, parallel_of
from soka_serve.kron.sharding import Heads, Shard, column_parallel, qkv_parallel, row_parallel, values_after_cut


def slot_values(
    factors: Mapping[str, tuple[int, FactorShape]], ranks: int, kv_heads: int | None, heads: int | None = None
) -> int:
    """Values of an adapter's factors on the rank that has most of them, all layers together.

    Args:
        factors: number of terms and factor shape of each module, by its full name.
        ranks: size of the tensor-parallel group.
        kv_heads: key/value heads of the base; None: not known, and every rank is taken to hold k and v whole.
        heads: its query heads; None: not known, and every rank is taken to hold a fused q, k and v whole.
    """

    def on_rank(rank: int) -> int:
        total = 0
        for name, (terms, shape) in factors.items():
            for shard in _shards(name, shape, rank, ranks, kv_heads, heads):
                total += terms * values_after_cut(shape, shard.rows, shard.columns)
        return total

    return max(map(on_rank, range(ranks)))


def _shards(
    name: str, shape: FactorShape, rank: int, ranks: int, kv_heads: int | None, heads: int | None
) -> tuple[Shard, ...]:
    """What a rank applies of a module, each with factors of its own: several parts of one that is fused."""
    parent, _, projection = name.rpartition(".")
    outs, ins = shape.out_features, shape.in_features
    if not parent.endswith((".self_attn", ".mlp")):  # shared experts, which some models hold whole on every rank
        rank, ranks = 0, 1
    if projection == "qkv_proj":
        if heads is None or kv_heads is None:
            return (Shard(0, range(outs), range(ins)),) * 3
        size = outs // (heads + 2 * kv_heads)
        return qkv_parallel(Heads(heads, kv_heads, size), ins, rank, ranks, fused=True).slices
    if projection == "gate_up_proj":
        return column_parallel([outs // 2] * 2, ins, rank, ranks, fused=True).slices
    if projection in ("k_proj", "v_proj"):
        heads = kv_heads or 1
        return qkv_parallel(Heads(heads, heads, outs // heads), ins, rank, ranks).slices[1:2]
    if parallel_of(name) == "row":
        return row_parallel(outs, ins, rank, ranks).slices
    return column_parallel([outs], ins, rank, ranks).slices
