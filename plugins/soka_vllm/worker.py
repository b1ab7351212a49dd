"""What a worker does differently from vLLM's: which adapters are in slots, and which steps have any.

Imports no vLLM: these functions take the place of vLLM's while vLLM's modules are still being imported.
"""

from __future__ import annotations

from typing import Any

from soka_vllm.store import BESIDE, loaded_already

# On vLLM's PunicaWrapperBase: whether the tokens of this step belong to any adapter.
ADAPTERS_IN_STEP = "soka_adapters_in_step"


def apply_adapters(stock: Any, manager: Any, lora_requests: Any) -> None:
    """LRUCacheWorkerLoRAManager._apply_adapters, of requests that reload nothing."""
    stock(manager, {loaded_already(lora_request) for lora_request in lora_requests if lora_request})


def activate(stock: Any, manager: Any, lora_id: int) -> bool:
    """LoRAModelManager.activate_adapter: on a GPU empty the slot in all layers first; if filling it fails, free it.

    Layers share memory on a GPU, where the old and the new factors need not fit together. vLLM up to 0.32 serves an
    adapter half set that could not be put into its slot.
    """
    from soka_vllm.layers import KroneckerMixin

    if lora_id not in manager._active_adapters and None in manager.lora_index_to_id:
        slot = manager.lora_index_to_id.index(None)  # vLLM takes the first
        for layer in manager.modules.values():
            if isinstance(layer, KroneckerMixin) and not layer._on_cpu:
                layer.reset_lora(slot)
    try:
        filled = bool(stock(manager, lora_id))
        if filled:
            _fill_beside(manager, lora_id)
        return filled
    except Exception:
        manager.deactivate_adapter(lora_id)
        raise


def _fill_beside(manager: Any, lora_id: int) -> None:
    """Put LoRA's matrices of a sum beside its Kronecker factors, into the layers that hold both."""
    beside = getattr(manager._registered_adapters.get(lora_id), BESIDE, None)
    if not beside:
        return
    slot = manager.lora_index_to_id.index(lora_id)
    for name, layer in manager.modules.items():
        parts = [beside.get(part) for part in manager.packed_modules.get(name, [name])]
        if any(parts):
            layer.set_lora_beside(slot, [p and p.lora_a for p in parts], [p and p.lora_b for p in parts])


def note_adapters(stock: Any, wrapper: Any, mapping: Any, *more: Any, **options: Any) -> None:
    """PunicaWrapperBase.update_metadata: note whether any token of the step belongs to an adapter."""
    stock(wrapper, mapping, *more, **options)
    setattr(wrapper, ADAPTERS_IN_STEP, any(mapping.index_mapping))


def load_model(stock: Any, runner: Any, load_dummy_weights: bool = False) -> None:
    """CPUModelRunner.load_model; then allocate what a later stage of a pipeline receives.

    vLLM does so in its warm-up run, which its CPU build leaves out when nothing is compiled, as with LoRA: the first
    request then ends the engine. So up to 0.33, whose other runner for CPUs allocates it itself, as all do later.
    """
    from vllm.distributed import get_pp_group

    stock(runner, load_dummy_weights)
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
