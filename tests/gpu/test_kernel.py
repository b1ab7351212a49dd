"""The operator on a real GPU: against float64 torch.kron, recorded in a CUDA graph, and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from soka_serve.kron.shapes import balanced_shape
from tests.support.plugin_layers import Layer, equal_slices_layer, qkv_layer, sharded_layer

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MIXED = torch.tensor([0, 2, -1, 1, 7, 2**40, 2])


@pytest.fixture(autouse=True)
def small_arenas() -> Iterator[None]:
    """Every layer here has an arena of its own, since it is gone with the layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOKA_SLOT_PARAMETERS", "2000000")
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 40, 257])
def test_mixed_batch(dtype: torch.dtype, tokens: int) -> None:
    """Base, an empty slot, one beyond the table, and two adapters with slices of several shapes and without."""
    qkv_layer(dtype, "cuda").check(MIXED.repeat(tokens), tokens)


@pytest.mark.parametrize("slot", [-1, 0, 1, 2, 4])
def test_one_slot_for_all(slot: int) -> None:
    qkv_layer(torch.bfloat16, "cuda").check(torch.full((300,), slot), 257)


def test_no_tokens() -> None:
    qkv_layer(torch.float32, "cuda").check(torch.zeros(0, dtype=torch.long), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 257])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_wide_factors(dtype: torch.dtype, tokens: int, rank: int) -> None:
    """86 x 64 and larger: more than a block in every dimension."""
    layer = Layer(4, [86 * 8], 64 * 8, dtype, "cuda")
    for slot, shape in enumerate([(86, 64, 8, 8), (8, 8, 86, 64), (8, 4, 86, 128), (43, 128, 16, 4)]):
        layer.put(slot, 0, rank, shape, seed=20 + slot)
    layer.check(torch.arange(4).repeat(tokens), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deltas_larger_than_the_slice(dtype: torch.dtype) -> None:
    sharded_layer(dtype, "cuda").check(torch.tensor([0, 1, -1, 2, 3, 4, 0, 5]).repeat(20), 160)
    equal_slices_layer(dtype, "cuda").check(torch.tensor([0, 1, 2, 3]).repeat(40), 160)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    ("widths", "in_features"),
    [([4096] * 3, 4096), ([11008] * 2, 4096), ([4096], 11008)],
    ids=["qkv", "gate_up", "down"],
)
def test_layers_of_a_7b(dtype: torch.dtype, rank: int, widths: list[int], in_features: int) -> None:
    layer = Layer(3, widths, in_features, dtype, "cuda")
    for slot in (0, 2):
        for index, width in enumerate(widths):
            layer.put(slot, index, rank, tuple(balanced_shape(width, in_features)), seed=70 + 3 * slot + index)
    layer.check(torch.tensor([0, 1, 2, -1, 2, 0]).repeat(12), 65)


def test_nothing_waits_for_the_gpu() -> None:
    layer = qkv_layer(torch.bfloat16, "cuda")
    base, x = (tensor.cuda() for tensor in layer.arguments(40))
    slots = MIXED.repeat(40).cuda()
    layer.store.add_to(base, x, slots)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.store.add_to(base, x, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recorded_graph_is_right_for_adapters_that_come_later(dtype: torch.dtype) -> None:
    """Recorded while all slots are empty, as vLLM does; then filled, replaced and emptied, with other tokens."""
    layer = Layer(4, [128, 64, 64], 96, dtype, "cuda")
    tokens = 40
    base, x = (tensor.cuda() for tensor in layer.arguments(tokens))
    slots, out = torch.full((64,), -1, device="cuda"), base.clone()
    assert not layer.store.empty  # the plugin leaves the operator out where the store says so
    layer.store.add_to(out, x, slots)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.store.add_to(out, x, slots)

    def replay(result: torch.Tensor, inputs: torch.Tensor, token_slots: torch.Tensor) -> None:
        out.copy_(result)
        x.copy_(inputs)
        slots[:tokens].copy_(token_slots[:tokens])
        graph.replay()
        result.copy_(out)

    layer.check(MIXED.repeat(tokens), tokens, replay)
    layer.put(0, 0, 1, (16, 12, 8, 8), seed=10)
    layer.put(2, 2, 4, (4, 4, 16, 24), seed=14)
    layer.check(MIXED.repeat(tokens), tokens, replay)
    layer.put(0, 0, 9, (2, 48, 64, 2), seed=15)
    layer.put(1, 1, 2, (8, 12, 8, 8), seed=16)
    layer.check(MIXED.repeat(tokens), tokens, replay)
    layer.store.clear(2)
    layer.dense[2] = 0
    layer.check(MIXED.repeat(tokens), tokens, replay)


def test_compiled_in_one_graph() -> None:
    layer = qkv_layer(torch.bfloat16, "cuda")
    slots = MIXED.repeat(40).cuda()

    def forward(base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = base * 2
        layer.store.add_to(out, x, slots)
        return out + 1

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for tokens in (5, 33, 7):
        base, x = (tensor.cuda() for tensor in layer.arguments(tokens))
        torch.testing.assert_close(compiled(base, x), forward(base, x), rtol=1e-2, atol=1e-2)
        assert not torch.equal(forward(base, x), base * 2 + 1)
