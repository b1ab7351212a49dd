"""The plugin's operator against float64 torch.kron, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from soka_serve.kron import dense_delta
from soka_serve.kron.shapes import FactorShape
from soka_vllm.ops import cpu_kernel, torch_ops
from tests.support.plugin_layers import Layer, equal_slices_layer, kron_sum, qkv_layer, random_factors, sharded_layer

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two the tests of this file run."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernel, "load", lambda: None)
    elif cpu_kernel.load() is None:
        pytest.skip("no C++ compiler")
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 257])
def test_mixed_batch(dtype: torch.dtype, tokens: int) -> None:
    layer = qkv_layer(dtype)
    # Base, an empty slot, one that is beyond the table (uninitialised memory), and the two adapters.
    token_slots = torch.tensor([0, 2, -1, 1, 7, 2**40, 2]).repeat(tokens)
    layer.check(token_slots, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", [-1, 0, 1, 2])
def test_one_adapter_for_all(dtype: torch.dtype, slot: int) -> None:
    qkv_layer(dtype).check(torch.full((300,), slot), 257)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 257])
def test_wide_factors(dtype: torch.dtype, tokens: int) -> None:
    """86 x 64, the shape of a LLaMA-2-7B gate; large enough for the intermediate to be cut into pieces."""
    layer = Layer(2, [86 * 32], 64 * 32, dtype)
    layer.put(1, 0, 4, (86, 64, 32, 32), seed=20)
    layer.check(torch.ones(tokens, dtype=torch.long), tokens)
    layer.put(1, 0, 2, (32, 32, 86, 64), seed=21)
    layer.check(torch.ones(tokens, dtype=torch.long), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 257])
def test_deltas_larger_than_the_slice(dtype: torch.dtype, tokens: int) -> None:
    layer = sharded_layer(dtype)
    layer.check(torch.tensor([0, 1, -1, 2, 3, 4, 0, 5]).repeat(tokens), tokens)
    for slot in range(5):
        layer.check(torch.full((tokens,), slot), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 257])
@pytest.mark.parametrize("slots", [[0], [0, 1], [0, 1, 2], [1, 2, 0, 3, -1]])
def test_slices_of_one_shape(dtype: torch.dtype, tokens: int, slots: list[int]) -> None:
    equal_slices_layer(dtype).check(torch.tensor(slots).repeat(tokens), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_adapters_of_few_shapes(dtype: torch.dtype) -> None:
    """A slot per token; tokens of one shape are multiplied together, and the intermediate cut into pieces."""
    layer = Layer(130, [96], 96, dtype)
    for slot in range(129):
        layer.put(slot, 0, 1 + slot % 16, (8, 12, 12, 8), seed=slot)
    layer.check(torch.arange(130), 130)


@pytest.mark.parametrize("wide", [0, 2**62])
@pytest.mark.parametrize("make", [qkv_layer, sharded_layer, equal_slices_layer])
def test_wide_outputs_in_another_dtype(
    make: Callable[[torch.dtype], Layer], wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "_WIDE", wide)
    layer = make(torch.bfloat16)
    layer.check(torch.tensor([0, 1, 2, -1, 0]).repeat(12), 60)
    layer.check(torch.zeros(60, dtype=torch.long), 60)


@pytest.mark.parametrize("out", [torch.float64, torch.float32])
def test_outputs_that_hold_more_than_the_products_keep_it(out: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in them is not rounded to the products' dtype on the way."""
    monkeypatch.setattr(torch_ops, "_WIDE", 0)
    layer = equal_slices_layer(torch.bfloat16)
    _, x = layer.arguments(60)
    base = torch.full((60, layer.dense.shape[1]), 1 + 4 * torch.finfo(out).eps, dtype=out)
    result = base.clone()
    layer.store.add_to(result, torch.zeros_like(x), torch.zeros(60, dtype=torch.long))
    assert torch.equal(result, base)
    layer.store.add_to(result, x, torch.zeros(60, dtype=torch.long))
    assert not torch.equal(result, base)


def test_no_tokens() -> None:
    qkv_layer(torch.float32).check(torch.zeros(0, dtype=torch.long), 0)


def test_both_orders_are_exercised() -> None:
    table = qkv_layer(torch.float32).store.table
    assert set(table[..., 7][table[..., 2] > 0].tolist()) == {0, 1}


def test_oracle_agrees_with_the_project() -> None:
    factors = random_factors(3, (2, 3, 4, 5), seed=3)
    ours = dense_delta(factors, torch.float64)
    torch.testing.assert_close(
        kron_sum(factors.left * factors.sigma[:, None, None], factors.right), ours, rtol=1e-6, atol=1e-6
    )
    assert FactorShape(2, 3, 4, 5) == factors.shape


def test_operator_is_safe_to_trace() -> None:
    """Schema, aliasing and the fake kernel hold; a traced call changes its output as an eager one does."""
    layer = qkv_layer(torch.float32)
    x, token_slots = torch.randn(5, 96), torch.tensor([0, 2, -1, 1, 0, 0, 0])
    arguments = (torch.randn(5, 256), x, token_slots, layer.store.values, layer.store.table, layer.store.widths)
    torch.library.opcheck(torch.ops.soka.add_kron.default, arguments)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = torch.ones(x.shape[0], 256)
        layer.store.add_to(out, x, token_slots)
        return out * 2

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 3, 7):
        x = torch.randn(tokens, 96)
        assert torch.equal(compiled(x), forward(x))
    assert not torch.equal(forward(x), torch.full((7, 256), 2.0))
    layer.put(0, 0, 3, (8, 12, 16, 8), seed=15)  # the graph is right for what comes later
    assert torch.equal(compiled(x), forward(x))
    assert counter.frame_count == 1
