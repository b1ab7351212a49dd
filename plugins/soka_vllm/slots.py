"""What the slots of one layer hold: one flat buffer of factors and an integer table; a slot costs what it needs.

A slot may hold any rank and factor shape per slice of the layer's output, and other ones after the next load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soka_vllm.ops import torch_ops


class SlotStore:
    """Kronecker factors of one layer, by slot and slice.

    Args:
        slots: number of slots.
        widths: output features of each slice (q, k and v of a packed projection, say).
        in_features: input features of the layer.
        dtype, device: of the factors.
    """

    def __init__(
        self, slots: int, widths: Sequence[int], in_features: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.widths = list(widths)
        self.in_features = in_features
        self.values = torch.zeros(0, dtype=dtype, device=device)
        self.table = torch.zeros(len(self.widths), slots, torch_ops.ROW_FIELDS, dtype=torch.int64, device=device)
        self._kinds: dict[torch_ops.Kind, int] = {}
        self._taken: dict[tuple[int, int], tuple[int, int]] = {}  # (slot, slice) -> (start, size) in the buffer

    @property
    def empty(self) -> bool:
        """Whether no slot holds anything."""
        return not self._taken

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer and the table."""
        return self.values.nbytes + self.table.nbytes

    def put(self, slot: int, index: int, left: Tensor, right: Tensor, *, out_skip: int = 0, in_skip: int = 0) -> None:
        """Set what `slot` holds for slice `index`; what it held there is gone.

        The factors' delta may be larger than the slice, since shards of a layer need not end where blocks of the
        Kronecker product do: rows [out_skip, out_skip + width) and columns [in_skip, in_skip + in_features) apply.

        Args:
            left: (r, m, n), sigma included.
            right: (r, p, q).
            out_skip, in_skip: where the slice begins in the delta.

        Raises:
            ValueError: the ranks differ, a skip is negative, or the factors' delta does not cover the slice.
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
        left_values, right_values, order = torch_ops.arrange(left, right)
        start = self._take(left_values.numel() + right_values.numel())
        middle = start + left_values.numel()
        end = middle + right_values.numel()
        self.values[start:middle] = left_values
        self.values[middle:end] = right_values
        self._taken[slot, index] = (start, end - start)
        kind = torch_ops.Kind(rank, m, n, p, q, order, out_skip, in_skip)
        row = [start, self._kinds.setdefault(kind, len(self._kinds) + 1), *kind]
        self.table[index, slot] = torch.tensor(row, dtype=torch.int64)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        for index in range(len(self.widths)):
            self._drop(slot, index)

    def add_to(self, out: Tensor, x: Tensor, token_slots: Tensor) -> None:
        """Add each token's delta to its row of `out`, in place; for the arguments see `torch_ops.add_kron`."""
        torch.ops.soka.add_kron(out, x, token_slots, self.values, self.table, self.widths)

    def _drop(self, slot: int, index: int) -> None:
        if self._taken.pop((slot, index), None):
            self.table[index, slot] = 0

    def _take(self, size: int) -> int:
        """The start of the first gap of `size` values; the buffer grows when there is none."""
        end = 0
        for start, taken in sorted(self._taken.values()):
            if start - end >= size:
                return end
            end = start + taken
        if end + size > self.values.numel():
            # vLLM fills slots inside inference mode and outside it; a tensor made inside could not be changed outside.
            with torch.inference_mode(False):
                grown = self.values.new_zeros(end + size)
                grown[:end] = self.values[:end]
            self.values = grown
        return end
