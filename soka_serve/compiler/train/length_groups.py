"""Batches of examples of similar lengths, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Batches that are sorted together. More leave less padding, and fewer ways of meeting other examples.
_SORTED_TOGETHER = 16


class LengthGroups(Sampler[int]):
    """Indices in a random order whose runs of `group` examples have similar lengths, another order each epoch.

    Shuffled examples are sorted some groups at a time, at most a quarter of them all, and the groups are shuffled.
    The order depends on seed and epoch only, so a resumed run goes on with it.

    Args:
        lengths: tokens of each example.
        group: examples of one optimiser step, over all processes.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self._lengths, self._group, self._seed = lengths, group, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._epoch) % 2**63)
        order = torch.randperm(len(self), generator=generator).tolist()
        together = self._group * max(1, min(_SORTED_TOGETHER, len(self) // (4 * self._group)))
        groups = []
        for start in range(0, len(order), together):
            part = sorted(order[start : start + together], key=self._lengths.__getitem__)
            groups += [part[i : i + self._group] for i in range(0, len(part), self._group)]
        last = [groups.pop()] if groups and len(groups[-1]) < self._group else []
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return (index for group in shuffled + last for index in group)
