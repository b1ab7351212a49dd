"""Reading limits of adapters: what one that fits the served model can take, and what is refused beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from soka_serve.io.budget import ReadingBudget
from soka_vllm.readers import LORA, read_kind
from soka_vllm.settings import KEEP_VARIABLE, keep_limit

_TENSORS_A_MODULE = 8  # a module of a training's checkpoint has six
_LEAST_TENSORS = 1024  # an adapter of modules that this server leaves out is told so by their names
_HEADER_BYTES_A_TENSOR = 400
_TEXT_BYTES, _CONFIG_BYTES_A_MODULE, _LOCK_BYTES_A_MODULE = 1 << 18, 1 << 10, 1 << 8
_SECONDS = 20.0
# Of the processor, in the engine's loop: below what a request of a model of this size takes.
_PATTERN_SECONDS, _PATTERN_SECONDS_A_MODULE = 0.05, 0.001
LEAST_BYTES = 1 << 30


class ModelLimits(NamedTuple):
    """Of the served model: how many modules an adapter can have, and how many values.

    Args:
        modules: that take adapters.
        values: of Kronecker factors, products multiplied out.
        lora_values: of LoRA's matrices at the largest rank served.
    """

    modules: int
    values: int
    lora_values: int

    def budget(self) -> ReadingBudget:
        """For one adapter, of a kind that is not known yet."""
        tensors = max(_TENSORS_A_MODULE * self.modules, _LEAST_TENSORS)
        return ReadingBudget(
            config_bytes=_TEXT_BYTES + _CONFIG_BYTES_A_MODULE * self.modules,
            lock_bytes=_TEXT_BYTES + _LOCK_BYTES_A_MODULE * self.modules,
            header_bytes=_TEXT_BYTES + _HEADER_BYTES_A_TENSOR * tensors,
            tensors=tensors,
            values=self.lora_values,
            seconds=_SECONDS,
            pattern_seconds=_PATTERN_SECONDS + _PATTERN_SECONDS_A_MODULE * self.modules,
            source=f" by this server, whose model has {self.modules} modules for adapters",
        )

    def open(self, directory: Path) -> tuple[str | None, ReadingBudget]:
        """The kind of adapter in a directory, see `read_kind`, and the budget for the rest of it."""
        budget = self.budget()
        kind = read_kind(directory, budget)
        if kind != LORA:
            budget.values = self.values
            budget.source += f" ({KEEP_VARIABLE} allows for more)" if self.values == values_kept() else ""
        return kind, budget


def values_kept() -> int:
    """Number of float32 values that a worker's adapter cache holds; an upper bound for a single adapter."""
    return max(keep_limit(), LEAST_BYTES) // 4
