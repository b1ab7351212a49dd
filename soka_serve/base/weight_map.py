"""Which tensor of a checkpoint holds the weight of which module of the model. No torch but to read values.

A checkpoint may call its tensors otherwise than the model calls its modules: without the `model.` in front where the
bare model was saved, by an older layout of the architecture, or as a part of a larger tensor. Adapters name modules, so
whoever reads or writes weights asks this map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from soka_serve.errors import CheckpointError
from soka_serve.io.safetensors import TensorInfo, read_tensor

if TYPE_CHECKING:
    import torch


class WeightMap:
    """Where a checkpoint keeps the parameters of its model.

    Args:
        tensors: the checkpoint's headers by tensor name.
        names: by parameter name in the model, the name of the one tensor that holds it as it is; None: the names are
            the same.
        converted: by parameter name, the tensors that the model's library puts together, cuts or permutes for it.
        source: the checkpoint, for messages.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        names: Mapping[str, str] | None = None,
        converted: Mapping[str, Sequence[str]] | None = None,
        source: Path | str = "the base",
    ) -> None:
        self._tensors, self._names, self.source = tensors, names, source
        self._converted = converted or {}

    def find_parameter(self, parameter: str) -> TensorInfo | None:
        """The tensor that holds a parameter ('model.norm.weight') as it is; None where no single one does."""
        name = parameter if self._names is None else self._names.get(parameter)
        return None if name is None else self._tensors.get(name)

    def find(self, module: str) -> TensorInfo | None:
        """The tensor that holds a module's weight as it is; None where no single one does."""
        return self.find_parameter(f"{module}.weight")

    def is_converted(self, module: str) -> bool:
        """Whether a module's weight is put together, cut or permuted when it is loaded."""
        return f"{module}.weight" in self._converted

    def problem(self, module: str) -> str:
        """Why `find` has nothing for a module."""
        if parts := self._converted.get(f"{module}.weight"):
            return (
                f"{module}: its weight is no tensor of the checkpoint: transformers makes it from {len(parts)} "
                f"({parts[0]}{', …' if len(parts) > 1 else ''})"
            )
        return f"{module}: the base has no such weight"

    def get(self, module: str) -> TensorInfo:
        """The tensor that holds a module's weight as it is.

        Raises:
            CheckpointError: there is none.
        """
        info = self.find(module)
        if info is None:
            raise CheckpointError(f"{self.source}: {self.problem(module)}", hint="is this the adapter's own base?")
        return info

    def read(self, module: str) -> torch.Tensor:
        """A module's weight, (out, in), on the CPU, in its own dtype and memory.

        Raises:
            CheckpointError: no such tensor, or the file ends early.
        """
        return read_tensor(self.get(module))

    def modules(self) -> Iterator[str]:
        """Names of the modules whose weight is a tensor of the checkpoint."""
        names = self._tensors if self._names is None else self._names
        return (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
