"""Examples to batches: padded rows, or packed rows whose examples do not see each other.

Packed rows carry `position_ids` that start again at 0 with each example, and no attention mask: transformers then
applies block-diagonal attention (`masking_utils.find_packed_sequence_indices`), provided that no cache is used. Not all
models do: `packing.check_packing` measures it before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from soka_serve.data.encode import EncodedExample, PackedRow

IGNORED = -100  # the label that the loss skips


class TokenDataset(Dataset["EncodedExample | PackedRow"]):
    """A list of encoded or packed examples as a map-style dataset."""

    def __init__(self, rows: Sequence[EncodedExample] | Sequence[PackedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedExample | PackedRow:
        return self.rows[index]


def has_target(labels: Sequence[int]) -> bool:
    """Whether any token counts in the loss. The first label never does: nothing predicts it."""
    return any(label != IGNORED for label in labels[1:])


@dataclass(frozen=True)
class PadCollator:
    """Pad rows to the longest of the batch.

    Args:
        pad_id: token id of the padding; never in the loss and never attended to.
        multiple_of: rows are padded to a multiple of so many tokens (8 suits tensor cores).

    Returns from a call: `input_ids` and `labels` (batch, tokens) int64, and `attention_mask` for plain rows or
    `position_ids` for packed ones. Padding at the end of a packed row is a sequence of its own.
    """

    pad_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(row.input_ids) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        gaps = [width - len(row.input_ids) for row in rows]
        input_ids = _tensor(list(row.input_ids) + [self.pad_id] * gap for row, gap in zip(rows, gaps, strict=True))
        labels = _tensor(list(row.labels) + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True))
        if not hasattr(rows[0], "position_ids"):
            mask = _tensor([1] * (width - gap) + [0] * gap for gap in gaps)
            return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        positions = _tensor(list(row.position_ids) + list(range(gap)) for row, gap in zip(rows, gaps, strict=True))
        # The last token of one example must not be asked for the first token of the next.
        labels[positions == 0] = IGNORED
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions}


def _tensor(rows: Any) -> torch.Tensor:
    return torch.tensor(list(rows), dtype=torch.int64)
