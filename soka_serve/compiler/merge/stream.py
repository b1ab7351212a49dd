"""Writing merged safetensors files: block by block, so that memory stays at some MiB however large a tensor is.

One pass over the base: a block is read once to be hashed, added to, rounded and written while caches hold it. Several
files are in work at once, a thread each (all of it runs outside the interpreter's lock); two threads that write to one
file would wait for each other.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soka_serve.compiler.merge.files import DirectWriter, Reader, Writer
from soka_serve.errors import CheckpointError
from soka_serve.io.safetensors import DTYPES, FLOAT_DTYPES, TensorInfo, read_metadata, stored_bytes
from soka_serve.kron import Factors

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from soka_serve.base.model import Quantize

log = logging.getLogger(__name__)

_BLOCK_VALUES = 1 << 19  # values of a block of an adapted weight: few calls, and what is in work stays in caches
_COPY_BYTES = 1 << 20

Weighted = Sequence[tuple[Factors, float]]


class Terms:
    """One adapter's terms of one weight, laid out so that any range of rows can be added without a transposition.

    Row i*p + a of the delta, seen as (n, q), is the product of (n, r) and (r, q): left[:, i].T with sigma and weight
    in it, and right[:, a]. A batched product adds a whole range of rows in place.
    """

    def __init__(self, factors: Factors, weight: float, dtype: torch.dtype) -> None:
        # sigma and weight in float64: three factors multiplied, one rounding.
        scaled = factors.left.double() * (factors.sigma.double() * weight)[:, None, None]
        self.left = scaled.to(dtype).permute(1, 2, 0).contiguous()  # (m, n, r)
        self.right = factors.right.to(dtype).permute(1, 0, 2).contiguous()  # (p, r, q)

    @property
    def rows_per_left(self) -> int:
        """p: rows of the weight that one row of Left covers."""
        return self.right.shape[0]

    def add_to(self, block: Tensor, first: int) -> None:
        """block += delta[first : first + len(block)]; block (rows, in), contiguous, dtype of the terms."""
        p, r, q = self.right.shape
        n = self.left.shape[1]
        row, last = first, first + block.shape[0]
        while row < last:
            i, a = divmod(row, p)
            count = min(p - a, last - row)
            part = block[row - first : row - first + count].view(count, n, q)
            part.baddbmm_(self.left[i].expand(count, n, r), self.right[a : a + count])
            row += count


@dataclass(frozen=True)
class OutputTensor:
    """A tensor's place in the file to be written; `deltas` is empty for a tensor that no adapter touches.

    `quantize` names the bits that the base computes with in its place ("none": itself).
    """

    info: TensorInfo
    dtype: str
    start: int
    end: int
    deltas: Weighted
    quantize: Quantize = "none"

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of the base."""
        return not self.deltas and self.dtype == self.info.dtype and self.quantize == "none"


@dataclass(frozen=True)
class FilePlan:
    """A merged file: its first bytes, up to the data, and what follows, in the order of the data.

    That is the base's order when nothing changes size, else widest dtype first, as the safetensors library lays files
    out.
    """

    header: bytes
    pieces: list[OutputTensor]

    @property
    def size(self) -> int:
        """Of the whole file, bytes."""
        return self.pieces[-1].end

    def keeps_order(self) -> bool:
        """Whether the data lie in the base's order, so that its file can be hashed on the way."""
        starts = [piece.info.start for piece in self.pieces]
        return starts == sorted(starts)


def plan_file(
    tensors: Sequence[TensorInfo], dtype: str, adapted: Mapping[str, Weighted], held: Mapping[str, Quantize]
) -> FilePlan:
    """Header and layout of the merged version of one safetensors file.

    Args:
        tensors: all tensors of the file, in the order of their data.
        dtype: safetensors' name of the dtype that floating tensors get, or "auto" to keep each one's own.
        adapted: by tensor name, the factors and weights to add.
        held: by tensor name, the bits that the base computes with in its place.
    """
    file = tensors[0].file
    kept = dtype == "auto" or all(t.dtype == dtype or t.dtype not in FLOAT_DTYPES for t in tensors)
    chosen = [(t, t.dtype if kept or t.dtype not in FLOAT_DTYPES else dtype) for t in tensors]
    if kept:
        with file.open("rb") as stream:
            header = stream.read(tensors[0].start)
    else:
        chosen.sort(key=lambda pair: -DTYPES[pair[1]][0])
    position, spec = 0, {}
    places = []
    for info, out in chosen:
        size = stored_bytes(out, info.numel)
        places.append((info, out, position, position + size))
        spec[info.name] = {"dtype": out, "shape": list(info.shape), "data_offsets": [position, position + size]}
        position += size
    if not kept:
        metadata = read_metadata(file)
        text = json.dumps({**({"__metadata__": metadata} if metadata else {}), **spec}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
    at = len(header)
    pieces = [
        OutputTensor(info, out, at + start, at + end, adapted.get(info.name, ()), held.get(info.name, "none"))
        for info, out, start, end in places
    ]
    return FilePlan(header, pieces)


def work_dtype(piece: OutputTensor) -> torch.dtype:
    """In which a tensor is summed: one step wider than what is written, so that only the last rounding shows.

    Float32 is enough for half precision. Float32 sums for a float32 weight would leave errors of tens of units in the
    last place where terms cancel each other.
    """
    wide = piece.info.dtype == "F64" or (piece.deltas and piece.dtype in ("F32", "F64"))
    return torch.float64 if wide else torch.float32


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """One thread per torch operation while our own threads share the cores; the setting is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_file(
    target: Path, plan: FilePlan, *, advance: Callable[[int], None], stop: Event, digest: Hash | None, direct: bool
) -> None:
    """Write one merged file.

    Args:
        target: the new file.
        plan: what goes into it.
        advance: called with the number of bytes written.
        stop: gives up when set.
        digest: takes the whole content of the base's file; None to skip hashing, as where not `plan.keeps_order()`.
        direct: past the page cache.

    Raises:
        CheckpointError: a value became NaN or infinite (too large for the dtype, or so in the base).
        CancelledError: `stop` was set; the file is not finished.
        OSError: the disk is full, and the like.
    """
    writer = DirectWriter if direct else Writer
    first = plan.pieces[0].info
    with Reader(first.file, digest) as base, writer(target, plan.size) as out:
        base.read(0, first.start)
        out.append(memoryview(bytearray(plan.header)))
        advance(len(plan.header))
        for piece in plan.pieces:
            for size in _write_piece(base, out, piece):
                advance(size)
                if stop.is_set():
                    raise CancelledError


def _write_piece(base: Reader, out: Writer, piece: OutputTensor) -> Iterator[int]:
    """Write a tensor block by block; yields the size of each."""
    info = piece.info
    if piece.is_copy:
        for first in range(0, info.nbytes, _COPY_BYTES):
            size = min(_COPY_BYTES, info.nbytes - first)
            out.append_copy(base, info.start + first, size)
            yield size
    elif info.numel:
        yield from _write_sums(base, out, _TensorJob(piece))


class _TensorJob:
    """One tensor that is computed: its rows, how many of them make a block, and the terms to add.

    Made when its turn comes, so that only the terms in work are held twice.
    """

    def __init__(self, piece: OutputTensor) -> None:
        self.piece = piece
        self.dtype = work_dtype(piece)
        self.terms = [Terms(f, w, self.dtype) for f, w in piece.deltas]
        # What is only converted is cut anywhere.
        self.rows, self.columns = piece.info.shape if self.terms else (piece.info.numel, 1)
        self.row_bytes = stored_bytes(piece.dtype, self.columns)
        self.step = max(1, _BLOCK_VALUES // self.columns)
        if self.terms and self.step > (p := self.terms[0].rows_per_left):
            self.step -= self.step % p


def _write_sums(base: Reader, out: Writer, work: _TensorJob) -> Iterator[int]:
    """Compute and write one tensor: sums in `work_dtype`, rounded once to the output's; yields each block's bytes."""
    piece, info, columns = work.piece, work.piece.info, work.columns
    values = min(work.step, work.rows) * columns
    # The same memory for every block: fresh pages would cost as much as the arithmetic.
    sums = torch.empty(values, dtype=work.dtype)
    rounded = torch.empty(values, dtype=getattr(torch, DTYPES[piece.dtype][1]))
    largest = min(torch.finfo(rounded.dtype).max ** 2, torch.finfo(work.dtype).max)
    row_bytes = stored_bytes(info.dtype, columns)
    held = _held(base, piece)
    for row in range(0, work.rows, work.step):
        rows = min(work.step, work.rows - row)
        if held is None:
            part = torch.frombuffer(base.read(info.start + row * row_bytes, rows * row_bytes), dtype=info.torch_dtype)
        else:
            part = held[row * columns : (row + rows) * columns]
        block, result = sums[: rows * columns], rounded[: rows * columns]
        block.copy_(part)
        for terms in work.terms:
            terms.add_to(block.view(rows, columns), row)
        result.copy_(block)
        # One cheap pass: no value is larger than the root of the sum of squares, and NaN fails every comparison.
        if not float(torch.dot(block, block)) <= largest and not bool(torch.isfinite(result).all()):
            raise _not_finite(piece, part, block)
        out.append(memoryview(result.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        yield rows * work.row_bytes


def _held(base: Reader, piece: OutputTensor) -> Tensor | None:
    """What a base in bits computes with in a tensor's place, flat, float32; None: the tensor itself.

    It is worked out of the whole tensor, whose scales are quantised together.
    """
    info = piece.info
    if piece.quantize == "none":
        return None
    from soka_serve.base.held import held_weight

    whole = torch.frombuffer(base.read(info.start, info.nbytes), dtype=info.torch_dtype).view(info.shape)
    if not bool(torch.isfinite(whole).all()):
        raise _not_finite(piece, whole, whole)
    return held_weight(whole, piece.quantize).flatten()


def _not_finite(piece: OutputTensor, before: Tensor, exact: Tensor) -> CheckpointError:
    name = piece.info.name
    if not bool(torch.isfinite(before).all()):
        return CheckpointError(
            f"{piece.info.file}: {name} holds values that are NaN or infinite",
            hint="the base is damaged: fetch it again",
        )
    if not bool(torch.isfinite(exact).all()):
        return CheckpointError(f"{name}: base + delta is NaN or infinite", hint="the adapter's training diverged")
    dtype = DTYPES[piece.dtype][1]
    return CheckpointError(
        f"{name}: base + delta reaches {float(exact.abs().max()):.4g}, too large for {dtype}",
        hint="merge with dtype bfloat16 or float32",
    )
