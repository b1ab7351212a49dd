"""The processes of an `accelerate launch`, or the single one of an ordinary run."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


class Processes:
    """This process's place among its fellows. torch.distributed is only touched when there are several.

    Args:
        count: how many there are; None: as the environment says.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1")) if count is None else count
        self.index = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        if self.count > 1:
            from accelerate import PartialState

            self._state = PartialState()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the artefact."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of the processes."""
        if self.count == 1:
            return items
        import torch.distributed as dist

        parts: list[list[T]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]
