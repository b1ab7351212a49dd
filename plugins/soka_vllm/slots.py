"""What the slots of one layer hold: factors in a flat buffer and an integer table; a slot costs what it needs.

A slot may hold any rank and factor shape per slice of the layer's output, and other ones after the next load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soka_vllm.arena import Arena, Buffer, FactorMemory
from soka_vllm.ops import dispatch, torch_ops


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
        self._taken: dict[tuple[int, int], tuple[int, int]] = {}  # (slot, slice) -> (start, size) in the memory

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
            return self.values.nbytes + self.table.nbytes
        return sum(size for _, size in self._taken.values()) * self.values.element_size() + self.table.nbytes

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
        if right.shape[0] != left.shape[0]:
            raise ValueError(
                f"expected factors of equal rank; got left {tuple(left.shape)}, right {tuple(right.shape)}"
            )
        self.fill(slot, index, self.arrange(left, right, out_skip=out_skip, in_skip=in_skip))

    def arrange(self, left: Tensor, right: Tensor, *, out_skip: int = 0, in_skip: int = 0) -> Arranged:
        """The arguments of `put` as `fill` takes them, in memory of their own."""
        # A GPU's kernel reads Left by rows; what it computes is the same in both orders.
        order = torch_ops.choose_order(left, right) if self._rows is not None else torch_ops.LEFT_FIRST
        (rank, m, n), (p, q) = left.shape, right.shape[1:]
        kind = torch_ops.StackKind(rank, m, n, p, q, order, out_skip, in_skip)
        return Arranged(kind, torch_ops.arrange(left, right, order))

    def fill(self, slot: int, index: int, arranged: Arranged) -> None:
        """`put`, of factors that were arranged before."""
        kind, values = arranged
        width = self.widths[index]
        want = (kind.out_skip + width, kind.in_skip + self.in_features)
        delta = (kind.m * kind.p, kind.n * kind.q)
        if kind.out_skip < 0 or kind.in_skip < 0 or delta[0] < want[0] or delta[1] < want[1]:
            raise ValueError(
                f"expected factors of equal rank whose delta is at least {want}, of which rows [{kind.out_skip}, "
                f"{want[0]}) and columns [{kind.in_skip}, {want[1]}) apply; got left {(kind.rank, kind.m, kind.n)}, "
                f"right {(kind.rank, kind.p, kind.q)}"
            )
        self._drop(slot, index)
        size = values.numel()
        start = self._memory.take(slot, size)
        self._taken[slot, index] = (start, size)
        self._memory.values[start : start + size] = values
        number = self._kinds.setdefault(kind, len(self._kinds) + 1)
        row = [start, number, *kind, self._starts[index], width]
        if self._rows is not None:
            self._rows[index, slot] = row
        else:
            self.table[index, slot] = torch.tensor(row, dtype=torch.int64)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        for index in range(len(self.widths)):
            self._drop(slot, index)

    def add_to(self, out: Tensor, x: Tensor, token_slots: Tensor) -> None:
        """Add each token's delta to its row of `out`, in place; for the arguments see `torch_ops.add_kron`."""
        dispatch.ADD_KRON(out, x, token_slots, self.values, self.table, self.widths)

    def _drop(self, slot: int, index: int) -> None:
        taken = self._taken.pop((slot, index), None)
        if taken is not None:
            self._memory.give_back(slot, taken[0])
            (self.table if self._rows is None else self._rows)[index, slot] = 0
