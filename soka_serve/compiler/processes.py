"""The processes of an `accelerate launch`, or the single one of an ordinary run."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from soka_serve.errors import BuildError, SokaError

T = TypeVar("T")

# What `accelerate launch` sets for the processes that it starts; the Trainer reads the same.
_SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
_TRUE = ("1", "true", "yes", "y", "on", "t")

_SAME_FILES = "Every machine needs the same files (base, data, manifest) and the same packages."


def launched_sharding() -> str | None:
    """How the launch shards a model that is trained: "FSDP 2" (each parameter on its own), "FSDP" or "DeepSpeed"."""
    for name, key in _SHARDING.items():
        if os.environ.get(key, "").lower() in _TRUE:
            return "FSDP 2" if name == "FSDP" and os.environ.get("FSDP_VERSION") == "2" else name
    return None


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
    def _name(self) -> str:
        """For people: which process, on which machine."""
        return f"process {self.index} ({platform.node()})"

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

    def together(self, act: Callable[[], T]) -> T:
        """Do something in every process; where one of them fails, all do, and none is left waiting for it.

        Raises:
            SokaError: that of this process, or one with the reasons of the others.
        """
        if self.count == 1:
            return act()
        failure: SokaError | None = None
        done: list[T] = []
        try:
            done.append(act())
        except SokaError as error:
            failure = error
        reasons = self.gather(
            [] if failure is None else [f"process {self.index} ({platform.node()}): {failure.message}"]
        )
        if failure is not None:
            raise failure
        if reasons:
            raise BuildError("\n".join(reasons), hint="Every machine reads the manifest, the base and the data itself.")
        return done[0]

    def check_same(self, what: str, value: str, hint: str = _SAME_FILES) -> None:
        """Check that a value is the same in every process.

        Args:
            what: of a process whose value is another, as in "process 1: WHAT than process 0".
            value: this process's.
            hint: what to do then.

        Raises:
            BuildError: it is not, in every process.
        """
        values = self.gather([value])
        others = [i for i, other in enumerate(values) if other != values[0]]
        if others:
            raise BuildError(
                f"process {', '.join(map(str, others))}: {what} than process 0",
                hint=hint,
            )

    def check_shared(self, folder: Path) -> None:
        """Check that a folder of the main process is seen by all, on whichever machine they are.

        Raises:
            BuildError: it is not, in every process.
        """
        if self.count == 1:
            return
        token = folder / f".shared-{secrets.token_hex(8)}" if self.is_main else None
        if token is not None:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        try:
            (mains,) = self.gather([token] if token is not None else [])
            lacking = self.gather(
                [] if (folder / mains.name).exists() else [f"process {self.index} ({platform.node()})"]
            )
        finally:
            if token is not None:
                token.unlink(missing_ok=True)
        if lacking:
            raise BuildError(
                f"{mains.parent}: not the same folder on all machines; not seen by {', '.join(lacking)}",
                hint="The folder of builds has to be on a disk that the machines share: [output] dir, or --out.",
            )
