"""The plugin's CPU operator against FastKron, one adapter at a time: float32, LLaMA-2-7B's layer shapes.

    pip install --no-deps pyfastkron
    python -m eval.bench.fastkron --out eval/results/fastkron_cpu.json

FastKron (`pyfastkron`, arXiv:2401.10187) multiplies with a Kronecker product of any number of factors; a delta of r
terms takes r calls and r - 1 sums there. It knows float32 and float64, and one product for all tokens. "dense" is the
layer's own product with the same tokens. All three take turns in one process, best of many rounds, microseconds; only
ratios within a row should be compared. Each row's results are held against each other first.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from eval.measure import best_us
from eval.record import make_parser, write_record
from soka_serve.kron.shapes import balanced_shape
from soka_vllm.slots import SlotStore

LAYERS = [(4096, 4096), (11008, 4096), (4096, 11008)]


def measure(out_features: int, in_features: int, rank: int, tokens: int, seconds: float) -> dict[str, Any]:
    """One layer, rank and number of tokens."""
    import pyfastkron.fastkrontorch as fastkron

    m, n, p, q = shape = balanced_shape(out_features, in_features)
    left, right = torch.randn(rank, m, n), torch.randn(rank, p, q)
    x, weight = torch.randn(tokens, in_features), torch.randn(out_features, in_features)
    store = SlotStore(1, [out_features], in_features, torch.float32, "cpu")
    store.put(0, 0, left, right)
    slots = torch.zeros(tokens, dtype=torch.long)
    out = torch.zeros(tokens, out_features)
    # x kron(L, R)^T = x kron(L^T, R^T), and FastKron wants contiguous factors.
    transposed = [[a.t().contiguous(), b.t().contiguous()] for a, b in zip(left, right, strict=True)]

    def fast() -> Tensor:
        total: Tensor = fastkron.gemkm(x, transposed[0])
        for pair in transposed[1:]:
            total += fastkron.gemkm(x, pair)
        return total

    store.add_to(out, x, slots)
    torch.testing.assert_close(out, fast(), rtol=1e-3, atol=1e-3 * float(out.abs().max()))
    ways: dict[str, Callable[[], Tensor | None]] = {
        "soka": lambda: store.add_to(out, x, slots),
        "fastkron": fast,
        "dense": lambda: linear(x, weight),
    }
    times = best_us(ways, seconds)
    return {
        "shape": list(shape), "rank": rank, "tokens": tokens, **{f"{k}_us": v for k, v in times.items()},
        "soka_over_fastkron": round(times["soka"] / times["fastkron"], 2),
        "soka_over_dense": round(times["soka"] / times["dense"], 3),
    }  # fmt: skip


def main() -> None:
    """Run all cases and write the result."""
    parser = make_parser("eval.bench.fastkron", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # FastKron's own threads
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for layer in LAYERS:
            for rank in options.ranks:
                for tokens in options.tokens:
                    rows.append(measure(*layer, rank, tokens, options.seconds))
                    print(json.dumps(rows[-1]), flush=True)
    packages = {"pyfastkron": importlib.metadata.version("pyfastkron")}
    write_record(options, {"seed": 0, "rows": rows}, packages=packages)


if __name__ == "__main__":
    main()
