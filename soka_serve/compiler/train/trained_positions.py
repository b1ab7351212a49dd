"""The output layer on the positions that count in the loss alone: prompts and padding need no logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from soka_serve.data.collate import IGNORED


def output_layer(model: Any) -> nn.Module | None:
    """The layer from hidden states to logits of a model whose loss is that of the next token; None of other models.

    Args:
        model: of transformers, or of PEFT around one; without other wrappers.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.get_output_embeddings() if getattr(whole, "loss_type", None) == "ForCausalLM" else None


@contextmanager
def trained_positions(head: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """While this is active, `head` sees the positions of a batch that count in the loss, and one more.

    Loss and gradients are those of the whole batch. The positions come as one row, whose labels begin with one that
    does not count: the model shifts labels by one, so the logits at each position meet the token behind it, and those
    of the last position, which is there for that only, meet none.

    Args:
        head: see `output_layer`.
        batch: `labels` (rows, tokens) int64, and the model's other inputs.

    Yields:
        The batch with labels (1, positions + 1); the model's logits are (1, positions + 1, vocabulary).
    """
    targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    counted = (targets != IGNORED).nonzero().squeeze(1)
    labels = nn.functional.pad(targets[counted], (1, 0), value=IGNORED)
    kept = nn.functional.pad(counted, (0, 1))

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        if hidden.shape[:-1] != batch["labels"].shape:
            raise ValueError(
                f"expected hidden states of {tuple(batch['labels'].shape)} tokens; got {tuple(hidden.shape)}"
            )
        return hidden.flatten(0, 1).index_select(0, kept)[None], *others

    handle = head.register_forward_pre_hook(select)
    try:
        yield {**batch, "labels": labels[None]}
    finally:
        handle.remove()
