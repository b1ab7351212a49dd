"""Run by test_serve_layers.py: the plugin's layers in vLLM's, without an engine; assertions fail where one is wrong.

Arguments: cases, each the number of tensor-parallel ranks (processes), and optionally "fully-sharded" after a blank.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import vllm
from vllm.config import LoRAConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    init_distributed_environment,
    initialize_model_parallel,
)
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


def check_layer(
    make: Callable[[], torch.nn.Module], load: Loader, packed: list[str], sizes: list[int], inputs: int, sharded: bool
) -> None:
    """Hold a layer with adapters against vLLM's plain one with the merged weights, which vLLM cuts itself.

    Args:
        make: a layer of vLLM's.
        load: gives it the whole weights of its modules.
        packed: names of the modules packed in it.
        sizes: output features of each module.
        inputs: input features.
        sharded: with --fully-sharded-loras.
    """
    weights = [0.1 * torch.randn(size, inputs) for size in sizes]

    def plain(deltas: Sequence[torch.Tensor]) -> torch.nn.Module:
        layer = make()
        load(layer, [(w.double() + d).float() for w, d in zip(weights, deltas, strict=True)])
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    nothing = [torch.zeros(size, inputs).double() for size in sizes]
    base = plain(nothing)
    config = LoRAConfig(
        max_lora_rank=8,
        max_loras=SLOTS,
        max_cpu_loras=SLOTS,
        lora_dtype=torch.float32,
        fully_sharded_loras=sharded,
    )
    layer = from_layer(base, SLOTS, config, packed)
    assert type(layer).__name__.startswith("Kronecker"), type(layer)
    assert ("Sharded" in type(layer).__name__) == (sharded and layer.tp_size > 1), type(layer)
    punica = PunicaWrapperCPU(64, 8, "cpu")
    layer.set_mapping(punica)
    one = len(packed) <= 1
    row_parallel = isinstance(base, RowParallelLinear)
    x = torch.randn(len(TOKENS), inputs)
    if row_parallel:
        x = x.chunk(layer.tp_size, 1)[layer.tp_rank].contiguous()
    merged = {0: plain(nothing), 7: plain(nothing), 9: plain(nothing)}

    def check() -> None:
        outputs = {adapter: module(x)[0] for adapter, module in merged.items()}
        want = torch.stack([outputs[adapter][token] for token, adapter in enumerate(TOKENS)])
        for prefill in (True, False):
            punica.update_metadata(LoRAMapping(tuple(TOKENS), tuple(TOKENS), prefill), [7, 9], SLOTS + 1, 100)
            torch.testing.assert_close(layer(x)[0], want, rtol=1e-4, atol=1e-4)

    def put(slot: int, adapter: int, pairs: list[tuple[torch.Tensor, torch.Tensor]], delta: list[torch.Tensor]) -> None:
        firsts, seconds = map(list, zip(*pairs, strict=True))
        layer.set_lora(slot, firsts[0] if one else firsts, seconds[0] if one else seconds)
        merged[adapter] = plain(delta)
        assert not torch.equal(merged[adapter](x)[0], merged[0](x)[0])

    def put_kronecker(slot: int, adapter: int, rank: int, goal: int) -> None:
        pairs = []
        for size in sizes:
            m, n = divisor_near(size, goal), divisor_near(inputs, goal)
            pairs.append((torch.randn(rank, m, n), torch.randn(rank, size // m, inputs // n)))
        put(slot, adapter, pairs, [kron(left, right) for left, right in pairs])

    def put_lora(slot: int, adapter: int) -> None:
        pairs = [(torch.randn(4, inputs), torch.randn(size, 4)) for size in sizes]
        put(slot, adapter, pairs, [(up @ down).double() for down, up in pairs])

    check()
    with torch.inference_mode():  # as in a step of the engine
        put_kronecker(0, 7, rank=3, goal=8)
    put_kronecker(1, 9, rank=1, goal=3)
    check()
    assert "lora_a_stacked" not in layer.__dict__  # Kronecker adapters alone take no LoRA buffers
    put_kronecker(0, 7, rank=2, goal=1)
    put_kronecker(1, 9, rank=1, goal=inputs)
    check()
    with torch.inference_mode():
        put_lora(1, 9)  # in the last slot, which vLLM's CPU code reads for tokens of the base
        check()
    assert layer.lora_a_stacked[0].shape[0] == SLOTS + 1
    put_kronecker(1, 9, rank=2, goal=2)
    check()
    assert not layer.lora_a_stacked[0].any()
    put_lora(0, 7)
    put_lora(1, 9)
    check()
    put_kronecker(0, 7, rank=1, goal=4)
    layer._lora_always = True  # as on a GPU, where LoRA's part runs whatever the slots hold
    check()
    for slot, adapter in enumerate((7, 9)):
        layer.reset_lora(slot)
        merged[adapter] = merged[0]
    check()

    os.environ["SOKA_LORA"] = "0"
    base = plain(nothing)
    layer = from_layer(base, SLOTS, config, packed)
    layer.set_mapping(punica)
    assert all(buffer.is_meta for buffer in (*layer.lora_a_stacked, *layer.lora_b_stacked))
    put_kronecker(0, 7, rank=2, goal=8)
    check()
    # What vLLM warms up with: its shapes come from the buffers, it has no effect, and it empties the slot.
    sizes_here = layer.shards.widths if len(packed) > 1 else [sum(layer.shards.widths)]
    downs = [torch.zeros(4, layer.lora_a_stacked[0].shape[-1]) for _ in sizes_here]
    ups = [torch.zeros(size, 4) for size in sizes_here]
    layer.set_lora(0, downs[0] if one else downs, ups[0] if one else ups)
    merged[7] = merged[0]
    check()
    del os.environ["SOKA_LORA"]


def refusal() -> str:
    """Why `register` refuses this vLLM."""
    try:
        soka_vllm.register()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("register accepted it")


def check_versions() -> None:
    """Versions and signatures that the plugin does not know are refused by name, before anything is changed."""
    version, load, stock = vllm.__version__, WorkerLoRAManager._load_adapter, lora_utils._all_lora_classes
    vllm.__version__ = "0.40.1"
    assert "supports vLLM 0.29 up to below 0.33; installed is 0.40.1" in refusal()
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

        def gate_up() -> torch.nn.Module:
            return MergedColumnParallelLinear(HIDDEN, [96, 96], **dtype)

        check_layer(qkv, load_parts("qkv"), ["q", "k", "v"], [64, 32, 32], HIDDEN, sharded)
        check_layer(qkv, load_fused("qkv", [64, 32, 32]), ["qkv_proj"], [128], HIDDEN, sharded)
        check_layer(gate_up, load_parts([0, 1]), ["gate", "up"], [96, 96], HIDDEN, sharded)
        check_layer(gate_up, load_fused([0, 1], [96, 96]), ["gate_up_proj"], [192], HIDDEN, sharded)
        check_layer(lambda: ColumnParallelLinear(HIDDEN, 96, **dtype), load_whole, [], [96], HIDDEN, sharded)
        check_layer(lambda: RowParallelLinear(96, 48, **dtype), load_whole, [], [48], 96, sharded)
    print(f"rank {rank}: 6 layers checked", flush=True)


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
