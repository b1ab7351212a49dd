"""Slices of Kronecker factors that one rank of a tensor-parallel layer applies.

A column-parallel layer (qkv, gate_up) holds rows of the weight, a row-parallel one (o, down) columns. A range of rows
that begins and ends at blocks of the product takes rows of Left; one that lies inside a block takes one row of Left and
rows of Right; any other takes the rows of Left whose blocks cover it, and says how many of their rows come before it.
So every factor shape can be cut, and only the last case costs more than its share. Columns likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from soka_serve.kron.shapes import FactorShape

if TYPE_CHECKING:
    from torch import Tensor


class Cut(NamedTuple):
    """Factors whose delta holds a shard: its rows begin at `out_skip`, its columns at `in_skip`.

    left: (r, m', n'); right: (r, p', q').
    """

    left: Tensor
    right: Tensor
    out_skip: int
    in_skip: int


@dataclass(frozen=True)
class Shard:
    """One slice of a rank's output: rows and columns of the delta of the layer's `source`-th module."""

    source: int
    rows: range
    columns: range


@dataclass(frozen=True)
class LayerShards:
    """A layer on one rank: `shapes` are the (out, in) of its modules' whole weights, `slices` make up its output."""

    shapes: tuple[tuple[int, int], ...]
    slices: tuple[Shard, ...]

    @property
    def widths(self) -> list[int]:
        """Output features of each slice on this rank."""
        return [len(part.rows) for part in self.slices]

    @property
    def in_features(self) -> int:
        """Input features on this rank."""
        return len(self.slices[0].columns)


def cut(left: Tensor, right: Tensor, rows: range, columns: range) -> Cut:
    """The least factors whose delta holds some rows and columns of sum over k of kron(left[k], right[k]).

    Args:
        left: (r, m, n).
        right: (r, p, q).
        rows, columns: contiguous, within m*p and n*q.
    """
    left, right, out_skip = _cut_axis(left, right, rows, 1)
    left, right, in_skip = _cut_axis(left, right, columns, 2)
    return Cut(left, right, out_skip, in_skip)


def values_after_cut(shape: FactorShape, rows: range, columns: range) -> int:
    """How many values one term has after `cut`."""
    left_rows, right_rows, _ = _stretches(shape.p, rows)
    left_columns, right_columns, _ = _stretches(shape.q, columns)
    return len(left_rows) * len(left_columns) + len(right_rows) * len(right_columns)


def _cut_axis(left: Tensor, right: Tensor, wanted: range, axis: int) -> tuple[Tensor, Tensor, int]:
    if len(wanted) == left.shape[axis] * right.shape[axis]:  # all of it, as on a single rank
        return left, right, 0
    of_left, of_right, skip = _stretches(right.shape[axis], wanted)
    left = left.narrow(axis, of_left.start, len(of_left))
    return left, right.narrow(axis, of_right.start, len(of_right)), skip


def _stretches(block: int, wanted: range) -> tuple[range, range, int]:
    """Along one axis: what of Left and of Right (of size `block`) is needed, and what of their product to skip."""
    first, last = wanted.start // block, -(-wanted.stop // block)
    skip = wanted.start - first * block
    if last - first == 1:
        return range(first, last), range(skip, skip + len(wanted)), 0
    return range(first, last), range(block), skip


def share(size: int, index: int, count: int) -> range:
    """The `index`-th of `count` equal parts of `size` features; vLLM refuses sizes that do not divide."""
    width = size // count
    return range(index * width, (index + 1) * width)


def column_parallel(
    sizes: Sequence[int], in_features: int, tp_rank: int, tp_size: int, *, fused: bool = False
) -> LayerShards:
    """A layer whose rows are shared out: one module, or several that are packed (gate and up).

    Args:
        sizes: output features of each packed part.
        in_features: input features.
        tp_rank, tp_size: which of how many ranks.
        fused: the parts are one module of the checkpoint (Phi-3's gate_up_proj), not one each.
    """
    return _packed(sizes, [share(size, tp_rank, tp_size) for size in sizes], in_features, fused)


class Heads(NamedTuple):
    """An attention layer's heads, on all ranks together: of queries, of keys and values, and features of each."""

    query: int
    key_value: int
    size: int


def qkv_parallel(heads: Heads, in_features: int, tp_rank: int, tp_size: int, *, fused: bool = False) -> LayerShards:
    """Packed q, k and v; with more ranks than key/value heads, each of those is held by several ranks.

    Args:
        heads: of the whole layer.
        in_features, tp_rank, tp_size, fused: as for `column_parallel`.
    """
    queries, keys = heads.query * heads.size, heads.key_value * heads.size
    replicas = max(1, tp_size // heads.key_value)
    key_rows = share(keys, tp_rank // replicas, tp_size // replicas)
    return _packed([queries, keys, keys], [share(queries, tp_rank, tp_size), key_rows, key_rows], in_features, fused)


def row_parallel(out_features: int, in_features: int, tp_rank: int, tp_size: int) -> LayerShards:
    """A layer whose columns are shared out: each rank's output is a part of the sum."""
    columns = share(in_features, tp_rank, tp_size)
    return LayerShards(((out_features, in_features),), (Shard(0, range(out_features), columns),))


def _packed(sizes: Sequence[int], rows: Sequence[range], in_features: int, fused: bool) -> LayerShards:
    columns = range(in_features)
    if not fused:
        slices = tuple(Shard(index, part, columns) for index, part in enumerate(rows))
        return LayerShards(tuple((size, in_features) for size in sizes), slices)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    moved = (range(start + part.start, start + part.stop) for start, part in zip(starts, rows, strict=True))
    return LayerShards(((sum(sizes), in_features),), tuple(Shard(0, part, columns) for part in moved))
