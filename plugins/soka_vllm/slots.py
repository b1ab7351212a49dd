"""What the slots of one layer hold: factors in a flat buffer and an integer table; a slot costs what it needs.

A slot may hold any rank and factor shape per slice of the layer's output, and other ones after the next load.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from soka_serve.kron.shapes import FactorShape
from soka_vllm.arena import Arena, Buffer, FactorMemory
from soka_vllm.ops import dispatch, torch_ops

_MOST_PATTERNS = 64  # a layer's; about 1.3 KB each

_Kinds: TypeAlias = tuple[tuple[int, torch_ops.StackKind], ...]
"""Of some slices, each with its number."""


class Arranged(NamedTuple):
    """Factors as a slot holds them.

    Args:
        kind: their sizes, and how they are applied.
        values: (values,), see `torch_ops.arrange`.
    """

    kind: torch_ops.StackKind
    values: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Left (r, m, n) and Right (r, p, q), views of `values`."""
        return torch_ops.arranged(self.values, self.kind)


class _Pattern(NamedTuple):
    """Rows of the table for the factors of some slices.

    Args:
        where: the slices.
        rows: (slices, ROW_FIELDS), starts counted from where the first slice's factors begin.
        sizes: values of each.
    """

    where: slice | list[int]
    rows: np.ndarray[Any, Any]
    sizes: list[int]


@dataclass(slots=True)
class _Stretch:
    """A piece of the memory, and how many of a slot's slices have their factors in it."""

    start: int
    size: int
    users: int


class SlotStore:
    """Kronecker factors of one layer, by slot and slice.

    Args:
        slots: number of slots.
        widths: output features of each slice (q, k and v of a packed projection, say).
        in_features: input features of the layer.
        dtype, device: of the factors.
        memory: where they are kept; by default a growing buffer on a CPU, and the arena of all layers elsewhere.
    """

    def __init__(
        self,
        slots: int,
        widths: Sequence[int],
        in_features: int,
        dtype: torch.dtype,
        device: torch.device | str,
        memory: FactorMemory | None = None,
    ) -> None:
        self.widths = list(widths)
        self.in_features = in_features
        device = torch.device(device)
        if memory is None:
            memory = Buffer(dtype, device) if device.type == "cpu" else Arena.shared(slots, dtype, device)
        self._memory = memory
        self.table = torch.zeros(len(self.widths), slots, torch_ops.ROW_FIELDS, dtype=torch.int64, device=device)
        # On a CPU the same memory, to which numpy writes a row in a fifth of the time.
        self._rows = self.table.numpy() if device.type == "cpu" else None
        self._starts = [sum(self.widths[:index]) for index in range(len(self.widths))]
        self._kinds: dict[torch_ops.StackKind, int] = {}
        self._taken: dict[int, dict[int, _Stretch]] = {}  # by slot and slice
        self._filled: dict[int, tuple[_Kinds, int, int]] = {}  # of slots that one `fill` filled: where its values lie
        # Of factors that were put in before.
        self._patterns: dict[_Kinds, _Pattern] = {}

    @property
    def values(self) -> Tensor:
        """The flat buffer that the table points into."""
        return self._memory.values

    @property
    def slot_values(self) -> int | None:
        """How many values one adapter may have on this device, over all layers; None where there is no limit."""
        return self._memory.slot_values if isinstance(self._memory, Arena) else None

    @property
    def empty(self) -> bool:
        """Whether `add_to` may be left out: no slot holds anything, and calls are not recorded for later (a CPU).

        A GPU's graphs are recorded while all slots are empty, and replayed when they are not.
        """
        return not self._taken and self.table.device.type == "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the table and of the layer's buffer, or of what the layer takes of the arena."""
        if isinstance(self._memory, Buffer):
            return self._memory.size * self.values.element_size() + self.table.nbytes
        stretches = {id(stretch): stretch.size for held in self._taken.values() for stretch in held.values()}
        return sum(stretches.values()) * self.values.element_size() + self.table.nbytes

    def put(self, slot: int, index: int, left: Tensor, right: Tensor, *, out_skip: int = 0, in_skip: int = 0) -> None:
        """Set what `slot` holds for slice `index`; what it held there is gone.

        The factors' delta may be larger than the slice, since shards of a layer need not end where blocks of the
        Kronecker product do: rows [out_skip, out_skip + width) and columns [in_skip, in_skip + in_features) apply.

        Args:
            left: (r, m, n), sigma included.
            right: (r, p, q).
            out_skip, in_skip: where the slice begins in the delta.

        Raises:
            ValueError: the ranks differ, a skip is negative, or the factors' delta does not cover the slice; or the
                slot has no room for them in the arena.
        """
        self.fill(slot, [(index, self.arrange(left, right, out_skip=out_skip, in_skip=in_skip))])

    def arrange(self, left: Tensor, right: Tensor, *, out_skip: int = 0, in_skip: int = 0) -> Arranged:
        """The arguments of `put` as `fill` takes them, in memory of their own."""
        if right.shape[0] != left.shape[0]:
            raise ValueError(
                f"expected factors of equal rank; got left {tuple(left.shape)}, right {tuple(right.shape)}"
            )
        (rank, m, n), (p, q) = left.shape, right.shape[1:]
        kind = self.kind(rank, FactorShape(m, n, p, q), out_skip, in_skip)
        return Arranged(kind, torch_ops.arrange(left, right, kind.order))

    def kind(self, rank: int, shape: FactorShape, out_skip: int = 0, in_skip: int = 0) -> torch_ops.StackKind:
        """How slots hold factors of a rank and shape; the skips as for `put`."""
        # A GPU's kernel reads Left by rows; what it computes is the same in both orders.
        order = torch_ops.choose_order(shape) if self._rows is not None else torch_ops.LEFT_FIRST
        return torch_ops.StackKind(rank, *shape, order, out_skip, in_skip)

    def fill(self, slot: int, parts: Sequence[tuple[int, Arranged]]) -> None:
        """`put`, of factors that were arranged before, for several slices.

        Args:
            slot: the slot.
            parts: slices, and the factors of each.
        """
        kinds = tuple([(index, part.kind) for index, part in parts])
        where, rows, sizes = self._pattern(kinds)
        if slot in self._taken:
            self._drop(slot, [index for index, _ in parts])
        size = sum(sizes)
        start = self._memory.take(slot, size)
        self._write(start, size, parts)
        if slot not in self._taken:
            self._filled[slot] = kinds, start, size
        rows = rows.copy()
        rows[:, 0] += start
        if self._rows is not None:
            self._rows[where, slot] = rows
        else:
            self.table[where, slot] = torch.from_numpy(rows).to(self.table.device)
        stretch, held = _Stretch(start, size, len(parts)), self._taken.setdefault(slot, {})
        for index, _ in parts:
            held[index] = stretch

    def overwrite(self, slot: int, parts: Sequence[tuple[int, Arranged]]) -> bool:
        """Do what `clear` and `fill` do, where the slot holds factors of these kinds alone; else nothing, and False.

        Mostly adapters were trained alike; then nothing of the table changes.
        """
        kinds, start, size = self._filled.get(slot, ((), 0, 0))
        if not kinds or len(kinds) != len(parts):
            return False
        for (index, kind), (own_index, own) in zip(kinds, parts, strict=True):
            if index != own_index or kind != own.kind:
                return False
        self._write(start, size, parts)
        return True

    def _write(self, start: int, size: int, parts: Sequence[tuple[int, Arranged]]) -> None:
        target = self._memory.values[start : start + size]
        if len(parts) == 1:
            target.copy_(parts[0][1].values)
        elif self._rows is not None:
            torch.cat([part.values for _, part in parts], out=target)
        else:
            for piece, (_, part) in zip(torch.split(target, [p.kind.size for _, p in parts]), parts, strict=True):
                piece.copy_(part.values)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        held = self._taken.pop(slot, None)
        if held is not None:
            self._filled.pop(slot, None)
            self._leave(slot, held.values())
            (self.table if self._rows is None else self._rows)[:, slot] = 0

    def add_to(self, out: Tensor, x: Tensor, token_slots: Tensor) -> None:
        """Add each token's delta to its row of `out`, in place; for the arguments see `torch_ops.add_kron`."""
        dispatch.ADD_KRON(out, x, token_slots, self.values, self.table, self.widths)

    def _pattern(self, kinds: tuple[tuple[int, torch_ops.StackKind], ...]) -> _Pattern:
        """Raises ValueError where the factors of one of the slices do not cover it."""
        known = self._patterns.get(kinds)
        if known is None:
            if len(self._patterns) >= _MOST_PATTERNS:
                self._forget()
            rows, start = [], 0
            for index, kind in kinds:
                self._check(index, kind)
                if kind not in self._kinds:
                    self._kinds[kind] = max(self._kinds.values(), default=0) + 1
                number = self._kinds[kind]
                rows.append([start, number, *kind, self._starts[index], self.widths[index]])
                start += kind.size
            where = _indices([index for index, _ in kinds])
            known = _Pattern(where, np.array(rows, dtype=np.int64), [kind.size for _, kind in kinds])
            self._patterns[kinds] = known
        return known

    def _forget(self) -> None:
        """Forget patterns, and kinds of which no slot holds any: with sums of adapters there is no end to them."""
        self._patterns.clear()
        held = set(self.table[:, :, 1].flatten().tolist())
        self._kinds = {kind: number for kind, number in self._kinds.items() if number in held}

    def _check(self, index: int, kind: torch_ops.StackKind) -> None:
        want = (kind.out_skip + self.widths[index], kind.in_skip + self.in_features)
        delta = (kind.m * kind.p, kind.n * kind.q)
        if kind.out_skip < 0 or kind.in_skip < 0 or delta[0] < want[0] or delta[1] < want[1]:
            raise ValueError(
                f"expected factors of equal rank whose delta is at least {want}, of which rows [{kind.out_skip}, "
                f"{want[0]}) and columns [{kind.in_skip}, {want[1]}) apply; got left {(kind.rank, kind.m, kind.n)}, "
                f"right {(kind.rank, kind.p, kind.q)}"
            )

    def _drop(self, slot: int, indices: Sequence[int]) -> None:
        held = self._taken[slot]
        self._filled.pop(slot, None)
        self._leave(slot, [held.pop(index) for index in indices if index in held])
        if not held:
            del self._taken[slot]
        (self.table if self._rows is None else self._rows)[_indices(indices), slot] = 0

    def _leave(self, slot: int, stretches: Iterable[_Stretch]) -> None:
        for stretch in stretches:
            stretch.users -= 1
            if not stretch.users:
                self._memory.give_back(slot, stretch.start)


def _indices(found: Sequence[int]) -> slice | list[int]:
    """A slice where they follow each other: numpy takes a tenth of the time for it."""
    if list(found) == list(range(found[0], found[0] + len(found))):
        return slice(found[0], found[0] + len(found))
    return list(found)
