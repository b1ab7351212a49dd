"""The operator in Triton, for CUDA: one kernel, nothing between the two products goes through memory.

A program takes one token, one slice of the output and, of the (m, p) matrix Y that the slice's features are, every
so-many-th tile. For each tile it sums (Left[k] X) Right[k]^T over the terms, block by block of X = x.view(n, q), in
float32, and adds the sum to the output once. What slot a token has and what that slot holds is read from the device:
the grid depends on the number of tokens and slices alone, no host code waits, and nothing is allocated, so that a CUDA
graph recorded with some adapters is right for all others.

The first product takes 16-bit factors and activations as they are. The second takes the float32 result of the first
with Right in TensorFloat-32, whose mantissa is three bits longer than bfloat16's; float32 factors are multiplied in
float32 throughout. Tiles have at most 32 rows: Hopper's wgmma instructions, which need 64, are miscompiled by ptxas
before 13.3 where one product follows on another (triton-lang/triton issue 9433).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from soka_vllm.ops.torch_ops import ROW_FIELDS

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit  # type: ignore[untyped-decorator]
def _add_kron_kernel(  # type: ignore[no-untyped-def]
    out,
    x,
    token_slots,
    values,
    table,
    slots,
    in_features,
    out_stride,
    x_stride,
    FIELDS: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_P: tl.constexpr,  # noqa: N803
    BLOCK_Q: tl.constexpr,  # noqa: N803
    NATIVE: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One program of the grid, see above. Long, with many arguments: a kernel takes numbers and calls no objects."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1).to(tl.int64)
    slot = tl.load(token_slots + token).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        return
    row = table + (index * slots + slot) * FIELDS
    rank = tl.load(row + 2).to(tl.int32)
    if rank == 0:
        return
    m = tl.load(row + 3).to(tl.int32)
    n = tl.load(row + 4).to(tl.int32)
    p = tl.load(row + 5).to(tl.int32)
    q = tl.load(row + 6).to(tl.int32)
    left_first = tl.load(row + 7) == 0
    out_skip = tl.load(row + 8).to(tl.int32)
    in_skip = tl.load(row + 9).to(tl.int32)
    width = tl.load(row + 11).to(tl.int32)
    left = values + tl.load(row)
    right = left + rank * m * n
    # Left is (m, r, n) or (m, n, r), Right (r, q, p) or (q, r, p).
    left_k = tl.where(left_first, n, 1)
    left_n = tl.where(left_first, 1, rank)
    right_k = tl.where(left_first, q * p, p)
    right_q = tl.where(left_first, p, rank * p)
    x_row = x + token * x_stride
    out_row = out + token * out_stride + tl.load(row + 10)
    p_tiles = tl.cdiv(p, BLOCK_P)
    for tile in range(tl.program_id(2), tl.cdiv(m, BLOCK_M) * p_tiles, tl.num_programs(2)):
        of_m = (tile // p_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        of_p = (tile % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        total = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
        for first_q in range(0, q, BLOCK_Q):
            of_q = first_q + tl.arange(0, BLOCK_Q)
            right_at = of_q[:, None] * right_q + of_p[None, :]
            right_in = (of_q[:, None] < q) & (of_p[None, :] < p)
            for first_n in range(0, n, BLOCK_N):
                of_n = first_n + tl.arange(0, BLOCK_N)
                left_at = of_m[:, None] * (rank * n) + of_n[None, :] * left_n
                left_in = (of_m[:, None] < m) & (of_n[None, :] < n)
                feature = of_n[:, None] * q + of_q[None, :] - in_skip
                x_in = (of_n[:, None] < n) & (of_q[None, :] < q) & (feature >= 0) & (feature < in_features)
                x_block = tl.load(x_row + feature, mask=x_in, other=0.0)
                for k in range(rank):
                    left_block = tl.load(left + left_at + k * left_k, mask=left_in, other=0.0)
                    right_block = tl.load(right + right_at + k * right_k, mask=right_in, other=0.0).to(tl.float32)
                    if NATIVE:
                        between = tl.dot(left_block, x_block)
                    else:
                        between = tl.dot(left_block.to(tl.float32), x_block.to(tl.float32), input_precision=PRECISION)
                    total += tl.dot(between, right_block, input_precision=PRECISION)
        feature = of_m[:, None] * p + of_p[None, :] - out_skip
        out_in = (of_m[:, None] < m) & (of_p[None, :] < p) & (feature >= 0) & (feature < width)
        total += tl.load(out_row + feature, mask=out_in, other=0.0).to(tl.float32)
        tl.store(out_row + feature, total.to(out.dtype.element_ty), mask=out_in)


def configure(rows: int, x_dtype: torch.dtype, values_dtype: torch.dtype) -> tuple[int, dict[str, Any], dict[str, int]]:
    """How the kernel is compiled and launched.

    Args:
        rows: tokens times slices.

    Returns:
        Programs per token and slice, the kernel's constants, and the compiler's options, with which nothing is spilled
        from registers on compute capability 9.0.
    """
    same = x_dtype == values_dtype != torch.float32
    # While there are more processors than programs, smaller tiles and more programs for each token.
    few = rows <= 128
    constants = {
        "FIELDS": ROW_FIELDS,
        "BLOCK_M": 16 if few else 32,
        "BLOCK_N": 64,
        "BLOCK_P": 64,
        "BLOCK_Q": 64,
        "NATIVE": same and not (_INTERPRETED and x_dtype == torch.bfloat16),  # the interpreter's bfloat16 is garbage
        "PRECISION": "tf32" if same and torch.version.hip is None else "ieee",  # not all of AMD's GPUs have it
    }
    return 8 if few else 4, constants, {"num_warps": 4 if few and same else 8, "num_stages": 2}


def add_kron(out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor, widths: list[int]) -> None:
    """Add each token's Kronecker delta to its row of `out`; the arguments are those of `torch_ops.add_kron`.

    Raises:
        ValueError: a tensor's dtype or layout is not one that the kernel takes.
    """
    for name, tensor in (("out", out), ("x", x), ("values", values)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"soka::add_kron: expected {name} in float32, float16 or bfloat16; got {tensor.dtype}")
    if out.stride(1) != 1 or x.stride(1) != 1 or token_slots.stride(0) != 1:
        strides = f"{out.stride()}, {x.stride()} and {token_slots.stride()}"
        raise ValueError(f"soka::add_kron: expected contiguous rows; got strides {strides}")
    tokens = x.shape[0]
    if not tokens:
        return
    programs, constants, options = configure(tokens * len(widths), x.dtype, values.dtype)
    launch: Any = _add_kron_kernel[tokens, len(widths), programs]
    slots, in_features = table.shape[1], x.shape[1]
    launch(out, x, token_slots, values, table, slots, in_features, out.stride(0), x.stride(0), **constants, **options)
