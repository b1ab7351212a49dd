"""What `eval/growth/bench.py` measures: one point of a series each, and what arithmetic says it should cost."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eval.bench.kernel import MODELS, Case, Layer, Module
from eval.bench.kpsvd import draw_weight
from eval.bench.merge import merge_here
from eval.growth.page import Point
from eval.llama import random_factors, sizes, start_of, write_model
from eval.measure import alone
from eval.memory import AnonymousPeak
from soka_serve.adapter.format import write_adapter
from soka_serve.base.base import Base
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.cpu import fast_products
from soka_serve.base.model import load_base
from soka_serve.base.modules import Module as Projection
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.compiler.init.probe import gather
from soka_serve.compiler.methods.lora import lora_parameters
from soka_serve.kron import apply_kron, kpsvd
from soka_serve.kron.cost import Ways, apply_cost, choose_ways
from soka_serve.kron.shapes import balanced_shape
from soka_serve.peft import SokaConfig, SokaLinear
from soka_vllm.slots import SlotStore

SEED = 0
LEAST_CALLS = 3
LORA_RANK = 8
CALIBRATION_ROWS, CALIBRATION_TOKENS = 4, 128
VALUE_BYTES = 4  # adapters are stored in float32


class Effort(NamedTuple):
    """How hard to measure; a dict of it goes to fresh processes."""

    threads: int
    seconds: float


def summary(key: str, samples: Sequence[float]) -> Point:
    """Best and median of some processor times, and how many there are."""
    return {f"{key}_s": min(samples), f"{key}_median_s": statistics.median(samples), f"{key}_calls": len(samples)}


def timed(key: str, work: Callable[[], object], seconds: float) -> Point:
    """Processor time of a call."""
    work()
    samples: list[float] = []
    while len(samples) < LEAST_CALLS or math.fsum(samples) < seconds:
        start = time.process_time()
        work()
        samples.append(time.process_time() - start)
    return summary(key, samples)


def measure_kpsvd(effort: Effort, *, side: int, rank: int) -> Point:
    """One decomposition; "truncated" by name, since small sides would get the exact method."""
    weight, shape = draw_weight("decaying", side, side, SEED), balanced_shape(side, side)
    return timed("kpsvd", lambda: kpsvd(weight, shape, rank, algorithm="truncated", seed=SEED), effort.seconds)


def kpsvd_work(*, side: int, rank: int) -> float:
    """Multiply-adds of one product of the rearranged weight with a Krylov block."""
    return side * side * (rank + max(8, rank // 8))


def intermediate(hidden: int) -> int:
    """LLaMA-2-7B's ratio: 11008 at 4096."""
    return hidden * 43 // 16


def measure_init(effort: Effort, *, layers: int, hidden: int, rank: int, batches: int = 0) -> Point:
    """Stage `init`, in a fresh process; with calibration batches also a forward pass over them."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "base", hidden, intermediate(hidden), layers)
        found: Point = alone(run_init, {**effort._asdict(), "folder": folder, "rank": rank, "batches": batches})
    return found


def run_init(case: dict[str, Any]) -> Point:
    """Stage `init` over the checkpoint in the case's folder. Its memory is above the model's where that is loaded."""
    torch.set_num_threads(case["threads"])
    base = Path(case["folder"]) / "base"
    rule = {"calibration_batches": case["batches"], "rank": {"policy": "fixed", "rank": case["rank"]}}
    _, opened, targets = start_of(base, rule)
    kpsvd(torch.randn(600, 600), balanced_shape(600, 600), 8)  # libraries set up outside the measurement
    found: Point = {}
    statistics = None
    if case["batches"]:
        model = load_base(base, "float32").requires_grad_(False)
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(64, (case["batches"], CALIBRATION_ROWS, CALIBRATION_TOKENS), generator=generator)
        batches = [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]
        statistics = lambda wanted: gather(model, batches, wanted)  # noqa: E731

        @torch.no_grad()
        def forward() -> None:
            with fast_products():
                for batch in batches:
                    model.get_decoder()(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

        found |= timed("forward", forward, case["seconds"])
    with tempfile.TemporaryDirectory() as scratch, AnonymousPeak() as peak, fast_products():
        run = InitRun(targets, opened, Path(scratch), statistics=statistics, seed=SEED, progress=False)
        times = timed("init", run.initialise, case["seconds"])
    return {**found, **times, "init_peak_bytes": peak.added_bytes}


def measure_merge(effort: Effort, *, layers: int, hidden: int, rank: int) -> Point:
    """A merge without and with verification, each in a fresh process."""
    found: Point = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write_model(base, hidden, intermediate(hidden), layers)
        projections = {m.name: (m.out_features, m.in_features) for m in Base(base).layout.modules}
        factors = random_factors(projections, rank, torch.Generator().manual_seed(SEED))
        lock = {"soka": 1, "base": {"name": "generated", "sha256": Checkpoint.open(base).sha256()}}
        write_adapter(Path(folder) / "adapter", factors, base_model="generated", lock=lock)
        for key, verify in (("plain", False), ("verified", True)):
            found |= alone(run_merge, {**effort._asdict(), "folder": folder, "key": key, "verify": verify})
    return found


def run_merge(case: dict[str, Any]) -> Point:
    """Merges of base and adapter in the case's folder. The highest memory is the first one's: later ones reuse it."""
    torch.set_num_threads(case["threads"])
    folder = Path(case["folder"])
    runs: list[dict[str, Any]] = []
    while len(runs) < LEAST_CALLS or math.fsum(run["cpu_s"] for run in runs) < case["seconds"]:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            runs.append(merge_here(folder / "base", folder / "adapter", Path(out) / "merged", case["verify"]))
    times = summary(case["key"], [run["cpu_s"] for run in runs])
    return {**times, f"{case['key']}_peak_bytes": max(run["peak_bytes"] for run in runs)}


def per_layer(*, layers: int, **_: int) -> float:
    """Every layer costs the same."""
    return layers


def constant(**_: int) -> float:
    """Nothing that varies is in it."""
    return 1.0


def measure_operator(effort: Effort, *, tokens: int, rank: int, adapters: int, width: int) -> Point:
    """The plugin's operator on one batch."""
    torch.manual_seed(SEED)
    name = f"{width} x {width}"
    MODELS[name] = [Module(width, (width,))]  # bench_kernel looks up the modules of a case by name
    layer = Layer(Case(name, "float32", rank, tokens, adapters), "cpu")
    run, before = layer.soka(), layer.outputs[0].clone()
    with torch.inference_mode():
        run()
        if torch.equal(layer.outputs[0], before):
            raise RuntimeError(f"{layer.case}: the operator changed nothing")
        return timed("operator", run, effort.seconds)


def measure_slots(effort: Effort, *, slots: int, width: int, rank: int) -> Point:
    """An adapter of one LLaMA layer put where another was, all slots of the plugin being taken."""
    torch.manual_seed(SEED)
    weights = list(sizes(width, intermediate(width)).values())
    stores = [SlotStore(slots, [out], inp, torch.float32, "cpu") for out, inp in weights]
    factors = []
    for weight in weights:
        m, n, p, q = balanced_shape(*weight)
        factors.append((torch.randn(rank, m, n), torch.randn(rank, p, q)))

    def fill(slot: int) -> None:
        for store, (left, right) in zip(stores, factors, strict=True):
            store.clear(slot)
            store.put(slot, 0, left, right)

    for slot in range(slots):
        fill(slot)
    order = itertools.cycle(torch.randperm(slots).tolist())
    return timed("fill", lambda: fill(next(order)), effort.seconds)


def operator_work(*, tokens: int, rank: int, width: int, **_: int) -> float:
    """Multiply-adds of the cheaper order."""
    return tokens * apply_cost(balanced_shape(width, width), rank)


def measure_training(effort: Effort, *, tokens: int, rank: int, width: int) -> Point:
    """Forward and backward of SoKA's layer, of its frozen base alone, and of the delta alone."""
    torch.manual_seed(SEED)
    shape, base = balanced_shape(width, width), nn.Linear(width, width, bias=False).requires_grad_(False)
    layer = SokaLinear(base, "default", module_name="layer", rank=rank, shape=shape, config=SokaConfig(seed=SEED))
    x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    trained = [p for p in layer.parameters() if p.requires_grad]

    theta, initial = layer.terms("default")
    ways: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "layer": (lambda: layer(x), [x, *trained]),
        "base": (lambda: linear(x, base.weight), [x]),
        "delta": (lambda: apply_kron(x, *theta, initial=initial), [x, *trained]),
    }
    found: Point = {}
    for part, fused in (("layer", True), ("delta", False)):
        found |= {f"{part}_{k}": v for k, v in _ways(tokens, rank, width, fused)._asdict().items()}
    for key, (forward, leaves) in ways.items():
        found |= timed(key, lambda f=forward, t=leaves: torch.autograd.grad(f(), t, grad), effort.seconds)  # type: ignore[misc]
    return found


def base_work(*, tokens: int, width: int, **_: int) -> float:
    """Multiply-adds of the frozen layer: forward, and the input's gradient."""
    return 2 * tokens * width * width


def _ways(tokens: int, rank: int, width: int, fused: bool) -> Ways:
    return choose_ways(balanced_shape(width, width), rank, tokens, stacked=2 * rank, fused=fused)


def delta_work(*, tokens: int, rank: int, width: int, fused: bool = False) -> float:
    """Multiply-adds of the delta, the ways that are chosen: products of 2 * rank terms, as the initial ones are
    subtracted, and gradients of `rank`."""
    ways, full = _ways(tokens, rank, width, fused), width * width
    small = tokens * apply_cost(balanced_shape(width, width), rank)
    product = 2 * (2 * rank + (0 if fused else tokens)) * full if ways.product == "dense" else 4 * small
    return product + ((tokens + 2 * rank) * full if ways.gradients == "dense" else 2 * small)


def layer_work(*, tokens: int, rank: int, width: int) -> float:
    """Multiply-adds of SoKA's layer; a delta that is built there shares the base's products."""
    return base_work(tokens=tokens, width=width) + delta_work(tokens=tokens, rank=rank, width=width, fused=True)


def compute_size(_: Effort, *, width: int) -> Point:
    """Parameters and bytes of adapters of one LLaMA layer of that hidden size."""
    projections = sizes(width, intermediate(width))
    found: Point = {}
    for rank in (1, 4):
        parameters = sum(balanced_shape(*shape).parameters(rank) for shape in projections.values())
        # What `init = "weights"` exports has up to twice the terms: trained ones and minus the initial ones.
        found |= {f"soka{rank}_parameters": parameters, f"soka{rank}_bytes": 2 * parameters * VALUE_BYTES}
    modules = [Projection(name, *shape, layer=0, dtype="float32") for name, shape in projections.items()]
    parameters = sum(lora_parameters(module, LORA_RANK) for module in modules)
    return {**found, "lora_parameters": parameters, "lora_bytes": parameters * VALUE_BYTES}
