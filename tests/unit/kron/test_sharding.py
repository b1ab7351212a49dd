"""Shards of a delta: put together they are the dense float64 product, whatever the factor shape and number of ranks."""

from __future__ import annotations

import pytest
import torch

from soka_serve.kron.shapes import FactorShape, candidate_shapes
from soka_serve.kron.sharding import (
    Heads,
    LayerShards,
    column_parallel,
    cut,
    qkv_parallel,
    row_parallel,
    values_after_cut,
)
from soka_vllm.slots import SlotStore
from tests.support.tolerances import TOLERANCE

TP_SIZES = [1, 2, 3, 4, 8]


def factors(shape: tuple[int, int, int, int], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m, n, p, q = shape
    dtype = torch.float64
    left = torch.randn(rank, m, n, generator=generator, dtype=dtype)
    return left, torch.randn(rank, p, q, generator=generator, dtype=dtype)


def dense(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)]).sum(0)


def shapes_of(out_features: int, in_features: int) -> list[FactorShape]:
    """Every factor shape of a weight."""

    def divisors(size: int) -> list[int]:
        return [d for d in range(1, size + 1) if size % d == 0]

    return [
        FactorShape(m, n, out_features // m, in_features // n)
        for m in divisors(out_features)
        for n in divisors(in_features)
    ]


def applied(
    layers: list[LayerShards], modules: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor
) -> list[list[torch.Tensor]]:
    """By rank and slice, what the layer's slots add for inputs (tokens, in)."""
    results = []
    for layer in layers:
        store = SlotStore(2, layer.widths, layer.in_features, torch.float64, "cpu")
        for index, part in enumerate(layer.slices):
            left, right, out_skip, in_skip = cut(*modules[part.source], part.rows, part.columns)
            store.put(1, index, left, right, out_skip=out_skip, in_skip=in_skip)
        inputs = x[:, layer.slices[0].columns.start : layer.slices[0].columns.stop]
        out = torch.zeros(len(x), sum(layer.widths), dtype=torch.float64)
        store.add_to(out, inputs, torch.ones(len(x), dtype=torch.int64))
        results.append(list(out.split(layer.widths, 1)))
    return results


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_every_shape_can_be_cut(tp_size: int) -> None:
    """Each rank's rows, and each rank's columns, of the dense product, for every factor shape of a weight."""
    out_features, in_features = 48, 24
    for number, shape in enumerate(shapes_of(out_features, in_features)):
        left, right = factors(shape, 2, number)
        whole = dense(left, right)
        for layers in (
            [column_parallel([out_features], in_features, rank, tp_size) for rank in range(tp_size)],
            [row_parallel(out_features, in_features, rank, tp_size) for rank in range(tp_size)],
        ):
            for layer in layers:
                (part,) = layer.slices
                small = cut(left, right, part.rows, part.columns)
                assert 2 * values_after_cut(shape, part.rows, part.columns) == small.left.numel() + small.right.numel()
                rows = slice(small.out_skip, small.out_skip + len(part.rows))
                columns = slice(small.in_skip, small.in_skip + len(part.columns))
                want = whole[part.rows.start : part.rows.stop, part.columns.start : part.columns.stop]
                torch.testing.assert_close(dense(small.left, small.right)[rows, columns], want, rtol=0, atol=0)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("shape", [(3, 4, 16, 6), (48, 24, 1, 1), (1, 1, 48, 24), (16, 3, 3, 8), (6, 8, 8, 3)])
def test_ranks_put_together_are_the_delta(shape: tuple[int, int, int, int], tp_size: int) -> None:
    """Column parallel: their outputs side by side; row parallel: the sum, as the all-reduce makes it."""
    left, right = factors(shape, 3, 1)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = x @ dense(left, right).T
    assert bool(want.any())
    rtol, atol = TOLERANCE[torch.float64]
    columns = applied([column_parallel([48], 24, rank, tp_size) for rank in range(tp_size)], [(left, right)], x)
    torch.testing.assert_close(torch.cat([part for (part,) in columns], 1), want, rtol=rtol, atol=atol)
    rows = applied([row_parallel(48, 24, rank, tp_size) for rank in range(tp_size)], [(left, right)], x)
    torch.testing.assert_close(torch.stack([part for (part,) in rows]).sum(0), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "tp_size"),
    [(kv, tp) for kv in (24, 8, 4, 2, 1) for tp in TP_SIZES if kv % tp == 0 or tp % kv == 0],  # vLLM takes no others
)
def test_grouped_queries(kv_heads: int, tp_size: int, fused: bool) -> None:
    """Rank r applies q's r-th share, and the k and v of the heads that its queries attend to."""
    heads, head_size, hidden = 24, 4, 12
    sizes = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
    outs = [sum(sizes)] if fused else sizes
    modules = [factors((out // 4, 3, 4, 4), 1, out) for out in outs]
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole_layer = Heads(heads, kv_heads, head_size)
    layers = [qkv_parallel(whole_layer, hidden, rank, tp_size, fused=fused) for rank in range(tp_size)]
    assert layers[0].shapes == tuple((out, hidden) for out in outs)
    whole = torch.cat([x @ dense(*module).T for module in modules], 1).split(sizes, 1)
    per_rank = kv_heads / tp_size
    for rank, (q, k, v) in enumerate(applied(layers, modules, x)):
        first = int(rank * per_rank) * head_size
        kv = slice(first, first + max(1, int(per_rank)) * head_size)
        queries = slice(rank * sizes[0] // tp_size, (rank + 1) * sizes[0] // tp_size)
        for got, want in ((q, whole[0][:, queries]), (k, whole[1][:, kv]), (v, whole[2][:, kv])):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_fused_gate_and_up() -> None:
    """Of one module that packs two, a rank holds its share of each."""
    left, right = factors((8, 3, 6, 4), 2, 1)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layers = [column_parallel([24, 24], 12, rank, 2, fused=True) for rank in range(2)]
    (gate0, up0), (gate1, up1) = applied(layers, [(left, right)], x)
    want = x @ dense(left, right).T
    torch.testing.assert_close(torch.cat([gate0, gate1, up0, up1], 1), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "tp_size"), [(candidate_shapes(4096, 4096)[0], 2), (FactorShape(64, 64, 64, 64), 4)])
def test_shapes_that_divide_cost_no_more_than_their_share(shape: FactorShape, tp_size: int) -> None:
    left, right = (torch.zeros(1, shape.m, shape.n), torch.zeros(1, shape.p, shape.q))
    for rank in range(tp_size):
        (part,) = column_parallel([shape.out_features], shape.in_features, rank, tp_size).slices
        small = cut(left, right, part.rows, part.columns)
        assert small.left.shape[1] * small.right.shape[1] == shape.out_features // tp_size
        assert (small.out_skip, small.in_skip) == (0, 0)


def test_a_shard_inside_one_block_takes_a_slice_of_right() -> None:
    left, right = factors((2, 1, 24, 6), 1, 3)
    small = cut(left, right, range(12, 24), range(6))
    assert tuple(small.left.shape) == (1, 1, 1)
    assert tuple(small.right.shape) == (1, 12, 6)
    assert small.out_skip == 0
