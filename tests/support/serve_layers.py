"""Run by test_serve_layers.py: the plugin's layers in vLLM's, without an engine; assertions fail where one is wrong.

Arguments: cases, each the number of tensor-parallel ranks (processes), and optionally "fully-sharded" after a blank.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import vllm
from vllm.config import LoRAConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, init_distributed_environment, initialize_model_parallel
from vllm.lora import utils as lora_utils
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import from_layer
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

import soka_vllm

SLOTS = 2
HIDDEN = 64
TOKENS = [0, 7, 9, 7, 0, 9]  # adapter ids: none, that in slot 0, that in slot 1 (the last)
Loader = Callable[[torch.nn.Module, Sequence[torch.Tensor]], None]


def kron(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return sum(torch.kron(a, b) for a, b in zip(left.double(), right.double(), strict=True))  # type: ignore[return-value]


def divisor_near(size: int, goal: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - goal))


@dataclass(frozen=True)
class LayerCase:
    """A layer of vLLM's: how it is made, and the modules in it.

    Args:
        make: the layer, without weights.
        load: gives it the whole weights of its modules.
        packed: names of the modules packed in it.
        sizes: output features of each module.
        inputs: input features.
        places: which of the modules each packed one is, where one is there twice.
    """

    make: Callable[[], torch.nn.Module]
    load: Loader
    packed: list[str]
    sizes: list[int]
    inputs: int
    places: tuple[int, ...] = ()


class AdaptedLayer:
    """A layer with adapters, held against vLLM's plain one with the merged weights, which vLLM cuts itself."""

    def __init__(self, case: LayerCase, sharded: bool) -> None:
        self.case = case
        self.weights = [0.1 * torch.randn(size, case.inputs) for size in case.sizes]
        self.nothing = [torch.zeros(size, case.inputs).double() for size in case.sizes]
        self.config = LoRAConfig(
            max_lora_rank=8, max_loras=SLOTS, max_cpu_loras=SLOTS, lora_dtype=torch.float32, fully_sharded_loras=sharded
        )
        self.punica = PunicaWrapperCPU(64, 8, "cpu")
        self.one = len(case.packed) <= 1
        self.wrap()
        self.x = torch.randn(len(TOKENS), case.inputs)
        if isinstance(self.layer.base_layer, RowParallelLinear):
            self.x = self.x.chunk(self.layer.tp_size, 1)[self.layer.tp_rank].contiguous()
        self.merged = {adapter: self.plain(self.nothing) for adapter in (0, 7, 9)}

    def plain(self, deltas: Sequence[torch.Tensor]) -> torch.nn.Module:
        """vLLM's layer with these deltas merged into the weights."""
        layer = self.case.make()
        self.case.load(layer, [(w.double() + d).float() for w, d in zip(self.weights, deltas, strict=True)])
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    def wrap(self) -> None:
        """Make the layer that takes adapters, with empty slots."""
        self.layer = from_layer(self.plain(self.nothing), SLOTS, self.config, self.case.packed)
        self.layer.set_mapping(self.punica)

    def check(self) -> None:
        """Prefill and decode give what the merged layers give."""
        outputs = {adapter: module(self.x)[0] for adapter, module in self.merged.items()}
        want = torch.stack([outputs[adapter][token] for token, adapter in enumerate(TOKENS)])
        for prefill in (True, False):
            self.punica.update_metadata(LoRAMapping(tuple(TOKENS), tuple(TOKENS), prefill), [7, 9], SLOTS + 1, 100)
            torch.testing.assert_close(self.layer(self.x)[0], want, rtol=1e-4, atol=1e-4)

    def set(self, slot: int, firsts: list[torch.Tensor], seconds: list[torch.Tensor]) -> None:
        """Fill a slot: a pair of factors for each module."""
        if self.case.places:
            firsts, seconds = ([given[place] for place in self.case.places] for given in (firsts, seconds))
        self.layer.set_lora(slot, firsts[0] if self.one else firsts, seconds[0] if self.one else seconds)

    def put_kronecker(self, slot: int, rank: int, goal: int) -> None:
        """Fill a slot with a Kronecker adapter, Left about (goal, goal); of even rank as the loader does."""
        inputs, lefts, rights = self.case.inputs, [], []
        for size in self.case.sizes:
            m, n = divisor_near(size, goal), divisor_near(inputs, goal)
            lefts.append(torch.randn(rank, m, n))
            rights.append(torch.randn(rank, size // m, inputs // n))
        deltas = [kron(left, right) for left, right in zip(lefts, rights, strict=True)]
        if rank % 2 == 0:
            for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
                arranged = self.layer.arranged(index, left, right)
                if arranged is not None:
                    assert torch.equal(arranged[0], left)
                    assert torch.equal(arranged[1], right)
                    lefts[index], rights[index], _ = arranged
        self.set(slot, lefts, rights)
        self.merge(slot, deltas)

    def put_lora(self, slot: int) -> None:
        """Fill a slot with a LoRA adapter."""
        downs = [torch.randn(4, self.case.inputs) for _ in self.case.sizes]
        ups = [torch.randn(size, 4) for size in self.case.sizes]
        self.set(slot, downs, ups)
        self.merge(slot, [(up @ down).double() for down, up in zip(downs, ups, strict=True)])

    def merge(self, slot: int, deltas: list[torch.Tensor]) -> None:
        """Make what a slot's adapter is held against."""
        merged = self.merged[(7, 9)[slot]] = self.plain(deltas)
        assert not torch.equal(merged(self.x)[0], self.merged[0](self.x)[0])


def check_slots(adapted: AdaptedLayer) -> None:
    """Slots change hands between kinds; LoRA's buffers are there while an adapter needs them."""
    layer = adapted.layer
    adapted.check()
    with torch.inference_mode():  # as in a step of the engine
        adapted.put_kronecker(0, rank=3, goal=8)
    adapted.put_kronecker(1, rank=1, goal=3)
    adapted.check()
    assert "lora_a_stacked" not in layer.__dict__  # Kronecker adapters alone take no LoRA buffers
    adapted.put_kronecker(0, rank=2, goal=1)
    adapted.put_kronecker(1, rank=1, goal=adapted.case.inputs)
    adapted.check()
    with torch.inference_mode():
        adapted.put_lora(1)  # in the last slot, which vLLM's CPU code reads for tokens of the base
        adapted.check()
    assert layer.lora_a_stacked[0].shape[0] == SLOTS + 1
    for _ in range(2):  # the second time where factors of the same kinds are
        adapted.put_kronecker(1, rank=2, goal=2)
        adapted.check()
    assert not layer.lora_a_stacked[0].any()
    adapted.put_lora(0)
    adapted.put_lora(1)
    adapted.check()
    adapted.put_kronecker(1, rank=2, goal=2)
    adapted.check()
    adapted.put_kronecker(0, rank=1, goal=4)
    layer._lora_always = True  # as on a GPU, where LoRA's part runs whatever the slots hold
    adapted.check()
    for slot, adapter in enumerate((7, 9)):
        layer.reset_lora(slot)
        adapted.merged[adapter] = adapted.merged[0]
    adapted.check()


def check_without_lora(adapted: AdaptedLayer) -> None:
    """With SOKA_LORA=0 LoRA's buffers take no memory."""
    os.environ["SOKA_LORA"] = "0"
    adapted.wrap()
    layer, packed = adapted.layer, adapted.case.packed
    assert all(buffer.is_meta for buffer in (*layer.lora_a_stacked, *layer.lora_b_stacked))
    adapted.put_kronecker(0, rank=2, goal=8)
    adapted.check()
    # What vLLM warms up with: its shapes come from the buffers, it has no effect, and it empties the slot.
    sizes = layer.shards.widths if len(packed) > 1 else [sum(layer.shards.widths)]
    adapted.set(
        0, [torch.zeros(4, layer.lora_a_stacked[0].shape[-1]) for _ in sizes], [torch.zeros(s, 4) for s in sizes]
    )
    adapted.merged[7] = adapted.merged[0]
    adapted.check()
    del os.environ["SOKA_LORA"]


def check_layer(case: LayerCase, sharded: bool) -> None:
    """Hold a layer with adapters against vLLM's plain one.

    Args:
        sharded: with --fully-sharded-loras.
    """
    adapted = AdaptedLayer(case, sharded)
    layer = adapted.layer
    assert type(layer).__name__.startswith("Kronecker"), type(layer)
    assert ("Sharded" in type(layer).__name__) == (sharded and layer.tp_size > 1), type(layer)
    check_slots(adapted)
    check_without_lora(adapted)


def refusal() -> str:
    """Why `register` refuses this vLLM."""
    try:
        soka_vllm.register()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("register accepted it")


def check_versions() -> None:
    """Old versions and other signatures are refused by name, before anything is changed."""
    version, load, stock = vllm.__version__, WorkerLoRAManager._load_adapter, lora_utils._all_lora_classes
    vllm.__version__ = "0.28.1"
    assert "supports vLLM 0.29 up to below 0.35; installed is 0.28.1" in refusal()
    vllm.__version__ = version
    WorkerLoRAManager._load_adapter = lambda self, lora_request, device: None
    assert "WorkerLoRAManager._load_adapter (self lora_request device); expected (self lora_request)" in refusal()
    WorkerLoRAManager._load_adapter = load
    lora_utils._all_lora_classes = stock[:4]
    assert "RowParallelLinearWithLoRA is not in vllm.lora.utils._all_lora_classes" in refusal()
    lora_utils._all_lora_classes = stock


def check_rank(rank: int, ranks: int, sharded: bool, store: str) -> None:
    """All layers, on one rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights, factors and inputs on every rank
    config = VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp"))
    with set_current_vllm_config(config), torch.no_grad():
        init_distributed_environment(ranks, rank, f"file://{store}", rank, "gloo")
        initialize_model_parallel(ranks, 1)
        assert get_tensor_model_parallel_rank() == rank
        dtype = {"bias": False, "params_dtype": torch.float32}

        def load_parts(names: Sequence[str | int]) -> Loader:
            def load(layer: torch.nn.Module, weights: Sequence[torch.Tensor]) -> None:
                for name, weight in zip(names, weights, strict=True):
                    layer.weight_loader(layer.weight, weight, name)

            return load

        def load_whole(layer: torch.nn.Module, weights: Sequence[torch.Tensor]) -> None:
            layer.weight_loader(layer.weight, weights[0])

        def load_fused(names: Sequence[str | int], sizes: Sequence[int]) -> Loader:
            return lambda layer, weights: load_parts(names)(layer, weights[0].split(list(sizes)))

        def qkv() -> torch.nn.Module:
            return QKVParallelLinear(HIDDEN, 16, 4, 2, **dtype)

        def shared_qkv() -> torch.nn.Module:
            layer = qkv()
            layer.lora_packed_modules = ["q", "k", "k"]  # as vLLM's Gemma 4 from 0.34 on
            return layer

        def load_shared(layer: torch.nn.Module, weights: Sequence[torch.Tensor]) -> None:
            load_parts("qkv")(layer, [*weights, weights[1]])

        def gate_up() -> torch.nn.Module:
            return MergedColumnParallelLinear(HIDDEN, [96, 96], **dtype)

        for case in (
            LayerCase(qkv, load_parts("qkv"), ["q", "k", "v"], [64, 32, 32], HIDDEN),
            LayerCase(qkv, load_fused("qkv", [64, 32, 32]), ["qkv_proj"], [128], HIDDEN),
            LayerCase(shared_qkv, load_shared, ["q", "k", "k"], [64, 32], HIDDEN, (0, 1, 1)),
            LayerCase(gate_up, load_parts([0, 1]), ["gate", "up"], [96, 96], HIDDEN),
            LayerCase(gate_up, load_fused([0, 1], [96, 96]), ["gate_up_proj"], [192], HIDDEN),
            LayerCase(lambda: ColumnParallelLinear(HIDDEN, 96, **dtype), load_whole, [], [96], HIDDEN),
            LayerCase(lambda: RowParallelLinear(96, 48, **dtype), load_whole, [], [48], 96),
        ):
            check_layer(case, sharded)
    print(f"rank {rank}: 7 layers checked", flush=True)


def check_ranks(ranks: int, sharded: bool) -> bool:
    """Whether every rank found its layers right."""
    os.environ["VLLM_DIST_IDENT"] = f"soka-{os.getpid()}-{ranks}-{sharded}"
    context = multiprocessing.get_context("fork")  # importing vLLM once is enough
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [context.Process(target=check_rank, args=(rank, ranks, sharded, store)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return not any(process.exitcode for process in processes)


def main(cases: Sequence[str]) -> None:
    check_versions()
    soka_vllm.register()
    classes, load = lora_utils._all_lora_classes, WorkerLoRAManager._load_adapter
    soka_vllm.register()  # a second time changes nothing
    assert (lora_utils._all_lora_classes, WorkerLoRAManager._load_adapter) == (classes, load)
    for case in cases:
        ranks, _, sharded = case.partition(" ")
        print(f"case {case}:", flush=True)
        print("right" if check_ranks(int(ranks), sharded == "fully-sharded") else "wrong", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
