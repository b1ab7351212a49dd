"""Everything that depends on vLLM's version: its classes and functions that the plugin uses, and whether they fit.

Imports vLLM, hence only to be imported once an engine is wanted (`soka_vllm.register`).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import vllm
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora import utils as lora_utils
from vllm.lora.layers import (
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

__all__ = [
    "LORA_LAYERS",
    "PLAIN_LINEARS",
    "SUPPORTED",
    "ErrorResponse",
    "LoRALayerWeights",
    "LoRAModel",
    "OpenAIServingModels",
    "WorkerLoRAManager",
    "check_vllm",
    "get_adapter_absolute_path",
    "lora_utils",
    "on_cpu",
]

SUPPORTED = ((0, 29), (0, 33))  # from, and up to but not including

# The layers that take Kronecker adapters: qkv_proj, gate_up_proj; o_proj and down_proj.
LORA_LAYERS: tuple[type[Any], ...] = (
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
# Base layers of these exact types are computed by their quantisation method alone.
PLAIN_LINEARS: tuple[type[Any], ...] = (MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)

# What is overridden or called, and the parameters it must have, in order.
_SIGNATURES: tuple[tuple[Any, str, str], ...] = (
    *(
        (layer, name, parameters)
        for layer in LORA_LAYERS
        for name, parameters in (
            ("create_lora_weights", "self max_loras lora_config model_config"),
            ("reset_lora", "self index"),
            ("set_lora", "self index lora_a lora_b"),
            ("apply", "self x bias"),
        )
    ),
    (WorkerLoRAManager, "_load_adapter", "self lora_request"),
    (OpenAIServingModels, "load_lora_adapter", "self request base_model_name"),
    (lora_utils, "get_adapter_absolute_path", "lora_path"),
)


def check_vllm() -> None:
    """Check that the plugin fits the installed vLLM.

    Raises:
        RuntimeError: an unsupported version, or one whose functions have other parameters than expected.
    """
    supported = " up to below ".join(".".join(map(str, version)) for version in SUPPORTED)
    here = f"soka_vllm supports vLLM {supported}; installed is {vllm.__version__}"
    advice = "install a supported version, or set VLLM_PLUGINS= to run without Kronecker adapters"
    match = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if match is None or not SUPPORTED[0] <= (int(match[1]), int(match[2])) < SUPPORTED[1]:
        raise RuntimeError(f"{here}: {advice}")
    problems = []
    for owner, name, expected in _SIGNATURES:
        function = getattr(owner, name, None)
        names = " ".join(inspect.signature(function).parameters) if function else "does not exist"
        if names != expected:
            problems.append(f"{owner.__name__}.{name} ({names}); expected ({expected})")
    if not isinstance(getattr(lora_utils, "_all_lora_classes", None), tuple):
        problems.append("vllm.lora.utils._all_lora_classes is not a tuple of classes")
    else:
        missing = [layer.__name__ for layer in LORA_LAYERS if layer not in lora_utils._all_lora_classes]
        problems += [f"{name} is not in vllm.lora.utils._all_lora_classes" for name in missing]
    for cls, attribute in (
        (LoRAModelManager, "self.packed_modules"),
        (LoRAModelManager, "self.modules"),
        (PunicaWrapperBase, "self._token_lora_indices"),
    ):
        if attribute not in inspect.getsource(cls.__init__):
            problems.append(f"{cls.__name__} has no {attribute.removeprefix('self.')}")
    if problems:
        raise RuntimeError("\n".join([f"{here}, which differs from what was tested: {advice}", *problems]))


def on_cpu() -> bool:
    """Whether this vLLM runs on CPUs."""
    return bool(current_platform.is_cpu())
