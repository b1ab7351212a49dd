"""A finished adapter's factors, stacked over modules of one rank and factor shape.

Large models have hundreds of small factors, and a call of torch costs more than what it does to one of them. Where all
of them lie in the file one after the other in one dtype, as they are written, modules of one shape are views of one
block, or copied by one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soka_serve.adapter.format import KEY_PREFIX, QUANTIZE_KEY, AdapterFiles
from soka_serve.io.file_names import WEIGHTS_FILE
from soka_serve.io.safetensors import read_block
from soka_serve.kron.shapes import FactorShape
from soka_serve.trained import PARTS


@dataclass(frozen=True)
class Stack:
    """The modules of one rank and factor shape.

    Args:
        names: full module names, in the order of the file.
        rank: number of terms of each.
        shape: of its factors.
        starts: (modules,) where each of them begins, counted in values: Left, Right and sigma, one after the other.
    """

    names: tuple[str, ...]
    rank: int
    shape: FactorShape
    starts: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Values of Left, Right and sigma of one module."""
        m, n, p, q = self.shape
        return self.rank * m * n, self.rank * p * q, self.rank

    def factors(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left (modules, r, m, n), Right (modules, r, p, q) and sigma (modules, r), of all values of the file."""
        m, n, p, q = self.shape
        left, right, sigma = torch.split(self._block(values), list(self.sizes), 1)
        return left.view(-1, self.rank, m, n), right.view(-1, self.rank, p, q), sigma

    def _block(self, values: Tensor) -> Tensor:
        size, count = sum(self.sizes), len(self.names)
        steps = self.starts.diff()
        if bool((steps == steps[:1]).all()):
            step = int(steps[0]) if count > 1 else size
            return values.as_strided((count, size), (step, 1), values.storage_offset() + int(self.starts[0]))
        # Row i of this view begins at value i, so that selecting rows copies whole stretches.
        stretches = values.as_strided((values.numel() - size + 1, size), (1, 1))
        return stretches.index_select(0, self.starts)


@dataclass(frozen=True)
class Stacks:
    """All of a finished adapter's modules, in stacks.

    Args:
        stacks: of modules.
        dtype: of the file.
        start: byte of the file at which the values begin.
        values: how many there are.
    """

    stacks: tuple[Stack, ...]
    dtype: torch.dtype
    start: int
    values: int

    def read(self, directory: Path) -> Tensor:
        """All values of the adapter, (values,), as in the file.

        Raises:
            CheckpointError: the file cannot be read, or ends early.
        """
        return read_block(directory / WEIGHTS_FILE, self.start, self.values, self.dtype)

    def tensors(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors by name."""
        for stack in self.stacks:
            for part, stacked in zip(PARTS, stack.factors(values), strict=True):
                for name, tensor in zip(stack.names, stacked, strict=True):
                    yield f"{KEY_PREFIX}{name}.soka_{part}", tensor


def find_stacks(files: AdapterFiles) -> Stacks | None:
    """The stacks of an adapter that was checked; None where its tensors do not lie as they do in a finished one.

    That is a checkpoint of a training, a file of several dtypes, one whose tensors are in another order, and an adapter
    of a base that is held in bits, of which whoever reads it has more to say.
    """
    config, tensors = files.config, files.tensors
    dtypes = {info.dtype for info in tensors.values()}
    modules = config["soka_modules"]
    if (
        files.problems
        or QUANTIZE_KEY in config
        or config["soka_initial"]
        or len(dtypes) != 1
        or len(tensors) != len(PARTS) * len(modules)
    ):
        return None
    first = next(iter(tensors.values()))  # in the order of the data, without gaps
    width = first.torch_dtype.itemsize
    found: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for name, spec in modules.items():
        left, right, sigma = (tensors[f"{KEY_PREFIX}{name}.soka_{part}"] for part in PARTS)
        if spec.get("trained") or (left.end, right.end) != (right.start, sigma.start):
            return None
        found.setdefault((spec["rank"], *spec["shape"]), []).append(((left.start - first.start) // width, name))
    stacks = []
    for (rank, *shape), places in found.items():
        starts, names = zip(*sorted(places), strict=True)
        stacks.append(Stack(names, rank, FactorShape(*shape), torch.tensor(starts)))
    return Stacks(tuple(stacks), first.torch_dtype, first.start, sum(info.numel for info in tensors.values()))
