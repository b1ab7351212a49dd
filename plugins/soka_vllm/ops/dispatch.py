"""The operator `soka::add_kron` as torch sees it: one schema, an implementation per device.

`cpu_kernel` computes it on a CPU, `torch_ops` where that cannot, `triton_ops` on CUDA. It changes `out` and returns
nothing, takes tensors and the widths of a layer's slices, and reads everything else from the tensors' content. So a
compiled graph holds one call that fits whatever the slots hold later, and a CUDA graph may record it as long as
`values` and `table` stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soka_vllm.ops import cpu_kernel, torch_ops

_SCHEMA = "add_kron(Tensor(a!) out, Tensor x, Tensor token_slots, Tensor values, Tensor table, int[] widths) -> ()"
_LIBRARY = torch.library.Library("soka", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


def _add_kron_cpu(
    out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor, widths: list[int]
) -> None:
    kernel = cpu_kernel.load()
    if kernel is None or not kernel.add_kron(out, x, token_slots, values, table):
        torch_ops.add_kron(out, x, token_slots, values, table, widths)


def _add_kron_cuda(
    out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor, widths: list[int]
) -> None:
    from soka_vllm.ops import triton_ops  # CPU builds may have no Triton

    triton_ops.add_kron(out, x, token_slots, values, table, widths)


def _no_result(out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor, widths: list[int]) -> None:
    """What tracing sees: `out` changes, nothing is returned."""


_LIBRARY.impl("add_kron", _add_kron_cpu, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("add_kron", _add_kron_cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("soka::add_kron", _no_result, lib=_LIBRARY)

ADD_KRON = torch.ops.soka.add_kron
