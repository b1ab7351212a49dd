"""Times the ways of multiplying a Kronecker delta with activations, against the dense layer and a LoRA.

    python -m eval.bench.apply --out eval/results/apply.json

Forward, and forward with backward, in milliseconds (best of several), on the CPU or `--device cuda`; all ways of one
case in one process, one after the other, so that only their ratios should be compared. "left", "right" and "dense"
are the orders of `apply_kron`; "fused" is `linear_with_delta` with its own choice, which includes the base layer;
"base" is that layer alone (its weight frozen) and "lora" two thin matrices with at least as many parameters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from eval.record import make_parser, write_record
from soka_serve.kron import apply_kron, linear_with_delta
from soka_serve.kron.cost import choose_ways
from soka_serve.kron.shapes import FactorShape

CASES = [
    (FactorShape(16, 8, 8, 16), (1, 2, 4, 16)),
    (FactorShape(22, 8, 16, 16), (1, 2, 4)),
    (FactorShape(64, 64, 64, 64), (1, 4, 16)),
]


def best_ms(run: Callable[[], object], repeats: int, device: str) -> float:
    """Best time of `repeats` runs after one warm-up, in milliseconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(min(times[1:]) * 1e3, 3)


def measure(shape: FactorShape, rank: int, tokens: int, device: str, repeats: int) -> dict[str, Any]:
    """One case: forward and forward + backward of every way."""

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, device=device, requires_grad=True)

    x, left, right = leaf(tokens, shape.in_features), leaf(rank, *shape[:2]), leaf(rank, *shape[2:])
    sigma, weight = leaf(rank), torch.randn(shape.out_features, shape.in_features, device=device)
    lora_rank = -(-shape.parameters(rank) // (shape.out_features + shape.in_features))
    down, up = leaf(lora_rank, shape.in_features), leaf(shape.out_features, lora_rank)
    grad = torch.randn(tokens, shape.out_features, device=device)
    factors = (left, right, sigma)
    ways: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "left": (lambda: apply_kron(x, *factors, order="left"), (x, *factors)),
        "right": (lambda: apply_kron(x, *factors, order="right"), (x, *factors)),
        "dense": (lambda: apply_kron(x, *factors, order="dense"), (x, *factors)),
        "fused": (lambda: linear_with_delta(x, weight, None, factors), (x, *factors)),
        "base": (lambda: linear(x, weight), (x,)),
        "lora": (lambda: linear(linear(x, down), up), (x, down, up)),
    }
    result: dict[str, Any] = {
        "shape": list(shape),
        "rank": rank,
        "tokens": tokens,
        "lora_rank": lora_rank,
        "auto": choose_ways(shape, rank, tokens),
        "auto_linear": choose_ways(shape, rank, tokens, fused=True),
    }
    for name, (forward, leaves) in ways.items():
        with torch.no_grad():
            forward_ms = best_ms(forward, repeats, device)
        both_ms = best_ms(lambda f=forward, t=leaves: torch.autograd.grad(f(), t, grad), repeats, device)  # type: ignore[misc]
        result[name] = {"forward_ms": forward_ms, "both_ms": both_ms}
    return result


def main() -> None:
    """Run all cases and write the result."""
    parser = make_parser("eval.bench.apply", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 512, 2048])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [
        measure(shape, rank, tokens, options.device, 2 if shape.in_features > 1000 else 20)
        for shape, ranks in CASES
        for rank in ranks
        for tokens in options.tokens
    ]
    print(json.dumps(write_record(options, {"rows": rows}), indent=1))


if __name__ == "__main__":
    main()
