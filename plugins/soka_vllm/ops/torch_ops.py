"""The operator in plain torch, for CPUs: tokens are grouped by adapter, each group takes two matrix products.

One row of the table describes what one slot holds for one slice of a layer's output: ROW_FIELDS integers, namely where
Left and Right start in the flat buffer, rank, m, n, p, q, the order of the two products, out_skip and in_skip. Rank 0
is an empty slot. A delta may be larger than the slice (a shard of a layer whose edges cut blocks of the product): rows
[out_skip, out_skip + width) and columns [in_skip, in_skip + in) of it are what is applied.
The factors lie in the buffer as the products want them (`arrange`), with sigma multiplied into Left:

- LEFT_FIRST: Left as (m, r, n), Right as (r, q, p): Z = Left X, then Y = Z Right.
- RIGHT_FIRST: Right as (q, r, p), Left as (m, n, r): Z = X Right, then Y = Left Z.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from soka_serve.kron_apply import cheaper_order
from soka_serve.shapes import FactorShape

ROW_FIELDS = 10
LEFT_FIRST, RIGHT_FIRST = 0, 1

_PIECE_VALUES = 1 << 21  # most values of an intermediate: 8 MiB in float32

_SCHEMA = "add_kron(Tensor(a!) out, Tensor x, Tensor token_slots, Tensor values, Tensor table, int[] widths) -> ()"
_LIBRARY = torch.library.Library("soka", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


def arrange(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, int]:
    """Factors as the operator reads them, and the order of its products, the one with fewer multiply-adds.

    Args:
        left: (r, m, n), sigma included.
        right: (r, p, q).
    """
    shape = FactorShape(left.shape[1], left.shape[2], right.shape[1], right.shape[2])
    if cheaper_order(shape) == "left":
        return left.transpose(0, 1).flatten(), right.transpose(1, 2).flatten(), LEFT_FIRST
    return left.permute(1, 2, 0).flatten(), right.permute(2, 0, 1).flatten(), RIGHT_FIRST


def add_kron(out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor, widths: list[int]) -> None:
    """Add each token's Kronecker delta to its row of `out`.

    Semantics: for token t, slot s = token_slots[t] with 0 <= s < slots, and slice i of `out`:
    out[t, start_i : start_i + widths[i]] += sum over k of D[i, s, k] @ x[t], where D is kron(left[i, s, k],
    right[i, s, k])[out_skip : out_skip + widths[i], in_skip : in_skip + in].
    Other tokens, and slots of rank 0, keep their row.

    Args:
        out: (tokens, sum of widths), any floating dtype; changed in place, rounded once.
        x: (tokens, in).
        token_slots: (at least tokens,) integers; what lies behind the tokens may be uninitialised.
        values: the flat buffer; products run in float32 (float64 for float64 values).
        table: (slices, slots, ROW_FIELDS) int64.
        widths: features of each slice of `out`.
    """
    slots = token_slots[: x.shape[0]]
    for slot in torch.unique(slots).tolist():
        if not 0 <= slot < table.shape[1]:
            continue
        rows = (slots == slot).nonzero().flatten()
        everything = rows.numel() == x.shape[0]
        work = torch.promote_types(values.dtype, torch.float32)
        inputs = (x if everything else x[rows]).to(work)
        start = 0
        for width, row in zip(widths, table[:, slot].tolist(), strict=True):
            if row[2]:
                delta = _product(_embedded(inputs, row), values, row)[:, row[8] : row[8] + width]
                target = out[:, start : start + width]
                if everything:
                    target.add_(delta)
                else:
                    target.index_copy_(0, rows, target[rows].add_(delta))
            start += width


def _embedded(inputs: Tensor, row: list[int]) -> Tensor:
    """The inputs in zero vectors of the n*q features that the factors take."""
    features, skip = row[4] * row[6], row[9]
    if inputs.shape[1] == features:
        return inputs
    return pad(inputs, (skip, features - skip - inputs.shape[1]))


def _product(inputs: Tensor, values: Tensor, row: list[int]) -> Tensor:
    """(tokens, n*q) -> (tokens, m*p), in the dtype of `inputs`."""
    left_at, right_at, rank, m, n, p, q, order = row[:8]
    left = values[left_at : left_at + rank * m * n].to(inputs.dtype)
    right = values[right_at : right_at + rank * p * q].to(inputs.dtype)
    middle = rank * (m * q if order == LEFT_FIRST else n * p)
    done = []
    for piece in torch.split(inputs, max(1, _PIECE_VALUES // middle)):
        if order == LEFT_FIRST:
            between = torch.matmul(left.view(m * rank, n), piece.reshape(-1, n, q))
            result = between.view(-1, rank * q) @ right.view(rank * q, p)
        else:
            between = piece.reshape(-1, q) @ right.view(q, rank * p)
            result = torch.matmul(left.view(m, n * rank), between.view(-1, n * rank, p))
        done.append(result.reshape(-1, m * p))
    return done[0] if len(done) == 1 else torch.cat(done)


def _no_result(out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor, widths: list[int]) -> None:
    """What tracing sees: `out` changes, nothing is returned."""


_LIBRARY.impl("add_kron", add_kron, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("soka::add_kron", _no_result, lib=_LIBRARY)
