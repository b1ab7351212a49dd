"""Faster products on CPUs: the same results, and torch's settings as they were."""

from __future__ import annotations

import pytest
import torch

from soka_serve.base import cpu
from soka_serve.base.cpu import attention_for, fast_products, onednn_is_faster
from soka_serve.kron.cpu import has_amx, multiplies_bfloat16


def set_cpu(patch: pytest.MonkeyPatch, **found: object) -> None:
    patch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.mark.parametrize(
    ("found", "faster"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_f": True}, False),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "amx_bf16": True}, False),
        ({}, False),
    ],
)
def test_where_onednn_multiplies(monkeypatch: pytest.MonkeyPatch, found: dict[str, object], faster: bool) -> None:
    set_cpu(monkeypatch, **found)
    assert onednn_is_faster() is faster
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    with fast_products():
        assert (settings.fp32_precision == "bf16") is faster
    assert settings.fp32_precision == before


@pytest.mark.skipif(has_amx(), reason="AMX multiplies in bfloat16 where that is allowed, and it is not there")
@pytest.mark.parametrize("shape", [(200, 576, 1536), (1, 64, 64), (300, 129, 65)])
def test_products_keep_float32s_accuracy(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    set_cpu(monkeypatch, cpu_name="AMD EPYC", avx512_f=True)
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    with fast_products():
        found = left @ right
    exact = left.double() @ right.double()
    assert float((found - exact).norm() / exact.norm()) < 2e-6  # bfloat16: 2e-3


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R) Processor"])
@pytest.mark.parametrize(("tokens", "whole"), [(16, True), (cpu.SHORT_ROW, True), (cpu.SHORT_ROW + 1, False)])
def test_attention_of_short_rows(monkeypatch: pytest.MonkeyPatch, tokens: int, whole: bool, name: str) -> None:
    set_cpu(monkeypatch, cpu_name=name, avx512_f=True)
    kernels = torch.backends.cuda  # the switches are those of all devices
    with attention_for(tokens, torch.device("cpu")):
        assert kernels.flash_sdp_enabled() is not whole
        assert kernels.math_sdp_enabled()
    assert kernels.flash_sdp_enabled()
    with attention_for(tokens, torch.device("meta")):
        assert kernels.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("found", "native"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": True}, True),
        ({}, False),
    ],
)
def test_where_bfloat16_is_faster(monkeypatch: pytest.MonkeyPatch, found: dict[str, object], native: bool) -> None:
    set_cpu(monkeypatch, **found)
    assert multiplies_bfloat16() is native
