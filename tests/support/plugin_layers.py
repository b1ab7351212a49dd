"""Layers with adapters in their slots, for the tests of the plugin's operator on a CPU, interpreted and on CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from soka_serve.kron import Factors
from soka_vllm.slots import SlotStore
from tests.support.tolerances import RELATIVE_ERROR, relative_error


def random_factors(rank: int, shape: tuple[int, int, int, int], seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    m, n, p, q = shape
    left, right = torch.randn(rank, m, n, generator=generator), torch.randn(rank, p, q, generator=generator)
    return Factors(left, right, torch.rand(rank, generator=generator) / (n * q) ** 0.5)


def kron_sum(left: Tensor, right: Tensor) -> Tensor:
    """(out, in) in float64, with torch.kron itself."""
    return sum(torch.kron(a, b) for a, b in zip(left.double(), right.double(), strict=True))  # type: ignore[return-value]


class Layer:
    """A store, and the dense float64 delta of what was put in, on its device: a CPU takes 10 s for a layer of a 7B."""

    def __init__(
        self, slots: int, widths: list[int], in_features: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.store = SlotStore(slots, widths, in_features, dtype, device)
        self.dense = torch.zeros(slots, sum(widths), in_features, dtype=torch.float64, device=device)
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
        delta = kron_sum(left.to(self.dense.device), right.to(self.dense.device))
        applied = delta[skips[0] :, skips[1] :][:width, : self.store.in_features]
        self.dense[slot, start : start + width] = applied

    def arguments(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Seeded outputs of a base layer and inputs."""
        base = torch.randn(tokens, sum(self.store.widths), generator=torch.Generator().manual_seed(2))
        x = torch.randn(tokens, self.store.in_features, generator=torch.Generator().manual_seed(1))
        return base.to(self.dtype), x.to(self.dtype)

    def check(
        self, token_slots: Tensor, tokens: int, add: Callable[[Tensor, Tensor, Tensor], None] | None = None
    ) -> None:
        """Run the operator, or `add`, and hold each token against its adapter's dense delta."""
        base, x = self.arguments(tokens)
        base, x, token_slots = (tensor.to(self.dense.device) for tensor in (base, x, token_slots))
        out = base.clone()
        (add or self.store.add_to)(out, x, token_slots)
        want = base.double()
        for slot in token_slots[:tokens].unique().tolist():
            at = token_slots[:tokens] == slot
            if 0 <= slot < self.dense.shape[0] and bool(self.dense[slot].any()):
                want[at] += x[at].double() @ self.dense[slot].T
                assert not (out[at] == base[at]).all(dim=1).any()
            else:
                assert torch.equal(out[at], base[at])
        assert tokens == 0 or relative_error(out, want) < RELATIVE_ERROR[self.dtype]


def qkv_layer(dtype: torch.dtype, device: str = "cpu") -> Layer:
    """Three slices of unequal width (GQA), four slots: two shapes, another rank per slice, slices without terms."""
    layer = Layer(4, [128, 64, 64], 96, dtype, device)
    layer.put(0, 0, 1, (16, 12, 8, 8), seed=10)
    layer.put(0, 1, 3, (8, 12, 8, 8), seed=11)
    layer.put(0, 2, 2, (64, 1, 1, 96), seed=12)
    layer.put(2, 0, 5, (2, 48, 64, 2), seed=13)
    layer.put(2, 2, 4, (4, 4, 16, 24), seed=14)
    return layer


def sharded_layer(dtype: torch.dtype, device: str = "cpu") -> Layer:
    """Deltas larger than the slice: cut at the front, at the back, at both, of rows and of columns, in both orders."""
    layer = Layer(5, [60, 30], 50, dtype, device)
    layer.put(0, 0, 2, (9, 7, 7, 8), seed=30, skips=(3, 5))
    layer.put(0, 1, 1, (3, 10, 12, 5), seed=31, skips=(6, 0))
    layer.put(1, 0, 3, (2, 2, 31, 27), seed=32, skips=(0, 4))
    layer.put(2, 1, 4, (40, 60, 1, 1), seed=33, skips=(10, 10))
    layer.put(3, 0, 1, (1, 1, 64, 53), seed=34, skips=(4, 3))
    layer.put(3, 1, 16, (31, 5, 1, 10), seed=35, skips=(1, 0))
    layer.put(4, 0, 2, (12, 10, 5, 5), seed=36)
    return layer


def equal_slices_layer(dtype: torch.dtype, device: str = "cpu") -> Layer:
    """Adjacent slices with factors of one shape, alone and next to others, cut and not."""
    layer = Layer(4, [48, 48, 48, 30, 30], 40, dtype, device)
    for index in range(3):
        layer.put(0, index, 2, (6, 5, 8, 8), seed=40 + index)
        layer.put(1, index, 2, (6, 5, 8, 8), seed=50 + index)
        layer.put(2, index, 2, (6, 5, 8, 8) if index else (8, 8, 6, 5), seed=60 + index)
    for index in (3, 4):
        layer.put(0, index, 1, (9, 7, 4, 7), seed=40 + index, skips=(3, 5))
        layer.put(1, index, 1, (9, 7, 4, 7), seed=50 + index, skips=(3, 5))
        layer.put(2, index, 1, (9, 7, 4, 7), seed=60 + index, skips=(3, index))
    return layer
