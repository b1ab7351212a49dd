"""Dense models from the baselines (LoRA, PiSSA, LoKr through PEFT's own merge; full fine-tuning as it is).

Not streamed: the model is loaded whole, as PEFT does it. SoKA adapters go through `soka_serve.compiler.merge.merge`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.model import load_base
from soka_serve.base.read_modules import weights_of
from soka_serve.compiler.merge.papers import copy_side_files
from soka_serve.compiler.train.baselines import load_adapter
from soka_serve.io.safetensors import FLOAT_DTYPES


def merge_baseline(
    method: str, trained: Path, base_dir: Path, out: Path, dtype: str, base_name: str | None = None
) -> None:
    """Write a baseline's dense model into a new directory.

    Args:
        method: lora, pissa, lokr or full.
        trained: the trained adapter, or the whole model for "full".
        base_dir: the base checkpoint.
        out: directory to make.
        dtype: of the weights; with "auto" each keeps the dtype that it has in the base. The sum is formed in float32.
        base_name: what the adapter calls the base.
    """
    base = Checkpoint.open(base_dir)
    if method == "full":
        model = load_base(trained, "float32")
    else:
        model = load_adapter(load_base(base_dir, "float32"), trained).merge_and_unload()
    if dtype == "auto":
        _restore_dtypes(model, base)
    else:
        model.to(getattr(torch, dtype))
    model.save_pretrained(out)
    # After save_pretrained, so that the base's own config stands; only its dtype may differ.
    copy_side_files(base, out, None if dtype == "auto" else dtype, base_name)


def _restore_dtypes(model: Any, base: Checkpoint) -> None:
    """Give each weight of a model the dtype that it has in the base; the most common one to those of other names."""
    sizes: Counter[torch.dtype] = Counter()
    for info in base.tensors.values():
        if info.dtype in FLOAT_DTYPES:
            sizes[info.torch_dtype] += info.numel
    common = sizes.most_common(1)[0][0]
    weights = weights_of(base)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            stored = weights.find_parameter(name)
            value.data = value.data.to(common if stored is None else stored.torch_dtype)
