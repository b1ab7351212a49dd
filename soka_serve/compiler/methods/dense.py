"""Writing a dense model that was trained or merged in memory. SoKA adapters are merged file by file instead
(`soka_serve.compiler.merge`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from soka_serve.base.base import Base
from soka_serve.compiler.merge.papers import copy_side_files
from soka_serve.compiler.methods.method import DenseOutput
from soka_serve.io.safetensors import FLOAT_DTYPES


def write_dense(model: Any, merging: DenseOutput) -> None:
    """Write a model's weights, float32 in memory, with the base's config and tokenizer beside them."""
    auto = merging.dtype == "auto"
    if auto:
        _restore_dtypes(model, merging.base)
    else:
        model.to(getattr(torch, merging.dtype))
    model.save_pretrained(merging.out)
    # After save_pretrained, so that the base's own config stands; only its dtype may differ.
    copy_side_files(merging.base, merging.out, None if auto else merging.dtype, merging.base_name)


def _restore_dtypes(model: Any, base: Base) -> None:
    """Give each weight of a model the dtype that it has in the base; the most common one to those of other names."""
    sizes: Counter[torch.dtype] = Counter()
    for info in base.checkpoint.tensors.values():
        if info.dtype in FLOAT_DTYPES:
            sizes[info.torch_dtype] += info.numel
    common = sizes.most_common(1)[0][0]
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            stored = base.weights.find_parameter(name)
            value.data = value.data.to(common if stored is None else stored.torch_dtype)
