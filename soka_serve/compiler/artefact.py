"""What a build made, loaded as a user would load it, and the first training batches to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from soka_serve.compiler.context import Context
    from soka_serve.data.encode import EncodedSet


def load_base_of(context: Context) -> Any:
    """The base as it is held while training, on the GPU where there is one."""
    from soka_serve.base.model import load_base

    table = context.loaded.manifest.base
    model = load_base(context.base.directory, table.dtype, table.quantize)
    return model.to(gpu()) if gpu() is not None and table.quantize == "none" else model


def load_result(base: nn.Module, new: Path) -> nn.Module:
    """The artefact in `new`: its adapter on the base, or its dense model."""
    if not (new / "adapter").exists():
        from soka_serve.base.model import load_base

        full: nn.Module = load_base(new / "merged").to(next(base.parameters()).device)
        return full
    from peft import PeftModel

    import soka_serve.peft  # registers SOKA

    del soka_serve
    model: nn.Module = PeftModel.from_pretrained(base, str(new / "adapter")).eval()
    return model


def gpu() -> torch.device | None:
    """The GPU, if there is one."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def first_batches(context: Context, training: EncodedSet, count: int, device: torch.device) -> list[dict[str, Tensor]]:
    """The first `count` batches of a seeded shuffle of the training data, or as many as there are."""
    from soka_serve.data.collate import PadCollator

    train = context.loaded.manifest.train
    generator = torch.Generator().manual_seed(train.seed)
    order: Sequence[int] = torch.randperm(len(training.examples), generator=generator).tolist()
    collate = PadCollator(context.base.tokenizer.pad_id)
    size = train.batch_size
    chosen = [order[start : start + size] for start in range(0, min(count * size, len(order)), size)]
    return [{k: v.to(device) for k, v in collate([training.examples[i] for i in at]).items()} for at in chosen]
