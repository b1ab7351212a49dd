"""Times the ways of multiplying a linear layer with a Kronecker delta, against the layer alone and with a LoRA.

    python -m eval.bench.apply --out eval/results/apply.json

Milliseconds of processor time of one thread (wall time with `--device cuda`), the lower quartile of several: forward,
backward to the input alone, and backward to the factors alone, of `linear_with_delta` with theta and theta0, in each
order; "auto" is what `choose_ways` takes, one order for the first two and one for the last. All ways of one case are
timed in one process, so that only their ratios should be compared. "base" is the layer alone, its weight
frozen, and "lora" the layer with two thin matrices of at least as many parameters. `lost` is how much longer the chosen
ways take than the fastest ones, as a share of the layer's whole time; `of_lora` is the chosen ways' time in multiples
of LoRA's. The constants of `soka_serve.kron.cost` were fitted to this: with `--times FILE`, a result of before, its
times are taken, and the choice is made anew. The shapes are the embedded base's, SmolLM2-135M's and a square one of
LLaMA-2-7B's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from eval.record import make_parser, write_record
from soka_serve.base.cpu import fast_products
from soka_serve.kron import linear_with_delta
from soka_serve.kron.cost import Order, choose_ways
from soka_serve.kron.shapes import FactorShape, balanced_shape

CASES = [  # out, in, ranks, tokens
    (128, 128, (1, 4), (2048,)),
    (352, 128, (1, 4), (2048,)),
    (576, 576, (1, 4), (128, 952)),
    (192, 576, (1, 4), (128, 952)),
    (1536, 576, (1, 4), (128, 952)),
    (576, 1536, (1, 4), (128, 952)),
    (4096, 4096, (1,), (512,)),
]
ORDERS: tuple[Order, ...] = ("left", "right", "dense")


class Clock:
    """Milliseconds of one call: the lower quartile of `repeats` after one that warms up."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.read = time.perf_counter_ns if device == "cuda" else time.process_time_ns

    def ms(self, run: Callable[[], object]) -> float:
        times = []
        for _ in range(self.repeats + 1):
            start = self.read()
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(self.read() - start)
        return round(sorted(times[1:])[self.repeats // 4] / 1e6, 3)

    def parts(
        self, forward: Callable[[Tensor, bool], Tensor], x: Tensor, leaves: tuple[Tensor, ...]
    ) -> dict[str, float]:
        """Forward, and backward to each side alone; `forward` is told whether the leaves are trained."""
        grad = torch.randn_like(forward(x, False))
        with torch.no_grad():
            found = {"forward_ms": self.ms(lambda: forward(x, True))}
        trained = x.detach().clone().requires_grad_()
        y = forward(trained, False)
        found["input_ms"] = self.ms(lambda: torch.autograd.grad(y, trained, grad, retain_graph=True))
        if leaves:
            z = forward(x, True)
            found["factors_ms"] = self.ms(lambda: torch.autograd.grad(z, leaves, grad, retain_graph=True))
        return found


def measure(shape: FactorShape, rank: int, tokens: int, dtype: torch.dtype, clock: Clock) -> dict[str, Any]:
    """One case: all parts of every way."""
    device = clock.device

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, device=device, requires_grad=True)

    x = torch.randn(tokens, shape.in_features, device=device, dtype=dtype)
    weight = torch.randn(shape.out_features, shape.in_features, device=device, dtype=dtype)
    factors = leaf(rank, *shape[:2]), leaf(rank, *shape[2:]), leaf(rank)
    left, right, sigma = constant = factors[0].detach(), factors[1].detach(), factors[2].detach()
    initial = left + 1e-3, right + 1e-3, sigma + 1e-3
    lora_rank = -(-shape.parameters(rank) // (shape.out_features + shape.in_features))
    thin = leaf(lora_rank, shape.in_features), leaf(shape.out_features, lora_rank)

    def soka(order: Order) -> Callable[[Tensor, bool], Tensor]:
        def run(inputs: Tensor, trained: bool) -> Tensor:
            terms = factors if trained else constant
            return linear_with_delta(inputs, weight, None, terms, initial=initial, order=order)

        return run

    def lora(inputs: Tensor, trained: bool) -> Tensor:
        down, up = (t.to(dtype) if trained else t.detach().to(dtype) for t in thin)
        return linear(inputs, weight) + linear(linear(inputs, down), up)

    row: dict[str, Any] = {"shape": list(shape), "rank": rank, "tokens": tokens, "dtype": str(dtype).split(".")[1]}
    row |= {"lora_rank": lora_rank, "base": clock.parts(lambda inputs, _: linear(inputs, weight), x, ())}
    row["lora"] = clock.parts(lora, x, thin)
    row |= {order: clock.parts(soka(order), x, factors) for order in ORDERS}
    return row | choice(row)


def choice(row: dict[str, Any]) -> dict[str, Any]:
    """What `choose_ways` takes for a row, and what that loses against the fastest ways."""
    fused = row["dtype"] == "float32"
    ways = choose_ways(FactorShape(*row["shape"]), row["rank"], row["tokens"], stacked=2 * row["rank"], fused=fused)
    product = {order: row[order]["forward_ms"] + row[order]["input_ms"] for order in ORDERS}
    gradients = {order: row[order]["factors_ms"] for order in ORDERS}
    taken = product[ways.product] + gradients[ways.gradients]
    best = min(product.values()) + min(gradients.values())
    of_lora = taken / sum(row["lora"].values())
    return {"auto": ways._asdict(), "lost": round((taken - best) / taken, 3), "of_lora": round(of_lora, 2)}


def main() -> None:
    """Run all cases and write the result."""
    parser = make_parser("eval.bench.apply", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=12, help="of each part; a quarter of it for 4096 features")
    parser.add_argument("--times", type=Path, help="a result whose times are taken")
    options = parser.parse_args()
    if options.times is not None:
        before = json.loads(options.times.read_text(encoding="utf-8"))
        rows = [row | choice(row) for row in before["rows"]]
        write_record(options, {"times": {k: v for k, v in before.items() if k != "rows"}, "rows": rows})
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    with fast_products() if options.device == "cpu" else nullcontext():
        for size_out, size_in, ranks, counts in CASES:
            clock = Clock(options.device, max(2, options.repeats // 4) if size_in > 2000 else options.repeats)
            shape = balanced_shape(size_out, size_in)
            cases = [(rank, tokens, dtype) for rank in ranks for tokens in counts for dtype in options.dtypes]
            for rank, tokens, dtype in cases:
                rows.append(measure(shape, rank, tokens, getattr(torch, dtype), clock))
                print(rows[-1], flush=True)
                write_record(options, {"rows": rows})  # each time: a limit of time may end this


if __name__ == "__main__":
    main()
