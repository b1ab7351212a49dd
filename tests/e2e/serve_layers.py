"""Run by test_serve_layers.py: the plugin's layers in vLLM's, without an engine; assertions fail where one is wrong."""

from __future__ import annotations

import torch
import vllm
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora import utils as lora_utils
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import from_layer
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

import soka_vllm

SLOTS = 2
HIDDEN = 64
TOKENS = [0, 7, 9, 7, 0, 9]  # adapter ids: none, that in slot 0, that in slot 1 (the last)


def kron(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return sum(torch.kron(a, b) for a, b in zip(left.double(), right.double(), strict=True))  # type: ignore[return-value]


def check_layer(base: torch.nn.Module, packed: list[str], widths: list[int]) -> None:
    torch.nn.init.normal_(base.weight, std=0.1)
    weight = base.weight.detach().double().clone()
    base.quant_method.process_weights_after_loading(base)
    config = LoRAConfig(max_lora_rank=8, max_loras=SLOTS, max_cpu_loras=SLOTS, lora_dtype=torch.float32)
    layer = from_layer(base, SLOTS, config, packed)
    assert type(layer).__name__.startswith("Kronecker"), type(layer)
    punica = PunicaWrapperCPU(64, 8, "cpu")
    layer.set_mapping(punica)
    one = len(widths) == 1
    x = torch.randn(len(TOKENS), HIDDEN)
    deltas = {7: torch.zeros(sum(widths), HIDDEN).double(), 9: torch.zeros(sum(widths), HIDDEN).double()}

    def check() -> None:
        want = x.double() @ weight.T
        for token, adapter in enumerate(TOKENS):
            if adapter:
                want[token] += deltas[adapter] @ x[token].double()
        for prefill in (True, False):
            punica.update_metadata(LoRAMapping(tuple(TOKENS), tuple(TOKENS), prefill), [7, 9], SLOTS + 1, 100)
            torch.testing.assert_close(layer.apply(x), want.float(), rtol=1e-4, atol=1e-4)

    def put_kronecker(slot: int, adapter: int, rank: int) -> None:
        lefts = [torch.randn(rank, width // 8, 8) for width in widths]
        rights = [torch.randn(rank, 8, HIDDEN // 8) for _ in widths]
        layer.set_lora(slot, lefts[0] if one else lefts, rights[0] if one else rights)
        deltas[adapter] = torch.cat([kron(left, right) for left, right in zip(lefts, rights, strict=True)])

    def put_lora(slot: int, adapter: int) -> None:
        downs = [torch.randn(4, HIDDEN) for _ in widths]
        ups = [torch.randn(width, 4) for width in widths]
        layer.set_lora(slot, downs[0] if one else downs, ups[0] if one else ups)
        deltas[adapter] = torch.cat([(up @ down).double() for up, down in zip(ups, downs, strict=True)])

    check()
    with torch.inference_mode():  # as in a step of the engine
        put_kronecker(0, 7, rank=3)
    put_kronecker(1, 9, rank=1)
    check()
    assert "lora_a_stacked" not in layer.__dict__  # Kronecker adapters alone take no LoRA buffers
    with torch.inference_mode():
        put_lora(1, 9)  # in the last slot, which vLLM's CPU code reads for tokens of the base
        check()
    assert layer.lora_a_stacked[0].shape[0] == SLOTS + 1
    put_kronecker(1, 9, rank=2)
    check()
    assert not layer.lora_a_stacked[0].any()
    put_lora(0, 7)
    put_lora(1, 9)
    check()
    for slot, adapter in enumerate((7, 9)):
        layer.reset_lora(slot)
        deltas[adapter].zero_()
    check()


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


def main() -> None:
    check_versions()
    soka_vllm.register()
    classes, load = lora_utils._all_lora_classes, WorkerLoRAManager._load_adapter
    soka_vllm.register()  # a second time changes nothing
    assert (lora_utils._all_lora_classes, WorkerLoRAManager._load_adapter) == (classes, load)
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        dtype = {"bias": False, "params_dtype": torch.float32}
        check_layer(QKVParallelLinear(HIDDEN, 16, 4, 2, **dtype), ["q", "k", "v"], [64, 32, 32])
        check_layer(MergedColumnParallelLinear(HIDDEN, [96, 96], **dtype), ["gate", "up"], [96, 96])
        check_layer(RowParallelLinear(HIDDEN, 48, **dtype), [], [48])
    print("3 layers checked")


if __name__ == "__main__":
    main()
