"""What the slots of one layer hold: factors in a flat buffer and an integer table; a slot costs what it needs.

A slot may hold any rank and factor shape per slice of the layer's output, and other ones after the next load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soka_vllm.arena import Arena, Buffer, FactorMemory
from soka_vllm.ops import dispatch, torch_ops


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
        rank, m, n = left.shape
        p, q = right.shape[1:]
        width = self.widths[index]
        want = (out_skip + width, in_skip + self.in_features)
        if right.shape[0] != rank or out_skip < 0 or in_skip < 0 or m * p < want[0] or n * q < want[1]:
            raise ValueError(
                f"expected factors of equal rank whose delta is at least {want}, of which rows [{out_skip}, {want[0]}) "
                f"and columns [{in_skip}, {want[1]}) apply; got left {tuple(left.shape)}, right {tuple(right.shape)}"
            )
        self._drop(slot, index)
        # A GPU's kernel reads Left by rows; what it computes is the same in both orders.
        order = torch_ops.choose_order(left, right) if self.values.device.type == "cpu" else torch_ops.LEFT_FIRST
        factors = torch_ops.arrange(left, right, order)
        start = self._memory.take(slot, factors.numel())
        self._taken[slot, index] = (start, factors.numel())
        self.values[start : start + factors.numel()] = factors
        kind = torch_ops.StackKind(rank, m, n, p, q, order, out_skip, in_skip)
        number = self._kinds.setdefault(kind, len(self._kinds) + 1)
        row = [start, number, *kind, sum(self.widths[:index]), width]
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
            self.table[index, slot] = 0
