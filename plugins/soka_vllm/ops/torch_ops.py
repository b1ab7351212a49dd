"""The operator in plain torch, for CPUs without a C++ compiler, and what its table and buffer hold (`cpu_kernel`, too).

One row of the table describes what one slot holds for one slice of a layer's output, in ROW_FIELDS integers: where its
factors start in the flat buffer (Left, then Right), kind, rank, m, n, p, q, the order of the two products, out_skip,
in_skip, and where the slice begins in the output and how wide it is. Kind and rank 0 are an empty slot; slots of one
slice have the same kind if and only if they differ in nothing but the start, so that their factors can be stacked.

A delta may be larger than the slice (a shard of a layer whose edges cut blocks of the product): rows
[out_skip, out_skip + width) and columns [in_skip, in_skip + in) of it are what is applied.

The factors lie in the buffer as the products want them (`arrange`), with sigma multiplied into Left:

- LEFT_FIRST: Left as (m, r, n), Right as (r, q, p): Z = Left X, then Y = Z Right.
- RIGHT_FIRST: Right as (q, r, p), Left as (m, n, r): Z = X Right, then Y = Left Z.

A decode step has few tokens, many adapters, and costs what the calls of small torch operators cost. So tokens of all
adapters of one kind go through the two products together, with stacked copies of their factors; only where all tokens
are one adapter's, without copies. On a CPU the copies cost less than a pair of products per adapter, also where one
adapter has most tokens; taking adjacent slices of one kind together gains nothing.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from soka_serve.kron.cost import apply_cost, cheaper_order
from soka_serve.kron.shapes import FactorShape

ROW_FIELDS = 12
LEFT_FIRST, RIGHT_FIRST = 0, 1

_Ints = np.ndarray[Any, np.dtype[np.int64]]

_PIECE_VALUES = 1 << 18  # most values of an intermediate: 1 MiB in float32

_WIDE = 1 << 16  # values of an output from which adding to it in another dtype takes longer than two copies


def choose_order(shape: FactorShape) -> int:
    """The order of the products of factors that has fewer multiply-adds."""
    return LEFT_FIRST if cheaper_order(shape) == "left" else RIGHT_FIRST


def arrange(left: Tensor, right: Tensor, order: int) -> Tensor:
    """Factors as the operator reads them, (values,): Left, then Right.

    Args:
        left: (r, m, n), sigma included.
        right: (r, p, q).
    """
    if order == LEFT_FIRST:
        return torch.cat([left.transpose(0, 1).flatten(), right.transpose(1, 2).flatten()])
    return torch.cat([left.permute(1, 2, 0).flatten(), right.permute(2, 0, 1).flatten()])


def arranged(values: Tensor, kind: StackKind) -> tuple[Tensor, Tensor]:
    """What `arrange` was given: Left (r, m, n) and Right (r, p, q), as views of its result.

    Of several results, (..., values), Left (..., r, m, n) and Right (..., r, p, q).
    """
    left, right = torch.split(values, [kind.left_size, kind.size - kind.left_size], -1)
    more = values.shape[:-1]
    if kind.order == LEFT_FIRST:
        left = left.view(*more, kind.m, kind.rank, kind.n).transpose(-3, -2)
        return left, right.view(*more, kind.rank, kind.q, kind.p).transpose(-2, -1)
    left = left.view(*more, kind.m, kind.n, kind.rank).movedim(-1, -3)
    return left, right.view(*more, kind.q, kind.rank, kind.p).movedim(-3, -1)


class StackKind(NamedTuple):
    """The middle fields of a row: what the factors of two slots must have in common to be stacked."""

    rank: int
    m: int
    n: int
    p: int
    q: int
    order: int
    out_skip: int
    in_skip: int

    @property
    def left_size(self) -> int:
        """Values of Left."""
        return self.rank * self.m * self.n

    @property
    def size(self) -> int:
        """Values of Left and Right."""
        return self.rank * (self.m * self.n + self.p * self.q)

    @property
    def between(self) -> int:
        """Values of the first product, per token."""
        return self.rank * (self.m * self.q if self.order == LEFT_FIRST else self.n * self.p)

    @property
    def multiply_adds(self) -> int:
        """Of both products, per token."""
        order: Literal["left", "right"] = "left" if self.order == LEFT_FIRST else "right"
        return apply_cost(FactorShape(*self[1:5]), self.rank, order)


def add_kron(out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor, widths: list[int]) -> None:
    """Add each token's Kronecker delta to its row of `out`.

    Semantics: for token t, slot s = token_slots[t] with 0 <= s < slots, and slice i of `out`:
    out[t, start_i : start_i + widths[i]] += sum over k of D[i, s, k] @ x[t], where D is kron(left[i, s, k],
    right[i, s, k])[out_skip : out_skip + widths[i], in_skip : in_skip + in].
    Other tokens, and slots that are empty, keep their row.

    Args:
        out: (tokens, sum of widths), any floating dtype; changed in place, rounded once.
        x: (tokens, in).
        token_slots: (at least tokens,) integers; what lies behind the tokens may be uninitialised.
        values: the flat buffer; products run in float32 (float64 for float64 values).
        table: (slices, slots, ROW_FIELDS) int64.
        widths: features of each slice of `out`.
    """
    inputs = x.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    end = 0
    for width, rows in zip(widths, _rows(table.numpy(), token_slots.numpy()[: x.shape[0]]), strict=False):
        start, end = end, end + width
        numbers = rows[:, 1].tolist()
        for number in set(numbers) - {0}:
            kind = StackKind(*rows[numbers.index(number), 2:-2].tolist())
            chosen = None if numbers.count(number) == len(numbers) else (rows[:, 1] == number).nonzero()[0]
            starts = rows[:, 0] if chosen is None else rows[chosen, 0]
            _add_slice(out[:, start:end], inputs, values, chosen, starts, kind)


def _rows(table: _Ints, slots: _Ints) -> _Ints:
    """(slices, tokens or 1, ROW_FIELDS): each token's row, or one where all have the same; none if no slot exists."""
    numbers = set(slots.tolist())
    known = [number for number in numbers if 0 <= number < table.shape[1]]
    if not known:
        return table[:0]
    if len(numbers) == 1:
        return table[:, known[0] : known[0] + 1]
    if len(known) == len(numbers):
        return table.take(slots, axis=1)
    exists = (slots >= 0) & (slots < table.shape[1])
    rows: _Ints = table.take(np.where(exists, slots, 0), axis=1)
    rows *= exists[:, None]
    return rows


def _add_slice(
    target: Tensor, inputs: Tensor, values: Tensor, chosen: _Ints | None, starts: _Ints, kind: StackKind
) -> None:
    """Add the deltas of one kind to a slice of the output, in pieces that stay in a cache.

    Args:
        chosen: the tokens; None for all.
        starts: where the factors of each of them lie; one number if it is the same for all.
    """
    tokens = inputs.shape[0] if chosen is None else chosen.size
    shared = _factors(values, starts, kind.size, inputs.dtype) if starts.size == 1 else None
    own = kind.size if shared is None else 0
    step = max(1, _PIECE_VALUES // max(kind.between, own))
    for begin in range(0, tokens, step):
        some = slice(begin, begin + step)
        factors = _factors(values, starts[some], kind.size, inputs.dtype) if shared is None else shared
        if chosen is not None:
            index = torch.from_numpy(chosen[some])
            rows = target[index]
            _add_product(rows, _embedded(inputs[index], kind), factors, kind)
            target.index_copy_(0, index, rows)
        elif tokens <= step:
            _add_product(target, _embedded(inputs, kind), factors, kind)
        else:
            _add_product(target[some], _embedded(inputs[some], kind), factors, kind)


def _embedded(inputs: Tensor, kind: StackKind) -> Tensor:
    """The inputs, (tokens, in), padded with zeros to the n*q features that the factors take."""
    features = kind.n * kind.q
    if inputs.shape[1] == features:
        return inputs
    return pad(inputs, (kind.in_skip, features - kind.in_skip - inputs.shape[1]))


def _factors(values: Tensor, starts: _Ints, size: int, dtype: torch.dtype) -> Tensor:
    """(starts, size): the factors that begin at each of `starts`."""
    if starts.size == 1:
        start = int(starts[0])
        return values[start : start + size].to(dtype).view(1, size)
    # Row i of this view starts at value i, so that selecting rows copies whole stretches of the buffer.
    stretches = values.as_strided((values.numel() - size + 1, size), (1, 1))
    return stretches.index_select(0, torch.from_numpy(starts)).to(dtype)


def _add_product(target: Tensor, inputs: Tensor, factors: Tensor, kind: StackKind) -> None:
    """Add the deltas of (tokens, n*q) inputs and (tokens or 1, size) factors to a (tokens, width) target."""
    rank, m, n, p, q = kind[:5]
    tokens, shared = inputs.shape[0], factors.shape[0] == 1
    left, right = factors[:, : kind.left_size], factors[:, kind.left_size :]
    if kind.order == LEFT_FIRST:
        left, right = left.view(-1, m * rank, n), right.view(-1, rank * q, p)
        between = torch.bmm(left.expand(tokens, -1, -1), inputs.view(tokens, n, q))
        first, second = between.view(tokens, m, rank * q), right
        if shared:
            first = first.view(1, tokens * m, rank * q)
    else:
        left, right = left.view(-1, m, n * rank), right.view(-1, q, rank * p)
        between = inputs.view(tokens * n, q) @ right[0] if shared else torch.bmm(inputs.view(tokens, n, q), right)
        first, second = left.expand(tokens, -1, -1), between.view(tokens, n * rank, p)
    if first.shape[0] == tokens and m * p == target.shape[1]:
        # A product that adds takes less time than a product and an addition, but not on a view in float32.
        is_held = torch.promote_types(target.dtype, inputs.dtype) == inputs.dtype  # nothing of it is rounded on the way
        if target.dtype != inputs.dtype and is_held and target.numel() >= _WIDE:
            rows = target.to(inputs.dtype, memory_format=torch.contiguous_format)
            rows.view(tokens, m, p).baddbmm_(first, second)
            target.copy_(rows)
            return
    delta = torch.bmm(first, second).view(tokens, m * p)
    target.add_(delta if m * p == target.shape[1] else delta[:, kind.out_skip : kind.out_skip + target.shape[1]])
