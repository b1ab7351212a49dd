"""In which dtypes this CPU multiplies matrices."""

from __future__ import annotations

import torch


def capabilities() -> dict[str, object]:
    """What torch knows of the CPU; nothing where it is too old to tell."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def has_amx() -> bool:
    """Whether this CPU has matrix units for bfloat16."""
    return bool(capabilities().get("amx_bf16"))


def multiplies_bfloat16() -> bool:
    """Whether products in bfloat16 are faster than in float32: AMX, or AMD's AVX-512 with instructions for bfloat16.

    Intel's AVX-512 has such instructions as well; without AMX a step took twice as long as in float32
    (eval/results/step_smollm2.json).
    """
    found = capabilities()
    return has_amx() or ("AMD" in str(found.get("cpu_name", "")) and bool(found.get("avx512_bf16")))


NATIVE = {torch.float64, torch.float32} | ({torch.bfloat16} if multiplies_bfloat16() else set())
"""Dtypes that are multiplied in themselves (half precision with float32 accumulation); others in float32."""
