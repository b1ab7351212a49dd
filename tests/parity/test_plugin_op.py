"""The plugin's operator against float64 torch.kron, token by token."""

from __future__ import annotations

import pytest
import torch

from soka_serve.kron import Factors, dense_delta
from soka_serve.shapes import FactorShape
from soka_vllm.slots import SlotStore
from tests.tolerances import RELATIVE_ERROR, relative_error

DTYPES = [torch.float32, torch.bfloat16]


def random_factors(rank: int, shape: tuple[int, int, int, int], seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    m, n, p, q = shape
    left, right = torch.randn(rank, m, n, generator=generator), torch.randn(rank, p, q, generator=generator)
    return Factors(left, right, torch.rand(rank, generator=generator) / (n * q) ** 0.5)


def kron_sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(out, in) in float64, with torch.kron itself."""
    return sum(torch.kron(a, b) for a, b in zip(left.double(), right.double(), strict=True))  # type: ignore[return-value]


class Layer:
    """A store, and the dense float64 delta of what was put in."""

    def __init__(self, slots: int, widths: list[int], in_features: int, dtype: torch.dtype) -> None:
        self.store = SlotStore(slots, widths, in_features, dtype, "cpu")
        self.dense = torch.zeros(slots, sum(widths), in_features, dtype=torch.float64)
        self.dtype = dtype

    def put(
        self,
        slot: int,
        index: int,
        rank: int,
        shape: tuple[int, int, int, int],
        seed: int,
        skips: tuple[int, int] = (0, 0),
    ) -> None:
        factors = random_factors(rank, shape, seed)
        left = (factors.left * factors.sigma[:, None, None]).to(self.dtype)
        right = factors.right.to(self.dtype)
        self.store.put(slot, index, left, right, out_skip=skips[0], in_skip=skips[1])
        start, width = sum(self.store.widths[:index]), self.store.widths[index]
        applied = kron_sum(left, right)[skips[0] :, skips[1] :][:width, : self.store.in_features]
        self.dense[slot, start : start + width] = applied

    def check(self, token_slots: torch.Tensor, tokens: int) -> None:
        """Run the operator, and hold each token against its adapter's dense delta."""
        x = torch.randn(tokens, self.store.in_features, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        base = torch.randn(tokens, sum(self.store.widths), generator=torch.Generator().manual_seed(2)).to(self.dtype)
        out = base.clone()
        self.store.add_to(out, x, token_slots)
        want = base.double()
        for slot in token_slots[:tokens].unique().tolist():
            at = token_slots[:tokens] == slot
            if 0 <= slot < self.dense.shape[0] and bool(self.dense[slot].any()):
                want[at] += x[at].double() @ self.dense[slot].T
                assert not (out[at] == base[at]).all(dim=1).any()
            else:
                assert torch.equal(out[at], base[at])
        assert tokens == 0 or relative_error(out, want) < RELATIVE_ERROR[self.dtype]


def qkv_layer(dtype: torch.dtype) -> Layer:
    """Three slices of unequal width (GQA), four slots: two shapes, another rank per slice, slices without terms."""
    layer = Layer(4, [128, 64, 64], 96, dtype)
    layer.put(0, 0, 1, (16, 12, 8, 8), seed=10)
    layer.put(0, 1, 3, (8, 12, 8, 8), seed=11)
    layer.put(0, 2, 2, (64, 1, 1, 96), seed=12)
    layer.put(2, 0, 5, (2, 48, 64, 2), seed=13)
    layer.put(2, 2, 4, (4, 4, 16, 24), seed=14)
    return layer


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


def sharded_layer(dtype: torch.dtype) -> Layer:
    """Deltas larger than the slice: cut at the front, at the back, at both, of rows and of columns, in both orders."""
    layer = Layer(5, [60, 30], 50, dtype)
    layer.put(0, 0, 2, (9, 7, 7, 8), seed=30, skips=(3, 5))
    layer.put(0, 1, 1, (3, 10, 12, 5), seed=31, skips=(6, 0))
    layer.put(1, 0, 3, (2, 2, 31, 27), seed=32, skips=(0, 4))
    layer.put(2, 1, 4, (40, 60, 1, 1), seed=33, skips=(10, 10))
    layer.put(3, 0, 1, (1, 1, 64, 53), seed=34, skips=(4, 3))
    layer.put(3, 1, 16, (31, 5, 1, 10), seed=35, skips=(1, 0))
    layer.put(4, 0, 2, (12, 10, 5, 5), seed=36)
    assert set(layer.store.table[..., 7][layer.store.table[..., 2] > 0].tolist()) == {0, 1}
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 257])
def test_deltas_larger_than_the_slice(dtype: torch.dtype, tokens: int) -> None:
    layer = sharded_layer(dtype)
    layer.check(torch.tensor([0, 1, -1, 2, 3, 4, 0, 5]).repeat(tokens), tokens)
    for slot in range(5):
        layer.check(torch.full((tokens,), slot), tokens)


def equal_slices_layer(dtype: torch.dtype) -> Layer:
    """Adjacent slices with factors of one shape, alone and next to others, cut and not."""
    layer = Layer(4, [48, 48, 48, 30, 30], 40, dtype)
    for index in range(3):
        layer.put(0, index, 2, (6, 5, 8, 8), seed=40 + index)
        layer.put(1, index, 2, (6, 5, 8, 8), seed=50 + index)
        layer.put(2, index, 2, (6, 5, 8, 8) if index else (8, 8, 6, 5), seed=60 + index)
    for index in (3, 4):
        layer.put(0, index, 1, (9, 7, 4, 7), seed=40 + index, skips=(3, 5))
        layer.put(1, index, 1, (9, 7, 4, 7), seed=50 + index, skips=(3, 5))
        layer.put(2, index, 1, (9, 7, 4, 7), seed=60 + index, skips=(3, index))
    return layer


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

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 3, 7):
        x = torch.randn(tokens, 96)
        assert torch.equal(compiled(x), forward(x))
    assert not torch.equal(forward(x), torch.full((7, 256), 2.0))
