"""Times the Kronecker operator against vLLM's LoRA on the projections of one transformer layer.

    python eval/bench_kernel.py --out eval/results/kernel_cpu.json
    python eval/bench_kernel.py --device cuda --out eval/results/kernel_cuda.json

A case is a number of tokens, dealt in turn to a number of adapters. Its ways run one after the other, round after
round, in one process, so that only ratios within a case should be compared; the figure is the best round, in
microseconds for the four modules of a layer (qkv, o, gate_up, down):

- "base": the layer's own matrix products;
- "soka": what the plugin adds to their output, `soka::add_kron`;
- "lora_equal", "lora_16": what vLLM's LoRA adds (`add_lora_linear`), with the rank whose parameters are nearest to the
  Kronecker factors', and with rank 16.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vllm
from torch import Tensor
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from soka_serve.shapes import balanced_shape
from soka_vllm.slots import SlotStore


class Module(NamedTuple):
    """A linear layer as vLLM runs it: one product, several slices of output."""

    in_features: int
    widths: tuple[int, ...]


MODELS = {
    "embedded": [Module(128, (128, 64, 64)), Module(128, (128,)), Module(128, (352, 352)), Module(352, (128,))],
    "mid": [Module(768, (768, 256, 256)), Module(768, (768,)), Module(768, (2048, 2048)), Module(2048, (768,))],
    "llama-2-7b": [
        Module(4096, (4096, 4096, 4096)),
        Module(4096, (4096,)),
        Module(4096, (11008, 11008)),
        Module(11008, (4096,)),
    ],
}
Way = Callable[[], object]


def soka_layer(modules: list[Module], adapters: int, rank: int, dtype: torch.dtype) -> tuple[list[SlotStore], int]:
    """Stores with `adapters` full slots at the balanced shapes, and the parameters of one adapter."""
    stores, parameters = [], 0
    for module in modules:
        store = SlotStore(adapters, module.widths, module.in_features, dtype, "cpu")
        for index, width in enumerate(module.widths):
            m, n, p, q = shape = balanced_shape(width, module.in_features)
            parameters += shape.parameters(rank)
            for slot in range(adapters):
                store.put(slot, index, torch.randn(rank, m, n) / n, torch.randn(rank, p, q) / q)
        stores.append(store)
    return stores, parameters


def lora_parameters(modules: list[Module], rank: int) -> int:
    """Of one LoRA adapter on every slice of every module."""
    return rank * sum(module.in_features + width for module in modules for width in module.widths)


def lora_way(
    modules: list[Module], adapters: int, rank: int, inputs: list[Tensor], outputs: list[Tensor], slots: Tensor
) -> Way:
    """vLLM's own CPU code as a decode step calls it (a prefill step calls the same functions)."""
    wrapper = PunicaWrapperCPU(slots.numel(), slots.numel(), "cpu")
    wrapper._token_lora_indices.copy_(slots)
    wrapper.indices_len[0] = slots.numel()
    dtype = outputs[0].dtype
    down = [
        tuple(torch.randn(adapters, 1, rank, module.in_features).to(dtype) for _ in module.widths) for module in modules
    ]
    up = [tuple(torch.randn(adapters, 1, width, rank).to(dtype) for width in module.widths) for module in modules]

    def run() -> None:
        for i, module in enumerate(modules):
            wrapper.add_lora_linear(outputs[i], inputs[i], down[i], up[i], 1.0, module.widths)

    return run


def interleaved_us(ways: dict[str, Way], seconds: float) -> dict[str, float]:
    """Best time of each way over rounds that take about `seconds` altogether."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = 0.0
    while len(times["base"]) < 6 or time.perf_counter() < end:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
        end = end or time.perf_counter() + seconds
    return {name: round(min(values[1:]) * 1e6, 1) for name, values in times.items()}


def measure(model: str, dtype: torch.dtype, rank: int, tokens: int, adapters: int, seconds: float) -> dict[str, Any]:
    """One case on the CPU."""
    modules = MODELS[model]
    slots = torch.arange(tokens) % adapters
    weights = [torch.randn(sum(module.widths), module.in_features).to(dtype) for module in modules]
    inputs = [torch.randn(tokens, module.in_features).to(dtype) for module in modules]
    outputs = [torch.zeros(tokens, sum(module.widths), dtype=dtype) for module in modules]
    stores, parameters = soka_layer(modules, adapters, rank, dtype)
    lora_rank = max(1, round(parameters / lora_parameters(modules, 1)))

    def base() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            linear(x, weight)

    def soka() -> None:
        for store, out, x in zip(stores, outputs, inputs, strict=True):
            store.add_to(out, x, slots)

    ways: dict[str, Way] = {"base": base, "soka": soka}
    for name, r in (("lora_equal", lora_rank), ("lora_16", 16)):
        ways[name] = lora_way(modules, adapters, r, inputs, outputs, slots)
    with torch.inference_mode():
        result = interleaved_us(ways, seconds)
    return {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "rank": rank,
        "tokens": tokens,
        "adapters": adapters,
        "lora_equal_rank": lora_rank,
        "soka_parameters": parameters,
        "lora_equal_parameters": lora_parameters(modules, lora_rank),
        **{f"{name}_us": value for name, value in result.items()},
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[str, torch.dtype, int, int, int]]:
    """Every combination that has at least one token per adapter."""
    for model in options.models:
        for dtype in options.dtypes:
            for rank in options.ranks:
                for tokens in options.tokens:
                    for adapters in options.adapters:
                        if adapters <= tokens:
                            yield model, getattr(torch, dtype), rank, tokens, adapters


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "mid"], choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for case in cases(options):
        rows.append(measure(*case, options.seconds))
        row = rows[-1]
        print(
            f"{row['model']:9} {row['dtype']:8} r{row['rank']} {row['tokens']:4} tokens {row['adapters']:3} adapters  "
            f"base {row['base_us']:8.0f}  soka {row['soka_us']:8.0f}  lora r={row['lora_equal_rank']} "
            f"{row['lora_equal_us']:8.0f}  lora r=16 {row['lora_16_us']:8.0f}",
            flush=True,
        )
    result = {
        "command": " ".join(["python", "eval/bench_kernel.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {options.threads} thread(s)",
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
