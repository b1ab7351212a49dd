"""Safetensors files: headers and single tensors, read without mapping or loading anything else.

Nothing here imports torch at import time; `read_tensor` and `check_finite` do when they are called.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeGuard

from soka_serve.errors import CheckpointError, first_ten, is_printable, printable
from soka_serve.io.budget import ReadingBudget, open_regular, refuse_hole
from soka_serve.io.files import read_errors
from soka_serve.io.json_files import CHECK_RIGHTS, FETCH_AGAIN, no_duplicates

if TYPE_CHECKING:
    import torch

# safetensors dtype -> (bits per element, torch's name; empty where torch has no such dtype)
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2": (8, "float8_e5m2"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, ""), "F6_E3M2": (6, ""), "F4": (4, ""),
    "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"),
    "U64": (64, "uint64"), "U32": (32, "uint32"), "U16": (16, "uint16"), "U8": (8, "uint8"),
    "BOOL": (8, "bool"), "C64": (64, "complex64"),
}  # fmt: skip
STORED_NAMES = {name: stored for stored, (_, name) in DTYPES.items() if name}  # by torch's name
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


def bits_of(dtype: str) -> int:
    """Bits that an element of a safetensors dtype takes in a file."""
    return DTYPES[dtype][0]


def stored_bytes(dtype: str, elements: int) -> int:
    """Bytes that elements of a safetensors dtype take in a file.

    >>> stored_bytes("BF16", 3), stored_bytes("F4", 6)
    (6, 3)
    """
    return -(-elements * bits_of(dtype) // 8)


_MAX_DIMENSIONS = 16
_MAX_SIZE = 1 << 62
_MAX_NAME = 1000


class TensorInfo(NamedTuple):
    """Where a tensor lies: `start` and `end` are absolute byte offsets in `file`, `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in the file, bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of `dtype`; imports torch. CheckpointError where torch has none."""
        import torch

        dtype = getattr(torch, DTYPES[self.dtype][1], None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                f"{self.file}: {self.name} is {self.dtype}, which torch has no dtype for",
                hint="give a checkpoint in F64, F32, F16 or BF16",
            )
        return dtype


@dataclass(frozen=True)
class RawHeader:
    """A safetensors file's header as it was read, not parsed yet: what is in it depends on these bytes and the size.

    Args:
        file: the file.
        text: JSON.
        size: of the whole file, bytes.
    """

    file: Path
    text: bytes
    size: int

    @property
    def data_start(self) -> int:
        """The offset at which the data begin."""
        return 8 + len(self.text)

    def parse(self, budget: ReadingBudget | None = None) -> dict[str, Any]:
        """The JSON object.

        Raises:
            CheckpointError: malformed, or more tensors than the budget allows.
        """
        try:
            header = json.loads(self.text, object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.file}: malformed header: {error}", hint=FETCH_AGAIN) from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.file}: malformed header: expected an object", hint=FETCH_AGAIN)
        if budget is not None:
            budget.take_tensors(self.file, len(header))
        return header


def read_raw_header(file: Path, budget: ReadingBudget | None = None) -> RawHeader:
    """The header of a safetensors file, not parsed.

    Args:
        file: the file.
        budget: of an adapter; a hole is then refused, too.

    Raises:
        CheckpointError: missing, truncated, no safetensors file, or its header is larger than allowed.
    """
    limit = (budget or ReadingBudget()).header_bytes
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if prefix.startswith(b"version "):
                raise CheckpointError(
                    f"{file}: a git-lfs pointer, not the file itself", hint="run `git lfs pull` in the checkpoint"
                )
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: truncated: expected at least 8 bytes, found {size}", hint=FETCH_AGAIN)
            (length,) = struct.unpack("<Q", prefix)
            if length > limit:
                raise CheckpointError(
                    f"{file}: not a safetensors file: its header would take {length} bytes "
                    f"(at most {limit} are allowed{budget.source if budget else ''})",
                    hint=FETCH_AGAIN,
                )
            if size < 8 + length:
                raise CheckpointError(
                    f"{file}: truncated: expected at least {8 + length} bytes (the header), found {size}",
                    hint=FETCH_AGAIN,
                )
            if budget is not None:
                refuse_hole(file, stream)
            return RawHeader(file, read_exactly(stream, length), size)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file", hint=FETCH_AGAIN) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint=CHECK_RIGHTS) from error


def read_exactly(stream: BinaryIO, length: int) -> bytes:
    """The next `length` bytes of an unbuffered file, fewer where it ends."""
    data = bytearray()
    while len(data) < length and (part := stream.read(length - len(data))):
        data += part
    return bytes(data)


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    for number in value:  # noqa: SIM110  a generator takes twice as long, and headers have hundreds of entries
        if type(number) is not int or not 0 <= number <= _MAX_SIZE:
            return False
    return True


def read_metadata(file: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file (usually {"format": "pt"}); {} where there is none."""
    metadata = read_raw_header(file).parse().get("__metadata__", {})
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def read_header(file: Path, budget: ReadingBudget | None = None) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, in the order of the data, without reading the data.

    Args:
        file: the file.
        budget: of an adapter; None for a base checkpoint.

    Raises:
        CheckpointError: missing, truncated (with the expected and the actual number of bytes), malformed, or beyond
            the budget.
    """
    return parse_header(read_raw_header(file, budget), budget)


def parse_header(raw: RawHeader, budget: ReadingBudget | None = None) -> dict[str, TensorInfo]:
    """`read_header` of what was read before.

    Raises:
        CheckpointError: as `read_header`.
    """
    file, data_start = raw.file, raw.data_start
    header = raw.parse(budget)
    header.pop("__metadata__", None)
    tensors: list[TensorInfo] = []
    wrong: list[str] = []
    for name, spec in header.items():
        if len(name) > _MAX_NAME or not is_printable(name):  # it would be in messages and logs
            wrong.append(f"'{printable(name, 120)}': expected a name of at most {_MAX_NAME} printable characters")
            continue
        dtype = shape = offsets = None
        if isinstance(spec, dict):
            dtype, shape, offsets = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
        if not (isinstance(dtype, str) and _is_naturals(shape) and _is_naturals(offsets) and len(offsets) == 2):
            wrong.append(f"{name}: expected dtype, shape and data_offsets, got {spec!r:.120}")
            continue
        if dtype not in DTYPES:
            wrong.append(f"{name}: dtype {dtype!r:.40} is not one of {', '.join(DTYPES)}")
            continue
        first, last = offsets
        info = TensorInfo(name, dtype, tuple(shape), file, data_start + first, data_start + last)
        if (last - first) * 8 != math.prod(shape) * DTYPES[dtype][0]:
            wrong.append(
                f"{name}: {dtype} of shape {shape} takes {stored_bytes(dtype, info.numel)} bytes, "
                f"data_offsets {offsets} span {info.nbytes}"
            )
        tensors.append(info)
    tensors.sort(key=attrgetter("start", "end"))
    position = data_start
    if not wrong:
        for info in tensors:
            if info.start != position:
                wrong.append(f"{info.name}: begins at byte {info.start}, expected {position} (a gap or an overlap)")
                break
            position = info.end
    if wrong:
        lines = first_ten([f"{file}: malformed header: {line}" for line in wrong])
        raise CheckpointError("\n".join(lines), hint=FETCH_AGAIN)
    if raw.size != position:
        what = "truncated" if raw.size < position else "longer than its header says"
        raise CheckpointError(f"{file}: {what}: expected {position} bytes, found {raw.size}", hint=FETCH_AGAIN)
    return {info.name: info for info in tensors}


def read_tensor(info: TensorInfo, rows: slice | None = None) -> torch.Tensor:
    """One tensor, or whole rows of it (along the first dimension), read into memory of its own.

    Semantics: `all_of_it[rows]`, shape `info.shape` but for the first dimension, dtype as in the file, CPU.

    Raises:
        CheckpointError: the file cannot be read, or ends early (it was changed after its header was read).
    """
    import torch

    shape, start = list(info.shape), info.start
    if rows is not None:
        first, last, step = rows.indices(shape[0])
        if step != 1:
            raise ValueError(f"rows must be contiguous, got step {step}")
        start += first * (info.nbytes // max(shape[0], 1))
        shape[0] = max(last - first, 0)
    tensor = torch.empty(shape, dtype=info.torch_dtype)
    if tensor.numel():
        with read_errors(info.file):
            _read_into(tensor.view(-1).view(torch.uint8), info.file, start, info.name)
    return tensor


def read_tensors(tensors: Mapping[str, TensorInfo], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Many tensors of one file in one read: views of the same memory, on the CPU, shape as in the file.

    For files of many small tensors, of which most are wanted: it holds everything from the first to the last.

    Args:
        tensors: what is read, by name.
        dtype: of the result; None: as in the file.

    Raises:
        CheckpointError: the file cannot be read, or ends early (it was changed after its header was read).
        ValueError: the tensors are of several files.
    """
    import torch

    files = {info.file for info in tensors.values()}
    if not files:
        return {}
    (file,) = files
    first = min(info.start for info in tensors.values())
    content = torch.empty(max(info.end for info in tensors.values()) - first, dtype=torch.uint8)
    with read_errors(file):
        _read_into(content, file, first, "tensors")
    stored = {info.dtype for info in tensors.values()}
    in_order = sorted(tensors.values(), key=lambda info: info.start)
    if len(stored) == 1 and sum(info.nbytes for info in in_order) == len(content):  # one after the other, as we write
        values = content.view(in_order[0].torch_dtype)
        parts = torch.split(values.to(dtype or values.dtype), [info.numel for info in in_order])
        places = {id(info): part.view(info.shape) for info, part in zip(in_order, parts, strict=True)}
        return {name: places[id(info)] for name, info in tensors.items()}
    found = {}
    for name, info in tensors.items():
        part = content[info.start - first : info.end - first]
        if part.storage_offset() % stored_bytes(info.dtype, 1):  # only files that others have written
            part = part.clone()
        found[name] = part.view(info.torch_dtype).view(info.shape).to(dtype or info.torch_dtype)
    return found


def read_block(file: Path, start: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Values that lie in one piece in a file, (elements,) on the CPU.

    Args:
        file: the file.
        start: byte at which they begin.
        elements, dtype: of them.

    Raises:
        CheckpointError: the file cannot be read, or ends early.
    """
    import torch

    values = torch.empty(elements, dtype=dtype)
    with read_errors(file):
        _read_into(values.view(torch.uint8), file, start, "tensors")
    return values


def _read_into(target: torch.Tensor, file: Path, start: int, what: str) -> None:
    buffer = memoryview(target.numpy())  # type: ignore[arg-type]
    with open_regular(file) as stream:
        stream.seek(start)
        done = 0
        while done < len(buffer):
            count = stream.readinto(buffer[done:])  # type: ignore[attr-defined]  # a FileIO has it
            if not count:
                raise CheckpointError(
                    f"{file}: {what}: truncated: expected {len(buffer)} bytes, found {done}", hint=FETCH_AGAIN
                )
            done += count


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor, any shape and floating dtype, on the CPU, holds neither NaN nor infinity."""
    import torch

    # A sum is finite unless an element is not, or it overflows: one pass, and a mask, which takes many times as long,
    # only in doubt. bfloat16, whose range is float32's, is added in float32.
    same = tensor.dtype in (torch.bfloat16, torch.float32, torch.float64)
    total = tensor.sum(dtype=tensor.dtype if same else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def find_not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors, floating and on the CPU, that hold NaN or infinity.

    One pass over all where there are none: for small tensors, a call costs more than looking at the values.
    """
    import torch

    if not tensors or all_finite(torch.cat([tensor.flatten() for tensor in tensors.values()])):
        return []
    return [name for name, tensor in tensors.items() if not all_finite(tensor)]


def check_finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return `tensor`, any shape and floating dtype, unless it holds NaN or infinity.

    Raises:
        CheckpointError: names the tensor and counts its values that are not finite.
    """
    import torch

    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite",
            hint=f"the checkpoint is damaged: {FETCH_AGAIN}",
        )
    return tensor
