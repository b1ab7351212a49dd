"""Faster products and attention on CPUs, where torch's own choice is the slower one. Results stay those of the dtype.

Two facts, measured by `python -m eval.bench.step_real` (eval/results/step_smollm2.json):

- torch multiplies float32 matrices by MKL, which keeps to AVX2 on CPUs that are not Intel's. oneDNN uses AVX-512 there.
- torch's flash attention multiplies small blocks, one call each. Few tokens are faster in whole products. The file
  shows that on AMD's CPUs; on Intel's with AMX steps in float32 and bfloat16 were timed by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from soka_serve.kron.cpu import capabilities, has_amx

SHORT_ROW = 192
"""Most tokens of a row whose attention is computed in whole products: beyond it their memory and time grow."""


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices in float32, and faster than MKL.

    oneDNN is reached by allowing bfloat16, which it takes on AMX alone; so never where there is AMX.
    """
    found = capabilities()
    return "AMD" in str(found.get("cpu_name", "")) and bool(found.get("avx512_f")) and not has_amx()


@contextmanager
def fast_products() -> Iterator[None]:
    """Meanwhile float32 products on the CPU are those of the faster library, with float32's accuracy."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if onednn_is_faster():
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def attention_for(tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """What a forward pass of rows of so many tokens runs in: attention in whole products where those are faster."""
    if device.type != "cpu" or tokens > SHORT_ROW:
        return nullcontext()
    whole: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return whole
