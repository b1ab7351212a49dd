"""What a base in 8 or 4 bits (`load_base` with `quantize`) computes with: its weights, rounded to the bits and back.

The quantiser and its settings are those of `load_base`, so that values are those of its layers, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from soka_serve.base.model import Dtype, Quantize, quantization_config
from soka_serve.base.pretrained import build_meta_model, quiet


def held_weight(weight: Tensor, quantize: Quantize, dtype: Dtype = "auto") -> Tensor:
    """What a layer multiplies with in the place of a weight.

    Args:
        weight: (out, in), finite.
        quantize: the bits; "none" rounds to `dtype` alone.
        dtype: in which the base is held where it is not quantised, and from which it is quantised; "auto" is the
            weight's own.

    Returns:
        (out, in), float32, on the weight's device.

    Raises:
        BuildError: bitsandbytes is not installed.
    """
    values = weight if dtype == "auto" else weight.to(getattr(torch, dtype))
    if quantize == "none":
        return values.float()
    settings = quantization_config(quantize, dtype)
    from bitsandbytes import functional

    values = (values.float() if values.dtype == torch.float64 else values).contiguous()  # bitsandbytes knows no others
    if quantize == "8bit":  # LLM.int8: a scale per row, of the weight in float16
        whole, scales, _ = functional.int8_vectorwise_quant(values.to(torch.float16))
        found: Tensor = functional.int8_vectorwise_dequant(whole, scales)
    else:
        packed, state = functional.quantize_4bit(
            values,
            quant_type=settings.bnb_4bit_quant_type,
            compress_statistics=settings.bnb_4bit_use_double_quant,
        )
        found = functional.dequantize_4bit(packed, state)
    return found.float()


def held_modules(directory: Path, quantize: Quantize) -> frozenset[str]:
    """Full names of the modules that `load_base` holds in bits: those that transformers replaces, by its own choice.

    Args:
        directory: of the base; no weight is read.
        quantize: the bits; "none" holds none.

    Raises:
        BuildError: bitsandbytes is not installed.
        CheckpointError: transformers cannot build the model.
    """
    if quantize == "none":
        return frozenset()
    settings = quantization_config(quantize, "auto")
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    model = build_meta_model(directory)
    before = dict(model.named_modules())
    left = HfQuantizer.get_modules_to_not_convert(
        model, settings.llm_int8_skip_modules, getattr(model, "_keep_in_fp32_modules", None)
    )
    with quiet():
        replace_with_bnb_linear(model, modules_to_not_convert=left, quantization_config=settings)
    return frozenset(name for name, module in model.named_modules() if before.get(name) is not module)
