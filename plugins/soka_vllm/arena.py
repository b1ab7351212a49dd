"""Memory for factors: a buffer that grows with what a layer's slots hold, or one arena for all layers that never moves.

On a CPU every layer has a buffer of its own that is as large as its content. On CUDA, recorded graphs hold addresses,
and vLLM gives all memory that is free after its profile to the KV cache. So there, all layers share one arena that is
allocated with the first layer, with an equal part for every slot: SOKA_SLOT_PARAMETERS values, which an adapter's
factors on one GPU must fit in. What a slot held must be cleared in every layer before any layer fills it again; else
old and new factors must fit together.
"""

from __future__ import annotations

from typing import ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from soka_vllm.settings import SLOT_VARIABLE, slot_values


class FactorMemory(Protocol):
    """Where a `SlotStore` keeps factors."""

    values: Tensor

    def take(self, slot: int, size: int) -> int:
        """Reserve `size` values for a slot and return their offset."""

    def give_back(self, slot: int, start: int) -> None:
        """Free what `take` returned."""


class Buffer:
    """A buffer that grows when it has no gap that is large enough; growing may move it.

    Args:
        dtype, device: of its values, of which the last ones may never have been written.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.empty(0, dtype=dtype, device=device)
        self._room = _FreeList(0)

    @property
    def size(self) -> int:
        """Up to where values were ever taken: behind that the system has given no memory."""
        return self._room.end

    def take(self, slot: int, size: int) -> int:
        """Reserve `size` values and return their offset; `slot` is ignored."""
        start = self._room.find(size)
        if start + size > len(self.values):
            self._grow(start + size)
        self._room.take(start, size)
        return start

    def give_back(self, slot: int, start: int) -> None:
        """Free what `take` returned."""
        self._room.give_back(start)

    def _grow(self, size: int) -> None:
        # vLLM fills slots inside inference mode and outside it; a tensor made inside could not be changed outside.
        with torch.inference_mode(False):
            # Twice as much, so that filling many slots does not copy all of them each time. What no factors have been
            # written to takes no memory: the system gives it page by page.
            grown = self.values.new_empty(max(size, 2 * len(self.values)))
            grown[: self.size] = self.values[: self.size]
            self.values = grown


class Arena:
    """Memory for the slots of all layers, allocated at once; `values` is the same tensor for good.

    Args:
        slots: number of slots.
        slot_values: values that one slot may hold, over all layers.
        dtype, device: of the values.
    """

    _shared: ClassVar[WeakValueDictionary[tuple[int, int, torch.dtype, torch.device], Arena]] = WeakValueDictionary()

    def __init__(self, slots: int, slot_values: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slot_values = slot_values
        with torch.inference_mode(False):
            self.values = torch.zeros(slots * slot_values, dtype=dtype, device=device)
        self._rooms = [_FreeList(slot * slot_values) for slot in range(slots)]

    @classmethod
    def shared(cls, slots: int, dtype: torch.dtype, device: torch.device) -> Arena:
        """The arena of all layers with these slots; it lives as long as one of them.

        Raises:
            ValueError: SOKA_SLOT_PARAMETERS is not a positive integer.
        """
        key = (slots, slot_values(), dtype, device)
        arena = cls._shared.get(key)
        if arena is None:
            arena = cls._shared[key] = cls(*key)
        return arena

    def take(self, slot: int, size: int) -> int:
        """Reserve `size` values in a slot's part and return their offset.

        Raises:
            ValueError: there is no room.
        """
        room = self._rooms[slot]
        start = room.find(size)
        if start + size > room.begin + self.slot_values:
            raise ValueError(too_large(size + room.used, self.slot_values))
        room.take(start, size)
        return start

    def give_back(self, slot: int, start: int) -> None:
        """Free what `take` returned."""
        self._rooms[slot].give_back(start)


def too_large(values: int, slot_values: int) -> str:
    """Error text for an adapter larger than its slot."""
    return (
        f"the adapter's factors need {values} values on this GPU; a slot has room for {slot_values}. "
        f"Start the server with {SLOT_VARIABLE}={values} or more (it is reserved for every slot)."
    )


class _FreeList:
    """Free-list of a memory's stretches from offset `begin` on.

    An adapter mostly takes the place of one with the same shapes, so what was given back is remembered by its size:
    searching among a thousand adapters' stretches takes longer than filling one.
    """

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.used = 0
        self.end = begin  # nothing behind this was ever taken
        self._taken: dict[int, int] = {}  # start: size
        self._given_back: dict[int, list[int]] = {}  # size: starts

    def find(self, size: int) -> int:
        """Where the next stretch of `size` values may start; `take` it next."""
        if starts := self._given_back.get(size):
            return starts[-1]
        if self.used == self.end - self.begin:  # there is no gap
            return self.end
        end = self.begin
        for start, length in sorted(self._taken.items()):
            if start - end >= size:
                break
            end = start + length
        return end

    def take(self, start: int, size: int) -> None:
        """Reserve what `find` returned."""
        starts = self._given_back.get(size)
        if starts and starts[-1] == start:
            starts.pop()
        elif start < self.end:  # cut out of a gap, maybe out of what was given back
            self._given_back.clear()
        self._taken[start] = size
        self.used += size
        self.end = max(self.end, start + size)

    def give_back(self, start: int) -> None:
        """Free a stretch."""
        size = self._taken.pop(start)
        self.used -= size
        self._given_back.setdefault(size, []).append(start)
